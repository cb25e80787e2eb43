"""One tiny base, one data set and one cache of encoded data for the whole suite."""

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import cv4ctrl  # noqa: E402
import tiny  # noqa: E402

cv4ctrl.torch.set_num_threads(1)  # as the ranks that are started here: what is encoded here and there is bitwise the same
ROWS = 48  # of 3 to 4 caption lengths: 32 and 48 tokens after padding


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests marked long: some ten minutes more")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: only with --long")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name == "test_demo.py")  # last: its training goes on beside the others
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="only with --long"))


@pytest.fixture(scope="session", autouse=True)
def demo(request, tmp_path_factory):
    """(folder, future of its end) of the demo's training, on one core beside the other tests; None where no test wants it."""
    if not any(item.path.name == "test_demo.py" for item in request.session.items):
        yield None
        return
    import test_demo

    folder = tmp_path_factory.mktemp("demo")
    with ThreadPoolExecutor() as pool:
        yield folder, pool.submit(test_demo.train, folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def base(folder):
    return tiny.make_base(folder / "base")


@pytest.fixture(scope="session")
def data(folder):
    return tiny.make_data(folder / "data", ROWS)


@pytest.fixture(scope="session")
def flags(folder, base, data):
    """Flags of a small run on the shared base, data and cache; options replace or add some, None takes one away."""

    def make(output_dir, **options):
        defaults = dict(
            pretrained_model_name_or_path=base, dataset_name=data, encoded_dir=folder / "encoded", output_dir=output_dir,
            resolution=64, train_batch_size=4, mixed_precision="no", lr_scheduler="constant", learning_rate=1e-3,
            dataloader_num_workers=0, num_validation_images=0, max_train_steps=2,
        )  # fmt: skip
        words = []
        for name, value in (defaults | options).items():
            if value is not None:
                values = value if isinstance(value, list) else [] if value is True else [value]
                words += [f"--{name}", *map(str, values)]
        return words

    return make


@pytest.fixture(scope="session")
def config(flags):
    """Resolved Config of such a run on `world` ranks."""
    return lambda output_dir="unused", world=1, **options: cv4ctrl.resolve(cv4ctrl.parse(flags(output_dir, **options)), world)


@pytest.fixture(scope="session", autouse=True)
def one_process_group():
    """Of all tests of this process: what ends a run does not end it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv4ctrl.dist, "destroy_process_group", lambda: None)
        yield


@pytest.fixture(scope="session")
def device():
    """This process as the only rank."""
    return cv4ctrl.start_ranks()


@pytest.fixture(scope="session")
def encoded(config, base, device):
    """The shared data set, encoded."""
    c = config()
    return cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)


@pytest.fixture()
def refused(capsys):
    """Run the command line; it must end with exit code 2, after one line on stderr (and progress bars), which is returned."""

    handlers = {number: signal.getsignal(number) for number in cv4ctrl.STOP_SIGNALS}

    def run(argv, progress=False):
        capsys.readouterr()
        cv4ctrl.trace.cache_clear()  # as in a fresh process
        with pytest.raises(SystemExit) as ended:
            cv4ctrl.main([str(word) for word in argv])
        for number, handler in handlers.items():
            signal.signal(number, handler)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and not (progress and "/s]" in line)]
        assert ended.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return run
