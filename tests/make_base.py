"""Train the tiny base of the demo: python tests/make_base.py [FOLDER], about 15 minutes on two CPU cores.

The folder, tests/base by default, is laid out as CogView4-6B is. Its VAE reconstructs 64 px pictures of captioned coloured shapes
and their outlines; its transformer draws such shapes from a caption, without any control. The text encoder is a random GLM over a
tokenizer that knows the words: random features of few words can be told apart, and that is all that is asked of it.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import cv4ctrl  # noqa: E402
import tiny  # noqa: E402

PIXELS = 64
VAE_STEPS, TRANSFORMER_STEPS = 2400, 4000


def tensor(image):
    """PIL image -> (3, H, W) in -1 .. 1."""
    return torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1


def train_vae(vae, images, controls, steps):
    """L1 + squared error, a light KL term, warm-up and cosine decay; then latents are scaled to unit variance in the weights."""
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    clock = time.time()
    for step in range(steps):
        pick = torch.randint(len(images), (10,))
        x = torch.cat([images[pick], controls[pick[:6]]]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 2e-4 * posterior.kl().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"VAE step {step}: loss {loss.item():.4f}, squared error {F.mse_loss(y, x).item():.5f}, {time.time() - clock:.0f} s", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(images[i : i + 64]).latent_dist.mean for i in range(0, 1024, 64)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        out, into = vae.encoder.conv_out, vae.decoder.conv_in  # fold (z - mean) / std into the encoder, its inverse into the decoder
        out.weight[:16] /= std[:, None, None, None]
        out.bias[:16] = (out.bias[:16] - mean) / std
        out.bias[16:] -= 2 * std.log()
        border = F.conv2d(torch.zeros(1, 16, 3, 3) + mean[:, None, None], into.weight, into.bias, padding=1)[0, :, 1, 1]
        into.weight *= std[None, :, None, None]
        into.bias.copy_(border)  # exact inside; at the border the padding stands for the mean instead of zero
    return vae.to(memory_format=torch.contiguous_format)


def train_transformer(transformer, latents, captions, embeds, steps):
    """Flow matching with the trainer's own functions, a tenth of the captions empty; the average of the weights is kept."""
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    average = torch.optim.swa_utils.AveragedModel(transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    mu, size = cv4ctrl.shift_mu((PIXELS // 16) ** 2), torch.full((1, 2), float(PIXELS))
    rope = transformer.rope(latents[:1])
    clock, losses = time.time(), []
    for step in range(steps):
        pick = torch.randint(len(latents), (64,))
        x0, eps = latents[pick], torch.randn(64, 16, PIXELS // 8, PIXELS // 8)
        t = cv4ctrl.timestep_of((torch.randperm(64) + torch.rand(64)) / 64)
        sigma = cv4ctrl.shifted_sigma(t, mu)
        text = captions[pick].masked_fill(torch.rand(64) < 0.1, 0)  # 0 is ""
        sizes = size.expand(64, 2)
        v = transformer(cv4ctrl.interpolate(x0, eps, sigma), embeds[text], t, sizes, sizes, 0 * sizes, image_rotary_emb=rope, return_dict=False)[0]
        loss = cv4ctrl.flow_loss(v, cv4ctrl.velocity(x0, eps), torch.ones(64))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(transformer)
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"transformer step {step}: loss {np.mean(losses[-200:]):.4f}, {time.time() - clock:.0f} s", flush=True)
    return average.module


def main(folder):
    from diffusers import AutoencoderKL, CogView4ControlPipeline, CogView4Transformer2DModel

    tiny.make_base(folder, layers=4, heads=4, head_dim=32, text_dim=64, vae_channels=(16, 32, 48, 64), vae_layers=1, time_dim=64, words=tiny.all_captions())
    torch.manual_seed(0)
    rng = random.Random(1)
    pairs = [tiny.draw_pair(rng, PIXELS) for _ in range(6000)]
    images, controls = (torch.stack([tensor(pair[i]) for pair in pairs]) for i in (0, 1))
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae = train_vae(vae, images, controls, VAE_STEPS).bfloat16().eval().requires_grad_(False)
    vae.save_pretrained(folder / "vae")
    latents = torch.cat([vae.encode(images[i : i + 64].bfloat16()).latent_dist.sample().float() for i in range(0, len(images), 64)])
    print(f"latents: mean {latents.mean():.3f}, standard deviation {latents.std():.3f}", flush=True)

    pipe = CogView4ControlPipeline.from_pretrained(folder, transformer=None, vae=None, torch_dtype=torch.bfloat16)
    texts = ["", *tiny.all_captions()]
    with torch.no_grad():
        embeds = torch.cat([pipe.encode_prompt(text, do_classifier_free_guidance=False)[0].float() for text in texts])
    captions = torch.tensor([texts.index(pair[2]) for pair in pairs])
    transformer = CogView4Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    transformer = train_transformer(transformer, latents, captions, embeds, TRANSFORMER_STEPS)
    transformer.bfloat16().save_pretrained(folder / "transformer")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "base")
