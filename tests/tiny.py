"""A complete CogView4 base and a data set, small enough for two CPU cores and made without a network.

    python tests/tiny.py FOLDER [--rows 2048]

leaves FOLDER/data, parquet in the format of raulc0399/open_pose_controlnet: image, conditioning_image, text. The images are
captioned coloured shapes, the control is their outline. `make_base` makes a base of random weights, laid out as CogView4-6B is
(tokenizer, GLM text encoder, VAE, transformer, scheduler, model_index.json); tests/base is one that make_base.py has trained.
"""

import argparse
import io
import json
import math
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 50),
    "purple": (150, 60, 180), "orange": (245, 140, 30),
}  # fmt: skip
GROUNDS = {"pale green": (180, 230, 180), "pale blue": (175, 200, 250), "pale pink": (250, 190, 205), "grey": (160, 160, 160)}
SHAPES = {"circle": 0, "triangle": 3, "square": 4, "star": 5}


# --- the base -------------------------------------------------------------------------------------------------------------------


def make_tokenizer(folder, texts=()):
    """Byte-level tokenizer with GLM-4's frame: `[gMASK] <sop>` in front, pads on the left; a byte is a token, and so is a word of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(texts))
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        vocab = tokenizer.get_vocab()
    frame = [("[gMASK]", vocab["[gMASK]"]), ("<sop>", vocab["<sop>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=frame)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>", padding_side="left",
        additional_special_tokens=special[1:], model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return len(vocab)


def make_base(folder, seed=0, layers=2, heads=4, head_dim=16, text_dim=32, text_std=0.02, vae_channels=(8, 8, 16, 16), words=()):
    """Random CogView4 base in `folder`, in bf16; every part loads with the class that CogView4-6B's model_index.json names."""
    import diffusers
    from diffusers import AutoencoderKL, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    folder = Path(folder)
    torch.manual_seed(seed)
    diffusers.utils.logging.set_verbosity_error()  # the plain casts below are meant
    vocab = make_tokenizer(folder / "tokenizer", words)
    config = GlmConfig(
        vocab_size=vocab, hidden_size=text_dim, intermediate_size=2 * text_dim, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=text_dim // 2, max_position_embeddings=2048, pad_token_id=0, eos_token_id=0,
        attention_bias=True, initializer_range=text_std,
    )  # fmt: skip
    GlmModel(config).bfloat16().save_pretrained(folder / "text_encoder")
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=vae_channels, layers_per_block=1, norm_num_groups=4,
        sample_size=64, scaling_factor=1.0, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    )  # fmt: skip
    vae.bfloat16().save_pretrained(folder / "vae")
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=head_dim,
        num_attention_heads=heads, text_embed_dim=text_dim, time_embed_dim=32, condition_dim=16, sample_size=8,
    )  # fmt: skip
    transformer.bfloat16().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75, base_image_seq_len=256, shift=1.0
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "CogView4Pipeline",
        "_diffusers_version": "0.33.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "GlmModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "CogView4Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def control_model(base):
    """Widened model whose control columns are not zero, so that a wrong control shows, with the installed attention."""
    import cv4ctrl

    model = cv4ctrl.load_transformer(base / "transformer", None, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        model.patch_embed.proj.weight[:, 64:].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


# --- the data -------------------------------------------------------------------------------------------------------------------


def all_captions():
    """Every caption that draw_pair gives."""
    return [f"a {colour} {shape} on {ground}" for colour in COLOURS for shape in SHAPES for ground in GROUNDS]


def draw_pair(rng, pixels=64):
    """(image, control, caption): a shape of one colour on a plain ground, and its white outline on black."""
    shape, colour, ground = rng.choice(list(SHAPES)), rng.choice(list(COLOURS)), rng.choice(list(GROUNDS))
    scale = 4  # drawn larger and reduced: smooth edges
    size = pixels * scale
    radius = rng.uniform(0.22, 0.36) * size
    x, y = (rng.uniform(radius, size - radius) for _ in range(2))
    turn = rng.uniform(-0.35, 0.35) - math.pi / (4 if shape == "square" else 2)  # upright, give or take 20 degrees
    corners = SHAPES[shape]
    if corners == 0:
        corners, inner = 60, 1.0
    else:
        inner = 0.45 if shape == "star" else None
    points = []
    for i in range(corners * (2 if inner == 0.45 else 1)):
        reach = radius * (inner if inner == 0.45 and i % 2 else 1.0)
        angle = turn + 2 * math.pi * i / (corners * (2 if inner == 0.45 else 1))
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    image = Image.new("RGB", (size, size), GROUNDS[ground])
    ImageDraw.Draw(image).polygon(points, fill=COLOURS[colour])
    control = Image.new("RGB", (size, size))
    ImageDraw.Draw(control).line(points + points[:2], fill="white", width=2 * scale, joint="curve")
    image, control = (picture.resize((pixels, pixels), Image.Resampling.LANCZOS) for picture in (image, control))
    return image, control, f"a {colour} {shape} on {ground}"


def png(image):
    """Image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder, rows):
    """Rows of (image bytes, control bytes, caption) as FOLDER/train.parquet with the columns of open_pose_controlnet."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "conditioning_image": datasets.Image(), "text": datasets.Value("string")})
    columns = {
        "image": [{"bytes": image, "path": None} for image, _, _ in rows],
        "conditioning_image": [{"bytes": control, "path": None} for _, control, _ in rows],
        "text": [caption for _, _, caption in rows],
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(Path(folder) / "train.parquet"))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    if not (options.folder / "data" / "train.parquet").exists():
        make_data(options.folder / "data", options.rows)
