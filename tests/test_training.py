"""Rooms 9 to 11: real engines in fresh processes. Each launch serves several tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogView4Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

import cv4ctrl
from ranks import launch, same, weights

ROOT = Path(__file__).parents[1]
EPSILON = 1e-3  # Adam divides rounding noise by its own size: with this, weights differ no more than gradients do


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory, encoded):  # after the shared cache is filled
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def zero(out):
    """ds_config.json with another ZeRO stage."""

    def write(stage):
        settings = json.loads((ROOT / "ds_config.json").read_text())
        settings["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}  # else ZeRO-3 would not cut so small tensors
        (out / f"zero{stage}.json").write_text(json.dumps(settings))
        return out / f"zero{stage}.json"

    return write


@pytest.fixture(scope="module")
def alone(out, flags):
    """One rank: 6 steps at once; 3 steps, the rest later; encoders counted; a mid-epoch position and loader workers."""
    common = dict(checkpointing_steps=3, validation_steps=2, proportion_empty_prompts=0.2, dataloader_num_workers=2, adam_epsilon=EPSILON)
    return launch(
        1,
        flags(out / "six", **common, max_train_steps=6, checkpoints_total_limit=0),
        flags(out / "three", **common, max_train_steps=3),
        ("count_encoders", [flags(out / "counted", max_train_steps=4)]),
        flags(out / "pictures", max_train_steps=2, num_validation_images=1, num_inference_steps=2, validation_steps=1, report_to="csv"),
        flags(out / "seldom", **common | dict(validation_steps=100), max_train_steps=6),
        flags(out / "blocks", only_target_transformer_blocks=True, max_train_steps=2, mixed_precision="bf16"),
    )


@pytest.fixture(scope="module")
def resumed(out, flags, alone):
    """The second half in a fresh process, on a copy of `three` whose log and leftovers look like those of a killed run."""
    shutil.copytree(out / "three", out / "resumed")
    with open(out / "resumed" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.0}) + "\n" + '{"step": 5, "lo')
    for step in (5, 6):
        (out / "resumed" / f".checkpoint-{step}.tmp").mkdir()
        (out / "resumed" / f".checkpoint-{step}.tmp" / "junk").write_text("left by a kill")
    common = dict(checkpointing_steps=3, validation_steps=2, proportion_empty_prompts=0.2, dataloader_num_workers=2, adam_epsilon=EPSILON)
    argv = flags(out / "resumed", **common, max_train_steps=6)
    return launch(1, argv, argv)


@pytest.fixture(scope="module")
def pair(out, flags, zero, shipped, alone):
    """Two ranks: the same samples as one rank; gradients; all ZeRO stages in bf16."""
    common = dict(checkpointing_steps=3, validation_steps=2, proportion_empty_prompts=0.2, train_batch_size=2, dataloader_num_workers=1, adam_epsilon=EPSILON)
    accumulated = flags(out / "gradients", train_batch_size=2, gradient_accumulation_steps=2, proportion_empty_prompts=0.2, recompute_blocks=1)
    stages = [
        flags(out / f"stage{stage}", deepspeed_config=zero(stage), mixed_precision="bf16", train_batch_size=2, num_validation_images=1,
              num_inference_steps=2, validation_steps=2, adam_epsilon=EPSILON, learning_rate=1e-2)
        for stage in (0, 1, 2, 3)  # the large rate makes a step much larger than the rounding of exported bf16 weights
    ]  # fmt: skip
    six, three = (flags(out / name, **shipped, max_train_steps=6) for name in ("shipped-six", "shipped-three"))
    fresh = flags(out / "encoded-by-two", encoded_dir=out / "encoded", max_train_steps=1, train_batch_size=2)
    return launch(2, flags(out / "two", **common, max_train_steps=6), ("count_encoders", [fresh]), ("gradients", [accumulated, str(out / "gradients.safetensors")]),
                  six, ("stop_after_saving", [three, 3]), *stages)  # fmt: skip  # ZeRO-3 last: it replaces F.linear for good


@pytest.fixture(scope="module")
def shipped():
    """As it is shipped: bf16, ZeRO-2, cosine with warm-up, accumulation, gradient checkpointing, loader workers."""
    return dict(checkpointing_steps=3, proportion_empty_prompts=0.2, train_batch_size=2, gradient_accumulation_steps=2, mixed_precision="bf16",
                lr_scheduler="cosine", lr_warmup_steps=2, dataloader_num_workers=1, weighting_scheme="logit_normal")  # fmt: skip


def test_run_leaves_what_the_readme_says(alone, out):
    assert all(code == 0 for code, _ in alone)
    run = out / "six"
    assert {f.name for f in run.iterdir()} == {
        ".lock", "run.json", "metrics.jsonl", "checkpoint-3", "checkpoint-6", "config.json", "diffusion_pytorch_model.safetensors"}  # fmt: skip
    assert {f.name for f in (run / "checkpoint-6").iterdir()} == {"transformer", "state", "manifest.json"}
    manifest = json.loads((run / "checkpoint-6" / "manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["samples"] == 24 and manifest["identity"]["seed"] == 0
    listed = {str(f.relative_to(run / "checkpoint-6")) for f in (run / "checkpoint-6").rglob("*") if f.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == listed
    rows = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 7)) and [row["samples"] for row in rows] == list(range(4, 25, 4))
    assert rows[0].keys() == {"step", "samples", "loss", "lr", "grad_norm", "samples_per_s", "skipped"} and rows[0]["grad_norm"] > 0
    about = json.loads((run / "run.json").read_text())
    assert about["config"]["seed"] == 0 and about["deepspeed"]["train_batch_size"] == 4 and about["versions"]["deepspeed"]
    final, last = run / "diffusion_pytorch_model.safetensors", run / "checkpoint-6" / "transformer"
    assert final.samefile(last / "diffusion_pytorch_model.safetensors")  # a hard link


def test_exported_weights_load_and_differ_from_the_base(alone, out, base):
    model = CogView4Transformer2DModel.from_pretrained(out / "six" / "checkpoint-6" / "transformer")
    assert (model.config.in_channels, model.config.out_channels) == (32, 16)
    assert model.patch_embed.proj.weight[:, 64:].abs().max() > 0
    final = CogView4Transformer2DModel.from_pretrained(out / "six")
    assert same(dict(final.named_parameters()), dict(model.named_parameters()))
    assert not same(weights(out / "six"), weights(out / "three"))


def test_six_steps_equal_three_and_three_bitwise(alone, resumed, out):
    assert [code for code, _ in resumed] == [0, 0]  # the second time there was nothing left to do
    assert same(weights(out / "six"), weights(out / "resumed"))
    drop = ("samples_per_s",)
    a, b = ([{n: v for n, v in row.items() if n not in drop} for row in metrics(out / run)] for run in ("six", "resumed"))
    assert a == [row for row in b if row["step"] != 3 or "loss" in row]  # `three` also probed at its own end
    assert not list((out / "resumed").rglob("junk"))
    assert same(*(weights(out / run / "checkpoint-6" / "state") for run in ("six", "resumed")))


def test_two_ranks_as_shipped_resume_bitwise(pair, out, flags, shipped):
    argv = flags(out / "shipped-three", **shipped, max_train_steps=6)
    assert list(cv4ctrl.checkpoints(out / "shipped-three")) == [3]
    assert launch(2, argv) == [[0, None]]
    assert same(weights(out / "shipped-six"), weights(out / "shipped-three"))
    lr = [row["lr"] for row in metrics(out / "shipped-three") if "loss" in row]
    assert lr[:3] == [0, 5e-4, 1e-3] and lr[3] > lr[4] > lr[5] > 0


def test_one_rank_and_two_end_in_the_same_weights(alone, pair, out):
    assert same(weights(out / "six"), weights(out / "two"), 1e-5)
    for name, rel, atol in (("loss", 1e-5, 0), ("probe_loss", 1e-5, 0), ("probe_loss_swapped", 1e-5, 0), ("control_gain", 0, 1e-5)):
        one, two = ([row[name] for row in metrics(out / run) if name in row] for run in ("six", "two"))
        assert one == pytest.approx(two, rel=rel, abs=atol) and len(one) == (6 if name == "loss" else 4), name


def test_gradients_of_the_engine_equal_plain_autograd(pair, out, config, encoded, base):
    """ZeRO-2, 2 ranks, accumulation 2, one of two blocks recomputed, against one process, one batch, no recomputation."""
    c = config(train_batch_size=8, proportion_empty_prompts=0.2)
    model = cv4ctrl.load_transformer(base / "transformer", None, torch.float32, torch.device("cpu"))
    frame = cv4ctrl.prepare(model, 64, torch.device("cpu"), torch.float32)
    cv4ctrl.batch_loss(model, frame, cv4ctrl.Stream(c, encoded, 0, 1)[0], "none").backward()
    ours = load_file(out / "gradients.safetensors")
    for name, parameter in model.named_parameters():
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-30)
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_and_exports(pair, stage, out, base):
    run = out / f"stage{stage}"
    assert all(code == 0 for code, _ in pair)
    model = CogView4Transformer2DModel.from_pretrained(run, torch_dtype=torch.bfloat16)
    before = cv4ctrl.load_transformer(base / "transformer", None, torch.bfloat16, torch.device("cpu"))
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())]
    assert sum(moved) > 0.9 * len(moved)
    ours, second = (weights(out / f"stage{s}") for s in (stage, 2))
    for name, before_name in ((n, before.get_parameter(n)) for n in ours):
        step = (second[name].float() - before_name.float()).norm()  # what two steps changed, here and there
        assert (ours[name].float() - second[name].float()).norm() <= 0.1 * step, name
    assert sorted(f.name for f in (run / "validation").iterdir()) == ["step-0.png", "step-2.png"]


def test_encoding_is_shared_by_the_ranks_and_serves_any_number(pair, encoded, out, config, base, device, monkeypatch):
    _, (pictures, captions) = pair[1]
    assert pictures == 48 and captions > 0  # rank 0's half of 2 x 48
    c = config(encoded_dir=out / "encoded")
    monkeypatch.setattr(cv4ctrl, "load_vae", lambda *_: pytest.fail("one rank encodes again what two have encoded"))
    assert cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device).train == encoded.train


def test_no_step_runs_an_encoder(alone):
    assert alone[2] == [0, [0, 0]]  # everything was in the cache; four steps called neither VAE nor text encoder


def test_pictures_and_tracker(alone, out):
    run = out / "pictures"
    assert sorted(f.name for f in (run / "validation").iterdir()) == ["step-0.png", "step-1.png", "step-2.png"]
    assert Image.open(run / "validation" / "step-2.png").width == 3 * 160
    logged = (run / "logs" / "cogview4_train_control" / "train_loss.csv").read_text().splitlines()
    assert len(logged) == 3 and logged[1].split(",")[0] == "1"


def test_frozen_weights_stay(alone, out, base):
    trained, before = weights(out / "blocks"), weights(base / "transformer")
    moved = {name for name in before if name != "patch_embed.proj.weight" and not torch.equal(trained[name], before[name])}
    assert moved and all(name.startswith(("transformer_blocks.", "patch_embed.proj.")) for name in moved)
    assert trained["patch_embed.proj.weight"][:, 64:].any()


def test_probing_leaves_the_training_alone(alone, out):
    """The same run with fewer evaluations ends in bitwise the same weights."""
    assert [row["step"] for row in metrics(out / "six") if "control_gain" in row] == [0, 2, 4, 6]
    assert [row["step"] for row in metrics(out / "seldom") if "control_gain" in row] == [0, 6]
    assert same(weights(out / "six"), weights(out / "seldom"))
    gains = [row["control_gain"] for row in metrics(out / "six") if "control_gain" in row]
    assert gains[0] == 0 and gains[-1] != 0  # the new columns start at zero


def test_old_checkpoints_go(alone, resumed, out):
    assert cv4ctrl.checkpoints(out / "six") == {3: out / "six" / "checkpoint-3", 6: out / "six" / "checkpoint-6"}
    assert cv4ctrl.checkpoints(out / "nothing") == {}


@pytest.fixture()
def copy(alone, out, tmp_path):
    """A run with two checkpoints to damage."""
    shutil.copytree(out / "six", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("changes, name", [
    (dict(seed=1), "seed = 0"), (dict(total_batch_size=8), "total_batch_size = 4"), (dict(resolution=96), "resolution = 64"),
    (dict(max_train_samples=40), "rows = 44"), (dict(proportion_empty_prompts=0.5), "proportion_empty_prompts = 0.2"),
    (dict(weighting_scheme="mode"), "weighting_scheme = none"), (dict(probe_samples=2), "rows = 44"),
    (dict(mixed_precision="bf16"), "mixed_precision = no"), (dict(only_target_transformer_blocks=True), "only_target_transformer_blocks = False"),
])  # fmt: skip
def test_another_sample_stream_is_refused_by_name(changes, name, copy, flags, refused, tmp_path):
    argv = dict(checkpointing_steps=3, proportion_empty_prompts=0.2, max_train_steps=9) | changes
    before = sorted(copy.rglob("*"))
    line = refused(flags(copy, **argv), progress=True)
    assert name in line and "checkpoint-6" in line, line
    assert sorted(copy.rglob("*")) == before
    flag, saved = name.split(" = ")
    way = {"rows": "restore the data", "only_target_transformer_blocks": "give --no_only_target_transformer_blocks"}
    assert way.get(flag, f"give --{flag} {saved}") in line, line


def test_on_more_ranks_the_refusals_lead_to_the_command_that_goes_on(copy, config):
    manifest, common = json.loads((copy / "checkpoint-6" / "manifest.json").read_text()), dict(proportion_empty_prompts=0.2)
    identity = lambda c: {name: getattr(c, name) for name in cv4ctrl.IDENTITY}  # noqa: E731
    with pytest.raises(cv4ctrl.Refusal, match="give --total_batch_size 4"):
        cv4ctrl.refuse_another(copy, manifest, identity(config(copy, world=2, **common)))
    with pytest.raises(cv4ctrl.Refusal, match="--train_batch_size 2 would do"):
        config(copy, world=2, **common, total_batch_size=4)
    cv4ctrl.refuse_another(copy, manifest, identity(config(copy, world=2, **common, total_batch_size=4, train_batch_size=2)))


def test_changed_captions_are_another_stream(copy, flags, refused, tmp_path):
    import tiny

    rows = tiny.make_rows(48)
    data = tiny.write_parquet(tmp_path / "data", [(*rows[0][:2], "changed"), *rows[1:]])
    assert "content of the rows" in refused(flags(copy, dataset_name=data, proportion_empty_prompts=0.2, max_train_steps=9), progress=True)


def test_the_newest_whole_checkpoint_is_found(copy, config, device):
    find = lambda **options: cv4ctrl.find_checkpoint(config(copy, **options))  # noqa: E731
    assert find()[0].name == "checkpoint-6"
    assert find(resume_from_checkpoint="checkpoint-6")[1]["step"] == find(resume_from_checkpoint=copy / "checkpoint-6")[1]["step"] == 6
    with pytest.raises(cv4ctrl.Refusal, match="holds checkpoint-6"):  # going back would leave two branches in one folder
        find(resume_from_checkpoint="checkpoint-3")
    state = next((copy / "checkpoint-6" / "state").iterdir())
    content = bytearray(state.read_bytes())
    content[1000] ^= 1
    state.write_bytes(content)
    assert find()[0].name == "checkpoint-3"
    (copy / "checkpoint-3" / "manifest.json").write_text("")
    with pytest.raises(cv4ctrl.Refusal, match="not whole"):
        find()


def test_the_checkpoint_just_written_is_never_the_one_that_goes(copy, config, monkeypatch, device):
    """A damaged checkpoint-6 was passed over: when checkpoint-4 is written, 6 goes, and then the oldest."""
    monkeypatch.setattr(cv4ctrl, "state_parts", lambda engine: [])
    monkeypatch.setattr(cv4ctrl, "export", lambda engine, folder, upcast: folder.mkdir())
    for limit, left in ((2, [3, 4]), (1, [5]), (0, [5, 6])):
        step = 4 if limit == 2 else 5 if limit == 1 else 6
        cv4ctrl.save_checkpoint(None, config(copy, checkpoints_total_limit=limit), step, {})
        assert list(cv4ctrl.checkpoints(copy)) == left


def test_starting_anew_over_checkpoints_is_refused(copy, flags, refused):
    line = refused(flags(copy, resume_from_checkpoint="none"))
    assert "--resume_from_checkpoint none" in line and "output_dir" in line


def test_an_exported_checkpoint_is_a_base(copy, flags, config, base):
    c = config(pretrained_model_name_or_path=copy / "checkpoint-6")
    folder, transformer = cv4ctrl.find_base(c)
    assert folder == base and transformer == copy / "checkpoint-6" / "transformer"
    cv4ctrl.check_base(c, folder, transformer)
    for other in (copy, copy / "checkpoint-6" / "transformer"):  # the run's folder, and the transformer alone
        assert cv4ctrl.find_base(config(pretrained_model_name_or_path=other)) == (folder, transformer)
    assert cv4ctrl.trace(str(copy)) == (str(base), transformer)  # what a checkpoint made from it will name as its base
    model = cv4ctrl.load_transformer(transformer, None, torch.float32, torch.device("cpu"))
    assert same(dict(model.named_parameters()), weights(transformer)) and model.config.in_channels == 32


@pytest.mark.parametrize("name", cv4ctrl.Config.__dataclass_fields__["lr_scheduler"].metadata["choices"])
def test_learning_rate_is_that_of_the_examples_schedules(name, config):
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=12, num_cycles=2, power=2.0)
    ours = cv4ctrl.schedule(config(lr_scheduler=name, lr_warmup_steps=3, lr_num_cycles=2, lr_power=2.0), 12)
    for step in range(12):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_step_costs_little_more_than_the_bare_mathematics(out, flags, tmp_path):
    """32 x 112 tokens for 2.1 M parameters. ZeRO copies each gradient a few times, whatever the batch: with few tokens a
    parameter that shows (1.3 at batch 4, 1.2 at 16), with the 33,000 tokens of a real micro-batch it does not."""
    import tiny

    wide = tiny.make_base(tmp_path / "wide", layers=4, heads=6, head_dim=32)
    argv = flags(tmp_path / "cost", no_gradient_checkpointing=True, pretrained_model_name_or_path=wide, resolution=128,
                 encoded_dir=tmp_path / "cache", dataloader_num_workers=1, max_train_steps=15, train_batch_size=32, max_train_samples=40)  # fmt: skip
    [(_, (trained, bare))] = launch(1, ("cost_of_a_step", [argv]))
    print(f"a step costs {trained / bare:.3f} of the bare one")
    assert trained <= 1.25 * bare, (trained, bare)


def test_workers_start_before_the_state_is_there(flags, refused, out, monkeypatch):
    """Forked from a process with the optimizer's state in host memory, they would keep a copy of it for good."""
    seen, load, me = [], cv4ctrl.load_transformer, cv4ctrl.psutil.Process()

    def load_transformer(*args):
        seen.append([child.cmdline() for child in me.children()].count(me.cmdline()))  # forked, not started
        return load(*args)

    def start_engine(*_):
        raise cv4ctrl.Refusal("seen")

    monkeypatch.setattr(cv4ctrl, "load_transformer", load_transformer), monkeypatch.setattr(cv4ctrl, "start_engine", start_engine)
    assert "seen" in refused(flags(out / "forked", dataloader_num_workers=2), progress=True)
    assert seen == [2]


def test_all_groups_of_ranks_wait_as_long(device):
    """The engine's as well, which DeepSpeed would make without a limit of its own."""
    from deepspeed.utils import groups

    limits = [group._get_backend(device).options._timeout for group in (cv4ctrl.dist.group.WORLD, groups._get_data_parallel_group())]
    assert limits[0] == limits[1] > cv4ctrl.datetime.timedelta(hours=1)


def test_deepspeeds_own_refusal_comes_before_encoding(flags, refused, tmp_path):
    settings = json.loads((ROOT / "ds_config.json").read_text())
    settings["zero_optimization"]["overlap_comm"] = "perhaps"
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    line = refused(flags(tmp_path / "out", deepspeed_config=tmp_path / "ds.json"))
    assert "overlap_comm" in line and not (tmp_path / "out").exists()


def test_torchrun_and_the_recipes_flags(out, flags):
    """torchrun, 2 ranks, with the flags of the original document as far as two CPU cores allow."""
    argv = flags(out / "torchrun", train_batch_size=1, lr_scheduler="cosine", lr_warmup_steps=1000, mixed_precision="bf16",
                 gradient_checkpointing=True, proportion_empty_prompts=0, max_train_steps=1, seed=0, offload=True)  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "cv4ctrl.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout and "done: weights in" in done.stdout and (out / "torchrun" / "checkpoint-1").is_dir()


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_compiled_blocks_train_the_same_weights(out, flags):
    """Captions of several lengths, recomputation and evaluation; the export has the usual names."""
    common = dict(max_train_steps=6, validation_steps=3, num_validation_images=1, num_inference_steps=2, proportion_empty_prompts=0.2, adam_epsilon=EPSILON)
    launch(1, flags(out / "eager", **common), flags(out / "compiled", **common, compile=True, recompute_blocks=1))
    assert same(weights(out / "compiled"), weights(out / "eager"), 1e-5)
    assert not same(weights(out / "compiled"), weights(out / "eager"))  # it was compiled


def test_deepspeed_launcher_passes_the_refusal_on(out, flags):
    """Two ranks that both refuse: exit code 2 and one line of ours, whoever is first."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    argv = flags(out / "refused", train_batch_size=64)
    done = subprocess.run([deepspeed, "--num_gpus=2", ROOT / "cv4ctrl.py", *argv], capture_output=True, text=True, timeout=300)
    ours = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("cv4ctrl.py:")]
    assert done.returncode == 2 and len(ours) == 1 and "128" in ours[0], done.stderr
    assert not (out / "refused").exists() and "Traceback" not in done.stderr
