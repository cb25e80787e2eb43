"""Ranks that start in a second and can be hurt from outside: a process that has imported everything forks them.

Run as a program it reads one JSON object a line: {"argv", "world", "folder", "file_size": {rank: bytes}, "fault": name, "env": {}}
starts ranks whose output goes to FOLDER/rank-N.log and answers with their pids; {} waits for them, as a launcher does: when
one fails the others are ended. It answers with their exit codes, negative for signals."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


class Nursery:
    """The other side of it, for tests."""

    def __enter__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, argv, world, folder, hurt=lambda pids: None, **more):
        """Start, hurt(pids), wait -> (exit codes, output of all ranks)."""
        Path(folder).mkdir(exist_ok=True, parents=True)
        for rank in range(world):
            (Path(folder) / f"rank-{rank}.log").write_text("")
        pids = self.ask(argv=argv, world=world, folder=folder, **more)
        try:
            hurt(pids)
        except BaseException:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            codes = self.ask()
        return codes, "".join((Path(folder) / f"rank-{rank}.log").read_text() for rank in range(world))


def until(seen, pids=(), seconds=120):
    """Wait until seen() is true; not for ever, nor for ranks that have ended."""
    end = time.monotonic() + seconds
    while not seen():
        ended = [pid for pid in pids if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE]
        assert not ended and time.monotonic() < end, f"{ended} ended" if ended else f"not seen in {seconds} s"
        time.sleep(0.01)


def be_rank(rank, world, port, argv, folder, file_size=None, fault=None, env=None):
    """In a forked child: become a rank and run the trainer."""
    log = os.open(Path(folder) / f"rank-{rank}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in address.items()} | (env or {}))
    sys.argv = ["cv4ctrl.py", *argv]
    if size := (file_size or {}).get(str(rank)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    import cv4ctrl

    if fault:
        globals()[fault](cv4ctrl)
    cv4ctrl.main(argv)
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()  # which it does at exit, and we leave by another door


# --- faults: what goes wrong inside a rank ----------------------------------------------------------------------------------------


def nan_on_rank_1(cv4ctrl, steps=(2,)):
    """The loss of rank 1, and with it its gradient, is not a number in these steps."""
    mean, calls = cv4ctrl.batch_loss, []

    def batch_loss(*args):
        loss = mean(*args)
        calls.append(loss.requires_grad)
        return loss * float("nan") if cv4ctrl.RANK == 1 and loss.requires_grad and sum(calls) in steps else loss

    cv4ctrl.batch_loss = batch_loss


def nan_from_step_2(cv4ctrl):
    nan_on_rank_1(cv4ctrl, range(2, 100))


def loss_spike(cv4ctrl):
    mean, calls = cv4ctrl.batch_loss, []

    def batch_loss(*args):
        loss = mean(*args)
        calls.append(loss.requires_grad)
        return loss * 100 if loss.requires_grad and sum(calls) == 4 else loss

    cv4ctrl.batch_loss = batch_loss


def hang_on_rank_1(cv4ctrl):
    """Rank 1 stops answering in the first evaluation."""
    mean, calls = cv4ctrl.batch_loss, []

    def batch_loss(*args):
        calls.append(1)
        if cv4ctrl.RANK == 1 and len(calls) == 2:
            time.sleep(1000)
        return mean(*args)

    cv4ctrl.batch_loss = batch_loss


def position_forgotten(cv4ctrl):
    """A broken restore: the state comes back, the position in the data does not."""
    order = cv4ctrl.Stream.order
    cv4ctrl.Stream.order = lambda self, step: order(self, 0)


def state_forgotten(cv4ctrl):
    """A broken restore: the weights come back, the optimizer's state does not."""
    cv4ctrl.load_state = lambda engine, folder, adam_steps: None


def slow(cv4ctrl, name, seconds):
    function = getattr(cv4ctrl, name)

    def slowly(*args):
        time.sleep(seconds)
        return function(*args)

    setattr(cv4ctrl, name, slowly)


def be_a_script(cv4ctrl):
    """Not the trainer: the Python file that argv names."""
    cv4ctrl.main = lambda argv: exec(Path(argv[0]).read_text(), {})


def logs_gone_at_step_2(cv4ctrl):
    """The folder of the trackers vanishes, and its name is taken by a file."""
    step, calls = cv4ctrl.train_step, []

    def train_step(engine, frame, batches, config, rate):
        calls.append(1)
        if len(calls) == 2 and cv4ctrl.RANK == 0:
            logs = Path(config.output_dir, config.logging_dir)
            logs.rename(logs.with_name("moved"))
            logs.write_text("")
        return step(engine, frame, batches, config, rate)

    cv4ctrl.train_step = train_step


def slow_steps(cv4ctrl):
    """So that a signal meets one."""
    slow(cv4ctrl, "train_step", 0.1)


def slow_saving(cv4ctrl):
    slow(cv4ctrl, "export", 0.5)


def slow_drawing(cv4ctrl):
    slow(cv4ctrl, "euler_sample", 0.3)


def main():
    sys.path[:0] = [str(ROOT)]
    with contextlib.redirect_stdout(sys.stderr):
        import datasets  # noqa: E401, F401
        from deepspeed.runtime.config import DeepSpeedConfig  # noqa: F401
        from diffusers import AutoencoderKL, CogView4ControlPipeline, CogView4Transformer2DModel  # noqa: F401
        from diffusers.optimization import get_scheduler  # noqa: F401
    pids = []
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            pids = []
            for rank in range(question["world"]):
                pid = os.fork()
                if pid == 0:
                    with contextlib.suppress(Exception):
                        signal.signal(signal.SIGINT, signal.default_int_handler)
                    code = 1
                    try:
                        be_rank(rank, port=port, **question)
                        code = 0
                    except SystemExit as end:
                        code = end.code
                    except BaseException:
                        import traceback

                        traceback.print_exc()
                    sys.stdout.flush(), sys.stderr.flush()
                    os._exit(code)
                pids.append(pid)
            print(json.dumps(pids), flush=True)
        else:
            codes = {}
            while len(codes) < len(pids):
                for pid in set(pids) - codes.keys():
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                if any(codes.values()) and len(codes) < len(pids):  # as a launcher: the others get a while, then they are ended
                    time.sleep(5)
                    for pid in set(pids) - codes.keys():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            print(json.dumps([codes[pid] for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
