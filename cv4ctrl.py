"""cv4ctrl: turn CogView4-6B into a control model (pose, edges, depth), in one file.

CogView4-6B draws pictures from text: its transformer takes the noise out of a latent, the 16
channels that its VAE makes of a picture. Here it gets 16 more input channels, for the latent of a
control picture. Their weights start at zero, so training begins exactly at the base. Then the whole
transformer is fine-tuned by flow matching: between a latent x0 and noise eps runs a straight line,
and the model learns its direction, the velocity v.

    x = (1 - sigma) x0 + sigma eps              a point of the line, at noise level sigma
    v = dx / dsigma = eps - x0                  its direction
    loss = mean |model(x, control, caption, t) - v|^2

    sigma = mu s / (mu s + 1 - s),  s = t / 1000,  mu = 0.75 sqrt(N / 256) + 0.25

for timesteps t = 1 ... 1000 and N image tokens: a large picture shows through more noise, so mu
shifts sigma towards 1. The model is told t, as by CogView4ControlPipeline, which runs the result.

    deepspeed --num_gpus=8 cv4ctrl.py --dry_run    check flags and data, print the plan
    deepspeed --num_gpus=8 cv4ctrl.py [flags]      train; the same command again continues

Begin with "the model" and "flow matching", or with run() at the end.
"""

import datetime
import gc
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Literal

import datasets
import deepspeed
import diffusers
import filelock
import fsspec
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image, ImageCms, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from tqdm import tqdm
from transformers.utils.generic import flatten_dict

RANK = int(os.environ.get("RANK", 0))
WORLD = os.environ.get("WORLD_SIZE", "") if "RANK" in os.environ else ""
WORLD = int(WORLD) if WORLD.isdecimal() else 1  # start_ranks refuses other words
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # else it fragments
os.environ["PATH"] += f":{Path(sys.executable).parent}"  # of ninja, which DeepSpeed calls by name

# === CogView4-6B ===
# What the formulas take for granted. A base whose config files say otherwise, such as another scale
# of the latents, would be trained wrongly, without an error.

TIMESTEPS = 1000
BASE_SHIFT, MAX_SHIFT, BASE_TOKENS = 0.25, 0.75, 256  # of mu
LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8
PIXELS_PER_TOKEN = 16  # a token is a patch of 2 x 2 latents

SCHEDULER = {
    "num_train_timesteps": [TIMESTEPS],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "shift": [1.0],
    "base_shift": [BASE_SHIFT],
    "max_shift": [MAX_SHIFT],
    "base_image_seq_len": [BASE_TOKENS],
}
VAE = {"latent_channels": [16], "scaling_factor": [1.0], "shift_factor": [0.0]}
TRANSFORMER = {"in_channels": [16, 32], "out_channels": [16], "patch_size": [2]}  # 32: widened


# === flags ===
# A flag's metadata holds its limits: least (1 for whole numbers, else 0), most, multiple_of. kept:
# a continued run must keep it, since it decides the samples, or what the saved state means.


def flag(default, help, **limits):
    return field(default=default, metadata={"help": help} | limits)


@dataclass(frozen=True)
class Config:
    """All flags, most as in the diffusers example. Raises Failure for values out of range."""

    # Model
    pretrained_model_name_or_path: str = flag("THUDM/CogView4-6B", "base: hub name or folder")
    transformer: str | None = flag(None, "transformer folder to start from, widened or not")
    mixed_precision: Literal["bf16", "no"] = flag("bf16", "no: fp32; never fp16, fp8", kept=True)
    recompute: Literal["auto", "all", "most", "some", "none"] = flag("auto", "to save memory")
    compile: bool = flag(False, "compile the blocks: worth a try on a GPU")

    # Data
    dataset_name: str = flag("raulc0399/open_pose_controlnet", "hub name, folder or file")
    dataset_config_name: str | None = flag(None, "configuration of the data set")
    image_column: str = flag("image", "column of the target")
    conditioning_image_column: str = flag("conditioning_image", "column of the control")
    caption_column: str = flag("text", "column of the caption")
    control: Literal["column", "canny"] = flag("column", "canny: edges of the image", kept=True)
    resolution: int = flag(1024, "pixels of a side", multiple_of=PIXELS_PER_TOKEN, kept=True)
    max_sequence_length: int = flag(1024, "captions are cut to N tokens", kept=True)
    proportion_empty_prompts: float = flag(0.0, "samples without caption", most=1, kept=True)
    encoded_dir: str | None = flag(None, "cache that runs can share [OUTPUT_DIR/encoded]")
    dataloader_num_workers: int = flag(8, "threads per rank that read data")

    # Batch
    train_batch_size: int = flag(8, "samples per micro-batch and rank")
    gradient_accumulation_steps: int = flag(1, "micro-batches per step and rank")
    total_batch_size: int | None = flag(None, "samples per step; sets the accumulation", kept=True)

    # Optimizer
    max_train_steps: int = flag(50_000, "optimizer steps")
    learning_rate: float = flag(5e-5, "peak learning rate, after the warm-up")
    lr_scheduler: Literal["cosine", "constant_with_warmup"] = flag("cosine", "after the warm-up")
    lr_warmup_steps: int = flag(1000, "steps of linear warm-up", least=0)
    adam_beta1: float = flag(0.9, "decay of the first moment", most=0.99999)
    adam_beta2: float = flag(0.999, "decay of the second moment", most=0.99999)
    adam_weight_decay: float = flag(1e-4, "decoupled weight decay")
    adam_epsilon: float = flag(1e-8, "added to the root of the second moment", least=1e-16)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this 2-norm; 0: never")

    # Evaluation
    validation_steps: int = flag(100, "steps between evaluations: probe losses and pictures")
    validation_image: list[str] | None = flag(None, "control pictures of your own to draw with")
    validation_prompt: list[str] | None = flag(None, "their captions; one of either serves all")
    num_inference_steps: int = flag(50, "Euler steps of a picture; 0: no pictures", least=0)
    guidance_scale: float = flag(3.5, "guidance of a picture; 1 or less: off")
    probe_samples: int = flag(32, "rows that are held out, at most a tenth", least=0, kept=True)

    # Run
    output_dir: str = flag("pose-control", "folder of the run")
    seed: int = flag(0, "of order, timesteps, noise, dropped captions", least=0, kept=True)
    checkpointing_steps: int = flag(500, "steps between checkpoints")
    checkpoints_total_limit: int = flag(2, "newest checkpoints to keep")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "tracker; wandb: both")
    deepspeed_config: str | None = flag(None, "engine settings [the shipped ds_config.json]")
    dry_run: bool = flag(False, "check flags, data and base, print the plan, load nothing")

    def __post_init__(self):
        for option in fields(self):
            value, limits = getattr(self, option.name), option.metadata
            says = f"--{option.name} {value}: must be"
            require(value != "", f"{says} given")
            if type(value) in (int, float):
                least = limits.get("least", 1 if type(value) is int else 0)
                most = limits.get("most", 2**63 - 1)
                require(least <= value <= most, f"{says} from {least} to {most}")
                step = limits.get("multiple_of")
                require(not step or value % step == 0, f"{says} a multiple of {step}")
        validation_cases(self)


class FlagParser(transformers.HfArgumentParser):
    """Keeps our limits away from argparse, which does not know them."""

    def add_argument(self, *names, least=None, most=None, multiple_of=None, kept=None, **options):
        return super().add_argument(*names, **options)

    def error(self, message):
        raise Failure(message)


def parse(argv=None):
    """Command line -> Config."""
    parser = FlagParser(Config, prog="cv4ctrl.py", allow_abbrev=False)
    for ignored in ("--local_rank", "--gradient_checkpointing", "--offload"):
        parser.add_argument(ignored, nargs="?", help="no effect")
    parser.add_argument("--resume_from_checkpoint", choices=["latest"], help="as it always does")
    config, _, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    name = "".join(unknown[:1]).partition("=")[0]  # its value may be a secret
    require(not unknown, f"unknown flag {name}: see --help, and README.md for diffusers' flags")
    return config


def validation_cases(config):
    """[(control picture, caption)] of the flags: n to n, 1 to n, n to 1."""
    images, prompts = config.validation_image or [], config.validation_prompt or []
    for image in images:
        require(os.path.isfile(image), f"--validation_image {image}: no such file")
    count = max(len(images), len(prompts))
    fit = {len(images), len(prompts)} <= {1, count}  # each is 1 or count
    require(fit, "--validation_image, --validation_prompt: give as many of both, or one of either")
    return list(zip(images * count, prompts * count))[:count]  # the shorter list is repeated


def resolve(config, world):
    """Fills in what follows from other flags, for `world` ranks."""
    micro = config.train_batch_size * world
    total = config.total_batch_size or micro * config.gradient_accumulation_steps
    says = f"--total_batch_size {total}: must be {micro} (batch size x ranks) x the accumulation"
    require(total % micro == 0 and config.gradient_accumulation_steps in (1, total // micro), says)
    filled = {"total_batch_size": total, "gradient_accumulation_steps": total // micro}
    filled["encoded_dir"] = config.encoded_dir or f"{config.output_dir}/encoded"
    if config.control != "column":
        filled["conditioning_image_column"] = config.image_column
    return replace(config, **filled)


# === the model ===
# The base's transformer, widened for the control, with an attention that needs no masks. Look at
# add_control_channels: it is the whole idea.


def add_control_channels(state):
    """Widens the input layer in a transformer's state dict: from a latent to latent and control.

    patch_embed.proj is linear over a flattened patch of p x p latents, channels first: (D, 16 p p).
    The control's channels follow, so their weights are columns at the end: (D, 32 p p). While these
    are zero the control changes nothing: the model is exactly the base. Still they learn, since
    their gradient depends on the control and not on themselves.
    """
    weight = state["patch_embed.proj.weight"]
    return state | {"patch_embed.proj.weight": torch.cat([weight, torch.zeros_like(weight)], dim=1)}


def empty_transformer(folder):
    """The widened model of a folder's config, without weights (meta device)."""
    kind = diffusers.CogView4Transformer2DModel
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder) | {"in_channels": 2 * LATENT_CHANNELS})


def load_transformer(folder, dtype, device):
    """The widened model with a folder's weights. Raises RuntimeError where one is missing."""
    state = {}
    for file in weight_files(folder, "diffusion_pytorch_model"):
        with safe_open(file, "pt", device=str(device)) as tensors:
            state.update({name: tensors.get_tensor(name).to(dtype) for name in tensors.keys()})
    model = empty_transformer(folder)
    if state["patch_embed.proj.weight"].shape != model.patch_embed.proj.weight.shape:
        state = add_control_channels(state)
    model.load_state_dict(state, assign=True)
    return model


class PrefixAttention:
    """Attention for captions of several lengths: exact, and without a mask.

    Tokens come in the order image, caption, padding: captions carry no position, so any order will
    do. A sample's own tokens are a prefix, and neighbours with equal lengths attend together, on a
    slice. Every kernel takes that; flash attention takes no mask.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb, groups, **_):
        """Image (B, N, D), captions (B, T, D), groups [(length, how many)] -> both."""
        image_tokens = hidden_states.shape[1]
        x = torch.cat([hidden_states, encoder_hidden_states], dim=1)  # (B, S, D), S = N + T

        def normed_and_rotated(linear, norm):  # (B, heads, S, D / heads)
            heads = norm(linear(x).unflatten(2, (attn.heads, -1))).to(x.dtype)
            image, text = heads[:, :image_tokens], heads[:, image_tokens:]
            rotate = partial(apply_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1)
            return torch.cat([rotate(image, image_rotary_emb), text], dim=1).transpose(1, 2)

        query = normed_and_rotated(attn.to_q, attn.norm_q)
        key = normed_and_rotated(attn.to_k, attn.norm_k)
        value = attn.to_v(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        lengths, counts = zip(*groups)
        outputs = []
        for length, *qkv in zip(lengths, *(heads.split(counts) for heads in (query, key, value))):
            own = (whole[:, :, : image_tokens + length] for whole in qkv)
            output = F.scaled_dot_product_attention(*own).transpose(1, 2).flatten(2)
            padding = encoder_hidden_states.shape[1] - length
            outputs.append(F.pad(output, (0, 0, 0, padding)) if padding else output)
        x = attn.to_out[0](torch.cat(outputs) if len(outputs) > 1 else outputs[0])
        return x[:, :image_tokens], x[:, image_tokens:]


# --recompute -> tensors of (batch, tokens, D) that a block keeps for its backward pass, fastest
# first. none: all it makes; some: its input and the outputs of attention, down projection and the
# four D x D products; most: without these four; all: only its input.
KEPT_PER_BLOCK = {"none": 22, "some": 7, "most": 3, "all": 1}


def recompute(transformer, choice, compiled=False):
    """Makes the blocks keep what KEPT_PER_BLOCK says, and compiles them."""

    def policy(context, operator, *args, **kwargs):
        # Attention, whatever the kernel; addmm(bias, x, weight.T), whose args[2] is (in, out).
        keep = operator.name().startswith("aten::_scaled_dot_product_")
        if operator is torch.ops.aten.addmm.default:
            inputs, outputs = args[2].shape
            keep = inputs > outputs or (choice == "some" and inputs == outputs)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    selective = partial(create_selective_checkpoint_contexts, policy)
    options = {"context_fn": selective} if choice in ("most", "some") else {}

    def run_block(block, *inputs):
        if choice == "none":
            return block(*inputs)
        return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False, **options)

    if compiled:  # checkpoint included: from outside, its policy sees nothing of a compiled block
        torch._dynamo.config.recompile_limit = 64  # about two for each sample
        run_block = torch.compile(run_block)
    transformer.enable_gradient_checkpointing(run_block)  # called for each block in training


class VelocityModel:
    """velocity = model(noisy, control, prompts, timestep), at one resolution.

    network: the transformer or its engine. Rotary tables are made once; diffusers makes them in
    each forward pass, on the CPU, and each block copies them.
    """

    def __init__(self, network, resolution, compiled=False):
        self.network, self.compiled = network, compiled
        transformer = getattr(network, "module", network)
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(PrefixAttention())
        self.device, self.dtype = transformer.device, transformer.dtype
        side = resolution // PIXELS_PER_LATENT
        tables = transformer.rope(torch.empty(1, 1, side, side))  # cosines, sines (N, D / heads)
        self.image_tokens = len(tables[0])
        size = torch.tensor([[resolution, resolution]], device=self.device, dtype=self.dtype)
        self.constant = {"original_size": size, "target_size": size, "crop_coords": 0 * size}
        self.constant["image_rotary_emb"] = tuple(table.to(self.device) for table in tables)

    def __call__(self, noisy, control, prompts, timestep):
        """noisy, control (B, 16, h, w), prompts B x (T, 4096), timestep (B,) -> (B, 16, h, w)."""
        lengths = itertools.groupby(map(len, prompts))  # few, since a micro-batch comes sorted
        groups = [(length, len(list(equal))) for length, equal in lengths]
        if self.compiled and len(groups) > 1:  # each grouping would be a graph of its own
            groups = [(len(prompt), 1) for prompt in prompts]
        return self.network(
            hidden_states=torch.cat([noisy, control], dim=1).to(self.dtype),
            encoder_hidden_states=pad_sequence(prompts, batch_first=True).to(self.dtype),
            timestep=timestep,
            attention_kwargs={"groups": groups},
            return_dict=False,
            **self.constant,
        )[0]


# === flow matching ===
# The first page's formulas, for training and for drawing. They are computed in fp32: in bf16
# only 347 of the 1000 values of sigma at 1024 px are distinct.


def shifted_sigma(timestep, image_tokens):
    """Timesteps 0 ... 1000 -> sigma 0 ... 1, as FlowMatchEulerDiscreteScheduler shifts it."""
    mu = MAX_SHIFT * math.sqrt(image_tokens / BASE_TOKENS) + BASE_SHIFT
    s = timestep.float() / TIMESTEPS
    return mu * s / (mu * s + 1 - s)


def straight_line(latents, noise, sigma):
    """Line from latents to noise (B, 16, h, w) -> (its points at sigma (B,), its direction)."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * latents + sigma * noise, noise - latents


def flow_matching_loss(model, batch):
    """Mean squared error of the velocity over a micro-batch (see collate), fp32."""
    sigma = shifted_sigma(batch["timestep"], model.image_tokens)
    noisy, velocity = straight_line(batch["latents"], batch["noise"], sigma)
    predicted = model(noisy, batch["control"], batch["prompts"], batch["timestep"])
    return F.mse_loss(predicted.float(), velocity)


def guided(velocity, unguided, guidance):
    """Classifier-free guidance: away from the velocity of the empty prompt."""
    return unguided + guidance * (velocity - unguided)


def euler_sample(model, noise, control, prompt, empty, steps, guidance):
    """Noise (1, 16, h, w) -> latents, in the pipeline's steps; prompt, empty (T, 4096)."""
    timesteps = torch.from_numpy(np.linspace(TIMESTEPS, 1, steps)).long().float()
    sigmas = shifted_sigma(torch.cat([timesteps, torch.zeros(1)]), model.image_tokens).tolist()
    x = noise
    for timestep, sigma, next_sigma in zip(timesteps.to(x.device), sigmas, sigmas[1:]):
        v = model(x, control, [prompt], timestep[None])
        if guidance > 1:
            v = guided(v, model(x, control, [empty], timestep[None]), guidance)
        x = (x.float() + (next_sigma - sigma) * v).to(v.dtype)  # as the scheduler rounds
    return x


# === data: rows and pictures ===
# A row is a target picture, a control picture and a caption. It is trained on as inference would
# see it, or named with what is wrong with it.


def load_splits(config):
    """-> {split: rows}."""
    path = Path(config.dataset_name).absolute()  # a folder named json is no format
    if not path.exists():  # of the hub
        return datasets.load_dataset(config.dataset_name, config.dataset_config_name)
    require(not glob.has_magic(str(path)), "rename the path: * ? [ stand for other names")
    if path.is_file():
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return datasets.load_dataset(kind, data_files=str(path))
    if (path / "state.json").exists():  # of save_to_disk
        return {"train": datasets.load_from_disk(path)}
    if not config.dataset_config_name:
        refuse_forgotten_files(path)
    return datasets.load_dataset(str(path), config.dataset_config_name)


def refuse_forgotten_files(folder):
    """Fails where `datasets` would leave out files: beside train.parquet it drops more.parquet."""
    card = folder / "README.md"
    if card.exists() and "\nconfigs:" in card.read_text(errors="replace"):
        return  # it says which files to take
    splits = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    taken = {Path(file) for files in splits.values() for file in files}
    kinds = {file.suffix for file in taken if file.stem != "metadata"}
    present = {Path(name) for name in glob.glob(f"{folder.resolve()}/**/*.*", recursive=True)}
    left = sorted(str(file) for file in present - taken if file.suffix in kinds)
    kinds -= set(Image.registered_extensions())  # a.jpg.png may be the control of a.jpg
    odd = [str(file) for file in taken if kinds & set(file.suffixes[:-1])]  # data.parquet.bak
    require(not odd, f"would take {', '.join(odd[:3])} for data: move other files away")
    some = f"{len(left)} files are in no split, such as {', '.join(left[:3])}"
    require(not left, f"{some}: give the folder of a split, or rename what has a split's name")


def open_dataset(config):
    """Opens the data set: rows[i] is a dict, its pictures bytes or paths."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we say it in one line
    needed = {config.image_column, config.conditioning_image_column, config.caption_column}
    kinds = OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError
    with explained(f"data set {config.dataset_name}", *kinds):
        splits = load_splits(config)
        split = next(iter(splits)) if len(splits) == 1 else "train"
        require(split in splits, f"has no split train, but {', '.join(map(str, splits))}")
        rows = splits[split].with_format(None)
        lacking = ", ".join(needed - set(rows.column_names))
        require(len(rows) > 0, "is empty")
        require(not lacking, f"has no column {lacking}, but {', '.join(rows.column_names)}")
    rows = rows.select_columns(list(needed))
    for column, kind in rows.features.items():
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def content_of(cell, folder):
    """(bytes of a picture, its path or ""), from a cell with either; a path in a folder."""
    if not isinstance(cell, dict):  # as `datasets` gives pictures
        cell = {"bytes" if isinstance(cell, bytes) else "path": cell}
    content, path = cell.get("bytes"), cell.get("path") or ""
    if content and isinstance(content, bytes):
        return content, path
    require(path and isinstance(path, str), f"no picture, but {cell!r:.50}")
    says = f"no such file: {path:.100} ({ascii(path[-20:])})"  # accents may be letters of their own
    archive = path.partition("::")[2] if path.startswith("zip://") else ""
    require(os.path.isfile(archive or folder / path), says)  # a named pipe would hang
    with fsspec.open(path) if archive else open(folder / path, "rb") as file:
        return file.read(), path


def decode_picture(content, use, side):
    """A picture file -> (pixels (1, 3, side, side) in -1 ... 1, [width, height, largest value]).

    use: "target", "column" for a finished control, or "canny" for one that is made here.
    """
    damage = f"no readable picture, it begins with {content[:12]}"
    with explained(damage, Exception):  # decoders raise what they like
        image = Image.open(io.BytesIO(content))
        deep = image.mode[0] in "IF" or ";16" in str(image.tile)  # opened as RGB of 8 bits
        image = None if deep else ImageOps.exif_transpose(image)
    require(image, "more than 8 bits a channel, which inference cuts: scale them to 0 ... 255")
    size, icc = image.size, image.info.get("icc_profile")
    # Inference ignores transparency and profile of a finished control, and the profile for edges.
    if use != "column" and image.has_transparency_data:
        image = image.convert("RGBA")
        require(image.getextrema()[3][1] > 0, "transparent everywhere")
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image)
    image = image.convert("RGB")
    if use == "target" and icc:
        srgb = ImageCms.createProfile("sRGB")
        with suppress(ImageCms.PyCMSError):  # a profile of CMYK or grey
            image = ImageCms.profileToProfile(image, io.BytesIO(icc), srgb)
    if use == "canny":  # as in the example of inference
        canny = importlib.import_module("controlnet_aux").CannyDetector()
        image = canny(image, 50, 200, detect_resolution=side, image_resolution=side)
    pixels = VaeImageProcessor(vae_scale_factor=PIXELS_PER_LATENT).preprocess(image, side, side)
    return pixels, [*size, max(high for low, high in image.getextrema())]


# === data: encode once ===
# VAE and text encoder see each picture and caption once, before the transformer is loaded. A file
# of the cache is named by its key, a digest of all that it depends on.

# A usable row, by keys of the cache; a --validation_image has neither index nor image_key.
Row = namedtuple("Row", "index image_key control_key caption_key tokens")  # tokens: of the caption
LOADING = dict(dtype=torch.bfloat16, use_safetensors=True, low_cpu_mem_usage=False)  # no accelerate


def fingerprint(folder, pattern="*"):
    """Digest of a model's large files: names, sizes and samples."""
    parts = []
    for file in sorted(filter(Path.is_file, folder.glob(pattern))):
        size = file.stat().st_size
        parts += [file.name, size]
        with open(file, "rb") as stream:
            for position in range(0, size, max(2**20, size // 16)):
                stream.seek(position)
                parts.append(hashlib.sha256(stream.read(2**20)).hexdigest())
    return digest(*parts)


class Cache:
    """Encodes what it lacks. A file holds an entry, and facts about it for read_row."""

    def __init__(self, config, base, device):
        self.config, self.base, self.device = config, base, device
        self.encoded = Path(config.encoded_dir)
        source = Path(config.dataset_name)
        self.folder = source if source.is_dir() else source.parent  # paths are relative to it
        vae, *text = (fingerprint(base / part) for part in ("vae", "text_encoder", "tokenizer"))
        self.of_pictures = digest("pictures", 6, vae, config.resolution)  # 6: our version
        self.of_captions = digest("captions", *text, config.max_sequence_length)
        self.lock = threading.Lock()  # threads read at once, but encode one by one

    @cached_property
    def encoders(self):
        """The base's pipeline, without its transformer."""
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipeline = diffusers.CogView4ControlPipeline
        return pipeline.from_pretrained(self.base, transformer=None, **LOADING).to(self.device)

    def facts(self, key):
        """None where the entry is missing, or damaged."""
        file = self.encoded / f"{key}.safetensors"
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as tensors:
            return tensors.get_tensor("facts").tolist()

    def store(self, key, entry, facts):
        tensors = {"entry": entry[0].cpu().contiguous(), "facts": torch.tensor(facts)}
        with atomic(self.encoded / f"{key}.safetensors") as aside:
            aside.write_bytes(save(tensors))
        return facts

    def caption(self, text):
        """-> (key, tokens)."""
        text, most = text.strip(), self.config.max_sequence_length
        key = digest(self.of_captions, text)
        facts = self.facts(key)
        if not facts:
            with self.lock, torch.no_grad():  # one at a time: padding is attended to
                entry, _ = self.encoders.encode_prompt(text, None, False, max_sequence_length=most)
            facts = self.store(key, entry, [entry.shape[1]])
        return key, facts[0]

    def picture(self, cell, where, use):
        """-> (key, bytes of the file, facts). Raises Failure."""
        with explained(where):
            content, path = content_of(cell, self.folder)
        key = digest(self.of_pictures, use) + hashlib.sha256(content).hexdigest()
        facts = self.facts(key)
        if not facts:
            with explained(f"{where}: {path[-100:] or 'bytes'}"):
                pixels, facts = decode_picture(content, use, self.config.resolution)
            with self.lock, torch.no_grad():
                vae = self.encoders.vae
                moments = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.parameters
            self.store(key, moments, facts)
        return key, content, facts

    def read_row(self, rows, index):
        """-> (Row, remarks). Raises Failure."""
        config, cells, where = self.config, rows[index], f"row {index}, "
        caption_key, tokens = self.caption(cells[config.caption_column])
        name = config.conditioning_image_column
        control_key, control_file, control = self.picture(cells[name], where + name, config.control)
        name = config.image_column
        image_key, image_file, image = self.picture(cells[name], where + name, "target")
        stretch = image[0] * control[1] / (image[1] * control[0])  # of (width, height, largest)
        remarks = {
            "the target is smaller than --resolution": min(image[:2]) < config.resolution,
            "target and control differ in shape": not 0.95 < stretch < 1.05,
            "the control is the target": config.control == "column" and control_file == image_file,
            "the control is nearly black everywhere": control[2] < 20,
        }
        row = Row(index, image_key, control_key, caption_key, tokens)
        return row, [remark for remark, is_true in remarks.items() if is_true]


def encode(config, base, rows, device):
    """Encodes what the cache lacks, on all ranks -> Stream."""
    with fail_together():
        cache = Cache(config, base, device)
        cases = []
        for image, prompt in validation_cases(config):
            where = f"--validation_image {image}"
            control_key, *_ = cache.picture(os.path.abspath(image), where, config.control)
            caption_key, tokens = cache.caption(prompt)
            cases.append(Row(None, None, control_key, caption_key, tokens))
        empty_key, _ = cache.caption("")
    read, threads = partial(cache.read_row, rows), config.dataloader_num_workers
    remarked = spread(range(len(rows)), read, "encoding", device, threads)
    del cache, read  # frees the encoders, before the transformer is loaded
    gc.collect()
    torch.cuda.empty_cache()
    counts = Counter(remark for _, remarks in remarked for remark in remarks)
    for remark, count in counts.items():
        first = next(row.index for row, remarks in remarked if remark in remarks)
        say(f"row {first}: {remark} ({count} of {len(rows)} rows)")
    train, held_out = hold_out([row for row, _ in remarked], config.probe_samples)
    return Stream(config, empty_key, train, held_out, cases)


def hold_out(rows, most):
    """-> (rows to train on, up to `most` others, which share no picture with them)."""
    count = Counter()
    for row in rows:
        count.update((row.image_key, row.control_key, (row.image_key, row.control_key)))
    # A held-out row takes all that share a picture with it out of training: a tenth at most.
    held_out, hidden, lost = [], set(), 0
    for row in sorted(rows, key=lambda row: row.image_key):  # its file's digest: at any resolution
        pair = row.image_key, row.control_key
        sharing = count[pair[0]] + count[pair[1]] - count[pair]
        fits = len(held_out) < most and lost + sharing <= len(rows) // 10
        if fits and hidden.isdisjoint(pair):
            held_out.append(row)
            hidden.update(pair)
            lost += sharing
    return [row for row in rows if hidden.isdisjoint((row.image_key, row.control_key))], held_out


# === the sample stream ===
# Randomness is addressed, not consumed: what is random about the k-th sample depends on (seed, k)
# alone. So a restart is exact, and any number of ranks sees the same global batches.


def generator(*address):
    """Random generator of an address such as (seed, "noise", k)."""
    return torch.Generator().manual_seed(int(digest(*address)[:15], 16))


@lru_cache(maxsize=2)
def permutation(seed, epoch, rows):
    return torch.randperm(rows, generator=generator(seed, "order", epoch))


@dataclass(frozen=True)
class Stream:
    """The encoded data set: its rows by their use, samples, and the micro-batches of a rank."""

    config: Config
    empty_key: str  # of the caption ""
    train: list[Row]
    held_out: list[Row]
    cases: list[Row]  # of --validation_image

    def entry(self, key):
        """Prompt embedding (T, 4096) or posterior moments (32, h, w), bf16."""
        return load_file(Path(self.config.encoded_dir, f"{key}.safetensors"))["entry"]

    def latents(self, key, eps=0.0):
        """A draw from a picture's posterior, its mean for eps 0: (16, h, w), fp32."""
        mean, log_variance = self.entry(key).float().chunk(2)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * eps  # clamped as in diffusers

    def row(self, k):
        """Row of sample k: every row comes once an epoch; some lose their caption."""
        seed, rows = self.config.seed, self.train
        row = rows[permutation(seed, k // len(rows), len(rows))[k % len(rows)]]
        chance = torch.rand((), generator=generator(seed, "caption", k))
        if chance < self.config.proportion_empty_prompts:
            return row._replace(caption_key=self.empty_key, tokens=0)
        return row

    def sample(self, row, timestep, *address):
        """Model inputs for one row; the address decides noise and posterior draws."""
        side = self.config.resolution // PIXELS_PER_LATENT
        random = generator(self.config.seed, *address)
        noise, eps, control_eps = torch.randn(3, LATENT_CHANNELS, side, side, generator=random)
        return {
            "latents": self.latents(row.image_key, eps),
            "control": self.latents(row.control_key, control_eps),
            "noise": noise,
            "prompt": self.entry(row.caption_key),
            "timestep": torch.tensor(float(timestep)),
        }

    def training_sample(self, k):
        """Sample k. Multiples of the golden ratio spread the timesteps 1 ... 1000 evenly."""
        start = torch.rand((), generator=generator(self.config.seed, "timestep")).item()
        u = (start + k * (5**0.5 - 1) / 2) % 1
        return self.sample(self.row(k), TIMESTEPS - int(u * TIMESTEPS), "noise", k)

    def micro_batches(self, device, start):
        """Micro-batches of this rank from number `start` on, made ahead by threads."""
        threads = self.config.dataloader_num_workers
        with ThreadPoolExecutor(threads) as pool:
            make = partial(pool.submit, self.micro_batch, device)
            ahead = deque(map(make, range(start, start + threads)))
            for number in itertools.count(start + threads):
                ahead.append(make(number))
                yield ahead.popleft().result()

    def micro_batch(self, device, number):
        """Micro-batch `number` of this rank, see collate."""
        step, turn = divmod(number, self.config.gradient_accumulation_steps)
        size, total = self.config.train_batch_size, self.config.total_batch_size
        of_step = range(step * total, (step + 1) * total)
        by_length = sorted(of_step, key=lambda k: self.row(k).tokens)  # so that padding is rare
        mine = by_length[(turn * WORLD + RANK) * size :][:size]
        return collate([self.training_sample(k) for k in mine], device)


def collate(samples, device):
    """Samples -> micro-batch: stacked tensors, and a list of prompts, as lengths differ."""
    names = ("latents", "control", "noise", "timestep")
    batch = {name: torch.stack([sample[name] for sample in samples]).to(device) for name in names}
    return batch | {"prompts": [sample["prompt"].to(device) for sample in samples]}


# === evaluation ===
# The loss does not show whether the control is followed. Held-out rows do: their loss with their
# own control against another's, and pictures.


@torch.no_grad()
def probe(model, stream):
    """Losses of held-out rows with fixed noise at t = 100 ... 900; {} for fewer than two rows.

    probe_loss: with their own control; probe_loss_swapped: with the next row's; control_gain: what
    the swap costs, 0 if the control is ignored.
    """
    rows = stream.held_out
    if len(rows) < 2:
        return {}
    samples = [stream.sample(row, 0, "probe", n) for n, row in enumerate(rows)]

    def loss(job):
        swapped, t, n = job
        control = samples[(n + swapped) % len(rows)]["control"]
        sample = samples[n] | {"control": control, "timestep": torch.tensor(float(t))}
        return flow_matching_loss(model, collate([sample], model.device)).item()

    jobs = list(itertools.product((0, 1), range(100, 901, 100), range(len(rows))))
    losses = torch.tensor(spread(jobs, loss, "probing", model.device)).double()
    own, swapped = losses.view(2, -1).mean(1).tolist()
    return {"probe_loss": own, "probe_loss_swapped": swapped, "control_gain": swapped / own - 1}


@torch.no_grad()
def draw_pictures(model, stream, base):
    """Picture of the user's cases and four rows (held out, if any): control | made | target."""
    config, device = stream.config, model.device
    if config.num_inference_steps == 0:
        return None
    rows = stream.cases + (stream.held_out or stream.train)[:4]
    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae", **LOADING).to(device)
    options = config.num_inference_steps, config.guidance_scale

    def draw(row):  # -> (1, 3, side, 3 side)
        keys = row.control_key, row.caption_key
        control = stream.latents(row.control_key)[None].to(device)  # its mean
        prompts = [stream.entry(key).to(device) for key in (row.caption_key, stream.empty_key)]
        noise = torch.randn(control.shape, generator=generator(config.seed, "validation", *keys))
        latents = [control, euler_sample(model, noise.to(device), control, *prompts, *options)]
        if row.image_key:
            latents.append(stream.latents(row.image_key)[None])
        band = torch.cat([vae.decode(x.to(device, vae.dtype)).sample.cpu() for x in latents], dim=3)
        return F.pad(band, (0, 3 * config.resolution - band.shape[3]), value=1)  # white: no target

    bands = torch.cat(spread(rows, draw, "drawing", device), dim=2)
    return VaeImageProcessor().postprocess(bands)[0]


# === engine and checkpoints ===
# DeepSpeed shards the optimizer (ZeRO-2). Its state is kept by parameter, so any number of ranks
# continues. A checkpoint is written aside and renamed: it is there whole or not at all.

ENGINE = {  # what ds_config.json must say, and the choice; what flags say is "auto" there
    "data_types.grad_accum_dtype": ["fp32", "bf16"],
    "communication_data_type": ["fp32", "bf16"],
    "zero_optimization.stage": [2],
    "zero_optimization.overlap_comm": [True, False],
    # DeepSpeed 0.19.8 may free a larger gradient before it is sent (reduce_ipg_grads); the largest
    # weights of CogView4-6B have 4096 x 16384 numbers.
    "zero_optimization.reduce_bucket_size": range(4096 * 16384, 2**31),
    "zero_optimization.allgather_bucket_size": range(1, 2**31),
    "zero_optimization.offload_optimizer.device": ["auto", "cpu", "none"],
    "zero_optimization.offload_optimizer.pin_memory": [True, False],
}
TIMEOUT = datetime.timedelta(hours=2)  # of waiting for a rank that hangs
TrainState = namedtuple("TrainState", "step skipped", defaults=(0, 0))  # skipped: not finite
STATE = {"fp32": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # in files -> in DeepSpeed


def engine_settings(config):
    """What ds_config.json says about the engine, and the flags."""
    of_flags = {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": config.total_batch_size,
        "gradient_clipping": config.max_grad_norm,
    }
    expected = dict.fromkeys([*of_flags, "bf16.enabled"], ["auto"]) | ENGINE
    file = Path(config.deepspeed_config or Path(__file__).with_name("ds_config.json"))
    with explained(f"--deepspeed_config {file}"):
        settings = json.loads(file.read_text())
        given = flatten_dict(settings)  # {"zero_optimization.stage": 2, ...}
        for name in given | expected:
            value, choices = given.get(name), expected.get(name)
            says = f"{name} = {json.dumps(value)}"
            require(choices, f"{says}: not among settings known to train right (as bf16 is)")
            fits = type(value) is type(choices[0]) and value in choices
            require(fits, f"{says}: must be one of {choices}")
    # Without check_grad_overflow one NaN would end in the weights.
    bf16 = {"enabled": config.mixed_precision == "bf16", "check_grad_overflow": True}
    return settings | of_flags | {"bf16": bf16}


def start_ranks():
    """Joins the other ranks -> this rank's device."""
    if "RANK" not in os.environ:  # no launcher
        for tasks in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            require(os.environ.get(tasks, "1") == "1", f"{tasks} > 1: use deepspeed or torchrun")
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it needs a compiler
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    place = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
    if WORLD > 1:
        say(f"waiting for {WORLD} ranks at {place}")
    with explained(f"no meeting at {place}", dist.DistError, ValueError):
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=TIMEOUT, verbose=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, lambda number, frame: stop_requests.append(number))
    return torch.device(accelerator.current_device_name())


def start_engine(config, settings, transformer, checkpoint=None, state=TrainState()):
    """deepspeed.initialize with AdamW, in the state of a checkpoint."""
    offloaded = settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    betas, decay = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay
    options = {"lr": 0.0, "betas": betas, "eps": config.adam_epsilon, "weight_decay": decay}
    on_card = partial(torch.optim.AdamW, fused=True)
    adam = deepspeed.ops.adam.DeepSpeedCPUAdam if offloaded else on_card
    optimizer = adam(transformer.parameters(), **options)
    engine, *_ = deepspeed.initialize(model=transformer, optimizer=optimizer, config=settings)
    dist.set_timeout(TIMEOUT, engine.data_parallel_group)  # DeepSpeed's own is 10 minutes

    # DeepSpeed makes Adam's state in the first step; to be loaded, it must be there before.
    steps = state.step - state.skipped
    for part in optimizer.param_groups[0]["params"]:  # this rank's part of the fp32 weights
        step = steps if offloaded else torch.tensor(float(steps), device=part.device)
        moments = {name: torch.zeros_like(part) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[part] = {"step": step} | moments
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in transformer.named_parameters() if checkpoint else ():
        if parameter._hp_mapping is not None:  # this rank holds a part of it
            for entry, tensor in load_file(checkpoint / "state" / f"{name}.safetensors").items():
                safe_set_full_optimizer_state(parameter, tensor, STATE[entry])
    return engine


def save_state(engine, folder):
    """Writes fp32 weights and Adam's moments, a file a parameter. All ranks must call it."""
    weights = dict(engine.module.named_parameters())
    names = sorted(weights, key=lambda name: weights[name].numel())  # a round's are alike
    for first in tqdm(range(0, len(names), WORLD), "saving", leave=False, **BAR):
        mine = {}
        for rank, name in enumerate(names[first : first + WORLD]):  # all gather what one writes
            state = {e: safe_get_full_optimizer_state(weights[name], STATE[e]) for e in STATE}
            if rank == RANK:
                mine[name] = {e: state[e].cpu() for e in state}
        with fail_together():  # once a round: its files are written side by side
            folder.mkdir(parents=True, exist_ok=True)
            for name in mine:
                save_file(mine[name], folder / f"{name}.safetensors")
    with fail_together():  # what gets the name of a checkpoint must survive a power cut
        os.sync()


def save_checkpoint(engine, config, state, identity):
    """Writes checkpoint-<step> and deletes the oldest. All ranks must call it."""
    folder = Path(config.output_dir, f"checkpoint-{state.step}")
    aside = folder.with_name(f".{folder.name}.tmp")
    save_state(engine, aside / "state")
    with fail_together():
        if RANK == 0:
            engine.module.save_pretrained(aside / "transformer", max_shard_size="100GB")
            sizes = {str(one.relative_to(aside)): one.stat().st_size for one in aside.glob("*/*")}
            manifest = state._asdict() | {"identity": identity, "files": sizes}
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
            os.sync()
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            os.replace(aside, folder)
            for old, _ in find_checkpoints(config.output_dir)[config.checkpoints_total_limit :]:
                shutil.rmtree(old.rename(aside), ignore_errors=True)  # never half of it


def find_checkpoints(output_dir):
    """[(checkpoint-<step>, its manifest)] that are intact, newest first."""
    folders, intact = list(Path(output_dir).glob("checkpoint-*")), []
    for folder in folders:
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
            require(sizes == manifest["files"], "files have changed their size")  # caught below
            intact.append((folder, manifest))
        except (OSError, ValueError, LookupError, TypeError, Failure) as error:
            say(f"skipping {folder}, which is damaged: {error}")
    require(intact or not folders, f"{output_dir} holds only damaged checkpoints: move them away")
    return sorted(intact, key=lambda one: one[1]["step"], reverse=True)


def check_same_run(manifest, identity):
    """Fails where continuing would change the samples, or the meaning of the state."""
    for name, now in identity.items():
        saved = manifest.get("identity", {}).get(name, now)
        require(saved == now, f"{name} was {saved} and is {now}: keep it, or change --output_dir")


# === the loop ===
# Before each micro-batch, and between the pictures of an evaluation, the ranks ask each other for
# signals: launchers kill 30 seconds after SIGTERM, and what is not saved by then is lost.

stop_requests = []  # signals that came to this rank


def raise_if_stopped(device):
    """Fails with code 75 on all ranks after a signal to any. All ranks must call it."""
    signals = torch.tensor(float(len(stop_requests)), device=device)
    dist.all_reduce(signals)
    require(signals.item() == 0, "stopped by a signal; the same command continues", 75)


def open_tracker(config, step):
    """Tensorboard's writer, from which wandb takes its figures. A continued run continues both."""
    folder = Path(config.output_dir)
    try:
        if config.report_to == "wandb":
            name = folder / "wandb-id"
            if not name.exists():
                name.write_text(os.urandom(8).hex())
            sys.stdin = open(os.devnull)  # without a login it would ask, and wait
            options = {"id": name.read_text(), "resume": "allow", "config": asdict(config)}
            importlib.import_module("wandb").init(sync_tensorboard=True, **options)
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        return tensorboard.SummaryWriter(folder / "logs", purge_step=step + 1)
    except Exception as error:  # no package, network or login is no reason to end the run
        say(f"--report_to {config.report_to}: {error}; the run goes on without it")


class Log:
    """metrics.jsonl, tracker and progress bar of rank 0."""

    def __init__(self, config, step):
        self.file = Path(config.output_dir, "metrics.jsonl")
        tracked = RANK == 0 and config.report_to != "none"
        self.tracker = open_tracker(config, step) if tracked else None
        self.bar = tqdm(None, "training", config.max_train_steps, initial=step, **BAR)

    def write(self, kind, step, figures, picture=None):
        """Writes figures of kind "train" or "probe". All ranks must call it."""
        line = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        with fail_together():
            if RANK == 0:
                with open(self.file, "a") as file:
                    file.write(json.dumps({"step": step} | line) + "\n")
                if picture:
                    folder = self.file.with_name("validation")
                    folder.mkdir(exist_ok=True)
                    picture.save(folder / f"step-{step}.png")
            if self.tracker:
                for name, x in figures.items():
                    self.tracker.add_scalar(f"{kind}/{name}", x, step)
                if picture:
                    self.tracker.add_image("validation", np.array(picture), step, dataformats="HWC")
                self.tracker.flush()
        self.bar.update(step - self.bar.n)


def train_step(engine, model, batches, config, rate):
    """One optimizer step -> its figures, the same on all ranks. Stops at a signal."""
    clock = time.perf_counter()
    engine.optimizer.param_groups[0]["lr"] = rate
    losses = []
    for _ in range(config.gradient_accumulation_steps):
        raise_if_stopped(model.device)
        loss = flow_matching_loss(model, next(batches))
        engine.backward(loss)
        engine.step()  # after the last micro-batch: clips, and lets AdamW act if all is finite
        losses.append(loss.detach())
    if not engine.was_step_applied():  # DeepSpeed 0.19.8 keeps the sums if it offloads them
        engine.optimizer.averaged_gradients.clear()
    loss = torch.stack(losses).mean() / WORLD
    dist.all_reduce(loss)
    figures = {"loss": loss.item(), "lr": rate}  # item waits for the GPU: the clock is true
    figures["grad_norm"] = float(engine.get_global_grad_norm())  # infinite in a skipped step
    figures["samples_per_s"] = config.total_batch_size / (time.perf_counter() - clock)
    return figures


def learning_rate(config, step):
    """Learning rate of the step after `step` others, as by diffusers' get_scheduler."""
    rate, warm_up = config.learning_rate, config.lr_warmup_steps
    if step < warm_up:
        return rate * step / warm_up
    if config.lr_scheduler == "constant_with_warmup":
        return rate
    done = (step - warm_up) / max(1, config.max_train_steps - warm_up)
    return rate * (1 + math.cos(math.pi * done)) / 2


def train(engine, stream, base, identity, state):
    """Trains from a TrainState to --max_train_steps. After a signal it fails with code 75."""
    config = stream.config
    model = VelocityModel(engine, config.resolution, config.compile)
    log = Log(config, state.step)
    batches = stream.micro_batches(model.device, state.step * config.gradient_accumulation_steps)
    saved, failed = state.step, 0
    try:
        while True:
            last = state.step >= config.max_train_steps

            # Save.
            if (last or state.step % config.checkpointing_steps == 0) and state.step > saved:
                save_checkpoint(engine, config, state, identity)
                saved = state.step

            # Evaluate, also before the first step and at the end.
            if last or state.step % config.validation_steps == 0:
                picture = draw_pictures(model, stream, base)
                log.write("probe", state.step, probe(model, stream), picture)
            if last:
                break

            # Train one step.
            figures = train_step(engine, model, batches, config, learning_rate(config, state.step))
            failed = 0 if engine.was_step_applied() else failed + 1
            state = TrainState(state.step + 1, state.skipped + (failed > 0))
            figures["samples"] = state.step * config.total_batch_size
            log.write("train", state.step, figures | {"skipped": state.skipped})
            require(failed < 10, "10 steps in a row without finite gradients", 1)
    except Failure as failure:
        if failure.code == 75 and state.step > saved:
            save_checkpoint(engine, config, state, identity)
        raise


# === memory and time ===
# What a step costs, by arithmetic: it decides what is recomputed, and what moves to the host.

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # dense bf16
USABLE = 0.9  # of a card's memory; CUDA, NCCL and fragmentation take the rest
UTILISATION = 0.35, 0.2  # of a card's peak: what full fine-tunes of such models reach (README)
HOST_BYTES = 21.5  # a weight, if offloaded; pinned memory is rounded up to powers of two
Cards = namedtuple("Cards", "number name memory flops")  # memory and flops are those of one


def cards_of():
    """A card per rank, each like this rank's own."""
    if not torch.cuda.is_available():
        return Cards(WORLD, "CPU", math.inf, 0)
    number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    require(number < there, f"more ranks than GPUs: PyTorch finds {there} here")
    device = torch.cuda.get_device_properties(number)
    flops = [flops for name, flops in PEAK_FLOPS.items() if name in device.name]
    return Cards(WORLD, device.name, device.total_memory, max(flops, default=0))


def cost_of_step(config, zero, transformer, cards, tokens):
    """({part: bytes of a card at the peak}, FLOP of a sample)."""
    size = 2 if config.mixed_precision == "bf16" else 4
    weights = transformer.num_parameters()
    blocks = transformer.config.num_layers
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    sequence = (config.resolution // PIXELS_PER_TOKEN) ** 2 + tokens
    memory = {"weights": size * weights, "gradients": 4 * weights / cards.number}  # sums in fp32
    memory["buckets"] = zero["reduce_bucket_size"] * (2 * size + 4)  # two, and one in fp32
    if zero["offload_optimizer"]["device"] != "cpu":  # fp32 weights and two moments
        memory["optimizer"] = 12 * weights / cards.number
    # At the peak one block is in its backward pass: 22 tensors, 4 for the gradient of gelu, and
    # three gradients of weights, 4 D x D each, not yet summed. The others have what they keep.
    tensor = size * config.train_batch_size * sequence * width
    tensors = (blocks - 1) * KEPT_PER_BLOCK[config.recompute] + KEPT_PER_BLOCK["none"] + 4
    memory["activations"] = tensors * tensor + 3 * 4 * size * width**2
    # In a block a token meets 12 D^2 weights, 2 FLOP each, and in attention 2 x 2 S D FLOP. The
    # backward pass takes twice that. What is recomputed does not count.
    return memory, 3 * blocks * sequence * (2 * 12 * width**2 + 2 * 2 * sequence * width)


def fit_engine(config, settings, transformer, cards, tokens):
    """Replaces "auto" by the fastest that fits -> (config, settings, *cost_of_step)."""
    zero = settings["zero_optimization"]
    offload = zero["offload_optimizer"]
    devices = ["none", "cpu"] if offload["device"] == "auto" else [offload["device"]]
    choices = list(KEPT_PER_BLOCK) if config.recompute == "auto" else [config.recompute]
    for device, choice in itertools.product(devices, choices):  # offloading costs the most time
        config = replace(config, recompute=choice)
        zero = zero | {"offload_optimizer": offload | {"device": device}}
        memory, flops = cost_of_step(config, zero, transformer, cards, tokens)
        share = sum(memory.values()) / (USABLE * cards.memory)
        if share <= 1:
            return config, settings | {"zero_optimization": zero}, memory, flops
    raise Failure(f"a step takes {share:.0%} of the usable memory: see --train_batch_size")


def longest_caption(config, base, rows):
    """Tokens of the longest caption (of the 1000 with most bytes), rounded up to 16s."""
    column, most = config.caption_column, config.max_sequence_length
    texts = [""]
    with explained(f"column {column}"):
        for index, text in enumerate(rows[column]):
            require(isinstance(text, str), f"row {index}: a caption is a string, not {text!r:.50}")
            texts.append(text[: 8 * most])  # as many tokens, but for rare texts
    longest = sorted(texts, key=lambda text: len(text.encode()))[-1000:]
    with explained(f"{base}/tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer")
    tokens = max(map(len, tokenizer(longest)["input_ids"]))
    return 16 * math.ceil(min(tokens, most) / 16)


def print_plan(config, cards, transformer, rows, done, memory, flops):
    """Prints what a run takes. rows, done (steps): their numbers."""
    total, steps = config.total_batch_size, config.max_train_steps
    needed, usable = sum(memory.values()) / 1e9, USABLE * cards.memory / 1e9
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in memory.items())
    host = 0 if "optimizer" in memory else HOST_BYTES * transformer.num_parameters() / 1e9
    print(f"steps   {steps} of {total} samples, {done} done; {rows} rows; {cards.name}")
    print(f"memory  {needed:.1f} of {usable:.0f} usable GB, {config.recompute} recomputed: {parts}")
    print(f"compile {config.compile}: the first thing to try on a GPU")
    print(f"host    19 GB a rank for the text encoder; optimizer {host:.0f} GB in all")
    if cards.flops and config.mixed_precision == "bf16":
        best = total * flops / cards.number / cards.flops  # seconds of a step at the peak
        left, lost = max(0, steps - done) / 3600, config.checkpointing_steps / 3600
        text = "{:.1f} to {:.1f} s a step, {:.1f} to {:.1f} hours; a crash costs {:.1f} to {:.1f}"
        print("time   ", text.format(*(best / u * n for n in (1, left, lost) for u in UTILISATION)))


# === errors, ranks and files ===
# A user's mistake is a Failure: one line and an exit code. Anything else is a bug, and a traceback.
# What only one rank can see, such as a full disk, it tells the others, and all end.

BAR = {"disable": RANK > 0, "mininterval": 0.1 if sys.stderr.isatty() else 10}  # options of tqdm


class Failure(Exception):
    """Ends the run with one line. code: 1 a failure, 2 a wrong request, 75 stopped by a signal."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def require(condition, message, code=2):
    if not condition:
        raise Failure(message, code)


@contextmanager
def explained(what, *kinds):
    """Makes exceptions of these kinds (OSError, ValueError) a Failure that begins with `what`."""
    try:
        yield
    except Failure as failure:
        raise Failure(f"{what}: {failure}", failure.code)
    except kinds or (OSError, ValueError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        raise Failure(f"{what}: {type(error).__name__}: {said:.180}")


def outlive_reader(stream):
    """Sends a stream to /dev/null once its reader, `tee` or a terminal, has gone."""
    write = stream.write

    def unbroken(text):
        try:
            write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write = unbroken


def say(message):
    if RANK == 0:
        tqdm.write(f"cv4ctrl.py: {message}", file=sys.stderr)


def all_gather_objects(item):
    items = [None] * WORLD
    dist.all_gather_object(items, item)
    return items


def spread(jobs, work, title, device, threads=0):
    """[work(job) for job in jobs], shared out among the ranks. A signal stops it between rounds."""
    mine, at_once = [], WORLD * max(1, 2 * threads)
    many = ThreadPoolExecutor(threads).map if threads else map
    for first in tqdm(range(0, len(jobs), at_once), title, leave=False, **BAR):
        raise_if_stopped(device)
        with fail_together():
            mine += many(work, jobs[first : first + at_once][RANK::WORLD])
    shares = all_gather_objects(mine)
    return [shares[n % WORLD][n // WORLD] for n in range(len(jobs))]


@contextmanager
def fail_together():
    """An error of files inside, on any rank, ends all ranks. All ranks must call it."""
    error = None
    try:
        yield
    except (OSError, SafetensorError, Failure) as caught:
        error = f"rank {RANK}: {caught}", getattr(caught, "code", 1)
    for first in filter(None, all_gather_objects(error)):
        raise Failure(*first)


def digest(*parts):
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


@contextmanager
def atomic(file):
    """A path beside `file`, renamed to it in the end: no crash leaves it half-written."""
    aside = file.with_name(f".{file.name}.{os.urandom(8).hex()}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


# === main ===


def weight_files(folder, stem):
    """The safetensors files of a model. Fails where one is missing or cut."""
    files = {folder / f"{stem}.safetensors"}
    for index in folder.glob(f"{stem}.safetensors.index.json"):
        files = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
    for file in files:
        with explained(file, OSError, SafetensorError), safe_open(file, "pt"):
            pass
    return files


def find_base(config):
    """-> (folder of the base, folder of the transformer to start from), checked."""
    base = Path(config.pretrained_model_name_or_path)
    weights = base.is_dir() or not config.dry_run  # a plan does not download them
    if not base.is_dir():
        patterns = ["*.json", "*.txt", "*.model"] + ["*.safetensors"] * weights
        with explained(f"--pretrained_model_name_or_path {base}"):
            base = Path(huggingface_hub.snapshot_download(str(base), allow_patterns=patterns))
    start_from = Path(config.transformer or base / "transformer")
    files = base / "scheduler/scheduler_config.json", base / "vae/config.json"
    for file, values in zip([*files, start_from / "config.json"], [SCHEDULER, VAE, TRANSFORMER]):
        with explained(file):
            found = json.loads(file.read_text())
        for key, allowed in values.items():
            says = f"{file} says {key} = {found.get(key)}"
            require(found.get(key) in allowed, f"{says}, CogView4-6B has {allowed[0]}")
    if weights:
        weight_files(base / "text_encoder", "model")
        weight_files(base / "vae", "diffusion_pytorch_model")
        weight_files(start_from, "diffusion_pytorch_model")
    return base, start_from


def enter_folders(config, settings, cards, found):
    """-> the lock of output_dir. Fails unless all ranks share the folders and decided the same."""
    name = all_gather_objects(f".{os.urandom(8).hex()}.tmp")[0]
    marks = [Path(folder, name) for folder in (config.output_dir, config.encoded_dir)]
    lock = filelock.FileLock(marks[0].with_name(".lock"), blocking=False)
    with fail_together(), explained("--output_dir, --encoded_dir"):
        if RANK == 0:
            with explained(f"{config.output_dir} is in use by another run", filelock.Timeout):
                lock.acquire()
            for mark in marks:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
            for stale in marks[0].parent.glob(".checkpoint-*.tmp"):  # of a run that was killed
                shutil.rmtree(stale)
            describe_run(config, settings, cards)
    seen = [mark.exists() for mark in marks]
    views = set(all_gather_objects(digest(seen, config, settings, found)))
    for mark in marks:
        mark.unlink(missing_ok=True)
    says = f"flags, rows, cards, checkpoints, or {config.output_dir}, {config.encoded_dir}"
    require(len(views) == 1, f"the ranks do not see the same: {says}, which they must share")
    return lock


def describe_run(config, settings, cards):
    """Writes run.json: what was asked for, what it became, and where it runs."""
    git = f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null"
    about = {"command": sys.argv, "config": asdict(config), "deepspeed": settings}
    about["commit"] = os.popen(git).read().strip()
    about["versions"] = {one.__name__: one.__version__ for one in (torch, deepspeed, diffusers)}
    about["hardware"] = f"{cards.number} x {cards.name}"
    Path(config.output_dir, "run.json").write_text(json.dumps(about, indent=1))


def leave_weights(folder):
    """Copies the last checkpoint's weights to output_dir, where the example leaves them."""
    (checkpoint, _), *_ = find_checkpoints(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink(missing_ok=True)  # of shards
    for file in (checkpoint / "transformer").iterdir():
        with atomic(folder / file.name) as aside:
            shutil.copyfile(file, aside)
    print(f"done: the weights are in {folder}")


def run(config):
    """The story of a run. It begins with what can be checked, and what is left to decide."""
    cards = cards_of()
    config = resolve(config, cards.number)
    settings = engine_settings(config)
    (checkpoint, manifest), *_ = find_checkpoints(config.output_dir) or [(None, {})]
    state = TrainState(manifest.get("step", 0), manifest.get("skipped", 0))
    kept = [one.name for one in fields(config) if one.metadata.get("kept")]
    identity = {name: getattr(config, name) for name in kept}
    check_same_run(manifest, identity)
    rows = open_dataset(config)
    base, start_from = find_base(config)
    transformer = empty_transformer(start_from)
    tokens = longest_caption(config, base, rows)
    config, settings, memory, flops = fit_engine(config, settings, transformer, cards, tokens)
    if RANK == 0:
        print_plan(config, cards, transformer, len(rows), state.step, memory, flops)
    compiles = config.compile or "optimizer" not in memory  # DeepSpeed builds its Adam
    require(shutil.which("g++") or not compiles, "--compile and offloading need g++ on the PATH")
    if config.dry_run:
        return
    require(cards.name != "CPU" or transformer.num_parameters() < 1e9, "PyTorch finds no GPU")

    # Meet the other ranks, and encode.
    device = start_ranks()
    _lock = enter_folders(config, settings, cards, [manifest, len(rows)])  # held until the end
    stream = encode(config, base, rows, device)
    identity["--transformer"] = fingerprint(start_from, "*.safetensors")
    identity["training data"] = f"{len(stream.train)} rows, digest {digest(*stream.train)}"
    check_same_run(manifest, identity)

    # Train.
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    start_from = checkpoint / "transformer" if checkpoint else start_from
    with fail_together():
        transformer = load_transformer(start_from, dtype, device)
    recompute(transformer, config.recompute, config.compile)
    engine = start_engine(config, settings, transformer, checkpoint, state)
    train(engine, stream, base, identity, state)
    with fail_together():
        if RANK == 0:
            leave_weights(Path(config.output_dir))
    dist.destroy_process_group()


def main(argv=None):
    """Runs the command line; a Failure is a line on stderr and an exit code."""
    outlive_reader(sys.stdout)
    outlive_reader(sys.stderr)
    try:
        run(parse(argv))
    except Failure as end:
        if dist.is_initialized():  # all ranks end so
            say(end)
            dist.destroy_process_group()  # else gloo sometimes aborts
        else:
            time.sleep(5 * (RANK > 0))  # rank 0 usually says the same, and ends the run
            tqdm.write(f"cv4ctrl.py: {end}", file=sys.stderr)
        sys.exit(end.code)


if __name__ == "__main__":
    main()
