"""Room 8: our sampler draws what CogView4ControlPipeline draws."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import CogView4ControlPipeline
from PIL import Image

import cv4ctrl
import tiny


@pytest.fixture(scope="module")
def model(base):
    return tiny.control_model(base)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("side", [64, 96])
def test_sampler_equals_the_pipeline(base, model, guidance, side):
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=tiny.control_model(base), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    control_image, prompt = Image.effect_noise((side, side), 60).convert("RGB"), "a red circle on pale green, seen from above"
    noise = torch.randn(1, 16, side // 8, side // 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(control_image, side, side)
        posterior = pipe.vae.encode(pixels).latent_dist
        texts = [pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in (prompt, "")]
    frame = cv4ctrl.prepare(model, side, torch.device("cpu"), torch.float32)
    torch.manual_seed(5)  # the pipeline draws the control from its posterior with the global generator
    control = posterior.sample()
    torch.manual_seed(5)
    theirs = pipe(
        prompt, control_image=control_image, height=side, width=side, num_inference_steps=7, guidance_scale=guidance,
        latents=noise.clone(), output_type="latent",
    ).images  # fmt: skip
    ours = cv4ctrl.euler_sample(model, frame, noise, control, *texts, 7, guidance)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    swapped = cv4ctrl.euler_sample(model, frame, noise, -control, *texts, 7, guidance)
    assert (swapped - theirs).abs().max() > 1e-2  # the control reaches the picture


def test_decoded_pictures_are_the_pipelines(base, config):
    vae = cv4ctrl.load_vae(config(), base)
    pipe = CogView4ControlPipeline.from_pretrained(base, transformer=None, text_encoder=None, vae=vae, tokenizer=None)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    (ours,) = cv4ctrl.decode(config(), SimpleNamespace(scaling=1.0), base, [latents], torch.device("cpu"))
    with torch.no_grad():
        theirs = pipe.image_processor.postprocess(pipe.vae.decode(latents.bfloat16()).sample, "np")
    for image, expected in zip(ours, theirs):
        pixels = torch.tensor(list(image.tobytes())).view(64, 64, 3) / 255
        assert (pixels - torch.from_numpy(expected)).abs().max() < 0.05


@pytest.fixture()
def stream(encoded, config, tmp_path):
    return cv4ctrl.Stream(config(tmp_path, num_validation_images=2, num_inference_steps=2), encoded, 0, 1)


@pytest.fixture(scope="module")
def frame(model):
    return cv4ctrl.prepare(model, 64, torch.device("cpu"), torch.float32)


def test_pictures_of_a_run(stream, base, model, frame, tmp_path):
    for step in (0, 5):
        cv4ctrl.validate(model, frame, stream, base, step)
    first, second = (Image.open(tmp_path / "validation" / f"step-{step}.png") for step in (0, 5))
    assert first.size == (4 * 160, 16 + 4 * (160 + 16))  # control, two generated, target; four cases
    assert first.tobytes() == second.tobytes()  # same noise at every step: what changes is the model
    column = [first.crop((160 * i, 32, 160 * (i + 1), 192)).tobytes() for i in range(4)]
    assert len(set(column)) == 4
    assert [f.name for f in (tmp_path / "validation").iterdir() if f.suffix != ".png"] == []


def test_grid_without_target_column(tmp_path):
    cell = Image.new("RGB", (64, 64), "red")
    cv4ctrl.save_grid(tmp_path / "grid.png", ["one\nline"] * 3, [[cell, cell]] * 3, ["control", "generated", "target"])
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (320, 16 + 3 * 176) and grid.getpixel((80, 100)) == (255, 0, 0)


def test_probe_is_what_it_says(stream, encoded, model, frame):
    """Computed again, one sample at a time, from the definition."""
    state = torch.get_rng_state()
    figures = cv4ctrl.probe(model, frame, stream)
    assert torch.equal(torch.get_rng_state(), state)
    rows, losses = encoded.held_out, {}
    assert len(rows) == 4
    samples = [stream.sample(row, row.caption, None, "probe", n) for n, row in enumerate(rows)]
    for swapped in (0, 1):
        for t in range(100, 901, 100):
            for n, s in enumerate(samples):
                sigma = cv4ctrl.shifted_sigma(torch.tensor([float(t)]), cv4ctrl.shift_mu(16))
                noisy = (1 - sigma) * s["latent"] + sigma * s["noise"]
                control = samples[(n + swapped) % 4]["control"]
                with torch.no_grad():
                    v = cv4ctrl.predict(model, frame, noisy[None], control[None], s["prompt_embeds"][None], None, torch.tensor([float(t)]))
                losses[swapped, t, n] = (v[0] - (s["noise"] - s["latent"])).square().mean().item()
    own, other = (sum(v for key, v in losses.items() if key[0] == swapped) / 36 for swapped in (0, 1))
    assert figures["probe_loss"] == pytest.approx(own, rel=1e-5) and figures["probe_loss_swapped"] == pytest.approx(other, rel=1e-5)
    assert figures["control_gain"] == pytest.approx(other / own - 1, abs=1e-5) and abs(figures["control_gain"]) > 1e-4
    assert figures["probe_loss_by_t"][2] == pytest.approx(sum(losses[0, 300, n] for n in range(4)) / 4, rel=1e-5)
    assert len(figures["control_gain_by_t"]) == 9
    assert cv4ctrl.probe(model, frame, stream) == figures  # same noise always


def test_a_model_that_ignores_the_control_has_no_gain(base, stream):
    model = cv4ctrl.load_transformer(base / "transformer", None, torch.float32, torch.device("cpu"))
    frame = cv4ctrl.prepare(model, 64, torch.device("cpu"), torch.float32)
    assert cv4ctrl.probe(model, frame, stream)["control_gain"] == 0


def test_no_probe_without_two_held_out_rows(stream, encoded, model, frame):
    few = cv4ctrl.Stream(stream.config, encoded._replace(held_out=encoded.held_out[:1]), 0, 1)
    assert cv4ctrl.probe(model, frame, few) is None


def test_sheet_of_what_the_model_is_fed(stream, base, encoded, tmp_path):
    cv4ctrl.log_samples(stream, base, torch.device("cpu"))
    sheet = Image.open(tmp_path / "dataset_samples.png")
    assert sheet.size == (480, 16 + 12 * 176)
    image, control, overlay = (torch.tensor(list(sheet.crop((160 * i, 32, 160 * (i + 1), 192)).tobytes())).float() for i in range(3))
    assert ((image + control) / 2 - overlay).abs().max() <= 1 and not torch.equal(image, control)
