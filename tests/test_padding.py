"""Captions of several lengths share a batch without touching each other; entries of the cache are read as inference
computes them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from diffusers import CogView4ControlPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor
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
    return sample | {"timestep": torch.tensor([100.0 + 250 * seed]), "prompt": prompt}


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


def test_garbage_in_the_padding_changes_nothing(model, samples, monkeypatch):
    """Losses and gradients stay bitwise what they were."""
    expected = losses_and_gradients(model, samples)
    lengths = {len(sample["prompt"]) for sample in samples}

    def pad_with_garbage(prompts, batch_first):
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=batch_first)
        for row, prompt in zip(padded, prompts):
            row[len(prompt) :] = 1e4 * torch.randn_like(row[len(prompt) :])
        assert (padded.abs().max() > 1e3) == (len(lengths) > 1)
        return padded

    monkeypatch.setattr(cv4ctrl, "pad_sequence", pad_with_garbage)
    for found, before in zip(losses_and_gradients(model, samples), expected, strict=True):
        assert all(map(torch.equal, found, before))


def test_attention_equals_the_installed_processor_sample_by_sample(model):
    attention = model.network.transformer_blocks[0].attn1
    image, captions = torch.randn(5, 64, 64, generator=torch.Generator().manual_seed(0)).split([16, 48], dim=1)
    runs = [(0, 1, 48), (1, 3, 16), (3, 4, 48), (4, 5, 32)]
    rotary = model.constant["image_rotary_emb"]
    found = cv4ctrl.PrefixAttention()(attention, image, captions, rotary, runs)
    for n, length in enumerate([48, 16, 16, 48, 32]):
        expected = CogView4AttnProcessor()(attention, image[n, None], captions[n, None, :length], None, rotary)
        torch.testing.assert_close(found[0][n], expected[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1][n, :length], expected[1][0], rtol=0, atol=1e-6)


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


def test_embeddings_in_the_cache_are_padded_as_the_pipeline_pads_them(base, config, device, tmp_path):
    """On the left to a multiple of 16 tokens, each caption by itself, though they are encoded in one run."""
    captions = ["", "fourteen bytes", "a caption that takes some more tokens than the others do"]
    columns = ("image", "conditioning_image", "text")
    rows = [dict(zip(columns, (*tiny.make_rows(1)[0][:2], text))) for text in captions]
    encoded = cv4ctrl.encode(config(encoded_dir=tmp_path), base, rows, device)
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=None, dtype=torch.bfloat16)
    for row, caption, length in zip(encoded.train, captions, (16, 16, 64), strict=True):
        (expected,) = pipe.encode_prompt(caption, do_classifier_free_guidance=False)[0]
        assert len(expected) == length and torch.equal(encoded.entry(row.caption_key), expected)


def test_draws_from_a_posterior_are_those_of_diffusers_also_where_its_variance_is_extreme(tmp_path):
    """Log-variances of 50 and -50 are clamped."""
    moments = torch.cat([torch.zeros(16, 8, 8), torch.linspace(-50, 50, 16 * 64).view(16, 8, 8)]).bfloat16()
    save_file({"entry": moments}, tmp_path / "key.safetensors")
    encoded = cv4ctrl.Encoded(tmp_path, {}, "", [], [], [])
    posterior = DiagonalGaussianDistribution(moments[None].float())
    eps = torch.randn(16, 8, 8)
    assert torch.equal(encoded.latents("key", eps), (posterior.mean + posterior.std * eps)[0])
    assert torch.equal(encoded.latents("key"), posterior.mode()[0])
