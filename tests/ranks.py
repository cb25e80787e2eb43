"""Ranks for tests: forked in a moment from a process that has imported everything, watched, open to faults.

A job is a command line for cv4ctrl.main, or (name of a function, its arguments): a function of this file, or
`file.function` of another file of tests. With main_with it can put a fault into a run."""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PRELOADED = """datasets deepspeed.runtime.zero.muon.original_muon deepspeed.monitor.monitor diffusers.optimization
    diffusers.pipelines.cogview4.pipeline_cogview4_control pytest transformers.models.glm.modeling_glm""".split()
LIMIT = 1200  # seconds of any run, on a busy machine; ranks that take longer hang


class Nursery:
    """Starts ranks and waits for their end."""

    lock = threading.Lock()  # of all threads that do so: to start a process is to look at all others

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def run(self, job, world, folder, hurt=lambda pids: None, env={}):
        """Starts ranks, hurt(pids), waits for their end -> (exit codes, output of all ranks).

        This process serves the rendezvous: no other can take its port. What goes wrong, or hangs, ends the test with
        the stacks and the output of all ranks."""
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        Path(folder).mkdir(exist_ok=True, parents=True)
        ranks, logs = [], [Path(folder, f"rank-{rank}.log") for rank in range(world)]
        for rank, log in enumerate(logs):
            place = common | {"RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}  # one: as `python cv4ctrl.py`
            log.write_text("")
            with self.lock:
                ranks.append(self.context.Process(target=be_rank, args=(job, log, place | env), daemon=True))
                ranks[-1].start()
        try:
            hurt([rank.pid for rank in ranks])
            codes = self.wait(ranks)
        except BaseException as error:
            for number in (signal.SIGCONT, signal.SIGUSR2, signal.SIGKILL):
                for rank in [rank for rank in ranks if rank.is_alive()]:
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(rank.pid, number)
                time.sleep(0.5)
            error.add_note("\n".join(f"--- rank {rank}\n{log.read_text()}" for rank, log in enumerate(logs)))
            raise
        return codes, "".join(log.read_text() for log in logs)

    def wait(self, ranks):
        """Exit codes. Where a rank fails the others are asked to end, and killed later, as by a launcher."""
        end, failed = time.monotonic() + LIMIT, None
        while True:
            with self.lock:
                codes = [rank.exitcode for rank in ranks]
            if None not in codes:
                return codes
            now = time.monotonic()
            assert now < end, f"ranks hang: {codes}"
            if any(codes) and failed is None:
                failed = now
                for rank in ranks:
                    rank.terminate()
            if failed and now > failed + 30:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.02)


shared_nursery = functools.cache(Nursery)


def launch(world, *jobs, **options):
    """Does the jobs one after the other, each on new ranks -> [[exit code, value]] of rank 0; options as for run."""
    results = []
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            codes, text = shared_nursery().run(job, world, folder, **options)
            assert codes[0] in (0, 2), text
            results.append([codes[0], json.loads(Path(folder, "rank-0.json").read_text())])
    return results


def command(launcher, program, argv):
    """Command line of a launcher with its options, at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [sys.executable, "-m", *launcher.split(), f"--master_port={port}", program, *argv]


def until(seen, seconds=100):
    """Waits until seen() is true, but not for ever."""
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, f"not seen in {seconds} s"
        time.sleep(0.01)


def rows(folder):
    """Rows of training in metrics.jsonl, none if there is no such file."""
    lines = [line for file in Path(folder).glob("metrics.jsonl") for line in file.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if "loss" in row]


def weights(folder):
    """Tensors of the safetensors files of a folder, by name."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def state(checkpoint):
    """Tensors of a checkpoint's state, by parameter and entry."""
    files = Path(checkpoint, "state").glob("*.safetensors")
    return {(file.stem, entry): tensor for file in files for entry, tensor in load_file(file).items()}


def same(a, b, tolerance=None):
    """Bitwise, or to within a tolerance relative to the largest weight of each tensor."""
    assert a and a.keys() == b.keys()
    if tolerance is None:
        return all(a[name].equal(b[name]) for name in a)
    return all((a[name] - b[name]).abs().max() <= tolerance * b[name].abs().max() for name in a)


def be_rank(job, log, env):
    """In a forked child: becomes a rank and does the job."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # of the tests, a rank themselves
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in env.items()})
    torch.set_num_threads(1)
    cv4ctrl = importlib.import_module("cv4ctrl")  # only now, since it looks for its rank
    value = None
    try:
        if len(job) == 2 and isinstance(job[1], list):
            file, _, function = job[0].rpartition(".")
            value = getattr(importlib.import_module(file or "ranks"), function)(*job[1])
        else:
            cv4ctrl.main(job)
        atexit._run_exitfuncs()
    finally:
        Path(log).with_suffix(".json").write_text(json.dumps(value))


def checkpoints(folder):
    """Steps of the checkpoints in a folder, whole or not."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in Path(folder).glob("checkpoint-*"))


def main_with(argv, **functions):
    """Runs a command line with functions of the module replaced, until its end or StopIteration."""
    vars(sys.modules["cv4ctrl"]).update(functions)
    with contextlib.suppress(StopIteration):
        sys.modules["cv4ctrl"].main(argv)


def gradients(argv, file):
    """Gradients of the first global batch, as the real engine accumulates and reduces them over the ranks -> `file`."""
    import cv4ctrl

    def train(engine, stream, *_):
        assert not {"GlmModel", "AutoencoderKL"} & {type(each).__name__ for each in gc.get_objects()}
        model = cv4ctrl.VelocityModel(engine, stream.config.resolution)
        for turn in range(stream.config.gradient_accumulation_steps):
            if turn > 0:
                engine.step()
            engine.backward(cv4ctrl.flow_matching_loss(model, stream.micro_batch(model.device, turn)))
        full = sys.modules["deepspeed"].utils.safe_get_full_grad  # collective
        found = {name: full(parameter).clone().contiguous() for name, parameter in engine.module.named_parameters()}
        if cv4ctrl.RANK == 0:
            save_file(found, file)
        raise StopIteration

    main_with(argv, train=train)
