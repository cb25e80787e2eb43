"""Measures the trainer and its parts: a table for each section.

    python tests/bench/bench.py                                 all sections, with the tiny base of tests/demo/base
    python tests/bench/bench.py bare --train_batch_size 8       some of them, with any flags of cv4ctrl.py
    python tests/bench/bench.py compile --width 512 --layers 4 --resolution 512
                                                                with a base of that width
    python tests/bench/bench.py reference --reference FILE --in-proportion --resolution 256 --rows 48
                                                                against FILE, your copy of diffusers' example

The functions of cv4ctrl.py that train are measured. Figures are medians, with quartiles in brackets, after a warm-up.
Nothing is downloaded."""

import argparse
import dataclasses
import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/demo")]

import cv4ctrl  # noqa: E402
import tiny  # noqa: E402

WARM_UP = 3  # steps that do not count
TOKENS = 16  # of a caption
VISITS = (1, 3, 10)  # of each row, in the section reference
# A base whose parts stand, at 256 px and 16 tokens, in the proportion of work that CogView4-6B's have at 1024 px: there
# forward and backward pass 167 TFLOP, VAE 19 a picture, text encoder 2.4; here 22.4, 2.5 and 0.34 GFLOP.
PROPORTIONS = dict(layers=4, heads=8, head_dim=64, text_dim=768, vae_channels=(16, 36, 64, 64))


def spread(values, scale=1.0):
    """[median, lower quartile, upper quartile]."""
    return pandas.Series(values).mul(scale).quantile([0.5, 0.25, 0.75]).tolist()


def cell(value):
    if isinstance(value, list):
        return "{:.3g} ({:.3g} to {:.3g})".format(*value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def now():
    """Seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed_step(config, engine, model, batches):
    """Seconds of an optimizer step; train_step waits for the device."""
    start = time.perf_counter()
    cv4ctrl.train_step(engine, model, batches, config, config.learning_rate)
    return time.perf_counter() - start


class Bench:
    """The parts of a run, made as the trainer makes them."""

    def __init__(self, options, flags, folder):
        self.options = options
        self.device = cv4ctrl.start_ranks()
        self.folder = Path(folder)
        base = ROOT / "tests/demo/base"
        if options.width:
            shape = {"heads": options.width // 64, "head_dim": 64, "layers": options.layers}
            base = tiny.make_base(f"{folder}/base", **shape)
        if options.in_proportion:
            tokenizer = base / "tokenizer"  # in which the captions have fewer than 16 tokens
            base = tiny.make_base(f"{folder}/base", **PROPORTIONS)
            shutil.copytree(tokenizer, base / "tokenizer", dirs_exist_ok=True)
        words = f"--pretrained_model_name_or_path {base} --output_dir {folder}/out --probe_samples 0"
        words += " --lr_scheduler constant_with_warmup --lr_warmup_steps 0 --num_inference_steps 0 --recompute none"
        words += " --resolution 64 --train_batch_size 4 --mixed_precision no --dataloader_num_workers 1"
        self.flags = cv4ctrl.parse([*words.split(), *flags])
        self.base = Path(self.flags.pretrained_model_name_or_path)

    def config(self, **changes):
        return cv4ctrl.resolve(dataclasses.replace(self.flags, **changes), 1)

    def transformer(self, config):
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        transformer = cv4ctrl.load_transformer(self.base / "transformer", dtype, self.device)
        cv4ctrl.recompute(transformer, config.recompute, config.compile)
        return transformer

    def engine(self, config):
        """(engine, VelocityModel through it)."""
        transformer = self.transformer(config)
        settings = cv4ctrl.engine_settings(config)
        config, settings, *_ = cv4ctrl.fit_engine(config, settings, transformer, cv4ctrl.cards_of(), TOKENS)
        engine = cv4ctrl.start_engine(config, settings, transformer)
        return engine, cv4ctrl.VelocityModel(engine, config.resolution, config.compile)

    def data(self, resolution):
        """Folder of captioned shapes; their captions have TOKENS tokens, which the example needs to be 16 n."""
        tokenizer = cv4ctrl.transformers.AutoTokenizer.from_pretrained(self.base / "tokenizer")
        shapes = tiny.make_rows(self.options.rows, resolution)
        rows = [(*pair, text + "!" * (TOKENS - len(tokenizer(text).input_ids))) for *pair, text in shapes]
        return str(tiny.write_parquet(tempfile.mkdtemp(dir=self.folder), rows))

    def batches(self, config):
        """The trainer's micro-batches of such data, without end."""
        config = dataclasses.replace(config, dataset_name=self.data(config.resolution))
        stream = cv4ctrl.encode(config, self.base, cv4ctrl.open_dataset(config), self.device)
        return stream.micro_batches(self.device, 0)

    def times(self, *functions):
        """Seconds that functions give, called in turn, a column each."""
        rows = [[function() for function in functions] for _ in range(WARM_UP + self.options.steps)]
        return pandas.DataFrame(rows)[WARM_UP:]


def section_bare(bench):
    """the trainer's step against forward + backward + AdamW on the same micro-batch without DeepSpeed, in turn"""
    config = bench.config()
    transformer = bench.transformer(config)
    model = cv4ctrl.VelocityModel(transformer, config.resolution, config.compile)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=config.learning_rate, fused=True)
    batch = next(bench.batches(config))

    def bare_step():
        start = now()
        cv4ctrl.flow_matching_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return now() - start

    step = functools.partial(timed_step, config, *bench.engine(config), itertools.repeat(batch))
    frame = bench.times(step, bare_step)
    times = {"trainer ms": spread(frame[0], 1e3), "bare ms": spread(frame[1], 1e3)}
    yield times | {"overhead %": spread(frame[0] / frame[1] - 1, 100)}


def section_compile(bench):
    """a step with each value of --recompute, with and without --compile, in turn"""
    choices = itertools.product(cv4ctrl.KEPT_PER_BLOCK, (False, True))
    configs = [bench.config(recompute=choice, compile=compiled) for choice, compiled in choices]
    steps = [functools.partial(timed_step, one, *bench.engine(one), bench.batches(one)) for one in configs]
    frame = bench.times(*steps)
    for n in range(0, len(configs), 2):
        row = {"recompute": configs[n].recompute, "ms": spread(frame[n], 1e3), "compiled ms": spread(frame[n + 1], 1e3)}
        yield row | {"compiled / not": spread(frame[n + 1] / frame[n])}


def section_reference(bench):
    """samples/s against the example, which encodes in every step; in turn, same base, rows, batch, precision, steps"""
    data = bench.data(bench.flags.resolution)
    names = ("pretrained_model_name_or_path", "dataset_name", "resolution", "train_batch_size", "mixed_precision",
             "max_train_steps", "dataloader_num_workers")  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    encoders, measured = cv4ctrl.Cache.encoders.func, []
    dtype = torch.float32 if bench.flags.mixed_precision == "no" else torch.bfloat16  # in which the example encodes

    cast = functools.cached_property(lambda cache: encoders(cache).to(dtype))
    cast.__set_name__(cv4ctrl.Cache, "encoders")
    for n, visits in itertools.product(range(bench.options.repeats), VISITS):
        steps = visits * bench.options.rows // bench.flags.train_batch_size
        config = dataclasses.replace(bench.flags, dataset_name=data, max_train_steps=steps)
        words = [str(word) for name in names for word in (f"--{name}", getattr(config, name))]
        words += ["--output_dir", f"{bench.folder}/example"]
        words += ["--gradient_checkpointing"] if config.recompute != "none" else []
        command = [sys.executable, f"{ROOT}/tests/bench/reference.py", bench.options.reference, *words]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        folder = Path(bench.folder, f"run-{n}-{visits}")
        kept_out = {name: mock.Mock() for name in ("save_checkpoint", "leave_weights")}
        with mock.patch.object(cv4ctrl.dist, "destroy_process_group"), mock.patch.multiple(cv4ctrl, **kept_out):
            with mock.patch.object(cv4ctrl.Cache, "encoders", cast):
                start = time.perf_counter()
                cv4ctrl.run(dataclasses.replace(config, output_dir=str(folder)))
                whole = time.perf_counter() - start
        rows = pandas.read_json(folder / "metrics.jsonl", lines=True)
        alone = (config.train_batch_size / rows["samples_per_s"]).sum()
        measured.append([visits, steps * config.train_batch_size, float(done.stdout.split()[-1]), whole, alone])
    columns = ["example", "trainer, encoding included", "trainer, steps alone"]
    for visits, frame in pandas.DataFrame(measured, columns=["visits", "samples", *columns]).groupby("visits"):
        for name in columns:
            relative = spread(frame["example"] / frame[name])
            rates = spread(frame["samples"] / frame[name])
            yield {"visits a row": visits, "": name, "samples/s": rates, "relative to the example": relative}


SECTIONS = {name[8:]: function for name, function in list(globals().items()) if name.startswith("section_")}


def main(argv):
    """Prints the figures -> {section: its rows}."""
    chosen = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=60, help="that count [60]")
    parser.add_argument("--repeats", type=int, default=3, help="of reference [3]")
    parser.add_argument("--in-proportion", action="store_true", help="a base with CogView4-6B's proportions")
    parser.add_argument("--width", type=int, help="of a base of random weights, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of that base [4]")
    parser.add_argument("--rows", type=int, default=64, help="of the data [64]")
    parser.add_argument("--reference", help="your copy of diffusers' train_control_cogview4.py; it needs accelerate")
    options, flags = parser.parse_known_args(argv[len(chosen) :])
    sections = chosen or [name for name in SECTIONS if options.reference or name != "reference"]
    torch._dynamo.config.cache_size_limit = 256  # all values of --recompute in one process
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, flags, folder)
        found = {name: list(SECTIONS[name](bench)) for name in sections}
    cv4ctrl.dist.destroy_process_group()
    for name in ("torch", "deepspeed", "diffusers", "transformers"):
        print(name, sys.modules[name].__version__)
    for name, rows in found.items():
        print(f"\n{name}: {SECTIONS[name].__doc__}")
        print(pandas.DataFrame(rows).map(cell).to_string(index=False))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
