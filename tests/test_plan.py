"""The plan: memory against the true shape on fake tensors and against a real engine, decisions, printed figures."""

import json
import math
import re
import shutil
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cv4ctrl
import tiny

TRUE_SHAPE = dict(
    num_layers=28, num_attention_heads=32, attention_head_dim=128, text_embed_dim=4096, time_embed_dim=512
)
TRUE_SHAPE |= dict(condition_dim=256, patch_size=2, in_channels=16, out_channels=16)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from their making until nobody holds them."""

    def __init__(self, *given):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in tree_leaves(given) if torch.is_tensor(tensor)}
        self.now = self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:  # else it is a view, or was written in place
                    self.change(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self.change, storage._cdata, -storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def change(self, key, size):
        self.known ^= {key}
        self.now += size


def batch_of(config, tokens, text_dim):
    """A micro-batch as collate makes it; of several samples one is padded."""
    size, side = config.train_batch_size, config.resolution // 8
    batch = {name: torch.zeros(size, 16, side, side) for name in ("latents", "control", "noise")}
    batch |= {name: torch.ones(size) for name in ("timestep", "sigma")}
    batch["prompt_embeds"] = torch.zeros(size, tokens, text_dim, dtype=torch.bfloat16)
    return batch | {"mask": torch.ones(size, tokens, dtype=torch.bool) if size > 1 else None}


@pytest.fixture(scope="module")
def cogview(base, tmp_path_factory):
    """CogView4-6B as far as a plan reads it: configurations and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("plan") / "CogView4-6B"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "transformer" / "config.json").write_text(json.dumps(TRUE_SHAPE))
    return folder


@pytest.mark.parametrize("batch, tokens, recompute, resolution, precision", [
    (1, 128, True, 1024, "bf16"), (8, 128, True, 1024, "bf16"), (8, 1024, True, 1024, "bf16"),
    (1, 128, False, 1024, "bf16"), (8, 128, False, 1024, "bf16"), (4, 224, False, 512, "no"),
])  # fmt: skip
def test_activations_of_cogview4(batch, tokens, recompute, resolution, precision, cogview):
    """One forward and backward pass on tensors without data; gradients are freed once summed, as ZeRO-2 does it."""
    options = dict(gradient_checkpointing=recompute, resolution=resolution, mixed_precision=precision)
    config = cv4ctrl.Config(train_batch_size=batch, **options)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = cv4ctrl.load_transformer(cogview / "transformer")
    if recompute:
        model.enable_gradient_checkpointing()
    with FakeTensorMode():
        weights = {name: torch.empty(weight.shape, dtype=dtype) for name, weight in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        shared = cv4ctrl.prepare(model, resolution, torch.device("cpu"), dtype)
        inputs = batch_of(config, tokens, 4096)
        with Live(list(model.parameters()), shared, inputs) as live:
            cv4ctrl.batch_loss(model, shared, inputs).backward()
    zero = {"stage": 2, "reduce_bucket_size": 0, "offload_optimizer": {"device": "none"}}
    planned = cv4ctrl.cost_of_step(config, zero, model, cv4ctrl.Cards(1, "", 80e9, 1), tokens)[0]["activations"]
    assert live.now == 0 and planned == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize("stage", [1, 2])
def test_memory_of_a_step_of_a_real_engine(stage, config, device, base):
    """Of one rank, with small buckets, so that weights, gradients and Adam's state are most of it."""
    config = config(mixed_precision="bf16", train_batch_size=1)
    settings = cv4ctrl.engine_settings(config)
    settings["zero_optimization"] |= {"stage": stage, "reduce_bucket_size": 1, "allgather_bucket_size": 100_000}
    with Live() as live:
        model = cv4ctrl.load_transformer(base / "transformer", torch.bfloat16, device)
        planned, _ = cv4ctrl.fit_engine(config, settings, model, cv4ctrl.Cards(1, "CPU", math.inf, 0), 16)
        shared = cv4ctrl.prepare(model, config.resolution, device, torch.bfloat16)
        engine = cv4ctrl.start_engine(config, settings, model)
        live.peak = live.now
        cv4ctrl.train_step(engine, shared, iter([batch_of(config, 16, 32)]), config, 1e-3)
    assert sum(planned.values()) == pytest.approx(live.peak, rel=0.05)


# GB a card, 8 samples of 1024 px with 128 tokens, blocks recomputed: 28.4 on any number of cards, of which bf16 weights
# 12.7 (6.37 billion), activations 15.1, buckets 0.5 (8 bytes for each of the 67 million numbers of the largest weight).
# Over N cards: fp32 gradients 25.5 / N, and unless offloaded fp32 weights and Adam's moments 76.4 / N.
# 0.94 of a card can be used: 37.6 of 40, 75.2 of 80, 132.5 of 141.
@pytest.mark.parametrize("number, card, device, needed", [
    (1, "A100-40GB", "cpu", 53.8),  # 130.3 if not offloaded; either is too much
    (1, "A100-80GB", "cpu", 53.8),  # 130.3 is more than 75.2
    (1, "H200-141GB", "none", 130.3),  # just less than 132.5
    (8, "A100-40GB", "cpu", 31.5),  # 28.4 + 3.2; with the optimizer's 9.6 more than 37.6
    (8, "A100-80GB", "none", 41.1), (8, "H200-141GB", "none", 41.1),  # 28.4 + 3.2 + 9.6
    (64, "A100-40GB", "none", 29.9), (64, "A100-80GB", "none", 29.9), (64, "H200-141GB", "none", 29.9),  # + 0.4 + 1.2
])  # fmt: skip
def test_what_is_offloaded(number, card, device, needed, cogview, config):
    config = config(world=number, train_batch_size=8, resolution=1024, mixed_precision="bf16")
    cards = cv4ctrl.Cards(number, card, *cv4ctrl.CARDS[card])
    model = cv4ctrl.load_transformer(cogview / "transformer")
    for asked, bucket in (
        (50_000_000, 2**26),
        (100_000_000, 100_000_000),
        ("auto", 2**26),
    ):  # at least the largest weight
        settings = cv4ctrl.engine_settings(config)
        settings["zero_optimization"]["reduce_bucket_size"] = asked
        memory, _ = cv4ctrl.fit_engine(config, settings, model, cards, 128)
        assert settings["zero_optimization"]["reduce_bucket_size"] == bucket
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == device
    assert sum(memory.values()) == pytest.approx(needed * 1e9, rel=0.002)


@pytest.mark.parametrize("memory, device, compiler, said", [
    (75.3e9, "none", "g++", "a step takes 100% of the memory"), (75e9, "cpu", None, "DeepSpeed needs g++"),
])  # fmt: skip
def test_what_cannot_run_is_refused(memory, device, compiler, said, config, cogview, monkeypatch):
    monkeypatch.setattr(cv4ctrl.shutil, "which", lambda name: compiler)
    config, model = config(), cv4ctrl.load_transformer(cogview / "transformer")
    settings = {"zero_optimization": {"offload_optimizer": {"device": device}}}
    with pytest.raises(cv4ctrl.Failure, match=re.escape(said)):
        cv4ctrl.claim(config, settings, model, cv4ctrl.Cards(8, "", 80e9, 1), {"weights": memory})


def test_the_printed_plan(cogview, flags, capsys, tmp_path):
    common = dict(pretrained_model_name_or_path=cogview, encoded_dir=None, resolution=1024, mixed_precision="bf16")
    common |= dict(max_train_steps=1000, plan_for="8xH100-80GB")
    longest = max(16 * math.ceil((2 + len(text)) / 16) for _, _, text in tiny.make_rows(48))  # 2, and a byte a token
    flops = 6 * 12 * 28 * 4096**2 * (4096 + longest) + 12 * 28 * 4096 * (4096 + longest) ** 2  # 167e12 with 128 tokens
    seconds = 4 * flops / (0.4 * 989e12)
    for more in ((), ("--no_gradient_checkpointing",)):  # then it is offloaded
        cv4ctrl.main([*flags(tmp_path / "out", **common), *more])
        plan = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert plan["engine"] == "the shipped ds_config.json, ZeRO stage 2" and plan["rows"].startswith("48, ")
        assert plan["steps"] == f"1000 of 32 samples, {32 * 1000 / 48:.1f} epochs; 0 are done"
        assert plan["time"].startswith(f"{seconds:.1f} s a step, {seconds * 1000 / 3600:.1f} hours")
        assert plan["encode"].startswith("96 pictures and 49 captions")
        disk = 14 * 6.37, 48 * 2 * 32 * 128**2 * 2 / 1e9
        assert plan["disk"] == "{:.1f} GB a checkpoint, {:.1f} GB of encoded pictures".format(*disk)
        total, parts = plan["memory"].split(" of 80 GB on each H100-80GB: ")
        sizes = {part: float(size) for part, size in (part.split() for part in parts.split(";")[0].split(", "))}
        assert float(total) == pytest.approx(sum(sizes.values()), abs=0.3)
        assert (sizes["weights"], sizes["gradients"], sizes["buckets"]) == (12.7, 3.2, 0.5)
        assert sizes["optimizer"] == (0 if more else 9.6) and ("of the hosts 115 GB" in parts) == bool(more)
    assert not list(tmp_path.iterdir())


def test_unknown_cards_and_a_large_model_without_a_gpu_are_refused(cogview, flags, refused, tmp_path, monkeypatch):
    for cards in ("8xTPU", "A100-80GB", "0xA100-80GB"):
        assert f"--plan_for {cards}" in refused(flags(tmp_path / "out", plan_for=cards))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refused(flags(tmp_path / "out", pretrained_model_name_or_path=cogview))
    assert not list(tmp_path.iterdir())
