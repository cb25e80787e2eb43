"""What a run tells others: trackers, and the hub, as a local stand-in of its HTTP interface."""

import base64
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cv4ctrl
from ranks import Nursery

TOKEN = "hf_" + "Secret" * 5
BOTH = bool(find_spec("tensorboard") and find_spec("wandb"))
UPLOADED = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl", "validation/step-3.png"]


class Hub(BaseHTTPRequestHandler):
    """As much of https://huggingface.co as making, filling and reading a model repository asks for."""

    asked, files, blobs, full = [], {}, {}, False

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        Hub.asked.append((path, body))
        code, content, *headers = self.reply(path, body, f"http://{self.headers['Host']}")
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in (("Content-Length", len(content)), *headers):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    do_GET = do_HEAD = do_POST = do_PUT = answer
    log_message = lambda *_: None  # noqa: E731

    def reply(self, path, body, here):
        if path.startswith("/blob/"):  # where the hub keeps large files; it wants no token
            Hub.blobs[path.removeprefix("/blob/")] = body
            return 200, b""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return 200, {"url": f"{here}/someone/{json.loads(body)['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if Hub.full:
            return 403, {"error": "Private repository storage limit reached"}
        if "/preupload/" in path:
            files = [file | {"shouldIgnore": False, "uploadMode": "regular"} for file in json.loads(body)["files"]]
            large = [file | {"uploadMode": "lfs"} for file in files if file["path"].endswith(("safetensors", "png"))]
            return 200, {"files": files + large}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            objects = [one | {"actions": {"upload": {"href": f"{here}/blob/{one['oid']}"}}} for one in objects]
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if "path" in value:
                    small = line["key"] == "file"
                    Hub.files[value["path"]] = base64.b64decode(value["content"]) if small else Hub.blobs[value["oid"]]
            return 200, {"commitUrl": f"{here}/someone/run/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        content = Hub.files.get(re.sub("^/someone/run/resolve/[^/]+/", "", path))
        if content is None:
            return 404, {"error": "Entry not found"}, ("X-Error-Code", "EntryNotFound")
        return 200, content, ("ETag", hashlib.sha256(content).hexdigest()), ("X-Repo-Commit", "1" * 40)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Ranks whose hub is the stand-in; its variables are read when the library is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path_factory.mktemp("home")), "WANDB_MODE": "offline"}
    with Nursery(**env) as nursery:
        nursery.env = env
        yield nursery
    server.shutdown()


@pytest.fixture(scope="module")
def argv(flags, encoded):  # after the shared cache is filled
    common = {"max_train_steps": 3, "validation_steps": 2, "num_validation_images": 1, "num_inference_steps": 2}
    common |= {"push_to_hub": True, "report_to": "all" if BOTH else "none"}
    return lambda folder, **options: flags(folder, **common | options)


@pytest.fixture(scope="module")
def told(nursery, argv, tmp_path_factory):
    """A run that tells everybody -> (its folder, what it said, what it asked the hub for)."""
    out = tmp_path_factory.mktemp("reports")
    command = [sys.executable, cv4ctrl.__file__, *argv(out / "run")]  # wandb finishes as its process ends
    env = os.environ | nursery.env | {"WANDB_DIR": str(out), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    return out / "run", text, [path for path, _ in Hub.asked if "repos" in path or "someone" in path]


@pytest.mark.skipif(not BOTH, reason="tensorboard and wandb are optional")
def test_trackers_read_back(told):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def pixels(file):
        return Image.open(file).tobytes()

    run, figures = told[0], []
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        kind = "train" if "loss" in row else "probe"
        figures += [(f"{kind}/{name}", row["step"], value) for name, value in row.items() if name != "step"]
    events = EventAccumulator(str(run / "logs"), {"images": 0}).Reload()
    for name in {name for name, _, _ in figures}:
        seen = [(name, event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(name)]
        assert seen == [figure for figure in figures if figure[0] == name]
    drawn = {step: pixels(run / "validation" / f"step-{step}.png") for step in (0, 2, 3)}
    seen = {event.step: pixels(io.BytesIO(event.encoded_image_string)) for event in events.Images("validation")}
    (offline,) = (run.parent / "wandb").glob("offline-run-*")
    shown = [pixels(file) for file in offline.glob("files/media/images/*.png")]
    assert seen == drawn and sorted(shown) == sorted(drawn.values())
    content = next(offline.glob("*.wandb")).read_bytes()
    texts = [text for name, _, value in figures for text in (name, str(np.float32(value)).removesuffix(".0"))]
    assert not [text for text in texts if text.encode() not in content]


@pytest.mark.parametrize("tracker, fault", [("tensorboard", "missing"), ("wandb", "missing"), ("tensorboard", "later")])
def test_a_tracker_that_fails_is_dropped_with_one_line(tracker, fault, config, device, tmp_path, monkeypatch, capsys):
    if fault == "missing":
        monkeypatch.setitem(sys.modules, tracker, None)
    else:
        pytest.importorskip(tracker)
    log = cv4ctrl.Log(config(tmp_path, report_to=tracker), 0, 3)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 0.5})
        if step == 1 and fault == "later":  # the folder of its files is replaced by a file
            shutil.rmtree(tmp_path / "logs")
            (tmp_path / "logs").write_text("")
    lines = [line for line in capsys.readouterr().err.splitlines() if "cv4ctrl.py" in line]
    assert len(lines) == 1 and f"--report_to {tracker}: " in lines[0] and "without this tracker" in lines[0]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_wrong_token_ends_the_run_before_anything_is_loaded(nursery, argv, tmp_path):
    words = argv(tmp_path / "out", encoded_dir=tmp_path / "encoded")
    codes, text = nursery.run(words, 1, tmp_path / "log", env={"HF_TOKEN": "hf_wrong"})
    (line,) = [line for line in text.splitlines() if line.startswith("cv4ctrl.py:")]
    assert codes == [2] and "Invalid username" in line and "hf auth login" in line, text
    assert "Traceback" not in text and "hf_wrong" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_the_hub_gets_weights_figures_picture_and_card(told, base, data):
    run, _, asked = told
    assert asked[0] == "/api/repos/create" and asked[-1] == "/api/models/someone/run/commit/main"
    assert sorted(Hub.files) == UPLOADED
    assert all(content == (run / name).read_bytes() for name, content in Hub.files.items())
    card = Hub.files["README.md"].decode()
    for part in (str(base), str(data), "(validation/step-3.png)", "3 steps of 4 samples", "library_name: diffusers"):
        assert part in card, (part, card)


def test_an_upload_that_fails(nursery, told, argv, tmp_path):
    """The same command again has nothing to train: it uploads, in vain. Then by hand, as it says."""
    Hub.full = True
    codes, text = nursery.run(argv(told[0]), 1, tmp_path, env={"WANDB_DIR": str(tmp_path)})
    Hub.full = False
    line = [line for line in text.splitlines() if line.startswith("cv4ctrl.py:")][-1]
    assert codes == [1] and "storage limit" in line and "Traceback" not in text, text
    Hub.files.clear()
    program, *words = shlex.split(line.split("`")[1])
    program = Path(sys.executable).with_name(program)
    done = subprocess.run([program, *words], env=os.environ | nursery.env, capture_output=True, text=True)
    assert done.returncode == 0 and sorted(Hub.files) == UPLOADED, done.stderr[-2000:]


def test_the_token_is_nowhere(told):
    run, text, _ = told
    files = [file.read_bytes() for file in run.parent.rglob("*") if file.is_file()]
    said = [part for path, body in Hub.asked for part in (path.encode(), body)]
    assert len(files) > 10 and not [part for part in (text.encode(), *files, *said) if TOKEN.encode() in part]
