"""cv4ctrl: turn CogView4-6B into a control model, by flow matching, in one readable file.

The latent of a control image (pose, edges, depth) is laid beside the noisy latent, 16 + 16 = 32 channels; the new input
weights start at zero, so that training begins exactly at the base; the whole transformer learns the velocity v:

    x = (1 - s) x0 + s eps,   v = eps - x0,   loss = E |model(x, control, text, t) - v|^2
    s = mu / (mu + 1000 / t - 1),   mu = 0.75 sqrt(N / 256) + 0.25,   t = 1 ... 1000, N image tokens

The model is told the unshifted t while the latent carries the shifted sigma s, as CogView4ControlPipeline does it.

    python cv4ctrl.py --help                        every flag
    deepspeed --num_gpus=8 cv4ctrl.py [flags]       train; the same command again continues

Rooms, top to bottom, each knows only those above it: 1 constants, 2 configuration, 3 flow matching, 4 control surgery,
5 forward pass, 6 encode once (with what the ranks share), 7 sample stream, 8 evaluation, 9 engine and checkpoints,
10 the loop, 11 main with the plan. A sample goes through encode, Stream, batch_loss, predict and flow_loss.
Heavy libraries are imported where they are used: a mistyped flag is answered at once.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import errno
import faulthandler
import fcntl
import functools
import gc
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# === 1. constants =====================================================================================================

TIMESTEPS = 1000  # levels of noise; this line and the next: scheduler_config.json of CogView4-6B
BASE_SHIFT, MAX_SHIFT, BASE_TOKENS = 0.25, 0.75, 256
LATENT_CHANNELS = 16  # VAE of CogView4-6B
PIXELS_PER_LATENT, PIXELS_PER_TOKEN = 8, 16  # the VAE reduces 8 x, the transformer takes patches of 2 x 2 latents
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the additive recurrence of lowest discrepancy in one dimension
CACHE_FORMAT = "1"  # part of every cache key: raise it when what is stored under a key changes
SHARD_ENTRIES, SHARD_BYTES = 64, 2**30  # of a file of the cache or the state; an interrupted encoding loses one
PROBE_TIMESTEPS = range(100, 901, 100)  # the quantiles 0.1 .. 0.9 of uniform t; sigma is shifted from them
SHEET_ROWS = 12  # of --log_dataset_samples
VALIDATION_CASES = 4  # held-out rows that are drawn where no --validation_image is given
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as PyTorch and DeepSpeed call them
SPIKE = 3  # a loss so many times the usual one is logged with its rows
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPS = {}  # what asked this process to stop, and when: a signal's number, or 0 for the end of its launcher
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by every launcher
HALF = ("fp16", "float16", "half", "fp8", "float8", "float8_e4m3fn", "float8_e5m2", "amp")  # not in ds_config.json
DETECTORS = {  # classes of controlnet_aux that need its core packages only; all but canny load weights
    "canny": "CannyDetector", "hed": "HEDdetector", "leres": "LeresDetector", "lineart": "LineartDetector",
    "lineart_anime": "LineartAnimeDetector", "midas": "MidasDetector", "mlsd": "MLSDdetector", "zoe": "ZoeDetector",
    "normalbae": "NormalBaeDetector", "openpose": "OpenposeDetector", "pidinet": "PidiNetDetector",
}  # fmt: skip
DETECTOR_WEIGHTS = "lllyasviel/Annotators"
KEPT, PASSING = 23, 8  # tensors of (B, S, D) that a block keeps for its backward pass, and that this pass adds; counted
ROOM = 0.94  # of a card's memory; the rest is CUDA's, NCCL's, and lost between blocks
UTILISATION = 0.4  # of a card's peak that a plan counts on: full fine-tunings of that size publish 0.22 to 0.48
CARDS = {  # bytes of memory, dense bf16 FLOP/s; NVIDIA's data sheets
    "A100-40GB": (40e9, 312e12), "A100-80GB": (80e9, 312e12), "H100-80GB": (80e9, 989e12),
    "H200-141GB": (141e9, 989e12), "B200-180GB": (180e9, 2250e12),
}  # fmt: skip
NOT_HERE = {
    "use_8bit_adam": "ZeRO-2 shards the optimizer over the GPUs; on one card set offload_optimizer in ds_config.json",
    "hub_token": "log in with `hf auth login` or set HF_TOKEN: everybody can read a token in a command line",
    "config_file": "ds_config.json takes the place of accelerate's file; another one: --deepspeed_config",
    "num_processes": "start this file with `deepspeed --num_gpus=N` or `torchrun --nproc_per_node=N`",
}
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "csv": "csv_monitor"}  # DeepSpeed's names of its monitors
# flags that decide which samples a run sees, and how its state looks
IDENTITY = ("seed", "total_batch_size", "resolution", "max_sequence_length", "control", "proportion_empty_prompts",
            "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "mixed_precision",
            "only_target_transformer_blocks")  # fmt: skip

# === 2. configuration =================================================================================================


class Ended(Exception):
    """The run ends, with one line on stderr and the exit code of the class; here a failure on which all ranks agree."""

    code = 1

    def __str__(self):
        return " ".join(self.args[0].split())


class Refusal(Ended):
    """The request is wrong: the line says what, and how to mend it."""

    code = 2


class Preempted(Ended):
    """Stopped by a signal, everything saved: the same command again goes on. EX_TEMPFAIL of sysexits.h."""

    code = 75


def refuse_if(wrong, why):
    """Where something is wrong, raise a Refusal that says why."""
    if wrong:
        raise Refusal(why)


def reason(error):
    """What lies behind an exception of a library, in its first line; of the hub's what the server said."""
    root = error.__cause__ or error
    said = getattr(error, "server_message", None) or getattr(root, "strerror", None)
    return said or next(iter(str(root).strip().splitlines()), type(root).__name__)


@contextlib.contextmanager
def explained(why, kind=Refusal):
    """Any exception inside ends the run with one line. Libraries, decoders and networks raise what they like."""
    try:
        yield
    except Exception as error:
        raise kind(f"{why}: {reason(error)}")


def flag(default, help, **more):
    """A field of Config that is a flag. least, most: bounds of the value; choices: the values allowed."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    """Every flag, with the recipe of the original document as default."""

    pretrained_model_name_or_path: str = flag("THUDM/CogView4-6B", "base: hub name, folder, or a checkpoint made here")
    revision: str | None = flag(None, "revision of the base on the hub")
    variant: str | None = flag(None, "variant of the base's weight files, e.g. bf16")
    cache_dir: str | None = flag(None, "where downloads are kept")
    dataset_name: str = flag("raulc0399/open_pose_controlnet", "hub name, folder or parquet file")
    dataset_config_name: str | None = flag(None, "configuration of the data set")
    jsonl_for_train: str | None = flag(None, "instead: JSON lines with image paths, relative to that file or to here")
    max_train_samples: int | None = flag(None, "use only the first so many rows", least=1)
    image_column: str = flag("image", "column of the target image")
    conditioning_image_column: str = flag("conditioning_image", "column of the control image")
    caption_column: str = flag("text", "column of the caption; of a list of captions the longest is taken")
    log_dataset_samples: bool = flag(False, "write dataset_samples.png: what the model is fed, decoded from the cache")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be read, and count them; otherwise they are an error")
    control: str = flag("column", "a column, or what makes it from the target", choices=("column", *DETECTORS))
    resolution: int = flag(1024, "pixels, a multiple of 16; images are resized to this square, not cropped", least=16)
    max_sequence_length: int = flag(1024, "tokens after which a caption is cut", least=16)
    encoded_dir: str | None = flag(None, "cache of encoded data, may be shared; without it OUTPUT_DIR/encoded")
    output_dir: str = flag("pose-control", "where everything goes; the same command again continues there")
    seed: int = flag(0, "of data order, timesteps, noise, caption dropout", least=0, most=2**63 - 1)
    mixed_precision: str = flag("bf16", "bf16, or no for fp32")
    train_batch_size: int = flag(8, "samples a micro-batch and rank", least=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches a step and rank", least=1)
    total_batch_size: int | None = flag(None, "samples a step over all ranks: derives the accumulation", least=1)
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass")
    recompute_blocks: int | None = flag(None, "of --gradient_checkpointing: so many blocks; without it all", least=0)
    compile: bool = flag(False, "compile the blocks: needs g++, and minutes at the start; ZeRO-3 gains little")
    max_train_steps: int | None = flag(None, "optimizer steps; wins over --num_train_epochs", least=1)
    num_train_epochs: int = flag(1, "passes over the data", least=1)
    learning_rate: float = flag(5e-5, "peak, after warm-up", least=0)
    scale_lr: bool = flag(False, "multiply the learning rate by the samples a step")
    lr_scheduler: str = flag("cosine", "schedule", choices=(
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"))  # fmt: skip
    lr_warmup_steps: int = flag(1000, "optimizer steps of linear warm-up", least=0)
    lr_num_cycles: int = flag(1, "restarts of cosine_with_restarts", least=1)
    lr_power: float = flag(1.0, "of polynomial")
    adam_beta1: float = flag(0.9, "decay of the first moment, 0 .. 1", least=0, most=0.999999)
    adam_beta2: float = flag(0.999, "decay of the second moment, 0 .. 1", least=0, most=0.999999)
    adam_weight_decay: float = flag(1e-4, "decoupled weight decay", least=0)
    adam_epsilon: float = flag(1e-8, "added to the root of the second moment", least=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this 2-norm; 0: not", least=0)
    only_target_transformer_blocks: bool = flag(False, "train the blocks and the image input layer, freeze the rest")
    proportion_empty_prompts: float = flag(0.0, "share of samples without caption, 0 .. 1", least=0, most=1)
    weighting_scheme: str = flag("none", "of timesteps or loss, as in SD3", choices=(
        "none", "sigma_sqrt", "logit_normal", "mode", "cosmap"))  # fmt: skip
    logit_mean: float = flag(0.0, "of logit_normal")
    logit_std: float = flag(1.0, "of logit_normal, positive", least=1e-6)
    mode_scale: float = flag(1.29, "of mode")
    dataloader_num_workers: int = flag(16, "processes a rank that read pictures and make batches; 0: none", least=0)
    checkpointing_steps: int = flag(1000, "steps between checkpoints", least=1)
    checkpoints_total_limit: int = flag(2, "checkpoints kept, the oldest goes first; 0: all", least=0)
    resume_from_checkpoint: str = flag("latest", "latest, a path, or none: start anew in a folder without checkpoints")
    upcast_before_saving: bool = flag(False, "export weights in fp32")
    validation_image: list[str] | None = flag(None, "control images; without them held-out rows serve")
    detect_validation_image: bool = flag(False, "they are photos: --control makes their controls, too")
    validation_prompt: list[str] | None = flag(None, "one for all images, or one each")
    validation_steps: int = flag(100, "steps between evaluations: probe and pictures", least=1)
    num_validation_images: int = flag(1, "pictures a case, each from its own noise; 0: draw nothing", least=0)
    num_inference_steps: int = flag(50, "Euler steps of a validation picture", least=1)
    guidance_scale: float = flag(3.5, "of validation pictures; up to 1: no guidance")
    probe_samples: int = flag(32, "rows held out of training, at most a tenth of all", least=0)
    allow_tf32: bool = flag(False, "TF32 matrix products where fp32 is asked for")
    offload: bool = flag(False, "accepted as in the example: frozen encoders are always freed when not used")
    push_to_hub: bool = flag(False, "upload the weights at the end; the token is that of `hf auth login` or HF_TOKEN")
    hub_model_id: str | None = flag(None, "repository for --push_to_hub; without it the name of OUTPUT_DIR")
    report_to: str = flag("none", "tracker", choices=("none", *TRACKERS, "all"))
    tracker_project_name: str = flag("cogview4_train_control", "project of the tracker")
    logging_dir: str = flag("logs", "folder of the tracker under OUTPUT_DIR")
    deepspeed_config: str = flag("ds_config.json", 'the engine\'s settings, "auto" where a flag decides')
    max_skipped_steps: int = flag(10, "steps in a row without a finite gradient after which the run ends", least=1)
    timeout_minutes: float = flag(120.0, "limit of a step with evaluation and saving", least=0.01, most=43_200)
    dry_run: bool = flag(False, "check everything, print the plan, load nothing")
    plan_for: str | None = flag(None, "cards that --dry_run plans for, such as 8xA100-80GB, instead of those here")


def parse(argv=None):
    """Command line -> Config; in names of flags `-` and `_` are the same. Raises Refusal."""
    parser = argparse.ArgumentParser("cv4ctrl.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = functools.partial(refuse_if, True)
    for field in dataclasses.fields(Config):
        more = {"help": f"{field.metadata['help']} [{field.default}]", "default": argparse.SUPPRESS}
        if field.type is bool:
            off = "switch it off" if field.default else argparse.SUPPRESS
            parser.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", **more | {"help": off})
            more["action"] = "store_true"
        else:
            more["type"] = next(kind for kind in (int, float, str) if kind.__name__ in str(field.type))
            more |= {"choices": field.metadata.get("choices"), "nargs": "+" if "list" in str(field.type) else None}
        parser.add_argument(f"--{field.name}", **more)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher says it, the environment too
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
    for name in NOT_HERE:
        refuse_if(f"--{name}" in {word.partition("=")[0] for word in words}, f"--{name} is not taken: {NOT_HERE[name]}")
    values = vars(parser.parse_args(words))
    values.pop("local_rank", None)
    return Config(**values)


def resolve(config, world):
    """Config in which the batch sizes and the learning rate of `world` ranks are numbers. Raises Refusal."""
    c, at_once = config, config.train_batch_size * world
    for field in dataclasses.fields(c):
        value, bound = getattr(c, field.name), field.metadata
        wrong = isinstance(value, (int, float)) and not (
            bound.get("least", -math.inf) <= value <= bound.get("most", sys.float_info.max)
        )
        bounds = "".join(f", at {side} {bound[side]}" for side in ("least", "most") if side in bound)
        refuse_if(wrong, f"--{field.name} {value}: must be a finite number{bounds}")
    total = c.total_batch_size or at_once * c.gradient_accumulation_steps
    accumulation, rest = divmod(total, at_once)
    asked, micro = c.gradient_accumulation_steps, c.train_batch_size
    fits = next((size for size in range(micro, 0, -1) if total % (size * world) == 0), None)
    refuse_if(rest, f"--total_batch_size {total} is not a multiple of --train_batch_size {micro} x {world} ranks"
              f"{f'; --train_batch_size {fits} would do' if fits else ''}")  # fmt: skip
    refuse_if(asked not in (1, accumulation), f"--total_batch_size {total} is an accumulation of {accumulation}, "
              f"--gradient_accumulation_steps is {asked}")  # fmt: skip
    rate = c.learning_rate * (total if c.scale_lr else 1)
    return dataclasses.replace(c, total_batch_size=total, gradient_accumulation_steps=accumulation, learning_rate=rate,
                               scale_lr=False, encoded_dir=c.encoded_dir or f"{c.output_dir}/encoded")  # fmt: skip


def check(config):
    """What can be known from the flags and the files that they name. Raises Refusal."""
    c, images, prompts = config, config.validation_image or [], config.validation_prompt or []
    for wrong, why in (
        (c.mixed_precision not in ("bf16", "no"),
         f"--mixed_precision {c.mixed_precision}: fp16 and fp8 are not supported, use bf16, or no for fp32"),
        (not c.output_dir, "--output_dir: is empty"),
        (not c.pretrained_model_name_or_path, "--pretrained_model_name_or_path: is empty"),
        (c.resolution % PIXELS_PER_TOKEN, f"--resolution {c.resolution}: must be a multiple of {PIXELS_PER_TOKEN}"),
        (c.jsonl_for_train and c.dataset_name != Config.dataset_name,
         "--dataset_name and --jsonl_for_train: give one of them"),
        (c.lr_scheduler == "polynomial" and c.learning_rate <= 1e-7,
         f"--learning_rate {c.learning_rate}: the polynomial schedule ends at 1e-7, begin above it"),
        (bool(images) != bool(prompts), "--validation_image and --validation_prompt: give both or none"),
        (len(images) != len(prompts) and 1 not in (len(images), len(prompts)), f"--validation_image has {len(images)} "
         f"and --validation_prompt {len(prompts)} values: one, or as many"),
        (c.detect_validation_image and (c.control == "column" or not images),
         "--detect_validation_image needs --validation_image and a --control other than column"),
        (c.compile and not shutil.which("g++"), "--compile needs g++ on PATH"),
    ):  # fmt: skip
        refuse_if(wrong, why)
    for path in images:
        with explained(f"--validation_image {path}"):
            Image.open(path).load()
    for name in ("output_dir", "encoded_dir"):
        path, there = Path(getattr(c, name)).absolute(), existing(getattr(c, name))
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        refuse_if(not writable, f"--{name} {path}: {there} is not a folder that can be written to")
        refuse_if(set("[]*?") & set(str(path)), f"--{name} {path}: names with []*? are patterns to libraries")
    for name in ("tensorboard", "wandb"):
        missing = c.report_to in (name, "all") and not importlib.util.find_spec(name)
        refuse_if(missing, f"--report_to {c.report_to} needs {name}, which is not installed: pip install {name}")
    if c.report_to in ("wandb", "all") and RANK == 0 and not {"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys():
        known = True
        with contextlib.suppress(Exception):  # no network, another version: then the tracker will say so
            known = importlib.import_module("wandb").login(prompt=False, verify=False)
        refuse_if(not known, f"--report_to {c.report_to}: log in with `wandb login`, or set WANDB_MODE=offline")


def existing(path):
    """The path, or what of it is there already."""
    path = Path(path).absolute()
    return next(p for p in (path, *path.parents) if os.path.exists(p))


# === 3. flow matching =================================================================================================
# Pure functions of tensors, in fp32: bf16 would keep only 347 of the 1000 sigmas at 1024 px apart.


def shift_mu(image_tokens):
    """mu of image_tokens = (H / 16) (W / 16); calculate_shift in pipeline_cogview4_control.py."""
    return MAX_SHIFT * math.sqrt(image_tokens / BASE_TOKENS) + BASE_SHIFT


def shifted_sigma(timestep, mu):
    """Unshifted t in 0 .. 1000 -> the sigma that scales the noise, in 0 .. 1 (time_shift_type "linear")."""
    sigma = timestep.float() / TIMESTEPS
    return mu * sigma / (mu * sigma + 1 - sigma)  # = mu / (mu + 1 / sigma - 1), and 0 at 0


def warp(u, scheme, logit_mean=0.0, logit_std=1.0, mode_scale=1.29):
    """u uniform in (0, 1) -> u with the density of the scheme; SD3, arXiv 2403.03206, section 3.1."""
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    if scheme == "mode":
        return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def timestep_of(u):
    """u in [0, 1] -> integer t in 1000 .. 1, fp32: large u is little noise, the order of the schedulers' tables."""
    return (TIMESTEPS - torch.floor(u * TIMESTEPS)).clamp(1, TIMESTEPS).float()


def loss_weight(sigma, scheme):
    """Weight of a sample's loss at sigma, the level of its noise; same source as `warp`."""
    if scheme == "sigma_sqrt":
        return sigma**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def interpolate(latent, noise, sigma):
    """x = (1 - sigma) x0 + sigma eps; latent and noise (B, 16, h, w), sigma (B,)."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * latent + sigma * noise


def velocity(latent, noise):
    """dx / dsigma: what the model learns."""
    return noise - latent


def flow_loss(predicted, target, weight):
    """Mean over samples of the weighted squared error; predicted and target (B, 16, h, w), weight (B,)."""
    return (weight * (predicted.float() - target).square().flatten(1).mean(1)).mean()


def euler_step(x, v, sigma, next_sigma):
    """x at sigma -> x at next_sigma along the velocity v."""
    return x.float() + (next_sigma - sigma) * v.float()


def inference_timesteps(steps):
    """The t that the pipeline visits, (steps,): linspace(1000, 1) in fp64, cut to integers."""
    return torch.linspace(TIMESTEPS, 1, steps, dtype=torch.float64).long().float()


# === 4. control surgery ===============================================================================================


def widen(state, config):
    """Transformer state dict and config dict -> the same with twice the input channels, the new columns zero.

    patch_embed.proj is a Linear over (channel, p, p) flattened channel first: the control's columns are appended. Every
    other tensor is shared. What is 32 -> 16 already is returned as it is. Raises Refusal for any other shape."""
    inside, outside = config["in_channels"], config["out_channels"]
    if inside == 2 * outside:
        return state, config
    refuse_if(inside != outside, f"a transformer of {inside} -> {outside} channels is no base and no control model")
    weight = state["patch_embed.proj.weight"]
    state = state | {"patch_embed.proj.weight": torch.cat([weight, torch.zeros_like(weight)], dim=1)}
    return state, config | {"in_channels": 2 * inside}


def weight_files(folder, variant=None):
    """Safetensors of a model folder, its shards in order: those of `variant` if there are any, else those of none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [f for f in files if variant and f".{variant}" in f.name] or [f for f in files if f.name.count(".") == 1]


def meta_model(config):
    """CogView4Transformer2DModel of a config dict, without weights."""
    from diffusers import CogView4Transformer2DModel

    with torch.device("meta"):
        return CogView4Transformer2DModel.from_config(config)


def load_transformer(folder, variant, dtype, device):
    """Widened CogView4Transformer2DModel: built on the meta device, weights assigned straight from file to device."""
    state = {}
    for file in weight_files(folder, variant):
        state |= {name: tensor.to(dtype) for name, tensor in load_file(file, device=str(device)).items()}
    state, config = widen(state, json.loads(Path(folder, "config.json").read_text()))
    model = meta_model(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def trains(name, only_blocks):
    """All weights train; or only the blocks and the image input layer, without which no control could come in."""
    return not only_blocks or name.startswith(("transformer_blocks.", "patch_embed.proj."))


def recomputed(config, layers):
    """Transformer blocks, of so many layers, whose activations are not kept but computed again."""
    asked = layers if config.recompute_blocks is None else config.recompute_blocks
    return min(asked, layers) if config.gradient_checkpointing else 0


def recompute(model, blocks):
    """Gradient checkpointing of so many blocks, the first ones."""
    chosen = set(model.transformer_blocks[:blocks])

    def call(block, *inputs):
        again = block in chosen
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)

    model.enable_gradient_checkpointing(call)


# === 5. the forward pass ==============================================================================================


class KeyMaskAttention:
    """CogView4AttnProcessor's mathematics with a mask that masks.

    The installed processor turns a mask into floats, which SDPA adds to the logits: nothing is hidden. Here a token
    that only pads the batch is no key for anybody: boolean (B, 1, 1, S), so that no query is without keys."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.embeddings import apply_rotary_emb

        rotate = functools.partial(apply_rotary_emb, freqs_cis=image_rotary_emb, use_real_unbind_dim=-2)
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, S, D), S = text + image
        q, k, v = (f(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q).to(x.dtype), attn.norm_k(k).to(x.dtype)  # (B, heads, S, d)
        q, k = (torch.cat([y[:, :, :text], rotate(y[:, :, text:])], dim=2) for y in (q, k))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        x = attn.to_out[0](x.transpose(1, 2).flatten(2, 3))
        return x[:, text:], x[:, :text]


# What all forward passes at one resolution share: rotary tables 2 x (N, d), size and crop (1, 2) in pixels.
Frame = collections.namedtuple("Frame", "rope size crop")


def prepare(model, resolution, device, dtype):
    """Give `model` its attention and make the Frame: rotary tables once, the model itself makes them at every call."""
    for block in model.transformer_blocks:
        block.attn1.set_processor(KeyMaskAttention())
    side = resolution // PIXELS_PER_LATENT
    rope = tuple(table.to(device) for table in model.rope(torch.empty(1, 1, side, side)))
    size = torch.tensor([[resolution, resolution]], device=device, dtype=dtype)
    return Frame(rope, size, torch.zeros_like(size))


def predict(model, frame, noisy, control, prompt_embeds, mask, timestep):
    """The one call of the transformer: velocity (B, 16, h, w).

    noisy, control (B, 16, h, w); prompt_embeds (B, T, 4096); mask (B, T), True for a sample's own tokens, or None where
    all are of one length; timestep (B,), unshifted. Size conditions as CogView4ControlPipeline gives them."""
    batch, dtype = len(noisy), frame.size.dtype
    if mask is not None:
        image = mask.new_ones(batch, len(frame.rope[0]))
        mask = torch.cat([mask, image], dim=1)[:, None, None, :]  # (B, 1, 1, T + N)
    return model(
        hidden_states=torch.cat([noisy, control], dim=1).to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        timestep=timestep,
        original_size=frame.size.expand(batch, 2),
        target_size=frame.size.expand(batch, 2),
        crop_coords=frame.crop.expand(batch, 2),
        attention_mask=mask,
        image_rotary_emb=frame.rope,
        return_dict=False,
    )[0]


# === 6. encode once ===================================================================================================
# --- what the ranks share from here on: agreement, words, signals, files


def gather(item):
    """`item` of every rank, in the order of ranks, on every rank; a plan is made by each rank alone."""
    items = [item]
    if dist.is_initialized():
        items *= WORLD
        dist.all_gather_object(items, item)
    return items


def together(work, mine=True):
    """work() on the ranks where `mine` -> all results; where one cannot read or write, all end. Raises Ended."""
    result = trouble = None
    try:
        result = work() if mine else None
    except (OSError, SafetensorError) as error:
        trouble = f"rank {RANK}: {getattr(error, 'filename', None) or 'a file'}: {reason(error)}"
    results, troubles = zip(*gather((result, trouble)))
    if any(troubles):
        raise Ended(next(filter(None, troubles)))
    return results


def make_shared(folder):
    """Make a folder; all ranks must see the same one. Raises Refusal, Ended."""
    token = gather(Path(folder, f".{os.getpid()}.tmp"))[0]
    together(lambda: (token.parent.mkdir(parents=True, exist_ok=True), token.touch()), RANK == 0)
    seen = any(token.exists() or time.sleep(2) for _ in range(35))  # NFS remembers for 60 s that nothing was there
    blind = [rank for rank, seen in enumerate(gather(seen)) if not seen]
    together(token.unlink, RANK == 0)
    refuse_if(blind, f"{folder}: ranks {blind} do not see what rank 0 writes there; take a disk that all share")


def occupy(folder):
    """Lock FOLDER/.lock -> what must be kept; a POSIX lock ends with its process, its children do not hold it.

    Raises Refusal, Ended."""
    held = []

    def taken():
        """By another run?"""
        held.append(open(Path(folder, ".lock"), "a"))
        try:
            fcntl.lockf(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError as error:
            say(f"{folder}: this disk has no locks ({reason(error)}); see to it that no second run starts there")

    refuse_if(together(taken, RANK == 0)[0], f"--output_dir {folder}: another run is at work there")
    return held


class PlainLines(io.TextIOBase):
    """stderr as a progress bar sees it where it is no terminal: each state of the bar is a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


def progress(jobs, title, **more):
    """tqdm on rank 0 alone; a line every ten seconds where stderr is a file."""
    plain = {} if sys.stderr.isatty() else {"file": PlainLines(), "mininterval": 10, "position": 0}
    return tqdm(jobs, title, disable=RANK > 0, **plain, **more)


def say(text):
    """A line on stderr, from rank 0, that does not cut through a progress bar."""
    if RANK == 0:
        tqdm.write(f"cv4ctrl.py: {text}", file=sys.stderr)


def launchers():
    """Process ids of deepspeed's two processes, or of torchrun, above this rank; [] where neither launched it.

    Not all of them pass on what ends them. A rank whose launcher has ended, be it as a zombie, has other parents."""
    pattern = r"(^|/)(deepspeed|torchrun)( |$)|-m (deepspeed\.launcher|torch\.distributed)"
    with contextlib.suppress(psutil.Error):  # hidden by the system, or ended just now
        above = psutil.Process().parents()[:2]
        return [process.pid for process in above if re.search(pattern, " ".join(process.cmdline()[:5]))]
    return []


def heed_signals(launched_by):
    """From now on a signal or the end of a launcher only asks for a stop, in STOPS; the same signal again ends us.

    Python hands it to the main thread, which may be waiting for other ranks; so a thread of its own reads a pipe."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)

    def listen():
        """For as long as this process lives."""
        pipe = select.poll()
        pipe.register(ours, select.POLLIN)
        while True:
            heard, now = os.read(ours, 1)[0] if pipe.poll(1000) else None, time.monotonic()
            if heard in STOP_SIGNALS and now - STOPS.setdefault(heard, now) > 5:  # launchers repeat theirs soon
                os._exit(128 + heard)
            if launched_by != launchers():
                STOPS.setdefault(0, now)

    threading.Thread(target=listen, daemon=True).start()


def outlive_signals(_):
    """For the processes that load data: signalled as we are, they are needed until the step ends. Only we end them."""
    rank = os.getppid()

    def wait():
        while os.getppid() == rank:  # else it has died
            heard = signal.sigtimedwait(STOP_SIGNALS, 5)
            if heard and heard.si_pid == rank:
                break
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=wait, daemon=True).start()


def stop_if_asked():
    """All ranks end where one was asked to. Raises Preempted."""
    if any(gather(bool(STOPS))):
        raise Preempted("stopped by a signal before a step; what is encoded is kept, the same command goes on")


def digest(*parts):
    """Key of 32 hex digits for a sequence of strings, numbers and bytes."""
    hash = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        hash.update(len(part).to_bytes(8, "big") + part)
    return hash.hexdigest()


def file_digest(file):
    """SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path):
    """A file or folder from the cache to the disk, so that a power cut does not take it back."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # else: a disk that cannot flush folders
            raise
    finally:
        os.close(handle)


def write_aside(file, write):
    """write(path) to a file beside `file`, which then takes its place: whole, on the disk, readable as umask has it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.touch()
    mode = aside.stat().st_mode
    write(aside)
    aside.chmod(mode)  # safetensors makes files that only their owner can read
    flush(aside)
    os.replace(aside, file)


# --- the cache
# The cache is a folder of safetensors files of entries by key. A key is the digest of all that its entry depends on:
# the content, the resolution or cut, the weights of the encoder. Nothing in it can be stale, nothing is stored twice.


# A row of the data set, its parts by their keys; a validation case has neither id nor, where none is known, image.
Row = collections.namedtuple("Row", "id text image control caption")


class BadRow(Exception):
    """A row or picture that cannot be used: which, and why."""


class Changed(BadRow):
    """A picture that is not what it was when its key was made."""


class Encoded(NamedTuple):
    """The encoded data set."""

    index: dict
    train: list
    held_out: list
    cases: list
    empty: str  # key of the embedding of ""
    scaling: float  # of the VAE's latents, 1 for CogView4-6B; the pipeline uses no shift

    def entry(self, key):
        """A caption's embedding (T, 4096), or a picture's posterior moments (32, h, w), bf16."""
        return open_shard(self.index[key][0]).get_tensor(key)

    def latent(self, key, eps=None):
        """A draw from a picture's posterior, its mean without eps; (16, h, w) fp32."""
        mean, log_variance = self.entry(key).float().chunk(2)
        return self.scaling * (mean if eps is None else mean + (0.5 * log_variance.clamp(-30, 20)).exp() * eps)


def open_dataset(config):
    """The data set, its image columns undecoded. Raises Refusal."""
    import datasets

    c, name = config, config.jsonl_for_train or config.dataset_name
    datasets.disable_progress_bars(), datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    kind = "json" if c.jsonl_for_train else "parquet" if Path(name).is_file() else None
    where = {"path": kind, "data_files": name} if kind else {"path": name, "name": c.dataset_config_name}
    with explained(f"data set {name}"):
        local = c.jsonl_for_train or name.startswith((".", "/")) or (name.count("/") > 1 and "://" not in name)
        empty = local and Path(name).stat().st_size == 0
        rows = [] if empty else datasets.load_dataset(**where, split="train", cache_dir=c.cache_dir)
    refuse_if(len(rows) == 0, f"data set {name}: it is empty")
    for option, kind in dict(image_column="image", conditioning_image_column="image", caption_column="list").items():
        column, feature = getattr(c, option), rows.features.get(getattr(c, option))
        found = "image" if isinstance(feature, (datasets.Image, dict)) else getattr(feature, "dtype", None) or "list"
        if c.control == "column" or option != "conditioning_image_column":
            refuse_if(feature is None, f"--{option} {column}: data set {name} has no such column, but "
                      f"{', '.join(rows.features)}")  # fmt: skip
            refuse_if(found not in (kind, "string", "large_string", "null"), f"--{option} {column}: data set {name} "
                      f"has {found} there, a string or {kind} is expected")  # fmt: skip
    named = {c.image_column, c.conditioning_image_column, c.caption_column}
    rows = rows.select_columns([column for column in rows.features if column in named])  # others may not be readable
    for column in [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows.select(range(min(len(rows), c.max_train_samples or len(rows))))


def image_bytes(config, id, row, column):
    """(content, name) of an image file of a row: bytes, or a path relative to the JSON lines or to here."""
    value = row[column]
    path, data = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    name = f"row {id}, {column} ({path})" if path else f"row {id}, {column}"
    if not isinstance(path, str) and not isinstance(data, bytes):
        raise BadRow(f"{name}: neither an image nor a path")
    try:
        beside = Path(config.jsonl_for_train or ".").parent / (path or "")
        return data or (beside if beside.exists() else Path(path)).read_bytes(), name
    except (OSError, ValueError) as error:
        raise BadRow(f"{name}: {reason(error)}")


def caption_text(config, id, row):
    """Caption of a row, of a list its longest."""
    value = row[config.caption_column]
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if not texts:
        raise BadRow(f"row {id}, {config.caption_column}: no caption")
    return max(texts, key=len)


def read_picture(config, rows, todo):
    """(key, encoder's digest, row id or None, column or path, control) -> (key, picture as the pipeline reads it,
    (1, 3, H, W), or BadRow)."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import load_image

    key, encoder, id, column, control = todo
    side, name, made = config.resolution, column, [control] * (control != "column")
    try:
        data, name = (Path(column).read_bytes(), column) if id is None else image_bytes(config, id, rows[id], column)
        if digest(encoder, *made, data) != key:
            raise Changed(f"{name}: changed since its content was looked at")
        image = load_image(Image.open(io.BytesIO(data)))
    except BadRow as error:
        return key, error
    except Exception as error:  # decoders raise whatever they like on broken files
        why = reason(error).partition(" <_io")[0]  # an address in memory
        return key, BadRow(f"{name}: cannot be decoded as an image: {why}")
    image = make_control(image, control, side) if made else image
    return key, VaeImageProcessor(PIXELS_PER_LATENT).preprocess(image, side, side)


@functools.cache
def load_detector(name):
    """Detector of controlnet_aux, on the CPU, its weights from the hub. Raises Refusal."""
    import controlnet_aux

    kind = getattr(controlnet_aux, DETECTORS[name])
    with explained(f"--control {name}: the detector's weights ({DETECTOR_WEIGHTS}) cannot be had"):
        return kind.from_pretrained(DETECTOR_WEIGHTS) if hasattr(kind, "from_pretrained") else kind()


def make_control(image, name, side):
    """Target -> its control at training resolution; canny with the thresholds of the original document."""
    thresholds = {"low_threshold": 50, "high_threshold": 200} if name == "canny" else {}
    image = image.resize((side, side), Image.Resampling.LANCZOS)
    return load_detector(name)(image, detect_resolution=side, image_resolution=side, **thresholds)


def store(folder, entries, dtype=torch.bfloat16):
    """Write (key, tensor) pairs, SHARD_ENTRIES or SHARD_BYTES a file; what came before an error is kept."""
    pending = {}

    def flush():
        if pending:
            write_aside(Path(folder, f"{digest(*pending)}.safetensors"), lambda path: save_file(pending, path))
            pending.clear()

    try:
        for key, tensor in entries:
            pending[key] = tensor.to("cpu", dtype).contiguous()
            if len(pending) == SHARD_ENTRIES or sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
                flush()
    finally:
        flush()


def read_index(folder):
    """Key -> (file, length of the first axis, which counts an embedding's tokens) of all whole files of the cache."""
    index = {}
    for file in sorted(Path(folder).glob("[!.]*.safetensors")):
        with contextlib.suppress(SafetensorError):  # cut short by a crash or a full disk: encoded again
            with safe_open(file, "pt") as shard:
                index |= {key: (file, shard.get_slice(key).get_shape()[0]) for key in shard.keys()}
    return index


open_shard = functools.lru_cache(maxsize=128)(functools.partial(safe_open, framework="pt"))


def fingerprint(folder):
    """Digest of the files of an encoder. Large blobs of the hub's cache are named by their SHA-256: no need to read."""
    parts = []
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".model", ".txt")):
        blob = file.resolve()
        named = blob.parent.name == "blobs" and len(blob.name) == 64
        parts += [file.name, blob.name if named else file_digest(blob)]
    return digest(*parts)


def find_rows(config, base, rows):
    """Keys of everything -> ([Row], [BadRow], validation cases, key of "", digest of the encoder of pictures); the
    reading is split over the ranks."""
    c, encoders, made = config, None, [config.control] * (config.control != "column")
    if RANK == 0:
        text = fingerprint(base / "text_encoder"), fingerprint(base / "tokenizer"), c.max_sequence_length
        encoders = digest(CACHE_FORMAT, fingerprint(base / "vae"), c.resolution), digest(CACHE_FORMAT, *text)
    picture, text = gather(encoders)[0]

    def keys(id):
        """Row of a number, or why it cannot be used."""
        try:
            row = rows[id]
            image, caption = image_bytes(c, id, row, c.image_column)[0], caption_text(c, id, row)
            control = image if made else image_bytes(c, id, row, c.conditioning_image_column)[0]
        except BadRow as error:
            return error
        return Row(id, caption, digest(picture, image), digest(picture, *made, control), digest(text, caption))

    mine = progress(range(RANK, len(rows), WORLD), "reading rows")
    found = sum(gather([keys(id) for id in mine if not STOPS]), [])
    stop_if_asked()
    bad, found = [r for r in found if isinstance(r, BadRow)], sorted(r for r in found if isinstance(r, Row))
    images, prompts, cases = c.validation_image or [], c.validation_prompt or [], []
    pairs = zip(images * (len(prompts) if len(images) == 1 else 1), prompts * (len(images) if len(prompts) == 1 else 1))
    for path, prompt in pairs:
        control = digest(picture, *(made if c.detect_validation_image else ()), Path(path).read_bytes())
        cases.append(Row(None, prompt, path, control, digest(text, prompt)))
    return found, bad, cases, digest(text, ""), picture


def encode(config, base, rows, device):
    """Encode what the cache lacks, the work split over the ranks -> Encoded. Raises Refusal for unusable rows."""
    c, folder, broken = config, Path(config.encoded_dir), {}
    found, bad, cases, empty, encoder = find_rows(c, base, rows)
    refuse_if(bad and not c.skip_bad_rows, f"{bad and bad[0]} ({len(bad)} of {len(rows)} rows are such; "
              "--skip_bad_rows leaves them out)")  # fmt: skip
    make_shared(folder)
    for file in folder.glob(".*.tmp") if RANK == 0 else ():
        with contextlib.suppress(OSError):  # another run that shares the cache may clean up as well
            time.time() - file.stat().st_mtime < 3600 or file.unlink()  # left by a crash; a younger one may be in use
    column = c.conditioning_image_column if c.control == "column" else c.image_column
    made = c.control if c.detect_validation_image else "column"
    pictures = {case.control: (None, case.image, made) for case in cases}
    for row in found:
        pictures |= {row.image: (row.id, c.image_column, "column"), row.control: (row.id, column, c.control)}
    captions = {empty: ""} | {row.caption: row.text for row in (*found, *cases)}

    index = gather(read_index(folder) if RANK == 0 else None)[0]  # one for all: others write already
    mine = [(key, encoder, *what) for key, what in pictures.items() if key not in index][RANK::WORLD]
    together(lambda: store(folder, picture_entries(c, base, rows, mine, device, broken)))
    mine = [(key, text) for key, text in captions.items() if key not in index][RANK::WORLD]
    together(lambda: store(folder, caption_entries(c, base, mine, device)))
    stop_if_asked()
    gc.collect()  # the encoders are gone before the transformer is loaded
    torch.cuda.empty_cache()
    broken = {key: error for part in gather(broken) for key, error in part.items()}
    if changed := [error for error in broken.values() if isinstance(error, Changed)]:
        raise Ended(f"{changed[0]}; the same command again goes on with what it is now")
    usable = [row for row in found if row.image not in broken and row.control not in broken]
    left_out, first = len(rows) - len(usable), [*bad, *broken.values(), None][0]
    refuse_if(broken and not c.skip_bad_rows, f"{first} ({left_out} such rows; the others are encoded and kept; "
              "--skip_bad_rows leaves them out)")  # fmt: skip
    refuse_if(any(case.control in broken for case in cases), f"--validation_image: {first}")
    if left_out:
        ids = ", ".join(map(str, sorted(set(range(len(rows))) - {row.id for row in usable})[:50]))
        say(f"left out {left_out} rows that cannot be used ({ids}{', ...' * (left_out > 50)}), the first: {first}")
    train, held_out = hold_out(usable, c.probe_samples)
    cases = [case._replace(image=None) for case in cases] or held_out[:VALIDATION_CASES]
    scaling = json.loads((base / "vae" / "config.json").read_text())["scaling_factor"]
    index = gather(read_index(folder) if RANK == 0 else None)[0]
    lost = {key for row in (*train, *held_out, *cases) for key in row[2:] if key} - index.keys()
    if lost or empty not in index:
        raise Ended(f"{folder}: what was encoded is not there any more; does something else clean up there?")
    return Encoded(index, train, held_out, cases, empty, scaling)


def hold_out(rows, wanted):
    """(rows to train on, rows to evaluate on): at most a tenth, chosen by content, so that no row moves the others."""
    chosen = sorted(rows, key=lambda row: (digest("held out", row.image, row.caption), row.id))
    chosen = set(chosen[: min(wanted, len(rows) // 10)])
    return [row for row in rows if row not in chosen], [row for row in rows if row in chosen]


def load_options(config, folder):
    """How diffusers shall load the frozen parts of a base: the files that check_base has seen."""
    there = any(f".{config.variant}" in file.name for file in weight_files(folder, config.variant))
    variant = config.variant if there else None
    return dict(dtype=torch.bfloat16, use_safetensors=True, low_cpu_mem_usage=False, variant=variant)


def load_vae(config, base):
    """AutoencoderKL of the base in bf16, frozen, on the CPU."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(base / "vae", **load_options(config, base / "vae")).requires_grad_(False)


def picture_entries(config, base, rows, todo, device, broken):
    """Posterior moments (32, h, w) of the pictures in `todo`; what cannot be read goes to `broken` by its key."""
    if not todo:
        return
    vae, read = load_vae(config, base).to(device), functools.partial(read_picture, config, rows)
    workers = min(config.dataloader_num_workers, len(todo))
    loader = DataLoader(todo, None, collate_fn=read, num_workers=workers, worker_init_fn=outlive_signals)
    for key, pixels in progress(loader, "encoding pictures"):
        if STOPS:
            return
        if torch.is_tensor(pixels):  # one at a time: an entry does not depend on its neighbours
            yield key, vae.encode(pixels.to(device, torch.bfloat16)).latent_dist.parameters[0]
        else:
            broken[key] = pixels


def caption_entries(config, base, todo, device):
    """Prompt embeddings (T, 4096) of the captions in todo [(key, text)].

    The pipeline's own function encodes each caption alone: it pads to a multiple of 16 tokens and lets the pads be
    attended to, so that an embedding from a batch would be another one."""
    if not todo:
        return
    from diffusers import CogView4ControlPipeline
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers(), quiet_transformers()
    options = load_options(config, base / "text_encoder")
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=None, vae=None, **options).to(device)
    for key, text in progress(todo, "encoding captions"):
        if STOPS:
            return
        with torch.no_grad():
            yield key, pipe.encode_prompt(text, None, False, max_sequence_length=config.max_sequence_length)[0][0]


# === 7. the sample stream =============================================================================================
# Sample k of a run is a pure function of (seed, k). Ranks, workers and restarts only decide who asks for it.


def draw(*address):
    """Random generator of an address such as (seed, "noise", k)."""
    return torch.Generator().manual_seed(int(digest(*address)[:15], 16))


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, rows):
    """Order of the rows in an epoch, (rows,) int64."""
    return torch.randperm(rows, generator=draw(seed, "order", epoch))


class Stream(Dataset):
    """Micro-batch n of a rank: accumulation n % A of step n // A, A = gradient_accumulation_steps.

    The samples of a global batch are sorted by text length before they are cut into micro-batches, in the same way for
    any number of ranks: the gradient is the same, most of the padding goes."""

    def __init__(self, config, encoded, rank, world):
        self.config, self.encoded, self.rank, self.world = config, encoded, rank, world
        self.mu = shift_mu((config.resolution // PIXELS_PER_TOKEN) ** 2)

    def row(self, k):
        """(Row, key of its text) of sample k: every row once an epoch; some lose their caption."""
        seed, rows = self.config.seed, self.encoded.train
        row = rows[permutation(seed, k // len(rows), len(rows))[k % len(rows)]]
        empty = torch.rand((), generator=draw(seed, "caption", k)) < self.config.proportion_empty_prompts
        return row, self.encoded.empty if empty else row.caption

    def timestep(self, k):
        """t of sample k, (1,): an additive recurrence spreads neighbours evenly, its start makes each one uniform."""
        c, start = self.config, int(digest(self.config.seed, "timestep"), 16)
        u = (((start + k * GOLDEN) % 2**64 >> 11) + 0.5) / 2**53
        u = torch.tensor([u], dtype=torch.float64)
        return timestep_of(warp(u, c.weighting_scheme, c.logit_mean, c.logit_std, c.mode_scale))

    def order(self, step):
        """The k of a global batch, by text length."""
        total = self.config.total_batch_size
        return sorted(range(step * total, (step + 1) * total), key=lambda k: (self.encoded.index[self.row(k)[1]][1], k))

    def sample(self, row, caption, timestep, *address):
        """What the model is fed of a row; noise and posterior draws are those of the address."""
        side, generator = self.config.resolution // PIXELS_PER_LATENT, draw(self.config.seed, *address)
        noise, eps, control_eps = torch.randn(3, LATENT_CHANNELS, side, side, generator=generator)
        latent, control = self.encoded.latent(row.image, eps), self.encoded.latent(row.control, control_eps)
        return dict(row=row.id, latent=latent, control=control, noise=noise, timestep=timestep,
                    prompt_embeds=self.encoded.entry(caption))  # fmt: skip

    def __getitem__(self, n):
        step, turn = divmod(n, self.config.gradient_accumulation_steps)
        micro = self.config.train_batch_size
        first = (turn * self.world + self.rank) * micro
        positions = self.order(step)[first : first + micro]
        return collate([self.sample(*self.row(k), self.timestep(k), "noise", k) for k in positions], self.mu)


def collate(samples, mu):
    """Samples -> micro-batch: prompt_embeds padded on the right with zeros, mask (B, T), None if nothing is padded."""
    batch = {name: torch.stack([s[name] for s in samples]) for name in ("latent", "control", "noise")}
    batch["rows"] = [s["row"] for s in samples]
    batch["timestep"] = torch.cat([s["timestep"] for s in samples])
    batch["sigma"] = shifted_sigma(batch["timestep"], mu)
    batch["prompt_embeds"] = torch.nn.utils.rnn.pad_sequence([s["prompt_embeds"] for s in samples], batch_first=True)
    lengths = torch.tensor([len(s["prompt_embeds"]) for s in samples])
    batch["mask"] = None if lengths.min() == lengths.max() else torch.arange(lengths.max()) < lengths[:, None]
    return batch


def micro_batches(stream, start, stop, device):
    """The micro-batches of steps start .. stop, on `device`; the loader workers start at once."""
    accumulation, workers = stream.config.gradient_accumulation_steps, stream.config.dataloader_num_workers
    numbers, pin = range(start * accumulation, stop * accumulation), device.type == "cuda"
    loader = DataLoader(stream, None, sampler=numbers, num_workers=min(workers, len(numbers)), pin_memory=pin,
                        worker_init_fn=outlive_signals)  # fmt: skip
    loaded = iter(loader)
    return (to_device(batch, device) for batch in loaded)


def to_device(batch, device):
    """The tensors of a micro-batch on `device`; from pinned memory the copy is not waited for."""
    return {name: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for name, v in batch.items()}


def batch_loss(model, frame, batch, scheme):
    """Flow-matching loss of a micro-batch, fp32 scalar."""
    noisy = interpolate(batch["latent"], batch["noise"], batch["sigma"])
    predicted = predict(model, frame, noisy, batch["control"], batch["prompt_embeds"], batch["mask"], batch["timestep"])
    return flow_loss(predicted, velocity(batch["latent"], batch["noise"]), loss_weight(batch["sigma"], scheme))


# === 8. evaluation ====================================================================================================


@torch.no_grad()
def euler_sample(model, frame, noise, control, prompt_embeds, empty_embeds, steps, guidance):
    """Noise (1, 16, h, w) -> latent in CogView4ControlPipeline's steps; guidance > 1 mixes in the prediction for ""."""
    x, timesteps = noise, inference_timesteps(steps)
    sigmas = shifted_sigma(torch.cat([timesteps, torch.zeros(1)]), shift_mu(len(frame.rope[0]))).tolist()
    for t, sigma, next_sigma in zip(timesteps.to(x.device), sigmas, sigmas[1:]):
        v = predict(model, frame, x, control, prompt_embeds, None, t.expand(len(x)))
        if guidance > 1:
            unguided = predict(model, frame, x, control, empty_embeds, None, t.expand(len(x)))
            v = unguided + guidance * (v - unguided)
        x = euler_step(x, v, sigma, next_sigma).to(v.dtype)  # the scheduler rounds to the model's type as well
    return x


def spread(jobs, work, title):
    """{job: work(job)} of all jobs on every rank, the work spread over the ranks.

    All ranks call `work` equally often, the last ones perhaps in vain: under ZeRO-3 a forward pass is collective."""
    done = {}
    for turn in progress(range(math.ceil(len(jobs) / WORLD)), title, leave=False):
        job = jobs[min(turn * WORLD + RANK, len(jobs) - 1)]
        done[job] = work(job)
    return {job: result for part in gather(done) for job, result in part.items()}


@torch.no_grad()
def probe(model, frame, stream):
    """Probe loss and control gain of the held-out rows, in all and at each of PROBE_TIMESTEPS; always the same noise.

    The gain compares with the loss where each row is given the next row's control. None without two rows."""
    rows, size = stream.encoded.held_out, stream.config.train_batch_size
    if len(rows) < 2:
        return None
    samples = [stream.sample(row, row.caption, None, "probe", n) for n, row in enumerate(rows)]

    def loss_sum(job):
        """Loss of (t, swapped or not, first row of a batch), summed over its rows."""
        t, swapped, first = job
        batch = []
        for n in range(first, min(first + size, len(rows))):
            control = samples[(n + swapped) % len(rows)]["control"]
            batch.append(samples[n] | {"control": control, "timestep": torch.tensor([float(t)])})
        batch = to_device(collate(batch, stream.mu), frame.size.device)
        return batch_loss(model, frame, batch, "none").item() * len(batch["rows"])

    jobs = [(t, swapped, first) for t in PROBE_TIMESTEPS for swapped in (0, 1) for first in range(0, len(rows), size)]
    sums = spread(jobs, loss_sum, "probing")
    own, other = ([sum(sums[job] for job in jobs if job[:2] == (t, swapped)) / len(rows) for t in PROBE_TIMESTEPS]
                  for swapped in (0, 1))  # fmt: skip
    loss, loss_swapped = sum(own) / len(own), sum(other) / len(other)
    return {"probe_loss": loss, "probe_loss_swapped": loss_swapped, "control_gain": loss_swapped / loss - 1,
            "probe_loss_by_t": own, "control_gain_by_t": [b / a - 1 for a, b in zip(own, other)]}  # fmt: skip


def validate(model, frame, stream, base, step):
    """Draw every case and write validation/step-<step>.png: control | generated ... | target."""
    c, encoded, device = stream.config, stream.encoded, frame.size.device
    cases, drawn = encoded.cases, range(c.num_validation_images)

    def generate(job):
        """Latent of (case, number of the picture), (16, h, w)."""
        case, side = cases[job[0]], c.resolution // PIXELS_PER_LATENT
        noise = torch.randn(1, LATENT_CHANNELS, side, side, generator=draw(c.seed, "validation", *job))
        texts = (encoded.entry(key)[None] for key in (case.caption, encoded.empty))
        inputs = [tensor.to(device) for tensor in (noise, encoded.latent(case.control)[None], *texts)]
        return euler_sample(model, frame, *inputs, c.num_inference_steps, c.guidance_scale)[0].float().cpu()

    def write():
        targets = [[encoded.latent(case.image)] if case.image else [] for case in cases]
        rows = [[encoded.latent(case.control), *(latents[number, n] for n in drawn), *targets[number]]
                for number, case in enumerate(cases)]  # fmt: skip
        images, headings = decode(c, encoded, base, rows, device), ["control", *["generated" for _ in drawn], "target"]
        save_grid(Path(c.output_dir, "validation", f"step-{step}.png"), [case.text for case in cases], images, headings)

    latents = spread([(number, n) for number in range(len(cases)) for n in drawn], generate, "drawing")
    together(write, RANK == 0)


def log_samples(stream, base, device):
    """dataset_samples.png: image | control | overlay as the model is fed them, decoded from the cache; token counts."""
    c, encoded, rows = stream.config, stream.encoded, stream.encoded.train[:SHEET_ROWS]
    titles = [f"row {row.id}, {encoded.index[row.caption][1]} tokens: {row.text}" for row in rows]
    pairs = decode(c, encoded, base, [[encoded.latent(row.image), encoded.latent(row.control)] for row in rows], device)
    sheet = [[image, control, Image.blend(image, control, 0.5)] for image, control in pairs]
    save_grid(Path(c.output_dir, "dataset_samples.png"), titles, sheet, ["image", "control", "overlay"])


@torch.no_grad()
def decode(config, encoded, base, table, device):
    """Rows of latents (16, h, w) -> rows of PIL images, by the base's VAE, which is there only for that time."""
    from diffusers.image_processor import VaeImageProcessor

    vae, picture = load_vae(config, base).to(device), VaeImageProcessor().postprocess
    scaled = [[(latent[None] / encoded.scaling).to(device, torch.bfloat16) for latent in row] for row in table]
    return [[picture(vae.decode(latent).sample.cpu())[0] for latent in row] for row in scaled]


def save_grid(file, titles, rows, headings):
    """Write rows of images as one PNG: each under its title, in columns of at least 160 px under the headings."""
    cell, line = max(160, rows[0][0].width), 16
    grid = Image.new("RGB", (cell * max(map(len, rows)), line + (cell + line) * len(rows)), "white")
    pen = ImageDraw.Draw(grid)
    for column, heading in enumerate(headings):
        pen.text((column * cell + 4, 2), heading, fill="black")
    for top, title, images in zip(range(line, grid.height, cell + line), titles, rows):
        pen.text((4, top + 2), " ".join(title.split())[: grid.width // 6], fill="black")
        for column, image in enumerate(images):
            grid.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (column * cell, top + line))
    file.parent.mkdir(exist_ok=True)
    write_aside(file, lambda path: grid.save(path, "PNG"))


# === 9. engine and checkpoints ========================================================================================
# What continues a run is kept by parameter, not by rank: any number of ranks and any ZeRO stage can go on from it.


@functools.cache
def import_deepspeed():
    """deepspeed, without its tale of how it looks for accelerators."""
    logging.disable(logging.WARNING)
    import deepspeed

    logging.disable(logging.NOTSET)
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


def engine_settings(config):
    """ds_config.json, "auto" replaced by what the flags say and the rest filled in -> dict for deepspeed.initialize.

    Raises Refusal for half precision, and where file and flag say different things: it names both."""
    c, path = config, Path(config.deepspeed_config)
    path = path if path.exists() or path.is_absolute() else Path(__file__).parent / path
    with explained(f"--deepspeed_config {path} (a JSON file is expected)"):
        settings = json.loads(path.read_text())
    refuse_if(not isinstance(settings, dict), f"--deepspeed_config {path}: must be a JSON object")
    for key, value in walk(settings):
        half = key in [f"{name}.enabled" for name in HALF] and value is not False
        half = half or str(value).lower().removeprefix("torch.") in HALF
        refuse_if(half, f"{path.name} says {key} = {value!r}: fp16 and fp8 are not supported, use bf16 or fp32")
        section = key in ("zero_optimization", "zero_optimization.offload_optimizer", "bf16", "data_types", "optimizer",
                          "optimizer.params")  # fmt: skip
        refuse_if(section and not isinstance(value, dict), f"{path.name}: {key} must be a JSON object")
    owned = {  # key in the file: (the flag that decides it, its value)
        "train_micro_batch_size_per_gpu": ("train_batch_size", c.train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", c.gradient_accumulation_steps),
        "train_batch_size": ("total_batch_size", c.total_batch_size),
        "gradient_clipping": ("max_grad_norm", c.max_grad_norm),
        "bf16.enabled": ("mixed_precision", c.mixed_precision == "bf16"),
        "optimizer.params.lr": ("learning_rate", c.learning_rate),
        "optimizer.params.betas": ("adam_beta1", [c.adam_beta1, c.adam_beta2]),
        "optimizer.params.eps": ("adam_epsilon", c.adam_epsilon),
        "optimizer.params.weight_decay": ("adam_weight_decay", c.adam_weight_decay),
    }
    for key, (name, value) in owned.items():
        *sections, last = key.split(".")
        if sections[:1] == ["optimizer"] and "optimizer" not in settings:
            continue  # the file leaves the optimizer to us
        section = functools.reduce(lambda node, part: node.setdefault(part, {}), sections, settings)
        said = section.setdefault(last, "auto")
        refuse_if(said not in ("auto", value), f"{path.name} says {key} = {json.dumps(said)}, --{name} makes it "
                  f"{json.dumps(value)}: they contradict; write \"auto\" in the file")  # fmt: skip
        section[last] = value
    judge(settings, path.name)
    return settings


def judge(settings, file):
    """Refuse what we or DeepSpeed cannot run, and fill in what the plan reads. Raises Refusal.

    "auto" stays for the device of the optimizer's state alone: choose_offload decides on it."""
    zero, types = settings.setdefault("zero_optimization", {}), settings.setdefault("data_types", {})
    offload, kind = zero.get("offload_optimizer", {}), settings.get("optimizer", {"type": "AdamW"}).get("type")
    device, stage, nodes = offload.get("device", "none"), zero.get("stage"), dict(walk(settings))
    decided = ("zero_optimization.offload_optimizer.device", "data_types.grad_accum_dtype")
    unset = [key for key, value in nodes.items() if value == "auto" and key not in decided]
    trackers = [name for name in (*TRACKERS.values(), "comet") if name in settings]
    for wrong, why in (
        ("scheduler" in settings, "a scheduler, which contradicts --lr_scheduler: remove it"),
        (kind not in ("Adam", "AdamW"), f"optimizer.type = {kind}: only Adam and AdamW are known"),
        ("cpu_offload" in zero, "cpu_offload, which is an old name: write offload_optimizer"),
        (str(stage) not in "0 1 2 3".split(), f"zero_optimization.stage = {stage}: must be 0, 1, 2 or 3"),
        ("nvme" in nodes.values(), "nvme, to which nothing can be offloaded here: use cpu"),
        (device not in ("auto", "cpu", "none"), f"offload_optimizer.device = {device}: must be auto, cpu or none"),
        (not settings["bf16"].setdefault("check_grad_overflow", True),
         "bf16.check_grad_overflow = false: one NaN would end in the weights"),
        (unset, f'{", ".join(unset)} = "auto", but no flag decides it: give a value'),
        (trackers, f"{', '.join(trackers)}, but --report_to decides on trackers: remove it from the file"),
    ):  # fmt: skip
        refuse_if(wrong, f"{file} says {why}")
    judged = json.loads(json.dumps(settings | {"train_batch_size": None}))  # which the number of ranks decides
    judged["zero_optimization"]["offload_optimizer"] = offload | {"device": "none"}  # choose_offload comes later
    try:
        known = import_deepspeed().runtime.config.DeepSpeedConfig(judged).zero_config
    except Exception as error:  # pydantic's, of which the first line says nothing, assertions, and more
        raise Refusal(f"--deepspeed_config: DeepSpeed does not take it: {error}")
    alone = "optimizer" in settings and "an optimizer of its own" or device == "cpu" and "offload_optimizer"
    refuse_if(known.stage == 0 and alone, f"{file} says {alone}, which needs ZeRO stage 1 to 3")
    if types.get("grad_accum_dtype") == "auto":  # fp32; DeepSpeed's stage 0 knows only the model's own type
        types["grad_accum_dtype"] = "bf16" if known.stage == 0 and settings["bf16"]["enabled"] else "fp32"
    zero |= {name: getattr(known, name) for name in ("stage", "reduce_bucket_size", "overlap_comm")}
    zero["offload_optimizer"] = offload | {"device": device}


def walk(node, prefix=""):
    """Nodes of a nested dict as ("a.b.c", value)."""
    for key, value in node.items():
        yield prefix + key, value
        yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else ()


def start_ranks(minutes=120):
    """Join the others, alone where nobody launched us -> this rank's device. minutes: how long one waits for all."""
    deepspeed = import_deepspeed()
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
        os.environ.setdefault(name, str(value))
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":  # its shared-memory collectives want a compiler, plain gloo does not
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave NaN gradients with masks (pytorch#196678); others remain
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit, groups = datetime.timedelta(minutes=minutes), deepspeed.utils.groups
    with explained(f"the ranks cannot meet at {address}; another --master_port of the launcher may do", Ended):
        deepspeed.init_distributed(timeout=limit, verbose=False)
    groups._WORLD_GROUP = groups._WORLD_GROUP or dist.new_group(timeout=limit)  # the engine's would wait 10 minutes
    return torch.device(accelerator.current_device_name())


def start_engine(config, settings, model):
    """deepspeed.initialize with the optimizer of ds_config.json, or ours where it has none; its moments are zeros."""
    c, deepspeed, parameters = config, import_deepspeed(), [p for p in model.parameters() if p.requires_grad]
    offloaded = settings["zero_optimization"]["offload_optimizer"]["device"] != "none"
    make = deepspeed.ops.adam.DeepSpeedCPUAdam if offloaded else functools.partial(torch.optim.AdamW, fused=True)
    optimizer = None if "optimizer" in settings else make(parameters, lr=0.0)
    engine = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=settings)[0]
    adam, zero, betas = engine.basic_optimizer, engine.optimizer, (c.adam_beta1, c.adam_beta2)
    for group in adam.param_groups:  # the command line owns its settings
        group.update(lr=0.0, betas=betas, eps=c.adam_epsilon, weight_decay=c.adam_weight_decay)
    flat = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps nothing in the groups
    for p in flat or [p for group in adam.param_groups for p in group["params"]]:
        adam.state[p] = {key: torch.zeros_like(p) for key in MOMENTS}
    set_adam_step(engine, 0)
    link = getattr(zero, "_lazy_init_hp_params_optimizer_state", None)
    link and link()  # DeepSpeed does this in its first step; saving and loading may come before it
    return engine


def set_adam_step(engine, step):
    """Steps that Adam has taken: they decide its bias correction. PyTorch counts in a tensor, DeepSpeed in a number."""
    adam = engine.basic_optimizer
    for p, state in adam.state.items():
        state["step"] = torch.tensor(float(step), device=p.device) if isinstance(adam, torch.optim.Adam) else step


def schedule(config, steps):
    """Learning rate as a function of the step, by diffusers' schedules: nothing of it needs to be saved."""
    from diffusers.optimization import get_scheduler

    c, optimizer = config, torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    curve = get_scheduler(c.lr_scheduler, optimizer, None, c.lr_warmup_steps, steps, c.lr_num_cycles, c.lr_power)
    return lambda step: c.learning_rate * curve.lr_lambdas[0](step)


def state_parts(engine):
    """(name, read, write) of what continues a run: fp32 weights and Adam's moments of all that trains, whole tensors.

    read() is collective above stage 0, where the ranks hold parts; write(tensor) takes this rank's part."""
    zero, stage = import_deepspeed().utils, engine.zero_optimization_stage()

    def write_partition(p, key, tensor):  # DeepSpeed's own reads past the end where the ranks do not divide the size
        size = p.ds_tensor.numel()
        tensor = F.pad(tensor.flatten(), (0, size * WORLD - tensor.numel())).narrow(0, size * RANK, size)
        p._z3_optimizer.set_local_hp_param(tensor, p, key)

    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    masters = sum(getattr(engine.optimizer, "fp32_groups", []), []) or [p for _, p in trained]  # of stage 0
    for (name, p), master in zip(trained, masters):
        for key in (None, *MOMENTS):  # None: the weight itself, in DeepSpeed as well
            if stage == 0:
                part = engine.basic_optimizer.state[master][key] if key else master.data
                read, write = part.clone, part.copy_
            else:
                read = functools.partial(zero.safe_get_full_optimizer_state, p, key)
                set_whole = functools.partial(zero.safe_set_full_optimizer_state, p, optim_state_key=key)
                write = functools.partial(write_partition, p, key) if stage == 3 else set_whole
            yield f"{key or 'master'}.{name}", read, write


def load_state(engine, folder, adam_steps):
    """What `save_checkpoint` wrote of state_parts, into this engine, whatever its ranks and stage."""
    index = read_index(folder)
    for name, _, write in state_parts(engine):
        write(open_shard(index[name][0]).get_tensor(name))
    open_shard.cache_clear()  # what stays mapped keeps its disk space when the checkpoint goes
    set_adam_step(engine, adam_steps)


def export(engine, folder, upcast):
    """Weights as CogView4Transformer2DModel.from_pretrained loads them; all ranks take part, rank 0 writes."""
    from huggingface_hub import save_torch_state_dict

    state = {}
    for name, parameter in engine.module.named_parameters():
        with import_deepspeed().zero.GatheredParameters(parameter):  # does nothing below ZeRO-3
            if RANK == 0:
                state[name] = parameter.detach().to("cpu", torch.float32 if upcast else None, copy=True)

    def write():
        """config.json and the safetensors, readable as the umask has it, on the disk."""
        engine.module.save_config(folder)
        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size="10GB")
        for file in folder.iterdir():
            file.chmod((folder / "config.json").stat().st_mode)
            flush(file)

    together(write, RANK == 0)


def checksums(folder, content=True):
    """{relative path: [bytes, SHA-256, or False without content]} of a checkpoint, the reading split over the ranks."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")
    files = gather(files)  # as rank 0 sees them: network disks show new files to some machines later
    mine = files[0][RANK % len(files) :: len(files)]
    entry = lambda f: [f.stat().st_size, content and file_digest(f)]  # noqa: E731
    parts = together(lambda: {str(f.relative_to(folder)): entry(f) for f in mine})
    return dict(sorted(item for part in parts for item in part.items()))


def save_checkpoint(engine, config, step, identity, skipped=0):
    """checkpoint-<step>: state and weights written aside, the manifest with their checksums last, then renamed.

    Where one rank cannot write all stop, and the older checkpoints are untouched. Raises Ended."""
    folder, final = Path(config.output_dir), Path(config.output_dir, f"checkpoint-{step}")
    aside, base = folder / f".checkpoint-{step}.tmp", trace(config.pretrained_model_name_or_path)[0]
    parts = progress(list(state_parts(engine)), "saving", leave=False)
    mine = (part for n, part in enumerate((name, read()) for name, read, _ in parts) if n % WORLD == RANK)

    def write_state():
        try:
            (aside / "state").mkdir(parents=True, exist_ok=True)
            store(aside / "state", mine, torch.float32)
        finally:
            collections.deque(mine, 0)  # who cannot write still takes part in reading: the others wait for it

    def finish():
        """The manifest, the rename, and away with what is not kept."""
        manifest = {"step": step, "samples": step * config.total_batch_size, "skipped": skipped, "identity": identity,
                    "base": base, "files": files}  # fmt: skip
        text = json.dumps(manifest | {"digest": digest(json.dumps(manifest))}, indent=1)
        write_aside(aside / "manifest.json", lambda path: path.write_text(text))
        shutil.rmtree(final, ignore_errors=True)  # of the same step, if an older checkpoint was chosen to go on from
        os.replace(aside, final)
        flush(folder)  # before an older checkpoint goes
        # what was passed over as damaged has a higher step: it goes first, then the oldest; never the one just written
        others = sorted(checkpoints(folder).items(), key=lambda item: (item[0] <= step, item[0]))[:-1]
        keep = config.checkpoints_total_limit - 1
        for _, old in others[: len(others) - keep] if 0 <= keep < len(others) else ():
            shutil.rmtree(old, ignore_errors=True)

    together(write_state)
    export(engine, aside / "transformer", config.upcast_before_saving)
    files = checksums(aside)
    together(finish, RANK == 0)


def checkpoints(folder):
    """{step: folder checkpoint-<step>}, oldest first."""
    found = (f for f in Path(folder).glob("checkpoint-*") if f.name[11:].isdigit())
    return dict(sorted((int(f.name[11:]), f) for f in found))


def read_manifest(checkpoint):
    """manifest.json of a checkpoint, {} where it is not as it was written."""
    with contextlib.suppress(Exception):  # damaged in any way
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if manifest.pop("digest") == digest(json.dumps(manifest)):
            return manifest
    return {}


@functools.cache
def trace(name):
    """(name of the base, transformer made from it or None): a checkpoint made here is a transformer, the rest is its
    base's, also where that was a checkpoint itself. Asked once: checkpoints come and go. Raises Refusal."""
    path = [Path(name), *checkpoints(name).values()][-1]  # of a run's output folder the last checkpoint
    for checkpoint in (path, path.parent) if path.name == "transformer" else (path,):
        if (checkpoint / "manifest.json").exists():
            base = read_manifest(checkpoint).get("base")
            refuse_if(not base, f"{checkpoint}: its manifest.json is not as it was written")
            return trace(base)[0], checkpoint / "transformer"
    return str(Path(name).absolute()) if Path(name).is_dir() else name, None


def candidates(config):
    """Checkpoints that a run may go on from, oldest first. Raises Refusal."""
    wanted, present = config.resume_from_checkpoint, list(checkpoints(config.output_dir).values())
    refuse_if(wanted == "none" and present, f"--resume_from_checkpoint none: {config.output_dir} holds checkpoints; "
              "choose another --output_dir or move them away")  # fmt: skip
    if wanted in ("latest", "none"):
        return present
    chosen = [p for p in (Path(wanted), Path(config.output_dir, wanted)) if p.is_dir()][:1]
    refuse_if(not chosen, f"--resume_from_checkpoint {wanted}: no such folder")
    newer = present[-1].name if present and present[-1].absolute() != chosen[0].absolute() else None
    refuse_if(newer, f"--resume_from_checkpoint {wanted}: {config.output_dir} holds {newer}; leave the flag out to "
              "go on from it, or move it away")  # fmt: skip
    return chosen


def find_checkpoint(config, content=True):
    """(newest whole checkpoint, its manifest), or (None, {}) for a new run; all ranks agree. Raises Refusal.

    Whole: all files that its manifest lists are there as they were written (without content: as large), no others."""
    present = gather(candidates(config))[0]
    for checkpoint in reversed(present):
        found, manifest = checksums(checkpoint, content), gather(read_manifest(checkpoint))[0]
        listed = {name: [size, content and sha] for name, (size, sha) in manifest.get("files", {}).items()}
        if manifest and found == listed:
            return checkpoint, manifest
        wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
        named = wrong[0] if manifest else "manifest.json"
        say(f"{checkpoint} is passed over: {named} is not as it was written ({len(wrong)} such files)")
    refuse_if(present, f"{present and present[-1]}: not whole, nor is an older checkpoint; move it away to start anew")
    return None, {}


def refuse_another(found, manifest, identity):
    """A checkpoint goes on where what decides the samples of a run, and how its state looks, is the same."""
    for name, now in identity.items() if manifest else ():
        saved = manifest["identity"].get(name)
        said = f"--{'' if saved else 'no_'}{name}" if isinstance(saved, bool) else f"--{name} {saved}"
        way = f"give {said}" if name in IDENTITY else "restore the data"
        refuse_if(saved != now, f"{found} was made with {name} = {saved}, now it is {now}: the run would not go on as "
                  f"it began; {way}, or start in another --output_dir")  # fmt: skip


# === 10. the loop =====================================================================================================


class Log:
    """metrics.jsonl, trackers and progress bar, on rank 0; rows past `start`, of an interrupted run, are dropped."""

    def __init__(self, config, start, steps):
        self.config, self.file, self.shown = config, Path(config.output_dir, "metrics.jsonl"), {}
        self.trackers = {name: None for name in TRACKERS if config.report_to in (name, "all") and RANK == 0}
        self.bar = progress(None, "training", total=steps, initial=start)
        if RANK == 0:
            lines = self.file.read_text().splitlines() if start and self.file.exists() else []
            kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
            write_aside(self.file, lambda path: path.write_text("".join(kept)))
        if config.log_dataset_samples:
            self.track((), "dataset_samples", "dataset_samples.png", start)

    def open_tracker(self, name):
        """A monitor of DeepSpeed's, told what run.json says."""
        from deepspeed.monitor import config, monitor

        c, about = self.config, self.file.with_name("run.json").read_text()
        where = {"output_path": str(Path(c.output_dir, c.logging_dir)), "job_name": c.tracker_project_name}
        where = {"project": c.tracker_project_name} if name == "wandb" else where
        tracker = monitor.MonitorMaster(config.get_monitor_config({TRACKERS[name]: where | {"enabled": True}}))
        if name == "tensorboard":
            tracker.tb_monitor.summary_writer.add_text("run", f"```json\n{about}\n```")
        if name == "wandb":
            sys.modules[name].config.update(json.loads(about))
        return tracker

    def track(self, events=(), title=None, file="", step=0):
        """Events (name, figure, step), or a picture under a title, for the trackers; who fails once is left out."""
        for name in list(self.trackers):
            try:
                tracker = self.trackers[name] = self.trackers[name] or self.open_tracker(name)
                picture = title and Image.open(self.file.parent / file)
                if title and name == "tensorboard":
                    tracker.tb_monitor.summary_writer.add_image(title, np.asarray(picture), step, dataformats="HWC")
                if title and name == "wandb":
                    tracker.wandb_monitor.log({title: sys.modules[name].Image(picture)}, step)
                tracker.write_events(events)  # flushes, too
            except Exception as error:  # no network, no disk, no login: each library has classes of its own
                say(f"--report_to {name}: {reason(error)}; the run goes on without this tracker")
                del self.trackers[name]

    def write(self, kind, step, values):
        """A row of figures, kind "train" or "probe"; what is None or a list goes to the file alone. Raises Ended."""

        def write():
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")

        together(write, RANK == 0)
        scalars = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.track([(f"{kind}/{name}", value, step) for name, value in scalars.items()])
        bar = ("loss", "lr", "grad_norm", "samples_per_s", "probe_loss", "control_gain")
        self.shown |= {name: f"{scalars[name]:.3g}" for name in bar if name in scalars}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(step - self.bar.n)


def evaluate(engine, stream, frame, base, log, step):
    """Probe and pictures of a step."""
    figures = probe(engine.module, frame, stream)
    if figures:
        log.write("probe", step, figures)
    if stream.encoded.cases and stream.config.num_validation_images:
        validate(engine.module, frame, stream, base, step)
        log.track((), "validation", f"validation/step-{step}.png", step)


def train_step(engine, frame, batches, config, rate):
    """One optimizer step -> (loss, gradient norm or None, does a rank want to stop?), the same on all ranks."""
    losses = []
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    for _ in range(config.gradient_accumulation_steps):
        loss = batch_loss(engine, frame, next(batches), config.weighting_scheme)
        engine.backward(loss)
        engine.step()  # does nothing before the last micro-batch, nor where a gradient is not finite
        losses.append(loss.detach())
    if not engine.was_step_applied():  # DeepSpeed 0.19.8 keeps the sum of such gradients where it offloads
        sums = getattr(engine.optimizer, "averaged_gradients", {})
        sums.update(dict.fromkeys(sums))
    figures = torch.stack([torch.stack(losses).mean() / WORLD, loss.new_tensor(float(bool(STOPS)))])
    dist.all_reduce(figures)
    (loss, stops), norm = figures.tolist(), engine.get_global_grad_norm()  # waits for the device: the clock is true
    return loss, norm if norm is None else float(norm), stops > 0


def train(engine, stream, batches, frame, base, identity, start, steps, skipped=0):
    """Optimizer steps start + 1 .. steps, with their evaluations and checkpoints. Raises Ended and Preempted."""
    c, rate, log = stream.config, schedule(stream.config, steps), Log(stream.config, start, steps)
    in_a_row, usual = 0, math.inf  # steps that came to nothing; running mean of the loss
    stop_if_asked()
    watch = functools.partial(faulthandler.dump_traceback_later, 60 * c.timeout_minutes, exit=True)
    watch()  # where a rank hangs, all say where they are
    if start == 0:
        evaluate(engine, stream, frame, base, log, 0)
    with contextlib.closing(batches):
        for step in range(start + 1, steps + 1):
            watch()
            clock = time.perf_counter()
            loss, norm, stop = train_step(engine, frame, batches, c, rate(step - 1))
            speed = c.total_batch_size / (time.perf_counter() - clock)
            applied = engine.was_step_applied()  # DeepSpeed skips what is not finite on some rank
            good = applied and math.isfinite(loss)
            in_a_row, skipped = 0 if good else in_a_row + 1, skipped + (not applied)
            values = {"samples": step * c.total_batch_size, "loss": loss, "lr": rate(step - 1), "grad_norm": norm,
                      "samples_per_s": speed, "skipped": skipped}  # fmt: skip
            values = {name: v if v is not None and math.isfinite(v) else None for name, v in values.items()}  # as JSON
            if not good or loss > SPIKE * usual:
                values["rows"] = [stream.row(k)[0].id for k in stream.order(step - 1)]
            log.write("train", step, values)
            if in_a_row == c.max_skipped_steps or (applied and not good):  # the latter where the engine does not check
                raise Ended(f"no finite loss and gradient in {in_a_row} steps in a row, the last of them {step}, of "
                            f"the rows {values['rows']}")  # fmt: skip
            usual = usual if not good else loss if usual == math.inf else 0.95 * usual + 0.05 * loss
            if step % c.validation_steps == 0 or step == steps:
                evaluate(engine, stream, frame, base, log, step)  # before saving: then a checkpoint has it behind it
            if step % c.checkpointing_steps == 0 or step == steps or stop:
                save_checkpoint(engine, c, step, identity, skipped)
            if stop and step < steps:
                raise Preempted(f"stopped by a signal after step {step}; the same command again goes on from there")
    faulthandler.cancel_dump_traceback_later()


# === 11. main =========================================================================================================


def find_base(config, patterns=("*.json", "*.safetensors", "*.txt", "*.model")):
    """Folders of the base, fetched from the hub if it is none, and of the transformer. Raises Refusal."""
    name, transformer = trace(config.pretrained_model_name_or_path)
    path = Path(name)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        where = dict(revision=config.revision, cache_dir=config.cache_dir, allow_patterns=patterns)
        with explained(f"--pretrained_model_name_or_path {name}: no such folder, and not to be had from the hub"):
            path = Path(snapshot_download(name, **where))
    return path, transformer or path / "transformer"


def check_base(config, base, transformer, weights=True):
    """All parts are there, with the shards of their weights, and are what this file can train. Raises Refusal."""
    parts, name = {}, f"base {config.pretrained_model_name_or_path}"
    for file in ("model_index.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json",
                 "text_encoder/config.json", "vae/config.json", "transformer/config.json"):  # fmt: skip
        path = transformer / "config.json" if file.startswith("transformer") else base / file
        try:
            parts[file.split("/")[0]] = json.loads(path.read_text())
        except (OSError, ValueError):
            raise Refusal(f"{name}: {path} is missing or not JSON")
    known = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_image_seq_len": BASE_TOKENS,
             "base_shift": BASE_SHIFT, "max_shift": MAX_SHIFT, "num_train_timesteps": TIMESTEPS}  # fmt: skip
    shifts = {key: parts["scheduler"].get(key) for key in known}
    refuse_if(shifts != known, f"{name}: its scheduler is not CogView4's: {shifts}")
    shape, c = [parts["transformer"].get(key) for key in ("patch_size", "in_channels", "out_channels")], LATENT_CHANNELS
    shape += [parts["vae"].get("latent_channels")]
    refuse_if(shape not in ([2, c, c, c], [2, 2 * c, c, c]), f"{name}: patches or channels are not CogView4's: {shape}")
    for folder in (base / "text_encoder", base / "vae", transformer) if weights else ():
        files = weight_files(folder, config.variant)
        index = [] if config.variant else folder.glob("*.index.json")
        shards = {shard for file in index for shard in json.loads(file.read_text())["weight_map"].values()}
        missing = shards - {file.name for file in files}
        refuse_if(not files or missing, f"{name}: no safetensors in {folder}{f' for {missing}' if missing else ''}")


# --- the plan: what a run will take of cards, disks and time, by arithmetic


# What a run is planned for: how many, bytes of memory of one and its FLOP/s in bf16, None where it is not known.
Cards = collections.namedtuple("Cards", "number name capacity flops")
# What memory and time of a widened transformer follow from: parameters in all, those that train, those of the largest
# weight that trains, blocks, model width.
Shape = collections.namedtuple("Shape", "parameters trained largest layers width")


def shape_of(folder, only_blocks):
    """Shape of the transformer that load_transformer would load, from its config.json alone."""
    config = json.loads(Path(folder, "config.json").read_text())
    state, config = widen(meta_model(config).state_dict(), config)
    sizes = {name: tensor.numel() for name, tensor in state.items()}
    trained = [size for name, size in sizes.items() if trains(name, only_blocks)]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return Shape(sum(sizes.values()), sum(trained), max(trained), config["num_layers"], width)


def cards_of(config):
    """Cards of --plan_for, or those that are here. Raises Refusal."""
    if config.plan_for is not None:
        refuse_if(not config.dry_run, "--plan_for is for --dry_run")
        number, _, name = config.plan_for.partition("x")
        known = number.isdigit() and int(number) and name in CARDS
        refuse_if(not known, f"--plan_for {config.plan_for}: must be a number, x, and one of {', '.join(CARDS)}")
        return Cards(int(number), name, *CARDS[name])
    if not torch.cuda.is_available():
        return Cards(WORLD, "CPU", None, None)
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return Cards(WORLD, name, total, next((flops for card, (_, flops) in CARDS.items() if card[:4] in name), None))


def exported_bytes(config, shape):
    """Of the weights that a checkpoint exports."""
    return shape.parameters * (4 if config.upcast_before_saving or config.mixed_precision == "no" else 2)


def disk_needed(config, rows, shape, steps):
    """Bytes still to be written to (output_dir, encoded_dir), as far as it is known before a row is read."""
    c, there, limit = config, checkpoints(config.output_dir), config.checkpoints_total_limit or math.inf
    written = math.ceil((steps - max(there, default=0)) / c.checkpointing_steps)
    kept = max(0, min(written, limit + 1 - len(there)))  # one is written while the others are still there
    state = kept * (exported_bytes(c, shape) + 12 * shape.trained)  # fp32 weight and Adam's moments of what trains
    state -= sum(f.stat().st_size for f in Path(c.output_dir).glob(".checkpoint-*.tmp/**/*") if f.is_file())  # will go
    drawn = VALIDATION_CASES * (2 + c.num_validation_images) * bool(c.num_validation_images)
    pictures = 3 * drawn * c.resolution**2 * math.ceil(steps / c.validation_steps)  # before PNG's compression
    cache = 2 * rows * 4 * LATENT_CHANNELS * (c.resolution // PIXELS_PER_LATENT) ** 2  # two pictures' moments in bf16
    cache -= sum(file.stat().st_size for file in Path(c.encoded_dir).glob("*.safetensors"))
    return max(state + pictures, 0), max(cache, 0)


def check_disk(config, needs):
    """The disks take what disk_needed says. Raises Refusal."""
    disks = collections.Counter()
    for name, needed in zip(("output_dir", "encoded_dir"), needs):
        there = existing(getattr(config, name))
        disk, free = os.stat(there).st_dev, shutil.disk_usage(there).free
        disks[disk] += needed  # both may be on one
        refuse_if(disks[disk] > free, f"--{name} {getattr(config, name)}: {disks[disk] / 1e9:.1f} GB will be written, "
                  f"{free / 1e9:.1f} GB are free; fewer --checkpoints_total_limit need less")  # fmt: skip


@dataclass(frozen=True)
class Load:
    """A step on its cards: what its memory follows from."""

    config: Config
    zero: dict  # zero_optimization of the engine's settings
    shape: Shape
    cards: Cards
    tokens: int  # of its captions

    def but(self, device=None, **flags):
        """The same with the optimizer's state on "cpu" or, "none", on the cards; or with other flags."""
        zero = self.zero | ({"offload_optimizer": {"device": device}} if device else {})
        return dataclasses.replace(self, zero=zero, config=dataclasses.replace(self.config, **flags))

    def memory(self):
        """Bytes at the peak -> ({part: bytes} of a card, bytes that offloading puts into host memory a rank)."""
        c, shape, zero = self.config, self.shape, self.zero
        size = 2 if c.mixed_precision == "bf16" else 4
        ranks = [self.cards.number if zero["stage"] >= stage else 1 for stage in range(4)]  # that share what it cuts
        sequence = (c.resolution // PIXELS_PER_TOKEN) ** 2 + self.tokens
        again = recomputed(c, shape.layers)  # the first blocks: each is whole for a moment, when the others are gone
        kept = again + max(shape.layers - again, 1) * KEPT + PASSING
        # gradients go to the other ranks by buckets: one is filled while another is sent, flattened, and in fp32
        buckets = zero["reduce_bucket_size"] * ((1 + zero["overlap_comm"]) * size + (4 if size == 4 else 6))
        away = zero["offload_optimizer"]["device"] == "cpu"  # but gradients are summed on the card all the same
        parts = {
            "weights": size * shape.parameters / ranks[3],
            "gradients": 4 * shape.trained / ranks[2] + buckets,
            "optimizer": 0 if away else 12 * shape.trained / ranks[1],
            "activations": kept * c.train_batch_size * sequence * shape.width * size,  # tensors of (B, S, D)
        }
        return parts, away * 18 * shape.trained / ranks[1]  # Adam's 12, gradients in fp32, weights in bf16

    def total(self):
        """Bytes of a card at the peak."""
        return sum(self.memory()[0].values())

    def fits(self):
        """On a card, as far as its memory is known?"""
        return self.total() <= ROOM * (self.cards.capacity or math.inf)


def choose_offload(load):
    """offload_optimizer.device, "auto" made cpu where a step fits on a card only so; says why."""
    here, away = load.but("none"), load.but("cpu")
    if load.zero["offload_optimizer"]["device"] != "auto":
        return load.zero["offload_optimizer"]["device"]
    if here.fits() or load.zero["stage"] == 0:
        return "none"
    has = (f"with captions of {load.tokens} tokens a step takes {here.total() / 1e9:.0f} GB a card, "
           f"{away.total() / 1e9:.0f} without the optimizer; it may take {ROOM * load.cards.capacity / 1e9:.0f} of "
           f"{load.cards.name}")  # fmt: skip
    if away.fits():
        say(f"{has}: the optimizer goes to host memory; offload_optimizer.device in ds_config.json decides otherwise")
    elif not load.config.dry_run:
        say(f"{has}: --dry_run says what would do")
    return "cpu" if away.fits() else "none"


def check_engine(cards, zero, shape):
    """No large model on the CPU beside a GPU, and no gradient larger than a bucket. Raises Refusal.

    DeepSpeed 0.19.8 frees such a one while it is still being sent (reduce_ipg_grads of stage_1_and_2.py)."""
    unused = cards.name == "CPU" and any(Path("/dev").glob("nvidia[0-9]*")) and shape.parameters > 1e9
    refuse_if(unused, f"PyTorch {torch.__version__} cannot use the GPU here: mostly it is of a newer CUDA than the "
              "driver knows (nvidia-smi says which that is); --dry_run --plan_for plans without a GPU")  # fmt: skip
    size, overlaps = zero["reduce_bucket_size"], zero["overlap_comm"] and zero.get("contiguous_gradients", True)
    small = zero["stage"] in (1, 2) and overlaps and size < shape.largest
    refuse_if(small, f"zero_optimization.reduce_bucket_size = {size}, the largest weight has "
              f"{shape.largest} elements: with overlap_comm its gradient would be wrong; write as many")  # fmt: skip


def free_memory():
    """Bytes that this machine, or its container, still has."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        free = min(free, int((group / "memory.max").read_text()) - int(used))
    return free


def check_offload(load):
    """Every machine has the memory, and the compiler, for what is offloaded. Raises Refusal, on all ranks."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))  # torchrun's name, deepspeed's name
    host, exported = load.memory()[1], exported_bytes(load.config, load.shape) * (RANK < here)  # by rank 0
    machines = gather(((here * (host + 2 * SHARD_BYTES) + exported) / 1e9, free_memory() / 1e9))
    needed, free = max(machines, key=lambda machine: machine[0] - machine[1])
    refuse_if(host and needed > free, f"offload_optimizer, with what saving takes, needs {needed:.0f} GB of a "
              f"machine's memory, {free:.0f} are free: more cards, or a smaller batch and device none")  # fmt: skip
    refuse_if(host and not all(gather(bool(shutil.which("g++")))), "offload_optimizer: DeepSpeed compiles its CPU "
              "optimizer with g++, which is not on PATH")  # fmt: skip


def remedies(load):
    """What makes a step smaller, the cheapest first, with the same samples a step -> (words, Load)."""
    total, away = load.config.total_batch_size, '"offload_optimizer": {"device": "cpu"} in ds_config.json and '
    for words, way in (("", load), (away, load.but("cpu"))):
        for size in range(load.config.train_batch_size, 0, -1):
            if total % (size * load.cards.number) == 0:
                flags = f"--gradient_checkpointing --train_batch_size {size} --total_batch_size {total}"
                flags += " without --recompute_blocks" * (load.config.recompute_blocks is not None)
                yield words + flags, way.but(gradient_checkpointing=True, recompute_blocks=None, train_batch_size=size)


def token_counts(config, base, rows, most=10_000):
    """{tokens, padded as the pipeline does: captions} of the first rows."""
    from transformers import AutoTokenizer

    tokenizer, texts = AutoTokenizer.from_pretrained(base / "tokenizer"), []
    for id, value in enumerate(rows.select_columns([config.caption_column])[:most][config.caption_column]):
        with contextlib.suppress(BadRow):
            texts.append(caption_text(config, id, {config.caption_column: value}))
    lengths = (min(len(ids), config.max_sequence_length) for ids in (tokenizer(texts)["input_ids"] if texts else ()))
    return dict(sorted(collections.Counter(16 * math.ceil(length / 16) for length in lengths).items()))


def plan(load, base, rows, held_out, steps, start):
    """Print what a run will take: the arithmetic of `memory` and `disk_needed`, and model FLOPs at UTILISATION."""
    c, shape, cards, counts = load.config, load.shape, load.cards, token_counts(load.config, base, rows)
    load = dataclasses.replace(load, tokens=max(counts, default=16))  # a step of nothing but the longest is the worst
    mean = sum(length * number for length, number in counts.items()) / max(1, sum(counts.values()))
    (disk, cache), saving = disk_needed(c, len(rows), shape, steps), exported_bytes(c, shape) + 2 * SHARD_BYTES
    cache += 2 * json.loads((base / "text_encoder" / "config.json").read_text())["hidden_size"] * mean * len(rows)
    (parts, host), epochs = load.memory(), steps * c.total_batch_size / (len(rows) - held_out)
    split = " + ".join(f"{size / 1e9:.3g} GB {part}" for part, size in parts.items())
    room = f" of {cards.capacity / 1e9:.0f}, {cards.name}" if cards.capacity else ""
    lines = {
        "rows": f"{len(rows)}, {held_out} of them held out",
        "captions": ", ".join(f"{number} of {length} tokens" for length, number in counts.items()),
        "steps": f"{steps} of {c.total_batch_size} samples, {epochs:.2f} epochs" + f"; {start} are done" * (start > 0),
        "to encode": f"at most {2 * len(rows)} pictures and {len(rows) + 1} captions, but for what is among the "
                     f"{len(read_index(c.encoded_dir))} entries that the cache holds",
        "a card": f"{split} = {load.total() / 1e9:.3g} GB{room}",
        "a host": f"{host / 1e9:.3g} GB a rank for what is offloaded, {saving / 1e9:.3g} more while saving" if host else
                  "nothing is offloaded",
        "disk": f"{disk / 1e9:.3g} GB in {c.output_dir}, {cache / 1e9:.3g} GB in {c.encoded_dir}",
        "time": "not known for this device in this precision; the first steps tell",
    }  # fmt: skip
    again = recomputed(c, shape.layers)
    if cards.flops and c.mixed_precision == "bf16":
        sequence = (c.resolution // PIXELS_PER_TOKEN) ** 2 + mean
        flops = 12 * shape.layers * shape.width * sequence * (6 * shape.width + sequence)  # a sample, both passes
        seconds = flops * c.total_batch_size / (cards.number * cards.flops * UTILISATION)
        seconds *= (3 + again / shape.layers) / 4  # UTILISATION is of runs that recompute all, one pass of four
        lines["time"] = (f"{seconds:.3g} s a step, {seconds * max(0, steps - start) / 3600:.3g} hours of training, "
                         f"at {UTILISATION:.0%} of the peak of {cards.number} x {cards.name}, "
                         f"a checkpoint each {seconds * c.checkpointing_steps / 3600:.2g} hours"
                         f"{', the optimizer on the host not counted' if host else ''}")  # fmt: skip
    enough = next((n for n in range(again) if cards.capacity and load.but(recompute_blocks=n).fits()), again)
    if enough < again:
        lines["faster"] = f"--recompute_blocks {enough} fits as well: {again - enough} blocks less are computed twice"
    if not load.fits():
        words = next((words for words, way in remedies(load) if way.fits()), "more cards")
        lines["too large"] = f"it does not fit; {words} would do"
    print("\n".join(f"{head:10}{text}" for head, text in lines.items()))


# --- what a run leaves besides its checkpoints


def write_run(config, settings, start, steps):
    """run.json: what ran, with what, on what."""
    from importlib.metadata import version

    # an empty string where this file is in no repository, or git not there
    commit = subprocess.getoutput(f"git -C {shlex.quote(str(Path(__file__).parent))} rev-parse HEAD 2>/dev/null")
    packages = {name: version(name) for name in ("torch", "deepspeed", "diffusers", "transformers")}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    run = {"command": sys.argv, "start_step": start, "steps": steps, "config": dataclasses.asdict(config),
           "deepspeed": settings, "ranks": WORLD, "hardware": hardware, "threads": torch.get_num_threads(),
           "commit": commit, "versions": packages | {"python": platform.python_version()}}  # fmt: skip
    write_aside(Path(config.output_dir, "run.json"), lambda path: path.write_text(json.dumps(run, indent=1)))


def publish(config, checkpoint):
    """The last checkpoint's weights as config.json + safetensors in output_dir: hard links, or copies."""
    for file in (checkpoint / "transformer").iterdir():
        final = Path(config.output_dir, file.name)
        final.unlink(missing_ok=True)
        try:
            os.link(file, final)
        except OSError:
            shutil.copyfile(file, final)


def open_repository(config):
    """Id of the repository for --push_to_hub, made at the start: no run ends without it. Raises Refusal."""
    from huggingface_hub import create_repo

    with explained("--push_to_hub (log in with `hf auth login`, or set HF_TOKEN)"):
        return create_repo(config.hub_model_id or Path(config.output_dir).name, exist_ok=True).repo_id


def push(config, repository, steps):
    """Upload the weights, the figures, the last picture and a model card. Raises Ended."""
    from huggingface_hub import ModelCardData, upload_folder

    c, folder, picture = config, Path(config.output_dir), f"validation/step-{steps}.png"
    base, data = trace(c.pretrained_model_name_or_path)[0], c.jsonl_for_train or c.dataset_name
    on_hub = {key: name for key, name in dict(base_model=base, datasets=data).items() if not Path(name).exists()}
    rows = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    figures = {name: value for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    card = f"""---
{ModelCardData(library_name="diffusers", tags=["cogview4", "control", "text-to-image"], **on_hub).to_yaml()}
---
The transformer of a control model: {base} after {steps} steps of {c.total_batch_size} samples of {data}, control
"{c.control}", by `{shlex.join(["cv4ctrl.py", *sys.argv[1:]])}`.
{", ".join(f"{name} {value:g}" for name, value in figures.items())}.

{f"![control, generated, target]({picture})" * (folder / picture).exists()}

```python
import torch
from diffusers import CogView4ControlPipeline, CogView4Transformer2DModel
from diffusers.utils import load_image

transformer = CogView4Transformer2DModel.from_pretrained("{repository}", torch_dtype=torch.bfloat16)
pipe = CogView4ControlPipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16).to("cuda")
pipe("caption", control_image=load_image("control.png"), height={c.resolution}, width={c.resolution},
     num_inference_steps={c.num_inference_steps}, guidance_scale={c.guidance_scale}).images[0].save("picture.png")
```
"""
    files = ["README.md", "config.json", "diffusion_pytorch_model*", "metrics.jsonl", picture]
    by_hand = shlex.join(["hf", "upload", repository, str(folder), ".", *(f"--include={file}" for file in files)])
    with explained(f"--push_to_hub: the weights are in {folder}, `{by_hand}` uploads them", Ended):
        (folder / "README.md").write_text(card)
        upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)


# --- the run


def count_steps(config, rows):
    """Optimizer steps of a run over `rows` rows. Raises Refusal where they do not fill one global batch."""
    total = config.total_batch_size
    refuse_if(rows < total, f"{rows} rows to train on are fewer than one global batch of {total}")
    return config.max_train_steps or math.ceil(config.num_train_epochs * rows / total)


def fine_tune(config, settings, base, transformer, rows, identity, device):
    """Encode the rows, train, publish the weights -> optimizer steps. `device` is that of start_ranks."""
    c = config
    make_shared(c.output_dir)
    lock = occupy(c.output_dir)  # noqa: F841  # kept until we return
    together(lambda: [shutil.rmtree(left) for left in Path(c.output_dir).glob(".checkpoint-*.tmp")], RANK == 0)
    found, manifest = find_checkpoint(c)
    refuse_another(found, manifest, identity)
    torch.backends.cuda.matmul.allow_tf32 = c.allow_tf32
    encoded = encode(c, base, rows, device)
    steps, start = count_steps(c, len(encoded.train)), manifest.get("step", 0)
    content = digest(*(part for row in encoded.train for part in row))
    identity |= {"rows": len(encoded.train), "content of the rows": content}
    refuse_another(found, manifest, identity)

    stream = Stream(c, encoded, RANK, WORLD)
    batches = micro_batches(stream, start, steps, device)  # later, its workers would keep copies of what is offloaded
    dtype = torch.bfloat16 if c.mixed_precision == "bf16" else torch.float32
    transformer, variant = (found / "transformer", None) if found else (transformer, c.variant)
    model = load_transformer(transformer, variant, dtype, device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, c.only_target_transformer_blocks))
    recompute(model, recomputed(c, len(model.transformer_blocks)))
    for block in model.transformer_blocks if c.compile else ():
        block.compile()  # in place: names of weights stay
    frame, engine = prepare(model, c.resolution, device, dtype), start_engine(c, settings, model)
    if start >= steps:
        say(f"{found} has {start} of {steps} steps: nothing is left to train")
    if c.probe_samples and len(encoded.held_out) < 2:
        say("fewer than two rows could be held out: no probe loss, no control gain; 20 rows are needed at least")
    if found:
        load_state(engine, found / "state", start - manifest["skipped"])
    together(lambda: write_run(c, settings, start, steps), RANK == 0)
    together(lambda: log_samples(stream, base, device), RANK == 0 and c.log_dataset_samples)
    train(engine, stream, batches, frame, base, identity, start, steps, manifest.get("skipped", 0))
    together(lambda: publish(c, Path(c.output_dir, f"checkpoint-{steps}") if start < steps else found), RANK == 0)
    return steps


def run(config):
    """From flags to trained weights, or to the plan."""
    launched_by, cards = launchers(), cards_of(config)
    c = resolve(config, cards.number)
    check(c), candidates(c)
    settings = engine_settings(c)
    base, transformer = find_base(c, ["*.json"])
    check_base(c, base, transformer, weights=False)
    rows, shape = open_dataset(c), shape_of(transformer, c.only_target_transformer_blocks)
    check_engine(cards, settings["zero_optimization"], shape)
    held_out = min(c.probe_samples, len(rows) // 10)
    steps = count_steps(c, len(rows) - held_out)
    if RANK == 0:
        batch = f"{cards.number} ranks x batch {c.train_batch_size} x {c.gradient_accumulation_steps}"
        print(f"{len(rows)} rows, {held_out} held out; {c.resolution} px; {batch} = {c.total_batch_size} samples "
              f"a step; {steps} steps -> {c.output_dir}")  # fmt: skip
    if c.lr_scheduler != "constant" and steps <= c.lr_warmup_steps:
        say(f"--lr_warmup_steps {c.lr_warmup_steps}: all {steps} steps are warm-up, the peak is never reached")
    load = Load(c, settings["zero_optimization"], shape, cards, c.max_sequence_length)
    identity = {name: getattr(c, name) for name in IDENTITY}
    if c.dry_run:
        found, manifest = find_checkpoint(c, content=False)
        refuse_another(found, manifest, identity)
        settings["zero_optimization"]["offload_optimizer"]["device"] = choose_offload(load)
        return RANK == 0 and plan(load, base, rows, held_out, steps, manifest.get("step", 0))
    repository = open_repository(c) if c.push_to_hub else None  # all ranks: none waits for one that has no right to it
    base, transformer = find_base(c)
    check_base(c, base, transformer)
    check_disk(c, disk_needed(c, len(rows), shape, steps))
    c.control == "column" or load_detector(c.control)
    heed_signals(launched_by)
    device = start_ranks(1.5 * c.timeout_minutes)  # longer than a step may take: a rank that hangs is reported there
    load = dataclasses.replace(load, cards=min(gather(cards), key=lambda card: card.capacity or 0))
    settings["zero_optimization"]["offload_optimizer"]["device"] = choose_offload(load)
    check_offload(load)
    steps = fine_tune(c, settings, base, transformer, rows, identity, device)
    dist.barrier()
    dist.destroy_process_group()
    if RANK == 0:
        push(c, repository, steps) if repository else None
        drawn = Path(c.output_dir, "validation")
        print(f"done: {f'pictures in {drawn}, ' * drawn.exists()}weights in {c.output_dir}; "
              f'CogView4Transformer2DModel.from_pretrained("{c.output_dir}") loads them')  # fmt: skip


def main(argv=None):
    """Exit code 0: done. 1: a failure. 2: the request is wrong. 75: stopped by a signal. One line says why."""
    try:
        run(parse(argv))
    except Ended as end:
        alone = RANK > 0 and isinstance(end, Refusal)  # other ends are agreed on, and said by rank 0
        time.sleep(10 * alone)  # it mostly says the same, and the launcher ends us once it has spoken
        if alone or RANK == 0:
            tqdm.write(f"cv4ctrl.py: {end}", file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()  # else gloo sometimes aborts at exit, and changes the exit code
        sys.exit(end.code)
    except KeyboardInterrupt:  # before heed_signals: no rank waits for us yet
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
