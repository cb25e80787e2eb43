"""fp16 and fp8 are refused wherever they could come in, in one line that names bf16; bf16 and fp32 are taken."""

import functools
import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

import cv4ctrl

HALF = "fp16 FP16 float16 torch.float16 half fp8 FP8 float8_e4m3fn torch.float8_e5m2".split()
HOLD_A_TYPE = """communication_data_type data_types.grad_accum_dtype data_types.param_dtype data_types.buffer_dtype
seq_parallel_communication_data_type torch_autocast.dtype bf16.enabled bf16.dtype zero_optimization.dtype
zero_optimization.offload_optimizer.dtype dtype precision mixed_precision""".split()


NOTHING = ["--pretrained_model_name_or_path", "/nowhere"]  # would be refused as well, but later


def engine_file(folder, name, value):
    """The shipped ds_config.json with one value changed, by its dotted name."""
    settings = json.loads(Path(cv4ctrl.__file__).with_name("ds_config.json").read_text())
    *sections, key = name.split(".")
    functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, settings)[key] = value
    (folder / "ds.json").write_text(json.dumps(settings))
    return folder / "ds.json"


@pytest.mark.parametrize("flag", ["--mixed_precision", "--mixed-precision"])
def test_no_spelling_of_half_precision_is_taken_on_the_command_line(flag, refused, tmp_path):
    for word in HALF:
        for words in ([flag, word], [f"{flag}={word}"]):
            line = refused([*NOTHING, "--output_dir", tmp_path / "out", *words])
            assert f"'{word}'" in line and "'bf16'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, value", [
    *((name, word) for name in HOLD_A_TYPE for word in ("fp16", "FP16", "torch.float16", "half", "float8_e4m3fn")),
    ("fp16", {"enabled": True}), ("fp16", {"enabled": "auto"}), ("fp16", True), ("fp8", {"enabled": True}),
    ("amp", {"enabled": True, "opt_level": "O1"}), ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),
    ("data_types", "fp16"), ("bf16", "fp16"), ("bf16.fp16", True), ("optimizer.params.dtype", "fp16"),
])  # fmt: skip
def test_nothing_in_the_engine_settings_can_bring_in_half_precision(name, value, refused, tmp_path):
    """torch_autocast may not even say bfloat16: it would make a run with --mixed_precision no a bf16 run."""
    file = engine_file(tmp_path, name, value)
    line = refused([*NOTHING, "--output_dir", tmp_path / "out", "--deepspeed_config", file])
    assert f"ds.json: {name}" in line and "bf16" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision, enabled", [("bf16", True), ("no", False)])
def test_bf16_and_fp32_are_taken_as_deepspeed_reads_them(precision, enabled, config, tmp_path):
    for reduced, torch_type in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        file = engine_file(tmp_path, "communication_data_type", reduced)
        options = {"mixed_precision": precision, "deepspeed_config": file}
        read = DeepSpeedConfig(cv4ctrl.engine_settings(config(**options)))
        assert read.bfloat16_config.enabled is enabled and read.communication_data_type is torch_type
        assert not read.float16_config.enabled and not read.torch_autocast_enabled
