"""One tiny base, one data set and one cache of encoded data for the whole suite."""

import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # the tests are for the CPU, also beside GPUs
HERE = Path(__file__).parent
sys.path[:0] = map(str, (HERE.parent, HERE / "demo", HERE / "bench"))
import cv4ctrl  # noqa: E402
import tiny  # noqa: E402

cv4ctrl.torch.set_num_threads(1)  # as in the ranks that are started: what is encoded here and there is bitwise the same


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests marked long: some six minutes more")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: only with --long")
    if not config.getoption("--long"):
        config.option.markexpr = config.option.markexpr or "not long"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_demo.py")  # last: it trains beside the others


@pytest.fixture(scope="session", autouse=True)
def demo(request, tmp_path_factory):
    """Future of the demo's training beside the other tests: the folder of its run."""
    wanted = any(item.path.name == "test_demo.py" for item in request.session.items)
    with ThreadPoolExecutor() as pool:
        train = importlib.import_module("test_demo").train
        yield pool.submit(train, tmp_path_factory.mktemp("demo")) if wanted else None


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tiny.make_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def pipe(base):
    pipeline = cv4ctrl.diffusers.CogView4ControlPipeline
    return pipeline.from_pretrained(base, transformer=None, dtype=cv4ctrl.torch.bfloat16)


@pytest.fixture(scope="session")
def data(base):
    return tiny.make_data(base.with_name("data"), 48)  # with captions of 32 and 48 tokens


@pytest.fixture(scope="session")
def flags(base, data):
    """Flags of a small run on the shared base, data and cache; options replace or add some, None takes one away."""
    shared = {"pretrained_model_name_or_path": base, "dataset_name": data, "encoded_dir": base.with_name("encoded")}
    shared |= {"resolution": 64, "train_batch_size": 4, "mixed_precision": "no", "lr_scheduler": "constant_with_warmup"}
    shared |= {"learning_rate": 1e-3, "lr_warmup_steps": 0, "dataloader_num_workers": 2}
    shared |= {"num_inference_steps": 0, "max_train_steps": 2}

    def make(output_dir, **options):
        words = []
        for name, value in (shared | {"output_dir": output_dir} | options).items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, values)] if value is not None else []
        return words

    return make


@pytest.fixture(scope="session")
def config(flags):
    """Resolved Config of such a run on `world` ranks."""
    return lambda output_dir="unused", world=1, **more: cv4ctrl.resolve(cv4ctrl.parse(flags(output_dir, **more)), world)


@pytest.fixture(scope="session")
def device():
    """This process as the only rank; the end of a run does not end that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv4ctrl.dist, "destroy_process_group", lambda: None)
        device = cv4ctrl.start_ranks()
        cv4ctrl.signal.signal(cv4ctrl.signal.SIGINT, cv4ctrl.signal.default_int_handler)  # Ctrl-C ends the tests
        yield device


@pytest.fixture(scope="session")
def encoded(config, base, device):
    return cv4ctrl.encode(config(), base, cv4ctrl.open_dataset(config()), device)


@pytest.fixture()
def refused(capsys):
    """Runs a command line, which must end with code 2 -> its only line on stderr (but for progress bars, if any)."""

    def run(argv, progress=False):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^2$"):
            cv4ctrl.main([str(word) for word in argv])
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.strip() and not (progress and "/s]" in line)]
        return line

    return run
