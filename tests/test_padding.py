"""Captions of several lengths share a batch without touching each other, or what pads them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file

import cv4ctrl
import tiny

LENGTHS = [[16, 64, 32, 128], [48, 48, 16, 16], [32, 32, 32, 32]]


@pytest.fixture(scope="module")
def model(base):
    return cv4ctrl.VelocityModel(tiny.control_model(base), 64)


@pytest.fixture(params=LENGTHS, ids=str)
def samples(request):
    return [make_sample(seed, tokens) for seed, tokens in enumerate(request.param)]


def make_sample(seed, tokens):
    random = torch.Generator().manual_seed(seed)
    sample = dict(zip(("latents", "control", "noise"), torch.randn(3, 16, 8, 8, generator=random)))
    prompt = torch.randn(tokens, 32, generator=random).bfloat16()
    return sample | {"timestep": torch.tensor(100.0 + 250 * seed), "prompt": prompt}


def losses_and_gradients(model, samples):
    """Of each sample in the batch of these samples: [loss, its gradients by the weights]."""
    batch = cv4ctrl.collate(samples, model.device)
    sigma = cv4ctrl.shifted_sigma(batch["timestep"], model.image_tokens)
    noisy, velocity = cv4ctrl.straight_line(batch["latents"], batch["noise"], sigma)
    predicted = model(noisy, batch["control"], batch["prompts"], batch["timestep"])
    losses = F.mse_loss(predicted, velocity.to(model.dtype), reduction="none").mean((1, 2, 3))
    weights = list(model.network.parameters())
    return [[loss.detach(), *torch.autograd.grad(loss, weights, retain_graph=True)] for loss in losses]


def test_a_sample_in_a_batch_of_several_lengths_has_the_loss_and_gradients_it_has_alone(model, samples, base):
    """In fp32 to 1e-6 of the loss, and of the largest gradient of all; in fp64 to 1e-12 of the largest of each weight.

    In fp32 rounding alone, such as of a batch of equal lengths, makes up 1e-6 where terms of a gradient cancel."""
    exact = cv4ctrl.VelocityModel(tiny.control_model(base).double(), 64)
    for one, tolerance in (model, 1e-6), (exact, 1e-12):
        together = losses_and_gradients(one, samples)
        for sample, in_batch in zip(samples, together, strict=True):
            ((loss, *gradients),) = losses_and_gradients(one, [sample])
            assert all(gradient.any() for gradient in gradients)
            if one is model:
                gradients = [torch.cat([gradient.flatten() for gradient in gradients])]
                in_batch = [in_batch[0], torch.cat([gradient.flatten() for gradient in in_batch[1:]])]
            for found, expected in zip(in_batch, [loss, *gradients], strict=True):
                assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        loss = cv4ctrl.flow_matching_loss(one, cv4ctrl.collate(samples, one.device))
        mean = torch.stack([part for part, *_ in together]).mean()
        torch.testing.assert_close(loss.double(), mean.double(), rtol=1e-6, atol=0)


def test_attention_gets_no_mask_and_is_called_once_for_a_batch_of_one_length(model, samples, monkeypatch):
    calls, attend = [], F.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        calls.append((query.shape, attn_mask, is_causal))
        assert query.shape == key.shape == value.shape and not dropout_p and not more
        return attend(query, key, value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    cv4ctrl.flow_matching_loss(model, cv4ctrl.collate(samples, model.device)).backward()
    of_block = [(length, len(list(run))) for length, run in itertools.groupby(len(s["prompt"]) for s in samples)]
    assert calls == [((size, 4, 16 + length, 16), None, False) for length, size in of_block] * 2  # blocks


def test_draws_from_a_posterior_are_those_of_diffusers_also_where_its_variance_is_extreme(encoded, tmp_path):
    """Log-variances of 50 and -50 are clamped."""
    moments = torch.cat([torch.zeros(16, 8, 8), torch.linspace(-50, 50, 16 * 64).view(16, 8, 8)]).bfloat16()
    save_file({"entry": moments}, tmp_path / "key.safetensors")
    encoded = cv4ctrl.replace(encoded, config=cv4ctrl.replace(encoded.config, encoded_dir=tmp_path))
    posterior = DiagonalGaussianDistribution(moments[None].float())
    eps = torch.randn(16, 8, 8)
    assert torch.equal(encoded.latents("key", eps), (posterior.mean + posterior.std * eps)[0])
    assert torch.equal(encoded.latents("key"), posterior.mode()[0])
