"""Data as people really have them: nothing is left out, clipped or mixed up in silence."""

import io
import json
import os
import random
import shutil
import types

import cv2
import datasets
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image
from PIL import Image, ImageCms

import cv4ctrl


class Pixels(cv4ctrl.Cache):
    """A cache that is always empty, and keeps the pixels instead of encoding them."""

    encoders = types.SimpleNamespace(encode_prompt=lambda *_, **options: (torch.zeros(1, 16, 1), None))
    encoders.vae = types.SimpleNamespace(dtype=torch.float32, encode=lambda pixels: types.SimpleNamespace(
        latent_dist=types.SimpleNamespace(parameters=pixels)))  # fmt: skip

    def facts(self, key):
        return None

    def store(self, key, pixels, facts):
        vars(self).setdefault("pixels", {})[key] = pixels
        return facts


@pytest.fixture()
def read(config, base):
    """Reads the only row of a data set -> (pixels of target and control, or None; what is wrong with it)."""

    def run(row, **options):
        cache = Pixels(config(**options), base, "cpu")
        try:
            found, remarks = cache.read_row([row], 0)
        except cv4ctrl.Failure as failure:
            return None, str(failure)
        return [cache.pixels[key] for key in (found.image_key, found.control_key)], "".join(remarks)

    return run


def encoded_as(image, form="PNG", **options):
    image.save(buffer := io.BytesIO(), form, **options)
    return {"bytes": buffer.getvalue()}


PLAIN = encoded_as(Image.new("RGB", (64, 64), "silver"))


@pytest.mark.parametrize("column", ["image", "conditioning_image"])
@pytest.mark.parametrize("kind", ["grey", "float", "colour", "colour TIFF", "with alpha"])
def test_pictures_of_more_than_8_bits_a_channel_are_bad_rows(kind, column, read):
    """Inference would clip them, too. Of some Pillow reads 8 bits without a word."""
    deep = np.linspace(0, 65535, 64)[None].repeat(64, 0).astype(np.float32 if kind == "float" else np.uint16)
    channels = {"grey": 1, "float": 1, "with alpha": 4}.get(kind, 3)
    form = ".tiff" if kind in ("float", "colour TIFF") else ".png"
    content = cv2.imencode(form, np.stack(channels * [deep], 2))[1].tobytes()
    row = {"image": PLAIN, "conditioning_image": PLAIN, "text": "a", column: {"bytes": content}}
    found, wrong = read(row)
    assert found is None and wrong.startswith(f"row 0, {column}: ") and "8 bits" in wrong


@pytest.mark.parametrize("kind", ["alpha channel", "transparent colour"])
def test_transparency_is_white_in_a_target_and_dropped_in_a_control_as_at_inference(kind, read):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))  # the left half
    picture = encoded_as(image)
    if kind == "transparent colour":  # an RGB PNG with tRNS
        picture = encoded_as(image.convert("RGB"), transparency=(0, 0, 0))
    (target, _), wrong = read({"image": picture, "conditioning_image": PLAIN, "text": "a"})
    assert not wrong and (target[..., :31] == 1).all() and target[0, 1, 32, 40] < 0  # white, and as it is
    (_, control), _ = read({"image": PLAIN, "conditioning_image": picture, "text": "a"})
    inference = VaeImageProcessor().preprocess(load_image(Image.open(io.BytesIO(picture["bytes"]))), 64, 64)
    assert control.equal(inference)
    assert read({"image": picture, "text": "a"}, control="canny")[0]  # the detector sees what is trained on


def test_a_picture_that_is_transparent_everywhere_is_a_bad_row(read):
    """Such as a TGA or BMP of 32 bits whose fourth byte is not used."""
    empty = encoded_as(Image.new("RGBA", (64, 64), (255, 0, 0, 0)), "TGA")
    found, wrong = read({"image": empty, "conditioning_image": PLAIN, "text": "a"})
    assert found is None and "transparent everywhere" in wrong


def test_targets_are_converted_from_their_colour_profile_and_controls_are_not(read):
    """The profile is sRGB's with red and green exchanged. One that is broken is left alone."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = srgb.replace(b"rXYZ", b"aXYZ").replace(b"gXYZ", b"rXYZ").replace(b"aXYZ", b"gXYZ")
    red = Image.new("RGB", (64, 64), (200, 40, 90))
    target, control = (encoded_as(red, icc_profile=exchanged, compress_level=level) for level in (1, 9))
    pixels, wrong = read({"image": target, "conditioning_image": control, "text": "a"})
    target, control = ((one[0, :, 0, 0] + 1) * 127.5 for one in pixels)
    assert not wrong and target.tolist() == pytest.approx([40, 200, 90], abs=2)
    assert control.tolist() == pytest.approx([200, 40, 90], abs=0.1)
    pixels, wrong = read({"image": encoded_as(red, icc_profile=b"none"), "conditioning_image": PLAIN, "text": "a"})
    assert not wrong and torch.equal(pixels[0], control.view(1, 3, 1, 1).expand_as(pixels[0]) / 127.5 - 1)


def pictures(rows):
    return {picture for row in rows for picture in (row.image_key, row.control_key)}


@pytest.mark.parametrize("rows", [
    [(n // 5, n // 5) for n in range(200)],  # five captions a picture
    [(n, n // 3) for n in range(200)], [(n // 3, n) for n in range(200)],  # one control for three images, and back
    [(n % 80, n // 80 % 80) for n in range(100_000)],  # few pictures in many rows: comparing them would take minutes
])  # fmt: skip
def test_whole_pictures_are_held_out_with_controls_that_differ(rows):
    rows = [cv4ctrl.Row(n, f"image {image}", f"control {control}", "a", 16) for n, (image, control) in enumerate(rows)]
    train, held_out = cv4ctrl.hold_out(rows, 32)
    assert 4 <= len(held_out) <= 32 and len(train) >= 0.9 * len(rows)
    assert not pictures(train) & pictures(held_out) and len(pictures(held_out)) == 2 * len(held_out)
    shuffled = [row._replace(index=n) for n, row in enumerate(random.Random(0).sample(rows, len(rows)))]
    assert {row.image_key for row in cv4ctrl.hold_out(shuffled, 32)[1]} == {row.image_key for row in held_out}
    assert [len(part) for part in cv4ctrl.hold_out(rows, 0)] == [len(rows), 0]


def parquet(file, count, start=0):
    """`count` rows, whose captions are numbers, as FILE.parquet."""
    rows = [{"image": "a.png", "conditioning_image": "b.png", "text": str(start + n)} for n in range(count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(file.with_suffix(".parquet"))


def captions(config, folder, **options):
    return sorted(int(row["text"]) for row in cv4ctrl.open_dataset(config(dataset_name=folder, **options)))


def test_a_folder_of_parquet_files_is_read_whole(config, tmp_path, monkeypatch):
    """But for hidden folders, of an editor or a version control. Links and relative paths are followed."""
    parquet(tmp_path / "rows" / "0000", 20)
    parquet(tmp_path / "rows" / "more" / "0000", 60, 20)
    parquet(tmp_path / "rows" / ".old" / "0000", 20)
    (tmp_path / "link").symlink_to("rows")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "rows", "rows", "link"):
        assert captions(config, folder) == list(range(80))


def test_of_named_splits_train_is_taken_or_the_only_one(config, tmp_path):
    parquet(tmp_path / "splits" / "train-00000-of-00001", 20)
    parquet(tmp_path / "splits" / "test-00000-of-00001", 60, 20)
    assert captions(config, tmp_path / "splits") == list(range(20))
    parquet(tmp_path / "alone" / "test", 20)
    assert captions(config, tmp_path / "alone") == list(range(20))
    parquet(tmp_path / "alone" / "validation", 20)
    with pytest.raises(cv4ctrl.Failure, match="no split train, but .*(validation|test)"):
        captions(config, tmp_path / "alone")


def test_what_save_to_disk_leaves_is_loaded(config, tmp_path):
    """Also with a format, such as of some columns."""
    rows = datasets.Dataset.from_list([{"image": "a", "conditioning_image": "b", "text": str(n)} for n in range(5)])
    rows.with_format("pandas", columns=["image"]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    assert captions(config, tmp_path / "one") == captions(config, tmp_path / "two") == [0, 1, 2, 3, 4]


def picture_folder(folder):
    """Two rows as a folder of pictures. Its controls are paths, relative to it."""
    folder.mkdir(parents=True)
    lines = [{"file_name": f"{n}.png", "conditioning_image": f"{n}.png.jpg", "text": str(n)} for n in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for n in range(2):
        Image.new("RGB", (64, 64), (n, 0, 0)).save(folder / f"{n}.png")
        Image.new("RGB", (64, 64), (0, n + 99, 0)).save(folder / f"{n}.png.jpg")


def wrongs(config, read):
    """What is wrong with each row of a data set."""
    return [read(row, dataset_name=config.dataset_name)[1] for row in cv4ctrl.open_dataset(config)]


@pytest.mark.parametrize("form", ["pictures", "parquet", "parquet/rows.parquet"])
def test_relative_paths_belong_to_the_data_set_and_not_to_the_working_folder(form, config, read, tmp_path):
    picture_folder(tmp_path / "pictures")
    (tmp_path / "parquet").mkdir()
    name = "../pictures/{}.png"
    rows = [{"image": name.format(n), "conditioning_image": f"{name.format(n)}.jpg", "text": "a"} for n in range(2)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / "rows.parquet")
    assert wrongs(config(dataset_name=tmp_path / form), read) == ["", ""]


def test_pictures_in_a_zip_file_are_read(config, read, tmp_path):
    picture_folder(tmp_path / "pictures")
    metadata = tmp_path / "pictures" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("conditioning_image", "conditioning_image_file_name"))
    shutil.make_archive(tmp_path / "zipped" / "all", "zip", tmp_path / "pictures")
    assert wrongs(config(dataset_name=tmp_path / "zipped"), read) == ["", ""]


@pytest.mark.parametrize("value", ['{"en": "a"}', "7", "null"])
def test_captions_that_are_no_text_are_refused_by_the_plan(value, flags, refused, tmp_path):
    row = '{"image": "a.png", "conditioning_image": "b.png", "text": '
    (tmp_path / "rows.jsonl").write_text(f"{row}{value}}}\n")
    argv = [*flags(tmp_path / "out", dataset_name=tmp_path / "rows.jsonl"), "--dry_run"]
    assert "column text: row 0: a caption is a string, not " in refused(argv)


@pytest.mark.parametrize("file", ["cut.png", "folder.png", "nowhere.png", "bomb.png", "pipe.png"])
def test_files_that_hold_no_picture(file, read, tmp_path):
    whole = encoded_as(Image.effect_noise((64, 64), 50))["bytes"]
    (tmp_path / "cut.png").write_bytes(whole[:-300])
    (tmp_path / "folder.png").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # it would take 1.2 GB
    os.mkfifo(tmp_path / "pipe.png")
    found, wrong = read({"image": {"bytes": whole}, "conditioning_image": str(tmp_path / file), "text": "a"})
    assert found is None and wrong.startswith("row 0, conditioning_image: ") and file in wrong and len(wrong) <= 300


def test_a_file_whose_name_has_another_unicode_form_is_told_by_its_letters(read, tmp_path):
    (tmp_path / "cafe\u0301.png").write_bytes(PLAIN["bytes"])  # as macOS writes it
    _, wrong = read({"image": PLAIN, "conditioning_image": str(tmp_path / "caf\u00e9.png"), "text": "a"})
    assert "no such file: " in wrong and "caf\\xe9.png" in wrong and len(wrong) <= 300


@pytest.mark.parametrize("value", [
    "", None, {"bytes": b"", "path": None}, 7, ["a.png"], {"path": 7}, "data:image/png;base64,iVBOR",
    "http://a/b.png", "zip://a::http://b", "http://a::/bin/sh",
])  # fmt: skip
def test_a_row_without_picture(value, read):
    row = {"image": PLAIN["bytes"], "conditioning_image": value, "text": "a"}  # a column of bytes is one of pictures
    found, wrong = read(row)
    assert found is None and wrong.startswith("row 0, conditioning_image: no ")
    assert (value if isinstance(value, str) else repr(value)) in wrong


@pytest.mark.parametrize(
    "line", [b"7", b"{'image': 'a'}", b'{"image":', b'{"text": "caf\xe9"}', b'{"text": "\\ud800"}']
)
def test_lines_that_are_no_json_objects_are_refused(line, flags, refused, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"image": "a", "conditioning_image": "b", "text": "1"}\n\n' + line)
    said = refused(flags(tmp_path / "out", dataset_name=tmp_path / "rows.jsonl"))
    assert said.startswith((f"cv4ctrl.py: data set {tmp_path}/rows.jsonl: ", "cv4ctrl.py: column text: "))


def test_what_is_odd_about_rows_is_counted_over_all_and_told_once(config, base, device, capsys, tmp_path):
    """The shape is that after rotation as the camera meant it; a few pixels of padding do not matter."""

    def told(folder, rows):
        rows = [{"image": a, "conditioning_image": b, "text": "a"} for a, b in rows]
        cv4ctrl.encode(config(encoded_dir=tmp_path / folder), base, rows, device)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("cv4ctrl.py: row ")]

    turned = Image.Exif()
    turned[0x0112] = 6
    sizes = (64, 128), (128, 64), (64, 130), (32, 64)
    tall, wide, padded, small = (encoded_as(Image.new("RGB", size, "grey")) for size in sizes)
    sideways = encoded_as(Image.new("RGB", (128, 64), "grey"), "JPEG", exif=turned)
    black = encoded_as(Image.new("RGB", (64, 128), (0, 19, 0)))
    fine = [(tall, padded), (tall, sideways), (tall, small)]
    assert told("one", fine) == []
    odd = [(padded, wide), (small, tall), (small, wide), (tall, wide), (tall, tall), (tall, black)]
    for _ in "12":  # once they are cached, too
        shape, size, same, dark = told("two", fine + odd)
        assert "row 3: " in shape and "differ in shape" in shape and "(3 of 9 rows)" in shape
        assert "row 4: " in size and "smaller than --resolution" in size and "(2 of 9 rows)" in size
        assert "row 7: the control is the target (1 of 9 rows)" in same
        assert "row 8: the control is nearly black everywhere (1 of 9 rows)" in dark


def test_folders_that_are_named_after_splits_only_in_part_are_refused(config, tmp_path):
    """Of these `datasets` would leave out the other files in silence, unless a card names them."""
    picture_folder(tmp_path / "photos" / "portraits")
    picture_folder(tmp_path / "photos" / "test shots")
    some = ", ".join(f"{tmp_path}/photos/portraits/{name}" for name in ("0.png", "0.png.jpg", "1.png"))
    with pytest.raises(cv4ctrl.Failure, match=f"4 files are in no split, such as {some}: give"):
        captions(config, tmp_path / "photos")
    parquet(tmp_path / "backup" / "data", 2)
    shutil.copy(tmp_path / "backup" / "data.parquet", tmp_path / "backup" / "data.parquet.bak")
    with pytest.raises(cv4ctrl.Failure, match="data.parquet.bak for data"):
        captions(config, tmp_path / "backup")
    for name in ("train", "test", "more"):
        parquet(tmp_path / "data" / name, 2)
    card = tmp_path / "data" / "README.md"
    card.write_text("---\nlicense: mit\n---\nNothing about files.")
    with pytest.raises(cv4ctrl.Failure, match="1 files are in no split, such as .*more.parquet: give"):
        captions(config, tmp_path / "data")
    files = "{split: train, path: [train*, more*]}"
    card.write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n  - {files}\n---")
    assert captions(config, tmp_path / "data") == [0, 0, 1, 1]
