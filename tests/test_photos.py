"""Real photographs, in the sizes and modes that scikit-image ships, through the whole trainer and the README."""

import json
import re
from pathlib import Path

import pytest
import skimage
import torch
from PIL import Image

import cv4ctrl

FOLDER = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory, device, flags):
    """Folder of a run on photographs alone, from JSON lines."""
    folder = tmp_path_factory.mktemp("photos")
    photos = sorted(
        file for file in FOLDER.iterdir() if file.suffix in (".png", ".jpg", ".gif") and file.stem != "chessboard_RGB"
    )  # which has 16 bits
    lines = [json.dumps({"image": str(photo), "text": photo.stem.replace("_", " ")}) for photo in photos]
    (folder / "train.jsonl").write_text("\n".join(lines))
    options = {"dataset_name": folder / "train.jsonl", "control": "canny"}
    options |= {"mixed_precision": "bf16", "num_inference_steps": 2}
    cv4ctrl.main(flags(folder / "run", **options))
    return folder / "run"


@pytest.fixture(scope="module")
def snippet(run, base, tmp_path_factory):
    """The names that the README's inference snippet leaves, run on the run's weights and a photograph of 3:2."""
    text = re.search(r"```python\n(.*?)```", Path(cv4ctrl.__file__).with_name("README.md").read_text(), re.S)[1]
    file = tmp_path_factory.mktemp("snippet") / "cogview4.png"
    for before, after in [  # paths, device, size and steps
        ("pose-control", str(run)), ("THUDM/CogView4-6B", str(base)),
        ("pose.jpg", str(FOLDER / "chelsea.png")), ("cogview4.png", str(file)),
        ("cuda:0", "cpu"), ("1024", "64"), ("steps=50", "steps=2"),
    ]:  # fmt: skip
        assert before in text
        text = text.replace(before, after)
    names = {"file": file}
    exec(compile(text, "README.md", "exec"), names)
    return names


def test_the_readmes_inference_snippet_runs_on_the_weights_of_a_run(snippet):
    assert Image.open(snippet["file"]).size == (64, 64)


@torch.no_grad()
def test_controls_are_made_as_the_readmes_snippet_makes_them(run, snippet, base, device):
    """By the detector, of the photograph in its own shape; the edges become a square only then."""
    config = cv4ctrl.Config(**json.loads((run / "run.json").read_text())["config"])
    encoded = cv4ctrl.encode(config, base, cv4ctrl.open_dataset(config), device)
    lines = (run.with_name("train.jsonl")).read_text().splitlines()
    (row,) = (row for row in (*encoded.train, *encoded.held_out) if "chelsea" in lines[row.index])
    wide, high = snippet["control_image"].size
    assert wide > high
    pipe = snippet["pipe"]
    pixels = pipe.image_processor.preprocess(snippet["control_image"], 64, 64).bfloat16()
    assert torch.equal(encoded.entry(row.control_key), pipe.vae.encode(pixels).latent_dist.parameters[0])
    assert Image.open(run / "validation/step-2.png").size[0] == 3 * 64  # control, generated, target
