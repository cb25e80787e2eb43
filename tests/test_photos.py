"""Real photographs, of the sizes and modes that scikit-image ships them in, through the whole trainer and back through the README."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from diffusers import CogView4Transformer2DModel
from PIL import Image

import cv4ctrl
import tiny
from ranks import launch

FOLDER = Path(skimage.__file__).parent / "data"
CAPTIONS = {
    "astronaut.png": "an astronaut in an orange suit", "brick.png": "a brick wall", "camera.png": "a man behind a camera, in grey",
    "cell.png": "a cell under the microscope", "chelsea.png": "a cat", "clock_motion.png": "a blurred clock", "coffee.png": "a cup of coffee",
    "coins.png": "coins from Pompeii", "grass.png": "grass", "gravel.png": "gravel", "horse.png": "the silhouette of a horse",
    "hubble_deep_field.jpg": "galaxies, seen by the Hubble telescope", "ihc.png": "stained tissue", "logo.png": "a snake made of shapes",
    "moon.png": "the surface of the moon", "motorcycle_left.png": "a motorcycle in a garage", "no_time_for_that_tiny.gif": "",
    "page.png": "a page of a book", "retina.jpg": "a retina", "rocket.jpg": "a rocket before its launch",
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The photographs as parquet in the open_pose_controlnet format, as JSON lines with canny controls, and as photos alone."""
    folder = tmp_path_factory.mktemp("photos")
    rows, lines = [], []
    for name, caption in CAPTIONS.items():
        with Image.open(FOLDER / name) as image:
            control = cv4ctrl.make_control(image.convert("RGB"), "canny", 256)
        control.save(folder / f"{name}-canny.png")
        rows.append(((FOLDER / name).read_bytes(), (folder / f"{name}-canny.png").read_bytes(), caption))
        lines.append({"image": str(FOLDER / name), "conditioning_image": f"{name}-canny.png", "text": caption})
    tiny.write_parquet(folder / "parquet", rows)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def runs(photos, flags):
    common = dict(mixed_precision="bf16", dataloader_num_workers=1, encoded_dir=photos / "encoded", max_train_steps=2, gradient_checkpointing=True)
    jsonl = common | dict(dataset_name=None, jsonl_for_train=photos / "train.jsonl")
    photo = FOLDER / "chelsea.png"
    made = jsonl | dict(control="canny", conditioning_image_column="none", validation_image=[photo], validation_prompt=["a cat"],
                        detect_validation_image=True, num_validation_images=1, num_inference_steps=2, log_dataset_samples=True)  # fmt: skip
    results = launch(
        1,
        flags(photos / "from-parquet", **common | dict(dataset_name=photos / "parquet")),
        ("count_encoders", [flags(photos / "from-jsonl", **jsonl)]),
        flags(photos / "from-photos", **made),
    )
    assert [code for code, _ in results] == [0, 0, 0]
    return results


def test_photographs_train_from_parquet_and_json_lines_alike(runs, photos):
    assert runs[1] == [0, [0, 0]]  # the same content has the same keys: nothing was encoded again
    models = [CogView4Transformer2DModel.from_pretrained(photos / run / "checkpoint-2" / "transformer") for run in ("from-parquet", "from-jsonl")]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models)))
    assert models[0].patch_embed.proj.weight[:, 64:].any()


def test_canny_controls_are_made_from_the_photographs(runs, photos, config, base, device):
    c = config(dataset_name=None, jsonl_for_train=photos / "train.jsonl", control="canny", encoded_dir=photos / "encoded",
               validation_image=[FOLDER / "chelsea.png"], validation_prompt=["a cat"], detect_validation_image=True)  # fmt: skip
    encoded = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    row = next(row for row in (*encoded.train, *encoded.held_out) if row.text == "a cat")
    assert encoded.cases[0].control == row.control != row.image  # the photograph's own edges
    from controlnet_aux import CannyDetector

    photo = Image.open(FOLDER / "chelsea.png").convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    edges = CannyDetector()(photo, low_threshold=50, high_threshold=200, detect_resolution=64, image_resolution=64)
    pixels = torch.from_numpy(np.array(edges)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = cv4ctrl.load_vae(c, base).encode(pixels.bfloat16()).latent_dist.mean[0].float()
    assert (encoded.latent(row.control) - expected).abs().mean() < 0.02 * expected.abs().mean()
    assert (photos / "from-photos" / "dataset_samples.png").exists()
    assert Image.open(photos / "from-photos" / "validation" / "step-2.png").size == (320, 16 + 176)  # control | generated


def test_a_detector_whose_weights_cannot_be_had(flags, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(flags(tmp_path / "out", control="openpose"))
    assert "--control openpose" in line and "lllyasviel/Annotators" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", cv4ctrl.DETECTORS)
def test_detectors_are_there_and_take_our_arguments(name):
    import inspect

    import controlnet_aux

    kind = getattr(controlnet_aux, cv4ctrl.DETECTORS[name])
    arguments = inspect.signature(kind.__call__).parameters
    assert {"detect_resolution", "image_resolution"} <= arguments.keys()
    assert (name == "canny") == (not hasattr(kind, "from_pretrained"))


def test_the_readmes_inference_snippet_runs_on_a_checkpoint(runs, photos, base, tmp_path, monkeypatch):
    """Only paths, device, size and steps are changed."""
    snippet = re.search(r"```python\n(.*?)```", (Path(cv4ctrl.__file__).parent / "README.md").read_text(), re.S)[1]
    changes = {
        "pose-control/checkpoint-10000/transformer": f"{photos}/from-parquet/checkpoint-2/transformer", "THUDM/CogView4-6B": str(base),
        "pose.jpg": str(FOLDER / "rocket.jpg"), "cuda:0": "cpu", "1024": "64", "num_inference_steps=50": "num_inference_steps=2",
    }  # fmt: skip
    for before, after in changes.items():
        assert before in snippet
        snippet = snippet.replace(before, after)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert Image.open(tmp_path / "cogview4.png").size == (64, 64)
