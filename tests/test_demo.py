"""The demo learns: on the trained tiny base the real trainer makes the generated shape follow the outline.

python tests/test_demo.py FOLDER    the README's numbers: the demo with seeds 0, 1, 2, mean and spread"""

import json
import random
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import CogView4ControlPipeline, CogView4Transformer2DModel  # noqa: E402
from PIL import Image  # noqa: E402

import progress  # noqa: E402
import tiny  # noqa: E402
from ranks import launch  # noqa: E402

BASE = ROOT / "tests" / "base"


def flags_of_the_demo(folder, name, *more):
    """The words of run.sh, with FOLDER for demo/ and FOLDER/name for its run."""
    command = (ROOT / "run.sh").read_text().split("flags=(")[1].split('"$@")')[0]
    words = shlex.split(
        command.replace("\\\n", " ").replace("$here/demo/run", f"{folder}/{name}").replace("$here/demo", str(folder)).replace("$here", str(ROOT))
    )
    return [*words, *map(str, more)]


def mask(image, caption):
    """Pixels that are not of the ground's colour, (H, W) bool."""
    ground = tiny.GROUNDS[" ".join(caption.split()[4:])]
    return np.square(np.asarray(image.convert("RGB"), dtype=np.float32) - ground).sum(-1) > 60**2


def overlap(images, targets, captions):
    """Mean intersection over union of the shapes' masks."""
    pairs = [(mask(a, caption), mask(b, caption)) for a, b, caption in zip(images, targets, captions)]
    return float(np.mean([(a & b).sum() / max(1, (a | b).sum()) for a, b in pairs]))


def fidelity(weights, cases=16, seed=1000):
    """(overlap with the outlined shape, the same with each control swapped for the next case's) of fresh cases, by the installed pipeline."""
    transformer = CogView4Transformer2DModel.from_pretrained(weights, dtype=torch.float32)
    pipe = CogView4ControlPipeline.from_pretrained(BASE, transformer=transformer, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(seed)  # the data set is made with seed 0: none of these pictures is in it
    targets, controls, captions = zip(*(tiny.draw_pair(rng, 64) for _ in range(cases)))
    scores = []
    for used in (controls, controls[1:] + controls[:1]):
        images = pipe(list(captions), control_image=list(used), height=64, width=64, num_inference_steps=20, guidance_scale=1.0,
                      generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        scores.append(overlap(images, targets, captions))
    return scores


def gains_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["control_gain"] for line in lines if "control_gain" in line}


def train(folder):
    """The demo itself, with fewer evaluations."""
    tiny.make_data(folder / "data", 2048)
    return launch(1, flags_of_the_demo(folder, "run", "--validation_steps", 290), threads=1)


@pytest.fixture(scope="module")
def run(demo):
    folder, training = demo
    assert training.result() == [[0, None]]
    return folder / "run"


def test_control_gain_rises_from_nothing(run):
    gains = gains_of(run)
    assert list(gains) == [0, 290, 580]
    assert abs(gains[0]) < 0.01 and gains[580] > 1.5, gains


def test_generated_shapes_follow_their_own_outline(run):
    own, swapped = fidelity(run)
    assert own > 0.8 and swapped < 0.4, (own, swapped)


def test_the_score_itself():
    rng = random.Random(0)
    targets, _, captions = zip(*(tiny.draw_pair(rng, 64) for _ in range(8)))
    assert overlap(targets, targets, captions) == 1
    assert overlap(targets[1:] + targets[:1], targets, captions) < 0.3
    shifted = [image.transform(image.size, Image.Transform.AFFINE, (1, 0, 8, 0, 1, 0), fillcolor=image.getpixel((0, 0))) for image in targets]
    assert 0.2 < overlap(shifted, targets, captions) < 0.8


def test_progress_picture(run, tmp_path):
    progress.progress(run, tmp_path / "progress.png")
    picture = Image.open(tmp_path / "progress.png")
    assert picture.size == (5 * 160, 16 + 4 * 176)  # control, steps 0, 290, 580, target; four cases
    assert len({picture.crop((160 * i, 32, 160 * (i + 1), 192)).tobytes() for i in range(5)}) == 5


def numbers(folder):
    """Print the README's table."""
    tiny.make_data(folder / "data", 2048)
    launch(1, flags_of_the_demo(folder, "encoded-only", "--max_train_steps", 1, "--num_validation_images", 0))
    rows = []
    for seed in range(3):
        clock = time.time()
        assert launch(1, flags_of_the_demo(folder, f"seed-{seed}", "--seed", seed)) == [[0, None]]
        seconds, run = time.time() - clock, folder / f"seed-{seed}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        gains, probes = list(gains_of(run).values()), [line["probe_loss"] for line in lines if "probe_loss" in line]
        training = sum(24 / line["samples_per_s"] for line in lines if "loss" in line)
        rows.append([gains[0], gains[-1], probes[0], probes[-1], *fidelity(run), training, seconds])
        print(seed, rows[-1], flush=True)
    names = ("control gain at step 0", "control gain at the end", "probe loss at step 0", "probe loss at the end", "overlap of generated and outlined shape (IoU)",
             "the same with swapped controls", "seconds in training steps", "seconds from start to end, evaluation included")  # fmt: skip
    print("| | mean | smallest | largest |\n|---|---|---|---|")
    for name, values in zip(names, zip(*rows)):
        print(f"| {name} | {np.mean(values):.3g} | {min(values):.3g} | {max(values):.3g} |")


if __name__ == "__main__":
    numbers(Path(sys.argv[1]))
