"""Room 6: what lies in the cache is what inference computes, and it is computed once."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, CogView4ControlPipeline
from PIL import Image
from safetensors import safe_open

import cv4ctrl
import tiny
from ranks import launch

CAPTIONS = ["", "a red circle on grey", "fourteen bytes", "x" * 300, "两个朋友 🙂", "a\nb\tc"]


@pytest.fixture(scope="module")
def pipe(base):
    return CogView4ControlPipeline.from_pretrained(base, transformer=None, torch_dtype=torch.bfloat16)


@pytest.fixture()
def run(config, base, device, tmp_path, monkeypatch):
    """encode() of rows into a cache of its own, with counts of what was encoded: (Encoded, pictures, captions)."""

    def encode(rows, cache="cache", base=base, **options):
        data = tiny.write_parquet(tmp_path / f"data-{random.random()}", rows)
        c = config(tmp_path / "out", dataset_name=data, encoded_dir=tmp_path / cache, **options)
        counts = {"pictures": 0, "captions": 0}

        def counted(name, function):
            def call(*args, **kwargs):
                counts[name] += 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(AutoencoderKL, "encode", counted("pictures", AutoencoderKL.encode))
            patch.setattr(CogView4ControlPipeline, "encode_prompt", counted("captions", CogView4ControlPipeline.encode_prompt))
            encoded = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
        return encoded, counts["pictures"], counts["captions"]

    return encode


def by_id(encoded):
    return {row.id: row for row in (*encoded.train, *encoded.held_out)}


def test_a_variant_of_the_weights_serves_all_parts(run, base, tmp_path):
    """Files named *.bf16.safetensors alone, as some bases on the hub have them."""
    variant = shutil.copytree(base, tmp_path / "variant")
    for file in variant.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".bf16.safetensors"))
    rows = tiny.make_rows(8)
    encoded, expected = (run(rows, cache=name, base=folder, variant="bf16")[0] for name, folder in (("a", variant), ("b", base)))
    for row, other in zip(encoded.train, expected.train):
        assert torch.equal(encoded.entry(row.image), expected.entry(other.image))
        assert torch.equal(encoded.entry(row.caption), expected.entry(other.caption))


def test_embeddings_are_the_pipelines_alone_bitwise(run, pipe):
    rows = [(*pair[:2], caption) for pair, caption in zip(tiny.make_rows(len(CAPTIONS)), CAPTIONS)]
    encoded, _, captions = run(rows, max_sequence_length=64)
    assert captions == len(CAPTIONS)  # "" is a caption of its own here
    lengths = []
    for id, caption in enumerate(CAPTIONS):
        ours = encoded.entry(by_id(encoded)[id].caption)
        theirs = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=64)[0][0]
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs), caption
        lengths.append(len(ours))
    assert lengths[:4] == [16, 32, 16, 64]  # 2 frame tokens + bytes, padded to 16; exactly 16 stays 16; 302 are cut to 64
    assert torch.equal(encoded.entry(encoded.empty), encoded.entry(by_id(encoded)[0].caption))


def test_moments_are_those_of_the_pipelines_picture(run, pipe):
    rows = tiny.make_rows(2)
    encoded, _, _ = run(rows)
    for id, (image, control, _) in enumerate(rows):
        for content, key in ((image, by_id(encoded)[id].image), (control, by_id(encoded)[id].control)):
            pixels = pipe.image_processor.preprocess(Image.open(io.BytesIO(content)), 64, 64).bfloat16()
            with torch.no_grad():  # as the pipeline runs it; with gradients the CPU rounds otherwise
                posterior = pipe.vae.encode(pixels).latent_dist
            assert torch.equal(encoded.entry(key), posterior.parameters[0])
            eps = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(id))
            expected = posterior.mean[0].float() + posterior.logvar[0].float().mul(0.5).exp() * eps
            torch.testing.assert_close(encoded.latent(key, eps), expected)
            assert torch.equal(encoded.latent(key), posterior.mean[0].float())


def test_hits_and_misses(run, base, tmp_path):
    rows = tiny.make_rows(12, seed=7)
    captions = len({row[2] for row in rows}) + 1  # and ""
    assert run(rows)[1:] == (24, captions)
    assert run(rows)[1:] == (0, 0)
    changed = [(*rows[0][:2], "another caption"), *rows[1:]]
    assert run(changed)[1:] == (0, 1)
    assert run([*rows[1:], rows[0]])[1:] == (0, 0)  # another order
    other = tiny.make_rows(1, seed=99)[0]
    assert run([(other[0], *rows[0][1:]), *rows[1:]])[1:] == (1, 0)  # image
    assert run([(rows[0][0], other[1], rows[0][2]), *rows[1:]])[1:] == (1, 0)  # control
    assert run(rows, resolution=80)[1:] == (24, 0)
    assert run(rows, max_sequence_length=512)[1:] == (0, captions)
    assert run(rows, control="canny")[1:] == (12, 0)
    shutil.copytree(base, tmp_path / "other")
    tiny.make_base(tmp_path / "third", seed=1)
    for part, expected in (("vae", (24, 0)), ("text_encoder", (0, captions))):
        shutil.rmtree(tmp_path / "other" / part)
        shutil.copytree(tmp_path / "third" / part, tmp_path / "other" / part)
        assert run(rows, base=tmp_path / "other")[1:] == expected


def test_a_column_that_is_not_needed_is_not_read(run):
    rows = [(image, b"not an image", text) for image, _, text in tiny.make_rows(4)]
    assert run(rows, control="canny")[1] == 8


def test_duplicates_are_encoded_once(run):
    row = tiny.make_rows(1)[0]
    assert run([row] * 5)[1:] == (2, 2)


def test_the_cache_is_bf16_safetensors_only(run, tmp_path):
    run(tiny.make_rows(3))
    files = list((tmp_path / "cache").iterdir())
    assert files and all(f.suffix == ".safetensors" for f in files)
    for file in files:
        with safe_open(file, "pt") as shard:
            assert all(shard.get_tensor(key).dtype == torch.bfloat16 for key in shard.keys())


def test_a_damaged_file_is_encoded_again(run, tmp_path):
    rows = tiny.make_rows(4)
    encoded = run(rows)[0]
    file = encoded.index[encoded.train[0].image][0]
    file.write_bytes(file.read_bytes()[:-100])
    again, pictures, _ = run(rows)
    assert pictures > 0 and torch.isfinite(again.latent(again.train[0].image)).all()
    assert run(rows)[1:] == (0, 0)


@pytest.mark.parametrize("control", ["column", "canny"])
def test_a_picture_that_changes_while_others_are_encoded_is_not_stored(control, config, base, device, tmp_path, monkeypatch):
    rows, find_rows = tiny.make_rows(10), cv4ctrl.find_rows
    lines = []
    for n, (image, other, text) in enumerate(rows):
        (tmp_path / f"{n}.png").write_bytes(image), (tmp_path / f"{n}-control.png").write_bytes(other)
        lines.append(json.dumps({"image": f"{n}.png", "conditioning_image": f"{n}-control.png", "text": text}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    c = config(
        dataset_name=None,
        jsonl_for_train=tmp_path / "rows.jsonl",
        encoded_dir=tmp_path / "cache",
        control=control,
        probe_samples=0,
        train_batch_size=1,
        skip_bad_rows=True,
    )

    def change(*args):
        found = find_rows(*args)
        (tmp_path / "3.png").write_bytes(rows[4][0])
        return found

    monkeypatch.setattr(cv4ctrl, "find_rows", change)
    with pytest.raises(cv4ctrl.Ended, match="row 3, image .* changed since"):
        cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    monkeypatch.undo()
    stored = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)  # the second time it is what it has become
    again = cv4ctrl.encode(cv4ctrl.dataclasses.replace(c, encoded_dir=str(tmp_path / "new")), base, cv4ctrl.open_dataset(c), device)
    assert stored.train == again.train and stored.index.keys() >= again.index.keys()
    assert all(torch.equal(stored.entry(row.control), again.entry(row.control)) for row in again.train)


def test_killed_encoding_goes_on_where_it_stopped(flags, config, base, device, tmp_path, monkeypatch):
    options = dict(encoded_dir=tmp_path / "cache", max_train_steps=1)
    with pytest.raises(AssertionError):
        launch(1, ("die_while_encoding", [flags(tmp_path / "out", **options), 30]))
    assert len(cv4ctrl.read_index(tmp_path / "cache")) == 24  # three files of 8; what was in memory is lost
    calls, encode = [], AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    c = config(tmp_path / "out", **options)
    encoded = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    assert len(calls) == 96 - 24 and len(encoded.train) == 44


def test_rows_that_cannot_be_used(run, refused, flags, base, tmp_path, capsys):
    good = tiny.make_rows(10)
    bad = [(b"not an image", *good[0][1:]), (good[0][0], good[0][1][:60], good[0][2]), (*good[0][:2], None)]
    data = tiny.write_parquet(tmp_path / "bad", [*good[:3], *bad[:2], *good[3:]])
    line = refused(flags(tmp_path / "out", dataset_name=data, encoded_dir=tmp_path / "kept", train_batch_size=1), progress=True)
    assert "row 3" in line and "image" in line and "--skip_bad_rows" in line
    assert len(cv4ctrl.read_index(tmp_path / "kept")) > 0  # what was encoded is kept
    encoded, *_ = run([*good[:3], *bad, *good[3:]], "skipped", skip_bad_rows=True)
    assert sorted(row.id for row in (*encoded.train, *encoded.held_out)) == [0, 1, 2, *range(6, 13)]
    assert "left out 3 rows that cannot be used (3, 4, 5)" in capsys.readouterr().err


def test_bad_rows_do_not_move_the_choice_of_others(run):
    good = tiny.make_rows(30)
    before = run(good)[0]
    after = run([*good[:5], (b"broken", *good[5][1:]), *good[5:]], skip_bad_rows=True)[0]
    contents = [{(row.image, row.caption) for row in e.held_out} for e in (before, after)]
    assert contents[0] == contents[1] and len(contents[0]) == 3


def test_pictures_are_upright_rgb(run, tmp_path):
    """EXIF rotation, palette, RGBA, CMYK, grey: as diffusers' load_image makes them."""
    rng = Image.effect_noise((40, 64), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = []
    for image, kind, options in [(rng, "JPEG", {"exif": exif}), (rng.convert("P"), "PNG", {}), (rng.convert("RGBA"), "PNG", {}),
                                 (rng.convert("CMYK"), "JPEG", {}), (rng.convert("L"), "PNG", {})]:  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        contents.append(buffer.getvalue())
    encoded, pictures, _ = run([(content, contents[0], "x") for content in contents])
    assert pictures == 5 and len(by_id(encoded)) == 5
    turned = rng.transpose(Image.Transpose.ROTATE_270)  # what EXIF orientation 6 asks for, written out
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", quality=100)
    upright = run([(buffer.getvalue(), contents[0], "x")])[0]
    a, b = (e.latent(by_id(e)[0].image) for e in (encoded, upright))
    assert (a - b).abs().mean() < 0.5 * (a - encoded.latent(by_id(encoded)[1].image)).abs().mean()


def test_json_lines_and_lists_of_captions(config, base, device, tmp_path):
    folder = tmp_path / "set" / "pictures"
    folder.mkdir(parents=True)
    lines = []
    for id, (image, control, caption) in enumerate(tiny.make_rows(12)):
        (folder / f"{id}.png").write_bytes(image)
        (folder / f"{id}-c.png").write_bytes(control)
        there = "pictures" if id % 2 else str(folder)  # relative to the file, or absolute
        lines.append({"image": f"{there}/{id}.png", "conditioning_image": f"{there}/{id}-c.png", "text": ["a", caption, "bb"]})
    jsonl = tmp_path / "set" / "train.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, lines)))
    c = config(tmp_path / "out", dataset_name=None, jsonl_for_train=jsonl, encoded_dir=tmp_path / "cache")
    encoded = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)
    assert [by_id(encoded)[id].text for id in range(12)] == [line["text"][1] for line in lines]


def test_validation_pictures_are_cases_without_target(config, base, device, tmp_path):
    for name, row in zip("ab", tiny.make_rows(2, seed=3)):
        (tmp_path / f"{name}.png").write_bytes(row[1])
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    c = config(tmp_path / "out", validation_image=images, validation_prompt=["one prompt"])
    cases = cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device).cases
    assert [(case.text, case.image) for case in cases] == [("one prompt", None)] * 2
    assert cases[0].control != cases[1].control


def test_held_out_rows_are_at_most_a_tenth_and_not_trained_on(encoded):
    assert len(encoded.held_out) == 4 and len(encoded.train) == 44
    assert not {row.id for row in encoded.held_out} & {row.id for row in encoded.train}
    assert encoded.cases == encoded.held_out[: cv4ctrl.VALIDATION_CASES]


def test_fingerprint_reads_content_not_names(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        Path(tmp_path, name).mkdir()
        Path(tmp_path, name, "model.safetensors").write_bytes(content)
    a, b, c = (cv4ctrl.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    Path(tmp_path, "blobs").mkdir()
    for name, content in (("d" * 64, b"1"), ("e" * 64, b"2")):  # the hub's cache: links to blobs that are named by their SHA-256
        Path(tmp_path, "blobs", name).write_bytes(content)
        Path(tmp_path, name).mkdir()
        Path(tmp_path, name, "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    linked = [cv4ctrl.fingerprint(tmp_path / name) for name in ("d" * 64, "e" * 64)]
    Path(tmp_path, "blobs", "d" * 64).write_bytes(b"not read again")
    assert linked[0] != linked[1] and cv4ctrl.fingerprint(tmp_path / ("d" * 64)) == linked[0]


def test_the_cache_can_be_read_by_others(run, tmp_path):
    import os

    before = os.umask(0o022)
    try:
        run(tiny.make_rows(1))
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "cache").iterdir()} == {0o644}


def test_columns_that_no_flag_names_are_not_decoded(config, tmp_path):
    """Such as sound or film, for which libraries are missing here."""
    import datasets

    features = datasets.Features(
        image=datasets.Image(), conditioning_image=datasets.Image(), text=datasets.Value("string"), more=datasets.List(datasets.Image())
    )
    broken = {"bytes": b"none", "path": None}
    rows = datasets.Dataset.from_dict({"image": [broken], "conditioning_image": [broken], "text": ["a"], "more": [[broken]]}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(Exception, match="identify"):
        datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train").cast_column("image", datasets.Image(decode=False))[0]
    assert cv4ctrl.open_dataset(config(dataset_name=tmp_path / "rows.parquet"))[0] == {"image": broken, "conditioning_image": broken, "text": "a"}
