"""Flow matching, held against the installed scheduler and the training utilities of diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cogview4.pipeline_cogview4_control import calculate_shift, retrieve_timesteps
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

import cv4ctrl


@pytest.mark.parametrize("resolution", range(256, 2049, 256))
def test_sigma_and_timestep_are_the_schedulers(base, resolution):
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    tokens = (resolution // 16) ** 2
    t = np.arange(1000, 0, -1).astype(np.float32)  # every level, set as CogView4ControlPipeline sets it
    timesteps, _ = retrieve_timesteps(scheduler, None, "cpu", t, t / 1000, mu=calculate_shift(tokens))
    assert torch.equal(timesteps, torch.from_numpy(t))  # unshifted; not so in diffusers 0.40 and 0.41
    sigma = cv4ctrl.shifted_sigma(torch.from_numpy(t), cv4ctrl.shift_mu(tokens))
    torch.testing.assert_close(sigma, scheduler.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 1000])
def test_inference_timesteps_are_the_pipelines(steps):
    theirs = np.linspace(1000, 1.0, steps).astype(np.int64).astype(np.float32)
    assert torch.equal(cv4ctrl.inference_timesteps(steps), torch.from_numpy(theirs))


def test_sigma_at_its_ends_and_all_levels_apart():
    mu = cv4ctrl.shift_mu(64 * 64)  # 1024 px
    sigma = cv4ctrl.shifted_sigma(torch.arange(0, 1001), mu)
    assert (mu, sigma[0], sigma[-1], sigma.dtype) == (3.25, 0, 1, torch.float32)
    assert len(sigma.unique()) == 1001 and len(sigma.bfloat16().unique()) < 400  # why the arithmetic is in fp32


def test_interpolation_runs_straight_from_latents_to_noise():
    latents, noise = torch.randn(2, 3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = cv4ctrl.interpolate(latents, noise, torch.tensor([0, 0.25, 1]))
    assert torch.equal(mixed[0], latents[0]) and torch.equal(mixed[2], noise[2])
    for a, b, x, sigma in zip(latents, noise, mixed, (0, 0.25, 1)):  # each sample has its own sigma
        torch.testing.assert_close(x, a + sigma * (b - a))


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
def test_loss_weights_and_density_of_timesteps_are_those_of_sd3(scheme):
    sigma = torch.linspace(0.01, 1, 100)
    torch.testing.assert_close(cv4ctrl.loss_weight(sigma, scheme), compute_loss_weighting_for_sd3(scheme, sigma))
    count, generator = 200_000, torch.Generator().manual_seed(0)
    options = {"logit_mean": 0.4, "logit_std": 1.3, "mode_scale": 1.29}
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ours = cv4ctrl.timestep_of(uniform, scheme, **options).sort().values
    u = compute_density_for_timestep_sampling(scheme, count, generator=generator, **options)
    theirs = 1000 - (u.sort(descending=True).values * 1000).floor()  # an index into the scheduler's 1000 ... 1
    assert (ours - theirs).abs().max() < 10  # distance between the quantile functions


def test_timesteps_are_the_integers_1_to_1000():
    u = (torch.arange(1000) + 0.5) / 1000
    assert cv4ctrl.timestep_of(u).tolist() == list(range(1000, 0, -1))
    assert cv4ctrl.timestep_of(torch.tensor([0.0, 1.0])).tolist() == [1000, 1]


def test_loss_is_the_mean_of_weighted_samples_in_fp32():
    predicted, target = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 2.0, 0.5])
    by_hand = sum(w * ((x - y) ** 2).mean() for w, x, y in zip(weight, predicted, target)) / 3
    torch.testing.assert_close(cv4ctrl.flow_loss(predicted, target, weight), by_hand)
    torch.testing.assert_close(cv4ctrl.flow_loss(predicted.bfloat16(), target, weight), by_hand, rtol=1e-3, atol=0)
