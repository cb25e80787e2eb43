"""Flags, ds_config.json and where they contradict: a mistake is one line and exit code 2, and nothing is written."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import typing
from pathlib import Path

import pytest
import torch

import cv4ctrl
import tiny

ROOT = Path(__file__).parents[1]
FLAGS = cv4ctrl.Config.__dataclass_fields__
EXAMPLE = """pretrained_model_name_or_path variant revision output_dir cache_dir seed resolution max_sequence_length
train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
proportion_empty_prompts gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
max_grad_norm logging_dir allow_tf32 report_to mixed_precision dataset_name dataset_config_name image_column
conditioning_image_column caption_column max_train_samples validation_prompt validation_image num_validation_images
validation_steps tracker_project_name jsonl_for_train only_target_transformer_blocks guidance_scale
upcast_before_saving weighting_scheme logit_mean logit_std mode_scale offload log_dataset_samples push_to_hub
hub_model_id use_8bit_adam hub_token""".split()
REFUSED = """revision weighting_scheme logit_mean logit_std validation_image validation_prompt use_8bit_adam hub_token
only_target_transformer_blocks variant log_dataset_samples scale_lr allow_tf32 cache_dir logging_dir
tracker_project_name lr_num_cycles lr_power offload mode_scale"""


def engine_file(folder, setting):
    """Writes a ds_config.json: the shipped one with one value, "section.key = JSON", changed or added."""
    settings = json.loads((ROOT / "ds_config.json").read_text())
    place, _, value = setting.partition(" = ")
    *sections, key = place.split(".")
    functools.reduce(dict.__getitem__, sections, settings)[key] = json.loads(value)
    (folder / "ds.json").write_text(json.dumps(settings))
    return folder / "ds.json"


def test_every_flag_of_the_example_is_taken_or_refused_by_name(refused):
    assert len(set(EXAMPLE)) == 58
    assert set(EXAMPLE) - FLAGS.keys() == {*REFUSED.split(), "gradient_checkpointing"}
    for name in EXAMPLE:
        if name in FLAGS:
            choices = typing.get_args(FLAGS[name].type) or (FLAGS[name].type,)
            value = {bool: True, int: 3, float: 0.5, str: "x"}.get(choices[0], choices[-1])
            found = getattr(cv4ctrl.parse([f"--{name}", *([] if value is True else [str(value)])]), name)
            assert found in (value, ["x"]), name
        elif name in REFUSED.split():
            for words in ([f"--{name}"], [f"--{name}", "secret"], [f"--{name.replace('_', '-')}=secret"]):
                line = refused(words)
                assert words[0].split("=")[0] in line and "README" in line and "secret" not in line


def test_the_table_of_differences_from_the_example_is_right():
    section = (ROOT / "tests" / "NOTES.md").read_text().split("## 8.")[1].split("accelerate file")[0]
    rows = re.findall(r"^\| `--(\w+)` \| .* \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) > 15 and {name for name, here in rows if here.startswith("refused")} == set(REFUSED.split())
    for name, default in [(name, re.match("[^;,]*", here)[0]) for name, here in rows if name in FLAGS]:
        assert {"on": "True", "off": "False"}.get(default, default) == str(FLAGS[name].default), name


def test_the_flags_of_the_example_choose_what_is_recomputed():
    for words, choice in (("", "auto"), ("--recompute some", "some"), ("--gradient_checkpointing", "all"),
                          ("--gradient-checkpointing --no-gradient-checkpointing", "none")):  # fmt: skip
        assert cv4ctrl.parse(words.split()).recompute == choice


def test_defaults_are_the_recipe_of_the_original_document():
    recipe = {"learning_rate": 5e-5, "adam_weight_decay": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 1000}
    recipe |= {"train_batch_size": 8, "mixed_precision": "bf16", "resolution": 1024, "recompute": "auto"}
    assert {name: FLAGS[name].default for name in recipe} == recipe
    assert cv4ctrl.resolve(cv4ctrl.Config(total_batch_size=128), 8).gradient_accumulation_steps == 2


@pytest.mark.parametrize("argv, words", [
    ("--no_such_flag", "no_such_flag"), ("extra", "extra"), ("--train_batch", "--train_batch"),
    ("--config_file=accelerate_ds.yaml", "config_file"), ("--num_processes 8", "num_processes"),
    ("--train_batch_size many", "train_batch_size many"), ("--train_batch_size 0", "train_batch_size 1"),
    ("--lr_scheduler zigzag", "lr_scheduler zigzag"), ("--report_to comet_ml", "comet_ml tensorboard"),
    ("--control x", "control openpose"), ("--recompute half", "recompute some"),
    (f"--seed {2**64}", "seed"), ("--learning_rate nan", "learning_rate"), ("--learning_rate -1", "learning_rate"),
    ("--adam_beta2 1", "adam_beta2"),
    ("--max_train_samples 0", "max_train_samples"),
    ("--timeout_minutes 0", "timeout_minutes"),
    ("--resolution 1000", "resolution 16"), ("--proportion_empty_prompts 1.5", "proportion_empty_prompts 1"),
    ("--mixed_precision fp16", "fp16 bf16"), ("--mixed_precision fp8", "fp8 bf16"),
    ("--total_batch_size 6", "total_batch_size 6"),
    ("--total_batch_size 8 --gradient_accumulation_steps 4", "total_batch_size 8 accumulation 4"),
    ("--train_batch_size 64", "44 64"), ("--output_dir=", "output_dir"), ("--dataset_name=", "dataset_name"),
    ("--deepspeed_config /nowhere/ds.json", "/nowhere/ds.json"), ("--deepspeed_config README.md", "README.md JSON"),
    ("--dataset_name /nowhere/data", "/nowhere/data"), ("--jsonl_for_train x.jsonl", "dataset_name jsonl_for_train"),
    (f"--jsonl_for_train /nowhere.jsonl --dataset_name {FLAGS['dataset_name'].default}", "/nowhere.jsonl"),
    ("--image_column photo", "photo image conditioning_image text"), ("--caption_column prompt", "prompt text"),
    ("--conditioning_image_column pose", "pose conditioning_image"),
    ("--pretrained_model_name_or_path /nowhere/base", "pretrained_model_name_or_path /nowhere/base"),
    ("--pretrained_model_name_or_path no/base", "no/base offline"), ("--push_to_hub", "push_to_hub HF_TOKEN"),
    ("--output_dir /dev/null/out", "/dev/null/out"), ("--encoded_dir /dev/null/out", "/dev/null/out"),
    ("--resume_from_checkpoint checkpoint-7", "resume_from_checkpoint latest"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(argv, words, flags, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(cv4ctrl.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cv4ctrl, "fine_tune", lambda *_: pytest.fail("training would begin"))
    monkeypatch.chdir(ROOT)
    line = refused([*flags(tmp_path / "out", encoded_dir=None), *argv.split()])
    assert all(word in line for word in words.split()), line
    assert "precision" in argv or "fp16" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [
    'fp16 = {"enabled": true}', 'fp16 = {"enabled": "auto"}', 'fp8 = {"enabled": true}', 'amp = {"enabled": true}',
    'torch_autocast = {"enabled": true, "dtype": "float16"}', 'torch_autocast = {"enabled": true, "dtype": "bfloat16"}',
    'communication_data_type = "fp16"', 'data_types.grad_accum_dtype = "FP16"', 'bf16.enabled = "fp16"',
    'data_types.grad_accum_dtype = "torch.float8_e4m3fn"', 'optimizer = {"type": "AdamW", "params": {"amsgrad": true}}',
    'scheduler = {"type": "WarmupLR"}', 'zero_optimization.zenflow = {"topk_ratio": 0.1}', "sequence_parallel_size = 2",
    'tensor_parallel = {"autotp_size": 2}', 'data_efficiency = {"data_routing": {"random_ltd": {"enabled": true}}}',
    'comet = {"enabled": true}', "prescale_gradients = true", "bf16 = true", "bf16.check_grad_overflow = false",
    'zero_optimisation = {"stage": 2}', "zero_optimization = true", 'zero_optimization.stage = "auto"',
    *(f"zero_optimization.stage = {stage}" for stage in ("0", "3", "7", "true")),
    "zero_optimization.cpu_offload = true",
    'zero_optimization.offload_param = {"device": "cpu"}', 'zero_optimization.offload_optimizer.device = "nvme"',
    'zero_optimization.offload_optimizer.pin_memory = "perhaps"', 'zero_optimization.reduce_bucket_size = "many"',
    'zero_optimization.overlap_comm = "auto"', 'wall_clock_breakdown = "maybe"', "steps_per_print = null",
])  # fmt: skip
def test_what_is_not_known_to_train_right_is_refused_by_name(setting, flags, refused, tmp_path):
    """Half precision, other optimizers and stages, features of DeepSpeed that train wrongly, values of a wrong type."""
    line = refused([*flags(tmp_path / "out", deepspeed_config=engine_file(tmp_path, setting)), "--dry_run"])
    assert setting.partition(" = ")[0].split(".")[-1] in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting, flag, value", [
    ("train_micro_batch_size_per_gpu = 3", "--train_batch_size", "4"),
    ("train_batch_size = 5", "--total_batch_size", "4"),
    ("gradient_accumulation_steps = 2", "--total_batch_size", "1"),
    ("gradient_clipping = 0.5", "--max_grad_norm", "1.0"), ("bf16.enabled = true", "--mixed_precision", "false"),
])  # fmt: skip
def test_file_and_flag_that_contradict_are_both_named(setting, flag, value, flags, refused, tmp_path):
    line = refused(flags(tmp_path / "out", deepspeed_config=engine_file(tmp_path, setting)))
    assert setting.removeprefix("bf16.") in line and f"{flag} makes it {value}" in line


def test_a_ds_config_in_the_working_folder_is_not_taken(config, flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 1}}')
    cv4ctrl.main([*flags("out"), "--dry_run"])
    assert "engine  the shipped ds_config.json, ZeRO stage 2\n" in capsys.readouterr().out
    cv4ctrl.main([*flags("out", deepspeed_config="ds_config.json"), "--dry_run"])
    assert "engine  ds_config.json, ZeRO stage 1\n" in capsys.readouterr().out


def test_tasks_of_slurm_without_a_launcher_are_refused(flags, refused, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert "torchrun" in refused(flags(tmp_path / "out"))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    cv4ctrl.main([*flags(tmp_path / "out"), "--dry_run"])


def test_an_output_folder_that_is_a_link_to_nothing(flags, refused, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    line = refused(flags(tmp_path / "out"))
    assert f"{tmp_path}/out is a link to nothing" in line and not (tmp_path / "nowhere").exists()


def test_a_cache_folder_that_cannot_be_made_is_named(flags, refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cv4ctrl.datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    line = refused(flags(tmp_path / "out", dataset_name=tiny.make_data(tmp_path / "data", 48)))
    assert str(tmp_path / "file") in line


def test_auto_becomes_what_the_flags_say(config):
    settings = cv4ctrl.engine_settings(config(world=2, total_batch_size=16, mixed_precision="bf16", max_grad_norm=0.5))
    assert (settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]) == (4, 16)
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (2, 0.5)
    assert settings["bf16"]["enabled"] is True and settings["zero_optimization"]["stage"] == 2
    assert json.dumps(settings).count('"auto"') == 2  # bucket and offloading, which depend on the model


def test_an_empty_data_set_and_a_base_without_parts(flags, refused, base, tmp_path):
    file = tmp_path / "rows.jsonl"
    for text, words in (("", "empty"), ('{"image": 1}\nnot json\n', "rows.jsonl"), ("[1]\n", "rows.jsonl")):
        file.write_text(text)
        line = refused(flags(tmp_path / "out", dataset_name=None, jsonl_for_train=file))
        assert "rows.jsonl" in line and words in line
    other = shutil.copytree(base, tmp_path / "other")
    words = flags(tmp_path / "out", pretrained_model_name_or_path=other)
    (other / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "safetensors" in refused(words)
    index = other / "model_index.json"
    index.write_text(index.read_text().replace('"CogView4', '"Flux'))
    assert "of CogView4" in refused(words)
    assert not (tmp_path / "out").exists()


def test_dry_run_sees_what_it_would_continue_from_and_writes_nothing(config, flags, refused, tmp_path, capsys):
    argv = [*flags(tmp_path / "out", encoded_dir=None, max_train_steps=None, num_train_epochs=3), "--dry_run"]
    cv4ctrl.main(argv)
    assert f"{3 * 44 // 4} of 4 samples" in capsys.readouterr().out and not list(tmp_path.iterdir())
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    identity = {name: getattr(config(), name) for name in cv4ctrl.IDENTITY}
    (folder / "manifest.json").write_text(json.dumps({"step": 7, "files": {}, "identity": identity}))
    cv4ctrl.main(argv)
    assert "; 7 are done" in capsys.readouterr().out
    assert "seed was 0 and is 1" in refused([*argv, "--seed", 1])


def test_commands_of_the_readme_are_understood():
    """Their flags, and those of run.sh, which passes its own on to the same parser."""
    lines = [line.split("#")[0] for line in (ROOT / "README.md").read_text().splitlines()]
    start = re.compile(r"((deepspeed|torchrun|python) .*?cv4ctrl\.py|(\w+=\S+ )*bash run\.sh(?! demo| test))(.*)")
    commands = [found[4] for found in map(start.match, lines) if found]
    recipe = (ROOT / "run.sh").read_text().rsplit("cv4ctrl.py", 1)[1].replace("\\\n", " ").replace('"$@"', "")
    assert len(commands) >= 5
    for command in [recipe.lstrip('"'), *commands]:
        if "--help" not in command:
            cv4ctrl.check(cv4ctrl.parse([word for word in shlex.split(command) if word != "[flags]"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin")
def test_the_recipe_needs_a_gpu():
    env = {name: value for name, value in os.environ.items() if name != "NUM_GPUS"} | {"HOSTFILE": "/nowhere"}
    done = subprocess.run(["bash", "run.sh"], cwd=ROOT, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2 and "bash run.sh demo" in done.stderr and not done.stdout


def test_files_that_the_readme_names_are_there():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"tests/[\w/.-]*\w|cv4ctrl\.py|ds_config\.json|run\.sh|requirements\.txt", text))
    assert len(named) > 5 and all((ROOT / name).exists() for name in named), named
