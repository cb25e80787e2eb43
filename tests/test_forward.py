"""The call of the transformer, held against what the installed pipeline calls."""

import inspect

import pytest
import torch
from diffusers import CogView4ControlPipeline, CogView4Transformer2DModel
from PIL import Image

import cv4ctrl
import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ready(base):
    model = tiny.control_model(base)
    return model, cv4ctrl.prepare(model, 64, CPU, torch.float32)


def record_calls(model):
    calls, bind = [], inspect.signature(model.forward).bind
    model.register_forward_pre_hook(lambda _, args, more: calls.append(bind(*args, **more).arguments), with_kwargs=True)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_is_called_as_the_pipeline_calls_it(base, dtype):
    installed, model = (tiny.control_model(base).to(dtype) for _ in range(2))
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=installed, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    calls, our_calls = record_calls(installed), record_calls(model)
    pipe("a red circle", control_image=Image.new("RGB", (64, 64)), num_inference_steps=5, guidance_scale=1.0)
    timesteps = torch.tensor([1000.0, 750, 500, 250, 1])  # unshifted
    assert [call["timestep"].item() for call in calls] == timesteps.tolist()
    shared = cv4ctrl.prepare(model, 64, CPU, dtype)
    for theirs, t in zip(calls, timesteps):
        noisy, control = theirs["hidden_states"].chunk(2, 1)
        cv4ctrl.predict(model, shared, noisy, control, theirs["encoder_hidden_states"], None, t.expand(1))
        ours = our_calls.pop()
        assert theirs.pop("attention_kwargs") is None and ours.pop("attention_mask") is None
        assert all(torch.equal(a, b) for a, b in zip(ours.pop("image_rotary_emb"), model.rope(noisy)))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # names, values, shapes and dtypes


def test_our_attention_equals_the_installed_one(base):
    model = CogView4Transformer2DModel.from_pretrained(base / "transformer", dtype=torch.float32)
    latents, text, size = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 32), torch.tensor([[64.0, 64.0]] * 2)
    inputs = (latents, text, torch.tensor([700.0, 3.0]), size, size, 0 * size)
    with torch.no_grad():
        theirs = model(*inputs, return_dict=False)[0]
        cv4ctrl.prepare(model, 64, CPU, torch.float32)
        torch.testing.assert_close(model(*inputs, return_dict=False)[0], theirs, rtol=0, atol=1e-6)


def make_sample(seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    sample = dict(zip(("latents", "control", "noise"), torch.randn(3, 16, 8, 8, generator=generator)))
    embeds = torch.randn(tokens, 32, generator=generator).bfloat16()
    return sample | {"timestep": torch.tensor([100.0 + 50 * seed]), "prompt_embeds": embeds}


def test_loss_and_gradients_of_a_sample_do_not_depend_on_its_batch(ready):
    samples = [make_sample(seed, tokens) for seed, tokens in enumerate([16, 64, 32, 128])]

    def loss_and_gradients(samples):
        ready[0].zero_grad()
        batch = cv4ctrl.collate(samples, CPU)
        assert (batch["mask"] is None) == (len(samples) == 1)
        loss = cv4ctrl.batch_loss(*ready, batch)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in ready[0].parameters())]

    alone = [loss_and_gradients([sample]) for sample in samples]
    for together, *parts in zip(loss_and_gradients(samples), *alone):
        torch.testing.assert_close(together, sum(parts) / len(parts), rtol=1e-4, atol=1e-6)


def test_the_mask_masks(ready):
    batch = cv4ctrl.collate([make_sample(0, 16), make_sample(1, 64)], CPU)

    def predict():
        with torch.no_grad():
            inputs = [batch[name] for name in ("noise", "control", "prompt_embeds", "mask", "timestep")]
            return cv4ctrl.predict(*ready, *inputs)

    masked = predict()
    batch["prompt_embeds"][0, 16:] = 100.0  # pads of the first sample
    assert torch.equal(predict(), masked)
    batch["mask"][0, 16] = True
    opened = predict()
    assert (opened[0] - masked[0]).abs().max() > 1e-3 and torch.equal(opened[1], masked[1])
