"""What a run tells trackers, and that it goes on without one that fails."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import cv4ctrl


def pixels(file):
    return Image.open(file).tobytes()


def test_trackers_read_back(flags, encoded, tmp_path):
    """Tensorboard and wandb have every figure of metrics.jsonl and every picture."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    options = {"max_train_steps": 3, "validation_steps": 2, "num_validation_images": 1, "num_inference_steps": 2}
    command = [sys.executable, cv4ctrl.__file__, *flags(run, **options, report_to="all")]
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)  # wandb finishes as its process ends
    assert done.returncode == 0, done.stderr
    figures = []
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        kind = "train" if "loss" in row else "probe"
        figures += [(f"{kind}/{name}", row["step"], value) for name, value in row.items() if name != "step"]
    events = accumulators.EventAccumulator(str(run / "logs"), {"images": 0}).Reload()
    for name in {name for name, _, _ in figures}:
        seen = [(name, event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert seen == [figure for figure in figures if figure[0] == name]
    drawn = {step: pixels(run / "validation" / f"step-{step}.png") for step in (0, 2, 3)}
    seen = {event.step: pixels(io.BytesIO(event.encoded_image_string)) for event in events.Images("validation")}
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    shown = [pixels(file) for file in offline.glob("files/media/images/*.png")]
    assert seen == drawn and sorted(shown) == sorted(drawn.values())
    content = next(offline.glob("*.wandb")).read_bytes()
    assert all(name.encode() in content for name, _, _ in figures)


@pytest.mark.parametrize("tracker, fault", [("tensorboard", "missing"), ("wandb", "missing"), ("tensorboard", "later")])
def test_a_tracker_that_fails_is_dropped_with_one_line(tracker, fault, config, device, tmp_path, monkeypatch, capsys):
    if fault == "missing":
        monkeypatch.setitem(sys.modules, tracker, None)
    else:
        pytest.importorskip(tracker)
    log = cv4ctrl.Log(config(tmp_path, report_to=tracker), cv4ctrl.TrainState(), 3)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 0.5})
        if step == 1 and fault == "later":  # the folder of its files is replaced by a file
            shutil.rmtree(tmp_path / "logs")
            (tmp_path / "logs").write_text("")
    lines = [line for line in capsys.readouterr().err.splitlines() if "cv4ctrl.py" in line]
    assert len(lines) == 1 and f"--report_to {tracker}: " in lines[0] and "without this tracker" in lines[0]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
