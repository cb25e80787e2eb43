"""The sampler draws what CogView4ControlPipeline draws; losses, pictures and figures are what they say."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import CogView4ControlPipeline
from PIL import Image

import cv4ctrl
import tiny


@pytest.fixture(scope="module")
def model(base):
    return cv4ctrl.VelocityModel(tiny.control_model(base), 64)


@pytest.fixture()
def stream(encoded, config, tmp_path):
    return dataclasses.replace(encoded, config=config(tmp_path, num_inference_steps=2))


@torch.no_grad()
@pytest.mark.parametrize("side, steps, guidance, bits", [
    (64, 100, 1.0, 32), (64, 7, 3.5, 32), (96, 7, 3.5, 32), (64, 7, 3.5, 16)
])  # fmt: skip
def test_the_sampler_equals_the_pipeline(base, side, steps, guidance, bits):
    """With 100 steps NumPy's linspace and PyTorch's fall on different sides of whole numbers."""
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    installed, model = (tiny.control_model(base).to(dtype) for _ in range(2))
    told = {installed: [], model: []}  # timesteps and sizes
    for one, calls in told.items():
        one.time_condition_embed.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[:4]))
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=installed, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a red circle on pale green, seen from above"
    image = Image.effect_noise((side, side), 60).convert("RGB")
    noise = torch.randn(1, 16, side // 8, side // 8, generator=torch.Generator().manual_seed(1))
    size = dict(height=side, width=side, num_inference_steps=steps, guidance_scale=guidance)
    torch.manual_seed(5)  # with the global generator the pipeline draws the control from its posterior
    theirs = pipe(prompt, control_image=image, latents=noise.clone(), output_type="latent", **size).images
    torch.manual_seed(5)
    control = pipe.vae.encode(pipe.image_processor.preprocess(image, side, side).to(dtype)).latent_dist.sample()
    texts = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0] for text in (prompt, "")]
    ours = cv4ctrl.euler_sample(cv4ctrl.VelocityModel(model, side), noise, control, *texts, steps, guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if bits == 32 else 0.1)  # of some 4
    torch.testing.assert_close(told[model], told[installed], rtol=0, atol=0)  # also their dtypes


def bands(picture):
    """A picture of a run -> {(row, column): cell of 64 x 64 pixels}."""
    pixels = np.array(picture)
    high, wide = (side // 64 for side in pixels.shape[:2])
    return {(y, x): pixels[64 * y :, 64 * x :][:64, :64] for y in range(high) for x in range(wide)}


def seen(pipe, latents):
    """Latents (16, 8, 8) -> the picture that the pipeline makes of them."""
    pixels = pipe.vae.decode(latents[None].bfloat16()).sample.detach()
    return np.array(pipe.image_processor.postprocess(pixels)[0])


@torch.no_grad()
def test_pictures_without_and_with_a_case(stream, base, config, device, encoded, model, pipe, tmp_path):
    """control | generated, generated | target, or blank. Cases come first; held-out rows stay what they were."""
    before = bands(cv4ctrl.draw_pictures(model, stream, base))
    assert before.keys() == {(y, x) for y in range(4) for x in range(3)}
    for y, row in enumerate(encoded.held_out):
        assert (before[y, 0] == seen(pipe, encoded.latents(row.control_key))).all()
        assert (before[y, 2] == seen(pipe, encoded.latents(row.image_key))).all()

    own = tmp_path / "own.png"
    Image.effect_noise((64, 40), 60).convert("RGB").save(own)
    asked = {"validation_image": own, "validation_prompt": "a green star, seen from above"}
    config = config(tmp_path, num_inference_steps=2, **asked)
    encoded = cv4ctrl.encode(config, base, cv4ctrl.open_dataset(config), device)
    with mock.patch.object(cv4ctrl, "euler_sample", wraps=cv4ctrl.euler_sample) as sampler:
        found = bands(cv4ctrl.draw_pictures(model, encoded, base))
    assert found.keys() == {(y, x) for y in range(1 + 4) for x in range(3)}
    assert all((found[y + 1, x] == before[y, x]).all() for y, x in before)
    noises = [call.args[1] for call in sampler.call_args_list]
    assert len({noise.numpy().tobytes() for noise in noises}) == 1 + 4  # each picture from a noise of its own
    pixels = pipe.image_processor.preprocess(Image.open(own), 64, 64).bfloat16()
    control = pipe.vae.encode(pixels).latent_dist.mode()
    assert (found[0, 0] == seen(pipe, control[0])).all() and (found[0, 2] == 255).all()


@torch.no_grad()
def test_the_probe_computed_again_from_its_definition(stream, encoded, model):
    losses = ([], [])
    samples = [stream.sample(row, 0, "probe", n) for n, row in enumerate(encoded.held_out)]
    t = torch.arange(100.0, 901, 100)
    sigma = cv4ctrl.shifted_sigma(t, 16).view(9, 1, 1, 1)
    for sample, following in zip(samples, samples[1:] + samples[:1], strict=True):
        noisy = (1 - sigma) * sample["latents"] + sigma * sample["noise"]
        for control, part in zip((sample["control"], following["control"]), losses):
            v = model(noisy, control.expand_as(noisy), 9 * [sample["prompt"]], t)
            part.append((v - (sample["noise"] - sample["latents"])).square().mean().item())
    own, other = (sum(part) / 4 for part in losses)
    figures = cv4ctrl.probe(model, stream)
    assert cv4ctrl.probe(model, stream) == figures
    expected = {"probe_loss": own, "probe_loss_swapped": other, "control_gain": other / own - 1}
    assert figures == pytest.approx(expected, rel=1e-4) and abs(figures["control_gain"]) > 1e-4
    assert cv4ctrl.probe(model, dataclasses.replace(stream, held_out=stream.held_out[:1])) == {}
