"""Steps of the real engine are those of clip_grad_norm_ and torch.optim.AdamW on the plain model."""

import pytest
import torch
from safetensors.torch import save_file

import cv4ctrl
import ranks
import tiny

RATES = [1e-2, 3e-2, 5e-3]
# None is a default of torch; each shows in three steps. Rounding errors of gradients, which Adam divides by their own
# size, stay small beside this epsilon.
ADAM = dict(adam_beta1=0.5, adam_beta2=0.7, adam_epsilon=1e-2, adam_weight_decay=0.3)


def take_steps(engine, stream):
    """Three steps -> ([[loss, gradient norm]], weights after them)."""
    model = cv4ctrl.VelocityModel(engine, stream.config.resolution)
    batches = (stream.micro_batch(model.device, number) for number in range(2 * len(RATES)))
    steps = [cv4ctrl.train_step(engine, model, batches, stream.config, rate) for rate in RATES]
    figures = [(step["loss"], step["grad_norm"]) for step in steps]
    assert next(batches, None) is None and engine.global_steps == len(RATES)
    return figures, {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}


def three_steps(argv, file):
    """A job for ranks: the steps of a run -> their figures; its weights go to a file."""
    figures = []

    def train(engine, stream, *_):
        found, weights = take_steps(engine, stream)
        figures.extend(found)
        if cv4ctrl.RANK == 0:
            save_file(weights, file)
        raise StopIteration

    ranks.main_with(argv, train=train)
    return figures


def plain_steps(model, stream, limit):
    """The same by torch alone, on whole global batches."""
    config, figures = stream.config, []
    weights = list(model.network.parameters())
    betas = config.adam_beta1, config.adam_beta2
    decay = config.adam_weight_decay
    optimizer = torch.optim.AdamW(weights, betas=betas, eps=config.adam_epsilon, weight_decay=decay)
    for number, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = cv4ctrl.flow_matching_loss(model, stream.micro_batch(model.device, number))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, limit or float("inf"))
        optimizer.step()
        figures.append((loss.item(), norm.item()))
    return figures, dict(model.network.named_parameters())


@pytest.mark.parametrize("world, limit", [(1, 0.1), (1, 100.0), (1, 0.0), (2, 0.1), (2, 100.0)])
def test_three_steps_equal_torch(world, limit, base, config, flags, encoded, device, tmp_path):
    """ZeRO-2, accumulation 2; with gradients above --max_grad_norm, below it, and with 0, which never clips."""
    options = ADAM | {"max_grad_norm": limit, "gradient_accumulation_steps": 2, "proportion_empty_prompts": 0.2}
    asked = config(world=world, train_batch_size=4 // world, recompute="all", **options)
    if world == 1:
        settings = cv4ctrl.engine_settings(asked)
        settings["zero_optimization"]["offload_optimizer"]["device"] = "none"
        network = tiny.load(base)
        engine = cv4ctrl.start_engine(asked, settings, network)
        figures, found = take_steps(engine, cv4ctrl.replace(encoded, config=asked))
    else:
        argv = flags(tmp_path / "run", train_batch_size=2, **options)
        ((code, figures),) = ranks.launch(2, ("test_engine.three_steps", [argv, tmp_path / "weights.safetensors"]))
        found = ranks.weights(tmp_path)
    whole = config(train_batch_size=8, **options | {"gradient_accumulation_steps": 1})
    model = cv4ctrl.VelocityModel(tiny.load(base), 64)
    expected, weights = plain_steps(model, cv4ctrl.replace(encoded, config=whole), limit)
    for (loss, norm), (expected_loss, expected_norm) in zip(figures, expected, strict=True):
        assert (loss, norm) == pytest.approx((expected_loss, expected_norm), rel=1e-5)
        assert limit == 0 or (expected_norm > 2 * limit) == (limit < 1)
    assert ranks.same(found, weights, 1e-6)
