"""Data as people really have them: nothing is left out, clipped or mixed up in silence."""

import io
import json
import os
import random
import shutil

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cv4ctrl
import tiny

DEEP = np.linspace(0, 65535, 64)[None].repeat(64, 0)


@pytest.fixture()
def read(config):
    """Reads row 0 of some rows -> (pixels by use, what is wrong)."""

    def run(row, **options):
        found, wrong, parts = cv4ctrl.read_row(config(**options), "pictures", "captions", {}, [row], 0)
        return [parts[key] for key in (found.image, found.control)] if found else None, wrong

    return run


def encoded_as(image, form="PNG", **options):
    image.save(buffer := io.BytesIO(), form, **options)
    return {"bytes": buffer.getvalue()}


def transparent(kind):
    """A red square whose left half is transparent, in one of the ways to be so."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    if kind in ("RGBA", "LA"):
        return encoded_as(image.convert(kind))
    if kind == "WebP":
        return encoded_as(image, "WEBP", lossless=True)
    if kind == "P":
        palette = image.convert("RGB").quantize(4)
        return encoded_as(palette, transparency=palette.getpixel((0, 0)))
    return encoded_as(image.convert("RGB"), transparency=(0, 0, 0))  # an RGB PNG with tRNS


@pytest.mark.parametrize("column", ["image", "conditioning_image"])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_a_channel_are_bad_rows(mode, column, read):
    """Inference would clip them, too."""
    kinds = {"I;16": (np.uint16, "PNG"), "I": (np.int32, "TIFF"), "F": (np.float32, "TIFF")}
    kind, form = kinds[mode]
    row = dict.fromkeys(("image", "conditioning_image"), encoded_as(Image.new("RGB", (64, 64)))) | {"text": "a"}
    row[column] = encoded_as(Image.fromarray(DEEP.astype(kind)), form)
    assert Image.open(io.BytesIO(row[column]["bytes"])).mode == mode
    found, wrong = read(row)
    assert found is None and wrong.startswith(f"row 0, {column}: mode {mode} ") and "8 bits" in wrong


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "tRNS", "WebP"])
def test_transparency_is_white_in_a_target_and_refused_in_a_control(kind, read):
    picture, plain = transparent(kind), encoded_as(Image.new("RGB", (64, 64)))
    (target, _), wrong = read({"image": picture, "conditioning_image": plain, "text": "a"})
    assert not wrong and (target[..., :31] == 1).all() and target[0, 1, 32, 40] < 0  # white, and as it is
    found, wrong = read({"image": plain, "conditioning_image": picture, "text": "a"})
    assert found is None and "row 0, conditioning_image: transparent pixels" in wrong and "flatten" in wrong
    assert read({"image": picture, "text": "a"}, control="canny")[0]  # the detector sees what is trained on
    opaque = encoded_as(Image.new("RGBA", (64, 64), (9, 99, 199, 255)))
    same = encoded_as(Image.new("RGB", (64, 64), (9, 99, 199)))
    pixels, _ = read({"image": opaque, "conditioning_image": same, "text": "a"})
    assert pixels[0].equal(pixels[1])


def row_of(id, image, control):
    return cv4ctrl.Row(id, f"image {image}", f"control {control}", "caption")


@pytest.mark.parametrize("rows", [
    [(n // 5, n // 5) for n in range(200)],  # five captions a picture
    [(n % 40, n % 40) for n in range(200)],  # a set that is listed five times
    [(n, n // 3) for n in range(200)], [(n // 3, n) for n in range(200)],  # one control for three images, and back
])  # fmt: skip
def test_whole_pictures_are_held_out_with_controls_that_differ(rows):
    rows = [row_of(id, *pair) for id, pair in enumerate(rows)]
    train, held_out = cv4ctrl.hold_out(rows, 32)
    trained_on = {picture for row in train for picture in (row.image, row.control)}
    assert len(held_out) >= 4 and len(train) >= 0.9 * len(rows)
    assert not trained_on & {picture for row in held_out for picture in (row.image, row.control)}
    assert len({row.control for row in held_out}) == len({row.image for row in held_out}) == len(held_out)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {row.image for row in cv4ctrl.hold_out(shuffled, 32)[1]} == {row.image for row in held_out}
    assert [len(part) for part in cv4ctrl.hold_out(rows, 0)] == [len(rows), 0]


def test_where_nothing_can_be_held_out_a_line_says_so(config, base, device, capsys, tmp_path):
    """Eight pictures listed five times: each is more than a tenth of the rows."""
    rows = [dict(zip(("image", "conditioning_image", "text"), ({"bytes": a}, {"bytes": b}, text)))
            for a, b, text in tiny.make_rows(8) * 5]  # fmt: skip
    encoded = cv4ctrl.encode(config(encoded_dir=tmp_path), base, rows, device)
    assert len(encoded.train) == 40 and not encoded.held_out
    assert "fewer than two controls can be held out" in capsys.readouterr().err


def parquet(folder, count, start=0):
    """`count` rows as FOLDER.parquet, whose captions are numbers."""
    rows = [{"image": "a.png", "conditioning_image": "b.png", "text": str(start + n)} for n in range(count)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder.with_suffix(".parquet"))


def captions(config, folder, **options):
    return sorted(int(row["text"]) for row in cv4ctrl.open_dataset(config(dataset_name=folder, **options)))


def test_a_folder_of_parquet_files_is_read_whole(config, tmp_path, capsys):
    parquet(tmp_path / "some named" / "train", 20)
    parquet(tmp_path / "some named" / "more", 60, 20)
    assert captions(config, tmp_path / "some named") == list(range(80)) and "left out" not in capsys.readouterr().err


def test_of_named_splits_train_is_taken_and_the_others_are_named(config, tmp_path, capsys):
    parquet(tmp_path / "splits" / "train-00000-of-00001", 20)
    parquet(tmp_path / "splits" / "test-00000-of-00001", 60, 20)
    assert captions(config, tmp_path / "splits") == list(range(20))
    assert "split train is taken, test left out" in capsys.readouterr().err
    parquet(tmp_path / "alone" / "test", 20)
    assert captions(config, tmp_path / "alone") == list(range(20))
    parquet(tmp_path / "none" / "test", 20)
    parquet(tmp_path / "none" / "validation", 20)
    with pytest.raises(cv4ctrl.Failure, match="no split train, but .*(validation|test)"):
        captions(config, tmp_path / "none")


def test_what_save_to_disk_leaves_is_loaded(config, tmp_path, capsys):
    rows = datasets.Dataset.from_list([{"image": "a", "conditioning_image": "b", "text": str(n)} for n in range(5)])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    assert captions(config, tmp_path / "one") == captions(config, tmp_path / "two") == [0, 1, 2, 3, 4]
    assert "test left out" in capsys.readouterr().err


def picture_folder(folder, relative=False):
    """Two rows; the controls as columns of pictures, or as paths that are relative to the folder."""
    folder.mkdir(parents=True)
    name = "conditioning_image" if relative else "conditioning_image_file_name"
    lines = [{"file_name": f"{n}.png", name: f"{n}-control.png", "text": str(n)} for n in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for n in range(2):
        Image.new("RGB", (64, 64), (n, 0, 0)).save(folder / f"{n}.png")
        Image.new("RGB", (64, 64), (0, n + 1, 0)).save(folder / f"{n}-control.png")


def test_brackets_in_paths(config, tmp_path):
    parquet(tmp_path / "data [v2]" / "train", 20)
    picture_folder(tmp_path / "pictures [v2]*")
    (tmp_path / "[v2].jsonl").write_text('{"image": "a", "conditioning_image": "b", "text": "7"}')
    assert captions(config, tmp_path / "data [v2]") == list(range(20))
    assert captions(config, tmp_path / "data [v2]" / "train.parquet") == list(range(20))
    assert captions(config, tmp_path / "pictures [v2]*") == [0, 1]
    assert captions(config, None, jsonl_for_train=tmp_path / "[v2].jsonl") == [7]


@pytest.mark.parametrize("form", ["parquet", "file", "metadata", "saved"])
def test_relative_paths_belong_to_the_data_set_and_not_to_the_working_folder(form, config, tmp_path, monkeypatch):
    picture_folder(tmp_path / "data", relative=True)
    paths = [{"image": f"../{n}.png", "conditioning_image": f"../{n}-control.png"} for n in range(2)]
    rows = datasets.Dataset.from_list([row | {"text": "a"} for row in paths])
    rows.to_parquet(tmp_path / "data" / "parquet" / "rows.parquet")
    rows.save_to_disk(tmp_path / "data" / "saved")
    names = {"metadata": "data", "parquet": "data/parquet", "file": "data/parquet/rows.parquet", "saved": "data/saved"}
    name = tmp_path / names[form]
    if form == "metadata":
        shutil.rmtree(name / "parquet")
        shutil.rmtree(name / "saved")
    (tmp_path / "elsewhere").mkdir()
    for n in range(2):  # of the same names, all white
        Image.new("RGB", (64, 64), "white").save(tmp_path / "elsewhere" / f"{n}.png")
        Image.new("RGB", (64, 64), "white").save(tmp_path / "elsewhere" / f"{n}-control.png")
    (tmp_path / "elsewhere" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / ("" if form == "metadata" else "below"))
    here = config(dataset_name=name)
    opened = cv4ctrl.open_dataset(here)
    for id in range(2):
        row, wrong, parts = cv4ctrl.read_row(here, "pictures", "captions", {}, opened, id)
        assert not wrong and parts[row.control][0, 1].max() < 0.5, wrong


def wrongs(config):
    """What is wrong with each row of a data set."""
    rows = cv4ctrl.open_dataset(config)
    return [cv4ctrl.read_row(config, "pictures", "captions", {}, rows, id)[1] for id in range(len(rows))]


def test_captions_that_are_no_text_are_bad_rows(config, flags, tmp_path):
    """Not UTF-8, a dictionary, a number, nothing: also with --dry_run nothing worse happens."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    start = b'{"image": "a.png", "conditioning_image": "a.png", "text": '
    values = [b'"fine"', b'"caf\xe9"', b'"\\ud800"', b'{"en": "a"}', b"7", b"null", b'["a"]']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(start + value + b"}" for value in values))
    options = {"dataset_name": None, "jsonl_for_train": tmp_path / "rows.jsonl", "train_batch_size": 1}
    found = wrongs(config(**options))
    assert not found[0] and all(text.startswith(f"row {id}, text: ") for id, text in enumerate(found) if id)
    assert "not {'en': 'a'}" in found[3] and "surrogates" in found[1]
    cv4ctrl.main([*flags(tmp_path / "out", **options), "--dry_run"])


def test_a_parquet_caption_that_is_not_utf8_is_a_bad_row(config, flags, tmp_path):
    raw = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    columns = {"image": ["a.png"] * 2, "conditioning_image": ["a.png"] * 2, "text": text}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = {"dataset_name": tmp_path / "rows.parquet", "train_batch_size": 1}
    found = wrongs(config(**options))
    assert not found[0] and found[1].startswith("row 1, text: ") and "utf-8" in found[1]
    cv4ctrl.main([*flags(tmp_path / "out", **options), "--dry_run"])


def test_json_lines_whose_other_columns_change_type_and_whose_content_changes(config, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"image": "a", "conditioning_image": "b", "text": "1"}
    file.write_text(json.dumps(row | {"more": 1}) + "\n" + json.dumps(row | {"more": {"a": "b"}, "other": [None]}))
    about = file.stat()
    assert captions(config, None, jsonl_for_train=file) == [1, 1]
    file.write_text(file.read_text().replace('"text": "1"', '"text": "2"'))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert captions(config, None, jsonl_for_train=file) == [2, 2]


def test_files_that_do_not_belong_together_are_told_with_their_columns(config, tmp_path):
    parquet(tmp_path / "data" / "a", 2)
    datasets.Dataset.from_list([{"picture": "x"}]).to_parquet(tmp_path / "data" / "b.parquet")
    with pytest.raises(cv4ctrl.Failure, match="Couldn't cast.*picture: string.*conditioning_image"):
        captions(config, tmp_path / "data")


@pytest.mark.parametrize("file", ["empty.png", "cut.png", "folder.png", "nowhere.png", "bomb.png"])
def test_files_that_hold_no_picture(file, read, tmp_path):
    whole = encoded_as(Image.effect_noise((64, 64), 50))["bytes"]
    contents = {"empty.png": b"", "cut.png": whole[:-300], "bomb.png": encoded_as(Image.new("1", (20_000, 20_000)))}
    contents["bomb.png"] = contents["bomb.png"]["bytes"]  # it would take 1.2 GB
    if file in contents:
        (tmp_path / file).write_bytes(contents[file])
    (tmp_path / "folder.png").mkdir()
    found, wrong = read({"image": {"bytes": whole}, "conditioning_image": str(tmp_path / file), "text": "a"})
    assert found is None and wrong.startswith("row 0, conditioning_image: ") and "\n" not in wrong


@pytest.mark.parametrize("value", ["", None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}])
def test_a_row_without_picture(value, read):
    content = encoded_as(Image.new("RGB", (64, 64)))["bytes"]  # a column of bytes is one of pictures
    assert not read({"image": content, "conditioning_image": content, "text": "a"})[1]
    row = {"image": content, "conditioning_image": value, "text": "a"}
    assert read(row) == (None, "row 0, conditioning_image: no picture")


def test_pairs_of_different_shape_are_counted_in_one_line(config, base, device, capsys, tmp_path):
    """After rotation as the camera meant it; a few pixels of padding do not matter."""
    turned = Image.Exif()
    turned[0x0112] = 6
    tall, wide = encoded_as(Image.new("RGB", (64, 128))), encoded_as(Image.new("RGB", (128, 64)))
    padded = encoded_as(Image.new("RGB", (64, 130)))
    wide_turned = encoded_as(Image.new("RGB", (128, 64)), "JPEG", exif=turned)
    pairs = [(tall, padded), (tall, wide_turned), (padded, wide), (tall, wide)]
    rows = [{"image": a, "conditioning_image": b, "text": "a"} for a, b in pairs]
    cv4ctrl.encode(config(encoded_dir=tmp_path / "one"), base, rows[:2], device)
    assert "aspect ratio" not in capsys.readouterr().err
    cv4ctrl.encode(config(encoded_dir=tmp_path / "two"), base, [rows[2], *rows[:2], rows[3]], device)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "aspect ratio" in line]
    assert "row 0: " in line and "(2 of 4 rows)" in line


def test_weights_that_no_index_names_are_not_read(base, tmp_path):
    """As diffusers and transformers load each part of a base; see also test_surgery.py."""
    other = shutil.copytree(base, tmp_path / "base")
    encoders = cv4ctrl.load_encoders(base, torch.device("cpu"))
    for name, part in (("vae", encoders.vae), ("text_encoder", encoders.text_encoder)):
        for file in (other / name).glob("*.safetensors"):
            file.unlink()
        part.save_pretrained(other / name, max_shard_size="20kB")
        shards = list((other / name).glob("*.safetensors"))
        assert len(shards) > 1
        zeros = {key: torch.zeros_like(tensor) for file in shards for key, tensor in load_file(file).items()}
        cv4ctrl.save_file(zeros, other / name / "zzz.safetensors", metadata={"format": "pt"})
    again = cv4ctrl.load_encoders(other, torch.device("cpu"))
    for name in ("vae", "text_encoder"):
        ours, theirs = getattr(again, name).state_dict(), getattr(encoders, name).state_dict()
        assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_a_folder_that_is_named_after_splits_only_in_part_is_refused(config, tmp_path):
    for name in ("train", "test", "more"):
        parquet(tmp_path / "data" / name, 2)
    with pytest.raises(cv4ctrl.Failure, match="only some files are named after splits.*test"):
        captions(config, tmp_path / "data")
    parquet(tmp_path / "brackets [v2]" / "test", 2)
    with pytest.raises(cv4ctrl.Failure, match="rename the folder"):
        captions(config, tmp_path / "brackets [v2]")
