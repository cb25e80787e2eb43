"""Recomputation saves memory and changes nothing else."""

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

import cv4ctrl
import tiny


def micro_batch():
    """Three samples with captions of different lengths."""
    random = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(3, 16, 8, 8, generator=random) for name in ("latents", "control", "noise")}
    batch["timestep"] = torch.tensor([5.0, 300.0, 900.0])
    return batch | {"prompts": [torch.randn(length, 32, generator=random) for length in (16, 32, 20)]}


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
        assert network.is_gradient_checkpointing == (choice != "none")
        model = cv4ctrl.VelocityModel(engine, 64)
        engine.backward(cv4ctrl.flow_matching_loss(model, micro_batch()))
        found[choice] = [safe_get_full_grad(weight).clone() for weight in network.parameters()]
    for gradients in found.values():
        for gradient, expected in zip(gradients, found["none"], strict=True):
            assert expected.any() and torch.equal(gradient, expected)
