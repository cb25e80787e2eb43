"""Room 7: sample k is a pure function of (seed, k)."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

import cv4ctrl


def make(encoded, config, rank=0, world=1, **options):
    return cv4ctrl.Stream(config(world=world, **options), encoded, rank, world)


def sample(stream, k):
    return stream.sample(*stream.row(k), stream.timestep(k), "noise", k)


def test_ranks_and_workers_see_bitwise_the_same_samples(encoded, config):
    whole = make(encoded, config, train_batch_size=4, total_batch_size=8)
    parts = [make(encoded, config, rank, 2, train_batch_size=2, total_batch_size=8) for rank in range(2)]
    loaded = [list(DataLoader(part, None, num_workers=2, sampler=range(6))) for part in parts]
    for n in range(6):  # three steps of two accumulations, past the end of an epoch
        one, two = whole[n], [loaded[0][n], loaded[1][n]]
        assert one["rows"] == two[0]["rows"] + two[1]["rows"]
        for name in ("latent", "control", "noise", "timestep", "sigma"):
            assert torch.equal(one[name], torch.cat([half[name] for half in two])), name


def test_every_row_once_an_epoch_in_another_order(encoded, config):
    stream, rows = make(encoded, config), len(encoded.train)
    epochs = [[stream.row(k)[0].id for k in range(e * rows, (e + 1) * rows)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row.id for row in encoded.train)
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_seed_changes_everything_and_k_changes_everything(encoded, config):
    a, b = sample(make(encoded, config), 5), sample(make(encoded, config, seed=1), 5)
    again = sample(make(encoded, config, train_batch_size=1, dataloader_num_workers=4), 5)
    other = sample(make(encoded, config), 6)
    for name in ("latent", "noise", "control"):
        assert torch.equal(a[name], again[name])
        assert not torch.equal(a[name], b[name]) and not torch.equal(a[name], other[name])
    assert a["timestep"] != b["timestep"]


def test_every_visit_draws_a_fresh_latent_of_the_same_posterior(encoded, config):
    stream, rows = make(encoded, config), len(encoded.train)
    visits = {stream.row(k)[0].id: k for k in range(rows)}
    k2 = next(k for k in range(rows, 2 * rows) if stream.row(k)[0].id == stream.row(0)[0].id)
    first, second = sample(stream, 0), sample(stream, k2)
    assert first["row"] == second["row"] and len(visits) == rows
    assert not torch.equal(first["latent"], second["latent"]) and not torch.equal(first["control"], second["control"])
    mean = encoded.latent(stream.row(0)[0].image)
    assert (first["latent"] - mean).abs().mean() < 10 * (second["latent"] - mean).abs().mean()


def test_timesteps_are_spread_evenly_and_each_is_uniform(encoded, config):
    stream = make(encoded, config)
    for start in (0, 1000, 123456):
        t = torch.cat([stream.timestep(k) for k in range(start, start + 64)]).sort().values
        even = 1000 * (1 - (torch.arange(64) + 0.5) / 64).flip(0)
        assert (t - even).abs().max() < 1000 * 2.5 / 64  # random draws deviate about four times as much
    firsts = torch.cat([make(encoded, config, seed=seed).timestep(0) for seed in range(2000)])
    assert abs(firsts.mean() - 500.5) < 4 * 289 / 2000**0.5 and firsts.min() < 10 and firsts.max() > 990
    many = torch.cat([stream.timestep(k) for k in range(20000)])
    assert (many.histc(10, 0.5, 1000.5) - 2000).abs().max() <= 3 and many.min() == 1 and many.max() == 1000


def test_captions_are_dropped_by_sample_not_by_batch(encoded, config):
    stream = make(encoded, config, proportion_empty_prompts=0.3)
    dropped = [stream.row(k)[1] == encoded.empty for k in range(2000)]
    assert 0.26 < sum(dropped) / 2000 < 0.34
    batches = [sum(dropped[i : i + 8]) for i in range(0, 2000, 8)]
    assert sum(0 < n < 8 for n in batches) > 200
    assert not any(make(encoded, config).row(k)[1] == encoded.empty for k in range(200))
    assert all(make(encoded, config, proportion_empty_prompts=1.0).row(k)[1] == encoded.empty for k in range(200))


def test_a_global_batch_is_sorted_by_length_whole(encoded, config):
    stream = make(encoded, config, train_batch_size=2, total_batch_size=16, proportion_empty_prompts=0.3)
    batches = [stream[n] for n in range(8)]
    lengths = [batch["prompt_embeds"].shape[1] for batch in batches]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    assert sorted(stream.order(3)) == list(range(48, 64))
    expected = {tuple(sample(stream, k)["noise"].flatten()[:4].tolist()) for k in range(16)}
    assert {tuple(noise.flatten()[:4].tolist()) for batch in batches for noise in batch["noise"]} == expected


@pytest.mark.parametrize("lengths", [[16, 16], [16, 48, 32]])
def test_collate_pads_right_and_masks_only_where_needed(lengths):
    samples = [
        dict(row=i, latent=torch.zeros(16, 2, 2), control=torch.zeros(16, 2, 2), noise=torch.zeros(16, 2, 2),
             timestep=torch.tensor([500.0]), prompt_embeds=torch.full((n, 4), i + 1.0))
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    batch = cv4ctrl.collate(samples, 3.25)
    assert batch["prompt_embeds"].shape == (len(lengths), max(lengths), 4) and batch["rows"] == list(range(len(lengths)))
    for i, n in enumerate(lengths):
        assert (batch["prompt_embeds"][i, :n] == i + 1).all() and not batch["prompt_embeds"][i, n:].any()
    assert (batch["mask"] is None) == (len(set(lengths)) == 1)
    torch.testing.assert_close(batch["sigma"], torch.full((len(lengths),), 3.25 / (3.25 + 1)))


def test_config_is_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().seed = 1
