"""What a run tells trackers, and that it goes on without one that fails."""

import json
import sys
from unittest import mock

import pytest
from PIL import Image

import cv4ctrl


def test_tensorboard_and_through_it_wandb_get_every_figure_and_picture(config, device, tmp_path, monkeypatch):
    tensorboard, wandb = mock.Mock(), mock.Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(sys, "stdin", None)
    log = cv4ctrl.Log(config(tmp_path, report_to="wandb"), 0)
    log.write("probe", 0, {"probe_loss": 0.5, "control_gain": 0.25}, Image.new("RGB", (64, 32), "red"))
    log.write("train", 1, {"loss": 0.75})
    options = wandb.init.call_args.kwargs
    assert sys.stdin.read() == ""  # where it would ask for a login
    assert options["sync_tensorboard"] and options["resume"] == "allow" and options["config"]["report_to"] == "wandb"
    again = cv4ctrl.Log(config(tmp_path, report_to="wandb"), 1)
    again.write("train", 2, {"loss": 0.5})
    assert wandb.init.call_args.kwargs["id"] == options["id"]  # a continued run continues the same curves
    assert [call.kwargs["purge_step"] for call in tensorboard.SummaryWriter.call_args_list] == [1, 2]
    writer = tensorboard.SummaryWriter(tmp_path / "logs")
    figures = [("probe/probe_loss", 0.5, 0), ("probe/control_gain", 0.25, 0)]
    figures += [("train/loss", 0.75, 1), ("train/loss", 0.5, 2)]
    assert [call.args for call in writer.add_scalar.call_args_list] == figures
    ((title, image, step),) = [call.args for call in writer.add_image.call_args_list]
    assert (title, image.shape, step) == ("validation", (32, 64, 3), 0) and (image == [255, 0, 0]).all()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_fails_is_dropped_with_one_line(tracker, config, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, tracker, None)
    log = cv4ctrl.Log(config(tmp_path, report_to=tracker), 0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 0.5})
    lines = [line for line in capsys.readouterr().err.splitlines() if "cv4ctrl.py" in line]
    assert len(lines) == 1 and f"--report_to {tracker}: " in lines[0] and "goes on without it" in lines[0]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
