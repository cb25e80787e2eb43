"""tests/bench.py: every section gives its rows, and figures are of what they are called after."""

import json

import pytest
import torch

import bench


@pytest.fixture()
def measure(device, monkeypatch, tmp_path):
    """Runs the bench -> (exit code, its sections)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "WARM_UP", 1)

    def run(*words):
        code = bench.main([*words, "--steps", "2", "--repeats", "1", "--rows", "4"])
        return code, json.loads((tmp_path / "bench.json").read_text())

    return run


def test_sections_on_the_tiny_base(measure):
    code, found = measure("step", "bare", "growth", "mixed", "encode")
    *parts, whole = found["step"]
    assert [row["part"] for row in parts] == ["data wait", "forward", "backward", "optimizer", "logging"]
    assert code == 0 and all(0 < row["ms"][0] < whole["ms"][0] for row in parts)
    assert [(row["batch"], row["px"], row["tokens"]) for row in found["growth"][4:6]] == [(16, 64, 32), (4, 32, 20)]
    assert 0 < found["encode"][0]["VAE and text % of the loop"][0] < 100


def test_the_full_shape_and_a_section_that_fails(measure, monkeypatch):
    """A narrow model of one block; what comes after a section that fails is measured."""
    monkeypatch.setattr(bench.Bench, "in_turn", lambda *_: 1 / 0)
    shape = '{"num_layers": 1, "num_attention_heads": 2}'
    code, found = measure("bare", "step", "--base", "full", "--shape", shape, "--resolution", "32")
    assert (code, found["bare"]) == (1, [{"failed": "ZeroDivisionError: division by zero"}]) and len(found["step"]) == 6
    with torch.device("meta"):
        model = bench.cv4ctrl.diffusers.CogView4Transformer2DModel.from_config(bench.COGVIEW4)
    assert model.num_parameters() == pytest.approx(6.37e9, rel=0.01)


def test_the_example_is_timed(measure, tmp_path):
    """A stand-in for it, with two steps of 4 samples in 0.6 s."""
    lines = ["import time, tqdm.auto", "bar = tqdm.auto.tqdm(desc='Steps')", *["time.sleep(0.3)", "bar.update(1)"] * 2]
    (tmp_path / "example.py").write_text("\n".join(lines))
    code, found = measure("reference", "--reference", str(tmp_path / "example.py"))
    example, *ours = (row["samples/s"][0] for row in found["reference"])
    assert code == 0 and 0 < example < 8 / 0.6 and 0 < ours[0] < ours[1]  # with encoding, and steps alone
