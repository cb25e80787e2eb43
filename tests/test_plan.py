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
    *((1, 128, recompute, 1024, "bf16") for recompute in cv4ctrl.RECOMPUTE), (8, 1024, "all", 1024, "bf16"),
    *((8, 128, recompute, 1024, "bf16") for recompute in ("none", "some", "most")), (4, 224, "none", 512, "no"),
])  # fmt: skip
def test_activations_of_cogview4(batch, tokens, recompute, resolution, precision, cogview):
    """One forward and backward pass on tensors without data; gradients are freed once summed, as ZeRO-2 does it."""
    config = cv4ctrl.Config(train_batch_size=batch, resolution=resolution, mixed_precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = cv4ctrl.load_transformer(cogview / "transformer")
    cv4ctrl.recompute(model, recompute)
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
    costs, _ = cv4ctrl.cost_of_step(config, zero, model, cv4ctrl.Cards(1, "", 80e9, 1), tokens)
    assert live.now == 0 and costs[recompute]["activations"] == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize("stage", [1, 2])
def test_memory_of_a_step_of_a_real_engine(stage, config, device, base):
    """Of one rank, with small buckets, so that weights, gradients and Adam's state are most of it."""
    config = config(mixed_precision="bf16", train_batch_size=1)
    settings = cv4ctrl.engine_settings(config)
    settings["zero_optimization"] |= {"stage": stage, "reduce_bucket_size": 1, "allgather_bucket_size": 100_000}
    with Live() as live:
        model = cv4ctrl.load_transformer(base / "transformer", torch.bfloat16, device)
        chosen, costs, _ = cv4ctrl.fit_engine(config, settings, model, cv4ctrl.Cards(1, "CPU", math.inf, 0), 16)
        cv4ctrl.recompute(model, chosen.recompute)
        shared = cv4ctrl.prepare(model, config.resolution, device, torch.bfloat16)
        engine = cv4ctrl.start_engine(config, settings, model)
        live.peak = live.now
        cv4ctrl.train_step(engine, shared, iter([batch_of(config, 16, 32)]), config, 1e-3)
    assert sum(costs[chosen.recompute].values()) == pytest.approx(live.peak, rel=0.05)


# GB of a card at 1024 px with 128 tokens. 6.37 billion weights take 12.7 in bf16, buckets 0.5 (8 bytes for each number
# of the largest weight, 67 million), fp32 gradients 25.5 / N on N cards, and unless they are offloaded fp32 weights and
# Adam's moments 76.4 / N. 0.9 of a card can be used: 38.2, 76.5, 135.0. What remains for activations is in the
# table, without offloading and with it. They take with 1, 4, 8 samples: none 21.9, 86.2, 172.0; some 7.8, 30.2, 59.9;
# most 4.1, 15.2, 30.0; all 2.2, 7.7, 15.1. Offloading is last: it costs more than to recompute.
@pytest.mark.parametrize("number, card, left, left_offloaded, with_1, with_4, with_8", [
    (1, "A100-40GB", -77.0, -0.6, "all/cpu", "all/cpu", "all/cpu"),  # does not fit at all: refused by claim()
    (1, "A100-80GB", -38.7, 37.7, "none/cpu", "some/cpu", "most/cpu"),  # offloaded in any case: 21.9, 30.2, 30.0 fit
    (1, "H200-141GB", 19.8, 96.2, "some/none", "most/none", "all/none"),  # 7.8, 15.2, 15.1 fit, so none is offloaded
    (2, "A100-40GB", -26.0, 12.2, "some/cpu", "all/cpu", "all/cpu"),  # 7.8, 7.7 fit; 15.1 does not: refused
    (2, "A100-80GB", 12.3, 50.5, "some/none", "all/none", "most/cpu"),  # 7.8, 7.7 fit; 15.1 only offloaded, 30.0 then
    (2, "H200-141GB", 70.8, 109.0, "none/none", "some/none", "some/none"),  # 21.9, 30.2, 59.9 fit
    (4, "A100-40GB", -0.6, 18.5, "some/cpu", "most/cpu", "all/cpu"),  # offloaded in any case: 7.8, 15.2, 15.1 fit
    (4, "A100-80GB", 37.7, 56.8, "none/none", "some/none", "most/none"),  # 21.9, 30.2, 30.0 fit
    (4, "H200-141GB", 96.2, 115.3, "none/none", "none/none", "some/none"),  # 21.9, 86.2, 59.9 fit
    (8, "A100-40GB", 12.2, 21.7, "some/none", "all/none", "all/cpu"),  # 7.8, 7.7 fit; 15.1 only offloaded, 30.0 never
    (8, "A100-80GB", 50.5, 60.0, "none/none", "some/none", "most/none"),  # 21.9, 30.2, 30.0 fit; 59.9 does not
    (8, "H200-141GB", 109.0, 118.5, "none/none", "none/none", "some/none"),  # 21.9, 86.2, 59.9 fit
    (64, "A100-40GB", 23.3, 24.5, "none/none", "most/none", "all/none"),  # 21.9, 15.2, 15.1 fit
    (64, "A100-80GB", 61.6, 62.8, "none/none", "some/none", "some/none"),  # 21.9, 30.2, 59.9 fit
    (64, "H200-141GB", 120.1, 121.3, "none/none", "none/none", "some/none"),  # 21.9, 86.2, 59.9 fit
])  # fmt: skip
def test_what_is_given_up(number, card, left, left_offloaded, with_1, with_4, with_8, cogview, config):
    cards = cv4ctrl.Cards(number, card, *cv4ctrl.CARDS[card])
    model = cv4ctrl.load_transformer(cogview / "transformer")
    for batch, expected in ((1, with_1), (4, with_4), (8, with_8)):
        one = config(world=number, train_batch_size=batch, resolution=1024, mixed_precision="bf16")
        settings = cv4ctrl.engine_settings(one)
        chosen, costs, _ = cv4ctrl.fit_engine(one, settings, model, cards, 128)
        device = settings["zero_optimization"]["offload_optimizer"]["device"]
        assert f"{chosen.recompute}/{device}" == expected
        memory = costs[chosen.recompute]
        room = 0.9 * cards.memory - (sum(memory.values()) - memory["activations"])
        assert room / 1e9 == pytest.approx(left if device == "none" else left_offloaded, abs=0.1)


@pytest.mark.parametrize("memory, asked, offload, expected", [
    (80e9, "none", "auto", "none/cpu"), (80e9, "auto", "none", "all/none"), (80e9, "auto", "cpu", "some/cpu"),
    (80e9, "most", "none", "most/none"),  # too much, which is claim()'s to refuse
    (math.inf, "auto", "auto", "all/none"), (math.inf, "some", "auto", "some/none"),  # a device of unknown memory
])  # fmt: skip
def test_what_is_said_is_done(memory, asked, offload, expected, cogview, config):
    config = config(world=2, train_batch_size=4, resolution=1024, mixed_precision="bf16", recompute=asked)
    settings = cv4ctrl.engine_settings(config)
    settings["zero_optimization"]["offload_optimizer"]["device"] = offload
    model = cv4ctrl.load_transformer(cogview / "transformer")
    chosen, *_ = cv4ctrl.fit_engine(config, settings, model, cv4ctrl.Cards(2, "", memory, 0), 128)
    assert f"{chosen.recompute}/{settings['zero_optimization']['offload_optimizer']['device']}" == expected


def test_a_bucket_holds_the_largest_weight(cogview, config):
    model = cv4ctrl.load_transformer(cogview / "transformer")
    for asked, bucket in ((50_000_000, 2**26), (100_000_000, 100_000_000), ("auto", 2**26)):
        settings = cv4ctrl.engine_settings(config())
        settings["zero_optimization"]["reduce_bucket_size"] = asked
        cv4ctrl.fit_engine(config(), settings, model, cv4ctrl.Cards(8, "", 80e9, 1), 128)
        assert settings["zero_optimization"]["reduce_bucket_size"] == bucket


@pytest.mark.parametrize("memory, device, compiler, said", [
    (72.1e9, "none", "g++", "a step takes 100% of a card's usable memory"), (72e9, "cpu", None, "DeepSpeed needs g++"),
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
    for more in ((), ("--no_gradient_checkpointing",)):  # then it is too much, and offloaded
        cv4ctrl.main([*flags(tmp_path / "out", **common), *more])
        plan = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert plan["engine"] == "the shipped ds_config.json, ZeRO stage 2" and plan["rows"].startswith("48, ")
        assert plan["steps"] == f"1000 of 32 samples, {32 * 1000 / 48:.1f} epochs; 0 are done"
        assert plan["time"].startswith(f"{seconds:.1f} s a step, {seconds * 1000 / 3600:.1f} hours")
        assert plan["encode"].startswith("96 pictures and 49 captions")
        disk = 14 * 6.37, 48 * 2 * 32 * 128**2 * 2 / 1e9
        assert plan["disk"] == "{:.1f} GB a checkpoint, {:.1f} GB of encoded pictures".format(*disk)
        total, parts = plan["memory"].split(" of 76 usable GB, H100-80GB: ")
        sizes = {part: float(size) for part, size in (part.split() for part in parts.split(";")[0].split(", "))}
        assert float(total) == pytest.approx(sum(sizes.values()), abs=0.3)
        chosen, of_each = plan["--recompute"].split("; GB with ")
        of_each = dict(size.split() for size in of_each.split(", "))
        assert list(of_each) == ["none", "some", "most", "all"] and of_each[chosen] == total
        assert chosen == ("none" if more else "some")
        assert (sizes["weights"], sizes["gradients"], sizes["buckets"]) == (12.7, 3.2, 0.5)
        assert sizes["optimizer"] == (0 if more else 9.6) and ("of the hosts at least 115 GB" in parts) == bool(more)
    assert not list(tmp_path.iterdir())


def test_unknown_cards_and_a_large_model_without_a_gpu_are_refused(cogview, flags, refused, tmp_path, monkeypatch):
    for cards in ("8xTPU", "A100-80GB", "0xA100-80GB"):
        assert f"--plan_for {cards}" in refused(flags(tmp_path / "out", plan_for=cards))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refused(flags(tmp_path / "out", pretrained_model_name_or_path=cogview))
    assert not list(tmp_path.iterdir())
