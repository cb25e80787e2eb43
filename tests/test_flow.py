"""Flow matching, held against the installed scheduler and the training utilities of diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cogview4.pipeline_cogview4_control import calculate_shift, retrieve_timesteps

import cv4ctrl


@pytest.mark.parametrize("resolution", range(256, 2049, 256))
def test_sigma_and_timestep_are_the_schedulers(base, resolution):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    tokens = (resolution // 16) ** 2
    t = np.arange(1000, 0, -1).astype(np.float32)  # every level, set as CogView4ControlPipeline sets it
    timesteps, _ = retrieve_timesteps(scheduler, None, "cpu", t, t / 1000, mu=calculate_shift(tokens))
    assert torch.equal(timesteps, torch.from_numpy(t))  # unshifted; not so in diffusers 0.40 and 0.41
    sigma = cv4ctrl.shifted_sigma(torch.from_numpy(t), tokens)
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 1000])
def test_timesteps_of_the_sampler_are_the_pipelines(steps):
    seen, noise = [], torch.zeros(1, 16, 8, 8)
    model = lambda timestep, **inputs: seen.append(timestep.item()) or [noise]  # noqa: E731
    shared = {"original_size": torch.zeros(1), "image_rotary_emb": torch.zeros(1, 16)}
    cv4ctrl.euler_sample(model, shared, noise, noise, noise, noise, steps, 1.0)
    assert seen == np.linspace(1000, 1.0, steps).astype(np.int64).tolist()


def test_sigma_at_its_ends_and_all_levels_apart():
    assert cv4ctrl.shifted_sigma(torch.tensor([0.0, 1000.0]), 64 * 64).tolist() == [0.0, 1.0]
    sigma = cv4ctrl.shifted_sigma(torch.arange(1, 1001), 64 * 64)  # 1024 px
    assert sigma.dtype == torch.float32 and len(sigma.unique()) == 1000
    assert len(sigma.bfloat16().unique()) < 400  # why the arithmetic is in fp32


def test_the_loss_by_hand():
    """The model sees the straight line from latents to noise, at each sample's sigma; its direction is the target."""
    generator = torch.Generator().manual_seed(0)
    names = ("latents", "control", "noise", "predicted")
    latents, control, noise, predicted = tensors = torch.randn(4, 3, 16, 8, 8, generator=generator)
    batch = dict(zip(names, tensors)) | {"sigma": torch.tensor([0.25, 0.5, 1.0]), "timestep": None, "mask": None}
    seen = {}
    model = lambda **inputs: seen.update(inputs) or [predicted.bfloat16()]  # noqa: E731
    shared = {"original_size": torch.zeros(1), "image_rotary_emb": torch.zeros(1, 16)}
    loss = cv4ctrl.batch_loss(model, shared, batch | {"prompt_embeds": torch.zeros(3, 16, 32)})
    assert torch.equal(seen["hidden_states"][:, 16:], control)
    for x, a, b, sigma in zip(seen["hidden_states"][:, :16], latents, noise, (0.25, 0.5, 1.0)):
        torch.testing.assert_close(x, a + sigma * (b - a))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ((predicted.bfloat16() - (noise - latents)) ** 2).mean(), rtol=1e-6, atol=0)
