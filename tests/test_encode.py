"""What lies in the cache is what inference computes, and it is computed once."""

import io
import json
import os
import shutil
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.utils import load_image
from PIL import Image
from transformers import GlmModel

import cv4ctrl
import tiny


@pytest.fixture()
def encode(config, base, device, tmp_path):
    """Encodes rows of (image, control, caption) -> (Stream, pictures and captions that went through the encoders)."""

    def run(rows, base=base, **options):
        columns = ("image", "conditioning_image", "text")
        rows = [dict(zip(columns, ({"bytes": image}, {"bytes": control}, text))) for image, control, text in rows]
        with mock.patch.object(AutoencoderKL, "encode", autospec=True, side_effect=AutoencoderKL.encode) as pictures:
            with mock.patch.object(GlmModel, "forward", autospec=True, side_effect=GlmModel.forward) as captions:
                encoded = cv4ctrl.encode(config(encoded_dir=tmp_path / "cache", **options), base, rows, device)
        return encoded, pictures.call_count, captions.call_count

    return run


def by_index(encoded):
    return {row.index: row for row in (*encoded.train, *encoded.held_out)}


def test_embeddings_are_the_pipelines_bitwise_each_caption_alone(encode, pipe):
    """White space around a caption, such as the last line break of a file, does not belong to it."""
    captions = ["", "a red circle on grey", "fourteen bytes", "x" * 300, "两个朋友 🙂", " a\nb\tc "]
    encoded, _, encodings = encode([(*tiny.make_rows(1)[0][:2], text) for text in captions], max_sequence_length=64)
    ours = [encoded.entry(by_index(encoded)[n].caption_key) for n in range(len(captions))]
    for caption, embeds in zip(captions, ours):
        theirs = pipe.encode_prompt(caption.strip(), do_classifier_free_guidance=False, max_sequence_length=64)[0][0]
        assert embeds.dtype == theirs.dtype == torch.bfloat16 and torch.equal(embeds, theirs), caption
    assert [len(embeds) for embeds in ours[:4]] == [16, 32, 16, 64]  # 2 tokens + bytes, to a multiple of 16, cut at 64
    assert torch.equal(encoded.entry(encoded.empty_key), ours[0]) and encodings == len(captions)


@torch.no_grad()
def test_moments_are_the_pipelines_for_any_kind_of_picture(encode, pipe, tmp_path):
    picture = Image.effect_noise((40, 64), 80).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be rotated by 90 degrees
    contents = []
    for kind in ("RGB JPEG", "P PNG", "RGBA PNG", "LA PNG", "L GIF", "CMYK JPEG", "1 TIFF", "RGB BMP"):
        mode, form = kind.split()
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, form, **({"exif": turned} if form == "JPEG" else {}))
        contents.append(buffer.getvalue())
    encoded = encode([(content, contents[n - 1], "x") for n, content in enumerate(contents)])[0]
    for n, content in enumerate(contents):
        (tmp_path / "picture").write_bytes(content)
        pixels = pipe.image_processor.preprocess(load_image(str(tmp_path / "picture")), 64, 64).bfloat16()
        posterior = pipe.vae.encode(pixels).latent_dist
        key = by_index(encoded)[n].image_key
        assert torch.equal(encoded.entry(key), posterior.parameters[0])
        control = by_index(encoded)[(n + 1) % len(contents)].control_key
        assert key != control and torch.equal(encoded.entry(control), posterior.parameters[0])
        eps = torch.randn(16, 8, 8)
        mean, deviation = posterior.mean[0].float(), posterior.logvar[0].float().mul(0.5).exp()
        torch.testing.assert_close(encoded.latents(key, eps), mean + deviation * eps)
        assert torch.equal(encoded.latents(key), mean)


def test_hits_and_misses(encode, base, tmp_path):
    rows = tiny.make_rows(12, seed=7)
    captions = len({caption for *_, caption in rows}) + 1  # and ""
    image, control, _ = tiny.make_rows(1, seed=99)[0]
    assert encode(rows)[1:] == (24, captions)
    for more in (rows, [*rows[1:], rows[0]], [*rows, rows[0]]):  # again, in another order, repeated
        assert encode(more)[1:] == (0, 0)
    assert encode([(*rows[0][:2], "another caption"), *rows[1:]])[1:] == (0, 1)
    assert encode([(image, *rows[0][1:]), *rows[1:]])[1:] == (1, 0)
    assert encode([(rows[0][0], control, rows[0][2]), *rows[1:]])[1:] == (1, 0)
    assert encode(rows, resolution=80)[1:] == (24, 0)
    assert encode(rows, max_sequence_length=512)[1:] == (0, captions)
    detected = [(image, b"a column that is not read", caption) for image, _, caption in rows]
    assert encode(detected, control="canny")[1:] == (12, 0)
    for part, expected in (("vae", (24, 0)), ("text_encoder", (0, captions)), ("tokenizer", (0, captions))):
        other = shutil.copytree(base, tmp_path / part)
        file = next(file for file in (other / part).iterdir() if file.suffix == ".json")
        file.write_text(file.read_text() + "\n")
        assert encode(rows, base=other)[1:] == expected


def test_a_byte_a_size_or_a_name_in_the_files_of_an_encoder_changes_its_keys(config, base, tmp_path):
    """Large files are read in samples, of which the first is their first MB."""
    other = shutil.copytree(base, tmp_path / "base")

    def keys():
        cache = cv4ctrl.Cache(config(), other, None)
        return {"vae": cache.of_pictures, "text_encoder": cache.of_captions}

    for part in keys():
        before, (file,) = keys(), (other / part).glob("*.safetensors")
        os.truncate(file, 40 * 2**20)
        larger = keys()
        with open(file, "r+b") as stream:
            stream.seek(9000)
            stream.write(bytes([file.read_bytes()[9000] ^ 1]))
        changed = keys()
        file.rename(file.with_stem("other"))
        found = [before, larger, changed, keys()]
        assert len({each.pop(part) for each in found}) == 4 and all(each == found[0] for each in found)


def test_the_same_rows_are_held_out_at_any_resolution(encode):
    stages = [encode(tiny.make_rows(30), resolution=side)[0] for side in (64, 80, 96)]
    assert len({tuple(row.index for row in stage.held_out) for stage in stages}) == 1 and len(stages[0].held_out) == 3


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty"])
def test_a_damaged_entry_is_encoded_again(damage, encode, tmp_path):
    """As an interrupted copy of the cache leaves it."""
    rows = tiny.make_rows(12)
    files = {row.image_key: tmp_path / "cache" / f"{row.image_key}.safetensors" for row in encode(rows)[0].train[:2]}
    before = {key: file.read_bytes() for key, file in files.items()}
    for key, file in files.items():
        size = len(before[key])
        file.write_bytes({"cut": before[key][: size // 2], "zeros": bytes(size), "empty": b""}[damage])
    assert encode(rows)[1:] == (2, 0)
    assert {key: file.read_bytes() for key, file in files.items()} == before


def test_a_row_that_cannot_be_used_ends_the_run_but_what_is_encoded_stays(encode, refused, flags, tmp_path):
    good = tiny.make_rows(14)
    image, control, caption = good[0]
    broken = (b"not an image", control, caption), (image, control[:60], caption)
    for bad, column in zip(broken, ("image", "conditioning_image")):
        data = tiny.write_parquet(tmp_path / "data", [*good[:3], bad, *good[3:]])
        line = refused(flags(tmp_path / "out", dataset_name=data, encoded_dir=tmp_path / "cache"), progress=True)
        assert f"row 3, {column}: " in line
    assert encode(good[:3])[1:] == (0, 0)  # those before were encoded and kept


@torch.no_grad()
def test_validation_images_are_encoded_like_the_data(encode, refused, flags, pipe, tmp_path, monkeypatch):
    rows, (_, control, _) = tiny.make_rows(12), tiny.make_rows(1, seed=5)[0]
    (before, *_), captions = encode(rows), ["a green star", rows[1][2]]
    (tmp_path / "own.png").write_bytes(control)
    (tmp_path / "known.png").write_bytes(rows[1][1])
    monkeypatch.chdir(tmp_path)  # paths are as on the command line
    after, *encodings = encode(rows, validation_image=["own.png", tmp_path / "known.png"], validation_prompt=captions)
    assert encodings == [1, 1] and (after.train, after.held_out) == (before.train, before.held_out)
    own, known = after.cases
    pixels = pipe.image_processor.preprocess(load_image("own.png"), 64, 64).bfloat16()
    assert torch.equal(after.entry(own.control_key), pipe.vae.encode(pixels).latent_dist.parameters[0])
    assert torch.equal(after.entry(own.caption_key), pipe.encode_prompt(captions[0], None, False)[0][0])
    assert known == by_index(before)[1]._replace(index=None, image_key=None)
    (tmp_path / "own.png").write_bytes(control[:60])
    options = {"validation_image": "own.png", "validation_prompt": "a"}
    line = refused(flags(tmp_path / "out", encoded_dir=tmp_path / "cache", **options), progress=True)
    assert "--validation_image" in line and "own.png: no readable picture" in line


def test_json_lines_parquet_and_columns(config, base, device, tmp_path):
    rows, lines = tiny.make_rows(12), []
    for n, (image, control, caption) in enumerate(rows):
        (tmp_path / f"{n}.png").write_bytes(image)
        (tmp_path / f"{n}-edges.png").write_bytes(control)
        there = f"{tmp_path}/" if n % 2 else ""  # absolute, or relative to the file
        line = {"picture": f"{there}{n}.png", "edges": f"{there}{n}-edges.png", "words": caption}
        lines.append(json.dumps(line))
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(lines))
    names = {"image_column": "picture", "conditioning_image_column": "edges", "caption_column": "words"}
    jsonl = config(dataset_name=tmp_path / "rows.jsonl", **names)
    parquet = config(dataset_name=tiny.write_parquet(tmp_path / "parquet", rows) / "train.parquet")
    found = [by_index(cv4ctrl.encode(c, base, cv4ctrl.open_dataset(c), device)) for c in (jsonl, parquet)]
    assert found[0] == found[1] and len(found[0]) == 12
