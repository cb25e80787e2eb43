"""Trains the tiny base of the demo: python tests/make_base.py [FOLDER], about 45 minutes on two CPU cores.

FOLDER, tests/base by default, is laid out as CogView4-6B is. Its VAE reconstructs 64 px pictures of captioned coloured
shapes and their outlines; its transformer draws such shapes from a caption, without any control. The text encoder is a
random GLM over a tokenizer that knows the words: its features tell captions apart, and no more is needed."""

import functools
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, CogView4ControlPipeline, CogView4Transformer2DModel
from diffusers.image_processor import VaeImageProcessor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import cv4ctrl  # noqa: E402
import tiny  # noqa: E402

# With GLM's own initial weights, of standard deviation 0.02, captions of the same words in another order ("a blue
# circle on pale green", "a green circle on pale blue") almost coincide; with 0.15 attention mixes more.
SHAPE = dict(layers=4, heads=4, head_dim=32, text_dim=64, text_std=0.15, vae_channels=(16, 32, 48, 64))
USED = 8  # of the 16 latent channels: the pictures are simple, and each channel has to be learned by the transformer
SCALE = 0.6  # standard deviation of the used channels


def fit(model, loss_of, steps, rate, **options):
    """AdamW on loss_of() with one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


def vae_loss(vae, images, controls, used):
    """L1 + squared error, that of 8 x 8 means (plain colours) counted more, and a light KL term; used: (16,)."""
    x = torch.cat([images[torch.randint(len(images), (11,))], controls[torch.randint(len(images), (5,))]])
    mean, log_variance = vae.encoder(x.contiguous(memory_format=torch.channels_last)).chunk(2, dim=1)
    y = vae.decoder((mean + (0.5 * log_variance).exp() * torch.randn_like(mean)) * used[:, None, None])
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
    colours = F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))
    return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 8 * colours + 1e-4 * kl / 64


def train_vae(vae, images, controls):
    """Trains all channels, then those with the narrowest posterior, which say most, then these once more, scaled.

    The third round, at the first one's rate again, gets the colours right: after the second, green came back brown."""
    vae.to(memory_format=torch.channels_last)
    used = torch.ones(16)
    for steps, rate in ((2400, 2e-3), (1000, 1e-3), (3000, 2e-3)):
        fit(vae, functools.partial(vae_loss, vae, images, controls, used), steps, rate, weight_decay=0.0)
        if used.all():
            with torch.no_grad():
                variance = vae.encoder(images[:256]).chunk(2, dim=1)[1].exp().mean((0, 2, 3))
            used = torch.zeros(16).index_fill(0, variance.argsort()[:USED], 1)
        else:
            scale_latents(vae, images, used)
    return vae.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def scale_latents(vae, images, used):
    """Puts into the weights: standard deviation SCALE and a narrow posterior for used channels, 0 for the others."""
    latents = vae.encoder(images[:512])[:, :16]
    scale = SCALE / latents[:, used.bool()].std() * used
    into, out = vae.decoder.conv_in, vae.encoder.conv_out
    out.weight[:16] *= scale[:, None, None, None]
    out.bias[:16] *= scale
    out.weight[16:], out.bias[16:] = 0, -9  # noise of 0.01
    into.weight *= (used / (scale + 1 - used))[:, None, None]


def train_transformer(transformer, latents, captions, embeds):
    """Flow matching with the trainer's functions, a tenth of the captions empty -> the average of the weights."""
    size = torch.full((64, 2), 64.0)
    rotary_emb = transformer.rope(latents[:1])
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    average = torch.optim.swa_utils.AveragedModel(transformer, multi_avg_fn=decay)

    def loss():
        average.update_parameters(transformer)
        pick = torch.randint(len(latents), (64,))
        x0, eps = latents[pick], torch.randn(64, 16, 8, 8)
        t = 1000 - (1000 * (torch.randperm(64) + torch.rand(64)) / 64).floor()
        text = embeds[captions[pick].masked_fill(torch.rand(64) < 0.1, 0)]  # 0 is ""
        sigma = cv4ctrl.shifted_sigma(t, 16).view(-1, 1, 1, 1)
        noisy = (1 - sigma) * x0 + sigma * eps
        v = transformer(noisy, text, t, size, size, 0 * size, image_rotary_emb=rotary_emb, return_dict=False)[0]
        return torch.nn.functional.mse_loss(v, eps - x0)

    fit(transformer, loss, 4500, 4e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    return average.module


def main(folder):
    tiny.make_base(folder, words=tiny.all_captions(), **SHAPE)
    torch.manual_seed(0)
    rng = random.Random(1)
    pairs = [tiny.draw_pair(rng) for _ in range(6000)]
    images, controls = (VaeImageProcessor().preprocess([pair[part] for pair in pairs]) for part in (0, 1))
    vae = AutoencoderKL.from_config(json.loads((folder / "vae" / "config.json").read_text()))
    train_vae(vae, images, controls).bfloat16().save_pretrained(folder / "vae")
    pipe = CogView4ControlPipeline.from_pretrained(folder, transformer=None, dtype=torch.bfloat16)
    texts = ["", *tiny.all_captions()]
    with torch.no_grad():
        latents = [pipe.vae.encode(part.bfloat16()).latent_dist.sample().float() for part in images.split(50)]
        embeds = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0].float() for text in texts]
    captions = torch.tensor([texts.index(caption) for *_, caption in pairs])
    config = json.loads((folder / "transformer" / "config.json").read_text())
    transformer = CogView4Transformer2DModel.from_config(config)
    transformer = train_transformer(transformer, torch.cat(latents), captions, torch.cat(embeds))
    transformer.bfloat16().save_pretrained(folder / "transformer")


if __name__ == "__main__":
    main(Path(*sys.argv[1:]) if len(sys.argv) > 1 else Path(__file__).parent / "base")
