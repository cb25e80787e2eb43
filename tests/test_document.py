"""The training command of the original document runs word for word, and a second stage goes on from a first."""

import importlib.util
import json
import os
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch
from diffusers import CogView4ControlPipeline, CogView4Transformer2DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import load_image
from PIL import Image

import cv4ctrl
import tiny
from ranks import checkpoints, command, launch, rows, same, weights

DOCUMENT = r"""
  --pretrained_model_name_or_path="THUDM/CogView4-6B" \
  --dataset_name="raulc0399/open_pose_controlnet" \
  --output_dir="pose-control" \
  --mixed_precision="bf16" \
  --train_batch_size=1 \
  --dataloader_num_workers=16 \
  --gradient_accumulation_steps=1 \
  --gradient_checkpointing \
  --proportion_empty_prompts=0 \
  --learning_rate=5e-5 \
  --adam_weight_decay=1e-4 \
  --report_to="wandb" \
  --lr_scheduler="cosine" \
  --lr_warmup_steps=1000 \
  --checkpointing_steps=100 \
  --max_train_steps=50000 \
  --validation_steps=100 \
  --validation_image "pose.jpg" \
  --validation_prompt "two friends sitting by each other enjoying a day at the park, full hd, cinematic" \
  --offload \
  --seed="0"
"""
SMALLER = """--dataloader_num_workers=2 --lr_warmup_steps=1 --checkpointing_steps=2 --max_train_steps=4
--validation_steps=2 --resolution=64 --num_inference_steps=2"""
PROMPT = "two friends sitting by each other enjoying a day at the park, full hd, cinematic"


@pytest.fixture(scope="module")
def control_base(base, tmp_path_factory):
    """A base that minds its control already, so that pictures show which one they were drawn with."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("control") / "base")
    tiny.control_model(base).bfloat16().save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def document(control_base, data, tmp_path_factory):
    """Runs the command in a folder with a pose.jpg -> the folder, what was printed on stderr."""
    folder = tmp_path_factory.mktemp("document")
    tiny.draw_pair(random.Random(7))[1].save(folder / "pose.jpg")
    start = " ".join(command("deepspeed.launcher.runner --num_gpus=1", cv4ctrl.__file__, []))
    small = f"--pretrained_model_name_or_path={control_base} --dataset_name={data} {' '.join(SMALLER.split())}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    line = f"{start} \\{DOCUMENT.rstrip()} {small}"
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_the_command_trains_and_saves_what_it_says(document):
    run = document[0] / "pose-control"
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert checkpoints(run) == [2, 4]
    config = json.loads((run / "run.json").read_text())["config"]
    said = {"mixed_precision": "bf16", "learning_rate": 5e-5, "total_batch_size": 1, "seed": 0}
    said |= {"adam_weight_decay": 1e-4, "lr_scheduler": "cosine", "proportion_empty_prompts": 0, "report_to": "wandb"}
    said |= {"validation_image": ["pose.jpg"], "validation_prompt": [PROMPT]}
    assert {name: config[name] for name in said} == said
    if importlib.util.find_spec("wandb") is None:
        assert document[1].count("the run goes on without it") == 1


def test_its_picture_of_your_case_is_what_inference_draws(document, control_base, monkeypatch):
    """As in the document's last section, but with the mean of the control's posterior instead of a sample."""
    folder = document[0]
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean.contiguous())
    trained = folder / "pose-control" / "checkpoint-4" / "transformer"
    transformer = CogView4Transformer2DModel.from_pretrained(trained, dtype=torch.bfloat16)
    pipe = CogView4ControlPipeline.from_pretrained(control_base, transformer=transformer, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pose = load_image(str(folder / "pose.jpg"))

    pictures = {file.name: Image.open(file) for file in (folder / "pose-control" / "validation").iterdir()}
    assert pictures.keys() == {"step-0.png", "step-2.png", "step-4.png"}
    assert {picture.size for picture in pictures.values()} == {(3 * 64, 5 * 64)}  # the case, then four held-out rows
    drawn = np.asarray(pictures["step-4.png"].crop((64, 0, 128, 64)), dtype=float)

    monkeypatch.chdir(folder)
    config = cv4ctrl.Config(**json.loads((folder / "pose-control/run.json").read_text())["config"])
    cache = cv4ctrl.Cache(config, control_base, None)
    keys = cache.picture(str(folder / "pose.jpg"), "", "column")[0], cache.caption(PROMPT)[0]

    def difference(prompt, control):
        noise = torch.randn(1, 16, 8, 8, generator=cv4ctrl.generator(0, "validation", *keys))
        options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.5, "latents": noise}
        return np.abs(drawn - pipe(prompt=prompt, control_image=control, **options).images[0]).mean()

    own, others = difference(PROMPT, pose), [difference("a red circle", pose), difference(PROMPT, pose.rotate(90))]
    assert own < min(others) / 2, (own, others)


def run(flags, folder, **options):
    """Trains -> (figures of the first evaluation, final weights)."""
    assert launch(1, flags(folder, **options)) == [[0, None]]
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]), weights(folder)


def test_a_second_stage_at_a_higher_resolution_starts_from_the_weights_of_the_first(flags, tmp_path):
    _, trained = run(flags, tmp_path / "first")
    still = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1, "max_train_steps": 1}  # its only rate is 0
    options = still | {"transformer": tmp_path / "first", "resolution": 128}
    probed, found = run(flags, tmp_path / "second", **options)
    assert trained["patch_embed.proj.weight"][:, 64:].abs().min() > 0 and same(found, trained)
    assert probed["step"] == 0 and probed["probe_loss_swapped"] != probed["probe_loss"]  # the control is minded
