"""What a run survives: it is disturbed from outside, and what an undisturbed run leaves is the judge."""

import contextlib
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import cv4ctrl
from ranks import checkpoints, command, launch, main_with, rows, same, shared_nursery, state, until, weights
from test_fp16_rejection import engine_file

OFFLOAD = "zero_optimization.offload_optimizer.device"
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed's optimizer for the host needs g++")
OFFLOADED = [pytest.mark.long, NEEDS_COMPILER]


def reached(folder):
    """Last step in metrics.jsonl."""
    return rows(folder)[-1]["step"] if rows(folder) else 0


@pytest.fixture()
def run(tmp_path):
    """Starts ranks, does something to them and waits for their end -> (exit codes, output)."""
    return lambda job, world=2, hurt=lambda pids: None: shared_nursery().run(job, world, tmp_path / "log", hurt)


@pytest.fixture(scope="module")
def words(flags):
    """12 steps with all that a run can be disturbed in, for two ranks, or with train_batch_size=4 for one."""
    common = {"train_batch_size": 2, "max_train_steps": 12, "checkpointing_steps": 3, "validation_steps": 6}
    common |= {"num_inference_steps": 2, "probe_samples": 2, "adam_epsilon": 1e-3}
    return lambda folder, **options: flags(folder, **common | {"proportion_empty_prompts": 0.2} | options)


@pytest.fixture(scope="module")
def undisturbed(words, encoded, tmp_path_factory):
    """Folder of a run that nothing happens to, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    assert launch(2, words(folder, checkpoints_total_limit=99)) == [[0, None]]
    return folder


@pytest.fixture()
def half(undisturbed, tmp_path):
    """A copy, as if it had been stopped after step 6 with checkpoints 3 and 6."""
    ignored = shutil.ignore_patterns("checkpoint-9", "checkpoint-12")
    folder = shutil.copytree(undisturbed, tmp_path / "half", ignore=ignored)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def goes_on(run, argv, folder, undisturbed):
    """Starts a run again -> its output. What it leaves is bitwise what the undisturbed one left, and nothing else."""
    codes, text = run(argv)
    assert not any(codes), text
    assert same(weights(folder), weights(undisturbed)) and not list(folder.glob(".*.tmp"))
    ours, theirs = ({}, {})
    for run, found in ((folder, ours), (undisturbed, theirs)):
        for row in map(json.loads, open(run / "metrics.jsonl")):  # of a step that was done again the last row counts
            found[row["step"], "loss" in row] = row | {"samples_per_s": 0}
    assert ours == theirs
    for picture in (undisturbed / "validation").iterdir():
        assert picture.read_bytes() == (folder / "validation" / picture.name).read_bytes()
    return text


def only_line(text):
    """What the run says at its end, once and without a traceback."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("cv4ctrl.py: ")]
    (line,) = [line for line in lines if "skipping" not in line and "waiting for" not in line]
    return line


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.long)])
def test_kills_at_random_moments(count, run, words, undisturbed, tmp_path):
    """While it encodes, trains, saves: what is there is whole, and the run that ends is the undisturbed one."""
    rng, kills = random.Random(0), 0

    def kill(pids):
        if kills < count:
            time.sleep(rng.uniform(0.5, 4))
            with contextlib.suppress(ProcessLookupError):  # it is done
                os.kill(rng.choice(pids), signal.SIGKILL)

    while kills < count:
        folder, codes = Path(tempfile.mkdtemp(dir=tmp_path)), [None]  # a new one: who is done is too fast to be killed
        while any(code != 0 for code in codes):
            codes, text = run(words(folder, encoded_dir=None), hurt=kill)
            kills += -signal.SIGKILL in codes
            assert "damaged" not in text and 2 not in codes, text
        goes_on(run, words(folder, encoded_dir=None), folder, undisturbed)


def meet_signal(argv, function, training, call, rank, number):
    """Job: a run in which that rank gets a signal, twice, as a function is called for the call-th time.

    Calls count inside the training steps or outside of them, and each is told."""
    work, calls = getattr(cv4ctrl, function), []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup

    def counted(*args, **options):
        if cv4ctrl.torch.is_grad_enabled() == training:
            calls.append(print("a call"))
            if len(calls) == call and cv4ctrl.RANK == rank:
                with open(Path(argv[argv.index("--output_dir") + 1], ".lock")) as lock:
                    with pytest.raises(BlockingIOError):  # no second run can start
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for _ in range(2):  # a launcher that is signalled with its ranks passes the signal on
                    os.kill(os.getpid(), number)
        return work(*args, **options)

    main_with(argv, **{function: counted})


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_signal_ends_the_run_at_once_and_loses_no_whole_step(world, run, words, encoded, tmp_path):
    """To any rank, in mid-step, in an evaluation, while it encodes. All ranks end with 75 before the next micro-batch,
    probe or picture, after saving the last whole step, once. The same command then does what an undisturbed one does.

    Six signals, one after the other, to a run of three steps of 16 micro-batches, evaluated at 0, 2 and 3."""
    options = {"train_batch_size": 2 // world, "gradient_accumulation_steps": 16, "max_train_steps": 3}
    options |= {"validation_steps": 2, "checkpointing_steps": 100, "probe_samples": 4, "checkpoints_total_limit": 99}
    assert launch(world, words(tmp_path / "undisturbed", **options)) == [[0, None]]
    folder = tmp_path / "run"
    argv = words(folder, encoded_dir=None, **options)
    for n, (function, training, call, step) in enumerate([
        ("save", True, 3, None),  # while it encodes
        ("euler_sample", False, 1, 0),
        ("flow_matching_loss", True, 16 + 3, 1),  # the third micro-batch of the second step
        ("flow_matching_loss", False, 1, 2),  # the first probe
        ("flow_matching_loss", True, 3, 2),  # step 2 is saved already
        ("euler_sample", False, 4 // world + 1, 3),  # of the last evaluation: it continues with that of step 2
    ]):  # fmt: skip
        before = {file: file.stat().st_mtime_ns for file in folder.glob("checkpoint-*/*.json")}
        number = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)[n % 4]
        job = ("test_faults.meet_signal", [argv, function, training, call, n % world, number])
        codes, text = run(job, world)
        assert codes == [75] * world, text
        assert "stopped by a signal; the same" in only_line(text), text
        if step is None:
            assert 0 < len(list(folder.glob("encoded/*"))) < 64  # the other rank stops, too
        else:
            assert text.count("a call") == call * world, text
        assert checkpoints(folder) == [*range(1, (step or 0) + 1)]
        assert all(file.stat().st_mtime_ns == before[file] for file in before)
    goes_on(lambda argv: run(argv, world), argv, folder, tmp_path / "undisturbed")


def slow_micro_batches(argv):
    """Runs a command line in which a signal from outside meets a micro-batch."""
    loss = cv4ctrl.flow_matching_loss

    def slow(*args):
        time.sleep(0.1)
        return loss(*args)

    main_with(argv, flow_matching_loss=slow)


def start(words, output, **env):
    """Starts a command as a user does, with its output in a file -> the process."""
    mine = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # this process may be a rank itself
    env = {name: value for name, value in os.environ.items() if name not in mine} | {"OMP_NUM_THREADS": "1"} | env
    with open(output, "w") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=env, start_new_session=True)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("launcher", ["torch.distributed.run --nproc_per_node", "deepspeed.launcher.runner --num_gpus"])
def test_a_signal_to_a_launcher_and_its_ranks(launcher, world, run, words, tmp_path):
    """As Ctrl-C or a batch system sends it, in a step of 16 micro-batches. All whole steps are saved."""
    folder, output = tmp_path / "run", tmp_path / "output"
    options = {"train_batch_size": 2 // world, "gradient_accumulation_steps": 16, "max_train_steps": 3}
    argv = words(folder, checkpointing_steps=100, checkpoints_total_limit=99, **options)
    program = f"import sys; sys.path[:0] = {sys.path}; import test_faults; test_faults.slow_micro_batches(sys.argv[1:])"
    (tmp_path / "slow.py").write_text(program)
    launched = start(command(f"{launcher}={world}", tmp_path / "slow.py", argv), output)
    until(lambda: reached(folder) > 0)
    time.sleep(0.3)  # the third micro-batch of the second step
    os.killpg(launched.pid, signal.SIGTERM)
    assert launched.wait() != 0
    until(lambda: "stopped by a signal" in output.read_text() and checkpoints(folder) == [1])
    assert launch(world, words(tmp_path / "undisturbed", **options)) == [[0, None]]
    goes_on(lambda argv: run(argv, world), argv, folder, tmp_path / "undisturbed")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_run_sh_reaches_the_ranks_and_it_waits_for_them(number, words, tmp_path):
    argv = words(tmp_path / "run", total_batch_size=4, max_train_steps=4000, num_inference_steps=0)
    script, port = Path(cv4ctrl.__file__).with_name("run.sh"), str(random.randrange(20_000, 30_000))
    started = start(["bash", script, *argv], tmp_path / "output", NUM_GPUS="2", MASTER_PORT=port)
    until(lambda: reached(tmp_path / "run") > 5)
    started.send_signal(number)
    assert started.wait(60) != 0 and "stopped by a signal" in (tmp_path / "output").read_text()
    with open(tmp_path / "run" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no rank is left
    assert max(checkpoints(tmp_path / "run")) == reached(tmp_path / "run")


DAMAGE = {
    "truncated": lambda folder: os.truncate(next(folder.glob("state/*")), 100),
    "a missing file": lambda folder: next(folder.glob("transformer/*.safetensors")).unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(damage, half, capsys):
    DAMAGE[damage](half / "checkpoint-6")
    ((found, manifest),) = cv4ctrl.find_checkpoints(half)
    assert (found.name, manifest["step"]) == ("checkpoint-3", 3)
    assert f"skipping {half / 'checkpoint-6'}, which is damaged: " in capsys.readouterr().err
    DAMAGE[damage](half / "checkpoint-3")
    with pytest.raises(cv4ctrl.Failure, match="only damaged checkpoints") as ended:
        cv4ctrl.find_checkpoints(half)
    assert ended.value.code == 2


def test_a_disk_that_fills_up(run, words, half, undisturbed):
    """A rank may write only 4 kB a file: all end with one line, older checkpoints stay, and the next start goes on."""
    DAMAGE["truncated"](half / "checkpoint-6")  # so that both starts begin at 3
    shutil.copytree(half / "checkpoint-3", half / ".checkpoint-5.tmp")  # left by a killed run
    codes, text = run(words(half), hurt=lambda pids: resource.prlimit(pids[1], resource.RLIMIT_FSIZE, (4000, 4000)))
    assert codes == [1, 1] and re.search("rank 1: .*File too large", only_line(text)), text
    assert checkpoints(half) == [3, 6] and (half / ".checkpoint-6.tmp").exists()
    assert "checkpoint-6, which is damaged" in goes_on(run, words(half), half, undisturbed)


def test_a_folder_that_cannot_be_made_is_refused(run, words, tmp_path):
    codes, text = run(words(tmp_path / "run", encoded_dir="/dev/null/out"))
    assert codes == [2, 2] and "/dev/null/out" in only_line(text), text


def test_a_second_run_in_the_same_folder_is_refused(words, half, refused):
    before = {file: file.stat().st_mtime_ns for file in half.rglob("*")}
    with open(half / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run" in refused(words(half, train_batch_size=4))
    assert before == {file: file.stat().st_mtime_ns for file in half.rglob("*")}


def nan_on_rank_1(argv, *bad):
    """Job: a run in which the loss of rank 1, and with it its gradient, is not a number in steps `bad`."""
    flow_matching_loss, trained = cv4ctrl.flow_matching_loss, []

    def sometimes_nan(*args):
        loss = flow_matching_loss(*args)
        trained.extend([1] * loss.requires_grad)
        return loss * float("nan") if cv4ctrl.RANK == 1 and loss.requires_grad and len(trained) in bad else loss

    main_with(argv, flow_matching_loss=sometimes_nan)


@pytest.mark.parametrize("optimizer", ["none", pytest.param("cpu", marks=OFFLOADED)])
def test_nan_on_one_rank_is_skipped_by_all(optimizer, run, words, tmp_path):
    """The step is skipped, after which a run continues as if it had not been stopped; ten in a row end the run."""
    options = {"max_train_steps": 20, "checkpoints_total_limit": 99, "validation_steps": 20, "mixed_precision": "bf16"}
    options |= {"deepspeed_config": engine_file(tmp_path, OFFLOAD, optimizer)}
    codes, text = run(("test_faults.nan_on_rank_1", [words(tmp_path / "run", **options), 3, *range(7, 20)]))
    found = rows(tmp_path / "run")
    assert [row["skipped"] for row in found] == [0, 0, 1, 1, 1, 1, *range(2, 12)]
    assert [row["step"] for row in found if row["loss"] is None] == [3, *range(7, 17)]
    assert codes == [1, 1] and "10 steps in a row" in only_line(text), text
    kept = {step: tmp_path / "run" / f"checkpoint-{step}" for step in checkpoints(tmp_path / "run")}
    learned = {step: weights(folder / "transformer") for step, folder in kept.items()}
    assert not same(learned[3], learned[6]) and same(learned[6], learned[15])
    assert all(tensor.isfinite().all() for tensor in learned[15].values())
    shutil.copytree(kept[3], tmp_path / "again" / "checkpoint-3")
    assert run(words(tmp_path / "again", **options | {"max_train_steps": 6}))[0] == [0, 0]
    assert [row["skipped"] for row in rows(tmp_path / "again")] == [1, 1, 1]
    if optimizer == "none":  # after a start the one for the host rounds the powers of its betas differently
        assert same(state(tmp_path / "again" / "checkpoint-6"), state(kept[6]))


@pytest.mark.parametrize("optimizer, world", [("none", 1), pytest.param("cpu", 2, marks=OFFLOADED)])
def test_another_number_of_ranks_or_offloading_goes_on(optimizer, world, words, half, undisturbed, tmp_path):
    """For three steps, then as before: the same weights within the rounding of fp32."""
    options = {"deepspeed_config": engine_file(tmp_path, OFFLOAD, optimizer)}
    options |= {"train_batch_size": 4 // world, "max_train_steps": 9}
    assert launch(world, words(half, **options)) == [[0, None]] and reached(half) == 9
    assert launch(2, words(half)) == [[0, None]]
    assert same(weights(half), weights(undisturbed), 1e-5)


def impatient(argv):
    """Job: a run whose ranks wait for each other for a minute, and not for hours."""
    main_with(argv, TIMEOUT=cv4ctrl.TIMEOUT / 120)


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_run(run, words, tmp_path):
    """Rank 1 is stopped: after a time rank 0 says where it waited, and ends."""

    def stop(pids):
        until(lambda: reached(tmp_path / "run") > 2)
        os.kill(pids[1], signal.SIGSTOP)
        until(lambda: "Traceback" in (tmp_path / "log" / "rank-0.log").read_text())
        os.kill(pids[1], signal.SIGCONT)

    codes, text = run(("test_faults.impatient", [words(tmp_path / "run", max_train_steps=4000)]), hurt=stop)
    assert codes[0] == 1 and "Timed out" in text and "in train" in text, text


def without_terminal(argv):
    """Job: as under nohup, after the program has ended that read what is written, and the terminal was closed."""
    for stream, (reader, writer) in ((1, os.pipe()), (2, os.openpty())):
        os.dup2(writer, stream)
        os.close(writer)
        os.close(reader)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train_step = cv4ctrl.train_step

    def step(*args):
        os.kill(os.getpid(), signal.SIGHUP)
        return train_step(*args)

    main_with(argv, train_step=step)


def test_a_run_outlives_its_terminal(run, words, half, undisturbed):
    goes_on(lambda argv: run(("test_faults.without_terminal", [argv])), words(half), half, undisturbed)


def on_its_own_disk(argv, folder):
    """Job: a rank that is alone on its machine."""
    os.chdir(Path(folder, os.environ["RANK"]))
    main_with(argv)


@pytest.mark.parametrize("flag", ["output_dir", "encoded_dir"])
def test_two_machines_without_a_shared_folder_are_refused(flag, words, tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    argv = words(**{"folder": tmp_path / "run"} | {flag.replace("output_dir", "folder"): "relative"})
    codes, text = shared_nursery().run(("test_faults.on_its_own_disk", [argv, tmp_path]), 2, tmp_path)
    assert codes == [2, 2] and re.search("the ranks do not see the same: .*relative", only_line(text)), text


def with_a_stale_listing(argv):
    """Job: rank 1 does not see the newest checkpoint yet."""
    find_checkpoints = cv4ctrl.find_checkpoints
    main_with(argv, find_checkpoints=lambda folder: find_checkpoints(folder)[cv4ctrl.RANK :])


def with_a_stale_copy(argv):
    """Job: rank 1 has a data set with fewer rows at the same path."""
    open_dataset = cv4ctrl.open_dataset
    main_with(argv, open_dataset=lambda config: open_dataset(config).select(range(48 - cv4ctrl.RANK)))


@pytest.mark.parametrize("job", [with_a_stale_listing, with_a_stale_copy])
def test_ranks_that_see_different_checkpoints_are_refused(job, run, words, half):
    """Or different rows."""
    codes, text = run((f"test_faults.{job.__name__}", [words(half)]))
    assert codes == [2, 2] and "rows, cards, checkpoints" in only_line(text), text


def test_tasks_that_do_not_know_of_each_other_are_refused(words, tmp_path):
    """As `mpirun -n 2 python cv4ctrl.py` or srun start them: each would train on half the batch. A job of two tasks
    in which one is started is none of these."""
    wrong = "deepspeed or torchrun"
    cases = [("SLURM_STEP_NUM_TASKS", wrong), ("OMPI_COMM_WORLD_SIZE", wrong), ("SLURM_NTASKS", "")]
    for name, wrong in (*cases, ("RANK", "no meeting at"), ("WORLD_SIZE", "")):
        argv = words(tmp_path / name, train_batch_size=4, max_train_steps=1)
        codes, text = shared_nursery().run(argv, 1, tmp_path, env={"WORLD_SIZE": "words"} | {name: 2})
        assert codes == [2 if wrong else 0] and wrong in text, text
