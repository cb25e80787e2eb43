"""diffusers' own example against this trainer: samples/s of both from their progress bars, in turn. `python tests/bench.py reference` uses it.

python tests/reference.py SCRIPT [flags]     runs the user's copy of train_control_cogview4.py, also where there is no GPU"""

import os
import random
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST, LAST = r"Steps:\s+0%", r"Steps:.*\b{0}/{0}\b"  # in the example's output; {0}: number of steps
OUR_ROWS, OUR_FIRST, OUR_LAST = "reading rows", r"training:\s+0%", r"training:.*\b{0}/{0}\b"


def run_example(argv):
    """The script as it is. Without a GPU the one place where it says "cuda", a pipeline's `to`, goes to the CPU; nothing else is changed."""
    import torch

    if not torch.cuda.is_available():
        from diffusers import DiffusionPipeline

        move = DiffusionPipeline.to
        DiffusionPipeline.to = lambda self, where: move(self, "cpu" if where == "cuda" else where)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def captions(tokenizer, count):
    """Captions of exactly 16 tokens: with others the example crashes in its first step."""
    import tiny

    rng, found = random.Random(0), []
    while len(found) < count:
        text = rng.choice(tiny.all_captions())
        while len(tokenizer(text).input_ids) < 16:
            text += rng.choice("!?.,;")
        if len(tokenizer(text).input_ids) == 16:
            found.append(text)
    return found


def watch(command, marks, log, pythonpath=""):
    """Run a program to its end -> seconds on the clock at which each of the marks, regular expressions, first stood in its output."""
    env = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env |= {"TQDM_MININTERVAL": "0", "PYTHONPATH": os.pathsep.join(filter(None, [pythonpath, env.get("PYTHONPATH")]))}  # bars say every step
    times, tail = {}, ""
    with open(log, "w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, bufsize=0) as process:
        while part := process.stdout.read(4096).decode(errors="replace"):
            file.write(part)
            tail = tail[-500:] + part
            times |= {mark: time.perf_counter() for mark in marks if mark not in times and re.search(mark, tail)}
    if process.returncode or len(times) < len(marks):
        lines = [line for line in Path(log).read_text().splitlines() if line.strip()] or ["no output"]
        raise RuntimeError(f"{Path(command[1]).name} ended with {process.returncode}, its last line: {lines[-1][:300]}")
    return [times[mark] for mark in marks]


def compare(script, flags, ours_only, folder, pythonpath, steps, batch):
    """One run of each -> samples/s of (the example's steps, all of ours, our steps). flags: those that both take.

    The example's clock runs from its first step to its last: it encodes in every step. Ours runs from the first row that is read:
    hashing, loading the encoders, encoding, loading the model and the engine's start included."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    theirs = [sys.executable, __file__, str(script), *words, "--cache_dir", f"{folder}/hub", "--output_dir", f"{folder}/theirs"]
    first, last = watch(theirs, [FIRST, LAST.format(steps)], f"{folder}/theirs.log", pythonpath)
    ours = [sys.executable, str(ROOT / "cv4ctrl.py"), *words, *ours_only, "--output_dir", f"{folder}/ours"]
    rows, our_first, our_last = watch(ours, [OUR_ROWS, OUR_FIRST, OUR_LAST.format(steps)], f"{folder}/ours.log")
    return [steps * batch / seconds for seconds in (last - first, our_last - rows, our_last - our_first)]


if __name__ == "__main__":
    run_example(sys.argv[1:])
