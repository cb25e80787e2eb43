"""Runs diffusers' train_control_cogview4.py as it is, for bench.py; prints the seconds of its steps."""

import runpy
import sys

import diffusers
import torch
import tqdm.auto

update = tqdm.auto.tqdm.update
move = diffusers.DiffusionPipeline.to
seconds = {}


def timed_update(bar, n=1):
    if not bar.disable:  # the example makes its bar, "Steps", right before the first step
        seconds[bar.desc] = bar.format_dict["elapsed"]
    return update(bar, n)


tqdm.auto.tqdm.update = timed_update
if not torch.cuda.is_available():  # the one place where the example says "cuda"
    diffusers.DiffusionPipeline.to = lambda pipe, where: move(pipe, "cpu" if where == "cuda" else where)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(seconds["Steps"])
