"""The plan of --dry_run: its arithmetic against what a run really takes, and against the known size of CogView4-6B."""

import json
import re
import shutil
from pathlib import Path

import pytest

import bench
import cv4ctrl
from ranks import launch

ROOT = Path(__file__).parents[1]
TRUE_SHAPE = {"_class_name": "CogView4Transformer2DModel"} | bench.COGVIEW4


@pytest.fixture(scope="module")
def cogview(base, tmp_path_factory):
    """CogView4-6B as far as a plan reads it: configurations and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("plan") / "CogView4-6B"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "transformer" / "config.json").write_text(json.dumps(TRUE_SHAPE))
    return folder


@pytest.fixture()
def planned(capsys):
    """Lines of a plan by their heads."""

    def run(argv):
        capsys.readouterr()
        cv4ctrl.main([*map(str, argv), "--dry_run"])
        said = capsys.readouterr()
        lines = [line for line in said.out.splitlines() if line.strip()]
        return {"first": lines[0], "said": said.err} | {line[:10].strip(): line[10:] for line in lines[1:]}

    return run


def gigabytes(text):
    return {part: float(size) for size, part in re.findall(r"([\d.e+-]+) GB (\w+)", text)}


def test_shape_of_cogview4(cogview):
    shape = cv4ctrl.shape_of(cogview / "transformer", only_blocks=False)
    assert (shape.layers, shape.width) == (28, 4096) and 6.3e9 < shape.parameters == shape.trained < 6.5e9
    assert 0.9 * shape.parameters < cv4ctrl.shape_of(cogview / "transformer", only_blocks=True).trained < shape.parameters


def test_plans_for_cogview4(cogview, planned, flags, tmp_path):
    common = dict(pretrained_model_name_or_path=cogview, encoded_dir=None, resolution=1024, mixed_precision="bf16", probe_samples=0, max_train_steps=1000)
    plan = lambda **options: planned(flags(tmp_path / "out", **common | options))  # noqa: E731
    eight = plan(plan_for="8xH100-80GB", train_batch_size=4)
    assert eight["first"].startswith("48 rows, 0 held out; 1024 px; 8 ranks x batch 4 x 1 = 32 samples a step; 1000 steps")
    parts = gigabytes(eight["a card"])
    assert parts["weights"] == pytest.approx(12.8, rel=0.02) and parts["optimizer"] == pytest.approx(12 * 6.37 / 8, rel=0.02)
    assert eight["a host"] == "nothing is offloaded" and "too large" not in eight
    assert sum(int(n) for n, _ in re.findall(r"(\d+) of (\d+) tokens", eight["captions"])) == 48
    seconds = float(eight["time"].split(" s a step")[0])
    assert seconds == pytest.approx(167e12 * (4096 + 38) / (4096 + 128) * 4 / (0.4 * 989e12), rel=0.03)  # 167 TFLOP with 128 tokens
    assert f"{seconds * 1000 / 3600:.3g} hours" in eight["time"]
    one = plan(plan_for="1xH100-80GB", train_batch_size=8)
    assert "the optimizer goes to host memory" in one["said"] and gigabytes(one["a card"])["optimizer"] == 0
    assert float(one["a host"].split(" GB")[0]) == pytest.approx(18 * 6.37, rel=0.02) and "too large" not in one
    small = plan(plan_for="8xA100-40GB", train_batch_size=6, no_gradient_checkpointing=True)
    assert re.search("; --gradient_checkpointing --train_batch_size [63] --total_batch_size 48 would do", small["too large"]), small
    fast = plan(plan_for="4xH100-80GB", train_batch_size=8, recompute_blocks=0)
    assert "--gradient_checkpointing --train_batch_size 8 --total_batch_size 32 without --recompute_blocks would do" in fast["too large"]
    blocks, saved = map(int, re.findall(r"\d+", eight["faster"]))
    assert blocks + saved == 28 and "too large" not in plan(plan_for="8xH100-80GB", train_batch_size=4, recompute_blocks=blocks)
    assert "too large" in plan(plan_for="8xH100-80GB", train_batch_size=4, recompute_blocks=blocks - 1)
    assert "more cards would do" in plan(plan_for="1xA100-40GB", train_batch_size=8)["too large"]


def test_plan_is_quick_and_refuses_unknown_cards(cogview, flags, refused, tmp_path):
    assert "one of A100-40GB" in refused([*flags(tmp_path / "out", plan_for="8xTPU"), "--dry_run"])
    assert "--dry_run" in refused(flags(tmp_path / "out", plan_for="8xA100-80GB"))


@pytest.mark.parametrize("change, right", [({}, True), ({"reduce_bucket_size": 50_000_000}, False), ({"reduce_bucket_size": 50_000_000, "overlap_comm": False}, True),
                                           ({"reduce_bucket_size": 50_000_000, "stage": 1}, False), ({"reduce_bucket_size": 50_000_000, "contiguous_gradients": False}, True)])  # fmt: skip
def test_a_bucket_smaller_than_a_weight_is_refused(change, right, cogview, flags, refused, planned, tmp_path):
    settings = json.loads((ROOT / "ds_config.json").read_text())
    settings["zero_optimization"] |= change
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    words = flags(tmp_path / "out", pretrained_model_name_or_path=cogview, deepspeed_config=tmp_path / "ds.json", plan_for="8xA100-80GB")
    if right:
        assert planned(words)["a card"]
    else:
        line = refused([*words, "--dry_run"])
        assert "reduce_bucket_size = 50000000" in line and str(4096 * 4 * 4096) in line and "overlap_comm" in line


@pytest.mark.parametrize("free, limit, right", [(129e9, None, False), (140e9, None, True), (140e9, "max", True), (149e9, "139000000000", False),
                                                (149e9, "145000000000", True)])  # fmt: skip
def test_what_is_offloaded_fits_into_the_host_with_what_saving_takes(free, limit, right, cogview, config, device, monkeypatch, tmp_path):
    """6.37 billion parameters: 18 bytes each offloaded and 2 exported; and 2 GiB in files of the state. `limit`: of a container, 10 GB used."""
    c = config(pretrained_model_name_or_path=cogview, mixed_precision="bf16")
    load = cv4ctrl.Load(c, {"stage": 2, "reduce_bucket_size": 1, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
                        cv4ctrl.shape_of(cogview / "transformer", False), cv4ctrl.Cards(1, "A100-80GB", 80e9, None), 128)  # fmt: skip
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.stat").write_text("anon 10000000000\nfile 50000000000\n")
    monkeypatch.setattr(cv4ctrl, "Path", lambda *_: tmp_path)
    monkeypatch.setattr(cv4ctrl.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    monkeypatch.setattr(cv4ctrl.shutil, "which", lambda name: "g++")
    monkeypatch.delenv("LOCAL_SIZE", raising=False), monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if right:
        cv4ctrl.check_offload(load)
        cv4ctrl.check_offload(load.but("none"))
    else:
        with pytest.raises(cv4ctrl.Refusal, match="needs 130 GB of a machine's memory, 129 are free"):
            cv4ctrl.check_offload(load)


def test_a_gpu_that_pytorch_cannot_use_is_named(cogview, base, monkeypatch, tmp_path):
    """Where a large model would go to the CPU beside it; a tiny one may."""
    zero = {"stage": 0, "reduce_bucket_size": 1, "overlap_comm": False}
    large, small = (cv4ctrl.shape_of(folder / "transformer", False) for folder in (cogview, base))
    here, there = cv4ctrl.Cards(1, "CPU", None, None), cv4ctrl.Cards(1, "A100-80GB", 80e9, None)
    monkeypatch.setattr(cv4ctrl, "Path", lambda *_: tmp_path)
    cv4ctrl.check_engine(here, zero, large)
    (tmp_path / "nvidia3").touch()
    with pytest.raises(cv4ctrl.Refusal, match="driver"):
        cv4ctrl.check_engine(here, zero, large)
    cv4ctrl.check_engine(here, zero, small), cv4ctrl.check_engine(there, zero, large)


@pytest.fixture(scope="module")
def peaks(flags, tmp_path_factory, encoded):
    """{blocks recomputed, of 4: (measured, planned bytes at the peak)} of steps of the demo's base, and the folder of these runs.

    Buckets of the engine that are as small as the model: with the shipped ones, 0.4 GB in fp32, nothing else would be seen."""
    out = tmp_path_factory.mktemp("peaks")
    settings = json.loads((ROOT / "ds_config.json").read_text())
    settings["zero_optimization"] |= {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    (out / "ds.json").write_text(json.dumps(settings))
    common = dict(
        pretrained_model_name_or_path=ROOT / "tests" / "base",
        encoded_dir=out / "encoded",
        train_batch_size=16,
        max_train_steps=1,
        probe_samples=0,
        deepspeed_config=out / "ds.json",
    )
    found = launch(1, *(("peak_of_a_step", [flags(out / f"{blocks}", **common, recompute_blocks=blocks)]) for blocks in (4, 2, 0)))
    return {blocks: value for blocks, (_, value) in zip((4, 2, 0), found)}, out


@pytest.mark.parametrize("blocks", [4, 2, 0])
def test_memory_of_a_step_is_as_planned(blocks, peaks):
    measured, planned = peaks[0][blocks]
    assert measured == pytest.approx(planned, rel=0.15), (measured, planned)
    assert peaks[0][4][0] < peaks[0][2][0] < peaks[0][0][0]


def test_disk_of_a_run_is_as_planned(peaks, config):
    run = peaks[1] / "4"
    written = sum(file.stat().st_size for file in (run / "checkpoint-1").rglob("*") if file.is_file())
    shutil.rmtree(run / "checkpoint-1")
    needed = lambda steps: cv4ctrl.disk_needed(config(run, checkpointing_steps=1), 48, cv4ctrl.shape_of(run, False), steps)[0]  # noqa: E731
    assert needed(1) == pytest.approx(written, rel=0.1)
    assert needed(9) == pytest.approx(3 * written, rel=0.1)  # two are kept, and go when a third is there
