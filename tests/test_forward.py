"""Room 5: the call of the transformer, held against what the installed pipeline calls."""

import pytest
import torch
from diffusers import CogView4ControlPipeline
from PIL import Image

import cv4ctrl
import tiny


@pytest.fixture(scope="module")
def model(base):
    return tiny.control_model(base)


@pytest.fixture(scope="module")
def pipe(base):
    """The pipeline on a model that we did not touch."""
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=tiny.control_model(base), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def frame(model):
    return cv4ctrl.prepare(model, 64, torch.device("cpu"), torch.float32)


def spy(model, monkeypatch):
    """Record the keyword arguments of every call of the transformer."""
    calls, forward = [], model.forward

    def record(*args, **kwargs):
        assert not args
        calls.append(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", record)
    return calls


def test_keyword_arguments_are_the_pipelines(model, pipe, frame, monkeypatch):
    calls, ours_called = spy(pipe.transformer, monkeypatch), spy(model, monkeypatch)
    control = Image.new("RGB", (64, 64), "white")
    generator = torch.Generator().manual_seed(0)
    pipe("a red circle", control_image=control, height=64, width=64, num_inference_steps=5, guidance_scale=1.0, generator=generator)
    theirs = list(calls)
    assert len(theirs) == 5
    timesteps = cv4ctrl.inference_timesteps(5)
    assert [call["timestep"].item() for call in theirs] == timesteps.tolist()  # unshifted: fails on diffusers 0.40 and 0.41
    for call, t in zip(theirs, timesteps):
        ours_called.clear()
        noisy, control = call["hidden_states"].chunk(2, 1)
        cv4ctrl.predict(model, frame, noisy, control, call["encoder_hidden_states"], None, t.expand(1))
        ours = dict(ours_called[0])
        assert ours.pop("attention_mask") is None
        cos, sin = ours.pop("image_rotary_emb")
        assert all(torch.equal(a, b) for a, b in zip((cos, sin), model.rope(noisy)))
        assert call.pop("attention_kwargs") is None
        assert ours.keys() == call.keys()
        for name, value in call.items():
            same = torch.equal(ours[name], value) and ours[name].dtype == value.dtype if torch.is_tensor(value) else ours[name] == value
            assert same, name


def test_our_attention_equals_the_installed_one(base, frame):
    from diffusers import CogView4Transformer2DModel

    plain = CogView4Transformer2DModel.from_pretrained(base / "transformer", torch_dtype=torch.float32)
    x, text, size = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 32), torch.tensor([[64.0, 64.0]] * 2)
    inputs = (x, text, torch.tensor([700.0, 3.0]), size, size, 0 * size)
    with torch.no_grad():
        theirs = plain(*inputs, return_dict=False)[0]
        cv4ctrl.prepare(plain, 64, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(plain(*inputs, return_dict=False)[0], theirs, rtol=0, atol=1e-6)


def sample(seed, tokens, row=0):
    generator = torch.Generator().manual_seed(seed)
    latent, control, noise = torch.randn(3, 16, 8, 8, generator=generator)
    embeds = torch.randn(tokens, 32, generator=generator).bfloat16()
    return dict(row=row, latent=latent, control=control, noise=noise, timestep=torch.tensor([100.0 + 50 * seed]), prompt_embeds=embeds)


def losses(model, frame, batch):
    """(prediction, loss of each sample)."""
    noisy = cv4ctrl.interpolate(batch["latent"], batch["noise"], batch["sigma"])
    with torch.no_grad():
        v = cv4ctrl.predict(model, frame, noisy, batch["control"], batch["prompt_embeds"], batch["mask"], batch["timestep"])
    return v, (v - cv4ctrl.velocity(batch["latent"], batch["noise"])).square().flatten(1).mean(1)


def test_a_sample_does_not_depend_on_its_batch(model, frame):
    mu = cv4ctrl.shift_mu(16)
    samples = [sample(seed, tokens) for seed, tokens in enumerate([16, 64, 32, 128])]
    batch = cv4ctrl.collate(samples, mu)
    assert batch["mask"].sum(1).tolist() == [16, 64, 32, 128] and batch["mask"].dtype == torch.bool
    together, together_loss = losses(model, frame, batch)
    for i, alone in enumerate(samples):
        one = cv4ctrl.collate([alone], mu)
        assert one["mask"] is None
        v, loss = losses(model, frame, one)
        torch.testing.assert_close(v[0], together[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(loss[0], together_loss[i], rtol=1e-5, atol=0)


def test_the_mask_matters(model, frame):
    batch = cv4ctrl.collate([sample(0, 16), sample(1, 64)], cv4ctrl.shift_mu(16))
    masked = losses(model, frame, batch)[0]
    batch["mask"][0, 16] = True  # let one pad in
    opened = losses(model, frame, batch)[0]
    assert (opened[0] - masked[0]).abs().max() > 1e-3
    assert torch.equal(opened[1], masked[1])


def test_gradients_do_not_depend_on_the_batch_either(model, frame):
    mu, parameter = cv4ctrl.shift_mu(16), model.transformer_blocks[0].attn1.to_k.weight
    samples = [sample(0, 16), sample(1, 96)]

    def gradient(batch):
        model.zero_grad()
        cv4ctrl.batch_loss(model, frame, batch, "none").backward()
        return parameter.grad.clone()

    together = gradient(cv4ctrl.collate(samples, mu))
    alone = sum(gradient(cv4ctrl.collate([s], mu)) for s in samples) / 2
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)
