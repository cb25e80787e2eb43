"""The plan: memory against the true shape on fake tensors and against a real engine, decisions, printed figures."""

import contextlib
import json
import math
import shutil
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cv4ctrl
import tiny
from ranks import launch
from test_fp16_rejection import engine_file

TRUE_SHAPE = dict(num_layers=28, num_attention_heads=32, attention_head_dim=128, text_embed_dim=4096)
TRUE_SHAPE |= dict(time_embed_dim=512, condition_dim=256, patch_size=2, in_channels=16, out_channels=16)


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


def batch_of(config, lengths, text_dim):
    """A micro-batch as collate makes it, with captions of these lengths."""
    size, side = config.train_batch_size, config.resolution // 8
    batch = {name: torch.zeros(size, 16, side, side) for name in ("latents", "control", "noise")}
    prompts = [torch.zeros(length, text_dim, dtype=torch.bfloat16) for length in lengths]
    return batch | {"timestep": torch.ones(size), "prompts": prompts}


@pytest.fixture(scope="module")
def cogview(base, tmp_path_factory):
    """CogView4-6B as far as a plan reads it: configurations and a tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("plan") / "CogView4-6B"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "transformer" / "config.json").write_text(json.dumps(TRUE_SHAPE))
    for name in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        cv4ctrl.save_file({}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("recompute, lengths, resolution, precision", [
    *((recompute, [128], 1024, "bf16") for recompute in cv4ctrl.KEPT_PER_BLOCK), ("all", 8 * [1024], 1024, "bf16"),
    ("none", 4 * [224], 512, "no"), ("none", [16, 64, 64, 128], 1024, "bf16"),
])  # fmt: skip
def test_activations_of_cogview4(recompute, lengths, resolution, precision, cogview):
    """One forward and backward pass on tensors without data; gradients are freed once summed, as ZeRO-2 does it."""
    options = {"train_batch_size": len(lengths), "resolution": resolution, "mixed_precision": precision}
    config = cv4ctrl.Config(recompute=recompute, **options)
    network = cv4ctrl.empty_transformer(cogview / "transformer")
    cv4ctrl.recompute(network, recompute)
    with FakeTensorMode():
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        weights = {name: torch.empty(weight.shape, dtype=dtype) for name, weight in network.named_parameters()}
        network.load_state_dict(weights, assign=True)
        for weight in network.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        model = cv4ctrl.VelocityModel(network, resolution)
        inputs = batch_of(config, lengths, 4096)
        with Live(list(network.parameters()), model.constant, inputs) as live:
            cv4ctrl.flow_matching_loss(model, inputs).backward()
    zero = {"reduce_bucket_size": 0, "offload_optimizer": {"device": "none"}}
    memory, _ = cv4ctrl.cost_of_step(config, zero, network, cv4ctrl.Cards(1, "", 80e9, 1), max(lengths))
    assert live.now == 0 and memory["activations"] == pytest.approx(live.peak, rel=0.06)


@pytest.mark.parametrize("world", [1, 2])
def test_memory_of_a_step_of_a_real_engine(world, flags):
    argv = flags("unused", mixed_precision="bf16", recompute="all", train_batch_size=1)
    ((_, (planned, measured)),) = launch(world, ("test_memory.measure", [argv]))
    assert planned == pytest.approx(measured, rel=0.05)


def measure(argv):
    """On each rank -> [bytes planned for a step, bytes at its peak].

    The buckets hold just the largest weight, so that weights, gradients and Adam's state are most of it."""
    device = cv4ctrl.start_ranks()
    config = cv4ctrl.resolve(cv4ctrl.parse(argv), cv4ctrl.WORLD)
    folder = Path(config.pretrained_model_name_or_path, "transformer")
    largest = max(weight.numel() for weight in cv4ctrl.empty_transformer(folder).parameters())
    settings = cv4ctrl.engine_settings(config)
    settings["zero_optimization"] |= {"reduce_bucket_size": largest, "allgather_bucket_size": largest}
    with Live() as live:
        network = cv4ctrl.load_transformer(folder, torch.bfloat16, device)
        cards = cv4ctrl.Cards(cv4ctrl.WORLD, "CPU", math.inf, 0)
        config, settings, memory, _ = cv4ctrl.fit_engine(config, settings, network, cards, 16)
        cv4ctrl.recompute(network, config.recompute)
        engine = cv4ctrl.start_engine(config, settings, network)
        model = cv4ctrl.VelocityModel(engine, config.resolution)
        live.peak = live.now
        batch = batch_of(config, [16] * config.train_batch_size, 32)
        cv4ctrl.train_step(engine, model, iter([batch]), config, 1e-3)
    return [sum(memory.values()), live.peak]


# GB of a card at 1024 px with 128 tokens. 6.37 billion weights take 12.7 in bf16, buckets 0.5 (8 bytes for each number
# of the largest weight, 67 million), fp32 gradients 25.5 / N on N cards, and unless they are offloaded fp32 weights and
# Adam's moments 76.4 / N. 0.9 of a card can be used. Activations take with 1, 4, 8 samples: none 21.9, 86.2, 172.0;
# some 7.8, 30.2, 59.9; most 4.1, 15.2, 30.0; all 2.2, 7.7, 15.1. Offloading is last: it costs more than to recompute.
@pytest.mark.parametrize("number, memory, samples, asked, offload, expected", [
    (1, 42e9, 1, "auto", "auto", None),  # not even offloaded anything is left
    (1, 85e9, 1, "auto", "auto", "none/cpu"),  # 37.7 are left, without offloading nothing: 21.9 fit
    (1, 85e9, 8, "auto", "auto", "most/cpu"),  # of these 30.0
    (1, 150e9, 4, "auto", "auto", "most/none"),  # 19.8 are left: 15.2 fit, so nothing is offloaded
    (2, 85e9, 4, "auto", "auto", "all/none"),  # 12.3 are left: 7.7 fit
    (2, 85e9, 8, "auto", "auto", "most/cpu"),  # 15.1 do not, so it is offloaded, and 30.0 fit into 50.5
    (8, 85e9, 8, "auto", "auto", "most/none"),  # 50.5 are left: 30.0 fit
    (64, 150e9, 4, "auto", "auto", "none/none"),  # 120.1 are left: 86.2 fit
    (64, 150e9, 8, "auto", "auto", "some/none"),  # of these 59.9
    (2, 130e9, 4, "none", "auto", "none/cpu"), (2, 80e9, 4, "auto", "cpu", "some/cpu"),  # what is said is done
    (2, 80e9, 4, "auto", "none", "all/none"), (2, 80e9, 4, "most", "none", None),  # which is too much
    (2, math.inf, 4, "auto", "auto", "none/none"),  # a device of unknown memory
])  # fmt: skip
def test_what_is_given_up(number, memory, samples, asked, offload, expected, cogview, config, tmp_path):
    file = engine_file(tmp_path, "zero_optimization.offload_optimizer.device", offload)
    options = {"train_batch_size": samples, "resolution": 1024, "recompute": asked, "deepspeed_config": file}
    config = config(world=number, mixed_precision="bf16", **options)
    model = cv4ctrl.empty_transformer(cogview / "transformer")
    cards = cv4ctrl.Cards(number, "", memory, 0)
    with contextlib.nullcontext() if expected else pytest.raises(cv4ctrl.Failure, match="a step takes .*% of the"):
        chosen, settings, *_ = cv4ctrl.fit_engine(config, cv4ctrl.engine_settings(config), model, cards, 128)
    assert (
        not expected or f"{chosen.recompute}/{settings['zero_optimization']['offload_optimizer']['device']}" == expected
    )


@pytest.mark.parametrize("device, compiler, compiled, wrong", [
    ("cpu", None, None, True), ("none", None, True, True), ("none", None, None, False), ("cpu", "g++", True, False)
])  # fmt: skip
def test_a_machine_without_a_compiler_is_refused_where_one_is_needed(
    device, compiler, compiled, wrong, flags, refused, monkeypatch, tmp_path
):
    monkeypatch.setattr(cv4ctrl.shutil, "which", lambda name: compiler)
    file = engine_file(tmp_path, "zero_optimization.offload_optimizer.device", device)
    argv = [*flags(tmp_path / "out", deepspeed_config=file, compile=compiled), "--dry_run"]
    assert "need g++ on the PATH" in refused(argv) if wrong else cv4ctrl.main(argv) is None


def put_cards(monkeypatch, number, name, memory):
    """As if so many cards were here."""
    monkeypatch.setattr(cv4ctrl, "WORLD", number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    card = types.SimpleNamespace(name=name, total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)


def test_the_printed_plan(cogview, flags, capsys, tmp_path, monkeypatch):
    put_cards(monkeypatch, 8, "NVIDIA H100 80GB HBM3", 85e9)
    common = dict(pretrained_model_name_or_path=cogview, encoded_dir=None, resolution=1024, mixed_precision="bf16")
    longest = max(16 * math.ceil((2 + len(text)) / 16) for _, _, text in tiny.make_rows(48))  # 2, and a byte a token
    flops = 6 * 12 * 28 * 4096**2 * (4096 + longest) + 12 * 28 * 4096 * (4096 + longest) ** 2  # 167e12 with 128 tokens
    cv4ctrl.main([*flags(tmp_path / "out", **common, max_train_steps=1000), "--dry_run"])
    plan = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert plan["steps"] == "1000 of 32 samples, 0 done; 48 rows; NVIDIA H100 80GB HBM3"
    a, b = (4 * flops / (share * 989e12) for share in (0.35, 0.2))
    hours = a * 1000 / 3600, b * 1000 / 3600
    times = a, b, *hours, hours[0] / 2, hours[1] / 2  # a crash: 500 steps
    text = "{:.1f} to {:.1f} s a step, {:.1f} to {:.1f} hours; a crash costs {:.1f} to {:.1f}"
    assert plan["time"] == text.format(*times)
    total, parts = plan["memory"].split(" of 76 usable GB, some recomputed: ")
    assert parts.startswith("weights 12.7, gradients 3.2, buckets 0.5, optimizer 9.6, activations ")
    assert float(total) < 76 and plan["compile"].startswith("False: the first thing to try")
    put_cards(monkeypatch, 8, "Another Card", 85e9)  # of unknown speed
    file = engine_file(tmp_path, "zero_optimization.offload_optimizer.device", "cpu")
    cv4ctrl.main([*flags(tmp_path / "out", **common, deepspeed_config=file), "--dry_run"])
    text = capsys.readouterr().out
    assert "hours" not in text and "optimizer 137 GB in all" in text and ", optimizer" not in text
    file.unlink()
    assert not list(tmp_path.iterdir())


def test_a_large_model_without_a_gpu_is_refused(cogview, flags, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refused(flags(tmp_path / "out", pretrained_model_name_or_path=cogview))
    assert not list(tmp_path.iterdir())
