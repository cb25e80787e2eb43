"""A CogView4 base and a data set, small enough for two CPU cores and made without a network.

`python tests/demo/tiny.py FOLDER [ROWS]` leaves FOLDER/data, parquet in the format of raulc0399/open_pose_controlnet:
captioned coloured shapes, the control is their outline. base/ beside this file is such a base that was trained
(tests/bench/NOTES.md, 1)."""

import io
import math
import random
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220)}
COLOURS |= {"yellow": (240, 210, 50), "purple": (150, 60, 180), "orange": (245, 140, 30)}
GROUNDS = {"pale green": (180, 230, 180), "pale blue": (175, 200, 250)}
GROUNDS |= {"pale pink": (250, 190, 205), "grey": (160, 160, 160)}
SHAPES = {"circle": 60, "triangle": 3, "square": 4, "star": 5}  # corners


def make_tokenizer():
    """Tokenizer with GLM-4's frame and padding, whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    frame = [(token, tokenizer.token_to_id(token)) for token in special[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=frame)
    options = {"pad_token": special[0], "eos_token": special[0], "additional_special_tokens": special[1:]}
    options |= {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def make_base(folder, seed=0, layers=2, heads=4, head_dim=16, text_dim=32, vae_channels=(8, 8, 16, 16)):
    """Random CogView4 base in `folder`, in bf16; each part loads with the class that model_index.json names."""
    import diffusers
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(seed)
    diffusers.utils.logging.set_verbosity_error()  # the plain casts below are meant
    text_encoder = GlmModel(GlmConfig(
        vocab_size=512, hidden_size=text_dim, intermediate_size=2 * text_dim, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=text_dim // 2, pad_token_id=0, eos_token_id=0,
        max_position_embeddings=2048, attention_bias=True))  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=16, block_out_channels=vae_channels, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=4, scaling_factor=1.0, shift_factor=0.0,
        sample_size=64, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)  # fmt: skip
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim,
        text_embed_dim=text_dim, time_embed_dim=32, condition_dim=16, sample_size=8)  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75, base_image_seq_len=256)  # fmt: skip
    parts = make_tokenizer(), text_encoder.bfloat16(), vae.bfloat16(), transformer.bfloat16(), scheduler
    diffusers.CogView4Pipeline(*parts).save_pretrained(folder)
    return Path(folder)


def load(base):
    """Widened model of a base in fp32, with the installed attention."""
    import cv4ctrl

    return cv4ctrl.load_transformer(Path(base, "transformer"), torch.float32, torch.device("cpu"))


def control_model(base):
    """The same with control columns that are not zero, so that a wrong control shows."""
    model = load(base)
    with torch.no_grad():
        model.patch_embed.proj.weight[:, 64:].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def draw_pair(rng, pixels=64):
    """(image, control, caption): a shape of one colour on a plain ground, and its white outline on black."""
    shape, colour, ground = rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(GROUNDS))
    scale = 4  # drawn larger and reduced: smooth edges
    size = pixels * scale
    radius = rng.uniform(0.22, 0.36) * size
    x, y = (rng.uniform(radius, size - radius) for _ in range(2))
    turn = rng.uniform(-0.35, 0.35) - math.pi / (4 if shape == "square" else 2)  # upright, give or take 20 degrees
    reaches = [radius, 0.45 * radius] if shape == "star" else [radius]
    corners = SHAPES[shape] * len(reaches)
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    reaches *= SHAPES[shape]
    points = [(x + reach * math.cos(angle), y + reach * math.sin(angle)) for reach, angle in zip(reaches, angles)]
    image = Image.new("RGB", (size, size), GROUNDS[ground])
    ImageDraw.Draw(image).polygon(points, fill=COLOURS[colour])
    control = Image.new("RGB", (size, size))
    ImageDraw.Draw(control).line(points + points[:2], fill="white", width=2 * scale, joint="curve")
    image, control = (picture.resize((pixels, pixels), Image.Resampling.LANCZOS) for picture in (image, control))
    return image, control, f"a {colour} {shape} on {ground}"


def png(image):
    """Image as PNG bytes."""
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def write_parquet(folder, rows):
    """Rows of (image bytes, control bytes, caption) as FOLDER/train.parquet -> the folder."""
    import datasets

    picture = datasets.Image()
    features = {"image": picture, "conditioning_image": picture, "text": datasets.Value("string")}
    columns = dict(zip(features, zip(*rows)))
    Path(folder).mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(str(Path(folder, "train.parquet")))
    return Path(folder)


def make_rows(count, pixels=64, seed=0):
    """`count` rows of (image, control, caption) with the pictures as PNG bytes."""
    rng = random.Random(seed)
    pairs = [draw_pair(rng, pixels) for _ in range(count)]
    return [(png(image), png(control), caption) for image, control, caption in pairs]


def make_data(folder, count=64, pixels=64, seed=0):
    """A parquet data set of `count` rows in `folder`."""
    return write_parquet(folder, make_rows(count, pixels, seed))


if __name__ == "__main__":
    if not Path(sys.argv[1], "data", "train.parquet").exists():
        make_data(Path(sys.argv[1], "data"), int((sys.argv[2:] or [2048])[0]))
