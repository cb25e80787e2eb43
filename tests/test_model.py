"""Recomputation saves memory, compilation time, and neither changes anything else."""

import functools
import random

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch._dynamo.utils import counters

import cv4ctrl
import tiny
from ranks import launch, same, weights


def micro_batch(lengths=(16, 32, 20)):
    """A sample for each of these lengths of captions."""
    random = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(len(lengths), 16, 8, 8, generator=random) for name in ("latents", "control", "noise")}
    batch["timestep"] = torch.linspace(5, 900, len(lengths))
    return batch | {"prompts": [torch.randn(length, 32, generator=random) for length in lengths]}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_of_the_engine_are_bitwise_the_same_whatever_is_recomputed(precision, base, config, device):
    config = config(mixed_precision=precision, train_batch_size=3)
    settings = cv4ctrl.engine_settings(config)
    settings["zero_optimization"]["offload_optimizer"]["device"] = "none"
    found = {}
    for choice in cv4ctrl.KEPT_PER_BLOCK:
        network = tiny.control_model(base).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        cv4ctrl.recompute(network, choice)
        engine = cv4ctrl.start_engine(config, settings, network)  # its learning rate is 0
        model = cv4ctrl.VelocityModel(engine, 64)
        engine.backward(cv4ctrl.flow_matching_loss(model, micro_batch()))
        found[choice] = [safe_get_full_grad(weight).clone() for weight in network.parameters()]
    for gradients in found.values():
        for gradient, expected in zip(gradients, found["none"], strict=True):
            assert expected.any() and torch.equal(gradient, expected)


@pytest.fixture()
def compiler(monkeypatch):
    """What dynamo counts; it traces as always, but nothing is generated."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    return counters


@pytest.mark.parametrize(
    "choice", ["most", *(pytest.param(c, marks=pytest.mark.long) for c in ("none", "some", "all"))]
)
def test_compiled_blocks_are_whole_graphs_and_train_alike(choice, compiler, base, caplog):
    """Twenty steps with batches of any caption lengths, which need two graphs a sample and two more, at most."""
    found, graphs = {}, []
    for compiled in (False, True):
        network = tiny.control_model(base)
        cv4ctrl.recompute(network, choice, compiled)
        model = cv4ctrl.VelocityModel(network, 64, compiled)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        chance = random.Random(0)
        for _ in range(20):
            lengths = sorted(chance.choices(range(32, 112, 16), k=6))
            cv4ctrl.flow_matching_loss(model, micro_batch(lengths)).backward()
            optimizer.step()
            optimizer.zero_grad()
            graphs.append(compiler["stats"].get("unique_graphs", 0))
        found[compiled] = {name: weight.detach() for name, weight in network.named_parameters()}
    assert same(found[True], found[False], 1e-5)
    assert not compiler["graph_break"] and "recompile_limit" not in caplog.text
    assert graphs[19] == 0 < graphs[20] and graphs[-1] <= 14, graphs


@pytest.mark.long
@pytest.mark.parametrize("world, choice", [(1, "none"), (1, "some"), (1, "most"), (1, "all"), (2, "most")])
def test_a_compiled_run_ends_where_another_does(world, choice, flags, encoded, tmp_path):
    """Twenty steps of the real engine with the real compiler; a continued run may switch it on."""
    common = dict(train_batch_size=4 // world, recompute=choice, adam_epsilon=1e-3, checkpointing_steps=100)
    for folder, *runs in (("plain", (20, None)), ("compiled", (20, True)), ("half", (10, None), (20, True))):
        for steps, switch in runs:
            options = common | {"max_train_steps": steps, "validation_steps": 20, "compile": switch}
            assert launch(world, flags(tmp_path / folder, **options)) == [[0, None]]
    for folder in ("compiled", "half"):
        assert same(weights(tmp_path / folder), weights(tmp_path / "plain"), 1e-5)
