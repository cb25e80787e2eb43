"""Real photographs, in the sizes and modes that scikit-image ships, through the whole trainer and the README."""

import inspect
import json
import re
from pathlib import Path

import controlnet_aux
import pytest
import skimage
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image

import cv4ctrl

FOLDER = Path(skimage.__file__).parent / "data"


def edges(file, side):
    """Canny edges of a photograph, made a square first."""
    photo = load_image(str(file)).resize((side, side), Image.Resampling.LANCZOS)
    return controlnet_aux.CannyDetector()(photo, 50, 200, detect_resolution=side, image_resolution=side)


@pytest.fixture(scope="module")
def run(tmp_path_factory, device, flags):
    """Folder of a run on photographs alone, from JSON lines."""
    folder = tmp_path_factory.mktemp("photos")
    photos = sorted(file for file in FOLDER.iterdir() if file.suffix in (".png", ".jpg", ".gif"))
    lines = [json.dumps({"image": str(photo), "text": photo.stem.replace("_", " ")}) for photo in photos]
    (folder / "train.jsonl").write_text("\n".join(lines))
    options = {"dataset_name": None, "jsonl_for_train": folder / "train.jsonl", "control": "canny"}
    options |= {"mixed_precision": "bf16", "num_validation_images": 1, "num_inference_steps": 2}
    cv4ctrl.main(flags(folder / "run", **options))
    return folder / "run"


@torch.no_grad()
def test_controls_are_made_by_the_detector(run, base, device):
    config = cv4ctrl.Config(**json.loads((run / "run.json").read_text())["config"])
    encoded = cv4ctrl.encode(config, base, cv4ctrl.open_dataset(config), device)
    lines = (run.with_name("train.jsonl")).read_text().splitlines()
    (row,) = (row for row in (*encoded.train, *encoded.held_out) if "chelsea" in lines[row.id])
    pixels = VaeImageProcessor(8).preprocess(edges(FOLDER / "chelsea.png", 64), 64, 64).bfloat16()
    posterior = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.bfloat16).encode(pixels).latent_dist
    assert torch.equal(encoded.entry(row.control), posterior.parameters[0])
    assert Image.open(run / "validation/step-2.png").size[0] == 3 * 64  # control, generated, target


def test_detectors_on_offer_take_our_arguments(flags, refused, tmp_path, monkeypatch):
    offer = refused(flags(tmp_path / "out", control="x")).partition("one of ")[2].split(", ")
    classes = {name.lower(): kind for name, kind in vars(controlnet_aux).items() if inspect.isclass(kind)}
    assert {"canny", "openpose", "midas"} <= set(offer)
    for name in set(offer) - {"column"}:
        detector = classes[f"{name.replace('_', '')}detector"]
        assert {"detect_resolution", "image_resolution"} <= inspect.signature(detector.__call__).parameters.keys(), name
        assert name == "canny" or hasattr(detector, "from_pretrained"), name
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(flags(tmp_path / "out", control="openpose"))
    assert "--control openpose" in line and "lllyasviel/Annotators" in line and not (tmp_path / "out").exists()


def test_the_readmes_inference_snippet_runs_on_a_checkpoint(run, base, tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", Path(cv4ctrl.__file__).with_name("README.md").read_text(), re.S)[1]
    for before, after in [  # paths, device, size and steps
        ("pose-control/checkpoint-10000", f"{run}/checkpoint-2"), ("THUDM/CogView4-6B", str(base)),
        ("pose.jpg", str(FOLDER / "rocket.jpg")), ("cuda:0", "cpu"), ("1024", "64"), ("steps=50", "steps=2"),
    ]:  # fmt: skip
        assert before in snippet
        snippet = snippet.replace(before, after)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert Image.open(tmp_path / "cogview4.png").size == (64, 64)
