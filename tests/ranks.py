"""Ranks for tests: forked in a moment from a process that has imported everything, watched, open to faults.

A job is a command line for cv4ctrl.main, or (name of a function, its arguments): a function of this file, or
`file.function` of another file of tests. With main_with it can put a fault into a run. As a program this file is the
process that forks: a JSON object a line describes a rank, the answer is its pid, or asks for the exit code of a pid."""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

PRELOADED = """datasets deepspeed.runtime.zero.muon.original_muon deepspeed.monitor.monitor diffusers.optimization
    diffusers.pipelines.cogview4.pipeline_cogview4_control pytest transformers.models.glm.modeling_glm""".split()


class Nursery(contextlib.AbstractContextManager):
    """The process that forks, from outside. `env` is added to the user's environment, before it imports."""

    def __init__(self, **env):
        mine = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # this process may be a rank itself
        self.env = {name: os.environ[name] for name in os.environ if name not in mine} | {"OMP_NUM_THREADS": "1"} | env
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=self.env, **pipes)
        self.lock = threading.Lock()

    def __exit__(self, *_):
        self.process.stdin.close()  # which ends it
        self.process.wait()

    def ask(self, **question):
        with self.lock:
            print(json.dumps(question, default=str), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())

    def run(self, job, world, folder, hurt=lambda pids: None, quiet=60, env={}):
        """Starts ranks, hurt(pids), waits for their end -> (exit codes, output of all ranks).

        This process serves the rendezvous: no other can take its port. What goes wrong, or hangs (see wait), ends the
        test with the stacks and the output of all ranks."""
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        Path(folder).mkdir(exist_ok=True, parents=True)
        codes, logs = {}, [Path(folder, f"rank-{rank}.log") for rank in range(world)]
        for rank, log in enumerate(logs):
            place = common | {"RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}  # one: as `python cv4ctrl.py`
            log.write_text("")
            codes[self.ask(job=job, log=log, env={k: str(v) for k, v in (place | env).items()})] = None
        try:
            hurt(list(codes))
            self.wait(codes, quiet)
        except BaseException as error:
            for number in (signal.SIGCONT, signal.SIGUSR2, signal.SIGKILL):
                for pid in [pid for pid in codes if codes[pid] is None]:
                    os.kill(pid, number)
                time.sleep(0.5)
            self.wait(codes, quiet)
            error.add_note("\n".join(f"--- rank {rank}\n{log.read_text()}" for rank, log in enumerate(logs)))
            raise
        return list(codes.values()), "".join(log.read_text() for log in logs)

    def wait(self, codes, quiet):
        """Fills in {pid: exit code}. Where a rank fails the others are asked to end, later killed, as by a launcher.

        However busy the machine, ranks hang that do not compute for a second in `quiet` seconds; or, where they have
        started processes such as a compiler, in ten times as many: AssertionError."""
        used, since, failed = 0, time.monotonic(), False
        while living := [psutil.Process(pid) for pid in codes if codes[pid] is None]:
            seconds = sum(sum(process.cpu_times()[:2]) for process in living)
            if abs(seconds - used) > 1:
                used, since = seconds, time.monotonic()
            idle = time.monotonic() - since
            limit = 10 * quiet if any(rank.children() for rank in living) else quiet
            assert idle < limit, f"ranks hang: not a second of work in {idle:.0f} s"
            for process in living if any(codes.values()) and not failed else ():
                process.terminate()
            for process in living if failed and idle > quiet / 2 else ():  # launchers do so, too
                process.kill()
            failed = any(codes.values())
            time.sleep(0.02)
            codes |= {process.pid: self.ask(pid=process.pid) for process in living}


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


def until(seen, pids=(), seconds=100):
    """Waits until seen() is true; not for ever, nor for processes that have ended."""
    end = time.monotonic() + seconds
    while not seen():
        ended = [pid for pid in pids if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE]
        assert not ended and time.monotonic() < end, f"{ended} ended" if ended else f"not seen in {seconds} s"
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
    """In a forked child: becomes a rank, does the job and ends."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    os.environ.update(env)
    torch.set_num_threads(1)
    code, value = 1, None
    try:
        cv4ctrl = importlib.import_module("cv4ctrl")  # only now, since it looks for its rank
        sys.argv = ["cv4ctrl.py", *map(str, job)]
        if len(job) == 2 and isinstance(job[1], list):
            file, _, function = job[0].rpartition(".")
            value = getattr(importlib.import_module(file or "ranks"), function)(*job[1])
        else:
            cv4ctrl.main(job)
        atexit._run_exitfuncs()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    Path(log).with_suffix(".json").write_text(json.dumps(value))
    sys.stdout.flush()
    os._exit(code)


def main_with(argv, **functions):
    """Runs a command line with functions of the module replaced, until its end or StopIteration."""
    vars(sys.modules["cv4ctrl"]).update(functions)
    with contextlib.suppress(StopIteration):
        sys.modules["cv4ctrl"].main(argv)


def gradients(argv, file):
    """Gradients of the first global batch, as the real engine accumulates and reduces them over the ranks -> `file`."""
    import cv4ctrl

    def train(engine, stream, *_):
        assert engine.module.is_gradient_checkpointing  # which auto means where the memory is unknown
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


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "demo")]
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    for question in map(json.loads, sys.stdin):
        if "pid" in question:
            done, status = os.waitpid(question["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        else:
            answer = os.fork() or be_rank(**question)
        print(json.dumps(answer), file=answers, flush=True)
    os.killpg(0, signal.SIGKILL)  # nobody asks any more
