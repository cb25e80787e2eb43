"""The widened model is the base until it learns, and stays a plain CogView4Transformer2DModel."""

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from diffusers import CogView4Transformer2DModel
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import cv4ctrl
import tiny


def load(folder, dtype=torch.float32):
    return cv4ctrl.load_transformer(folder, dtype=dtype, device=torch.device("cpu"))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def plain(base):
    return CogView4Transformer2DModel.from_pretrained(base / "transformer", dtype=torch.float32)


@pytest.fixture()
def widened(base):
    return load(base / "transformer")


def test_the_widened_model_equals_the_base_bitwise_for_any_control(plain, widened):
    latents, text, size = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 32), torch.tensor([[64.0, 64.0]] * 2)
    inputs = (text, torch.tensor([500.0, 20.0]), size, size, 0 * size)
    with torch.no_grad():
        expected = plain(latents, *inputs, return_dict=False)[0]
        for control in (torch.zeros_like(latents), torch.randn_like(latents), 1e4 * torch.randn_like(latents)):
            found = widened(torch.cat([latents, control], 1), *inputs, return_dict=False)[0]
            assert torch.equal(found, expected)


def test_the_new_weights_are_appended_zeros_and_learn(plain, widened):
    weight = widened.patch_embed.proj.weight
    assert weight.shape == (64, 128) and not weight[:, 64:].any()
    assert torch.equal(weight[:, :64], plain.patch_embed.proj.weight)
    assert (widened.config.in_channels, widened.config.out_channels) == (32, 16)
    shared = cv4ctrl.prepare(widened, 64, torch.device("cpu"), torch.float32)
    noisy, control = torch.randn(2, 2, 16, 8, 8)
    optimizer = torch.optim.AdamW(widened.parameters(), lr=1e-3)
    inputs = (noisy, control, torch.randn(2, 16, 32), None, torch.tensor([9.0, 900.0]))
    cv4ctrl.predict(widened, shared, *inputs).square().mean().backward()
    optimizer.step()
    assert weight[:, 64:].abs().min() > 0
    assert all(parameter.grad.any() for parameter in widened.parameters())  # and so does every other weight


def test_what_is_saved_loads_with_diffusers_and_here(widened, tmp_path):
    """In one file or in shards, of which the index tells which files are weights."""
    widened.to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    widened.save_pretrained(tmp_path / "shards", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    save_file({"proj_out.bias": torch.ones(64)}, tmp_path / "shards" / "of_another_model.safetensors")
    for folder in (tmp_path / "whole", tmp_path / "shards"):
        assert same_weights(load(folder, torch.bfloat16), widened)
        assert same_weights(CogView4Transformer2DModel.from_pretrained(folder, dtype=torch.bfloat16), widened)


def test_a_missing_weight_is_an_error(widened, tmp_path):
    widened.save_pretrained(tmp_path)
    state = widened.state_dict()
    del state["proj_out.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(RuntimeError, match="proj_out.bias"):
        load(tmp_path)


def micro_batch(masked):
    """Three samples with 32 tokens, of which two are padded, or none."""
    random = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(3, 16, 8, 8, generator=random) for name in ("latents", "control", "noise")}
    batch |= {"timestep": torch.tensor([5.0, 300.0, 900.0]), "sigma": torch.tensor([0.1, 0.5, 0.9])}
    batch["prompt_embeds"] = torch.randn(3, 32, 32, generator=random)
    return batch | {"mask": torch.arange(32) < torch.tensor([[16], [32], [20]]) if masked else None}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_of_the_engine_are_bitwise_the_same_whatever_is_recomputed(precision, base, config, device):
    config = config(mixed_precision=precision, train_batch_size=3)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    settings = cv4ctrl.engine_settings(config)
    found = {}
    for choice in cv4ctrl.RECOMPUTE:
        model = tiny.control_model(base).to(dtype)
        cv4ctrl.fit_engine(config, settings, model, cv4ctrl.cards_of(config), 32)
        cv4ctrl.recompute(model, choice)
        shared = cv4ctrl.prepare(model, 64, device, dtype)
        engine = cv4ctrl.start_engine(config, settings, model)  # its learning rate is 0
        for masked in (False, True):
            engine.backward(cv4ctrl.batch_loss(engine, shared, micro_batch(masked)))
            found[choice, masked] = [safe_get_full_grad(weight).clone() for weight in model.parameters()]
            engine.step()
    for choice, masked in found:
        for gradient, expected in zip(found[choice, masked], found["none", masked], strict=True):
            assert expected.any() and torch.equal(gradient, expected)
    assert not torch.equal(found["none", True][0], found["none", False][0])


@pytest.mark.parametrize("choice, attention, products", [("some", 0, 4), ("most", 0, 4 + 4), ("all", 1, 4 + 4 + 4)])
def test_what_is_recomputed(choice, attention, products, base):
    """In each of two blocks of width D = 64, with 3 x 48 tokens: products, counted in D x D, and the modulation."""
    attentions = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **kwargs: 10**12}
    work = {}
    for one in (choice, "none"):
        model = tiny.control_model(base)
        cv4ctrl.recompute(model, one)
        shared = cv4ctrl.prepare(model, 64, torch.device("cpu"), torch.float32)
        with FlopCounterMode(display=False, custom_mapping=attentions) as counter:
            cv4ctrl.batch_loss(model, shared, micro_batch(masked=True)).backward()
        work[one] = counter.get_total_flops()
    modulation = 2 * 3 * 32 * (12 * 64)
    assert work[choice] - work["none"] == 2 * (attention * 10**12 + products * 2 * 3 * 48 * 64**2 + modulation)
