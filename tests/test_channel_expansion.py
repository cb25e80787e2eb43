"""The widened model is the base until it learns, and stays a plain CogView4Transformer2DModel."""

import json
import shutil

import pytest
import torch
from diffusers import CogView4Transformer2DModel
from safetensors.torch import save_file

import cv4ctrl
import tiny
from ranks import same


def load(folder, dtype=torch.float32):
    return cv4ctrl.load_transformer(folder, dtype, torch.device("cpu"))


def installed(folder, dtype=torch.float32):
    return CogView4Transformer2DModel.from_pretrained(folder, dtype=dtype)


@pytest.fixture()
def widened(base):
    return load(base / "transformer")


def test_the_widened_model_equals_the_base_bitwise_for_any_control(base, widened):
    latents, text, size = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 32), torch.tensor([[64.0, 64.0]] * 2)
    inputs = (text, torch.tensor([500.0, 20.0]), size, size, 0 * size)
    with torch.no_grad():
        expected = installed(base / "transformer")(latents, *inputs, return_dict=False)[0]
        for control in (torch.zeros_like(latents), torch.randn_like(latents), 1e4 * torch.randn_like(latents)):
            found = widened(torch.cat([latents, control], 1), *inputs, return_dict=False)[0]
            assert torch.equal(found, expected)


def test_only_the_input_layer_gets_new_weights_which_are_appended_zeros(base, widened):
    plain = installed(base / "transformer").state_dict()
    before = dict(plain)
    state = cv4ctrl.add_control_channels(plain)
    assert plain.keys() == before.keys() and all(plain[name] is before[name] for name in before)  # its input is kept
    assert same(state, widened.state_dict())
    name = "patch_embed.proj.weight"
    weight = state.pop(name)
    assert weight.shape == (64, 128) and not weight[:, 64:].any() and torch.equal(weight[:, :64], plain.pop(name))
    assert same(state, plain)
    assert (widened.config.in_channels, widened.config.out_channels) == (32, 16)


def test_the_new_weights_and_all_others_learn_from_the_first_step_on(widened):
    model = cv4ctrl.VelocityModel(widened, 64)
    noisy, control = torch.randn(2, 2, 16, 8, 8)
    optimizer = torch.optim.AdamW(widened.parameters(), lr=1e-3)
    model(noisy, control, [*torch.randn(2, 16, 32)], torch.tensor([9.0, 900.0])).square().mean().backward()
    optimizer.step()
    assert widened.patch_embed.proj.weight[:, 64:].abs().min() > 0
    assert all(parameter.grad.any() for parameter in widened.parameters())


def test_what_is_saved_loads_with_diffusers_and_here(widened, tmp_path):
    """In one file or in shards, of which the index tells which files are weights."""
    widened.to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    widened.save_pretrained(tmp_path / "shards", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    save_file({"of_another_model": torch.ones(64)}, tmp_path / "shards" / "more.safetensors")
    for folder in (tmp_path / "whole", tmp_path / "shards"):
        for loader in (load, installed):
            assert same(loader(folder, torch.bfloat16).state_dict(), widened.state_dict())


def test_a_missing_weight_is_an_error(widened, tmp_path):
    widened.save_pretrained(tmp_path)
    state = widened.state_dict()
    del state["proj_out.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RuntimeError, match="proj_out.bias"):
        load(tmp_path)


def test_a_transformer_given_by_itself_is_widened_once(base, config, tmp_path):
    """--transformer takes one that was trained as a control model as it is, and widens any other."""
    trained = tiny.control_model(base)
    trained.save_pretrained(tmp_path / "widened")
    for given, expected in ((tmp_path / "widened", trained), (base / "transformer", tiny.load(base))):
        folder, start_from = cv4ctrl.find_base(config(transformer=given), weights=True)
        assert (folder, start_from) == (base, given)
        assert same(load(start_from).state_dict(), expected.state_dict())


OTHERS = [
    ("vae", {"scaling_factor": 0.18215}), ("vae", {"shift_factor": 0.1159}), ("vae", {"latent_channels": 4}),
    ("transformer", {"patch_size": 1}), ("transformer", {"out_channels": 32}),
    ("transformer", {"in_channels": 64}),
    ("scheduler", {"shift": 3.0}), ("scheduler", {"base_shift": 0.5}), ("scheduler", {"max_shift": 1.15}),
    ("scheduler", {"base_image_seq_len": 1024}), ("scheduler", {"time_shift_type": "exponential"}),
    ("scheduler", {"use_dynamic_shifting": False}), ("scheduler", {"num_train_timesteps": 500}),
]  # fmt: skip


@pytest.mark.parametrize("part, change", OTHERS)
def test_a_base_that_is_not_made_as_cogview4_is_refused(part, change, base, flags, refused, tmp_path):
    """Its file and value are named. A transformer that is given by itself is looked at, too."""
    other = shutil.copytree(base, tmp_path / "other")
    file = other / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    right = json.loads(file.read_text())
    file.write_text(json.dumps(right | change))
    ((name, value),) = change.items()
    says = [f"{part}/{file.name}", name, str(value), str(right[name])]
    line = refused(flags(tmp_path / "out", pretrained_model_name_or_path=other, dry_run=True))
    assert all(word in line for word in ["--pretrained_model_name_or_path", str(other), *says]), line
    if part == "transformer":
        line = refused(flags(tmp_path / "out", transformer=other / part, dry_run=True))
        assert all(word in line for word in ["--transformer", str(other / part), *says]), line
