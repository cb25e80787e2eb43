"""The sampler draws what CogView4ControlPipeline draws; losses, pictures and figures are what they say."""

import numpy as np
import pytest
import torch
from diffusers import CogView4ControlPipeline
from PIL import Image

import cv4ctrl
import tiny


@pytest.fixture(scope="module")
def ready(base):
    model = tiny.control_model(base)
    return model, cv4ctrl.prepare(model, 64, torch.device("cpu"), torch.float32)


@pytest.fixture()
def stream(encoded, config, tmp_path):
    return cv4ctrl.Stream(config(tmp_path, num_validation_images=2, num_inference_steps=2), encoded, 0, 1)


@torch.no_grad()
@pytest.mark.parametrize("side, guidance, bits", [(64, 1.0, 32), (64, 3.5, 32), (96, 3.5, 32), (64, 3.5, 16)])
def test_the_sampler_equals_the_pipeline(base, side, guidance, bits):
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
    size = dict(height=side, width=side, num_inference_steps=7, guidance_scale=guidance)
    torch.manual_seed(5)  # with the global generator the pipeline draws the control from its posterior
    theirs = pipe(prompt, control_image=image, latents=noise.clone(), output_type="latent", **size).images
    torch.manual_seed(5)
    control = pipe.vae.encode(pipe.image_processor.preprocess(image, side, side).to(dtype)).latent_dist.sample()
    texts = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in (prompt, "")]
    shared = cv4ctrl.prepare(model, side, torch.device("cpu"), dtype)
    ours = cv4ctrl.euler_sample(model, shared, noise, control, *texts, 7, guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if bits == 32 else 0.1)  # of some 4
    torch.testing.assert_close(told[model], told[installed], rtol=0, atol=0)  # also their dtypes


def make_sample(seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    sample = dict(zip(("latents", "control", "noise"), torch.randn(3, 16, 8, 8, generator=generator)))
    embeds = torch.randn(tokens, 32, generator=generator).bfloat16()
    return sample | {"timestep": torch.tensor([100.0 + 50 * seed]), "prompt_embeds": embeds}


def test_loss_and_gradients_of_a_sample_do_not_depend_on_its_batch(ready):
    samples = [make_sample(seed, tokens) for seed, tokens in enumerate([16, 64, 32, 128])]

    def loss_and_gradients(samples):
        ready[0].zero_grad()
        batch = cv4ctrl.collate(samples, torch.device("cpu"))
        assert (batch["mask"] is None) == (len(samples) == 1)
        loss = cv4ctrl.batch_loss(*ready, batch)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in ready[0].parameters())]

    alone = [loss_and_gradients([sample]) for sample in samples]
    for together, *parts in zip(loss_and_gradients(samples), *alone):
        torch.testing.assert_close(together, sum(parts) / len(parts), rtol=1e-4, atol=1e-6)


def test_the_velocity_that_is_learned_leads_the_sampler_from_noise_to_the_latents(stream, ready):
    batch = stream.micro_batch(torch.device("cpu"), 0)
    true = (lambda *args, **more: [batch["noise"] - batch["latents"]], ready[1])  # a model that has learned it
    assert cv4ctrl.batch_loss(*true, batch) == 0
    inputs = [batch[name] for name in ("noise", "control", "prompt_embeds", "prompt_embeds")]
    drawn = cv4ctrl.euler_sample(*true, *inputs, 5, 1.0)
    torch.testing.assert_close(drawn, batch["latents"], rtol=0, atol=1e-5)


def test_pictures_of_a_run(stream, base, encoded, ready, tmp_path):
    first, second = (Image.open(tmp_path / cv4ctrl.validate(*ready, stream, base, step)) for step in (0, 5))
    assert first.tobytes() == second.tobytes()  # the same noise at every step: what changes is the model
    assert first.size == (4 * 64, 4 * 64)  # control, two generated, target; four cases
    cells = [np.array(first.crop((64 * n, 0, 64 * (n + 1), 64))) for n in range(4)]
    assert not any((a == b).all() for n, a in enumerate(cells) for b in cells[:n])
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=None, dtype=torch.bfloat16)
    for cell, key in ((cells[0], encoded.held_out[0].control), (cells[3], encoded.held_out[0].image)):
        pixels = pipe.vae.decode(encoded.latents(key)[None].bfloat16()).sample.detach()
        (image,) = pipe.image_processor.postprocess(pixels)
        assert (cell == np.array(image)).all()


@torch.no_grad()
def test_the_probe_computed_again_from_its_definition(stream, base, encoded, ready):
    losses = ([], [])
    samples = [stream.sample(row, row.caption, None, "probe", n) for n, row in enumerate(encoded.held_out)]
    t = torch.arange(100.0, 901, 100)
    sigma = cv4ctrl.shifted_sigma(t, 16).view(9, 1, 1, 1)
    for sample, following in zip(samples, samples[1:] + samples[:1], strict=True):
        noisy = (1 - sigma) * sample["latents"] + sigma * sample["noise"]
        for control, part in zip((sample["control"], following["control"]), losses):
            text = sample["prompt_embeds"].expand(9, -1, -1)
            v = cv4ctrl.predict(*ready, noisy, control.expand_as(noisy), text, None, t)
            part.append((v - (sample["noise"] - sample["latents"])).square().mean().item())
    own, other = (sum(part) / 4 for part in losses)
    figures = cv4ctrl.probe(*ready, stream)
    assert cv4ctrl.probe(*ready, stream) == figures
    expected = {"probe_loss": own, "probe_loss_swapped": other, "control_gain": other / own - 1}
    assert figures == pytest.approx(expected, rel=1e-4) and abs(figures["control_gain"]) > 1e-4
    assert cv4ctrl.probe(tiny.load(base), ready[1], stream)["control_gain"] == 0  # it ignores the control
    alone = stream._replace(encoded=encoded._replace(held_out=encoded.held_out[:1]))
    assert cv4ctrl.probe(*ready, alone) == {}
