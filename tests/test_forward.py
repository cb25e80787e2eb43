"""The loss of a micro-batch: samples do not see each other, nor their padding. test_evaluation.py holds the call."""

import pytest
import torch

import cv4ctrl
import tiny

MU = cv4ctrl.shift_mu(16)  # of 64 px


@pytest.fixture(scope="module")
def ready(base):
    model = tiny.control_model(base)
    return model, cv4ctrl.prepare(model, 64, torch.device("cpu"), torch.float32)


def make_sample(seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    sample = dict(zip(("latents", "control", "noise"), torch.randn(3, 16, 8, 8, generator=generator)))
    embeds = torch.randn(tokens, 32, generator=generator).bfloat16()
    return sample | {"timestep": torch.tensor([100.0 + 50 * seed]), "prompt_embeds": embeds}


def test_loss_and_gradients_of_a_sample_do_not_depend_on_its_batch(ready):
    samples = [make_sample(seed, tokens) for seed, tokens in enumerate([16, 64, 32, 128])]

    def loss_and_gradients(samples):
        ready[0].zero_grad()
        batch = cv4ctrl.collate(samples, MU)
        assert (batch["mask"] is None) == (len(samples) == 1)
        loss = cv4ctrl.batch_loss(*ready, batch, "none")
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in ready[0].parameters())]

    alone = [loss_and_gradients([sample]) for sample in samples]
    for together, *parts in zip(loss_and_gradients(samples), *alone):
        torch.testing.assert_close(together, sum(parts) / len(parts), rtol=1e-4, atol=1e-6)


def test_the_scheme_weights_the_loss(ready):
    batch = cv4ctrl.collate([make_sample(1, 32)], MU)
    plain, weighted = (cv4ctrl.batch_loss(*ready, batch, scheme) for scheme in ("none", "cosmap"))
    torch.testing.assert_close(weighted, plain * cv4ctrl.loss_weight(batch["sigma"], "cosmap")[0])
