"""Masking rules against the paper's numbers (as proportions) and against hand-worked examples."""

import numpy as np
import pytest

from uc2.masking import co_mask_tokens, mask_regions, mask_tokens

MASK_ID = 999
VOCABULARY = np.arange(500, 900)  # disjoint from the ids of the captions: a random id is recognisable
TOKENS = {"mask_token_id": MASK_ID, "vocabulary": VOCABULARY}


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def kinds(original: np.ndarray, masked: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts of (mask, random, kept) among the predicted positions."""
    picked = labels != -100
    new = masked[picked]
    return np.array([(new == MASK_ID).sum(), np.isin(new, VOCABULARY).sum(), (new == original[picked]).sum()])


def assert_share(count: float, total: float, expected: float) -> None:
    """Within five standard deviations of a binomial count."""
    assert abs(count / total - expected) < 5 * np.sqrt(expected * (1 - expected) / total)


def test_mlm_masks_15_percent_as_80_10_10():
    ids, rng = np.arange(100), draw(0)
    counts = np.zeros(3)
    for _ in range(2000):
        counts += kinds(ids, *mask_tokens(ids, rng, **TOKENS))
    assert_share(counts.sum(), 200_000, 0.15)
    for count, expected in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert_share(count, counts.sum(), expected)


def test_mlm_labels_are_the_untouched_ids_and_nothing_else_changes():
    ids, rng = np.arange(30), draw(1)
    for _ in range(200):
        before = ids.copy()
        masked, labels = mask_tokens(ids, rng, **TOKENS)
        picked = labels != -100
        assert (ids == before).all()
        assert (labels[picked] == ids[picked]).all() and (masked[~picked] == ids[~picked]).all()


def test_mlm_predicts_at_least_one_token_each_equally_often():
    ids, rng = np.arange(3), draw(2)
    picked = np.zeros(3)
    for _ in range(3000):
        labels = mask_tokens(ids, rng, probability=0.0, **TOKENS)[1]
        assert (labels != -100).sum() == 1
        picked += labels != -100
    for count in picked:
        assert_share(count, 3000, 1 / 3)


def test_mlm_probability_one_predicts_everything():
    assert (mask_tokens(np.arange(5), draw(0), probability=1.0, **TOKENS)[1] == np.arange(5)).all()


def test_empty_caption_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        mask_tokens(np.arange(0), draw(0), **TOKENS)


# A hand-made pair: "two dogs play" / "zwei Hunde spielen", dogs = 2 sub-words, Hunde = 3, "play" not linked.
PIVOT, OTHER = np.array([10, 11, 12, 13]), np.array([20, 21, 22, 23, 24])
PIVOT_SPANS, OTHER_SPANS = [(0, 1), (1, 3), (3, 4)], [(0, 1), (1, 4), (4, 5)]
LINKS = [(0, 0), (1, 1)]
WORD_OF_PIVOT, WORD_OF_OTHER = np.array([0, 1, 1, 2]), np.array([0, 1, 1, 1, 2])


def co_mask(seed: int, mode: str, **options):
    pair = (PIVOT, OTHER, PIVOT_SPANS, OTHER_SPANS, LINKS)
    return co_mask_tokens(*pair, draw(seed), mode=mode, **TOKENS, **options)


@pytest.mark.parametrize("mode", ["random", "full"])
def test_co_masking_masks_linked_words_and_only_those(mode):
    for seed in range(500):
        masked, labels, other_masked, other_labels = co_mask(seed, mode, probability=0.4)
        words = set(WORD_OF_PIVOT[labels != -100].tolist())
        other_words = set(WORD_OF_OTHER[other_labels != -100].tolist())
        assert other_words == words & {0, 1}  # "play" is not linked: nothing opposite, "spielen" never
        for ids, new, target in ((PIVOT, masked, labels), (OTHER, other_masked, other_labels)):
            picked = target != -100
            assert (target[picked] == ids[picked]).all() and (new[~picked] == ids[~picked]).all()


def test_random_mode_masks_one_subword_of_the_linked_word_each_equally_often():
    picked, seen = np.zeros(5), 0
    for seed in range(6000):
        _, labels, _, other_labels = co_mask(seed, "random")
        linked = (labels[1:3] != -100).any()
        seen += linked
        assert (other_labels[1:4] != -100).sum() == int(linked)
        picked += other_labels != -100
    for count in picked[1:4]:
        assert_share(count, seen, 1 / 3)


def test_random_mode_masks_the_pivot_at_15_percent():
    pivot = np.arange(50)
    spans, rng = [(i, i + 1) for i in range(50)], draw(3)
    counts = np.zeros(3)
    for _ in range(2000):
        masked, labels, other, other_labels = co_mask_tokens(
            pivot, pivot, spans, spans, [(i, i) for i in range(50)], rng, mode="random", **TOKENS
        )
        counts += kinds(pivot, masked, labels)
        assert ((labels != -100) == (other_labels != -100)).all()
        # The aligned word is treated as its pivot word: masked, replaced or kept together.
        assert ((masked == MASK_ID) == (other == MASK_ID)).all()
        assert ((masked == pivot) == (other == pivot)).all()
    assert_share(counts.sum(), 100_000, 0.15)
    for count, expected in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert_share(count, counts.sum(), expected)


def test_full_mode_masks_all_subwords_of_both_words_alike():
    for seed in range(500):
        masked, labels, other_masked, other_labels = co_mask(seed, "full")
        picked, other_picked = labels != -100, other_labels != -100
        assert picked[1] == picked[2] == other_picked[1] == other_picked[2] == other_picked[3]
        treated = masked[1:3].tolist() + other_masked[1:4].tolist()
        assert sum(token == MASK_ID for token in treated) in (0, 5)


def test_mix_is_half_co_masking_and_half_plain_masking():
    """Only plain masking can predict "spielen", which has no link; at probability 1 it always does."""
    plain = sum(co_mask(seed, "mix", probability=1.0)[3][4] != -100 for seed in range(4000))
    assert_share(plain, 4000, 0.5)


def test_mix_masks_each_caption_at_15_percent_when_it_masks_plainly():
    pivot = np.arange(200)
    spans, rng, rates = [(i, i + 1) for i in range(200)], draw(4), []
    for _ in range(1000):
        _, labels, _, other_labels = co_mask_tokens(pivot, pivot, spans, spans, [], rng, mode="mix", **TOKENS)
        if (other_labels != -100).any():  # nothing is linked: this was plain masking
            rates.append(((labels != -100).sum(), (other_labels != -100).sum()))
    assert_share(len(rates), 1000, 0.5)
    for total in np.sum(rates, axis=0):
        assert_share(total, 200 * len(rates), 0.15)


def test_one_word_linked_to_two_masks_both_and_links_beyond_a_cut_caption_do_nothing():
    pivot, other = np.array([1]), np.array([2, 3])
    links = [(0, 0), (0, 1), (0, 7), (5, 0)]
    labels = co_mask_tokens(
        pivot, other, [(0, 1)], [(0, 1), (1, 2), (2, 2)], links + [(0, 2)], draw(0), mode="full", **TOKENS
    )[3]
    assert labels.tolist() == [2, 3]


def test_no_links_mask_nothing_opposite():
    masked, labels = co_mask_tokens(
        PIVOT, OTHER, PIVOT_SPANS, OTHER_SPANS, [], draw(0), mode="full", **TOKENS
    )[2:]
    assert (masked == OTHER).all() and (labels == -100).all()


def test_unknown_mode_lists_the_choices():
    with pytest.raises(ValueError, match="'half'.*random, full, mix"):
        co_mask(0, "half")


def test_regions_15_percent_of_which_90_percent_zeroed():
    features, rng = np.ones((40, 2), np.float16), draw(5)
    masked_count = zeroed_count = 0
    for _ in range(4000):
        masked, mask = mask_regions(features, rng)
        zeroed = (masked == 0).all(axis=1)
        assert mask[zeroed].all() and (masked[~zeroed] == 1).all()
        masked_count += mask.sum()
        zeroed_count += zeroed.sum()
    assert_share(masked_count, 160_000, 0.15)
    assert_share(zeroed_count, masked_count, 0.9)
    assert (features == 1).all()  # the store's own features stay untouched


def test_at_least_one_region_is_masked_each_equally_often():
    picked = np.zeros(4)
    for seed in range(4000):
        mask = mask_regions(np.ones((4, 1)), draw(seed), probability=0.0)[1]
        assert mask.sum() == 1
        picked += mask
    for count in picked:
        assert_share(count, 4000, 0.25)


def test_same_generator_state_same_masks():
    for function in (lambda rng: mask_tokens(np.arange(40), rng, **TOKENS), lambda rng: co_mask(7, "mix")):
        for a, b in zip(function(draw(6)), function(draw(6)), strict=True):
            assert (a == b).all()
