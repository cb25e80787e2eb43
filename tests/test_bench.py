"""tests/bench.py: every section gives its rows; the figures are those of the things they are called after."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogView4Transformer2DModel

import bench
import cv4ctrl
import reference

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "1", "--repeats", "2", "--warm_up", "1", "--workers", "0"]


@pytest.fixture()
def measure(device, monkeypatch, tmp_path, capsys):
    """Run the bench in this process -> its sections and what it prints."""
    monkeypatch.setattr(cv4ctrl.dist, "destroy_process_group", lambda: None)

    def run(*words, code=0):
        assert bench.main([*words, *SHORT, "--json", str(tmp_path / "bench.json")]) == code
        return json.loads((tmp_path / "bench.json").read_text())["sections"], capsys.readouterr().out

    return run


def test_a_step_and_its_parts(measure):
    sections, text = measure("step", "bare", "mixed")
    whole, *parts = sections["step"]
    assert [row["part of a step"] for row in parts] == ["data wait", "host to device", "forward", "backward", "optimizer", "logging"]
    assert sum(row["share %"] for row in parts) == pytest.approx(100) and all(row["share %"] >= 0 for row in parts)
    assert whole["samples/s"][0] == pytest.approx(4e3 / whole["ms"][0], rel=0.5) and whole["MFU %"] == "-" and whole["peak GB"] > 0.1
    assert [row["bare forward"] for row in sections["bare"]] == ["ours", "installed"]
    assert all(row["bare ms"][0] > 0 and len(row["overhead %"]) == 3 for row in sections["bare"])
    assert sections["mixed"][0]["longest tokens"] == 64
    assert all(f"=== {name}: " in text for name in sections) and "python tests/bench.py step bare mixed" in text


@pytest.mark.parametrize("precision, low, high", [("no", 1e-8, 1e-5), ("bf16", 1e-4, 3e-2)])
def test_attention_of_every_backend(measure, monkeypatch, precision, low, high):
    """With a stand-in for the kernel of packed samples, which CPUs lack."""

    def varlen_attn(q, k, v, ends, ends_k, longest, longest_k):
        assert ends is ends_k and ends.dtype == torch.int32 and longest == longest_k == ends.diff().max()
        parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in zip(ends, ends[1:])]
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts])

    if not torch.cuda.is_available():
        monkeypatch.setattr(bench.varlen, "varlen_attn", varlen_attn)
    rows = measure("attention", "--mixed_precision", precision)[0]["attention"]
    verdicts, rows = ([row for row in rows if ("fastest" in row) == verdict] for verdict in (True, False))
    assert len(rows) == 4 * (5 + 7) and {row["S % 128"] for row in rows} == {0, 16, 64, 112}
    for row in rows:
        if row["ms"] == "not available":
            assert row["backend"] in bench.BACKENDS and len(row["gradient error"]) > 10
        elif row["backend"] != "math" or precision == "bf16":
            assert low < row["gradient error"] < high, row
    assert {row["backend"] for row in rows if row["ms"] != "not available"} >= {"math", "torch's choice", "by sample", "packed"}
    assert len(verdicts) == 4 * 2 and all(row["fastest"] in bench.BACKENDS and len(row["more %"]) == 3 for row in verdicts)


def test_a_variant_that_fails_is_a_row(measure, monkeypatch):
    start = cv4ctrl.start_engine

    def start_engine(c, settings, model):
        if settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu":
            raise RuntimeError("no compiler\nmore")
        return start(c, settings, model)

    monkeypatch.setattr(cv4ctrl, "start_engine", start_engine)
    rows = measure("variants", "--variants", "as it is|recompute|batch 2|offload")[0]["variants"]
    assert [row["variant"] for row in rows] == ["as it is", "recompute all", "recompute some", "recompute none", "batch 2", "offload"]
    assert rows[-1] == {"variant": "offload", "failed": "no compiler"} and all(row["ms"][0] > 0 for row in rows[:-1])


@pytest.mark.parametrize("which", ["all", "some", "none"])
def test_recompute_runs_blocks_again(which, device, tmp_path):
    """Calls of each block in forward and backward."""
    b = bench.Bench(bench.parse(["--recompute", which, *SHORT]), str(tmp_path))
    c, calls = b.config(), []
    model, frame = b.model(which)
    for n, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, n=n: calls.append(n))
    cv4ctrl.batch_loss(model, frame, b.stream(c, [16])[0], "none").backward()
    assert [calls.count(n) for n in range(4)] == {"all": [2, 2, 2, 2], "some": [2, 2, 1, 1], "none": [1, 1, 1, 1]}[which]


def test_growth_with_batch_and_resolution(measure):
    """The model gives back the constants of times that follow it."""
    fixed, slope = bench.fit([(f, 0.02 + f / 3e9) for f in (1e6, 1e8, 1e9)])
    assert fixed == pytest.approx(0.02) and slope == pytest.approx(1 / 3e9)
    *rows, constants = measure("growth")[0]["growth"]
    assert [(row["batch"], row["px"], row["S"]) for row in rows[-3:]] == [(4, 32, 20), (4, 96, 52), (4, 128, 80)]
    assert all(row["TFLOP"] > 0 and row["model ms"] > 0 for row in rows) and len(rows) == 8 and constants["fixed ms, of all rows"] > 0


@pytest.mark.long
def test_ranks_that_exchange(tmp_path):
    """Two ranks under a launcher; the steps that send nothing do leave out what DeepSpeed sends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "tests" / "bench.py", "--sections", "ranks", *SHORT, "--steps", "5", "--json", tmp_path / "bench.json"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    *rows, line = json.loads((tmp_path / "bench.json").read_text())["sections"]["ranks"]
    assert [(row["ranks"], row["batch"]) for row in rows] == [(2, n) for n in (1, 2, 4, 8, 16)]
    assert line["bytes a rank sends"] == pytest.approx(1.5 * 4 * 1.04e6, rel=0.01) and line["GB/s"] > 0.01
    assert line["collectives a step"] >= 2  # gradients out, weights in: what the steps that send nothing left out


def test_encoding_and_reading_the_cache(measure):
    rows = measure("encode", "--rows", "6")[0]["encode"]
    assert 0 < rows[0]["VAE %"][0] and 0 < rows[0]["text %"][0] and rows[0]["encoders of all %"][0] < rows[0]["of loops %"][0] <= 100
    assert [row["loader processes"] for row in rows[1:]] == [0] and 0 < rows[1]["data wait %"][0] < 100


def test_the_full_shape(measure):
    """One block of a quarter of CogView4-6B's width; the test below has all of it."""
    words = ["step", "--base", "full", "--layers", "1", "--heads", "8", "--resolution", "32", "--batch", "1", "--tokens", "16"]
    rows = measure(*words, "--mixed_precision", "bf16")[0]["step"]
    assert rows[0]["S"] == 20 and rows[0]["ms"][0] > 0
    with torch.device("meta"):
        model = CogView4Transformer2DModel.from_config(bench.COGVIEW4 | {"in_channels": 32})
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(6.4e9, rel=0.01)
    assert bench.sample_flops(model, 4096 + 128) == pytest.approx(167e12, rel=0.01)


@pytest.mark.long
def test_the_full_width(tmp_path):
    words = ["step", "--base", "full", "--layers", "1", "--resolution", "32", "--batch", "1", "--tokens", "16", "--mixed_precision", "bf16"]
    command = [sys.executable, ROOT / "tests" / "bench.py", *words, *SHORT, "--repeats", "1", "--json", tmp_path / "bench.json"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / "bench.json").read_text())["sections"]["step"][0]["peak GB"] < 7


def test_a_section_that_fails_leaves_the_others(measure, monkeypatch):
    def fails(bench):
        yield {"before": 1}
        raise ValueError("broken\nmore")

    monkeypatch.setitem(bench.SECTIONS, "mixed", fails)
    fails.__doc__ = "fails"
    sections, text = measure("mixed", "variants", "--variants", "batch 1$", code=1)
    assert sections["mixed"] == [{"before": 1}, {"failed": "ValueError: broken"}] and len(sections["variants"]) == 1 and "broken" in text


def test_torchs_reason_is_that_of_the_backend():
    said = ["Memory efficient kernel not used because: (Triggered internally at a.cpp:1)", "efficient reason (Triggered at b)",
            "Flash attention kernel not used because:", "first", "second", "CuDNN attention kernel not used because:", "third"]  # fmt: skip
    assert [bench.why_not(said, name) for name in bench.BACKENDS] == ["", "first second", "efficient reason", "third"]


def test_spread_and_table():
    assert bench.spread([3, 1, 2, 4, 5], 2) == (6, 4, 8) and bench.spread([7]) == (7, 7, 7)
    assert bench.table([{"a": 1, "b": 0.5}, {"a": 22, "b": "x"}, {"c": bench.Spread(1.0, 0.5, 2.0)}]) == "\na   b\n1   0.5\n22  x\n\nc\n1 (0.5 .. 2)"


@pytest.mark.parametrize("words", [["nothing"], ["--layers", "1"], ["--warm_up", "0"], ["--bat", "4"], ["--variants", "batch 3"], ["--variants", "("]])
def test_a_wrong_command_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.parse(words)
    assert ended.value.code == 2


def test_the_examples_progress_is_timed(tmp_path):
    """A stand-in for the example: its bar, two steps of 0.2 s; then one that ends with an error."""
    (tmp_path / "bar.py").write_text("import time, tqdm\ntime.sleep(0.5)\nfor _ in tqdm.tqdm(range(2), desc='Steps'): time.sleep(0.2)")
    first, last = reference.watch([sys.executable, str(tmp_path / "bar.py")], [reference.FIRST, reference.LAST.format(2)], tmp_path / "log")
    assert 0.35 < last - first < 0.5
    (tmp_path / "bad.py").write_text("raise ValueError('no such flag')")
    with pytest.raises(RuntimeError, match="bad.py ended with 1, its last line: ValueError: no such flag"):
        reference.watch([sys.executable, str(tmp_path / "bad.py")], [reference.FIRST], tmp_path / "log")


def test_captions_have_16_tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "base" / "tokenizer")
    assert {len(tokenizer(text).input_ids) for text in reference.captions(tokenizer, 20)} == {16}
