"""Room 4: the widened model is the base until it learns, and stays a plain CogView4Transformer2DModel."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogView4Transformer2DModel
from safetensors.torch import load_file

import cv4ctrl
import tiny


def call(model, latents, text_dim, seed=0):
    """Output of a transformer on fixed inputs; latents (2, C, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 16, text_dim, generator=generator).to(latents.dtype)
    size = torch.tensor([[64.0, 64.0]] * 2)
    with torch.no_grad():
        return model(latents, text, torch.tensor([500.0, 20.0]), size, size, 0 * size, return_dict=False)[0]


@pytest.fixture(scope="module")
def plain(base):
    return CogView4Transformer2DModel.from_pretrained(base / "transformer", torch_dtype=torch.float32)


@pytest.fixture()
def widened(base):
    return cv4ctrl.load_transformer(base / "transformer", None, torch.float32, torch.device("cpu"))


def test_widened_model_equals_the_base_bitwise_for_any_control(plain, widened):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = call(plain, latents, 32)
    for control in (torch.zeros_like(latents), torch.randn_like(latents), 1e4 * torch.randn_like(latents)):
        assert torch.equal(call(widened, torch.cat([latents, control], 1), 32), expected)


def test_new_columns_are_zero_appended_and_get_a_gradient_and_move(plain, widened):
    weight = widened.patch_embed.proj.weight
    assert weight.shape == (64, 128) and not weight[:, 64:].any()
    assert torch.equal(weight[:, :64], plain.patch_embed.proj.weight)
    assert (widened.config.in_channels, widened.config.out_channels) == (32, 16)
    frame = cv4ctrl.prepare(widened, 64, torch.device("cpu"), torch.float32)
    noisy, control = torch.randn(2, 2, 16, 8, 8)
    optimizer = torch.optim.AdamW(widened.parameters(), lr=1e-3)
    cv4ctrl.predict(widened, frame, noisy, control, torch.randn(2, 16, 32), None, torch.tensor([9.0, 900.0])).square().mean().backward()
    assert weight.grad[:, 64:].abs().min() > 0
    optimizer.step()
    assert weight[:, 64:].abs().min() > 0


def test_surgery_shares_every_other_tensor_and_leaves_a_control_model_alone(base):
    state, config = load_file(next((base / "transformer").glob("*.safetensors"))), json.loads((base / "transformer/config.json").read_text())
    wide, wide_config = cv4ctrl.widen(state, config)
    changed = [name for name in state if wide[name] is not state[name]]
    assert changed == ["patch_embed.proj.weight"] and config["in_channels"] == 16
    again, again_config = cv4ctrl.widen(wide, wide_config)
    assert again is wide and again_config == wide_config


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_other_patch_sizes_and_no_bias(patch, bias):
    """The channels of a patch come first, so the appended columns are the control's for any patch size."""
    linear = torch.nn.Linear(16 * patch**2, 24, bias=bias)
    state = {f"patch_embed.proj.{name}": tensor.detach() for name, tensor in linear.state_dict().items()}
    wide, config = cv4ctrl.widen(state, {"in_channels": 16, "out_channels": 16, "patch_size": patch})
    assert config["in_channels"] == 32 and set(wide) == set(state)
    latent, control = torch.randn(2, 3, 16, 8, 8)

    def tokens(x):  # as CogView4PatchEmbed lays them out
        n = 8 // patch
        return x.reshape(3, -1, n, patch, n, patch).permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)

    weight = wide["patch_embed.proj.weight"].clone()
    out = torch.nn.functional.linear(tokens(torch.cat([latent, control], 1)), weight, linear.bias)
    torch.testing.assert_close(out, linear(tokens(latent)), rtol=1e-5, atol=1e-6)
    weight[:, 16 * patch**2 :] = 1.0  # now only the control may add something: the sum over its patch
    more = torch.nn.functional.linear(tokens(torch.cat([latent, control], 1)), weight, linear.bias) - out
    torch.testing.assert_close(more, tokens(control).sum(-1, keepdim=True).expand_as(more), rtol=1e-4, atol=1e-4)


def test_strict_load_and_no_second_copy(base, tmp_path):
    loaded = cv4ctrl.load_transformer(base / "transformer", None, torch.bfloat16, torch.device("cpu"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in [*loaded.parameters(), *loaded.buffers()])
    loaded.save_pretrained(tmp_path / "saved")
    again = cv4ctrl.load_transformer(tmp_path / "saved", None, torch.bfloat16, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters()))
    theirs = CogView4Transformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), theirs.parameters()))


def test_a_missing_weight_is_an_error(base, tmp_path):
    from safetensors.torch import save_file

    state = load_file(next((base / "transformer").glob("*.safetensors")))
    del state["proj_out.bias"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((base / "transformer/config.json").read_text())
    with pytest.raises(RuntimeError, match="proj_out.bias"):
        cv4ctrl.load_transformer(tmp_path, None, torch.float32, torch.device("cpu"))


def test_shards_and_variants_are_told_apart(tmp_path):
    names = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.bf16.safetensors", "m.fp16-00001-of-00001.safetensors"]
    for name in names:
        Path(tmp_path, name).touch()
    assert [f.name for f in cv4ctrl.weight_files(tmp_path)] == names[:2]
    assert [f.name for f in cv4ctrl.weight_files(tmp_path, "bf16")] == names[2:3]
    assert [f.name for f in cv4ctrl.weight_files(tmp_path, "fp16")] == names[3:]


def test_another_shape_is_refused():
    with pytest.raises(cv4ctrl.Refusal, match="no base and no control model"):
        cv4ctrl.widen({}, {"in_channels": 24, "out_channels": 16})


def test_only_the_blocks_and_the_image_input_train(widened):
    names = [name for name, _ in widened.named_parameters()]
    trained = {name.split(".")[0] for name in names if cv4ctrl.trains(name, True)}
    frozen = {name for name in names if not cv4ctrl.trains(name, True)}
    assert trained == {"transformer_blocks", "patch_embed"} and "patch_embed.text_proj.weight" in frozen
    assert "patch_embed.proj.weight" not in frozen and "proj_out.weight" in frozen
    assert all(cv4ctrl.trains(name, False) for name in names)


def test_tiny_base_is_a_whole_base(base):
    from diffusers import CogView4Pipeline

    pipe = CogView4Pipeline.from_pretrained(base, torch_dtype=torch.float32)
    image = pipe("a red circle", height=64, width=64, num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert tiny.make_rows(2) == tiny.make_rows(2)
