"""EpochBatchSampler: coverage, determinism, constant length, padding waste, token budgets."""

from types import SimpleNamespace

import numpy as np
import pytest

from uc2.key_hash import hash_keys, uniform
from uc2.sampling import EpochBatchSampler, SetEpochCallback


class Lengths:
    """Captions of 8 to 30 tokens, twice that for every eleventh key, and 10 to 100 regions."""

    def __init__(self, count: int, constant: tuple[int, int] | None = None):
        self.count, self.constant = count, constant

    def __len__(self):
        return self.count

    def lengths(self, keys):
        if self.constant:
            return np.tile(self.constant, (len(keys), 1))
        regions = 10 + hash_keys(0, keys % self.count, 1) % np.uint64(91)  # belongs to the row
        text = 8 + hash_keys(0, keys, 2) % np.uint64(23)  # varies with the draw
        text = np.where(uniform(0, keys, 3) < 3 / 33, 2 * text, text)
        return np.stack([text, regions], axis=1).astype(np.int64)


def padded_and_real(dataset, batches) -> tuple[int, int]:
    lengths = [dataset.lengths(np.array(batch)) for batch in batches]
    padded = sum(len(part) * part.max(axis=0).sum() for part in lengths)
    return padded, sum(part.sum() for part in lengths)


OPTIONS = [
    {"batch_size": 8},
    {"batch_size": 8, "group_by_length": False},
    {"batch_size": 8, "shuffle": False},
    {"tokens_per_batch": 1500},
    {"tokens_per_batch": 1500, "group_by_length": False},
    {"tokens_per_batch": 1500, "multiple_of": 7},
    {"batch_size": 8, "multiple_of": 6},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_key_of_an_epoch_comes_once_and_the_length_is_exact(options):
    sampler = EpochBatchSampler(Lengths(1003), seed=1, **options)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and len(sampler) % options.get("multiple_of", 1) == 0
        keys = sorted(key for batch in batches for key in batch)
        assert keys == list(range(epoch * 1003, (epoch + 1) * 1003))
        assert all(type(key) is int for key in batches[0]) and all(batches)


@pytest.mark.parametrize("options", OPTIONS)
def test_order_depends_on_seed_and_epoch_alone(options):
    def batches(seed, epoch):
        sampler = EpochBatchSampler(Lengths(203), seed=seed, **options)
        sampler.set_epoch(epoch)
        return [[key % 203 for key in batch] for batch in sampler]

    assert batches(1, 3) == batches(1, 3)
    if options.get("shuffle", True):
        assert batches(1, 3) != batches(1, 4) and batches(1, 3) != batches(2, 3)


def test_iterating_again_or_setting_the_epoch_back_gives_the_same_batches():
    sampler = EpochBatchSampler(Lengths(203), seed=1, batch_size=8)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler) != second


@pytest.mark.parametrize("options", [{"batch_size": 32}, {"tokens_per_batch": 2400}])
@pytest.mark.parametrize("count", [4_000, 50_000])
def test_grouping_wastes_less_than_a_tenth(options, count):
    dataset = Lengths(count)
    padded, real = padded_and_real(dataset, EpochBatchSampler(dataset, seed=0, **options))
    assert 1 - real / padded < 0.10
    random_batches = EpochBatchSampler(dataset, seed=0, group_by_length=False, **options)
    padded, real = padded_and_real(dataset, random_batches)
    assert 1 - real / padded > 0.25  # what random batches waste


def test_budget_is_kept_and_used():
    dataset = Lengths(5000)
    batches = list(EpochBatchSampler(dataset, seed=0, tokens_per_batch=3000))
    sizes = [padded_and_real(dataset, [batch])[0] for batch in batches]
    assert max(sizes) <= 3000 and np.mean(sizes) > 0.85 * 3000


def test_budget_counts_the_padded_size_by_hand():
    dataset = Lengths(10, constant=(10, 20))
    sampler = EpochBatchSampler(dataset, seed=0, tokens_per_batch=90, shuffle=False)
    assert max(map(len, sampler)) == 3  # 3 * (10 + 20) = 90


def test_neighbouring_batches_are_spread_over_lengths():
    """Sorted batches in sorted order would make each update see one length, hence few objectives."""
    dataset = Lengths(20_000)
    batches = EpochBatchSampler(dataset, seed=0, batch_size=32)
    means = [dataset.lengths(np.array(batch))[:, 1].mean() for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_drop_last_gives_full_batches_in_the_multiple():
    sampler = EpochBatchSampler(Lengths(1003), seed=0, batch_size=8, multiple_of=4, drop_last=True)
    assert len(sampler) == 124 and {len(batch) for batch in sampler} == {8}


def test_epochs_have_equally_many_batches_though_their_lengths_differ():
    sampler = EpochBatchSampler(Lengths(300), seed=0, tokens_per_batch=800, multiple_of=2)
    for epoch in range(50):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)


def test_fewer_rows_than_batches_wanted():
    assert [len(b) for b in EpochBatchSampler(Lengths(5), seed=0, batch_size=4, multiple_of=4)] in (
        [1, 1, 1, 2], [1, 1, 2, 1], [1, 2, 1, 1], [2, 1, 1, 1],
    )  # fmt: skip
    with pytest.raises(ValueError, match="3 examples do not fill 4 batches"):
        EpochBatchSampler(Lengths(3), seed=0, batch_size=4, multiple_of=4)


def test_bad_options():
    with pytest.raises(ValueError, match="either batch_size or tokens_per_batch"):
        EpochBatchSampler(Lengths(9), seed=0)
    with pytest.raises(ValueError, match="tokens_per_batch is 20, but an example has 30 positions"):
        EpochBatchSampler(Lengths(9, constant=(10, 20)), seed=0, tokens_per_batch=20)


def test_accelerate_must_not_find_a_batch_size():
    assert not hasattr(EpochBatchSampler(Lengths(9), seed=0, batch_size=2), "batch_size")


def test_the_callback_tells_the_sampler_the_epoch():
    sampler = EpochBatchSampler(Lengths(9), seed=0, batch_size=2)
    for state_epoch, expected in ((None, 0), (1.0, 1), (2.7, 2)):
        SetEpochCallback(sampler).on_epoch_begin(None, SimpleNamespace(epoch=state_epoch), None)
        assert sampler.epoch == expected


def test_hashed_draws_are_uniform_and_independent_of_each_other():
    keys = np.arange(100_000)
    a, b, c = uniform(0, keys, 0), uniform(0, keys, 1), uniform(1, keys, 0)
    for draw in (a, b, c):
        counts = np.histogram(draw, bins=20, range=(0, 1))[0]
        assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-square with 19 degrees of freedom: p = 1e-4
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02 and abs(np.corrcoef(a, c)[0, 1]) < 0.02
    assert (uniform(0, keys[5:6], 0) == a[5]).all()  # one key or many: the same draw
    epochs = uniform(0, np.arange(10_000) * 29_000, 0)  # one row over epochs
    assert abs(epochs.mean() - 0.5) < 0.02


def test_ungrouped_updates_hold_the_same_examples_however_they_are_split():
    """Early Adaptation: 1 process x 8 images and 2 x 4."""
    options = {"seed": 3, "group_by_length": False, "drop_last": True}
    one = EpochBatchSampler(Lengths(101), batch_size=8, **options)
    two = EpochBatchSampler(Lengths(101), batch_size=4, multiple_of=2, **options)
    for epoch in range(2):
        one.set_epoch(epoch)
        two.set_epoch(epoch)
        halves = list(two)
        assert list(one) == [first + second for first, second in zip(halves[::2], halves[1::2], strict=True)]
        assert len(list(one)) == 12
