"""Sample k is a pure function of (seed, k): ranks, threads and restarts only decide who asks for it."""

import itertools
import threading
from unittest import mock

import pytest
import torch

import cv4ctrl

CPU = torch.device("cpu")


@pytest.fixture()
def make(encoded, config, monkeypatch):
    """The stream as a rank sees it."""

    def run(rank=0, world=1, **options):
        monkeypatch.setattr(cv4ctrl, "RANK", rank)
        monkeypatch.setattr(cv4ctrl, "WORLD", world)
        return cv4ctrl.replace(encoded, config=config(world=world, **options))

    return run


def test_one_rank_and_two_see_bitwise_the_same_samples(make):
    """Three steps of two micro-batches a rank, past the end of an epoch of 44 rows; threads prepare them."""
    batches = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        stream = make(rank, world, total_batch_size=16, train_batch_size=8 // world, proportion_empty_prompts=0.3)
        batches.append(list(itertools.islice(stream.micro_batches(CPU, 2), 6)))
    assert [len(of_rank) for of_rank in batches] == [6, 6, 6]
    for one, *two in zip(*batches):
        for name in ("latents", "control", "noise", "timestep"):
            assert torch.equal(one[name], torch.cat([half[name] for half in two])), name
        prompts = zip(one["prompts"], two[0]["prompts"] + two[1]["prompts"], strict=True)
        assert len(one["prompts"]) == 8 and all(a.equal(b) for a, b in prompts)


def test_every_row_comes_once_an_epoch_in_another_order(make, encoded):
    epochs = [[make().row(k) for k in range(start, start + 44)] for start in (0, 44)]
    assert len(encoded.train) == 44 and set(epochs[0]) == set(epochs[1]) == set(encoded.train)
    assert epochs[0] != epochs[1] != encoded.train


def test_seed_and_k_decide_everything_and_nothing_else_does(make):
    def sample(k, **options):
        stream = make(**options)
        return stream.training_sample(k)

    first, again = sample(5), sample(5, train_batch_size=1, dataloader_num_workers=4, learning_rate=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    visit = next(k for k in itertools.count(44) if make().row(k) == make().row(5))  # a fresh posterior draw, too
    for other in (sample(5, seed=1), sample(6), sample(visit)):
        assert not any(torch.equal(first[name], other[name]) for name in ("latents", "control", "noise", "timestep"))


def test_timesteps_are_spread_evenly_and_each_is_uniform(make):
    for start in (0, 1000, 123456):
        t = torch.stack([make().training_sample(k)["timestep"] for k in range(start, start + 64)]).sort().values
        even = 1000 * (torch.arange(64) + 0.5) / 64
        assert (t - even).abs().max() < 1000 * 2.5 / 64  # random draws deviate about four times as much
    firsts = torch.stack([make(seed=n).training_sample(0)["timestep"] for n in range(1000)])
    assert abs(firsts.mean() - 500.5) < 4 * 289 / 1000**0.5 and firsts.min() < 10 and firsts.max() > 990


def test_captions_are_dropped_by_sample(make, encoded):
    streams = [make(proportion_empty_prompts=share) for share in (0, 0.3, 1)]
    never, some, always = ([stream.row(k).caption_key == encoded.empty_key for k in range(1000)] for stream in streams)
    assert not any(never) and all(always) and 250 < sum(some) < 350
    assert sum(0 < sum(some[k : k + 8]) < 8 for k in range(0, 1000, 8)) > 100  # of 125 batches of 8


def test_a_step_is_sorted_by_caption_length_and_each_caption_comes_without_padding(make, encoded):
    stream = make(train_batch_size=4, total_batch_size=20, proportion_empty_prompts=0.3)
    prompts = sorted((encoded.entry(stream.row(k).caption_key) for k in range(60, 80)), key=len)
    assert len(prompts[0]) < len(prompts[-1])
    dealt = [prompt for number in range(15, 20) for prompt in stream.micro_batch(CPU, number)["prompts"]]
    assert all(a.equal(b) for a, b in zip(dealt, prompts, strict=True))


def test_threads_make_micro_batches_ahead_and_end_with_the_stream(make):
    stream, barrier = make(dataloader_num_workers=3), threading.Barrier(3, timeout=60)  # opens when three threads wait
    ahead = mock.Mock(side_effect=lambda device, number: barrier.wait() * 0 + number)
    before = threading.active_count()
    with mock.patch.object(cv4ctrl.Stream, "micro_batch", ahead):
        batches = stream.micro_batches(CPU, 5)
        assert list(itertools.islice(batches, 6)) == [*range(5, 11)]
        barrier.abort()
        batches.close()
    assert threading.active_count() == before and ahead.call_count <= 9
