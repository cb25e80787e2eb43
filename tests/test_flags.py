"""Flags, ds_config.json and where they contradict: a mistake is one line and exit code 2, and nothing is written."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import cv4ctrl
from test_fp16_rejection import engine_file

ROOT = Path(__file__).parents[1]


def test_a_flag_of_the_example_that_is_not_here_is_refused_by_name_and_without_its_value(refused):
    for words in (["--scale_lr"], ["--hub_token", "secret"], ["--hub-token=secret"]):
        line = refused(words)
        assert words[0].split("=")[0] in line and "README" in line and "secret" not in line


@pytest.mark.parametrize("argv, words", [
    ("--no_such_flag", "no_such_flag"), ("extra", "extra"), ("--train_batch 4", "unknown --train_batch"),
    ("--train_batch_size many", "train_batch_size many"), ("--train_batch_size 0", "train_batch_size 1"),
    ("--lr_scheduler zigzag", "lr_scheduler zigzag"), ("--control x", "control canny"),
    ("--learning_rate nan", "learning_rate"), ("--adam_beta2 1", "adam_beta2"), (f"--seed {2**64}", "seed"),
    ("--resolution 1000", "resolution 16"), ("--proportion_empty_prompts 1.5", "proportion_empty_prompts 1"),
    ("--total_batch_size 6", "total_batch_size 6"),
    ("--total_batch_size 8 --gradient_accumulation_steps 4", "total_batch_size 8 accumulation"),
    ("--output_dir=", "output_dir"), ("--deepspeed_config README.md", "README.md JSON"),
    ("--dataset_name /nowhere/data", "/nowhere/data"), ("--dataset_name README.md", "README.md"),
    ("--image_column photo", "photo image conditioning_image text"),
    ("--pretrained_model_name_or_path no/base", "no/base offline"),
    ("--resume_from_checkpoint checkpoint-7", "resume_from_checkpoint latest"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(argv, words, flags, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(cv4ctrl.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cv4ctrl, "start_ranks", lambda *_: pytest.fail("training would begin"))
    monkeypatch.chdir(ROOT)
    line = refused([*flags(tmp_path / "out", encoded_dir=None), *argv.split()])
    assert all(word in line for word in words.split()), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [
    'optimizer = {"type": "AdamW", "params": {"amsgrad": true}}', 'zero_optimization.zenflow = {"topk_ratio": 0.1}',
    'tensor_parallel = {"autotp_size": 2}', "bf16 = true", "bf16.check_grad_overflow = false",
    'zero_optimisation = {"stage": 2}', "zero_optimization = true",
    *(f"zero_optimization.stage = {stage}" for stage in ("0", "1", "3", "true", '"2"', '"auto"')),
    'zero_optimization.offload_param = {"device": "cpu"}', 'zero_optimization.offload_optimizer.device = "nvme"',
    "zero_optimization.reduce_bucket_size = 67108863", "zero_optimization.reduce_bucket_size = 5e8", 'zero_optimization.reduce_bucket_size = "auto"',
    "train_micro_batch_size_per_gpu = 4", "train_batch_size = 4", "gradient_accumulation_steps = 1",
    "gradient_clipping = 1.0", "bf16.enabled = false",
])  # fmt: skip
def test_what_is_not_known_to_train_right_is_refused_by_name(setting, flags, refused, tmp_path):
    """Other optimizers and stages, features of DeepSpeed that train wrongly, values of a wrong type, and what a flag
    decides, even if they agree."""
    name, _, value = setting.partition(" = ")
    file = engine_file(tmp_path, name, json.loads(value))
    line = refused([*flags(tmp_path / "out", deepspeed_config=file), "--dry_run"])
    assert f"ds.json: {name}" in line and not (tmp_path / "out").exists()


def test_the_engine_gets_what_flags_and_file_say(config, tmp_path):
    options = dict(world=2, total_batch_size=16, mixed_precision="bf16", max_grad_norm=0.5)
    file = engine_file(tmp_path, "zero_optimization.overlap_comm", False)
    shipped = cv4ctrl.engine_settings(config(**options))
    settings = cv4ctrl.engine_settings(config(**options, deepspeed_config=file))
    assert (settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]) == (4, 16)
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (2, 0.5)
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert json.dumps(settings).count('"auto"') == 1  # offloading, which depends on model and cards
    zero, of_shipped = (found.pop("zero_optimization") for found in (settings, shipped))
    assert settings == shipped and zero == of_shipped | {"overlap_comm": False}


@pytest.fixture()
def folder(tmp_path, monkeypatch):
    """A working folder with pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "pose.jpg"):
        Image.new("RGB", (64, 64)).save(name)
    Path("folder.png").mkdir()


@pytest.mark.parametrize("images, prompts, expected", [
    (["a.png", "b.png"], ["x", "y"], [("a.png", "x"), ("b.png", "y")]), ([], [], []),
    (["a.png", "b.png"], ["x"], [("a.png", "x"), ("b.png", "x")]),
    (["a.png"], ["x", "y"], [("a.png", "x"), ("a.png", "y")]),
    (["a.png"], [], "give as many"), ([], ["x"], "give as many"), (["a.png", "b.png"], ["x", "y", "z"], "give as many"),
    (["a.png", "gone.png"], ["x", "y"], "gone.png"), (["folder.png"], ["x"], "--validation_image folder.png: "),
])  # fmt: skip
def test_validation_cases_are_n_to_n_or_one_serves_all_and_others_are_refused(
    images, prompts, expected, folder, flags, refused, monkeypatch
):
    monkeypatch.setattr(cv4ctrl, "start_ranks", lambda *_: pytest.fail("training would begin"))
    argv = flags("out", validation_image=images or None, validation_prompt=prompts or None)
    if isinstance(expected, str):
        assert expected in refused(argv) and expected in refused([*argv, "--dry_run"])
    else:
        cv4ctrl.main([*argv, "--dry_run"])
        assert cv4ctrl.validation_cases(cv4ctrl.parse(argv)) == expected
    assert not Path("out").exists()


def test_an_empty_data_set_and_a_base_without_parts(flags, refused, base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.touch()
    line = refused(flags(tmp_path / "out", dataset_name=file))
    assert line.startswith(f"cv4ctrl.py: data set {file}: ") and "empty" in line
    other = shutil.copytree(base, tmp_path / "other")
    words = flags(tmp_path / "out", pretrained_model_name_or_path=other)
    (other / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "safetensors" in refused(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file, names", [
    ("scheduler/scheduler_config.json", "num_train_timesteps use_dynamic_shifting time_shift_type shift base_shift "
                                        "max_shift base_image_seq_len"),
    ("vae/config.json", "latent_channels scaling_factor shift_factor"),
    ("transformer/config.json", "in_channels out_channels patch_size"),
])  # fmt: skip
def test_a_base_that_is_not_like_cogview4_is_refused(file, names, flags, refused, base, tmp_path):
    """Its training would run without an error and be wrong. Its file and value are named."""
    other = shutil.copytree(base, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    true = json.loads((other / file).read_text())
    words = flags(tmp_path / "out", pretrained_model_name_or_path=other)
    if file.startswith("transformer"):
        words += flags(tmp_path / "out", transformer=other / "transformer")
    for name in names.split():
        for settings in (true | {name: 0.3}, {key: true[key] for key in true if key != name}):
            (other / file).write_text(json.dumps(settings))
            line = refused([*words, "--dry_run"])
            assert f"{file} says {name} = {settings.get(name)}, CogView4-6B has {true[name]}" in line


def test_dry_run_sees_what_it_would_continue_from_and_writes_nothing(flags, refused, tmp_path, capsys):
    argv = [*flags(tmp_path / "out", encoded_dir=None), "--dry_run"]
    cv4ctrl.main(argv)
    assert "2 of 4 samples, 0 done; 48 rows" in capsys.readouterr().out and not list(tmp_path.iterdir())
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": 7, "skipped": 0, "files": {}, "identity": {"seed": 0}}))
    cv4ctrl.main(argv)
    assert "2 of 4 samples, 7 done;" in capsys.readouterr().out
    assert "seed was 0 and is 1" in refused([*argv, "--seed", 1])


def test_commands_of_the_readme_are_understood(folder):
    """Their flags, and those of run.sh, which passes its own on to the same parser."""
    texts = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("README.md", "run.sh")]
    start = r"(?:\w+=\S+ )*(?:(?:deepspeed|torchrun|python)\b.*?cv4ctrl\.py|bash run\.sh(?! demo| test)\b)([^#\n]*)"
    commands = re.findall(f"^{start}", texts[0], re.MULTILINE)
    assert len(commands) >= 5
    recipe = texts[1].rsplit('cv4ctrl.py"', 1)[1].replace('"$@"', "")
    for command in [recipe, *commands]:
        if "--help" not in command:
            cv4ctrl.parse([word for word in shlex.split(command) if word != "[flags]"])
