"""Measures the trainer and its parts: a table for each section, and the same figures in bench.json.

    python tests/bench.py                                                 all sections, with the tiny base of tests/base
    python tests/bench.py step bare --train_batch_size 8                   some of them, with any flags of cv4ctrl.py
    deepspeed --num_gpus=8 tests/bench.py step --base full                 the shape of CogView4-6B, with random weights
    python tests/bench.py reference --reference train_control_cogview4.py  against your own copy of diffusers' example

The functions of cv4ctrl.py that train are measured. Figures are medians, with quartiles in brackets, after a warm-up.
Nothing is downloaded. An engine's memory stays taken until the end: give a large model one section at a time."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pandas
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cv4ctrl  # noqa: E402
import tiny  # noqa: E402

WARM_UP = 3  # steps that do not count
COGVIEW4 = dict(num_layers=28, num_attention_heads=32, attention_head_dim=128, text_embed_dim=4096)
COGVIEW4 |= dict(in_channels=16, out_channels=16)  # the rest are the model's defaults


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


@contextlib.contextmanager
def timed(**targets):
    """Times the calls of name=(owner, attribute) inside the block -> {name: seconds}."""
    spent = dict.fromkeys(targets, 0.0)

    def wrap(name, function):
        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            spent[name] += now() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in targets.items():
            stack.enter_context(mock.patch.object(owner, attribute, wrap(name, getattr(owner, attribute))))
        yield spent


def timed_step(config, engine, shared, batches):
    """Seconds of an optimizer step; train_step waits for the device."""
    start = time.perf_counter()
    cv4ctrl.train_step(engine, shared, batches, config, config.learning_rate)
    return time.perf_counter() - start


class Bench:
    """The parts of a run, made as the trainer makes them."""

    def __init__(self, options, flags, folder):
        self.options = options
        self.device = cv4ctrl.start_ranks(60)
        self.folder = Path(cv4ctrl.all_gather_objects(folder)[0])
        self.full = options.base == "full"
        self.base = self.folder if self.full else Path(options.base)
        file = self.base / "transformer" / "config.json"
        if self.full:
            cv4ctrl.write_aside(file, lambda path: path.write_text(json.dumps(COGVIEW4 | options.shape)))
        self.shape = json.loads(file.read_text())
        words = f"--pretrained_model_name_or_path {self.base} --output_dir {self.folder}/out --probe_samples 0"
        words += " --lr_scheduler constant --num_validation_images 0"
        words += "" if self.full else " --resolution 64 --train_batch_size 4 --no_gradient_checkpointing"
        words += "" if self.device.type == "cuda" else " --mixed_precision no --dataloader_num_workers 1"
        self.flags = cv4ctrl.parse([*words.split(), *flags])

    def config(self, **changes):
        return cv4ctrl.resolve(dataclasses.replace(self.flags, **changes), cv4ctrl.WORLD)

    def model(self, config):
        """(transformer, shared arguments of its calls)."""
        folder = self.base / "transformer"
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        if self.full:  # random weights made on the device
            model = torch.nn.Module.to(cv4ctrl.load_transformer(folder), dtype).to_empty(device=self.device)
            for parameter in model.parameters():
                parameter.data.normal_(std=0.02)
        else:
            model = cv4ctrl.load_transformer(folder, dtype=dtype, device=self.device)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        for block in model.transformer_blocks if config.compile else ():
            block.compile()
        return model, cv4ctrl.prepare(model, config.resolution, self.device, dtype)

    def engine(self, config):
        """(engine, shared arguments)."""
        model, shared = self.model(config)
        settings = cv4ctrl.engine_settings(config)
        cv4ctrl.fit_engine(config, settings, model, cv4ctrl.cards_of(config), self.options.tokens)
        return cv4ctrl.start_engine(config, settings, model), shared

    def batches(self, config, *lengths):
        """The trainer's micro-batches of random rows, without end; lengths: of their captions in turn, in tokens."""
        lengths = lengths or (self.options.tokens,)
        side = config.resolution // cv4ctrl.PIXELS_PER_LATENT
        folder = self.folder / f"cache-{side}"
        entries = {f"caption-{n}": torch.randn(n, self.shape["text_embed_dim"]) for n in lengths}
        entries["picture"] = torch.randn(32, side, side).clamp(max=0)
        for key, entry in entries.items():
            write = functools.partial(cv4ctrl.save_file, {"entry": entry.bfloat16()})
            cv4ctrl.write_aside(folder / f"{key}.safetensors", write)
        sizes = {key: len(entry) for key, entry in entries.items()}
        keys = [("picture", "picture", f"caption-{lengths[n % len(lengths)]}") for n in range(64)]
        rows = [cv4ctrl.Row(n, *key) for n, key in enumerate(keys)]
        encoded = cv4ctrl.Encoded(folder, sizes, rows, [], [], "")
        stream = cv4ctrl.Stream(config, encoded, cv4ctrl.RANK, cv4ctrl.WORLD)
        load = functools.partial(stream.micro_batch, self.device)
        return cv4ctrl.prefetch(load, itertools.count(), config.dataloader_num_workers)

    def in_turn(self, names, *functions):
        """Figures of two functions that give seconds: theirs, and how much more the first takes."""
        pairs = [[function() for function in functions] for _ in range(WARM_UP + self.options.steps)]
        frame = pandas.DataFrame(pairs)[WARM_UP:]
        return dict(zip(names, (spread(frame[0], 1e3), spread(frame[1], 1e3), spread(frame[0] / frame[1] - 1, 100))))


def section_step(bench):
    """parts of the trainer's step; logging is reading the figures from the device and writing their row"""
    config = bench.config()
    log = cv4ctrl.Log(config, 0, None)
    engine, shared = bench.engine(config)
    bench.next = functools.partial(next, bench.batches(config))
    batches = iter(lambda: bench.next(), None)
    parts = {"data wait": (bench, "next"), "forward": (cv4ctrl, "batch_loss")}
    parts |= {"backward": (engine, "backward"), "optimizer": (engine, "step")}
    steps = []
    for number in range(WARM_UP + bench.options.steps):
        with timed(**parts) as spent:
            start = time.perf_counter()
            loss, norm, _ = cv4ctrl.train_step(engine, shared, batches, config, config.learning_rate)
            log.write("train", number, {"samples": number, "loss": loss, "lr": 0.0, "grad_norm": norm})
            seconds = time.perf_counter() - start
        steps.append(spent | {"logging": seconds - sum(spent.values()), "all": seconds})
    frame = pandas.DataFrame(steps[WARM_UP:])
    for part in frame:
        yield {"part": part, "ms": spread(frame[part], 1e3), "share %": spread(frame[part] / frame["all"], 100)}


def section_bare(bench):
    """the trainer's step against forward + backward + AdamW on the same micro-batch without DeepSpeed, in turn"""
    config = bench.config()
    model, shared = bench.model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    batch = next(bench.batches(config))

    def bare_step():
        start = now()
        cv4ctrl.batch_loss(model, shared, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return now() - start

    step = functools.partial(timed_step, config, *bench.engine(config), itertools.repeat(batch))
    yield bench.in_turn(("trainer ms", "bare ms", "overhead %"), step, bare_step)


def section_switches(bench):
    """a step with a flag on against one with it off, in turn"""
    for flag in ("gradient_checkpointing", "compile"):
        configs = [bench.config(**{flag: value}) for value in (True, False)]
        steps = [functools.partial(timed_step, one, *bench.engine(one), bench.batches(one)) for one in configs]
        yield {"flag": flag} | bench.in_turn(("on ms", "off ms", "on costs more %"), *steps)


def section_growth(bench):
    """a step by batch size and resolution, until one fails; TFLOP/s of a rank's products, recomputation not counted"""
    side = bench.flags.resolution
    sizes = [(batch, side) for batch in (1, 2, 4, 8, 16)]
    sizes += [(bench.flags.train_batch_size, int(side * factor) // 16 * 16) for factor in (0.5, 1.5, 2)]
    engine, shared = bench.engine(bench.config())
    width = bench.shape["num_attention_heads"] * bench.shape["attention_head_dim"]
    for batch, side in sizes:
        config = bench.config(train_batch_size=batch, resolution=side)
        shared = cv4ctrl.prepare(engine.module, side, bench.device, shared["original_size"].dtype)
        batches = bench.batches(config)
        seconds = [timed_step(config, engine, shared, batches) for _ in range(WARM_UP + bench.options.steps)][WARM_UP:]
        sequence = (side // cv4ctrl.PIXELS_PER_TOKEN) ** 2 + bench.options.tokens
        flops = 12 * batch * bench.shape["num_layers"] * width * sequence * (6 * width + sequence)
        rates = spread([flops / one for one in seconds], 1e-12)
        yield {"batch": batch, "px": side, "tokens": sequence, "ms": spread(seconds, 1e3), "TFLOP/s": rates}


def section_mixed(bench):
    """captions of 16 to 64 tokens in one micro-batch, padded and masked, against as many of the longest, in turn"""
    config = bench.config()
    step = functools.partial(timed_step, config, *bench.engine(config))
    steps = [functools.partial(step, bench.batches(config, *lengths)) for lengths in ((64, 48, 32, 16), (64,))]
    yield bench.in_turn(("mixed ms", "equal ms", "mixed costs more %"), *steps)


def section_encode(bench):
    """encoding into a fresh cache; share of the time inside VAE and text encoder, of all and without loading them"""
    side = min(bench.flags.resolution, 512)
    data = tiny.make_data(bench.folder / f"data-{cv4ctrl.RANK}", bench.options.rows, side)
    parts = {"VAE": (cv4ctrl.diffusers.AutoencoderKL, "encode"), "loop": (cv4ctrl, "encode_rows")}
    parts |= {"text": (cv4ctrl.diffusers.CogView4ControlPipeline, "encode_prompt"), "all": (cv4ctrl, "encode")}
    parts["loading"] = (cv4ctrl, "load_encoders")
    measured = []
    for repeat in range(bench.options.repeats):
        config = bench.config(dataset_name=str(data), encoded_dir=f"{bench.folder}/encoded-{repeat}")
        with timed(**parts) as spent:
            cv4ctrl.encode(config, bench.base, cv4ctrl.open_dataset(config), bench.device)
        measured.append(spent)
    frame = pandas.DataFrame(measured)
    both = (frame["VAE"] + frame["text"]) / (frame["loop"] - frame["loading"])
    shares = {f"{name} % of all": spread(frame[name] / frame["all"], 100) for name in ("VAE", "text", "loading")}
    yield {"s": spread(frame["all"])} | shares | {"VAE and text % of the loop": spread(both, 100)}


def section_reference(bench):
    """samples/s against the example, which encodes in every step; in turn, same base, rows, batch, precision, steps"""
    tokenizer = cv4ctrl.transformers.AutoTokenizer.from_pretrained(bench.base / "tokenizer")
    rows = [(*pair, text + "!" * (16 - len(tokenizer(text).input_ids)))  # the example needs multiples of 16 tokens
            for *pair, text in tiny.make_rows(bench.options.rows, bench.flags.resolution)]  # fmt: skip
    data = str(tiny.write_parquet(bench.folder / "rows", rows))
    config = dataclasses.replace(bench.flags, dataset_name=data, max_train_steps=bench.options.steps)
    names = ("pretrained_model_name_or_path", "dataset_name", "resolution", "train_batch_size", "mixed_precision",
             "max_train_steps", "dataloader_num_workers")  # fmt: skip
    words = [str(word) for name in names for word in (f"--{name}", getattr(config, name))]
    words += ["--output_dir", f"{bench.folder}/example", *["--gradient_checkpointing"] * config.gradient_checkpointing]
    command = [sys.executable, f"{ROOT}/tests/reference.py", bench.options.reference, *words]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    parts = {name: (cv4ctrl, name) for name in ("fine_tune", "train", "save_checkpoint")}
    measured = []
    for n in range(bench.options.repeats):
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        with timed(**parts) as spent, mock.patch.object(cv4ctrl.dist, "destroy_process_group"):
            cv4ctrl.run(dataclasses.replace(config, output_dir=f"{bench.folder}/run-{n}"))
        ours = [spent[part] - spent["save_checkpoint"] for part in ("fine_tune", "train")]
        measured.append([float(done.stdout.split()[-1]), *ours])
    frame = pandas.DataFrame(measured, columns=["example", "trainer, encoding included", "trainer, steps alone"])
    for name, seconds in frame.items():
        rates = config.max_train_steps * config.train_batch_size / seconds
        yield {"": name, "samples/s": spread(rates), "relative to the example": spread(frame["example"] / seconds)}


SECTIONS = {name[8:]: function for name, function in list(globals().items()) if name.startswith("section_")}


def parse(argv):
    """Command line -> (options, flags of the trainer)."""
    argv = [word for word in argv if not word.startswith("--local_rank")]  # which the deepspeed launcher puts first
    chosen = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    parser = argparse.ArgumentParser(f"bench.py [{' '.join(SECTIONS)}]", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--base", default=f"{ROOT}/tests/base", help="a folder, or full: the shape of CogView4-6B, random weights")
    add("--shape", type=json.loads, default={}, help="""of full: what is different, such as '{"num_layers": 14}'""")
    add("--tokens", type=int, help="of a caption, a multiple of 16 [16; 128 of full]")
    add("--steps", type=int, default=60, help="that count [60]")
    add("--repeats", type=int, default=3, help="of encode and reference [3]")
    add("--rows", type=int, default=64, help="of the data of encode and reference [64]")
    add("--reference", help="your copy of diffusers' train_control_cogview4.py; it needs accelerate")
    options, flags = parser.parse_known_args(argv[len(chosen) :])
    options.tokens = options.tokens or (128 if options.base == "full" else 16)
    options.sections = chosen or [name for name in SECTIONS if options.reference or name != "reference"]
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(unknown)}")
    return options, flags


def main(argv):
    """Exit code 1 where a section failed; the others are measured and written all the same."""
    options, flags = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, flags, folder)
        found = {name: [] for name in options.sections}
        for name, rows in found.items():
            try:
                rows.extend(SECTIONS[name](bench))
            except Exception as error:  # out of memory, no compiler: each library has its own classes
                rows.append({"failed": f"{type(error).__name__}: {error}".split("\n")[0]})
        cv4ctrl.dist.barrier()
        cv4ctrl.dist.destroy_process_group()
    if cv4ctrl.RANK == 0:
        hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
        names = ("torch", "deepspeed", "diffusers", "transformers")
        versions = [f"{name} {sys.modules[name].__version__}" for name in names]
        about = [time.strftime("%Y-%m-%d"), f"{cv4ctrl.WORLD} x {hardware}", *versions, f"bench.py {' '.join(argv)}"]
        Path("bench.json").write_text(json.dumps({"about": about} | found, indent=1) + "\n")
        print("; ".join(about))
        for name, rows in found.items():
            print(f"\n{name}: {SECTIONS[name].__doc__.splitlines()[0]}")
            print(pandas.DataFrame(rows).fillna("").map(cell).to_string(index=False))
    return int(any("failed" in row for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
