"""The widened model is the base until it learns, and stays a plain CogView4Transformer2DModel."""

import os

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


def test_weights_that_lack_or_are_cut_are_an_error(base, config, widened, tmp_path):
    widened.save_pretrained(tmp_path)
    state = widened.state_dict()
    del state["proj_out.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RuntimeError, match="proj_out.bias"):
        load(tmp_path)
    os.truncate(tmp_path / "diffusion_pytorch_model.safetensors", 5000)  # before anything is loaded
    with pytest.raises(cv4ctrl.Failure, match="model.safetensors: SafetensorError"):
        cv4ctrl.find_base(config(transformer=tmp_path))


def test_a_transformer_given_by_itself_is_widened_once(base, config, tmp_path):
    """--transformer takes one that was trained as a control model as it is, and widens any other."""
    trained = tiny.control_model(base)
    trained.save_pretrained(tmp_path / "widened")
    for given, expected in ((tmp_path / "widened", trained), (base / "transformer", tiny.load(base))):
        folder, start_from = cv4ctrl.find_base(config(transformer=given))
        assert (folder, start_from) == (base, given)
        assert same(load(start_from).state_dict(), expected.state_dict())
