"""The loss of a micro-batch: samples do not see each other, nor their padding. test_evaluation.py holds the call."""

import pytest
import torch

import cv4ctrl
import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ready(base):
    model = tiny.control_model(base)
    return model, cv4ctrl.prepare(model, 64, CPU, torch.float32)


def make_sample(seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    sample = dict(zip(("latents", "control", "noise"), torch.randn(3, 16, 8, 8, generator=generator)))
    embeds = torch.randn(tokens, 32, generator=generator).bfloat16()
    return sample | {"timestep": torch.tensor([100.0 + 50 * seed]), "prompt_embeds": embeds}


def test_loss_and_gradients_of_a_sample_do_not_depend_on_its_batch(ready):
    samples = [make_sample(seed, tokens) for seed, tokens in enumerate([16, 64, 32, 128])]

    def loss_and_gradients(samples):
        ready[0].zero_grad()
        batch = cv4ctrl.collate(samples, CPU)
        assert (batch["mask"] is None) == (len(samples) == 1)
        loss = cv4ctrl.batch_loss(*ready, batch)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in ready[0].parameters())]

    alone = [loss_and_gradients([sample]) for sample in samples]
    for together, *parts in zip(loss_and_gradients(samples), *alone):
        torch.testing.assert_close(together, sum(parts) / len(parts), rtol=1e-4, atol=1e-6)


def test_the_mask_masks(ready):
    batch = cv4ctrl.collate([make_sample(0, 16), make_sample(1, 64)], CPU)

    def predict():
        with torch.no_grad():
            inputs = [batch[name] for name in ("noise", "control", "prompt_embeds", "mask", "timestep")]
            return cv4ctrl.predict(*ready, *inputs)

    masked = predict()
    batch["prompt_embeds"][0, 16:] = 100.0  # pads of the first sample
    assert torch.equal(predict(), masked)
    batch["mask"][0, 16] = True
    opened = predict()
    assert (opened[0] - masked[0]).abs().max() > 1e-3 and torch.equal(opened[1], masked[1])
