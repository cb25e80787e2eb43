"""Flow matching, held against the installed scheduler and the training utilities of diffusers."""

from unittest import mock

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


def test_the_loss_by_hand():
    """The model sees the straight line from latents to noise, at each sample's sigma; its direction is the target."""
    random = torch.Generator().manual_seed(0)
    names = ("latents", "control", "noise", "predicted")
    latents, control, noise, predicted = tensors = torch.randn(4, 3, 16, 8, 8, generator=random)
    batch = dict(zip(names, tensors)) | {"timestep": torch.tensor([250.0, 500.0, 1000.0]), "prompts": ["a", "b", "c"]}
    model = mock.Mock(return_value=predicted.bfloat16(), image_tokens=16)
    loss = cv4ctrl.flow_matching_loss(model, batch)
    noisy, *others = model.call_args.args
    assert torch.equal(others[0], control) and others[1:] == [batch["prompts"], batch["timestep"]]
    mu = 0.75 * 0.25 + 0.25  # of 16 tokens
    for x, a, b, s in zip(noisy, latents, noise, (0.25, 0.5, 1.0), strict=True):
        sigma = mu * s / (mu * s + 1 - s)
        torch.testing.assert_close(x, a + sigma * (b - a))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ((predicted.bfloat16() - (noise - latents)) ** 2).mean(), rtol=1e-6, atol=0)
