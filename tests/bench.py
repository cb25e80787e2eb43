"""How fast is the trainer, and where does its time go? Tables, and the same figures as JSON.

    python tests/bench.py                                                  all sections, with the tiny base of tests/base
    python tests/bench.py step bare attention --base full --layers 14      the shape of CogView4-6B, random weights made on the device
    python tests/bench.py variants --variants 'compile|recompute'          some of the variants
    deepspeed --num_gpus=8 tests/bench.py --base full --sections step      several ranks
    python tests/bench.py reference --reference train_control_cogview4.py  against your own copy of diffusers' example

What is measured are the functions of cv4ctrl.py that train. Nothing is downloaded: data and the weights of `full` are random. Figures
are medians, in brackets the quartiles, after a warm-up; the device is waited for before a clock is read."""

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cv4ctrl  # noqa: E402
import reference  # noqa: E402
import tiny  # noqa: E402

COGVIEW4 = dict(
    patch_size=2, in_channels=16, out_channels=16, num_layers=28, attention_head_dim=128, num_attention_heads=32, text_embed_dim=4096,
    time_embed_dim=512, condition_dim=256, pos_embed_max_size=128, sample_size=128)  # fmt: skip
COGVIEW4_VAE = dict(
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=(128, 512, 1024, 1024),
    layers_per_block=3, latent_channels=16, sample_size=1024, scaling_factor=1.0, shift_factor=0.0, use_quant_conv=False,
    use_post_quant_conv=False, mid_block_add_attention=False)  # fmt: skip
GLM4 = dict(
    vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=2,
    head_dim=128, attention_bias=True, pad_token_id=0, eos_token_id=0)  # fmt: skip
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOP/s in bf16, dense
BACKENDS = {"math": "MATH", "flash": "FLASH_ATTENTION", "memory efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}


# --- figures --------------------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float


def spread(values, scale=1.0):
    values = [scale * value for value in values]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(statistics.median(values), low, high)


def now(device):
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device, anew=False):
    """Most GB allocated on the device since it was asked `anew`; on a CPU what this process had resident, libraries included."""
    if device.type == "cuda":
        anew and torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError):  # not everywhere: then it is the most since the start
        anew and Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def sample_flops(model, tokens):
    """Model FLOP of a sample of so many text and image tokens, forward + backward, recompute not counted.

    6 P S + 12 layers width S^2; P: weights of the products that every token goes through, attention and feed-forward."""
    shape = model.config
    each = sum(p.numel() for name, p in model.named_parameters() if re.search(r"_blocks.*\.(attn1|ff)\..*weight", name))
    return 6 * each * tokens + 12 * shape.num_layers * shape.num_attention_heads * shape.attention_head_dim * tokens**2


def table(rows):
    """Rows as aligned text, with new headings where the columns change."""

    def cell(value):
        if isinstance(value, Spread):
            return f"{value.median:.4g} ({value.low:.4g} .. {value.high:.4g})"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = []
    for columns, group in itertools.groupby(rows, key=tuple):
        cells = [columns, *([cell(value) for value in row.values()] for row in group)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines += ["", *("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells)]
    return "\n".join(lines)


class Stopwatch:
    """Calls of functions, each as (name, start, end)."""

    def __init__(self, device):
        self.device, self.calls = device, []

    def timed(self, name, function):
        def call(*args, **kwargs):
            start = now(self.device)
            result = function(*args, **kwargs)
            self.calls.append((name, start, now(self.device)))
            return result

        return call

    def patch(self, stack, owner, attribute, name):
        """Time owner.attribute until the stack ends."""
        stack.enter_context(mock.patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))))

    def inside(self, name):
        return sum(end - start for kind, start, end in self.calls if kind == name)

    def span(self, name):
        """From the first call's start to the last one's end."""
        times = [time for kind, start, end in self.calls if kind == name for time in (start, end)]
        return max(times) - min(times)


# --- what is measured -----------------------------------------------------------------------------------------------------------


def on_device(kind, config, dtype, device):
    """A model of random weights made on the device, with no file and no second copy; for models without buffers."""
    with torch.device("meta"):
        model = kind.from_config(config)
    model = torch.nn.Module.to(model, dtype).to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model


class Bench:
    """The options, and the parts of a run made from them."""

    def __init__(self, options, folder):
        self.device, o = cv4ctrl.start_ranks(), options
        self.options, self.folder, self.full, cuda = o, Path(cv4ctrl.gather(folder)[0]), o.base == "full", self.device.type == "cuda"
        self.base = ROOT / "tests" / "base" if self.full else Path(o.base)
        self.shape = COGVIEW4 if self.full else json.loads((self.base / "transformer" / "config.json").read_text())
        asked = {"num_layers": o.layers, "num_attention_heads": o.heads}
        self.shape = self.shape | {name: value for name, value in asked.items() if value}
        usual = dict(zip(("resolution", "batch", "tokens", "recompute"), (1024, 8, 128, "all") if self.full else (64, 4, 16, "none")))
        for name, value in (usual | {"mixed_precision": "bf16" if cuda else "no", "workers": 8 if cuda else 1}).items():
            setattr(o, name, value if getattr(o, name) is None else getattr(o, name))
        self.dtype = torch.bfloat16 if o.mixed_precision == "bf16" else torch.float32
        self.image_tokens = (o.resolution // cv4ctrl.PIXELS_PER_TOKEN) ** 2
        self.turns = o.warm_up + o.repeats * o.steps

    def config(self, **changes):
        """The trainer's configuration, resolved and checked."""
        o = self.options
        flags = dict(pretrained_model_name_or_path=str(self.base), output_dir=str(self.folder / "out"), resolution=o.resolution, probe_samples=0,
                     train_batch_size=o.batch, mixed_precision=o.mixed_precision, lr_scheduler="constant", dataloader_num_workers=o.workers,
                     deepspeed_config=o.deepspeed_config)  # fmt: skip
        c = cv4ctrl.resolve(cv4ctrl.Config(**flags | changes), cv4ctrl.WORLD)
        cv4ctrl.check(c)
        return c

    def model(self, recompute):
        """(transformer, Frame), as the trainer has them; recompute: all blocks, some - half of them - or none."""
        from diffusers import CogView4Transformer2DModel

        if self.full:
            shape = cv4ctrl.widen({"patch_embed.proj.weight": torch.empty(1, 64, device="meta")}, self.shape)[1]
            model = on_device(CogView4Transformer2DModel, shape, self.dtype, self.device)
        else:
            model = cv4ctrl.load_transformer(self.base / "transformer", None, self.dtype, self.device)
        layers = len(model.transformer_blocks)
        cv4ctrl.recompute(model, {"all": layers, "some": layers // 2, "none": 0}[recompute])
        return model, cv4ctrl.prepare(model, self.options.resolution, self.device, self.dtype)

    @contextlib.contextmanager
    def engine(self, c, recompute=None, compile=False, offload=False):
        """(engine, Frame), and all their memory free again afterwards."""
        gc.collect()
        torch.cuda.empty_cache()
        peak_memory(self.device, anew=True)
        model, frame = self.model(recompute or self.options.recompute)
        for block in model.transformer_blocks if compile else ():
            block.compile()
        settings = cv4ctrl.engine_settings(c)
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu" if offload else "none", "pin_memory": self.device.type == "cuda"}
        engine = cv4ctrl.start_engine(c, settings, model)
        try:
            yield engine, frame
        finally:
            states = [tensor for state in engine.basic_optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]
            engine.destroy()
            for tensor in (*model.parameters(), *states):  # whoever still refers to them
                tensor.grad, tensor.data = None, torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def stream(self, c, lengths):
        """The trainer's stream over a cache of 64 random rows, whose captions have these numbers of tokens in turn."""
        side = c.resolution // cv4ctrl.PIXELS_PER_LATENT
        folder = self.folder / f"cache-{side}-{'-'.join(map(str, lengths))}"

        def entries():
            for n in range(64):
                for part in ("image", "control"):
                    yield f"{part}-{n}", torch.cat([torch.randn(16, side, side), torch.full((16, side, side), -5.0)])
                yield f"caption-{n}", torch.randn(lengths[n % len(lengths)], self.shape["text_embed_dim"])

        if cv4ctrl.RANK == 0 and not folder.exists():
            folder.mkdir()
            cv4ctrl.store(folder, entries())
        cv4ctrl.dist.barrier()
        rows = [cv4ctrl.Row(n, "", f"image-{n}", f"control-{n}", f"caption-{n}") for n in range(64)]
        return cv4ctrl.Stream(c, cv4ctrl.Encoded(cv4ctrl.read_index(folder), rows, [], [], "caption-0", 1.0), cv4ctrl.RANK, cv4ctrl.WORLD)

    def speed(self, c, model, seconds):
        """What steps that took `seconds` are worth: per second of all ranks, FLOP/s of one."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        peak = next((peak for part, peak in PEAK.items() if part in name and c.mixed_precision == "bf16"), None)
        flops = sample_flops(model, self.options.tokens + self.image_tokens) * c.total_batch_size / cv4ctrl.WORLD
        rate = spread([flops / s for s in seconds], 1e-12)
        return {"ms": spread(seconds, 1e3), "samples/s": spread([c.total_batch_size / s for s in seconds]), "TFLOP/s": rate,
                "MFU %": Spread(*(100e12 * r / peak for r in rate)) if peak else "-", "peak GB": peak_memory(self.device)}  # fmt: skip

    def in_turn(self, one, other):
        """Spreads of two measurements in ms, and of how much the first takes more than its neighbours of the second, in percent."""
        pairs = [(one(), other()) for _ in range(self.turns)]
        ours, theirs = ([pair[n] for pair in pairs] for n in (0, 1))
        more = [100 * (2 * a / (before + after) - 1) for a, before, after in zip(ours[1:], theirs, theirs[1:])][self.options.warm_up - 1 :]
        return spread(ours[self.options.warm_up :], 1e3), spread(theirs[self.options.warm_up :], 1e3), spread(more)


def timed_step(engine, frame, batches, c):
    """Seconds of an optimizer step; `train_step` itself waits for the device."""
    clock = time.perf_counter()
    cv4ctrl.train_step(engine, frame, batches, c, c.learning_rate)
    return time.perf_counter() - clock


def split_steps(bench, c, engine, frame, stream):
    """(seconds of whole steps, {part: seconds in each step}), in series that alternate: reading clocks between the parts costs a little."""
    o, whole, parts, watch = bench.options, [], {}, Stopwatch(bench.device)
    steps = iter(range(1, 10**9))
    total = o.warm_up + 2 * o.repeats * o.steps
    Path(c.output_dir).mkdir(exist_ok=True)
    log = cv4ctrl.Log(c, 0, total)

    def step(batches):
        """As a turn of the trainer's loop: a step, and its row of figures."""
        clock, number = time.perf_counter(), next(steps)
        loss, norm, _ = cv4ctrl.train_step(engine, frame, batches, c, c.learning_rate)
        log.write("train", number, {"samples": number * c.total_batch_size, "loss": loss, "lr": c.learning_rate, "grad_norm": norm})
        return time.perf_counter() - clock

    with contextlib.closing(cv4ctrl.micro_batches(stream, 0, total, bench.device)) as batches:
        watched = iter(watch.timed("data wait", lambda: next(batches)), None)
        for _ in range(o.warm_up):
            step(batches)
        for _ in range(o.repeats):
            whole += [step(batches) for _ in range(o.steps)]
            with contextlib.ExitStack() as stack:
                watch.patch(stack, cv4ctrl, "to_device", "host to device")
                watch.patch(stack, cv4ctrl, "batch_loss", "forward")
                watch.patch(stack, engine, "backward", "backward")
                watch.patch(stack, engine, "step", "optimizer")
                for _ in range(o.steps):
                    watch.calls.clear()
                    took = step(watched)
                    split = {part: watch.inside(part) for part in ("data wait", "host to device", "forward", "backward", "optimizer")}
                    split["data wait"] -= split["host to device"]  # the iterator does both
                    for part, seconds in (split | {"logging": took - sum(split.values())}).items():
                        parts.setdefault(part, []).append(seconds)
    log.bar.close()
    return whole, parts


# --- sections: each yields rows ---------------------------------------------------------------------------------------------------


def section_step(bench):
    """the trainer's step and its parts; logging is reading the figures from the device and writing their row"""
    c = bench.config()
    with bench.engine(c) as (engine, frame):
        whole, parts = split_steps(bench, c, engine, frame, bench.stream(c, [bench.options.tokens]))
        yield {"batch": c.train_batch_size, "S": bench.image_tokens + bench.options.tokens} | bench.speed(c, engine.module, whole)
    total = sum(map(sum, parts.values()))
    for part, seconds in parts.items():
        yield {"part of a step": part, "ms": spread(seconds, 1e3), "share %": 100 * sum(seconds) / total}


def section_bare(bench):
    """the trainer's step against forward + backward + AdamW on the same micro-batch without DeepSpeed, in turn

    In bf16 the bare loop keeps fp32 weights for AdamW, too. ours: the trainer's forward pass; installed: diffusers' attention processor, and
    rotary tables made in each forward. The bare loop neither reads the data nor clips, checks or logs anything."""
    for forward in ("ours", "installed"):
        yield {"bare forward": forward} | dict(zip(("trainer ms", "bare ms", "overhead %"), compare_with_bare(bench, forward)))


def compare_with_bare(bench, forward):
    """Figures of section_bare for one forward pass; both models are gone when it returns."""
    from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor

    c = bench.config()
    with bench.engine(c) as (engine, frame):
        model, ours = bench.model(bench.options.recompute)[0], frame
        if forward == "installed":
            ours = frame._replace(rope=None)
            for block in model.transformer_blocks:
                block.attn1.set_processor(CogView4AttnProcessor())
        weights = list(model.parameters())
        masters = weights if bench.dtype == torch.float32 else [p.detach().float() for p in weights]
        optimizer, kept = torch.optim.AdamW(masters, lr=c.learning_rate, fused=True), []

        def bare_step():
            clock = now(bench.device)
            cv4ctrl.batch_loss(model, ours, kept.pop(), "none").backward()
            for master, p in zip(masters, weights) if masters is not weights else ():
                master.grad, p.grad = p.grad.float(), None
            optimizer.step()
            if masters is not weights:
                torch._foreach_copy_([p.data for p in weights], masters)
            optimizer.zero_grad()
            return now(bench.device) - clock

        with contextlib.closing(cv4ctrl.micro_batches(bench.stream(c, [bench.options.tokens]), 0, bench.turns, bench.device)) as batches:
            fed = (kept.append(batch) or batch for batch in batches)
            return bench.in_turn(lambda: timed_step(engine, frame, fed, c), bare_step)


def why_not(messages, backend):
    """torch's reason, out of its warnings, in which each backend has a heading `... kernel not used because:`."""
    reasons, mine = [], False
    for message in messages:
        mine = message.lower().startswith(backend) if "not used because" in message else mine
        reasons += [message.split(" (Triggered")[0]] if mine and "not used because" not in message else []
    return " ".join(reasons)


def by_sample(q, k, v, places):
    """Attention (B, H, S, d) of each sample over its own tokens, places: B x (its length,); zeros at the others."""
    out = torch.zeros_like(q)
    for n, place in enumerate(places):
        out[n : n + 1, :, place] = F.scaled_dot_product_attention(*(x[n : n + 1, :, place] for x in (q, k, v)))
    return out


def packed(q, k, v, places):
    """The same by PyTorch's kernels for samples laid end to end, (tokens of all, H, d); packing and unpacking included."""
    (batch, heads, length, width), lengths = q.shape, [len(place) for place in places]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q.device)
    tokens = torch.cat([n * length + place for n, place in enumerate(places)])
    flat = (x.transpose(1, 2).reshape(-1, heads, width)[tokens] for x in (q, k, v))
    out = varlen.varlen_attn(*flat, ends, ends, max(lengths), max(lengths))
    return q.new_zeros(batch * length, heads, width).index_copy(0, tokens, out).unflatten(0, (batch, length)).transpose(1, 2)


def section_attention(bench):
    """attention forward + backward, the ways in turn; gradient error: worst of q, k, v, relative to math in fp32

    fit: with at most twice the gradient error of math in the same precision, + 1e-5."""
    o, shape, device = bench.options, bench.shape, bench.device
    batch = min(o.batch, 2)  # math keeps all scores
    for rest, masked in itertools.product((0, 16, 64, 112), (False, True)):
        length = max(128, (bench.image_tokens + o.tokens) // 128 * 128) + rest
        size = batch, shape["num_attention_heads"], length, shape["attention_head_dim"]
        *inputs, weight = torch.randn(4, *size, device=device).to(bench.dtype)
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device) if masked else None
        ways = {"torch's choice": (None, F.scaled_dot_product_attention, {"attn_mask": mask})}
        if masked:
            mask[-1, ..., o.tokens - 16 : o.tokens] = False  # the last sample lacks 16 text tokens, as in KeyMaskAttention
            weight = weight * mask.mT  # what a pad gives is read by nobody
            places = {"places": [row[0, 0].nonzero()[:, 0] for row in mask]}
            ways |= {"by sample": (None, by_sample, places), "packed": (None, packed, places)}
        ways |= {name: (getattr(SDPBackend, backend), *ways["torch's choice"][1:]) for name, backend in BACKENDS.items()}
        row, found, failed = {"S": length, "S % 128": rest, "mask": masked}, {}, {}

        def seconds(way, dtype):
            """Of one forward and backward; the gradients go to `found`."""
            backend, attend, how = ways[way]
            leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                start = now(device)
                attend(*leaves, **how).backward(weight.to(dtype))
                took = now(device) - start
            found[way] = [x.grad.float() for x in leaves]
            return took

        seconds("math", torch.float32)
        exact = found.pop("math")
        for way in ways:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    seconds(way, bench.dtype)
                except RuntimeError as error:
                    failed[way] = (why_not([str(w.message) for w in said], way) or cv4ctrl.reason(error))[:150]
        turns = [{way: seconds(way, bench.dtype) for way in found} for _ in range(bench.turns)][o.warm_up :]
        times = {way: spread([turn[way] for turn in turns], 1e3) for way in found}
        errors = {way: max(((a - b).norm() / b.norm()).item() for a, b in zip(found[way], exact)) for way in found}
        for way in ways:
            error = failed.get(way) or (errors[way] if math.isfinite(errors[way]) else "not finite")
            yield row | {"backend": way, "ms": times.get(way, "not available"), "gradient error": error}
        best = min((way for way in BACKENDS if errors.get(way, math.inf) <= 2 * errors["math"] + 1e-5), key=lambda way: times[way].median)
        more = spread([100 * (turn["torch's choice"] / turn[best] - 1) for turn in turns])
        yield row | {"backend": "torch's choice against the fastest that is fit", "fastest": best, "more %": more}


VARIANTS = {"as it is": {}, "compile": dict(compile=True)} | {f"recompute {which}": dict(recompute=which) for which in ("all", "some", "none")}
VARIANTS |= {f"batch {n}": dict(batch=n) for n in (1, 2, 4, 8, 16)} | {"offload": dict(offload=True)}


def section_variants(bench):
    """one change each; what fails is a row that says why"""
    for name, change in VARIANTS.items():
        try:
            if re.search(bench.options.variants, name):
                change = dict(change)
                c = bench.config(train_batch_size=change.pop("batch", bench.options.batch))
                stream = bench.stream(c, [bench.options.tokens])
                with bench.engine(c, **change) as (engine, frame):
                    with contextlib.closing(cv4ctrl.micro_batches(stream, 0, bench.turns + 1, bench.device)) as batches:
                        first, *seconds = [timed_step(engine, frame, batches, c) for _ in range(bench.turns + 1)]
                    yield {"variant": name} | bench.speed(c, engine.module, seconds[bench.options.warm_up :]) | {"first step s": first}
        except Exception as error:  # out of memory, no compiler: each library has classes of its own
            yield {"variant": name, "failed": cv4ctrl.reason(error)[:150]}


def fit(points):
    """[(FLOP, seconds)] -> (fixed seconds, seconds a FLOP) of seconds = fixed + FLOP x slope, with the smallest relative errors."""
    rows = torch.tensor([[1 / seconds, flops / seconds] for flops, seconds in points], dtype=torch.float64)
    scale = rows.amax(0)
    return (torch.linalg.lstsq(rows / scale, torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0] / scale).tolist()


def section_growth(bench):
    """a step by batch and resolution; model: fixed + FLOP / rate, for each row fitted to all the others"""
    o, found = bench.options, []
    sizes = [(n, o.resolution) for n in (1, 2, 4, 8, 16)] + [(o.batch, int(o.resolution * f) // 16 * 16) for f in (0.5, 1.5, 2)]
    with bench.engine(bench.config()) as (engine, _):
        for batch, side in sizes:
            c, frame = bench.config(train_batch_size=batch, resolution=side), cv4ctrl.prepare(engine.module, side, bench.device, bench.dtype)
            try:
                with contextlib.closing(cv4ctrl.micro_batches(bench.stream(c, [o.tokens]), 0, bench.turns, bench.device)) as batches:
                    seconds = [timed_step(engine, frame, batches, c) for _ in range(bench.turns)][o.warm_up :]
            except torch.OutOfMemoryError as error:
                yield {"batch": batch, "px": side, "failed": cv4ctrl.reason(error)[:150]}
                continue
            tokens = (side // cv4ctrl.PIXELS_PER_TOKEN) ** 2 + o.tokens
            found.append(({"batch": batch, "px": side, "S": tokens}, batch * sample_flops(engine.module, tokens), spread(seconds)))
    for n, (row, flops, seconds) in enumerate(found):
        fixed, slope = fit([(f, s.median) for m, (_, f, s) in enumerate(found) if m != n])
        model = fixed + slope * flops
        measured = Spread(*(1e3 * s for s in seconds))
        yield row | {"TFLOP": flops / 1e12, "ms": measured, "model ms": 1e3 * model, "error %": 100 * (1e3 * model / measured.median - 1)}
    fixed, slope = fit([(f, s.median) for _, f, s in found])
    yield {"fixed ms, of all rows": 1e3 * fixed, "TFLOP/s, of all rows": 1e-12 / slope}


def section_ranks(bench):
    """a step with the other ranks, in turn with one that sends nothing; model: fixed + FLOP / rate, fitted to the latter, + the exchange alone

    exchange: all-reduce of the gradient in fp32 and all-gather of the weights, as ZeRO-2 has them in each step. What a GPU hides behind the
    backward pass is missing in the model: its error is then the share hidden."""
    from deepspeed.comm import comm

    o, world, found = bench.options, cv4ctrl.WORLD, []
    mute = {name: mock.Mock() for name in ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor")}
    with bench.engine(bench.config()) as (engine, frame):
        part = math.ceil(sum(p.numel() for p in engine.module.parameters()) / world)
        gradient, weights = torch.zeros(world * part, device=bench.device), torch.zeros(world * part, dtype=bench.dtype, device=bench.device)

        def exchange():
            start = now(bench.device)
            cv4ctrl.dist.all_reduce(gradient)
            cv4ctrl.dist.all_gather_into_tensor(weights, weights[:part].clone())
            return now(bench.device) - start

        cases = [bench.config(train_batch_size=batch) for batch in (1, 2, 4, 8, 16)]
        fed = [itertools.repeat(cv4ctrl.to_device(bench.stream(c, [o.tokens])[0], bench.device)) for c in cases]
        turns = [[] for _ in cases]
        for _, (c, batches, mine) in itertools.product(range(bench.turns), list(zip(cases, fed, turns))):  # all sizes see the same machine
            whole, sent = timed_step(engine, frame, batches, c), exchange()
            with mock.patch.multiple(comm.cdb, **mute):
                mine.append((whole, timed_step(engine, frame, batches, c), sent))
        for c, mine in zip(cases, turns):
            flops = c.train_batch_size * sample_flops(engine.module, bench.image_tokens + o.tokens)
            found.append((c.train_batch_size, flops, *map(spread, zip(*mine[o.warm_up :]))))
    fixed, slope = fit([(flops, alone.median) for _, flops, _, alone, _ in found])
    for batch, flops, whole, alone, sent in found:
        model, (ms, alone, exchanged) = fixed + slope * flops + sent.median, (Spread(*(1e3 * s for s in kind)) for kind in (whole, alone, sent))
        yield {"ranks": world, "batch": batch, "ms": ms, "sending nothing ms": alone, "exchange ms": exchanged, "model ms": 1e3 * model,
               "error %": 100 * (1e3 * model / ms.median - 1)}  # fmt: skip
    moved = gradient.nbytes * 2 * (world - 1) / world + weights.nbytes * (world - 1) / world
    calls = sum(one.call_count for one in mute.values()) / (bench.turns * len(cases))
    yield {"bytes a rank sends": moved, "GB/s": 1e-9 * moved / statistics.median(sent.median for *_, sent in found), "collectives a step": calls}


def section_mixed(bench):
    """captions of four lengths in one micro-batch, padded and masked, against as many of the longest, in turn"""
    o, c, longest = bench.options, bench.config(), max(64, bench.options.tokens)
    stream = bench.stream(c, [longest - less for less in (0, 16, 32, 48)])

    def batches(every):
        rows = itertools.islice(itertools.cycle(stream.encoded.train[::every]), o.batch)
        samples = [stream.sample(row, row.caption, stream.timestep(n), "noise", n) for n, row in enumerate(rows)]
        return itertools.repeat(cv4ctrl.to_device(cv4ctrl.collate(samples, stream.mu), bench.device))

    mixed, equal = batches(1), batches(4)
    with bench.engine(c) as (engine, frame):
        figures = bench.in_turn(lambda: timed_step(engine, frame, mixed, c), lambda: timed_step(engine, frame, equal, c))
    yield {"longest tokens": longest} | dict(zip(("mixed ms", "equal ms", "mixed costs more %"), figures))


@contextlib.contextmanager
def encoders(bench):
    """AutoencoderKL and the pipeline; for `full` of the true shapes with random weights, in place of those that the base holds."""
    from diffusers import AutoencoderKL, CogView4ControlPipeline
    from transformers import GlmConfig, GlmModel

    read = CogView4ControlPipeline.from_pretrained

    def vae(base):
        return on_device(AutoencoderKL, COGVIEW4_VAE, torch.bfloat16, bench.device).requires_grad_(False)

    def pipeline(base, **options):
        layers = max(2, bench.options.layers or GLM4["num_hidden_layers"])
        with torch.device(bench.device):
            return read(base, **options, text_encoder=GlmModel._from_config(GlmConfig(**GLM4 | {"num_hidden_layers": layers}), dtype=torch.bfloat16))

    with contextlib.ExitStack() as stack:
        if bench.full:
            stack.enter_context(mock.patch.object(cv4ctrl, "load_vae", vae))
            stack.enter_context(mock.patch.object(CogView4ControlPipeline, "from_pretrained", pipeline))
        yield AutoencoderKL, CogView4ControlPipeline


def section_encode(bench):
    """encoding into a fresh cache, its share inside VAE and text encoder, and how long training from that cache waits for data

    of all: from the first row read to the index of the cache, loading the encoders included; of loops: between the first and the last
    call of each encoder. Where the encoders are tiny, what is around them counts most."""
    o, device, measured = bench.options, bench.device, []
    if cv4ctrl.RANK == 0:
        tiny.make_data(bench.folder / "data", o.rows, min(o.resolution, 512))
    cv4ctrl.dist.barrier()
    for repeat in range(o.repeats):
        c = bench.config(dataset_name=str(bench.folder / "data"), encoded_dir=str(bench.folder / f"encoded-{repeat}"))
        rows, watch = cv4ctrl.open_dataset(c), Stopwatch(device)
        with encoders(bench) as (vae, pipeline), contextlib.ExitStack() as stack:
            watch.patch(stack, vae, "encode", "VAE")
            watch.patch(stack, pipeline, "encode_prompt", "text")
            clock = now(device)
            encoded = cv4ctrl.encode(c, bench.base, rows, device)
            seconds = now(device) - clock
        vae, text, loops = watch.inside("VAE"), watch.inside("text"), watch.span("VAE") + watch.span("text")
        measured.append({"s": seconds, "rows/s": len(rows) / seconds, "VAE %": 100 * vae / seconds, "text %": 100 * text / seconds,
                         "encoders of all %": 100 * (vae + text) / seconds, "of loops %": 100 * (vae + text) / loops})  # fmt: skip
    yield {"rows": o.rows} | {name: spread([one[name] for one in measured]) for name in measured[0]}
    for workers in sorted({0, o.workers}):
        c = bench.config(dataloader_num_workers=workers)
        stream = cv4ctrl.Stream(c, encoded, cv4ctrl.RANK, cv4ctrl.WORLD)
        with contextlib.closing(cv4ctrl.micro_batches(stream, 0, bench.turns + 1, device)) as batches:
            marks = [now(device) for _ in batches][o.warm_up :]
        with bench.engine(c) as (engine, frame):
            whole, parts = split_steps(bench, c, engine, frame, stream)
        wait = spread([100 * wait / sum(step) for wait, step in zip(parts["data wait"], zip(*parts.values()))])
        alone = (len(marks) - 1) * c.total_batch_size / (marks[-1] - marks[0])
        yield {"loader processes": workers, "reading alone, samples/s": alone, "step ms": spread(whole, 1e3), "data wait %": wait}


def section_reference(bench):
    """samples/s against the example, in turn: same base, rows, batch, precision, steps

    The example encodes what it trains on in every step; the trainer encodes every row once, so the fewer visits the worse for it."""
    from transformers import AutoTokenizer

    o, measured = bench.options, []
    count = o.reference_rows or o.reference_steps * o.batch
    if bench.full or cv4ctrl.WORLD > 1:
        raise RuntimeError("reference needs one rank, and a base in a folder")
    captions = reference.captions(AutoTokenizer.from_pretrained(bench.base / "tokenizer"), count)
    tiny.write_parquet(bench.folder / "rows", [(*row[:2], text) for row, text in zip(tiny.make_rows(count, o.resolution), captions)])
    flags = dict(pretrained_model_name_or_path=bench.base, dataset_name=bench.folder / "rows", resolution=o.resolution, train_batch_size=o.batch, seed=0,
                 max_train_steps=o.reference_steps, mixed_precision=o.mixed_precision, learning_rate=1e-4, lr_scheduler="constant",
                 dataloader_num_workers=o.workers, checkpointing_steps=10**6, validation_steps=10**6)  # fmt: skip
    ours_only = ["--deepspeed_config", o.deepspeed_config, "--probe_samples", "0", "--num_validation_images", "0"]
    ours_only += ["--no_gradient_checkpointing"] if o.recompute == "none" else []
    for repeat in range(o.repeats):
        (bench.folder / f"pair-{repeat}").mkdir()
        place = bench.folder / f"pair-{repeat}"
        measured.append(reference.compare(o.reference, flags, ours_only, place, o.reference_pythonpath, o.reference_steps, o.batch))
    for n, name in ((1, "encoding included"), (2, "steps alone")):
        ratio = spread([one[n] / one[0] for one in measured])
        ours, theirs = (spread([one[which] for one in measured]) for which in (n, 0))
        yield {"ours": name, "rows": count, "samples/s": ours, "example's samples/s": theirs, "ratio": ratio}


# --- the command ----------------------------------------------------------------------------------------------------------------

SECTIONS = {name.removeprefix("section_"): function for name, function in list(globals().items()) if name.startswith("section_")}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("chosen", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all without, the last only with --reference")
    add("--sections", help="the same, separated by commas, for launchers that put flags first")
    add("--base", default=str(ROOT / "tests" / "base"), help="a folder, or full: the shape of CogView4-6B with random weights")
    add("--layers", type=int, help="of full: so many blocks instead of 28")
    add("--heads", type=int, help="of full: so many heads of 128 instead of 32")
    add("--resolution", type=int, help="pixels [64; 1024 of full]")
    add("--batch", type=int, help="samples a micro-batch [4; 8 of full]")
    add("--tokens", type=int, help="of a caption, a multiple of 16 [16; 128 of full]")
    add("--mixed_precision", choices=("bf16", "no"), help="[bf16 on a GPU, no on a CPU]")
    add("--recompute", choices=("all", "some", "none"), help="blocks whose activations are computed again [none; all of full]")
    add("--workers", type=int, help="processes that make batches [8 on a GPU, 1 on a CPU]")
    add("--deepspeed_config", default="ds_config.json", help="the engine's settings [%(default)s]")
    add("--warm_up", type=int, default=3, help="steps or calls that do not count, at least 1 [%(default)s]")
    add("--steps", type=int, default=20, help="in a series [%(default)s]")
    add("--repeats", type=int, default=3, help="series [%(default)s]")
    add("--rows", type=int, default=64, help="of the data set that is encoded [%(default)s]")
    add("--variants", default="", help="regular expression: only these")
    add("--reference", help="your copy of diffusers' train_control_cogview4.py")
    add("--reference_steps", type=int, default=200, help="[%(default)s]")
    add("--reference_rows", type=int, help="of its data set [as many as samples: each is encoded for one visit]")
    add("--reference_pythonpath", default="", help="where it finds accelerate, if that is not installed")
    add("--json", default="bench.json", help="the figures [%(default)s]")
    add("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.chosen = options.chosen or (options.sections or ",".join(SECTIONS)).split(",")
    if (options.layers or options.heads) and options.base != "full":
        parser.error("--layers and --heads are for --base full")
    if min(options.warm_up, options.steps, options.repeats) < 1:
        parser.error("--warm_up, --steps and --repeats must be at least 1")
    if unknown := set(options.chosen) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(unknown)}")
    options.chosen = [name for name in options.chosen if options.reference or name != "reference"]
    try:
        if "variants" in options.chosen and not any(re.search(options.variants, name) for name in VARIANTS):
            parser.exit(2, f"bench.py: --variants {options.variants}: none of {', '.join(VARIANTS)}\n")
    except re.error as error:
        parser.error(f"--variants {options.variants}: {error}")
    return options


def header(bench, argv):
    """When, on what, with what."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")
    cpu = f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    versions = {name: version(name) for name in ("torch", "deepspeed", "diffusers", "transformers")} | {"python": platform.python_version()}
    return {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "ranks": cv4ctrl.WORLD, "versions": versions,
            "hardware": torch.cuda.get_device_name() if bench.device.type == "cuda" else cpu,
            "command": shlex.join(["python", "tests/bench.py", *argv]), "options": vars(bench.options), "shape": dict(bench.shape)}  # fmt: skip


def main(argv):
    """Exit code 1 where a section failed; the others are measured and written all the same."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        torch.manual_seed(0)
        found = {"header": header(bench, argv), "sections": {}}
        for name in options.chosen:
            rows = found["sections"].setdefault(name, [])
            try:
                rows.extend(SECTIONS[name](bench))
            except Exception as error:
                rows.append({"failed": f"{type(error).__name__}: {cv4ctrl.reason(error)}"})
            if cv4ctrl.RANK == 0:
                Path(options.json).write_text(json.dumps(found, indent=1, default=str) + "\n")
        cv4ctrl.dist.barrier()
        cv4ctrl.dist.destroy_process_group()
    if cv4ctrl.RANK == 0:
        top = found["header"]
        print(f"\n{top['date']}; {top['hardware']}; {', '.join(f'{name} {number}' for name, number in top['versions'].items())}\n{top['command']}")
        for name, rows in found["sections"].items():
            print(f"\n=== {name}: {SECTIONS[name].__doc__.splitlines()[0]}\n{table(rows)}")
    return int(any(tuple(row) == ("failed",) for rows in found["sections"].values() for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
