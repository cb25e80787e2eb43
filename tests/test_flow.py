"""Room 3: flow matching, held against the installed scheduler and the installed training utilities."""

import math

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
    t = np.arange(1000, 0, -1).astype(np.float32)  # every level, driven as CogView4ControlPipeline does it
    timesteps, _ = retrieve_timesteps(scheduler, None, "cpu", t, t / 1000, mu=calculate_shift(tokens))
    torch.testing.assert_close(timesteps, torch.from_numpy(t), rtol=0, atol=0)  # unshifted: not so in diffusers 0.40, 0.41
    ours = cv4ctrl.shifted_sigma(torch.from_numpy(t), cv4ctrl.shift_mu(tokens))
    torch.testing.assert_close(ours, scheduler.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 1000])
def test_inference_timesteps_are_the_pipelines(steps):
    theirs = np.linspace(1000, 1.0, steps).astype(np.int64).astype(np.float32)
    torch.testing.assert_close(cv4ctrl.inference_timesteps(steps), torch.from_numpy(theirs), rtol=0, atol=0)


def test_shift_at_1024_px_and_ends():
    assert cv4ctrl.shift_mu(64 * 64) == 3.25
    t = torch.tensor([0.0, 1000.0])
    assert cv4ctrl.shifted_sigma(t, 3.25).tolist() == [0.0, 1.0]


def test_interpolation_ends_and_euler_with_true_velocity():
    x0, eps = torch.randn(2, 3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cv4ctrl.interpolate(x0, eps, torch.zeros(3)), x0)
    assert torch.equal(cv4ctrl.interpolate(x0, eps, torch.ones(3)), eps)
    v = cv4ctrl.velocity(x0, eps)
    half = cv4ctrl.interpolate(x0, eps, torch.full((3,), 0.5))
    torch.testing.assert_close(cv4ctrl.euler_step(eps, v, 1.0, 0.5), half)
    torch.testing.assert_close(cv4ctrl.euler_step(half, v, 0.5, 0.0), x0)


def test_all_levels_stay_apart():
    sigma = cv4ctrl.shifted_sigma(torch.arange(1, 1001), cv4ctrl.shift_mu(4096))
    assert sigma.dtype == torch.float32 and len(sigma.unique()) == 1000
    assert len(sigma.bfloat16().unique()) == 347  # why the arithmetic is in fp32


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "logit_normal", "mode", "none"])
def test_loss_weights_are_those_of_sd3(scheme):
    sigma = torch.linspace(0.01, 1, 100)
    theirs = compute_loss_weighting_for_sd3(scheme, sigma)
    torch.testing.assert_close(cv4ctrl.loss_weight(sigma, scheme), theirs)


@pytest.mark.parametrize("scheme, options", [
    ("none", {}), ("sigma_sqrt", {}), ("cosmap", {}), ("logit_normal", {"logit_mean": 0.4, "logit_std": 1.3}),
    ("mode", {"mode_scale": 1.29}),
])  # fmt: skip
def test_density_of_timesteps_is_that_of_sd3(scheme, options):
    n = 200_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ours = cv4ctrl.warp(uniform, scheme, **options).sort().values
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(scheme, n, generator=generator, **options).double().sort().values
    assert (ours - theirs).abs().max() < 0.01  # distance between the quantile functions


def test_timesteps_are_uniform_over_1_to_1000_and_u_counts_as_in_the_schedulers_table():
    u = (torch.arange(1000) + 0.5) / 1000
    assert cv4ctrl.timestep_of(u).tolist() == list(range(1000, 0, -1))
    assert cv4ctrl.timestep_of(torch.tensor([0.0, 1.0])).tolist() == [1000, 1]


def test_loss_is_the_mean_of_weighted_samples():
    a, b = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([1.0, 2.0, 0.5])
    by_hand = sum(w * ((x - y) ** 2).mean() for w, x, y in zip(weight, a, b)) / 3
    torch.testing.assert_close(cv4ctrl.flow_loss(a, b, weight), by_hand)
    assert cv4ctrl.flow_loss(a.bfloat16(), b, weight).dtype == torch.float32
    assert math.isclose(cv4ctrl.flow_loss(b, b, weight), 0)
