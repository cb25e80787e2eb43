"""Room 2: flags, ds_config.json and their contradictions; every mistake is one line and exit code 2, and nothing is written."""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cv4ctrl

ROOT = Path(__file__).parents[1]
EXAMPLE = """pretrained_model_name_or_path variant revision output_dir cache_dir seed resolution max_sequence_length
train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
proportion_empty_prompts gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
lr_num_cycles lr_power dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm logging_dir
allow_tf32 report_to mixed_precision dataset_name dataset_config_name image_column conditioning_image_column caption_column
max_train_samples validation_prompt validation_image num_validation_images validation_steps tracker_project_name jsonl_for_train
only_target_transformer_blocks guidance_scale upcast_before_saving weighting_scheme logit_mean logit_std mode_scale offload
log_dataset_samples push_to_hub hub_model_id use_8bit_adam hub_token""".split()


@pytest.fixture()
def engine_file(tmp_path):
    """Write a ds_config.json: the shipped one with changes."""

    def write(**changes):
        settings = json.loads((ROOT / "ds_config.json").read_text()) | changes
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
        return path

    return write


def test_every_flag_of_the_example_is_taken_or_refused_with_a_word(refused):
    assert len(set(EXAMPLE)) == 58
    for name in EXAMPLE:
        if name in cv4ctrl.Config.__dataclass_fields__:
            field = cv4ctrl.Config.__dataclass_fields__[name]
            words = {bool: [], int: ["3"], float: ["0.5"]}.get(field.type, [str((field.metadata.get("choices") or ["3"])[-1])])
            value = getattr(cv4ctrl.parse([f"--{name}", *words]), name)
            assert value in (True, 3, 0.5, words and words[0], words), name
        else:
            assert f"--{name} is not taken" in refused([f"--{name}"])


def test_the_readme_names_what_differs_from_the_example():
    section = (ROOT / "README.md").read_text().split("## From the diffusers example")[1].split("## Details")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `--")]
    assert {name[2:] for name, *_ in rows if name[2:] not in cv4ctrl.Config.__dataclass_fields__} == {"use_8bit_adam", "hub_token"}
    for name, _, here in rows:
        if field := cv4ctrl.Config.__dataclass_fields__.get(name[2:]):
            assert here.split(";")[0].split(",")[0] == ("on" if field.default is True else str(field.default)), name


def test_the_accelerate_file_has_its_counterparts(config, engine_file, device):
    """All that the README names, in one file: we take it, and DeepSpeed does."""
    section = (ROOT / "README.md").read_text().split("| accelerate_ds.yaml")[1].split("## Details")[0]
    parts, whole = [json.loads(part) for part in re.findall(r"`(\{.*?\})`", section)], {}
    for part in parts:
        for key, value in part.items():
            whole[key] = whole.get(key, {}) | value if isinstance(value, dict) else value
    settings = cv4ctrl.engine_settings(config(deepspeed_config=engine_file(**whole), mixed_precision="bf16"))
    assert settings["zero_optimization"]["stage"] == 2 and settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["bf16"]["enabled"] is True and settings["gradient_clipping"] == 1.0 and settings["gradient_accumulation_steps"] == 1


def test_dash_and_underscore_are_the_same_and_booleans_can_be_switched_off():
    a = cv4ctrl.parse(["--train-batch-size", "2", "--no-gradient-checkpointing", "--learning-rate=1e-3", "--output_dir", "a"])
    b = cv4ctrl.parse(["--train_batch_size=2", "--no_gradient_checkpointing", "--learning_rate", "1e-3", "--output_dir=a"])
    assert (a.train_batch_size, a.gradient_checkpointing, a.learning_rate) == (2, False, 1e-3)
    assert cv4ctrl.dataclasses.replace(a, output_dir=b.output_dir) == b
    assert cv4ctrl.parse(["--local_rank=3"]) == cv4ctrl.parse([]) == cv4ctrl.Config()
    assert cv4ctrl.parse(["--tracker_project_name", "xxhub_token"]).tracker_project_name == "xxhub_token"


def test_defaults_are_the_recipe_of_the_original_document():
    c = cv4ctrl.Config()
    assert (c.learning_rate, c.adam_weight_decay, c.lr_scheduler, c.lr_warmup_steps, c.seed) == (5e-5, 1e-4, "cosine", 1000, 0)
    assert (c.train_batch_size, c.mixed_precision, c.resolution, c.gradient_checkpointing) == (8, "bf16", 1024, True)
    assert cv4ctrl.resolve(cv4ctrl.dataclasses.replace(c, total_batch_size=128), 8).gradient_accumulation_steps == 2


def test_scale_lr_multiplies_by_the_samples_a_step():
    c = cv4ctrl.resolve(cv4ctrl.parse(["--scale_lr", "--learning_rate=1e-5", "--train_batch_size=4", "--gradient_accumulation_steps=2"]), 3)
    assert c.learning_rate == pytest.approx(24e-5) and c.total_batch_size == 24


@pytest.mark.parametrize("argv, words", [
    (["--no_such_flag"], ["no_such_flag"]),
    (["--lr_scheduler", "zigzag"], ["lr_scheduler", "zigzag", "cosine"]),
    (["--train_batch_size", "many"], ["train_batch_size", "many"]),
    (["--train_batch_size", "0"], ["train_batch_size", "at least 1"]),
    (["--seed", str(2**64)], ["seed", "at most 9223372036854775807"]), (["--timeout_minutes", "1e300"], ["timeout_minutes", "at most 43200"]),
    (["--output_dir", ""], ["output_dir"]), (["--pretrained_model_name_or_path="], ["pretrained_model_name_or_path"]),
    (["--learning_rate", "nan"], ["learning_rate", "finite"]),
    (["--learning_rate", "-1"], ["learning_rate"]), (["--adam_beta2", "1"], ["adam_beta2"]),
    (["--lr_scheduler", "polynomial", "--learning_rate", "1e-8"], ["polynomial", "1e-7"]),
    (["--output_dir", "runs[1]"], ["runs[1]"]), (["--detect_validation_image"], ["--control"]),
    (["--resolution", "1000"], ["resolution", "multiple of 16"]),
    (["--proportion_empty_prompts", "1.5"], ["proportion_empty_prompts", "at most 1"]),
    (["--mixed_precision", "fp16"], ["fp16", "bf16", "fp32"]),
    (["--mixed_precision", "fp8"], ["fp8", "bf16", "fp32"]),
    (["--use_8bit_adam"], ["use_8bit_adam", "offload_optimizer"]),
    (["--hub_token", "secret"], ["hub_token", "HF_TOKEN"]),
    (["--hub-token=secret"], ["HF_TOKEN"]), (["--report_to", "comet_ml"], ["comet_ml", "tensorboard"]),
    (["--config_file=accelerate_ds.yaml"], ["ds_config.json"]), (["--num_processes", "8"], ["--num_gpus"]),
    (["--total_batch_size", "6"], ["total_batch_size 6", "train_batch_size 4"]),
    (["--total_batch_size", "8", "--gradient_accumulation_steps", "4"], ["total_batch_size 8", "gradient_accumulation_steps is 4"]),
    (["--train_batch_size", "64"], ["44 rows", "64"]),
    (["--deepspeed_config", "/nowhere/ds.json"], ["/nowhere/ds.json", "No such file"]),
    (["--dataset_name", "/nowhere/data"], ["/nowhere/data", "No such file"]),
    (["--jsonl_for_train", "/nowhere/train.jsonl", "--dataset_name", cv4ctrl.Config.dataset_name], ["/nowhere/train.jsonl"]),
    (["--jsonl_for_train", "x.jsonl"], ["--dataset_name", "--jsonl_for_train", "one of them"]),
    (["--image_column", "photo"], ["image_column photo", "conditioning_image, text"]),
    (["--caption_column", "prompt"], ["caption_column prompt"]),
    (["--conditioning_image_column", "pose"], ["conditioning_image_column pose"]),
    (["--caption_column", "image"], ["caption_column image", "string"]),
    (["--validation_image", "/nowhere.png", "--validation_prompt", "a"], ["/nowhere.png"]),
    (["--validation_image", str(ROOT / "README.md"), "--validation_prompt", "a"], ["README.md", "image"]),
    (["--validation_prompt", "a"], ["validation_image", "both"]),
    (["--validation_image", "a", "b", "c", "--validation_prompt", "a", "b"], ["3", "2"]),
    (["--pretrained_model_name_or_path", "/nowhere/base"], ["/nowhere/base"]),
    (["--output_dir", "/dev/null/out"], ["/dev/null"]),
    (["--encoded_dir", "/dev/null/out"], ["/dev/null"]),
    (["--resume_from_checkpoint", "/nowhere"], ["/nowhere", "no such folder"]),
    (["--push_to_hub"], ["--push_to_hub", "HF_TOKEN"]),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(argv, words, flags, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(cv4ctrl, "load_transformer", lambda *_: pytest.fail("weights were loaded"))
    line = refused([*flags(tmp_path / "out", encoded_dir=None), *argv])
    assert all(word in line for word in words), line
    assert "secret" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("zero", [{"stage": 7}, {"stage": "two"}, {"stage": True}, {"stage": 2, "reduce_bucket_size": "many"},
                                  {"stage": 0, "offload_optimizer": {"device": "cpu"}}, {"stage": 2, "offload_optimizer": {"pin_memory": "perhaps"}}])  # fmt: skip
def test_engine_sections_that_cannot_be(zero, flags, refused, engine_file, tmp_path):
    line = refused([*flags(tmp_path / "out"), "--deepspeed_config", engine_file(zero_optimization=zero), "--dry_run"])
    assert list(zero)[-1] in line and not (tmp_path / "out").exists()


def test_two_trackers_that_are_not_installed(flags, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(cv4ctrl.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorboard" in refused([*flags(tmp_path / "out"), "--report_to", "tensorboard"])
    assert "pip install wandb" in refused([*flags(tmp_path / "out"), "--report_to", "wandb"])


@pytest.mark.parametrize("changes", [
    {"fp16": {"enabled": True}}, {"fp16": {"enabled": "auto"}}, {"amp": {"enabled": True}}, {"fp8": {"enabled": True}},
    {"communication_data_type": "fp16"}, {"data_types": {"grad_accum_dtype": "fp16"}},
    {"communication_data_type": "FP16"}, {"data_types": {"grad_accum_dtype": "torch.float8_e4m3fn"}},
    {"torch_autocast": {"enabled": True, "dtype": "float16"}}, {"torch_autocast": {"enabled": True, "dtype": "torch.float16"}},
])  # fmt: skip
@pytest.mark.parametrize("flag", [[], ["--mixed_precision", "fp16"]])
def test_half_precision_in_the_file_is_refused(changes, flag, flags, refused, engine_file, tmp_path):
    line = refused([*flags(tmp_path / "out"), "--deepspeed_config", engine_file(**changes), *flag])
    assert "bf16" in line and "fp32" in line
    assert not (tmp_path / "out").exists()


def test_fp16_switched_off_in_the_file_is_no_offence(config, engine_file):
    cv4ctrl.engine_settings(config(deepspeed_config=engine_file(fp16={"enabled": False})))


def test_half_precision_is_refused_before_anything_heavy_is_imported(tmp_path):
    code = ("import sys, cv4ctrl\ntry: cv4ctrl.main(['--mixed_precision', 'fp16'])\n"
            "except SystemExit as e: print(e.code, [m for m in ('deepspeed', 'diffusers', 'transformers', 'datasets') if m in sys.modules])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip() == "2 []" and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes, words", [
    ({"train_micro_batch_size_per_gpu": 3}, ["train_micro_batch_size_per_gpu = 3", "--train_batch_size", "4"]),
    ({"train_batch_size": 5}, ["train_batch_size = 5", "--total_batch_size"]),
    ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps = 2", "--gradient_accumulation_steps"]),
    ({"gradient_clipping": 0.5}, ["gradient_clipping = 0.5", "--max_grad_norm", "1.0"]),
    ({"bf16": {"enabled": True}}, ["bf16.enabled = true", "--mixed_precision", "false"]),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, ["optimizer.params.lr = 0.1", "--learning_rate"]),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.5, 0.5]}}}, ["optimizer.params.betas", "--adam_beta1"]),
    ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "--lr_scheduler"]),
    ({"zero_optimization": True}, ["zero_optimization", "object"]), ({"bf16": True}, ["bf16", "object"]),
    ({"optimizer": {"type": "AdamW", "params": 3}}, ["optimizer", "object"]),
    ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage", "auto"]),
    ({"optimizer": {}}, ["optimizer.type", "AdamW"]), ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "offload_optimizer"]),
    ({"optimizer": {"type": "Lion"}}, ["Lion", "AdamW"]), ({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 0}}, ["stage 1"]),
    ({"zero_optimization": None, "zero_optimisation": {"stage": 2}}, ["zero_optimization.stage = None"]),
    ({"bf16": {"check_grad_overflow": False}}, ["check_grad_overflow"]),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["nvme"]),
])  # fmt: skip
def test_file_and_flag_that_contradict_are_both_named(changes, words, flags, refused, engine_file, tmp_path):
    line = refused([*flags(tmp_path / "out"), "--deepspeed_config", engine_file(**changes)])
    assert all(word in line for word in words), line


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_file_that_is_not_json(text, flags, refused, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    assert "JSON" in refused([*flags(tmp_path / "out"), "--deepspeed_config", tmp_path / "ds.json"])


def test_auto_becomes_what_the_flags_say(config, engine_file):
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    c = config(world=2, deepspeed_config=engine_file(optimizer=optimizer), total_batch_size=16, mixed_precision="bf16")
    settings = cv4ctrl.engine_settings(c)
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (16, 2)
    assert settings["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4}
    assert settings["bf16"]["enabled"] is True and settings["zero_optimization"]["stage"] == 2
    assert [key for key, value in cv4ctrl.walk(settings) if value == "auto"] == ["zero_optimization.offload_optimizer.device"]  # choose_offload's


def test_an_empty_data_set_and_a_base_without_parts(flags, refused, base, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(flags(tmp_path / "out", dataset_name=None, jsonl_for_train=tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"image": 1}\nnot json\n')
    assert "broken.jsonl" in refused(flags(tmp_path / "out", dataset_name=None, jsonl_for_train=tmp_path / "broken.jsonl"))
    (tmp_path / "part" / "scheduler").mkdir(parents=True)
    scheduler = json.loads((base / "scheduler/scheduler_config.json").read_text())
    (tmp_path / "part/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    assert "model_index.json" in refused(flags(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "part"))
    for file, word in (("manifest.json", "not as it was written"),):
        (tmp_path / "part" / file).write_text("{}")
        assert word in refused(flags(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "part"))
    other = tmp_path / "other"
    cv4ctrl.shutil.copytree(base, other)
    (other / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler | {"max_shift": 1.15}))
    assert "max_shift" in refused(flags(tmp_path / "out", pretrained_model_name_or_path=other))
    for file in (other / "vae").glob("*.safetensors"):
        file.unlink()
    (other / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    assert "no safetensors" in refused(flags(tmp_path / "out", pretrained_model_name_or_path=other))


def test_dry_run_prints_the_plan_and_writes_nothing(flags, tmp_path, capsys):
    cv4ctrl.main([*flags(tmp_path / "out", encoded_dir=None, max_train_steps=None, num_train_epochs=3), "--dry_run"])
    said = capsys.readouterr().out
    assert "48 rows, 4 held out" in said and "33 steps" in said  # 3 x 44 rows / 4 samples a step
    assert "nothing is offloaded" in said and "not known for this device" in said
    assert not list(tmp_path.iterdir())


def test_dry_run_sees_what_it_would_go_on_from(flags, refused, tmp_path, capsys):
    checkpoint = tmp_path / "out" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    c = cv4ctrl.resolve(cv4ctrl.parse(flags(tmp_path / "out")), 1)
    (checkpoint / "file").write_text("12345")
    manifest = {"step": 7, "files": {"file": [5, "?"]}, "identity": {name: getattr(c, name) for name in cv4ctrl.IDENTITY}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"digest": cv4ctrl.digest(json.dumps(manifest))}))
    shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint-8")
    (tmp_path / "out" / "checkpoint-8" / "file").write_text("1234")
    cv4ctrl.main([*flags(tmp_path / "out", max_train_steps=9), "--dry_run"])
    said = capsys.readouterr()
    assert "9 of 4 samples, 0.82 epochs; 7 are done" in said.out and "checkpoint-8 is passed over: file" in said.err
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    assert "made with seed = 0" in refused([*flags(tmp_path / "out", seed=1), "--dry_run"])
    assert "holds checkpoints" in refused([*flags(tmp_path / "out", resume_from_checkpoint="none"), "--dry_run"])
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"step": 8, "digest": cv4ctrl.digest(json.dumps(manifest))}))
    with pytest.raises(SystemExit) as ended:
        cv4ctrl.main([*flags(tmp_path / "out"), "--dry_run"])
    assert ended.value.code == 2 and "checkpoint-7: not whole" in capsys.readouterr().err


def test_a_run_of_nothing_but_warm_up_is_named(flags, tmp_path, capsys):
    for steps, said in ((9, True), (10, False)):
        cv4ctrl.main([*flags(tmp_path / "out", lr_scheduler="cosine", lr_warmup_steps=9, max_train_steps=steps), "--dry_run"])
        assert ("all 9 steps are warm-up" in capsys.readouterr().err) == said


def test_an_interrupt_before_the_run_begins_shows_no_traceback(flags, tmp_path, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cv4ctrl, "open_dataset", interrupt)  # as Ctrl-C while the data set is fetched
    with pytest.raises(SystemExit) as ended:
        cv4ctrl.main(flags(tmp_path / "out"))
    assert ended.value.code == 130 and not (tmp_path / "out").exists()


def test_compiling_needs_a_compiler(flags, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(cv4ctrl.shutil, "which", lambda name: None)
    assert "--compile" in refused(flags(tmp_path / "out", compile=True)) and not (tmp_path / "out").exists()


def test_commands_of_the_readme_are_understood():
    """Those that need a GPU, as far as their flags go; run.sh passes its own on to the same parser."""
    lines = [line.split("#")[0] for line in (ROOT / "README.md").read_text().splitlines()]
    recipe = (ROOT / "run.sh").read_text().split('"${launch[@]}"')[1].replace("\\\n", " ").replace('"$@"', "").strip()
    commands = [line.split("cv4ctrl.py", 1)[1] for line in lines if line.startswith(("deepspeed ", "torchrun ", "python cv4ctrl.py"))]
    commands += [recipe.split('cv4ctrl.py"', 1)[1] + line.split("run.sh", 1)[1] for line in lines if re.match(r"(\w+=\S+ )?bash run.sh(?! demo| test)", line)]
    assert len(commands) == 11
    for command in commands:
        if "--help" not in command:
            c = cv4ctrl.resolve(cv4ctrl.parse(shlex.split(command)), 8)
            cv4ctrl.check(c)
            assert cv4ctrl.engine_settings(c)["train_batch_size"] == c.total_batch_size in (64, 128)


@pytest.mark.long
@pytest.mark.parametrize("command", [
    "NUM_GPUS=1 bash run.sh", "deepspeed --num_gpus=2 cv4ctrl.py", "torchrun --nproc_per_node=2 cv4ctrl.py", "python cv4ctrl.py",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1 python cv4ctrl.py",  # one of two ranks: it waits for nobody
])  # fmt: skip
def test_every_way_to_start_it_gets_to_the_plan(command, flags, tmp_path):
    """The README's commands with the real launchers, as far as --dry_run."""
    words = flags(tmp_path / "out", train_batch_size=4, total_batch_size=8, encoded_dir=None)
    mine = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in os.environ.items() if name not in mine}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    line = f"{command} {shlex.join(map(str, words))} --dry_run"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("2 of 8 samples") == 1, done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin")
def test_the_recipe_needs_a_gpu():
    env = {name: value for name, value in os.environ.items() if name not in ("NUM_GPUS", "HOSTFILE")} | {"HOSTFILE": "/nowhere"}
    done = subprocess.run(["bash", "run.sh"], cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2 and "bash run.sh demo" in done.stderr and not done.stdout


def test_a_demo_with_a_wrong_flag_or_beside_another_one_leaves_the_last_run_where_it_is(tmp_path):
    for name in ("cv4ctrl.py", "run.sh", "requirements.txt", "ds_config.json"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "demo" / "run").mkdir(parents=True)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    demo = lambda *words: subprocess.run(["bash", "run.sh", "demo", *words], cwd=tmp_path, env=env, capture_output=True, text=True)  # noqa: E731
    done = demo("--learning_rate", "abc")
    assert done.returncode == 2 and "learning_rate" in done.stderr and len(done.stderr.splitlines()) == 1
    with open(tmp_path / "demo" / "run" / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = demo()
    assert done.returncode == 2 and "another run is at work there" in done.stderr
    assert [file.name for file in (tmp_path / "demo").iterdir()] == ["run"]


def test_the_tests_that_the_readme_names_are_there():
    """Each row of its table of faults, and the other -k of its commands."""
    text, tests = (ROOT / "README.md").read_text(), "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    faults = text.split("| what happens |")[1].split("\n\n")[0].splitlines()[2:]
    names = [name for row in faults for name in row.rsplit("|", 2)[1].strip(" `").split(" or ")] + re.findall(r"test .*?-k (\w+)", text)
    assert len(faults) > 12 and len(names) > 15
    assert not [name for name in names if name != "NAME" and not re.search(rf"def test_\w*{name}", tests)]


def test_files_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"tests/[\w/.-]*\w|cv4ctrl\.py|ds_config\.json|\.ruff\.toml|\.ci/run|run\.sh|requirements\.txt", text))
    assert len(named) > 10 and all((ROOT / name).exists() for name in named), named


def test_digest_keeps_parts_apart():
    assert len({cv4ctrl.digest("ab", "c"), cv4ctrl.digest("a", "bc"), cv4ctrl.digest("abc"), cv4ctrl.digest(b"abc", "")}) == 4
    assert torch.equal(*(torch.rand(3, generator=cv4ctrl.draw(0, "x", 1)) for _ in range(2)))
