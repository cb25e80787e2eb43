"""What a run survives: each fault is put in from outside, and the weights of an undisturbed run are the judge."""

import fcntl
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import cv4ctrl
import tiny
from nursery import Nursery, until
from ranks import logged, rows, same, weights

ROOT = Path(__file__).parents[1]
SIGNALS = {"TERM": signal.SIGTERM, "INT": signal.SIGINT, "USR1": signal.SIGUSR1}


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def out(tmp_path_factory, encoded):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def argv(out, flags):
    """Two ranks, 12 steps, everything that a run can be killed in: loader workers, evaluation, saving."""
    common = dict(train_batch_size=2, max_train_steps=12, checkpointing_steps=2, validation_steps=4, num_inference_steps=2, num_validation_images=1,
                  proportion_empty_prompts=0.2, dataloader_num_workers=1, adam_epsilon=1e-3)  # fmt: skip
    return lambda name, **options: flags(out / name, **common | options)


@pytest.fixture(scope="module")
def undisturbed(nursery, out, argv):
    began = time.time()
    codes, text = nursery.run(argv("undisturbed", checkpoints_total_limit=0), 2, out / "log")
    assert codes == [0, 0], text
    (out / "undisturbed.log").write_text(text)
    return out / "undisturbed", time.time() - began


def test_a_log_file_gets_plain_lines(undisturbed, out):
    """Each phase with its rate, on one rank, and nothing of the libraries' own before the first word of ours."""
    text = (out / "undisturbed.log").read_text()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("48 rows") and "cv4ctrl.py" not in text, text
    for phase in ("reading rows", "training", "probing", "drawing", "saving"):
        assert any(line.startswith(f"{phase}:") for line in lines), (phase, text)
    (done,) = [line for line in lines if line.startswith("done:")]
    assert f'from_pretrained("{undisturbed[0]}")' in done
    assert lines.count("training:   0%|          | 0/12 [00:00<?, ?it/s]") == 1  # the other rank is silent


def log_without_clock(folder):
    return [{name: value for name, value in row.items() if name != "samples_per_s"} for row in rows(folder)]


@pytest.mark.long
def test_kill_at_any_moment(undisturbed, nursery, out, argv):
    """SIGKILL to a random rank at a random moment, encoding included, 20 times: the end is bitwise that of an undisturbed run."""
    reference, seconds = undisturbed
    rng, kills, runs, started_at, lost, wanted = random.Random(0), 0, 0, [], [], 20
    while kills < wanted:
        runs, name, encoded = runs + 1, f"killed-{runs}", out / f"cache-{runs}"  # a run that ends is followed by another
        for _ in range(30):
            before = max(cv4ctrl.checkpoints(out / name), default=0)
            aimed = kills < wanted and rng.uniform(0.1, 0.5) * seconds

            def kill(pids):
                if aimed:
                    time.sleep(aimed)
                    os.kill(rng.choice(pids), signal.SIGKILL)

            codes, text = nursery.run(argv(name, encoded_dir=encoded), 2, out / "log", kill)
            kills += -signal.SIGKILL in codes
            started_at.append(before)
            if codes == [0, 0]:
                break
            assert "not whole" not in text and "Refus" not in text, text
            log = out / name / "metrics.jsonl"
            reached = max([row["step"] for row in rows(out / name)], default=0) if log.exists() and log.read_text().endswith("\n") else 0
            lost.append(reached - max(cv4ctrl.checkpoints(out / name), default=0))
        assert codes == [0, 0], text
        assert same(weights(out / name), weights(reference))
        assert log_without_clock(out / name) == log_without_clock(reference)
    assert len(set(started_at)) > 2, started_at  # the kills met different phases
    assert max(lost) <= 3, lost  # an interval, and the step that was being saved


@pytest.mark.long
@pytest.mark.parametrize("fault", ["position_forgotten", "state_forgotten"])
def test_a_broken_restore_would_be_seen(fault, undisturbed, nursery, out, argv):
    shutil.copytree(undisturbed[0], out / fault)
    for step in (8, 10, 12):
        shutil.rmtree(out / fault / f"checkpoint-{step}")
    codes, text = nursery.run(argv(fault), 2, out / "log", fault=fault)
    assert codes == [0, 0], text
    assert not same(weights(out / fault), weights(undisturbed[0]))


@pytest.fixture()
def half(undisturbed, out, tmp_path):
    """The undisturbed run as if it had been stopped after step 6, with checkpoints 4 and 6."""
    shutil.copytree(undisturbed[0], tmp_path / "half")
    for step in (2, 8, 10, 12):
        shutil.rmtree(tmp_path / "half" / f"checkpoint-{step}")
    for file in (tmp_path / "half").glob("*.safetensors"):
        file.unlink()
    return tmp_path / "half"


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_disk_that_is_full_while_saving(rank, half, undisturbed, nursery, tmp_path, argv):
    """A rank that may not write more than 40 kB a file: all stop with one line, what was there stays, the next start goes on."""
    began = time.time()
    codes, text = nursery.run(argv(half, num_validation_images=0), 2, tmp_path / "log", file_size={rank: 40_000})
    assert codes == [1, 1] and time.time() - began < 60, text
    (line,) = [line for line in text.splitlines() if "cv4ctrl.py:" in line]
    assert f"rank {rank}" in line and "File too large" in line and "Traceback" not in text, text
    assert list(cv4ctrl.checkpoints(half)) == [4, 6] and (half / ".checkpoint-8.tmp").exists()
    codes, text = nursery.run(argv(half), 2, tmp_path / "log")
    assert codes == [0, 0] and not list(half.glob(".*.tmp")), text
    assert same(weights(half), weights(undisturbed[0]))


@pytest.mark.long
def test_a_disk_that_is_full_while_encoding(nursery, out, argv):
    words = argv("full", encoded_dir=out / "full-cache", dataloader_num_workers=0)  # the limit would hit the loader's shared memory as well
    codes, text = nursery.run(words, 2, out / "log", file_size={1: 4_000})
    assert codes == [1, 1] and "rank 1" in text and "File too large" in text and "Traceback" not in text, text
    codes, text = nursery.run(argv("full", encoded_dir=out / "full-cache", max_train_steps=1), 2, out / "log")
    assert codes == [0, 0], text


def test_a_disk_that_is_too_small_is_seen_before_the_start(flags, refused, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cv4ctrl.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    line = refused(flags(tmp_path / "out"))
    assert "--output_dir" in line and "0.0 GB are free" in line and not (tmp_path / "out").exists()


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": lambda c: os.truncate(next((c / "state").iterdir()), 1000),
    "a flipped bit": lambda c: flip(next((c / "transformer").glob("*.safetensors"))),
    "a missing file": lambda c: next((c / "state").iterdir()).unlink(),
    "an extra file": lambda c: (c / "state" / "extra.safetensors").write_text(""),
    "an empty manifest": lambda c: (c / "manifest.json").write_text(""),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "a manifest that is no object": lambda c: (c / "manifest.json").write_text("[1]"),
    "an empty folder": lambda c: [shutil.rmtree(c), c.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, half, config, device, capsys):
    DAMAGE[damage](half / "checkpoint-6")
    found, manifest = cv4ctrl.find_checkpoint(config(half))
    assert (found.name, manifest["step"]) == ("checkpoint-4", 4)
    assert "checkpoint-6 is passed over" in capsys.readouterr().err
    DAMAGE[damage](half / "checkpoint-4")
    with pytest.raises(cv4ctrl.Refusal, match="not whole"):
        cv4ctrl.find_checkpoint(config(half))


def test_a_port_that_is_taken(nursery, out, argv):
    """As by another run on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        codes, text = nursery.run(argv("no-port"), 1, out / "log", env={"MASTER_PORT": str(port)})
    (line,) = [line for line in text.splitlines() if line.startswith("cv4ctrl.py:")]
    assert codes == [1] and f"127.0.0.1:{port}" in line and "--master_port" in line and "Traceback" not in text, text


def test_a_second_run_in_the_same_folder_is_refused(half, nursery, tmp_path, argv):
    (half / ".lock").touch()
    before = {file: file.stat().st_mtime_ns for file in half.rglob("*")}
    with open(half / ".lock", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # another one is at work
        codes, text = nursery.run(argv(half), 2, tmp_path / "log")
    assert codes[0] == 2 and text.count("another run is at work there") == 1, text
    assert before == {file: file.stat().st_mtime_ns for file in half.rglob("*")}

    def try_to_lock(pids):
        until(lambda: 7 <= rows(half)[-1]["step"] < 12, pids)  # it begins with the rows of the run that ended at 12
        with open(half / ".lock", "a") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    codes, text = nursery.run(argv(half, max_train_steps=11), 2, tmp_path / "log", try_to_lock, fault="slow_steps")
    assert codes == [0, 0], text


def test_a_lock_that_cannot_be_opened_ends_all_ranks(device, tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(cv4ctrl.Ended, match=r"rank 0: .*\.lock: Is a directory"):
        cv4ctrl.occupy(tmp_path)


def test_who_starts_us_by_hand_is_no_launcher():
    """Their end must not end a run; that the end of a launcher does is seen in test_launched.py."""
    code = "import cv4ctrl; print(cv4ctrl.launchers())"
    env = os.environ | {"PYTHONPATH": str(ROOT), "LOCAL_RANK": "0"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.long
def test_the_folder_is_locked_while_a_run_encodes(nursery, out, argv):
    def try_to_lock(pids):
        until(lambda: "encoding pictures" in (out / "log" / "rank-0.log").read_text(), pids)
        with open(out / "encodes" / ".lock", "a") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    codes, text = nursery.run(argv("encodes", encoded_dir=out / "encodes-cache", max_train_steps=1), 2, out / "log", try_to_lock)
    assert codes == [0, 0], text


@pytest.mark.long
def test_two_ranks_agree_on_the_newest_whole_checkpoint(half, undisturbed, nursery, tmp_path, argv):
    DAMAGE["truncated"](half / "checkpoint-6")
    codes, text = nursery.run(argv(half), 2, tmp_path / "log")
    assert codes == [0, 0] and text.count("passed over") == 1, text
    assert same(weights(half), weights(undisturbed[0]))


@pytest.mark.parametrize("name", ["TERM", *(pytest.param(name, marks=pytest.mark.long) for name in ("INT", "USR1"))])
def test_a_signal_to_one_rank_ends_the_run_with_a_checkpoint(name, undisturbed, nursery, out, argv):
    run = out / f"signal-{name}"

    def send(pids):
        until(lambda: logged(run) >= 4, pids)
        os.kill(pids[1], SIGNALS[name])

    codes, text = nursery.run(argv(run, checkpointing_steps=100), 2, out / "log", send, fault="slow_steps")
    assert codes == [75, 75] and "stopped by a signal after step" in text, text
    (step,) = cv4ctrl.checkpoints(run)
    assert 3 <= step < 12 and rows(run)[-1]["step"] == step
    codes, text = nursery.run(argv(run), 2, out / "log")
    assert codes == [0, 0] and same(weights(run), weights(undisturbed[0])), text


@pytest.mark.long
@pytest.mark.parametrize("phase, last_seen", [("saving", ".checkpoint-4.tmp/state/*"), ("drawing", "validation/step-0.png")])
def test_a_signal_while_saving_or_drawing(phase, last_seen, undisturbed, nursery, out, argv):
    """It is heeded when that and the step after it are done; nothing half-written is left."""
    run = out / f"signal-{phase}"

    def send(pids):
        until(lambda: list(run.glob(last_seen)) and (phase == "saving" or logged(run) >= 6), pids)  # probed at 0, 4 steps, probed: it draws
        assert not (run / "checkpoint-4").exists()
        os.kill(pids[0], signal.SIGTERM)

    codes, text = nursery.run(argv(run, checkpointing_steps=4), 2, out / "log", send, fault=f"slow_{phase}")
    assert codes == [75, 75] and "stopped by a signal after step 5" in text, text
    assert list(cv4ctrl.checkpoints(run)) == [4, 5] and (run / "validation" / "step-4.png").exists() and not list(run.glob(".*.tmp"))
    codes, text = nursery.run(argv(run), 2, out / "log")
    assert codes == [0, 0] and same(weights(run), weights(undisturbed[0])), text


@pytest.mark.long
def test_a_signal_while_encoding_keeps_what_is_encoded(nursery, out, argv):
    cache = out / "signal-cache"

    def send(pids):
        until(lambda: "encoding pictures" in (out / "log" / "rank-0.log").read_text(), pids)
        os.kill(pids[0], signal.SIGTERM)

    codes, text = nursery.run(argv("signal-encoding", encoded_dir=cache), 2, out / "log", send)
    assert codes == [75, 75] and "what is encoded is kept" in text, text
    assert cv4ctrl.read_index(cache)


@pytest.mark.long
@pytest.mark.parametrize("name", SIGNALS)
def test_a_second_signal_ends_at_once(name, nursery, out, argv):
    run = out / f"impatient-{name}"

    def send(pids):
        until(lambda: logged(run), pids)
        os.kill(pids[1], signal.SIGSTOP)  # so that rank 0 waits for it
        time.sleep(1)
        os.kill(pids[0], SIGNALS[name])
        time.sleep(5.5)
        os.kill(pids[0], SIGNALS[name])
        os.kill(pids[1], signal.SIGCONT)

    codes, _ = nursery.run(argv(run, checkpointing_steps=100), 2, out / "log", send, fault="slow_steps")
    assert codes[0] == 128 + SIGNALS[name] and not cv4ctrl.checkpoints(run)


def test_a_loader_process_ends_at_a_signal_of_its_rank_alone():
    """Signals of others find it needed; when its rank is done with it, it ends, whatever it is stuck in."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def work():
        cv4ctrl.outlive_signals(0)
        ready.set()
        threading.Event().wait()

    process = fork.Process(target=work)
    process.start()
    assert ready.wait(10)
    for number in SIGNALS.values():
        subprocess.run(["kill", f"-{number:d}", str(process.pid)], check=True)
    process.join(1)
    needed = process.is_alive()
    process.terminate()
    process.join(10)
    process.kill()
    assert needed and process.exitcode == 0


def test_not_a_number_on_one_rank_is_skipped_by_all(nursery, out, argv):
    codes, text = nursery.run(argv("nan"), 2, out / "log", fault="nan_on_rank_1")
    assert codes == [0, 0], text
    found = rows(out / "nan")
    assert [row["skipped"] for row in found] == [0] + 11 * [1]
    assert found[1]["loss"] is None and len(found[1]["rows"]) == 4 and all(row["loss"] for row in found[2:])
    assert all(torch.isfinite(tensor).all() for tensor in weights(out / "nan").values())
    manifest = json.loads((out / "nan" / "checkpoint-12" / "manifest.json").read_text())
    assert manifest["skipped"] == 1


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed's optimizer for the host needs g++")
def test_an_offloaded_optimizer_outlives_a_nan_and_goes_on(nursery, out, argv):
    """As on a single card. Not bitwise: DeepSpeed multiplies the powers of the betas up, a resumed run calculates them (cpu_adam.h)."""

    def masters(name, device, *halts, forget=None):
        settings = json.loads((ROOT / "ds_config.json").read_text())
        settings["zero_optimization"]["offload_optimizer"] = {"device": device}
        (out / f"{name}.json").write_text(json.dumps(settings))
        for steps in halts:
            words = argv(name, deepspeed_config=out / f"{name}.json", max_train_steps=steps, mixed_precision="bf16", num_validation_images=0)
            codes, text = nursery.run(words, 2, out / "log", fault="nan_on_rank_1" if steps == halts[0] else forget)
            assert codes == [0, 0], text
        assert [row["skipped"] for row in rows(out / name)] == [0] + 11 * [1], name
        entries = [cv4ctrl.load_file(file) for file in (out / name / "checkpoint-12" / "state").iterdir()]
        return {key: tensor for part in entries for key, tensor in part.items() if key.startswith("master")}

    away = masters("away", "cpu", 12)
    assert same(away, masters("here", "none", 12), 1e-3)
    assert same(masters("away-and-on", "cpu", 6, 12), away, 1e-3)  # the last bit of a bias correction flips roundings to bf16
    assert not same(masters("away-and-forgotten", "cpu", 6, 12, forget="state_forgotten"), away, 1e-3)


@pytest.mark.long
def test_too_many_in_a_row_end_the_run(nursery, out, argv):
    codes, text = nursery.run(argv("nans", max_skipped_steps=3, checkpointing_steps=1), 2, out / "log", fault="nan_from_step_2")
    assert codes == [1, 1] and "Traceback" not in text, text
    named = rows(out / "nans")[-1]["rows"]
    assert f"3 steps in a row, the last of them 4, of the rows {named}" in text and len(named) == 4
    assert same(*(weights(out / "nans" / f"checkpoint-{step}" / "transformer") for step in (2, 3)))


@pytest.mark.long
def test_a_spike_of_the_loss_is_logged_with_its_rows(nursery, out, argv):
    codes, text = nursery.run(argv("spike", max_train_steps=6), 2, out / "log", fault="loss_spike")
    assert codes == [0, 0], text
    assert [len(row.get("rows", ())) for row in rows(out / "spike")] == [0, 0, 0, 4, 0, 0]


@pytest.mark.parametrize("world, batch", [(1, 4), (4, 1)])
def test_another_number_of_ranks_goes_on(world, batch, half, undisturbed, nursery, tmp_path, argv):
    codes, text = nursery.run(argv(half, train_batch_size=batch), world, tmp_path / "log")
    assert codes == [0] * world, text
    assert same(weights(half), weights(undisturbed[0]), 1e-5)


@pytest.mark.long
def test_another_zero_stage_goes_on(half, undisturbed, nursery, tmp_path, argv):
    settings = json.loads((ROOT / "ds_config.json").read_text())
    for stage in (0, 1, 3):
        settings["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}  # else ZeRO-3 would not cut so small tensors
        (tmp_path / "ds.json").write_text(json.dumps(settings))
        shutil.copytree(half, tmp_path / f"stage-{stage}")
        codes, text = nursery.run(argv(tmp_path / f"stage-{stage}", deepspeed_config=tmp_path / "ds.json"), 2, tmp_path / "log")
        assert codes == [0, 0], text
        assert same(weights(tmp_path / f"stage-{stage}"), weights(undisturbed[0]), 1e-5), stage


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_run_with_all_stacks(nursery, out, argv):
    codes, text = nursery.run(argv("hang", timeout_minutes=0.1), 2, out / "log", fault="hang_on_rank_1")
    assert codes == [1, 1] or sorted(codes) == [-9, 1], codes
    assert text.count("Timeout (0:00:06)!") == 2 and "in batch_loss" in text and "in gather" in text, text


class Bomb:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def plant_pickles(folder, base, data, checkpoint):
    """Beside everything that is read, a run's checkpoint included -> (flags that name it all, what is there once one is opened)."""
    shutil.copytree(base, folder / "base")
    shutil.copytree(data, folder / "data")
    bomb = pickle.dumps(Bomb(folder / "boom"))
    for part in ("vae", "transformer", "text_encoder"):
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt"):
            (folder / "base" / part / name).write_bytes(bomb)
    (folder / "cache").mkdir()
    for file in ("cache/a.pt", "cache/a.safetensors", "data/a.pkl", checkpoint / "state/a.pt", checkpoint.parent / "latest"):
        (folder / file).write_bytes(bomb)
    pickle.loads(bomb)
    (folder / "boom").unlink()  # it does go off
    return dict(pretrained_model_name_or_path=folder / "base", dataset_name=folder / "data", encoded_dir=folder / "cache"), folder / "boom"


def test_nothing_is_unpickled(half, nursery, base, data, tmp_path, argv):
    """A pickle in a checkpoint makes it a damaged one, and no other is opened."""
    told, gone_off = plant_pickles(tmp_path, base, data, half / "checkpoint-6")
    codes, text = nursery.run(argv(half, **told, max_train_steps=6), 2, tmp_path / "log")
    assert codes == [0, 0] and "checkpoint-6 is passed over: state/a.pt" in text, text
    assert not gone_off.exists()


def test_bad_rows_of_every_kind(base, flags, device, tmp_path, capsys):
    """Each has a defined result; none stops the others or changes which of them are used."""
    picture = tiny.draw_pair(random.Random(0))[0]

    def save(name, image=picture, **options):
        image.save(tmp_path / name, **options)
        return name

    gif = [picture, picture.rotate(90)]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / save("whole.jpg")).read_bytes()[:-300])
    (tmp_path / "folder.png").mkdir()
    used = {
        "plain": save("plain.png"), "CMYK": save("cmyk.jpg", picture.convert("CMYK")), "16 bit": save("deep.png", Image.new("I;16", (64, 64), 40000)),
        "palette": save("palette.png", picture.convert("P")), "RGBA": save("rgba.png", picture.convert("RGBA")), "grey": save("grey.png", picture.convert("L")),
        "turned": save("turned.jpg", exif=exif), "as it is": "whole.jpg", "animated": save("animated.gif", gif[0], save_all=True, append_images=gif[1:]),
        "dot": save("dot.png", Image.new("RGB", (1, 1))), "30,000 px long": save("long.png", Image.new("RGB", (30_000, 10))),
        "": "plain.png", "10,000 characters " * 600: "plain.png", "emoji 🙂": "plain.png", "NUL \0 inside": "plain.png",
    }  # fmt: skip
    bomb = save("bomb.png", Image.new("1", (20_000, 20_000)))
    bad = {"zero": "zero.png", "cut": "cut.jpg", "a folder": "folder.png", "missing": "nowhere.png", "bomb": bomb, "nothing": None}
    rows = [{"image": file, "conditioning_image": "plain.png", "text": text} for text, file in (bad | used).items()]
    rows += [{"image": "plain.png", "conditioning_image": "plain.png", "text": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(dataset_name=None, jsonl_for_train=tmp_path / "rows.jsonl", encoded_dir=tmp_path / "cache", pretrained_model_name_or_path=base, probe_samples=0,
                   max_sequence_length=64)  # fmt: skip
    c = cv4ctrl.resolve(cv4ctrl.parse(flags(tmp_path / "out", **options)), 1)
    with pytest.raises(cv4ctrl.Refusal, match="row"):
        cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    c = cv4ctrl.dataclasses.replace(c, skip_bad_rows=True)
    encoded = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    assert {row.text for row in encoded.train} == set(used) and len(encoded.train) == len(used)
    assert f"left out {len(rows) - len(used)} rows" in capsys.readouterr().err
    assert all(torch.isfinite(encoded.latent(row.image)).all() for row in encoded.train)
    assert max(encoded.index[row.caption][1] for row in encoded.train) == 64
    by_text = {row.text: encoded.latent(row.image) for row in encoded.train}
    assert not torch.equal(by_text["turned"], by_text["as it is"])  # as the camera meant it, like diffusers' load_image
