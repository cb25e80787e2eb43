"""Rooms 10 and 11: what a run tells others: trackers, and a local stand-in of the hub's HTTP interface."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

import cv4ctrl
from nursery import Nursery

TOKEN = "hf_" + "Secret" * 5
BOTH = bool(find_spec("tensorboard") and find_spec("wandb"))
STEPS = 3


class Hub(BaseHTTPRequestHandler):
    """As much of https://huggingface.co as making, filling and reading a model repository asks for."""

    asked, files, blobs, broken = [], {}, {}, False

    def answer(self, code, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, here = self.path.split("?")[0], f"http://{self.headers['Host']}"
        Hub.asked.append((self.command, path, body))
        if path.startswith("/blob/"):  # where the hub keeps large files; it wants no token
            Hub.blobs[path.removeprefix("/blob/")] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.answer(200, {"url": f"{here}/someone/{json.loads(body)['name']}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if Hub.broken:
            return self.answer(403, {"error": "Private repository storage limit reached"})
        if "/preupload/" in path:
            modes = {f["path"]: "lfs" if f["path"].endswith(("safetensors", "png")) else "regular" for f in json.loads(body)["files"]}
            return self.answer(200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [o | {"actions": {"upload": {"href": f"{here}/blob/{o['oid']}"}}} for o in json.loads(body)["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    Hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    Hub.files[value["path"]] = Hub.blobs[value["oid"]]
            return self.answer(200, {"commitUrl": f"{here}/someone/run/commit/1", "commitOid": "1" * 40, "hookOutput": "", "success": True})
        name = re.sub("^/someone/run/resolve/[^/]+/", "", path)
        if name not in Hub.files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        etag = hashlib.sha256(Hub.files[name]).hexdigest()
        return self.answer(200, Hub.files[name], ETag=f'"{etag}"', X_Repo_Commit="1" * 40)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Ranks whose hub is the stand-in; the variables are read when the library is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mine = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "WANDB_MODE": "offline",
            "HF_HOME": str(tmp_path_factory.mktemp("home"))}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mine.items():
            patch.setenv(name, value)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        with Nursery() as nursery:
            nursery.env = os.environ | mine
            yield nursery
    server.shutdown()


@pytest.fixture(scope="module")
def out(tmp_path_factory, encoded):  # after the shared cache is filled
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def argv(out, flags):
    common = dict(max_train_steps=STEPS, validation_steps=2, num_validation_images=1, num_inference_steps=2, push_to_hub=True,
                  log_dataset_samples=True, report_to="all" if BOTH else "csv")  # fmt: skip
    return lambda name, **options: flags(out / name, **common | options)


@pytest.fixture(scope="module")
def told(nursery, out, argv):
    """A run that tells everybody: (its folder, what it said, what it asked the hub for)."""
    Hub.asked.clear()
    codes, text = nursery.run(argv("run"), 1, out / "log", env={"WANDB_DIR": str(out)})
    assert codes == [0], text
    return out / "run", text, [path for _, path, _ in Hub.asked if "repos" in path or "someone" in path]


@pytest.fixture(scope="module")
def rows(told):
    """{step: figures} of metrics.jsonl, as trackers name them."""
    kind = lambda row: "train" if "loss" in row else "probe"  # noqa: E731
    found = [json.loads(line) for line in (told[0] / "metrics.jsonl").read_text().splitlines()]
    return [(f"{kind(row)}/{name}", row["step"], value) for row in found for name, value in row.items()
            if name != "step" and isinstance(value, (int, float))]  # fmt: skip


def test_csv_read_back(told, rows):
    logs = told[0] / "logs" / "cogview4_train_control"
    for name in ("train/loss", "train/grad_norm", "probe/control_gain"):
        header, *lines = (logs / f"{name.replace('/', '_')}.csv").read_text().splitlines()
        assert header == f"step,{name.split('/')[1]}"
        assert [[float(word) for word in line.split(",")] for line in lines] == [[step, value] for n, step, value in rows if n == name]
    assert not list(logs.glob("Train_*")) and not list(logs.glob("*.png"))  # nothing of DeepSpeed's own


def test_tensorboard_read_back(told, rows):
    pytest.importorskip("wandb")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(told[0] / "logs" / "cogview4_train_control"), {"images": 0, "tensors": 0}).Reload()
    assert {name for name, _, _ in rows} == set(events.Tags()["scalars"])
    for name in ("train/loss", "probe/control_gain"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(step, pytest.approx(value, rel=1e-6)) for n, step, value in rows if n == name]
    pictures = events.Images("validation")
    assert [event.step for event in pictures] == [0, 2, 3] and events.Images("dataset_samples")
    (told[0].parent / "seen.png").write_bytes(pictures[-1].encoded_image_string)
    seen, drawn = Image.open(told[0].parent / "seen.png"), Image.open(told[0] / "validation" / "step-3.png")
    assert seen.tobytes() == drawn.tobytes()
    text = events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text.strip("`").removeprefix("json")) == json.loads((told[0] / "run.json").read_text())


def test_wandb_read_back(told, rows):
    pytest.importorskip("tensorboard"), pytest.importorskip("wandb")
    (run,) = (told[0].parent / "wandb").glob("offline-run-*")
    shown, drawn = run.glob("files/media/images/*.png"), [*told[0].glob("validation/*.png"), told[0] / "dataset_samples.png"]
    assert {Image.open(file).tobytes() for file in shown} == {Image.open(file).tobytes() for file in drawn}
    (file,) = run.glob("*.wandb")
    content = file.read_bytes()
    for name, _, value in rows:
        assert name.encode() in content and json.dumps(value).encode() in content, (name, value)
    assert b'"total_batch_size":' in content.replace(b" ", b"") and b"cogview4_train_control" in content


def test_a_tracker_that_fails_later_is_left_out(nursery, out, argv):
    """Two ranks; the folder of the logs goes when a step is done."""
    argv = argv("fails", train_batch_size=2, push_to_hub=None, num_validation_images=0, log_dataset_samples=None)
    codes, text = nursery.run(argv, 2, out / "log", fault="logs_gone_at_step_2", env={"WANDB_DIR": str(out / "fails")})
    said = sorted(line.split(":")[1].split()[-1] for line in text.splitlines() if "without this tracker" in line)
    assert codes == [0, 0] and said == (["csv", "tensorboard"] if BOTH else ["csv"]), text
    steps = [row["step"] for row in map(json.loads, (out / "fails" / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert steps == [1, 2, 3] and (out / "fails" / "checkpoint-3").is_dir()
    assert len((out / "fails" / "moved" / "cogview4_train_control" / "train_loss.csv").read_text().splitlines()) == 2


def test_wandb_without_a_login_is_refused_at_the_start(flags, refused, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert "wandb login" in refused(flags(tmp_path / "out", report_to="wandb"))
    assert not (tmp_path / "out").exists()


def test_trackers_in_the_file_are_refused(flags, refused, tmp_path):
    settings = json.loads((Path(cv4ctrl.__file__).parent / "ds_config.json").read_text()) | {"comet": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    line = refused(flags(tmp_path / "out", deepspeed_config=tmp_path / "ds.json"))
    assert "comet" in line and "--report_to" in line


def test_a_wrong_token_ends_the_run_before_anything_is_loaded(nursery, out, argv):
    codes, text = nursery.run(argv("wrong", encoded_dir=out / "none"), 1, out / "log", env={"HF_TOKEN": "hf_wrong"})
    lines = [line for line in text.splitlines() if line.startswith("cv4ctrl.py:")]
    assert codes == [2] and len(lines) == 1 and "Invalid username" in lines[0] and "hf auth login" in lines[0], text
    assert "Traceback" not in text and "hf_wrong" not in text and not (out / "wrong").exists() and not (out / "none").exists()


def test_the_hub_gets_weights_figures_picture_and_card(told, base, data, argv):
    run, _, asked = told
    assert asked[0] == "/api/repos/create" and asked[-1] == "/api/models/someone/run/commit/main"
    assert set(Hub.files) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl", "validation/step-3.png"}
    assert all(content == (run / name).read_bytes() for name, content in Hub.files.items())
    card = Hub.files["README.md"].decode()
    gain = [json.loads(line)["control_gain"] for line in (run / "metrics.jsonl").read_text().splitlines() if "control_gain" in line][-1]
    for part in (str(base), str(data), "(validation/step-3.png)", f"control_gain {gain:g},", "step 3,", "library_name: diffusers"):
        assert part in card, (part, card)
    assert shlex.split(re.search(r"`(cv4ctrl\.py.*?)`", card)[1]) == ["cv4ctrl.py", *argv("run")]


def test_the_cards_snippet_draws_a_picture(nursery, told, out):
    """As it stands in the card, on the CPU, with the weights that the stand-in serves."""
    code = re.search(r"```python\n(.*?)```", Hub.files["README.md"].decode(), re.S)[1].replace('"cuda"', '"cpu"')
    (out / "snippet").mkdir()
    Image.new("RGB", (64, 64)).save(out / "snippet" / "control.png")
    (out / "snippet" / "snippet.py").write_text(f"import os\nos.chdir({str(out / 'snippet')!r})\n{code}")
    codes, text = nursery.run([out / "snippet" / "snippet.py"], 1, out / "log", fault="be_a_script")
    assert codes == [0], text
    assert Image.open(out / "snippet" / "picture.png").size == (64, 64)


def test_the_card_names_what_the_hub_knows(config, tmp_path, monkeypatch):
    """Base and data of the hub are linked in the card's head; the hub refuses names it does not know, such as folders."""
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **_: None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    cv4ctrl.push(config(tmp_path), "someone/run", 1)
    assert "base_model:" not in (tmp_path / "README.md").read_text()
    cv4ctrl.push(config(tmp_path, pretrained_model_name_or_path="THUDM/CogView4-6B", dataset_name="a/b"), "someone/run", 1)
    head = (tmp_path / "README.md").read_text().split("---")[1]
    assert "base_model: THUDM/CogView4-6B" in head and "datasets: a/b" in head and "![" not in (tmp_path / "README.md").read_text()


def test_an_upload_that_fails(nursery, told, out, argv):
    """The same command again has nothing to train: it uploads, in vain. Then by hand, as it says."""
    Hub.broken = True
    codes, text = nursery.run(argv("run"), 1, out / "log", env={"WANDB_DIR": str(out / "again")})
    Hub.broken = False
    line = [line for line in text.splitlines() if line.startswith("cv4ctrl.py:")][-1]
    assert codes == [1] and "storage limit" in line and "Traceback" not in text, text
    assert (out / "run" / "diffusion_pytorch_model.safetensors").exists()
    kept = dict(Hub.files)
    Hub.files.clear()
    command = shlex.split(line.split("`")[1])
    done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], env=nursery.env, capture_output=True, text=True)
    assert done.returncode == 0 and Hub.files.keys() == kept.keys(), done.stderr


def test_the_token_is_nowhere(told):
    run, text, _ = told
    assert TOKEN not in text
    for file in (f for f in run.parent.rglob("*") if f.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), file
    assert not [path for _, path, body in Hub.asked if TOKEN.encode() in body or TOKEN in path]
