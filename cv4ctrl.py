"""cv4ctrl: fine-tune CogView4-6B into a control model (pose, edges, depth) by flow matching, in one file.

The VAE latent of a control image is concatenated to the noisy latent, 16 + 16 = 32 channels. The new input
weights start at zero, so that training begins exactly at the base. The whole transformer learns the velocity:

    x = (1 - sigma) x0 + sigma eps,    v = eps - x0,    loss = E |model(x, control, text, t) - v|^2
    sigma = mu / (mu + 1000 / t - 1),  mu = 0.75 sqrt(N / 256) + 0.25,  t = 1 ... 1000,  N image tokens

As in CogView4ControlPipeline, the model receives the unshifted t, while the shifted sigma scales the noise.

    python cv4ctrl.py --dry_run [flags]          check everything, print the plan; --help lists all flags
    deepspeed --num_gpus=8 cv4ctrl.py [flags]    train; the same command again continues
"""

import contextlib
import dataclasses
import datetime
import faulthandler
import fcntl
import functools
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
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import datasets
import deepspeed
import diffusers
import huggingface_hub
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

TIMESTEPS = 1000  # noise levels; scheduler/scheduler_config.json of CogView4-6B
LATENT_CHANNELS = 16  # vae/config.json of CogView4-6B
PIXELS_PER_LATENT = 8  # the VAE reduces each side 8 times
PIXELS_PER_TOKEN = 16  # the transformer takes patches of 2 x 2 latents
RANK = int(os.environ.get("RANK", 0))  # set by every launcher
WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
Cards = namedtuple("Cards", "number name memory flops")
CARDS = {  # bytes of memory as PyTorch reports them; dense bf16 FLOP/s, NVIDIA's data sheets
    "A100-40GB": (42.4e9, 312e12), "A100-80GB": (85e9, 312e12), "H100-80GB": (85e9, 989e12),
    "H200-141GB": (150e9, 989e12), "B200-180GB": (191e9, 2250e12)}  # fmt: skip
CONTROLS = "column canny hed leres lineart lineart_anime midas mlsd normalbae openpose pidinet zoe".split()
# --recompute, fastest first: tensors of (batch, tokens, width) that a block keeps. all: its input; most: also
# the outputs of attention and the down projection; some: also those of the D x D products; none: everything.
RECOMPUTE = {"none": 22, "some": 7, "most": 3, "all": 1}
USABLE = 0.9  # of a card's memory; CUDA, NCCL and fragmentation take the rest
UTILISATION = 0.4  # of a card's peak; published full fine-tunings of this size reach 0.22 to 0.48


# === configuration ===
class Failure(Exception):
    """Ends the run, from anywhere, with one line. code: 1 a failure, 2 a wrong request, 75 stopped."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def require(condition, message, code=2):
    """Raises Failure unless the condition holds."""
    if not condition:
        raise Failure(message, code)


@contextlib.contextmanager
def explained(what, code=2):
    """Turns any exception inside into a Failure of one line."""
    try:
        yield
    except Exception as error:
        said = getattr(error, "server_message", None) or str(error.__cause__ or error) or type(error).__name__
        raise Failure(f"{what}: {' '.join(said.split())[:300]}", code)


def flag(default, help):
    """A field of Config, for HfArgumentParser."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Config:
    """All flags; defaults: original recipe."""

    pretrained_model_name_or_path: str = flag("THUDM/CogView4-6B", "hub name or folder")
    dataset_name: str = flag("raulc0399/open_pose_controlnet", "hub name, folder or parquet file")
    dataset_config_name: str | None = flag(None, "configuration of the data set")
    jsonl_for_train: str | None = flag(None, "JSON lines instead; image paths are relative to the file")
    max_train_samples: int | None = flag(None, "use only the first N rows")
    image_column: str = flag("image", "column of the target image")
    conditioning_image_column: str = flag("conditioning_image", "column of the control image")
    caption_column: str = flag("text", "column of the caption")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be read")
    control: str = flag("column", "column, or a detector of controlnet_aux")
    resolution: int = flag(1024, "pictures are resized to N x N pixels")
    max_sequence_length: int = flag(1024, "captions are cut to N tokens")
    encoded_dir: str | None = flag(None, "cache, to share between runs; default: OUTPUT_DIR/encoded")
    output_dir: str = flag("pose-control", "folder of the run")
    seed: int = flag(0, "of data order, timesteps, noise and caption dropout")
    mixed_precision: Literal["bf16", "no"] = flag("bf16", "no is fp32; fp16 and fp8 are not supported")
    train_batch_size: int = flag(8, "samples per micro-batch and rank")
    gradient_accumulation_steps: int = flag(1, "micro-batches per step and rank")
    total_batch_size: int | None = flag(None, "samples per step over all ranks; sets the accumulation")
    recompute: Literal["auto", "all", "most", "some", "none"] = flag("auto", "all saves memory, none is fast")
    max_train_steps: int | None = flag(None, "optimizer steps; overrides --num_train_epochs")
    num_train_epochs: int = flag(1, "passes over the data")
    learning_rate: float = flag(5e-5, "peak learning rate, after warm-up")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = flag("cosine", "schedule")
    lr_warmup_steps: int = flag(1000, "optimizer steps of linear warm-up")
    adam_beta1: float = flag(0.9, "decay of the first moment")
    adam_beta2: float = flag(0.999, "decay of the second moment")
    adam_weight_decay: float = flag(1e-4, "decoupled weight decay")
    adam_epsilon: float = flag(1e-8, "added to the root of the second moment")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: never")
    proportion_empty_prompts: float = flag(0.0, "share of samples trained without caption, 0 to 1")
    dataloader_num_workers: int = flag(8, "threads per rank that read data")
    checkpointing_steps: int = flag(1000, "steps between checkpoints")
    checkpoints_total_limit: int = flag(2, "newest checkpoints that are kept; 0: all")
    resume_from_checkpoint: Literal["latest"] = flag("latest", "no effect: a run always continues")
    upcast_before_saving: bool = flag(False, "export fp32 weights")
    validation_steps: int = flag(100, "steps between evaluations (probe and pictures)")
    num_validation_images: int = flag(1, "pictures for each of up to four held-out rows; 0: none")
    num_inference_steps: int = flag(50, "Euler steps of a validation picture")
    guidance_scale: float = flag(3.5, "for validation pictures; 1 or less: off")
    probe_samples: int = flag(32, "rows that are held out, at most a tenth of all")
    push_to_hub: bool = flag(False, "upload the weights at the end")
    hub_model_id: str | None = flag(None, "repository; default: the name of OUTPUT_DIR")
    report_to: Literal["none", "tensorboard", "wandb", "all"] = flag("none", "trackers")
    deepspeed_config: str | None = flag(None, "engine settings; default: the shipped ds_config.json")
    timeout_minutes: int = flag(120, "limit of a step with its evaluation and checkpoint")
    dry_run: bool = flag(False, "check all, print the plan, load nothing")
    plan_for: str | None = flag(None, "print the plan for cards such as 8xA100-80GB")


MAY_BE_ZERO = "seed lr_warmup_steps checkpoints_total_limit probe_samples num_validation_images".split()
# What decides the samples of a run and the layout of its state: a continued run must keep it.
IDENTITY = """pretrained_model_name_or_path seed total_batch_size resolution max_sequence_length control
mixed_precision proportion_empty_prompts""".split()


def parse(argv=None):
    """Command line -> Config; `-` and `_` are the same."""
    parser = transformers.HfArgumentParser(Config, prog="cv4ctrl.py", allow_abbrev=False)
    parser.error = functools.partial(require, False)
    parser.add_argument("--local_rank")  # which the deepspeed launcher passes
    for name, choice in (("gradient_checkpointing", "all"), ("no_gradient_checkpointing", "none")):
        options = dict(dest="recompute", action="store_const", const=choice)
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **options)
    config, _, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    named = "".join(unknown[:1]).partition("=")[0]  # not its value: it may be a secret
    require(not unknown, f"not taken: {named}; see --help, and README.md for diffusers' flags")
    return config


def check(config):
    """Checks the flags by themselves."""
    for name, value in dataclasses.asdict(config).items():
        require(value != "", f"--{name}: must not be empty")
        if type(value) in (int, float):
            least = 1 if type(value) is int and name not in MAY_BE_ZERO else 0
            require(least <= value < 2**63, f"--{name} {value}: must be a finite number of at least {least}")
    launched = "RANK" in os.environ or os.environ.get("SLURM_NTASKS", "1") in ("", "1")
    require(launched, "Slurm started several tasks: start one a machine, `srun torchrun ... cv4ctrl.py`")
    require(config.resolution % PIXELS_PER_TOKEN == 0, "--resolution: must be a multiple of 16")
    require(max(config.adam_beta1, config.adam_beta2) < 1, "--adam_beta1, --adam_beta2: must be below 1")
    require(config.proportion_empty_prompts <= 1, "--proportion_empty_prompts: must be at most 1")
    require(config.control in CONTROLS, f"--control {config.control}: must be one of {', '.join(CONTROLS)}")
    two = config.jsonl_for_train and config.dataset_name != Config.dataset_name
    require(not two, "--dataset_name and --jsonl_for_train: give one of them")


def resolve(config, world):
    """Config with batch sizes, cache folder and control column filled in."""
    asked = config.gradient_accumulation_steps
    micro = config.train_batch_size * world
    total = config.total_batch_size or micro * asked
    fits = total % micro == 0 and asked in (1, total // micro)
    require(fits, f"--total_batch_size {total}: must be batch size x ranks ({micro}) x accumulation {asked}")
    filled = {"total_batch_size": total, "gradient_accumulation_steps": total // micro}
    filled["encoded_dir"] = config.encoded_dir or f"{config.output_dir}/encoded"
    if config.control != "column":  # the control is made from the image
        filled["conditioning_image_column"] = config.image_column
    return dataclasses.replace(config, **filled)


# === flow matching ===
# Pure functions of tensors, in fp32: in bf16 only 347 of the 1000 sigmas at 1024 px are distinct.
def shifted_sigma(timestep, image_tokens):
    """Unshifted timestep 0 ... 1000 -> sigma 0 ... 1 that scales the noise, as the scheduler shifts it."""
    mu = 0.75 * math.sqrt(image_tokens / 256) + 0.25  # max_shift, base_image_seq_len, base_shift
    sigma = timestep.float() / TIMESTEPS
    return mu * sigma / (mu * sigma + 1 - sigma)  # mu / (mu + 1 / sigma - 1), defined at 0 too


# === control surgery ===
def load_transformer(folder, dtype=None, device="meta"):
    """Widened CogView4Transformer2DModel of a folder, read straight to `device`, or without weights."""
    shape = json.loads(Path(folder, "config.json").read_text())
    with torch.device("meta"):
        model = diffusers.CogView4Transformer2DModel.from_config(shape | {"in_channels": 2 * LATENT_CHANNELS})
    if device == "meta":
        return model
    files = {Path(folder, "diffusion_pytorch_model.safetensors")}
    for index in Path(folder).glob("diffusion_pytorch_model.safetensors.index.json"):
        files = {index.parent / name for name in json.loads(index.read_text())["weight_map"].values()}
    state = {}
    for file in files:
        state |= {name: tensor.to(dtype) for name, tensor in load_file(file, str(device)).items()}
    if shape["in_channels"] == LATENT_CHANNELS:  # (D, channels x p x p): the control's columns are appended
        weight = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    model.load_state_dict(state, assign=True)
    return model


def recompute(model, choice):
    """Makes the blocks keep only what RECOMPUTE says; the arithmetic stays the same."""

    def policy(context, operator, *args, **kwargs):
        keep = operator.name().startswith("aten::_scaled_dot_product_")  # CPU, flash, efficient or cuDNN
        if operator is torch.ops.aten.addmm.default:  # bias + x @ weight.T
            inputs, outputs = args[2].shape
            keep = inputs > outputs or (choice == "some" and inputs == outputs)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    options = {} if choice == "all" else {"context_fn": contexts}
    if choice != "none":
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, **options))


# === forward pass ===
class KeyMaskAttention:
    """CogView4AttnProcessor with a mask that masks: boolean (B, 1, 1, S), False for padding. The installed
    one adds it to the logits, which hides nothing. The transpose comes last: SDPA's output needs no copy."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, S, D), S = text + image tokens

        def rotated(linear, norm):  # (B, heads, S, D / heads); text tokens carry no position
            tensor = norm(linear(x).unflatten(2, (attn.heads, -1))).to(x.dtype)
            image = apply_rotary_emb(tensor[:, text:], image_rotary_emb, True, -2, sequence_dim=1)
            return torch.cat([tensor[:, :text], image], dim=1).transpose(1, 2)

        value = attn.to_v(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        heads = (rotated(attn.to_q, attn.norm_q), rotated(attn.to_k, attn.norm_k), value)
        x = F.scaled_dot_product_attention(*heads, attn_mask=attention_mask)
        x = attn.to_out[0](x.transpose(1, 2).flatten(2, 3))
        return x[:, text:], x[:, :text]


def prepare(model, resolution, device, dtype):
    """Gives the model its attention -> arguments of all its calls at one resolution, batch dimension 1."""
    for block in model.transformer_blocks:
        block.attn1.set_processor(KeyMaskAttention())
    side = resolution // PIXELS_PER_LATENT
    rotary_emb = tuple(table.to(device) for table in model.rope(torch.empty(1, 1, side, side)))
    size = torch.tensor([[resolution, resolution]], device=device, dtype=dtype)
    return dict(original_size=size, target_size=size, crop_coords=0 * size, image_rotary_emb=rotary_emb)


def predict(model, shared, noisy, control, prompt_embeds, mask, timestep):
    """Velocity (B, 16, h, w), like noisy, control; prompt_embeds (B, T, 4096), mask (B, T), timestep (B,)."""
    dtype = shared["original_size"].dtype
    if mask is not None:  # -> (B, 1, 1, T + N)
        mask = F.pad(mask, (0, len(shared["image_rotary_emb"][0])), value=True)[:, None, None]
    inputs = {"hidden_states": torch.cat([noisy, control], dim=1).to(dtype), "timestep": timestep}
    inputs["encoder_hidden_states"] = prompt_embeds.to(dtype)
    return model(**inputs, **shared, attention_mask=mask, return_dict=False)[0]


def batch_loss(model, shared, batch):
    """Flow-matching loss of a micro-batch (see collate): squared error of the velocity, an fp32 scalar."""
    sigma = batch["sigma"].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * batch["latents"] + sigma * batch["noise"]
    velocity = batch["noise"] - batch["latents"]  # d noisy / d sigma
    inputs = [batch[name] for name in ("control", "prompt_embeds", "mask", "timestep")]
    return F.mse_loss(predict(model, shared, noisy, *inputs).float(), velocity)


# === ranks and files ===
def all_gather_objects(item):
    """`item` of every rank, by rank, on every rank."""
    items = [None] * WORLD
    dist.all_gather_object(items, item)
    return items


@contextlib.contextmanager
def fail_together():
    """A file error inside, on any rank, ends all ranks after the block."""
    error = None
    try:
        yield
    except (OSError, SafetensorError) as caught:
        error = f"rank {RANK}: {caught}"
    for message in filter(None, all_gather_objects(error)):
        raise Failure(message)


def log0(message):
    """Prints a line on rank 0's stderr, above a progress bar."""
    if RANK == 0:
        tqdm.write(f"cv4ctrl.py: {message}", file=sys.stderr)


progress = functools.partial(tqdm, disable=RANK > 0, mininterval=0.1 if sys.stderr.isatty() else 10)
stop_requests = []  # signals that came: the run ends after the step, when all ranks have saved


def prefetch(function, items, threads):
    """Yields function(item) of all items in order, computed ahead by threads."""
    waiting = []
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def digest(*parts):
    """Key of 32 hex digits for strings and numbers."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def write_aside(file, write, sync=True):
    """Calls write(path) for a temporary file, then renames it: no crash leaves `file` half-written."""
    aside = file.with_name(f".{file.name}.{os.urandom(8).hex()}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    write(aside)
    aside.chmod(0o644)  # safetensors creates files as 0600
    if sync:
        with open(aside) as stream:
            os.fsync(stream)
    os.replace(aside, file)


# === encode once ===
# One safetensors file an entry; its key is a digest of all that it depends on, so that none is stale.
Row = namedtuple("Row", "id image control caption")


class Encoded(namedtuple("Encoded", "folder sizes train held_out empty")):
    """The encoded data. sizes: {key: bytes}; train, held_out: lists of Row; empty: key of the caption ""."""

    def entry(self, key):
        """Prompt embedding (T, 4096) or posterior moments (32, h, w), bf16."""
        return load_file(self.folder / f"{key}.safetensors")["entry"]

    def latents(self, key, eps=0.0):
        """A draw from a picture's posterior, its mean for eps 0; (16, h, w) fp32. CogView4 scales by 1."""
        mean, log_variance = self.entry(key).float().chunk(2)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * eps


def load_splits(name, config_name):
    """{split: rows} of a data set on the hub, a parquet file or a folder."""
    folder = Path(name)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():  # of save_to_disk
        saved = datasets.load_from_disk(name)
        return saved if isinstance(saved, dict) else {"train": saved}
    pattern = glob.escape(os.path.abspath(name))
    if folder.is_file():
        return datasets.load_dataset("parquet", data_files=pattern)
    if folder.exists() and pattern != os.path.abspath(name):  # datasets takes the name for a pattern
        named = [file.name for word in ("test", "val", "dev") for file in folder.rglob(f"*{word}*")]
        require(not named and not config_name, "rename the folder: brackets hide its splits")
        return datasets.load_dataset(name, data_files=f"{pattern}/**")
    parquet = [] if config_name or (folder / "README.md").exists() else list(folder.rglob("[!._]*.parquet"))
    found = datasets.load_dataset_builder(name, config_name).config.data_files if parquet else {}
    if len(parquet) > sum(map(len, found.values())):  # where some are named after splits, it drops the others
        require(list(found) == ["train"], f"only some files are named after splits: {list(map(str, found))}")
        return datasets.load_dataset(name, data_files=f"{pattern}/**/*.parquet")
    return datasets.load_dataset(name, config_name)


def open_dataset(config):
    """Rows of the data set: rows[i] is a dict, images undecoded."""
    datasets.disable_progress_bars()
    name = config.jsonl_for_train or config.dataset_name
    needed = {config.image_column, config.conditioning_image_column, config.caption_column}
    with explained(f"data set {name}"):
        if config.jsonl_for_train:  # what is not UTF-8 becomes surrogates, which read_row refuses
            with open(name, encoding="utf-8-sig", errors="surrogateescape") as lines:
                rows = [dict(json.loads(line)) for line in lines if line.strip()]
            columns = set().union(*rows)
        else:
            splits = load_splits(name, config.dataset_config_name)
            split = next(iter(splits)) if len(splits) == 1 else "train"
            require(split in splits, f"has no split train, but {', '.join(map(str, splits))}")
            rows = splits[split]
            others = ", ".join(str(other) for other in splits if other != split)
            if others:
                log0(f"data set {name}: split train is taken, {others} left out")
            columns = set(rows.column_names)
            for column in needed & columns:
                if isinstance(rows.features[column], datasets.Image):
                    rows = rows.cast_column(column, datasets.Image(decode=False))
    require(len(rows) > 0, f"data set {name} is empty")
    require(needed <= columns, f"data set {name} has no column {needed - columns}, but {columns}")
    count = min(len(rows), config.max_train_samples or len(rows))
    return rows[:count] if config.jsonl_for_train else rows.select_columns(list(needed)).select(range(count))


@functools.cache
def load_detector(name):
    """Detector of controlnet_aux on the CPU, by a name such as canny or lineart_anime."""
    classes = {kind.lower(): value for kind, value in vars(importlib.import_module("controlnet_aux")).items()}
    detector = classes[name.replace("_", "") + "detector"]
    with explained(f"--control {name}: cannot load lllyasviel/Annotators"):
        return detector() if name == "canny" else detector.from_pretrained("lllyasviel/Annotators")


def read_picture(config, content, use):
    """Content of a picture file -> (pixels (1, 3, H, W) in -1 ... 1, width / height)."""
    side = config.resolution
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode[0] in "IF":  # converted to RGB, as inference does it, it would be clipped
        raise Failure(f"mode {image.mode} has more than 8 bits a channel: scale to 0 ... 255, save 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if use == "column" and image.getextrema()[3][0] < 255:
            raise Failure("transparent pixels, which inference does not see: flatten the picture")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    ratio = image.width / image.height
    if use not in ("target", "column"):
        options = {"low_threshold": 50, "high_threshold": 200} if use == "canny" else {}
        options |= {"detect_resolution": side, "image_resolution": side}
        image = load_detector(use)(image.resize((side, side), Image.LANCZOS), **options)
    return VaeImageProcessor(vae_scale_factor=PIXELS_PER_LATENT).preprocess(image, side, side), ratio


def read_row(config, of_pictures, of_captions, known, rows, id):
    """Row `id` -> (Row, or None if it cannot be used; what is wrong; {key: caption or unknown pixels})."""
    column = config.caption_column  # the one at work, for the message
    sources = [(config.image_column, "target"), (config.conditioning_image_column, config.control)]
    source = Path(config.jsonl_for_train or config.dataset_name)
    folder = source if source.is_dir() else source.parent
    pictures = []
    ratios = []
    try:
        row = rows[id]
        text = row.get(column)
        require(isinstance(text, str), f"a caption is a string, not {text!r:.50}")
        text.encode()  # raises ValueError for what was not UTF-8
        caption = digest(of_captions, text)
        parts = {digest(of_captions, ""): "", caption: text}
        for column, use in sources:
            value = row.get(column)
            if not isinstance(value, dict):
                value = {"bytes" if isinstance(value, bytes) else "path": value}
            require(value.get("bytes") or value.get("path"), "no picture")
            content = value.get("bytes") or (folder / value["path"]).read_bytes()
            key = digest(of_pictures, use, hashlib.sha256(content).hexdigest())
            pictures.append(key)
            if key not in known:
                parts[key], ratio = read_picture(config, content, use)
                ratios.append(ratio)
        skewed = len(ratios) == 2 and not 0.95 < ratios[0] / ratios[1] < 1 / 0.95
        about = f"row {id}: its pictures differ in aspect ratio, both become squares" if skewed else ""
        return Row(id, *pictures, caption), about, parts
    except Exception as error:  # files and decoders raise what they like
        return None, f"row {id}, {column}: {str(error).partition(' <_io')[0]}", {}


def fingerprint(folder):
    """Digest of an encoder's files."""
    parts = []
    for file in sorted(filter(Path.is_file, folder.iterdir())):
        with open(file, "rb") as stream:
            parts += [file.name, hashlib.file_digest(stream, "sha256").hexdigest()]
    return digest(*parts)


def load_encoders(base, device, **without):
    """CogView4ControlPipeline of the base in bf16, without its transformer."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    options = dict(transformer=None, dtype=torch.bfloat16, use_safetensors=True, low_cpu_mem_usage=False)
    return diffusers.CogView4ControlPipeline.from_pretrained(base, **options, **without).to(device)


@torch.no_grad()
def encode_rows(config, base, prefixes, known, rows, device):
    """Reads this rank's rows, encodes what is not known -> for each (Row, or None; what is wrong with it)."""
    found = []
    stored = set(known)
    length = {"max_sequence_length": config.max_sequence_length}
    encoders = functools.cache(functools.partial(load_encoders, base, device))
    read = functools.partial(read_row, config, *prefixes, known, rows)
    ids = range(RANK, len(rows), WORLD)
    results = prefetch(read, ids, config.dataloader_num_workers)
    for row, about, parts in progress(results, "encoding", total=len(ids)):
        found.append((row, about))
        for key in parts.keys() - stored:
            if isinstance(parts[key], str):  # alone: its pads to a multiple of 16 tokens are attended to
                entry = encoders().encode_prompt(parts[key], None, False, **length)[0]
            else:
                pixels = parts[key].to(device, encoders().vae.dtype)
                entry = encoders().vae.encode(pixels).latent_dist.parameters
            write = functools.partial(save_file, {"entry": entry[0].cpu().contiguous()})
            write_aside(Path(config.encoded_dir, f"{key}.safetensors"), write, sync=False)
            stored.add(key)
        if stop_requests:
            break
    return found


def hold_out(rows, most):
    """Rows -> (to train on, held out), by content. A row held out shares no picture with any other row."""
    having = {}  # picture -> rows that have it
    for row in rows:
        having.setdefault(row.image, set()).add(row)
        having.setdefault(row.control, set()).add(row)
    hidden = set()
    held_out = []
    for row in sorted(rows, key=lambda row: digest("held out", row.image)):
        room = len(rows) // 10 - len(hidden)
        shares = (having[row.image], having[row.control])
        if len(held_out) < most and row not in hidden and max(map(len, shares)) <= room:
            if len(set.union(*shares) - hidden) <= room:
                held_out.append(row)
                hidden.update(*shares)
    return [row for row in rows if row not in hidden], held_out


def encode(config, base, rows, device):
    """Encodes what the cache lacks, split over the ranks -> Encoded. Raises Failure for unusable rows."""
    folder = Path(config.encoded_dir)

    def entries():  # a file may be empty after a power cut
        return {file.stem: size for file in folder.glob("[!.]*.safetensors") if (size := file.stat().st_size)}

    with fail_together():
        vae, *text = (fingerprint(base / part) for part in ("vae", "text_encoder", "tokenizer"))
        of_pictures = digest("pictures", vae, config.resolution)
        of_captions = digest("captions", *text, config.max_sequence_length)
        mine = encode_rows(config, base, (of_pictures, of_captions), entries(), rows, device)
    gc.collect()  # the encoders are freed before the transformer is loaded
    torch.cuda.empty_cache()
    parts, sizes, stops = zip(*all_gather_objects((mine, entries(), bool(stop_requests))))
    require(not any(stops), "stopped by a signal; the same command continues", 75)
    found = [parts[id % WORLD][id // WORLD] for id in range(len(rows))]
    bad = [about for row, about in found if not row]
    skewed = [about for row, about in found if row and about]
    for notes in filter(None, (bad, skewed)):
        about = f"{notes[0]} ({len(notes)} of {len(found)} rows)"
        require(config.skip_bad_rows or not bad, f"{about}; --skip_bad_rows leaves out what cannot be used")
        log0(about)
    train, held_out = hold_out([row for row, _ in found if row], config.probe_samples)
    if len(held_out) < min(2, config.probe_samples):
        log0("fewer than two controls can be held out: control_gain is not measured")
    return Encoded(folder, sizes[0], train, held_out, digest(of_captions, ""))


# === sample stream ===
# Sample k of a run is a pure function of (seed, k); ranks, threads and restarts only ask for it.
def generator(*address):
    """Random generator of an address such as (seed, "noise", k)."""
    return torch.Generator().manual_seed(int(digest(*address)[:15], 16))


@functools.lru_cache(maxsize=2)
def permutation(seed, epoch, rows):
    """Order of the rows in an epoch, (rows,) int64."""
    return torch.randperm(rows, generator=generator(seed, "order", epoch))


class Stream(namedtuple("Stream", "config encoded rank world")):
    """The samples of a run. Those of a step are sorted by caption length before they form micro-batches."""

    def row(self, k):
        """(Row, key of its caption) of sample k: every row once an epoch; some lose their caption."""
        seed = self.config.seed
        rows = self.encoded.train
        row = rows[permutation(seed, k // len(rows), len(rows))[k % len(rows)]]
        empty = torch.rand((), generator=generator(seed, "caption", k)) < self.config.proportion_empty_prompts
        return row, self.encoded.empty if empty else row.caption

    def timestep(self, k):
        """Timestep of sample k, (1,): a low-discrepancy sequence, so that neighbours are spread evenly."""
        start = int(digest(self.config.seed, "timestep"), 16)
        u = (start + k * 0x9E3779B97F4A7C15) % 2**64  # steps of the golden ratio, as fractions of 2**64
        return torch.tensor([float(TIMESTEPS - (u * TIMESTEPS >> 64))])

    def sample(self, row, caption, timestep, *address):
        """Model inputs for one row; noise and posterior draws are those of the address."""
        side = self.config.resolution // PIXELS_PER_LATENT
        random = generator(self.config.seed, *address)
        noise, eps, control_eps = torch.randn(3, LATENT_CHANNELS, side, side, generator=random)
        sample = {"latents": self.encoded.latents(row.image, eps), "noise": noise, "timestep": timestep}
        sample["control"] = self.encoded.latents(row.control, control_eps)
        return sample | {"prompt_embeds": self.encoded.entry(caption)}

    def micro_batch(self, device, n):
        """Micro-batch n of this rank on `device`."""
        step, turn = divmod(n, self.config.gradient_accumulation_steps)
        size = self.config.train_batch_size
        total = self.config.total_batch_size
        of_step = range(step * total, (step + 1) * total)
        by_length = sorted(of_step, key=lambda k: self.encoded.sizes[self.row(k)[1]])  # of captions
        mine = by_length[(turn * self.world + self.rank) * size :][:size]
        return collate([self.sample(*self.row(k), self.timestep(k), "noise", k) for k in mine], device)


def collate(samples, device):
    """Samples -> micro-batch on `device`; prompt_embeds padded on the right, where mask (B, T) is False."""
    batch = {name: torch.stack([s[name] for s in samples]) for name in ("latents", "control", "noise")}
    batch["timestep"] = torch.cat([s["timestep"] for s in samples])
    image_tokens = batch["noise"][0, 0].numel() * PIXELS_PER_LATENT**2 // PIXELS_PER_TOKEN**2
    batch["sigma"] = shifted_sigma(batch["timestep"], image_tokens)
    embeds = [s["prompt_embeds"] for s in samples]
    batch["prompt_embeds"] = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    lengths = torch.tensor([len(embed) for embed in embeds])
    if lengths.min() < lengths.max():
        batch["mask"] = torch.arange(lengths.max()) < lengths[:, None]
    if device.type == "cuda":  # from pinned memory the copy is not waited for
        torch.cuda.set_device(device)  # of this thread: else pinning would open a context on the first card
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {"mask": None} | {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# === evaluation ===
@torch.no_grad()
def euler_sample(model, shared, x, control, prompt_embeds, empty_embeds, steps, guidance):
    """Noise x (1, 16, h, w) -> latents in the pipeline's steps; guidance > 1 mixes in the empty prompt."""
    timesteps = torch.linspace(TIMESTEPS, 1, steps, dtype=torch.float64).long().float()  # the pipeline's
    image_tokens = len(shared["image_rotary_emb"][0])
    sigmas = shifted_sigma(torch.cat([timesteps, torch.zeros(1)]), image_tokens).tolist()
    for t, sigma, next_sigma in zip(timesteps.to(x.device), sigmas, sigmas[1:]):
        v = predict(model, shared, x, control, prompt_embeds, None, t.expand(len(x)))
        if guidance > 1:
            unguided = predict(model, shared, x, control, empty_embeds, None, t.expand(len(x)))
            v = unguided + guidance * (v - unguided)
        x = (x.float() + (next_sigma - sigma) * v.float()).to(v.dtype)  # the scheduler rounds as well
    return x


def spread(jobs, work, title):
    """{job: work(job)} of all jobs on every rank, the work spread over the ranks."""
    mine = {job: work(job) for job in progress(jobs[RANK::WORLD], title, leave=False)}
    return {job: result for part in all_gather_objects(mine) for job, result in part.items()}


@torch.no_grad()
def probe(model, shared, stream):
    """Loss of held-out rows with fixed noise, and with the next row's control; {} for fewer than two rows."""
    rows = stream.encoded.held_out
    if len(rows) < 2:
        return {}
    samples = [stream.sample(row, row.caption, None, "probe", n) for n, row in enumerate(rows)]

    def loss(job):
        n, t, swapped = job
        control = samples[(n + swapped) % len(rows)]["control"]
        sample = samples[n] | {"control": control, "timestep": torch.tensor([float(t)])}
        return batch_loss(model, shared, collate([sample], shared["original_size"].device)).item()

    jobs = [(n, t, swapped) for swapped in (0, 1) for t in range(100, 901, 100) for n in range(len(rows))]
    losses = spread(jobs, loss, "probing")
    own, other = torch.tensor([losses[job] for job in jobs]).double().view(2, -1).mean(1).tolist()
    return {"probe_loss": own, "probe_loss_swapped": other, "control_gain": other / own - 1}


@torch.no_grad()
def validate(model, shared, stream, base, step):
    """Draws held-out rows into a picture, control | generated | target -> its name, or None."""
    config = stream.config
    encoded = stream.encoded
    device = shared["original_size"].device
    cases = (encoded.held_out or encoded.train)[:4]
    if config.num_validation_images == 0:
        return None

    def draw(n):
        """Control, drawn, target (16, h, w) of case n."""
        case = cases[n]
        control = encoded.latents(case.control)
        given = (control, encoded.entry(case.caption), encoded.entry(encoded.empty))
        row = [control]
        for m in range(config.num_validation_images):
            noise = torch.randn(control.shape, generator=generator(config.seed, "validation", n, m))
            inputs = [tensor[None].to(device) for tensor in (noise, *given)]
            drawn = euler_sample(model, shared, *inputs, config.num_inference_steps, config.guidance_scale)
            row.append(drawn[0].cpu())
        return [*row, encoded.latents(case.image)]

    rows = spread(range(len(cases)), draw, "drawing")
    picture = f"validation/step-{step}.png"
    with fail_together():
        if RANK == 0:
            vae = load_encoders(base, device, text_encoder=None, tokenizer=None).vae
            bands = []
            for n in range(len(cases)):
                cells = [vae.decode(latents[None].to(device, vae.dtype)).sample.cpu() for latents in rows[n]]
                bands.append(torch.cat(cells, dim=3))
            image = VaeImageProcessor().postprocess(torch.cat(bands, dim=2))[0]
            write_aside(Path(config.output_dir, picture), lambda path: image.save(path, "PNG"))
    return picture


# === engine and checkpoints ===
# What continues a run is kept by parameter, not by rank: any number of ranks continues from it.
ENGINE_CHOICES = {"stage": (1, 2), "device": ("auto", "cpu", "none")}
ENGINE_CHOICES |= dict.fromkeys(("grad_accum_dtype", "communication_data_type"), ("fp32", "bf16"))
STATE = {"fp32": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # entry -> what DeepSpeed calls it


def merged(shipped, given, file, path=""):
    """The shipped engine settings with the values of another file. Raises Failure for other keys or types."""
    settings = dict(shipped)
    for key, value in given.items():
        default = shipped.get(key)
        choices = ENGINE_CHOICES.get(key, () if isinstance(value, str) else (value,))
        typed = type(value) is type(default) or default == "auto" and isinstance(value, (int, float))
        known = key in shipped and typed and (value == default or value in choices)
        says = f"{file} says {path}{key} = {json.dumps(value)}"
        require(known, f"{says}, which is not known to train right; nor are fp16 and fp8")
        settings[key] = merged(default, value, file, f"{path}{key}.") if isinstance(default, dict) else value
    return settings


def engine_settings(config):
    """ds_config.json, its "auto" replaced by what the flags say; only keys of the shipped file are taken."""
    shipped = Path(__file__).with_name("ds_config.json")
    file = Path(config.deepspeed_config or shipped)
    with explained(f"--deepspeed_config {file}: a JSON object is expected"):
        given = dict(json.loads(file.read_text()))
    settings = merged(json.loads(shipped.read_text()), given, file.name)
    for section, key, owner, value in (
        (settings, "train_micro_batch_size_per_gpu", "train_batch_size", config.train_batch_size),
        (settings, "gradient_accumulation_steps", "total_batch_size", config.gradient_accumulation_steps),
        (settings, "train_batch_size", "total_batch_size", config.total_batch_size),
        (settings, "gradient_clipping", "max_grad_norm", config.max_grad_norm),
        (settings["bf16"], "enabled", "mixed_precision", config.mixed_precision == "bf16"),
    ):
        says = f"{file.name} says {key} = {json.dumps(section[key])}, --{owner} makes it {json.dumps(value)}"
        require(section[key] in ("auto", value), f'{says}: write "auto" in the file')
        section[key] = value
    settings["bf16"]["check_grad_overflow"] = True  # else one NaN would end in the weights
    return settings


def start_ranks(minutes):
    """Joins the other ranks, with a timeout in minutes -> this rank's device."""
    if "RANK" not in os.environ:  # no launcher: the only rank
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler, gloo does not
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave NaN gradients with masks (pytorch#196678)
    with explained(f"the ranks cannot meet at port {os.environ['MASTER_PORT']}, see --master_port", 1):
        deepspeed.init_distributed(timeout=datetime.timedelta(minutes=minutes), verbose=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: stop_requests.append(number))
    return torch.device(accelerator.current_device_name())


def start_engine(config, settings, model, found=None, adam_steps=0):
    """deepspeed.initialize with AdamW after adam_steps steps, in the state of checkpoint `found`."""
    offloaded = settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    adam = deepspeed.ops.adam.DeepSpeedCPUAdam if offloaded else torch.optim.AdamW
    options = {"lr": 0.0, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    options |= {"weight_decay": config.adam_weight_decay} | ({} if offloaded else {"fused": True})
    optimizer = adam(model.parameters(), **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for group in optimizer.param_groups:  # they now hold this rank's part of the fp32 weights
        for part in group["params"]:
            step = adam_steps if offloaded else torch.tensor(float(adam_steps), device=part.device)
            moments = {name: torch.zeros_like(part) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[part] = {"step": step} | moments
    engine.optimizer._lazy_init_hp_params_optimizer_state()  # else in the first step, after loading
    for name, parameter in model.named_parameters() if found else ():
        for entry, tensor in load_file(found / "state" / f"{name}.safetensors").items():
            safe_set_full_optimizer_state(parameter, tensor, STATE[entry])  # each rank takes its part
    return engine


def save_checkpoint(engine, config, step, manifest):
    """Writes checkpoint-<step> aside, the manifest last, renames it, deletes the oldest ones."""
    folder = Path(config.output_dir)
    aside = folder / f".checkpoint-{step}.tmp"
    weights = dict(engine.module.named_parameters())
    names = sorted(weights, key=lambda name: weights[name].numel())  # so that all ranks write as much
    for number, name in enumerate(progress(names, "saving", leave=False)):
        state = {entry: safe_get_full_optimizer_state(weights[name], STATE[entry]) for entry in STATE}
        with fail_together():
            if number % WORLD == RANK:
                write = functools.partial(save_file, {entry: state[entry].cpu() for entry in STATE})
                write_aside(aside / "state" / f"{name}.safetensors", write)
    with fail_together():
        if RANK == 0:
            if config.upcast_before_saving:
                weights = {name: load_file(aside / "state" / f"{name}.safetensors")["fp32"] for name in names}
            weights = {name: weight.detach().cpu() for name, weight in weights.items()}
            write = functools.partial(save_file, weights, metadata={"format": "pt"})
            write_aside(aside / "transformer" / "diffusion_pytorch_model.safetensors", write)
            engine.module.save_config(aside / "transformer")
            files = {str(f.relative_to(aside)): f.stat().st_size for f in aside.rglob("*") if f.is_file()}
            text = json.dumps(manifest | {"files": files}, indent=1)
            write_aside(aside / "manifest.json", lambda path: path.write_text(text))
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)  # a damaged one
            os.replace(aside, folder / f"checkpoint-{step}")
            steps = sorted(checkpoints(folder), key=lambda n: (n <= step, n))  # later ones are damaged: first
            for old in steps[: -config.checkpoints_total_limit] if config.checkpoints_total_limit else ():
                shutil.rmtree(folder / f"checkpoint-{old}", ignore_errors=True)


def checkpoints(folder):
    """{step: checkpoint-<step>} of a folder, oldest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def find_checkpoint(config):
    """(newest checkpoint whose files have their sizes and readable headers, its manifest), or (None, {})."""
    present = list(checkpoints(config.output_dir).values())
    for folder in reversed(present):
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name, size in manifest["files"].items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} does not have the size it was written with")
                if name.endswith(".safetensors"):
                    safe_open(folder / name, "pt")
            return folder, manifest
        except (OSError, ValueError, TypeError, LookupError, AttributeError, SafetensorError) as error:
            log0(f"{folder} is passed over: {error}")
    require(not present, f"{config.output_dir} holds only damaged checkpoints: move them away")
    return None, {}


def check_same_run(manifest, identity):
    """Refuses to continue where samples or state would change."""
    for name, now in identity.items():
        saved = manifest.get("identity", {}).get(name, now)
        require(saved == now, f"{name} was {saved} and is {now}: restore it, or take another --output_dir")


# === the loop ===
class Log:
    """metrics.jsonl, tracker and progress bar of rank 0."""

    def __init__(self, config, start, steps):
        self.folder = Path(config.output_dir)
        self.bar = progress(None, "training", total=steps, initial=start)
        self.report_to = config.report_to if RANK == 0 else "none"
        self.tracker = None
        file = self.folder / "metrics.jsonl"
        if RANK == 0 and file.exists():  # rows past `start`, of an interrupted run, are dropped
            lines = [line for line in file.read_text().splitlines(True) if line.endswith("}\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= (start or -1)]
            write_aside(file, lambda path: path.write_text("".join(kept)))

    def write(self, kind, step, figures, picture=None):
        """Writes a row of figures, kind "train" or "probe", and shows its numbers."""
        with fail_together():
            if RANK == 0:
                with open(self.folder / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({"step": step} | figures) + "\n")
        numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
        self.bar.set_postfix({n: numbers[n] for n in ("loss", "control_gain") if n in numbers}, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.report_to == "none":
            return
        try:
            if self.tracker is None:
                if self.report_to != "tensorboard":  # wandb reads along
                    importlib.import_module("wandb").init(sync_tensorboard=True)
                tensorboard = importlib.import_module("torch.utils.tensorboard")
                self.tracker = tensorboard.SummaryWriter(self.folder / "logs")
            for name, value in numbers.items():
                self.tracker.add_scalar(f"{kind}/{name}", value, step)
            if picture:
                image = VaeImageProcessor.pil_to_numpy(Image.open(self.folder / picture))
                self.tracker.add_images("validation", image, step, dataformats="NHWC")
            self.tracker.flush()
        except Exception as error:  # of any kind: no network, no disk, no login
            log0(f"--report_to {self.report_to}: {error}; the run goes on without this tracker")
            self.report_to = "none"


def train_step(engine, shared, batches, config, rate):
    """One optimizer step -> (mean loss, gradient norm, whether to stop), the same on all ranks."""
    losses = []
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    for _ in range(config.gradient_accumulation_steps):
        loss = batch_loss(engine, shared, next(batches))
        engine.backward(loss)
        engine.step()  # acts after the last micro-batch, if all gradients are finite
        losses.append(loss.detach())
    if not engine.was_step_applied():  # with offloading DeepSpeed 0.19.8 keeps the sum of these gradients
        sums = getattr(engine.optimizer, "averaged_gradients", {})
        sums.update(dict.fromkeys(sums))
    figures = torch.stack([torch.stack(losses).mean() / WORLD, loss.new_tensor(float(bool(stop_requests)))])
    dist.all_reduce(figures)
    loss, stops = figures.tolist()  # waits for the device: the clock is true
    return loss, float(engine.get_global_grad_norm()), stops > 0


def train(engine, stream, shared, base, identity, start, steps, skipped):
    """Optimizer steps start + 1 ... steps with evaluations and checkpoints."""
    config = stream.config
    unused = torch.optim.SGD([torch.zeros(1)])  # get_scheduler wants an optimizer
    options = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": steps}
    schedule = diffusers.optimization.get_scheduler(config.lr_scheduler, unused, **options).lr_lambdas[0]
    log = Log(config, start, steps)
    watch = functools.partial(faulthandler.dump_traceback_later, 60 * config.timeout_minutes, exit=True)
    watch()  # if a rank hangs, all print their stacks and end
    in_a_row = 0

    def evaluate(step):
        picture = validate(engine.module, shared, stream, base, step)
        log.write("probe", step, probe(engine.module, shared, stream), picture)

    if start == 0:
        evaluate(0)
    numbers = itertools.count(start * config.gradient_accumulation_steps)
    load = functools.partial(stream.micro_batch, shared["original_size"].device)
    with contextlib.closing(prefetch(load, numbers, config.dataloader_num_workers)) as batches:
        for step in range(start + 1, steps + 1):
            watch()
            rate = config.learning_rate * schedule(step - 1)
            clock = time.perf_counter()
            loss, norm, stop = train_step(engine, shared, batches, config, rate)
            speed = config.total_batch_size / (time.perf_counter() - clock)
            in_a_row = 0 if engine.was_step_applied() else in_a_row + 1
            skipped += in_a_row > 0
            figures = {"samples": step * config.total_batch_size, "loss": loss, "lr": rate}
            figures |= {"grad_norm": norm, "samples_per_s": speed, "skipped": skipped}
            figures = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            log.write("train", step, figures)
            require(in_a_row < 10, "10 steps in a row without finite gradients", 1)
            if step % config.validation_steps == 0 or step == steps:
                evaluate(step)
            if step % config.checkpointing_steps == 0 or step == steps or stop:
                manifest = {"step": step, "steps": steps, "samples": figures["samples"], "skipped": skipped}
                save_checkpoint(engine, config, step, manifest | {"identity": identity})
            if stop and step < steps:
                raise Failure(f"stopped by a signal after step {step}; the same command continues there", 75)
    faulthandler.cancel_dump_traceback_later()


# === the plan ===
def cards_of(config):
    """Cards of --plan_for, or those that are here."""
    if config.plan_for:
        number, _, name = config.plan_for.partition("x")
        known = number.isdecimal() and int(number) > 0 and name in CARDS
        require(known, f"--plan_for {config.plan_for}: must be a number, x, and one of {', '.join(CARDS)}")
        return Cards(int(number), name, *CARDS[name])
    if not torch.cuda.is_available():
        return Cards(WORLD, "CPU", math.inf, 0)
    device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
    flops = [flops for card, (_, flops) in CARDS.items() if card.split("-")[0] in device.name]
    return Cards(WORLD, device.name, device.total_memory, max(flops, default=0))


def cost_of_step(config, zero, model, cards, tokens):
    """({choice of --recompute: {part: bytes of a card at the peak of a step}}, FLOP of a sample)."""
    size = 2 if config.mixed_precision == "bf16" else 4
    weights = model.num_parameters()
    blocks = len(model.transformer_blocks)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    sequence = (config.resolution // PIXELS_PER_TOKEN) ** 2 + tokens
    offloaded = zero["offload_optimizer"]["device"] == "cpu"
    # The block in its backward pass has all 22 tensors of (batch, tokens, width), and 4 for the gradient of
    # gelu; three gradients of its weights, 4 D x D each, wait to be summed. The others have what they keep.
    tensor = size * config.train_batch_size * sequence * width
    held = {choice: (blocks - 1) * kept + 22 + 4 for choice, kept in RECOMPUTE.items()}
    memory = {
        "weights": size * weights,
        "gradients": 4 * weights / (cards.number if zero["stage"] == 2 else 1),
        "buckets": zero["reduce_bucket_size"] * (2 * size + 4),
        "optimizer": 0 if offloaded else 12 * weights / cards.number,  # fp32 weights and Adam's moments
    }
    costs = {c: memory | {"activations": n * tensor + 12 * size * width**2} for c, n in held.items()}
    return costs, 12 * blocks * width * sequence * (6 * width + sequence)  # nothing repeated


def fit_engine(config, settings, model, cards, tokens):
    """Replaces each "auto": returns config, changes settings in place -> (config, *cost_of_step)."""
    zero = settings["zero_optimization"]
    asked = zero["reduce_bucket_size"]
    asked = min(model.num_parameters(), 50_000_000) if asked == "auto" else asked  # small models: one bucket
    # DeepSpeed 0.19.8 may free a gradient larger than a bucket before it has been sent (reduce_ipg_grads).
    zero["reduce_bucket_size"] = max(asked, *(parameter.numel() for parameter in model.parameters()))
    asked = zero["offload_optimizer"]["device"]
    devices = ["none", "cpu"] if asked == "auto" else [asked]
    fastest_first = list(RECOMPUTE) if math.isfinite(cards.memory) else ["all"]
    choices = fastest_first if config.recompute == "auto" else [config.recompute]
    for device, choice in itertools.product(devices, choices):  # offloading costs more than recomputing
        zero["offload_optimizer"]["device"] = device
        costs, flops = cost_of_step(config, zero, model, cards, tokens)
        if sum(costs[choice].values()) <= USABLE * cards.memory:
            break  # else the last ones stand, for claim() to refuse
    return dataclasses.replace(config, recompute=choice), costs, flops


def print_plan(config, zero, rows, steps, start, weights, cards, costs, flops):
    """Prints what a run takes, by arithmetic; weights: their number; costs, flops: see cost_of_step."""
    total = config.total_batch_size
    saved = weights * (16 if config.upcast_before_saving or config.mixed_precision == "no" else 14)
    encoded = 8 * rows * LATENT_CHANNELS * (config.resolution // PIXELS_PER_LATENT) ** 2
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in costs[config.recompute].items())
    sums = {choice: sum(memory.values()) / 1e9 for choice, memory in costs.items()}
    if zero["offload_optimizer"]["device"] == "cpu":
        parts += f"; of the hosts at least {18 * weights / 1e9:.0f} GB"  # fp32 gradients, bf16 weights, too
    print(f"""\
engine  {config.deepspeed_config or "the shipped ds_config.json"}, ZeRO stage {zero["stage"]}
rows    {rows}, of which at most a tenth is held out
encode  {2 * rows} pictures and {rows + 1} captions, less what is there
steps   {steps} of {total} samples, {steps * total / rows:.1f} epochs; {start} are done
memory  {sums[config.recompute]:.1f} of {USABLE * cards.memory / 1e9:.0f} usable GB, {cards.name}: {parts}
        --recompute {config.recompute}; GB with {", ".join(f"{c} {size:.1f}" for c, size in sums.items())}
disk    {saved / 1e9:.1f} GB a checkpoint, {encoded / 1e9:.1f} GB of encoded pictures""")
    if cards.flops and config.mixed_precision == "bf16":
        seconds = total * flops / (cards.number * cards.flops * UTILISATION)
        hours = seconds * (steps - start) / 3600
        print(f"time    {seconds:.1f} s a step, {hours:.1f} hours, at {UTILISATION:.0%} of the cards' peak")


# === main ===
def find_base(config, weights):
    """Folder of the base, with its weights or without, downloaded if need be."""
    name = config.pretrained_model_name_or_path
    patterns = ["*.json", "*.txt", "*.model"] + ["*.safetensors"] * weights
    with explained(f"--pretrained_model_name_or_path {name}"):
        here = Path(name).is_dir()
        base = Path(name if here else huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        kind = json.loads((base / "model_index.json").read_text())["_class_name"]
        parts = [base / part for part in ("text_encoder", "vae", "transformer") if weights]
        if not kind.startswith("CogView4") or not all(any(part.glob("*.safetensors")) for part in parts):
            raise ValueError("must hold text encoder, VAE and transformer of CogView4 as safetensors")
    return base


def push(config, repository, steps):
    """Uploads weights, figures, the last picture and a model card."""
    folder = Path(config.output_dir)
    picture = f"validation/step-{steps}.png"
    data = config.jsonl_for_train or config.dataset_name
    about = f"{config.pretrained_model_name_or_path} as a control model: {steps} steps of "
    about += f"{config.total_batch_size} samples of {data} at {config.resolution} px. ![pictures]({picture})"
    (folder / "README.md").write_text(f"---\nlibrary_name: diffusers\n---\n{about}\n")
    files = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl", picture]
    by_hand = f"hf upload {repository} '{folder}' . " + " ".join(f"--include={file}" for file in files)
    with explained(f"the weights are in {folder}; `{by_hand}` uploads them", 1):
        huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)


def count_steps(config, rows):
    """Optimizer steps of a run. Raises Failure where the rows do not fill one global batch."""
    require(rows >= config.total_batch_size, f"{rows} rows do not fill a batch of {config.total_batch_size}")
    return config.max_train_steps or math.ceil(config.num_train_epochs * rows / config.total_batch_size)


def fine_tune(config, settings, cards, base, rows, found, manifest, identity):
    """Encodes, trains, puts the weights into output_dir -> optimizer steps."""
    folder = Path(config.output_dir)
    device = start_ranks(1.5 * config.timeout_minutes)  # the watch of train() is faster
    same_folder = all(all_gather_objects((folder / ".lock").exists()))  # rank 0 has made it
    require(same_folder, f"--output_dir {folder}: all machines must share it")
    encoded = encode(config, base, rows, device)
    identity |= {"training data": f"{len(encoded.train)} rows, digest {digest(*encoded.train)}"}
    check_same_run(manifest, identity)
    start = manifest.get("step", 0)
    skipped = manifest.get("skipped", 0)
    steps = count_steps(config, len(encoded.train))
    if manifest.get("steps", steps) != steps:
        log0(f"the schedule was made for {manifest['steps']} steps, now it is for {steps}")
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    model = load_transformer((found or base) / "transformer", dtype, device)
    recompute(model, config.recompute)
    shared = prepare(model, config.resolution, device, dtype)
    engine = start_engine(config, settings, model, found, start - skipped)
    with fail_together():
        if RANK == 0:
            commit = os.popen(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null").read().strip()
            versions = {package.__name__: package.__version__ for package in (torch, deepspeed, diffusers)}
            run = {"command": sys.argv, "config": dataclasses.asdict(config), "deepspeed": settings}
            run |= {"commit": commit, "versions": versions, "hardware": cards.name, "ranks": WORLD}
            write_aside(folder / "run.json", lambda path: path.write_text(json.dumps(run, indent=1)))
    train(engine, Stream(config, encoded, RANK, WORLD), shared, base, identity, start, steps, skipped)
    with fail_together():
        if RANK == 0:
            for old in folder.glob("diffusion_pytorch_model*"):  # shards of another program's run
                old.unlink()
            last = folder / f"checkpoint-{max(start, steps)}"
            shutil.copytree(last / "transformer", folder, dirs_exist_ok=True)
    return max(start, steps)


def claim(config, settings, model, cards, memory):
    """Checks what only a real run needs, and locks output_dir -> (hub repository, base with weights)."""
    require(cards.name != "CPU" or model.num_parameters() < 1e9, "PyTorch finds no GPU; see --plan_for")
    share = sum(memory.values()) / (USABLE * cards.memory)
    require(share <= 1, f"a step takes {share:.0%} of a card's usable memory: see --train_batch_size")
    offloaded = settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    require(not offloaded or shutil.which("g++"), "DeepSpeed needs g++ for an optimizer on the host")
    if config.control != "column":
        load_detector(config.control)
    repository = config.hub_model_id or Path(config.output_dir).name
    if config.push_to_hub:  # before anything is paid for
        with explained("--push_to_hub (log in with `hf auth login`, or set HF_TOKEN)"):
            repository = huggingface_hub.create_repo(repository, exist_ok=True).repo_id
    base = find_base(config, weights=True)
    with explained(f"--output_dir {config.output_dir}, perhaps in use by another run"):
        for folder in map(Path, (config.encoded_dir, config.output_dir)):
            require(folder.exists() or not folder.is_symlink(), f"{folder} is a link to nothing")
            folder.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            claim.lock = open(folder / ".lock", "a")  # stays open until this process ends
            fcntl.flock(claim.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(".checkpoint-*.tmp"):
                shutil.rmtree(left)
    return repository, base


def run(config):
    """From the flags to trained weights, or to the plan."""
    check(config)
    cards = cards_of(config)
    config = resolve(config, cards.number)
    settings = engine_settings(config)
    found, manifest = find_checkpoint(config)
    identity = {name: getattr(config, name) for name in IDENTITY}
    check_same_run(manifest, identity)
    base = find_base(config, weights=False)
    rows = open_dataset(config)
    steps = count_steps(config, len(rows) - min(config.probe_samples, len(rows) // 10))
    model = load_transformer(base / "transformer")
    longest = config.max_sequence_length
    with contextlib.suppress(UnicodeDecodeError):  # of a bad row, which encoding will name
        column = config.caption_column
        texts = [row.get(column) for row in rows] if config.jsonl_for_train else rows[column][:]
        texts = sorted((str(text).encode(errors="replace") for text in texts), key=len)[-1000:]  # the longest
        tokenizer = transformers.AutoTokenizer.from_pretrained(base / "tokenizer")
        tokens = tokenizer([text.decode() for text in texts])["input_ids"]
        longest = 16 * math.ceil(min(longest, max(map(len, tokens))) / 16)
    config, costs, flops = fit_engine(config, settings, model, cards, longest)
    if RANK == 0:
        counts = (len(rows), steps, manifest.get("step", 0), model.num_parameters())
        print_plan(config, settings["zero_optimization"], *counts, cards, costs, flops)
    if config.dry_run or config.plan_for:
        return
    repository, base = claim(config, settings, model, cards, costs[config.recompute])
    steps = fine_tune(config, settings, cards, base, rows, found, manifest, identity)
    dist.destroy_process_group()
    if RANK == 0:
        if config.push_to_hub:
            push(config, repository, steps)
        print(f"done: weights and pictures in {config.output_dir}")


def main(argv=None):
    """Runs the command line; a Failure becomes one line on stderr and the exit code."""
    try:
        run(parse(argv))
    except Failure as end:
        met = dist.is_initialized()  # then ranks fail together, and rank 0 speaks for all
        if RANK > 0 and not met:
            time.sleep(5)  # rank 0 usually reports the same; then the launcher stops this rank
        if RANK == 0 or not met:
            tqdm.write(f"cv4ctrl.py: {end}", file=sys.stderr)
        if met:
            dist.destroy_process_group()  # else gloo sometimes aborts, which changes the exit code
        sys.exit(end.code)


if __name__ == "__main__":
    main()
