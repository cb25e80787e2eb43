"""The demo teaches the tiny base control."""

import json
import random
import re
import shlex
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

import progress
import tiny
from ranks import launch

ROOT = Path(__file__).parents[1]


def train(folder):
    """The demo with the flags in run.sh, in FOLDER instead of demo/ -> folder of the run."""
    tiny.make_data(folder / "data", 2048)
    words = re.search(r'flags=\((.*?)"\$@"\)', (ROOT / "run.sh").read_text(), re.DOTALL)[1].replace("\\\n", " ")
    words = words.replace("$here/demo", str(folder)).replace("$here", str(ROOT))
    assert launch(1, shlex.split(words)) == [[0, None]]
    return folder / "run"


def overlap(images, targets, captions):
    """Mean intersection over union of the shapes: the pixels that do not have the ground's colour."""
    scores = []
    for pair, caption in zip(zip(images, targets), captions):
        ground = tiny.GROUNDS[caption.partition(" on ")[2]]
        a, b = (np.square(np.asarray(image, dtype=np.float32) - ground).sum(-1) > 60**2 for image in pair)
        scores.append((a & b).sum() / max(1, (a | b).sum()))
    return float(np.mean(scores))


def fidelity(weights, cases=16):
    """(overlap with the outlined shape, the same with the next case's control), drawn by the installed pipeline."""
    model = diffusers.CogView4Transformer2DModel.from_pretrained(weights, dtype=torch.float32)
    parts = {"transformer": model, "dtype": model.dtype}
    pipe = diffusers.CogView4ControlPipeline.from_pretrained(f"{ROOT}/tests/demo/base", **parts)
    rng = random.Random(1000)  # the data are made with seed 0: none of these pictures is among them
    targets, controls, captions = zip(*(tiny.draw_pair(rng) for _ in range(cases)))
    for used in (controls, controls[1:] + controls[:1]):
        drawn = pipe(list(captions), control_image=list(used), height=64, width=64, num_inference_steps=20,
                     guidance_scale=1.0, generator=torch.Generator().manual_seed(0))  # fmt: skip
        yield overlap(drawn.images, targets, captions)


def control_gains(run):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["control_gain"] for row in found if "control_gain" in row}


def test_the_demo_learns_to_follow_outlines(demo, tmp_path):
    """The control gain rises from nothing, drawn shapes follow their own outline, and the picture shows both."""
    run = demo.result()
    gains = control_gains(run)
    assert list(gains) == [0, 145, 290, 435, 580] and abs(gains[0]) < 0.01 and gains[580] > 4, gains
    own, swapped = fidelity(run)
    assert own > 0.8 and swapped < 0.4, (own, swapped)
    progress.progress(run, tmp_path / "progress.png")
    picture = Image.open(tmp_path / "progress.png")
    assert picture.size == (7 * 192, 16 + 4 * 192)  # control, five steps, target; four cases
    assert len({picture.crop((192 * n, 16, 192 * n + 192, 208)).tobytes() for n in range(7)}) == 7
