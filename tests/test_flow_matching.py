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


class Recorder:
    """A model of 64 x 64 pixels that notes its inputs and always answers the same."""

    image_tokens, device = 16, torch.device("cpu")

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.answer


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 1000])
def test_timesteps_of_the_sampler_are_the_pipelines(steps):
    noise = torch.zeros(1, 16, 8, 8)
    model = Recorder(noise)
    cv4ctrl.euler_sample(model, noise, noise, None, None, steps, 1.0)
    assert [timestep.item() for *_, timestep in model.calls] == np.linspace(1000, 1.0, steps).astype(np.int64).tolist()


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.5])
def test_guidance_leads_away_from_the_velocity_of_the_empty_prompt(guidance):
    """A guidance of 1 or less is none, and does not ask for that velocity."""
    x, control, timestep, empty, prompt = torch.zeros(1), torch.ones(1), torch.tensor([7.0]), "empty", "prompt"
    calls = []

    def model(*inputs):
        calls.append(inputs)
        return torch.tensor([2.0 if inputs[2] == [prompt] else 0.5])

    found = cv4ctrl.guided_velocity(model, x, control, prompt, empty, timestep, guidance)
    prompts = [[prompt], [empty]] if guidance > 1 else [[prompt]]
    assert calls == [(x, control, one, timestep) for one in prompts]
    assert found.item() == (0.5 + 3.5 * 1.5 if guidance > 1 else 2.0)


def test_sigma_at_its_ends_and_all_levels_apart():
    assert cv4ctrl.shifted_sigma(torch.tensor([0.0, 1000.0]), 64 * 64).tolist() == [0.0, 1.0]
    sigma = cv4ctrl.shifted_sigma(torch.arange(1, 1001), 64 * 64)  # 1024 px
    assert sigma.dtype == torch.float32 and len(sigma.unique()) == 1000
    assert len(sigma.bfloat16().unique()) < 400  # why the arithmetic is in fp32


def test_the_loss_by_hand():
    """The model sees the straight line from latents to noise, at each sample's sigma; its direction is the target."""
    random = torch.Generator().manual_seed(0)
    names = ("latents", "control", "noise", "predicted")
    latents, control, noise, predicted = tensors = torch.randn(4, 3, 16, 8, 8, generator=random)
    batch = dict(zip(names, tensors)) | {"timestep": torch.tensor([250.0, 500.0, 1000.0]), "prompts": ["a", "b", "c"]}
    model = Recorder(predicted.bfloat16())
    loss = cv4ctrl.flow_matching_loss(model, batch)
    ((noisy, *others),) = model.calls
    assert torch.equal(others[0], control) and others[1:] == [batch["prompts"], batch["timestep"]]
    mu = 0.75 * 0.25 + 0.25  # of 16 tokens
    for x, a, b, s in zip(noisy, latents, noise, (0.25, 0.5, 1.0), strict=True):
        sigma = mu * s / (mu * s + 1 - s)
        torch.testing.assert_close(x, a + sigma * (b - a))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ((predicted.bfloat16() - (noise - latents)) ** 2).mean(), rtol=1e-6, atol=0)
