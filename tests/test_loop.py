"""Engine, checkpoints and the loop: whole runs with the real engine, in processes of their own."""

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

import cv4ctrl
import tiny
from ranks import checkpoints, command, launch, main_with, rows, same, shared_nursery, state, until, weights

# With this epsilon rounding errors of gradients, which Adam divides by their own size, do not grow in weights.
SIX = dict(max_train_steps=6, checkpointing_steps=3, validation_steps=2, proportion_empty_prompts=0.2,
           adam_epsilon=1e-3, num_inference_steps=1)  # fmt: skip
SHIPPED = dict(train_batch_size=2, gradient_accumulation_steps=2, mixed_precision="bf16", lr_scheduler="cosine",
               lr_warmup_steps=2, learning_rate=1e-2)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, flags, encoded):
    """Trains a run once -> its folder."""
    out = tmp_path_factory.mktemp("runs")
    two = SIX | {"train_batch_size": 2}
    runs = {
        "six": (1, SIX),
        "two ranks": (2, two),
        "shipped": (2, SIX | SHIPPED),
        "seldom probed": (1, SIX | {"validation_steps": 100, "checkpointing_steps": 1}),
    }

    @functools.cache
    def train(name):
        world, options = runs[name]
        assert launch(world, flags(out / name, **options)) == [[0, None]]
        return out / name

    return train


@pytest.fixture()
def copy(trained, tmp_path):
    return shutil.copytree(trained("six"), tmp_path / "copy")


def history(run, what):
    """Rows of metrics.jsonl with a figure of that name, without the one that depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row | {"samples_per_s": 0} for row in found if what in row]


def test_a_run_leaves_what_the_readme_says(trained):
    run = trained("six")
    left = {".lock", "run.json", "metrics.jsonl", "config.json", "diffusion_pytorch_model.safetensors", "validation"}
    assert {file.name for file in run.iterdir()} == left | {"checkpoint-3", "checkpoint-6"}
    assert {file.name for file in (run / "checkpoint-6").iterdir()} == {"transformer", "state", "manifest.json"}
    manifest = json.loads((run / "checkpoint-6" / "manifest.json").read_text())
    resumed = {"step": 6, "skipped": 0}
    assert manifest.items() > resumed.items() and manifest["identity"]["seed"] == 0
    files = {str(f.relative_to(run / "checkpoint-6")) for f in (run / "checkpoint-6").rglob("*") if f.is_file()}
    assert manifest["files"].keys() | {"manifest.json"} == files
    assert {file.stat().st_mode & 0o777 for file in run.glob("*") if file.is_file()} == {0o644}  # as the umask says
    keys = {"step", "samples", "loss", "lr", "grad_norm", "samples_per_s", "skipped"}
    assert [(row["step"], row["samples"], row.keys()) for row in rows(run)] == [(n, 4 * n, keys) for n in range(1, 7)]
    about = json.loads((run / "run.json").read_text())
    assert about["config"]["seed"] == 0 and about["deepspeed"]["train_batch_size"] == 4 and about["versions"]["torch"]


def test_one_rank_and_two_end_in_the_same_weights(trained):
    one, two = trained("six"), trained("two ranks")
    assert same(weights(two), weights(one), 1e-5)
    first, other = (Image.open(run / "validation" / "step-0.png").tobytes() for run in (one, two))
    assert first == other  # the same four rows in the same order
    for row, other in zip(history(one, "step"), history(two, "step"), strict=True):
        assert other == pytest.approx(row, rel=1e-5, abs=1e-5)


def test_gradients_of_the_engine_equal_plain_autograd(flags, config, encoded, base, tmp_path):
    """ZeRO-2, two ranks, accumulation 2, recomputation, against one batch of 8 in one process.

    The ranks encode by themselves: no encoder is left when training begins."""
    options = {"proportion_empty_prompts": 0.2, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    argv = flags(tmp_path / "run", encoded_dir=tmp_path / "cache", **options)
    launch(2, ("gradients", [argv, tmp_path / "gradients.safetensors"]))
    model = tiny.load(base)
    stream = cv4ctrl.replace(encoded, config=config(train_batch_size=8, proportion_empty_prompts=0.2))
    batch = stream.micro_batch(torch.device("cpu"), 0)
    cv4ctrl.flow_matching_loss(cv4ctrl.VelocityModel(model, 64), batch).backward()
    found = weights(tmp_path)
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("name, launcher", [
    ("six", "torch.distributed.run --nproc_per_node=1"), ("shipped", "deepspeed.launcher.runner --num_gpus=2")
])  # fmt: skip
def test_a_killed_run_goes_on_bitwise_under_torchrun_and_deepspeed(name, launcher, trained, flags, tmp_path):
    """From checkpoint-3, in mid-epoch and, as shipped, in mid-schedule; with what a killed process may leave."""
    run = shutil.copytree(trained(name), tmp_path / "run")
    shutil.rmtree(run / "checkpoint-6")
    (run / ".checkpoint-5.tmp" / "state").mkdir(parents=True)
    argv = flags(run, **SIX | (SHIPPED | {"recompute": "some"} if name == "shipped" else {}))  # all, until then
    words = command(launcher, cv4ctrl.__file__, argv)
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for folder in ("checkpoint-6/transformer", "."):
        assert same(weights(run / folder), weights(trained(name) / folder)), folder
    assert same(state(run / "checkpoint-6"), state(trained(name) / "checkpoint-6"))
    rows_of = ({row["step"]: row for row in history(folder, "loss")} for folder in (run, trained(name)))
    assert next(rows_of) == next(rows_of)  # of a step that was done again the later row counts
    assert not list(run.glob(".checkpoint-*"))


def test_the_state_keeps_in_fp32_what_the_weights_round(trained):
    last = trained("shipped") / "checkpoint-6"
    kept = {name: tensor for (name, entry), tensor in state(last).items() if entry == "fp32"}
    assert same({name: tensor.bfloat16() for name, tensor in kept.items()}, weights(last / "transformer"))
    assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in kept.values())


def save_again(argv, folder):
    """Job: continues a run and, instead of training, saves its state -> [parameters read, parameters written]."""
    load_file, save_file, read, written = cv4ctrl.load_file, cv4ctrl.save_file, [], []

    def reading(file):
        read.extend([file.stem] if file.parent.name == "state" else [])
        return load_file(file)

    def writing(tensors, file):
        """Ends only after the other rank has begun to write its file of the same round."""
        written.append(file.stem)
        begun = [Path(folder, f"begun-{len(written)}-{rank}") for rank in (cv4ctrl.RANK, 1 - cv4ctrl.RANK)]
        begun[0].touch()
        until(begun[1].exists, seconds=20)
        save_file(tensors, file)

    def train(engine, *_):
        assert len(list(engine.module.parameters())) % 2 == 0  # each round has a file for either rank
        cv4ctrl.save_state(engine, Path(folder, "state"))
        raise StopIteration

    main_with(argv, load_file=reading, save_file=writing, train=train)
    return [read, written]


def test_two_ranks_share_the_reading_and_the_writing_of_the_state(trained, flags, tmp_path):
    """Of each other's parameters they read nothing; they write at the same time; the state is bitwise as before."""
    argv = flags(shutil.copytree(trained("shipped"), tmp_path / "run"), **SIX | SHIPPED)
    (tmp_path / "again").mkdir()
    codes, text = shared_nursery().run(("test_loop.save_again", [argv, tmp_path / "again"]), 2, tmp_path / "log")
    assert codes == [0, 0], text
    before = state(tmp_path / "run" / "checkpoint-6")
    assert same(state(tmp_path / "again"), before)
    names = sorted({name for name, _ in before})
    logs = [json.loads((tmp_path / "log" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    (read, written), (other_read, other_written) = logs
    assert sorted(written + other_written) == names
    assert set(read + other_read) == set(names) and len(read + other_read) == len(names) + 1  # one is cut in two


def test_probing_leaves_training_alone(trained):
    often, seldom = (history(trained(name), "control_gain") for name in ("six", "seldom probed"))
    assert [[row["step"] for row in probes] for probes in (often, seldom)] == [[0, 2, 4, 6], [0, 6]]
    assert often[0]["control_gain"] == 0 and often[-1]["control_gain"] != 0  # the new columns start at zero
    assert same(weights(trained("six")), weights(trained("seldom probed")))


@pytest.mark.parametrize("steps", [4, 7])
def test_old_checkpoints_go_but_of_the_whole_ones_the_newest_two_stay(steps, trained, copy, flags):
    """A damaged checkpoint-6 is skipped, and does not count: checkpoint-3 stays beside the new one."""
    assert checkpoints(trained("seldom probed")) == [5, 6]
    old = copy / "diffusion_pytorch_model.safetensors.index.json"  # of shards that another trainer left
    old.touch()
    (copy / "checkpoint-6" / "transformer" / "config.json").unlink()
    assert launch(1, flags(copy, **SIX | {"max_train_steps": steps, "checkpointing_steps": 100})) == [[0, None]]
    assert checkpoints(copy) == sorted([3, steps, 6]) and not old.exists()


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"total_batch_size": 8}, {"resolution": 96}, {"max_sequence_length": 64}, {"mixed_precision": "bf16"},
    {"proportion_empty_prompts": 0.5}, {"probe_samples": 2}, {"dataset_name": "another"}, {"transformer": "another"},
])  # fmt: skip
def test_another_sample_stream_is_refused_by_name(change, copy, flags, refused, tmp_path):
    """Or another transformer to start from, which a continued run would not look at."""
    (flag,) = change
    if flag == "dataset_name":  # the same but for captions
        rows = [(*pair, f"{text}!") for *pair, text in tiny.make_rows(48)]
        change = {flag: tiny.write_parquet(tmp_path / "data", rows)}
    if flag == "transformer":
        change = {flag: copy / "checkpoint-3" / "transformer"}
    before = sorted(copy.rglob("*"))
    line = refused(flags(copy, **SIX | change), progress=True)
    assert ("training data" if flag == "dataset_name" else flag) + " was " in line
    assert sorted(copy.rglob("*")) == before


def test_each_step_has_its_learning_rate(trained):
    rates = [row["lr"] for row in rows(trained("shipped"))]
    assert rates == pytest.approx([0, 5e-3, 1e-2, 8.5355e-3, 5e-3, 1.4645e-3], rel=1e-4)
