"""Data as people really have them: nothing is left out, clipped or mixed up in silence."""

import io
import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

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
def read(config, base):
    """Reads the only row of a data set -> (pixels of target and control, or None; what is wrong with it)."""

    def run(row, **options):
        reader = cv4ctrl.Reader(config(**options), base, [row], set())
        found, remarks, contents = reader.read(0)
        return [contents[key] for key in (found.image_key, found.control_key)] if found else None, "".join(remarks)

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


def pictures(rows):
    return {picture for row in rows for picture in (row.image_key, row.control_key)}


@pytest.mark.parametrize("rows", [
    [(n // 5, n // 5) for n in range(200)],  # five captions a picture
    [(n % 40, n % 40) for n in range(200)],  # a set that is listed five times
    [(n, n // 3) for n in range(200)], [(n // 3, n) for n in range(200)],  # one control for three images, and back
    [(n % 80, n // 80 % 80) for n in range(100_000)],  # few pictures in many rows
])  # fmt: skip
def test_whole_pictures_are_held_out_with_controls_that_differ(rows):
    rows = [cv4ctrl.Row(n, f"image {image}", f"control {control}", "a") for n, (image, control) in enumerate(rows)]
    train, held_out = cv4ctrl.hold_out(rows, 32)
    assert 4 <= len(held_out) <= 32 and len(train) >= 0.9 * len(rows)
    assert not pictures(train) & pictures(held_out) and len(pictures(held_out)) == 2 * len(held_out)
    shuffled = [replace(row, index=n) for n, row in enumerate(random.Random(0).sample(rows, len(rows)))]
    assert {row.image_key for row in cv4ctrl.hold_out(shuffled, 32)[1]} == {row.image_key for row in held_out}
    assert [len(part) for part in cv4ctrl.hold_out(rows, 0)] == [len(rows), 0]


def test_many_rows_of_few_pictures_are_counted_and_not_compared():
    """Each shares a picture with 11,000 others, too many to hold it out. Comparing them would take minutes."""
    rows = [cv4ctrl.Row(n, f"image {n % 17}", f"control {n // 17 % 17}", "a") for n in range(100_000)]
    assert cv4ctrl.hold_out(rows, 32) == (rows, [])


def test_where_nothing_can_be_held_out_a_line_says_so(config, base, device, capsys, tmp_path):
    """Eight pictures listed five times: each is more than a tenth of the rows."""
    rows = [dict(zip(("image", "conditioning_image", "text"), ({"bytes": a}, {"bytes": b}, text)))
            for a, b, text in tiny.make_rows(8) * 5]  # fmt: skip
    encoded = cv4ctrl.encode(config(encoded_dir=tmp_path), base, rows, device)
    assert len(encoded.train) == 40 and not encoded.held_out
    assert "can be held out: control_gain is not measured" in capsys.readouterr().err


def parquet(folder, count, start=0):
    """`count` rows as FOLDER.parquet, whose captions are numbers."""
    rows = [{"image": "a.png", "conditioning_image": "b.png", "text": str(start + n)} for n in range(count)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder.with_suffix(".parquet"))


def captions(config, folder, **options):
    return sorted(int(row["text"]) for row in cv4ctrl.open_dataset(config(dataset_name=folder, **options)))


def test_a_folder_of_parquet_files_is_read_whole(config, tmp_path, capsys):
    parquet(tmp_path / "rows" / "0000", 20)
    parquet(tmp_path / "rows" / "more" / "0000", 60, 20)
    assert captions(config, tmp_path / "rows") == list(range(80)) and "taking" not in capsys.readouterr().err


def test_of_named_splits_train_is_taken_and_the_others_are_named(config, tmp_path, capsys):
    parquet(tmp_path / "splits" / "train-00000-of-00001", 20)
    parquet(tmp_path / "splits" / "test-00000-of-00001", 60, 20)
    assert captions(config, tmp_path / "splits") == list(range(20))
    assert "taking split train, not test" in capsys.readouterr().err
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
    assert "not test" in capsys.readouterr().err


def picture_folder(folder, relative=False):
    """Two rows; the controls as columns of pictures, or as paths that are relative to the folder."""
    folder.mkdir(parents=True)
    name = "conditioning_image" if relative else "conditioning_image_file_name"
    lines = [{"file_name": f"{n}.png", name: f"{n}-control.png", "text": str(n)} for n in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for n in range(2):
        Image.new("RGB", (64, 64), (n, 0, 0)).save(folder / f"{n}.png")
        Image.new("RGB", (64, 64), (0, n + 1, 0)).save(folder / f"{n}-control.png")


@pytest.mark.parametrize("name", ["data [v2]", "data*", "data?"])
def test_paths_that_datasets_takes_for_patterns_are_refused(name, config, flags, refused, tmp_path):
    """They stand for other files, too. JSON lines are read without it."""
    parquet(tmp_path / name / "train", 20)
    for path in (tmp_path / name, tmp_path / name / "train.parquet"):
        line = refused(flags(tmp_path / "out", dataset_name=path))
        assert line.startswith(f"cv4ctrl.py: data set {path}: rename the path")
    (tmp_path / f"{name}.jsonl").write_text('{"image": "a", "conditioning_image": "b", "text": "7"}')
    assert captions(config, None, jsonl_for_train=tmp_path / f"{name}.jsonl") == [7]


@pytest.mark.parametrize("form", ["parquet", "file", "metadata", "saved"])
def test_relative_paths_belong_to_the_data_set_and_not_to_the_working_folder(form, config, base, tmp_path, monkeypatch):
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
        row, wrong, contents = cv4ctrl.Reader(here, base, opened, set()).read(id)
        assert not wrong and contents[row.control_key][0, 1].max() < 0.5, wrong


def wrongs(config, base):
    """What is wrong with each row of a data set."""
    rows = cv4ctrl.open_dataset(config)
    reader = cv4ctrl.Reader(config, base, rows, set())
    return ["".join(reader.read(index)[1]) for index in range(len(rows))]


def test_captions_that_are_no_text_are_bad_rows(config, base, flags, tmp_path):
    """Not UTF-8, a dictionary, a number, nothing: also with --dry_run nothing worse happens."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    start = b'{"image": "a.png", "conditioning_image": "a.png", "text": '
    values = [b'"fine"', b'"caf\xe9"', b'"\\ud800"', b'{"en": "a"}', b"7", b"null", b'["a"]']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(start + value + b"}" for value in values))
    options = {"dataset_name": None, "jsonl_for_train": tmp_path / "rows.jsonl", "train_batch_size": 1}
    found = wrongs(config(**options), base)
    assert not found[0] and all(text.startswith(f"row {n}, text: ") for n, text in enumerate(found) if n)
    assert "not {'en': 'a'}" in found[3] and "surrogates" in found[1]
    cv4ctrl.main([*flags(tmp_path / "out", **options), "--dry_run"])


def test_a_parquet_caption_that_is_not_utf8_is_a_bad_row(config, base, flags, tmp_path):
    raw = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    columns = {"image": ["a.png"] * 2, "conditioning_image": ["a.png"] * 2, "text": text}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = {"dataset_name": tmp_path / "rows.parquet", "train_batch_size": 1}
    found = wrongs(config(**options), base)
    assert not found[0] and found[1].startswith("row 1: ") and "utf-8" in found[1]
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


@pytest.mark.parametrize("line", ["7", "null", '["a.png", "b.png", "a"]', "{'image': 'a'}", '{"image":'])
def test_lines_that_are_no_json_objects_are_refused(line, flags, refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a", "conditioning_image": "b", "text": "1"}\n' + line)
    said = refused(flags(tmp_path / "out", dataset_name=None, jsonl_for_train=tmp_path / "rows.jsonl"))
    assert said.startswith(f"cv4ctrl.py: data set {tmp_path}/rows.jsonl: ")


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


@pytest.mark.parametrize("value", [7, 0.5, ["a.png"], {"path": 7}, {"bytes": "iVBORw0KGgo="}])
def test_values_that_are_no_pictures_are_bad_rows(value, read):
    """As where --image_column names another column."""
    found, wrong = read({"image": value, "conditioning_image": value, "text": "a"})
    assert found is None and wrong.startswith("row 0, image: ") and "\n" not in wrong


def test_what_is_odd_about_rows_is_counted_over_all_and_told_once(config, base, device, capsys, tmp_path):
    """The shape is that after rotation as the camera meant it; a few pixels of padding do not matter."""

    def told(folder, rows):
        rows = [{"image": a, "conditioning_image": b, "text": "a"} for a, b in rows]
        cv4ctrl.encode(config(encoded_dir=tmp_path / folder), base, rows, device)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("cv4ctrl.py: row ")]

    turned = Image.Exif()
    turned[0x0112] = 6
    tall, wide = encoded_as(Image.new("RGB", (64, 128))), encoded_as(Image.new("RGB", (128, 64)))
    padded, small = encoded_as(Image.new("RGB", (64, 130))), encoded_as(Image.new("RGB", (32, 64)))
    fine = [(tall, padded), (tall, encoded_as(Image.new("RGB", (128, 64)), "JPEG", exif=turned)), (tall, small)]
    assert told("one", fine) == []
    shape, size = told("two", [*fine, (padded, wide), (small, tall), (small, wide), (tall, wide)])
    assert "row 3: " in shape and "differ in shape" in shape and "(3 of 7 rows)" in shape
    assert "row 4: " in size and "smaller than --resolution 64" in size and "(2 of 7 rows)" in size


def test_weights_that_no_index_names_are_not_read(base, tmp_path):
    """As diffusers and transformers load each part of a base; see also test_model.py."""
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


def refused_files(config, folder):
    """What of a folder is in no split, and so refused: (number of files, those that are named)."""
    with pytest.raises(cv4ctrl.Failure) as failure:
        captions(config, folder)
    number, names = re.search(r"(\d+) files are in no split, such as (.*): give", str(failure.value)).groups()
    return int(number), [str(Path(name).relative_to(folder)) for name in names.split(", ")]


def test_folders_that_are_named_after_splits_only_in_part_are_refused(config, tmp_path, capsys):
    """Of these `datasets` would leave out the other files in silence."""
    picture_folder(tmp_path / "photos" / "portraits")
    picture_folder(tmp_path / "photos" / "test shots")
    some = [f"portraits/{name}" for name in ("0-control.png", "0.png", "1-control.png")]
    assert refused_files(config, tmp_path / "photos") == (4, some)
    picture_folder(tmp_path / "pictures" / "train")
    picture_folder(tmp_path / "pictures" / "extra")
    assert refused_files(config, tmp_path / "pictures") == (4, [name.replace("portraits", "extra") for name in some])
    lines = tmp_path / "lines"
    lines.mkdir()
    for name in ("train", "more"):
        (lines / f"{name}.jsonl").write_text('{"image": "a", "conditioning_image": "b", "text": "7"}')
    assert refused_files(config, lines) == (1, ["more.jsonl"])
    for name in ("train", "test", "more"):
        parquet(tmp_path / "data" / name, 2)
    (tmp_path / "data" / "README.md").write_text("---\nlicense: mit\n---\nNothing about files.")
    assert refused_files(config, tmp_path / "data") == (1, ["more.parquet"])
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: [train*, more*]}\n---"
    (tmp_path / "data" / "README.md").write_text(card)
    assert captions(config, tmp_path / "data") == [0, 0, 1, 1]
    shutil.rmtree(tmp_path / "pictures" / "extra")
    picture_folder(tmp_path / "pictures" / "test")
    capsys.readouterr()
    assert captions(config, tmp_path / "pictures") == [0, 1]
    assert "taking split train, not test" in capsys.readouterr().err


def test_folders_behind_links_and_relative_paths_are_read_like_others(config, tmp_path, monkeypatch):
    parquet(tmp_path / "real" / "train", 20)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in (tmp_path / "link", "../real", "../link"):
        assert captions(config, folder) == list(range(20))


def test_hidden_folders_are_no_data(config, tmp_path):
    """Of an editor, a version control, a program that draws thumbnails."""
    parquet(tmp_path / "data" / "train", 20)
    for name in (".old", "__old"):
        parquet(tmp_path / "data" / name / "more", 20)
    assert captions(config, tmp_path / "data") == list(range(20))
