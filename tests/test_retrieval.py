"""Recall@k, AR and Meta-Ave against hand-worked matrices and brute force over tie-breaks."""

import itertools

import numpy as np
import pytest

from uc2.retrieval import average_metrics, fold_indices, meta_average, recall_at_k


def expected_recall(scores, text_to_image, k):
    """Both recalls by enumerating every permutation of the candidates and sorting stably."""
    num_texts, num_images = scores.shape

    def hit_rate(column, right):
        hits = [
            any(candidate in right for candidate in sorted(order, key=lambda c: -column[c])[:k])
            for order in itertools.permutations(range(len(column)))
        ]
        return np.mean(hits)

    text_to = np.mean([hit_rate(scores[t], {text_to_image[t]}) for t in range(num_texts)])
    own = [{t for t in range(num_texts) if text_to_image[t] == i} for i in range(num_images)]
    image_to = np.mean([hit_rate(scores[:, i], own[i]) for i in range(num_images) if own[i]])
    return 100 * text_to, 100 * image_to


@pytest.mark.parametrize("seed", range(6))
def test_ties_equal_the_mean_over_all_orders(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (6, 4)).astype(np.float32)  # three values: many ties
    text_to_image = rng.integers(0, 4, 6)
    metrics = recall_at_k(scores, text_to_image, ks=(1, 2, 3))
    for k in (1, 2, 3):
        text_to, image_to = expected_recall(scores, text_to_image, k)
        assert metrics[f"text_to_image_r{k}"] == pytest.approx(text_to)
        assert metrics[f"image_to_text_r{k}"] == pytest.approx(image_to)


def test_random_tie_breaks_converge_to_the_expectation():
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(40, 8)), 1)
    text_to_image = np.repeat(np.arange(8), 5)
    text_hits, image_hits = [], []
    for _ in range(2000):
        noisy = scores + rng.uniform(0, 1e-6, scores.shape)
        text_hits.append((np.argsort(-noisy, 1)[:, :3] == text_to_image[:, None]).any(1).mean())
        image_hits.append((text_to_image[np.argsort(-noisy, 0)[:3]] == np.arange(8)).any(0).mean())
    metrics = recall_at_k(scores, text_to_image, ks=(3,))
    assert metrics["text_to_image_r3"] == pytest.approx(100 * np.mean(text_hits), abs=0.5)
    assert metrics["image_to_text_r3"] == pytest.approx(100 * np.mean(image_hits), abs=0.5)


def test_hand_worked_matrix():
    scores = np.array(
        [
            [0.9, 0.1, 0.2],  # image 0: rank 1
            [0.3, 0.8, 0.7],  # image 0: rank 3
            [0.1, 0.4, 0.5],  # image 1: rank 2
            [0.6, 0.2, 0.3],  # image 2: rank 2
        ]
    )
    metrics = recall_at_k(scores, [0, 0, 1, 2], ks=(1, 2))
    assert metrics["text_to_image_r1"] == 25.0
    assert metrics["text_to_image_r2"] == 75.0
    # Columns: image 0 ranks its text 0 first; image 1's text is second; image 2's text is third.
    assert metrics["image_to_text_r1"] == pytest.approx(100 / 3)
    assert metrics["image_to_text_r2"] == pytest.approx(200 / 3)
    assert metrics["average_recall"] == pytest.approx((25 + 75 + 100 / 3 + 200 / 3) / 4)


def test_perfect_scores():
    metrics = recall_at_k(np.eye(20), np.arange(20))
    assert list(metrics) == [
        "text_to_image_r1", "text_to_image_r5", "text_to_image_r10",
        "image_to_text_r1", "image_to_text_r5", "image_to_text_r10", "average_recall",
    ]  # fmt: skip
    assert set(metrics.values()) == {100.0}


def test_a_constant_scorer_gets_chance():
    metrics = recall_at_k(np.zeros((100, 20)), np.repeat(np.arange(20), 5))
    for k in (1, 5, 10):
        assert metrics[f"text_to_image_r{k}"] == pytest.approx(100 * k / 20)
    assert metrics["image_to_text_r1"] == pytest.approx(5.0)
    miss = np.prod([(95 - j) / (100 - j) for j in range(10)])  # none of 5 among 10 of 100
    assert metrics["image_to_text_r10"] == pytest.approx(100 * (1 - miss))


def test_k_larger_than_the_candidates_always_hits():
    metrics = recall_at_k(np.random.default_rng(0).normal(size=(4, 3)), [0, 1, 2, 2], ks=(50,))
    assert metrics["text_to_image_r50"] == metrics["image_to_text_r50"] == 100.0


def test_images_without_texts_are_only_candidates():
    metrics = recall_at_k(np.array([[1, 2, 0], [0, 2, 1]]), [0, 1], ks=(1,))
    assert metrics["text_to_image_r1"] == 50.0
    assert metrics["image_to_text_r1"] == pytest.approx(75.0)  # image 1 ties its text with another's


@pytest.mark.parametrize(
    ("scores", "text_to_image", "ks", "message"),
    [
        ([[1.0, np.nan]], [0], (1,), "text 0 and image 1 is NaN"),
        ([[1.0, 2.0]], [2], (1,), "must be in 0..1"),
        ([[1.0, 2.0]], [-1], (1,), "must be in 0..1"),
        ([[1.0, 2.0]], [0, 1], (1,), "must have shape"),
        ([[1.0, 2.0]], [0.0], (1,), "must hold integers"),
        ([1.0, 2.0], [0], (1,), "non-empty"),
        ([[1.0, 2.0]], [0], (0,), "must be positive"),
    ],
)
def test_bad_input_is_an_error(scores, text_to_image, ks, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(np.array(scores), text_to_image, ks)


def test_folds_are_consecutive_and_averaged():
    text_to_image = np.repeat(np.arange(6), 2)
    folds = fold_indices(text_to_image, 6, 3)
    assert [list(images) for _, images in folds] == [[0, 1], [2, 3], [4, 5]]
    assert [list(texts) for texts, _ in folds] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert average_metrics([{"a": 1.0}, {"a": 4.0}]) == {"a": 2.5}
    with pytest.raises(ValueError, match="cannot be split"):
        fold_indices(text_to_image, 6, 4)


def test_meta_average_over_numbers_and_nested_results():
    assert meta_average([50.0, 70.0]) == 60.0
    assert meta_average({"flickr": {"en": 90.0, "de": 60.0}, "coco": {"en": 30.0}}) == 60.0
    with pytest.raises(ValueError, match="no average recalls"):
        meta_average({})
