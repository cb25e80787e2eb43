"""What a run survives when the real `deepspeed` or torchrun starts it, with 1 and 2 ranks; nothing inside a rank is changed.

test_faults.py has the same guarantees on ranks that start in a second, and faults that cannot be put in from outside."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

import cv4ctrl
import tiny
from nursery import until
from ranks import logged, rows, same, weights
from test_faults import DAMAGE, plant_pickles

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment():
    """Of a user: without what this process has set to be a rank itself."""
    mine = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in mine} | {"OMP_NUM_THREADS": "1"}


class Launched:
    """`deepspeed --num_gpus=WORLD cv4ctrl.py ARGV`, or another launcher's command for the same, with nobody left behind."""

    def __init__(self, argv, world, folder, by="deepspeed"):
        self.run, self.world = Path(argv[argv.index("--output_dir") + 1]), world
        launch = [Path(sys.executable).parent / "deepspeed", f"--num_gpus={world}", f"--master_port={free_port()}"]
        if by == "torchrun":
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        self.log = folder / "launched.log"
        with open(self.log, "w") as log:
            command = [str(word) for word in [*launch, ROOT / "cv4ctrl.py", *argv]]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)

    def ranks(self):
        """Processes of the ranks, in their order."""
        found = {}
        for p in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "RANK" in p.environ() and "RANK" not in psutil.Process(p.ppid()).environ():
                    found[int(p.environ()["RANK"])] = p
        return [found[rank] for rank in sorted(found)]

    def when(self, seen):
        """Its ranks, once seen()."""
        try:
            until(lambda: len(self.ranks()) == self.world, [self.process.pid])
            ranks = self.ranks()
            until(seen, [self.process.pid])
        except BaseException:
            for p in psutil.Process(self.process.pid).children(recursive=True):
                p.kill()
            raise
        return ranks

    def after(self, lines):
        """Its ranks, once metrics.jsonl has so many lines."""
        return self.when(lambda: logged(self.run) >= lines)

    def end(self, seconds=200):
        """Exit code of the launcher, and what was said; all that it started has ended."""
        code = self.process.wait(seconds)
        until(lambda: not subprocess.run(["pgrep", "-f", str(self.run)], capture_output=True).stdout, seconds=40)  # workers look every 5 s
        return code, self.log.read_text()


@pytest.fixture(scope="module")
def out(tmp_path_factory, encoded):
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def world(request):
    return request.param


@pytest.fixture(scope="module")
def argv(out, flags):
    """60 steps of 4 samples, everything that a run can be disturbed in: loader workers, evaluation, saving."""

    def make(name, world, **options):
        common = dict(train_batch_size=4 // world, max_train_steps=60, checkpointing_steps=10, validation_steps=20, num_inference_steps=2,
                      num_validation_images=1, dataloader_num_workers=1, adam_epsilon=1e-3)  # fmt: skip
        return flags(out / name, **common | options)

    return make


@pytest.fixture(scope="module")
def undisturbed(world, out, argv):
    code, text = Launched(argv(f"undisturbed-{world}", world, checkpoints_total_limit=0), world, out).end()
    assert code == 0, text
    return out / f"undisturbed-{world}"


@pytest.fixture()
def half(undisturbed, tmp_path):
    """The undisturbed run as if it had been stopped after step 30, with checkpoints 20 and 30."""
    shutil.copytree(undisturbed, tmp_path / "half")
    for step in (10, 40, 50, 60):
        shutil.rmtree(tmp_path / "half" / f"checkpoint-{step}")
    for file in (tmp_path / "half").glob("*.safetensors"):
        file.unlink()
    return tmp_path / "half"


def goes_on(words, world, folder, reference, tolerance=None):
    """The same command again ends as if nothing had been."""
    run = Launched(words, world, folder)
    code, text = run.end()
    assert code == 0, text
    assert same(weights(run.run), weights(reference), tolerance)
    assert not list(run.run.glob(".*.tmp"))
    return text


def test_a_kill_in_every_phase(world, undisturbed, argv, tmp_path):
    """SIGKILL to a rank while it encodes, saves, draws, trains, one start after the other; then the run goes on to its end."""
    words = argv(tmp_path / "run", world, encoded_dir=tmp_path / "encoded")
    for phase, step in (("encoding pictures", 0), ("drawing", 0), ("saving", 0), ("training", 24)):
        run = Launched(words, world, tmp_path)
        run.when(lambda run=run, phase=phase, step=step: f"{phase}:" in run.log.read_text() and logged(run.run) >= step)[-1].kill()
        assert run.end(60)[0] != 0, phase
    assert cv4ctrl.checkpoints(run.run)
    goes_on(words, world, tmp_path, undisturbed)


def test_a_disk_that_fills_up(world, undisturbed, argv, tmp_path):
    """From some step on the last rank may write no more than 40 kB a file."""
    words = argv(tmp_path / "run", world)
    run = Launched(words, world, tmp_path)
    run.after(15)[-1].rlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    began = time.time()
    code, text = run.end(60)
    assert code == 1 and time.time() - began < 60, text
    (line,) = [line for line in text.splitlines() if line.startswith("cv4ctrl.py:")]
    assert f"rank {world - 1}" in line and "File too large" in line and "Traceback" not in text, text
    assert cv4ctrl.find_checkpoint(cv4ctrl.resolve(cv4ctrl.parse(words), world))[0]
    goes_on(words, world, tmp_path, undisturbed)


def test_a_damaged_checkpoint(world, half, undisturbed, argv, tmp_path):
    DAMAGE["truncated"](half / "checkpoint-30")
    text = goes_on(argv(half, world), world, tmp_path, undisturbed)
    assert text.count("checkpoint-30 is passed over") == 1, text
    for checkpoint in cv4ctrl.checkpoints(half).values():
        DAMAGE["truncated"](checkpoint)
    code, text = Launched(argv(half, world), world, tmp_path).end()
    assert code == 2 and "not whole" in text and "Traceback" not in text, text


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_a_rank(name, world, undisturbed, argv, tmp_path):
    words = argv(tmp_path / "run", world, checkpointing_steps=100)
    run = Launched(words, world, tmp_path)
    run.after(3)[-1].send_signal(getattr(signal, name))
    code, text = run.end(60)
    (step,) = cv4ctrl.checkpoints(run.run)
    assert code == 75 and f"stopped by a signal after step {step};" in text, text
    assert rows(run.run)[-1]["step"] == step < 60
    goes_on(words, world, tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("by", ["deepspeed", "torchrun"])
def test_a_signal_to_the_launcher(by, name, world, argv, tmp_path):
    """To the process that the user started: a checkpoint, and no rank is left behind."""
    run = Launched(argv(tmp_path / "run", world, checkpointing_steps=100, max_train_steps=400), world, tmp_path, by)
    run.after(5)
    run.process.send_signal(getattr(signal, name))
    code, text = run.end(60)
    (step,) = cv4ctrl.checkpoints(run.run)
    assert code != 0 and rows(run.run)[-1]["step"] == step < 400, text
    assert re.search(f"stopped by a signal after step {step};", text), text


def poison(cache, key):
    """The numbers of an entry of the cache are none any more."""
    file = cv4ctrl.read_index(cache)[key][0]
    entries = load_file(file)
    entries[key].fill_(float("nan"))
    save_file(entries, file)


def test_numbers_that_go_wrong(world, encoded, argv, tmp_path):
    """A row whose encoded picture is not finite: the steps that see it are skipped by all ranks, and name it; too many of them end the run."""
    shutil.copytree(next(iter(encoded.index.values()))[0].parent, tmp_path / "encoded")
    words = argv(tmp_path / "run", world, encoded_dir=tmp_path / "encoded", max_train_steps=12)
    c = cv4ctrl.resolve(cv4ctrl.parse(words), world)
    stream = cv4ctrl.Stream(c, encoded, 0, world)
    bad = stream.row(9)[0]  # of the third step, on whichever rank it is
    hit = [step for step in range(12) if any(bad.image in stream.row(k)[0] for k in stream.order(step))]
    poison(tmp_path / "encoded", bad.image)
    code, text = Launched(words, world, tmp_path).end()
    assert code == 0, text
    found = rows(tmp_path / "run")
    assert [row["step"] - 1 for row in found if row["loss"] is None] == hit and 2 in hit
    assert found[-1]["skipped"] == len(hit) and all(bad.id in row["rows"] for row in found if row["loss"] is None)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    words[words.index("--output_dir") + 1] = str(tmp_path / "again")
    code, text = Launched([*words, "--max_skipped_steps", "1"], world, tmp_path).end()
    assert code == 1 and f"the last of them {hit[0] + 1}, of the rows" in text and str(bad.id) in text and "Traceback" not in text, text


def test_another_number_of_ranks(world, undisturbed, argv, tmp_path):
    """Stopped after some steps, the run goes on with the other number, to the same weights within fp32 rounding."""
    run = Launched(argv(tmp_path / "run", world, checkpointing_steps=100), world, tmp_path)
    run.after(4)[0].send_signal(signal.SIGTERM)
    assert run.end(60)[0] == 75
    goes_on(argv(tmp_path / "run", 3 - world, checkpointing_steps=100), 3 - world, tmp_path, undisturbed, 1e-5)


def test_a_rank_that_hangs(world, argv, tmp_path):
    """A rank's loader worker is stopped: the rank waits for it for ever, and the others for the rank."""
    run = Launched(argv(tmp_path / "run", world, timeout_minutes=0.3, max_train_steps=4000, validation_steps=4000), world, tmp_path)
    (worker,) = run.after(10)[-1].children()
    worker.suspend()
    until(lambda: run.log.read_text().count("Timeout (0:00:18)!") == world, seconds=60)
    worker.resume()  # by itself it ends now that its rank has
    code, text = run.end(60)
    assert code != 0 and "_try_get_data" in text and ("all_reduce" in text) == (world == 2), text


def test_a_second_signal_ends_at_once(world, argv, tmp_path):
    """To a rank whose loader worker is stuck, 5 s after the first one; what was loaded already may still have made a step and its checkpoint."""
    run = Launched(argv(tmp_path / "run", world, max_train_steps=4000, validation_steps=4000), world, tmp_path)
    rank = run.after(10)[-1]
    (worker,) = rank.children()
    worker.suspend()
    for _ in range(2):
        rank.terminate()
        time.sleep(5.5)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
    worker.resume()
    code, text = run.end(60)
    assert code == 128 + signal.SIGTERM, text


def test_a_disk_that_is_too_small(world, argv, tmp_path):
    """More checkpoints than any disk takes."""
    words = argv(tmp_path / "run", world, max_train_steps=10**9, checkpointing_steps=1, checkpoints_total_limit=0)
    code, text = Launched(words, world, tmp_path).end()
    assert code == 2 and "GB are free" in text and "Traceback" not in text and not (tmp_path / "run").exists(), text


def test_bad_rows(world, argv, tmp_path):
    """Each is named by number and file; without them the run goes on, and the others are those that it would have used."""
    lines = []
    for n, (image, control, text) in enumerate(tiny.make_rows(12, 64)):
        (tmp_path / f"{n}.png").write_bytes(image), (tmp_path / f"{n}-control.png").write_bytes(control)
        lines.append(json.dumps({"image": f"{n}.png", "conditioning_image": f"{n}-control.png", "text": text}))
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:100])
    (tmp_path / "5.png").unlink()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = dict(dataset_name=None, jsonl_for_train=tmp_path / "rows.jsonl", encoded_dir=tmp_path / "encoded", probe_samples=0, max_train_steps=2)
    words = argv(tmp_path / "run", world, **options)
    code, text = Launched(words, world, tmp_path).end()
    assert code == 2 and "row 5, image (5.png)" in text and "Traceback" not in text, text
    code, text = Launched([*words, "--skip_bad_rows"], world, tmp_path).end()
    assert code == 0 and "left out 2 rows" in text, text


def test_pickles_are_not_read(world, half, base, data, argv, tmp_path):
    told, gone_off = plant_pickles(tmp_path, base, data, half / "checkpoint-30")
    code, text = Launched(argv(half, world, **told, max_train_steps=31), world, tmp_path).end()
    assert code == 0 and "checkpoint-30 is passed over: state/a.pt" in text, text
    assert not gone_off.exists()


def test_long_runs_leak_nothing(world, argv, tmp_path):
    """Memory and open files of a rank from step 100 to 2,000: less than 10 kB a step (the allocator breathes), no file more."""
    steps, seen = 2000, []
    run = Launched(argv(tmp_path / "run", world, max_train_steps=steps, checkpointing_steps=100, validation_steps=100), world, tmp_path)
    rank = run.after(100)[-1]
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE and logged(run.run) < steps:
        seen.append((logged(run.run), rank.memory_info().rss, rank.num_fds()))
        time.sleep(0.5)
    code, text = run.end()
    assert code == 0, text
    quarter = len(seen) // 4
    (first, memory, files), (last, memory_later, files_later) = (
        [sorted(values)[quarter // 2] for values in zip(*part)] for part in (seen[:quarter], seen[-quarter:]))  # fmt: skip
    print(f"{(memory_later - memory) / (last - first):.0f} bytes a step, {files} and {files_later} open files")
    assert memory_later - memory < 10_000 * (last - first) and files_later <= files + 2
    assert len(cv4ctrl.checkpoints(run.run)) == 2


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_two_machines(name, out, argv, tmp_path):
    """Two agents on this host encode into a shared folder, stop half-way and go on; with a folder each they are refused."""
    port = free_port()
    (tmp_path / "hostfile").write_text("machine-0 slots=1\nmachine-1 slots=1\n")

    def agent(node):
        common = ["--master_addr", "127.0.0.1", "--master_port", port, "--node_rank", node]
        if name == "torchrun":
            return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *common]
        return [Path(sys.executable).parent / "deepspeed", "--hostfile", tmp_path / "hostfile", "--no_ssh", *common]

    def both(words, stop_at=None):
        agents = []
        for node in range(2):
            (tmp_path / f"machine-{node}").mkdir(exist_ok=True)
            command = [str(word) for word in [*agent(node), ROOT / "cv4ctrl.py", *words]]
            agents.append(subprocess.Popen(command, cwd=tmp_path / f"machine-{node}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                           env=environment()))  # fmt: skip
        if stop_at:
            until(lambda: logged(tmp_path / "run") >= stop_at, [agent.pid for agent in agents])
            agents[1].terminate()  # one machine is taken away
        return [agent.communicate(timeout=240)[0] for agent in agents], [agent.returncode for agent in agents]

    shared = argv(tmp_path / "run", 2, encoded_dir=tmp_path / "cache", checkpointing_steps=100)
    texts, codes = both([*shared, "--max_train_steps", "400"], stop_at=6)
    assert 0 not in codes and "stopped by a signal after step" in texts[0], texts
    (step,) = cv4ctrl.checkpoints(tmp_path / "run")
    texts, codes = both([*shared, "--max_train_steps", str(step + 2)])
    assert codes == [0, 0] and list(cv4ctrl.checkpoints(tmp_path / "run")) == [step, step + 2], texts
    reference = Launched(argv("one-machine", 2, max_train_steps=step + 2, checkpointing_steps=100), 2, tmp_path)
    assert reference.end()[0] == 0
    ours, theirs = ([row["loss"] for row in rows(folder)] for folder in (tmp_path / "run", reference.run))
    assert ours == theirs  # as one machine of two ranks has it
    texts, codes = both([word if word != str(tmp_path / "run") else "elsewhere" for word in shared])
    assert 0 not in codes and "ranks [1] do not see what rank 0 writes" in texts[0], texts
