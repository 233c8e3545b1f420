"""Image-text retrieval: Recall@k both ways, AR, Meta-Ave, and search (UC2, section 4.1.1 and Table 1).

The metrics are pure functions of a score matrix; `uc2.scoring.score_matrix` computes that matrix.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from uc2.scoring import score_matrix

__all__ = [
    "SearchHit",
    "average_metrics",
    "fold_indices",
    "meta_average",
    "recall_at_k",
    "score_matrix",
    "search",
    "search_captions",
]


def recall_at_k(
    scores: np.ndarray, text_to_image: Sequence[int] | np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k of both retrieval directions, in per cent, and their mean (the paper's AR).

    A text hits if its image is among the k best images. An image hits if *any* of its texts is among the k
    best texts; images without a text are candidates only and have no image-to-text recall of their own. Equal
    scores count in expectation over all orders of the tied candidates, so that a constant scorer gets exactly
    chance.

    Args:
        scores: (num_texts, num_images), higher is better.
        text_to_image: (num_texts,) index of the image of each text.
        ks: the cut-offs.
    Returns:
        `text_to_image_r{k}`, `image_to_text_r{k}` for every k, and `average_recall`, the mean of all of them.
    Raises:
        ValueError: if a score is NaN, the shapes do not fit, an index is no image, or a k is below 1.
    """
    scores, text_to_image = np.asarray(scores), np.asarray(text_to_image)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    _check_scores(scores, text_to_image, ks)
    num_texts, num_images = scores.shape
    own = scores[np.arange(num_texts), text_to_image]  # (num_texts,)
    better_images = (scores > own[:, None]).sum(1)
    tied_images = (scores == own[:, None]).sum(1)  # includes the right one

    best = np.full(num_images, -np.inf, scores.dtype)  # score of each image's best text
    np.maximum.at(best, text_to_image, own)
    better_texts = (scores > best).sum(0)
    tied_texts = (scores == best).sum(0)
    own_tied_texts = np.bincount(text_to_image[own == best[text_to_image]], minlength=num_images)
    has_text = np.bincount(text_to_image, minlength=num_images) > 0

    metrics = {}
    for k in ks:
        one_each = np.ones(num_texts, np.int64)
        metrics[f"text_to_image_r{k}"] = _hit_probability(better_images, tied_images, one_each, k).mean()
    for k in ks:
        hits = _hit_probability(better_texts[has_text], tied_texts[has_text], own_tied_texts[has_text], k)
        metrics[f"image_to_text_r{k}"] = hits.mean()
    metrics = {name: 100.0 * float(value) for name, value in metrics.items()}
    metrics["average_recall"] = float(np.mean(list(metrics.values())))
    return metrics


def _check_scores(scores: np.ndarray, text_to_image: np.ndarray, ks: Sequence[int]) -> None:
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(
            f"scores must be a non-empty (num_texts, num_images) matrix, found shape {scores.shape}"
        )
    if text_to_image.shape != scores.shape[:1]:
        raise ValueError(f"text_to_image must have shape {scores.shape[:1]}, found {text_to_image.shape}")
    if not np.issubdtype(text_to_image.dtype, np.integer):
        raise ValueError(f"text_to_image must hold integers, found {text_to_image.dtype}")
    if text_to_image.min() < 0 or text_to_image.max() >= scores.shape[1]:
        raise ValueError(f"text_to_image must be in 0..{scores.shape[1] - 1}, found {text_to_image.min()}"
                         f"..{text_to_image.max()}")  # fmt: skip
    if np.isnan(scores).any():
        text, image = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"the score of text {text} and image {image} is NaN")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive, found {tuple(ks)}")


def _hit_probability(better: np.ndarray, tied: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """P(at least one of `own` right candidates is in the top k), ties in random order; all arrays (n,).

    `better` wrong candidates come first; then `tied` candidates, `own` of them right, fill the places left.
    Missing all of them is the hypergeometric C(tied - own, places) / C(tied, places), a product of k factors.
    """
    places = np.clip(k - better, 0, tied)
    miss = np.ones(len(better))
    for drawn in range(min(k, int(places.max(initial=0)))):
        factor = (tied - own - drawn) / np.maximum(tied - drawn, 1)
        miss = np.where(drawn < places, miss * np.maximum(factor, 0.0), miss)
    return 1.0 - miss


def fold_indices(
    text_to_image: Sequence[int] | np.ndarray, num_images: int, folds: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split a test set into equal consecutive folds of images (COCO "1K": 5,000 images in 5 folds).

    Returns `(text indices, image indices)` per fold. Recall is computed within each fold and averaged.
    """
    text_to_image = np.asarray(text_to_image)
    if folds < 1 or num_images % folds:
        raise ValueError(f"{num_images} images cannot be split into {folds} equal folds")
    size = num_images // folds
    return [
        (np.flatnonzero(text_to_image // size == fold), np.arange(fold * size, (fold + 1) * size))
        for fold in range(folds)
    ]


def average_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over folds that all have the same metrics."""
    if not metrics:
        raise ValueError("there are no metrics to average")
    return {name: float(np.mean([fold[name] for fold in metrics])) for name in metrics[0]}


def meta_average(average_recalls: Iterable[float] | Mapping[str, float]) -> float:
    """Meta-Ave: the mean of the average recalls over languages and data sets (paper 4.1.1).

    Takes the numbers, or a mapping to them (nested ones included: data set -> language -> AR).
    """
    values = list(_numbers(average_recalls))
    if not values:
        raise ValueError("there are no average recalls to average")
    return float(np.mean(values))


def _numbers(nested):
    for value in nested.values() if isinstance(nested, Mapping) else nested:
        if isinstance(value, Mapping):
            yield from _numbers(value)
        else:
            yield float(value)


class SearchHit(NamedTuple):
    """One search result: the image's id or the caption, the raw score, and its sigmoid."""

    item: str
    score: float
    probability: float


def search(
    model, processor, query: str, region_store: Mapping, top_k: int = 10, **options
) -> list[SearchHit]:
    """The `top_k` images of `region_store` that best fit a text in any language, best first.

    `options` go to `score_matrix` (precision, batch_tokens, progress, …).
    """
    image_ids = list(region_store)
    regions = [region_store[image_id] for image_id in image_ids]
    scores = score_matrix(model, [query], regions, processor, **options)
    return _top(image_ids, scores[0], top_k)


def search_captions(
    model, processor, regions, captions: Sequence[str], top_k: int = 10, **options
) -> list[SearchHit]:
    """The `top_k` of `captions` that best fit one image, best first.

    Args:
        regions: the image's region row; or the picture itself, if the processor has a region detector attached.
        options: as for `search`.
    """
    if isinstance(regions, Image.Image):
        found = processor(images=regions, return_tensors="np")
        regions = {"features": found["region_features"][0], "normalized_boxes": found["region_boxes"][0]}
    scores = score_matrix(model, list(captions), [regions], processor, **options)
    return _top(captions, scores[:, 0], top_k)


def _top(items: Sequence[str], scores: np.ndarray, top_k: int) -> list[SearchHit]:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, found {top_k}")
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [SearchHit(items[i], float(scores[i]), float(1 / (1 + np.exp(-float(scores[i]))))) for i in order]
