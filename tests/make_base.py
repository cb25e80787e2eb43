"""Train the tiny base of the demo: python tests/make_base.py [FOLDER [transformer]], about 45 minutes on two CPU cores, the sum of its phases.

The folder, tests/base by default, is laid out as CogView4-6B is. Its VAE reconstructs 64 px pictures of captioned coloured shapes
and their outlines; its transformer draws such shapes from a caption, without any control. The text encoder is a random GLM over a
tokenizer that knows the words: random features of few words can be told apart, and that is all that is asked of it. With
`transformer` only that part is trained, on the VAE that is there. (The weights in tests/base come from these phases in three goes,
rounded to bf16 in between.)
"""

import json
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
# With GLM's own initial weights, of 0.02, captions of the same words in another order ("a blue circle on pale green", "a green circle
# on pale blue") all but coincide: with 0.15 attention mixes, and each caption has features of its own.
SHAPE = dict(layers=4, heads=4, head_dim=32, text_dim=64, text_std=0.15, vae_channels=(16, 32, 48, 64))
VAE_STEPS, TRANSFORMER_STEPS = (2400, 1000, 3000), 4500
USED = 8  # of the 16 latent channels: the pictures are simple, and what carries little costs the transformer much
SCALE = 0.6  # standard deviation of the used channels


def tensor(image):
    """PIL image -> (3, H, W) in -1 .. 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def fit_vae(vae, images, controls, steps, rate, used):
    """L1 + squared error, that of 8 x 8 means (plain colours) counted more, and a light KL term, with the channels in `used`, (16,)."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    clock = time.time()
    for step in range(steps):
        x = torch.cat([images[torch.randint(len(images), (11,))], controls[torch.randint(len(images), (5,))]])
        mean, log_variance = vae.encoder(x.contiguous(memory_format=torch.channels_last)).chunk(2, dim=1)
        y = vae.decoder((mean + (0.5 * log_variance).exp() * torch.randn_like(mean)) * used[:, None, None])
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()
        colours = F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))
        loss = F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 8 * colours + 1e-4 * kl / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"VAE step {step + 1}: loss {loss.item():.4f}, squared error {F.mse_loss(y, x).item():.5f}, {time.time() - clock:.0f} s", flush=True)


def train_vae(vae, images, controls):
    """All channels; then only those that say most, which are those of the narrowest posterior; then these once more, scaled.

    The third round, at the first one's rate again, is what gets the colours right: after the second, green came back as brown."""
    vae.to(memory_format=torch.channels_last)
    fit_vae(vae, images, controls, VAE_STEPS[0], 2e-3, torch.ones(16))
    with torch.no_grad():
        variance = vae.encoder(images[:256]).chunk(2, dim=1)[1].exp().mean((0, 2, 3))
    used = torch.zeros(16).index_fill(0, variance.argsort()[:USED], 1)
    for steps, rate in ((VAE_STEPS[1], 1e-3), (VAE_STEPS[2], 2e-3)):
        fit_vae(vae, images, controls, steps, rate, used)
        scale_latents(vae, images, used)
    return vae.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def scale_latents(vae, images, used):
    """Into the weights: the used channels get the standard deviation SCALE and a narrow posterior, the others become nothing."""
    latents = vae.encoder(images[:512])[:, :16]
    scale = SCALE / latents[:, used.bool()].std() * used
    into, out = vae.decoder.conv_in, vae.encoder.conv_out
    out.weight[:16] *= scale[:, None, None, None]
    out.bias[:16] *= scale
    out.weight[16:], out.bias[16:] = 0, -9  # noise of 0.01
    into.weight *= (used / (scale + 1 - used))[:, None, None]


def train_transformer(transformer, latents, captions, embeds, steps):
    """Flow matching with the trainer's own functions, a tenth of the captions empty; the average of the weights is kept."""
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=4e-3, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.05)
    average = torch.optim.swa_utils.AveragedModel(transformer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    mu, size = cv4ctrl.shift_mu((PIXELS // 16) ** 2), torch.full((64, 2), float(PIXELS))
    rope = transformer.rope(latents[:1])
    clock, losses = time.time(), []
    for step in range(steps):
        pick = torch.randint(len(latents), (64,))
        x0, eps = latents[pick], torch.randn(64, 16, PIXELS // 8, PIXELS // 8)
        t = cv4ctrl.timestep_of((torch.randperm(64) + torch.rand(64)) / 64)
        text = captions[pick].masked_fill(torch.rand(64) < 0.1, 0)  # 0 is ""
        noisy = cv4ctrl.interpolate(x0, eps, cv4ctrl.shifted_sigma(t, mu))
        v = transformer(noisy, embeds[text], t, size, size, 0 * size, image_rotary_emb=rope, return_dict=False)[0]
        loss = cv4ctrl.flow_loss(v, cv4ctrl.velocity(x0, eps), torch.ones(64))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(transformer)
        losses.append(loss.item())
        if step % 250 == 249:
            print(f"transformer step {step + 1}: loss {np.mean(losses[-250:]):.4f}, {time.time() - clock:.0f} s", flush=True)
    return average.module


def save(model, folder):
    """As the library does, but without the path that the model came from."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(folder, only_transformer=False):
    from diffusers import AutoencoderKL, CogView4ControlPipeline, CogView4Transformer2DModel

    if not only_transformer:
        tiny.make_base(folder, words=tiny.all_captions(), **SHAPE)
    torch.manual_seed(0)
    rng = random.Random(1)
    pairs = [tiny.draw_pair(rng, PIXELS) for _ in range(6000)]
    images, controls = (torch.stack([tensor(pair[i]) for pair in pairs]) for i in (0, 1))
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    vae = (vae if only_transformer else train_vae(vae, images, controls)).bfloat16().requires_grad_(False)
    save(vae, folder / "vae")
    latents = torch.cat([vae.encode(images[i : i + 50].bfloat16()).latent_dist.sample().float() for i in range(0, len(images), 50)])
    print(f"latents: standard deviation by channel {latents.std((0, 2, 3)).numpy().round(2)}", flush=True)

    pipe = CogView4ControlPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=torch.bfloat16)
    texts = ["", *tiny.all_captions()]
    with torch.no_grad():
        embeds = torch.cat([pipe.encode_prompt(text, do_classifier_free_guidance=False)[0].float() for text in texts])
    captions = torch.tensor([texts.index(pair[2]) for pair in pairs])
    transformer = CogView4Transformer2DModel.from_config(CogView4Transformer2DModel.load_config(folder / "transformer"))
    transformer = train_transformer(transformer, latents, captions, embeds, TRANSFORMER_STEPS)
    save(transformer.bfloat16(), folder / "transformer")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "base", "transformer" in sys.argv[2:])
