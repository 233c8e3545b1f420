"""The regions of one image, and what must hold for them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from uc2.data_error import DataError, Found


@dataclass(frozen=True, slots=True)
class RegionRow:
    """The regions of one image: n of them, features F wide, K object classes (without background).

    Boxes are x1, y1, x2, y2 in pixels. An image of unknown size is 1 x 1, its boxes lie in [0, 1].
    """

    image_id: str
    image_height: int
    image_width: int
    boxes: np.ndarray  # (n, 4) float32
    features: np.ndarray  # (n, F) float16
    class_ids: np.ndarray  # (n,) int64
    class_scores: np.ndarray  # (n,) float32, falling: the probability of that class
    class_probs: np.ndarray | None = None  # (n, K) float16

    @property
    def normalized_boxes(self) -> np.ndarray:
        """(n, 4) float32 in [0, 1], what the location embedding reads (paper 3.2)."""
        width, height = self.image_width, self.image_height
        return self.boxes / np.array([width, height, width, height], np.float32)


def tidy_region_row(row: RegionRow, *, file=None, number: int | None = None) -> RegionRow:
    """The row as a store holds it: its number types, falling scores, slightly overshooting boxes clipped.

    Raises:
        DataError: the row does not fit `RegionRow` all the same; `file` and `number` tell where it is.
    """
    fail = _failure(row, file, number)
    _check_image(row, fail)
    try:
        # A number beyond a type's range becomes infinite, which check_region_row reports with its row.
        with np.errstate(over="ignore"):
            arrays = {
                "boxes": _numbers(row.boxes, np.float32),
                "features": _numbers(row.features, np.float16),
                "class_ids": np.asarray(row.class_ids),
                "class_scores": _numbers(row.class_scores, np.float32),
                "class_probs": None if row.class_probs is None else _numbers(row.class_probs, np.float16),
            }
    except (TypeError, ValueError) as error:
        raise fail(
            "boxes", f"values that are not numbers ({error})", "numbers, equally many per box"
        ) from error
    row = replace(row, **arrays)
    _check_shapes(row, fail)
    if row.class_ids.dtype.kind not in "iu":
        raise fail("class_ids", f"numbers of type {row.class_ids.dtype}", "whole numbers")
    row = _sorted(row)
    boxes = _clip_overshoot(row.boxes, row.image_height, row.image_width)
    row = replace(row, boxes=boxes, class_ids=row.class_ids.astype(np.int64))
    check_region_row(row, file=file, number=number)
    return row


def _numbers(values, dtype: type) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind == "c":  # numpy would drop the imaginary parts
        raise TypeError(f"values of type {array.dtype}")
    return array.astype(dtype, copy=False)


def _sorted(row: RegionRow) -> RegionRow:
    if not (row.class_scores[1:] > row.class_scores[:-1]).any():
        return row
    order = np.argsort(-row.class_scores, kind="stable")
    fields = ("boxes", "features", "class_ids", "class_scores", "class_probs")
    arrays = {field: getattr(row, field) for field in fields}
    return replace(row, **{field: array[order] for field, array in arrays.items() if array is not None})


def _clip_overshoot(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Detectors place edges up to a pixel outside; that (1 % of a tiny image) is moved onto the border."""
    size = np.asarray((width, height) * 2, np.float32)
    slack = np.minimum(1.0, 0.01 * size)
    clipped = np.clip(boxes, 0.0, size)
    return np.where(np.abs(boxes - clipped) <= slack, clipped, boxes)


def check_region_row(row: RegionRow, *, file=None, number: int | None = None) -> None:
    """DataError unless every value is as `RegionRow` says; `file` and `number` tell where the row is."""
    fail = _failure(row, file, number)
    _check_image(row, fail)
    _check_shapes(row, fail)
    _check_boxes(row, fail)
    _check_classes(row, fail)
    if not _all_finite(row.features):
        region = int(np.flatnonzero(~np.isfinite(row.features).all(axis=1))[0])
        raise fail("features", f"NaN or infinity in region {region}", "finite numbers within float16")


def _failure(row: RegionRow, file, number: int | None) -> Callable[[str, str, str], DataError]:
    def fail(field: str, found: str, expected: str) -> DataError:
        found = Found(f"{found} (image {row.image_id!r})")
        return DataError(file=file, row=number, field=field, found=found, expected=expected)

    return fail


def _check_image(row: RegionRow, fail) -> None:
    if not isinstance(row.image_id, str) or not row.image_id:
        raise fail("image_id", repr(row.image_id), "a non-empty string")
    for field in ("image_height", "image_width"):
        size = getattr(row, field)
        if not isinstance(size, (int, np.integer)) or not 0 < size < 2**31:
            raise fail(field, repr(size), "a positive whole number of pixels")


def _check_shapes(row: RegionRow, fail) -> None:
    count = len(row.boxes) if row.boxes.ndim else 0
    if count == 0:
        raise fail("boxes", "no box", "at least one")
    if row.boxes.shape != (count, 4):
        raise fail("boxes", f"shape {row.boxes.shape}", "four numbers x1, y1, x2, y2 per box")
    for field, dimensions in (("class_ids", 1), ("class_scores", 1), ("features", 2), ("class_probs", 2)):
        array = getattr(row, field)
        if array is not None and (array.ndim != dimensions or len(array) != count or array.size == 0):
            wanted = f"({count},)" if dimensions == 1 else f"({count}, width)"
            raise fail(field, f"shape {array.shape}", f"shape {wanted} for {count} boxes")


def _check_boxes(row: RegionRow, fail) -> None:
    x1, y1, x2, y2 = row.boxes.T
    # Written so that NaN fails too.
    good = (x1 >= 0) & (y1 >= 0) & (x2 > x1) & (y2 > y1) & (x2 <= row.image_width) & (y2 <= row.image_height)
    if not good.all():
        region = int(np.flatnonzero(~good)[0])
        box = ", ".join(f"{number:g}" for number in row.boxes[region])
        raise fail(
            f"boxes[{region}]",
            f"[{box}]",
            f"0 <= x1 < x2 <= {row.image_width} and 0 <= y1 < y2 <= {row.image_height} (pixels)",
        )


def _check_classes(row: RegionRow, fail) -> None:
    scores, ids, probs = row.class_scores, row.class_ids, row.class_probs
    if not ((scores >= 0) & (scores <= 1.001)).all():
        raise fail(
            "class_scores", f"numbers from {scores.min():g} to {scores.max():g}", "probabilities in [0, 1]"
        )
    if (scores[1:] > scores[:-1]).any():
        region = int(np.flatnonzero(scores[1:] > scores[:-1])[0])
        raise fail("class_scores", f"{scores[region]:g} before {scores[region + 1]:g}", "falling scores")
    limit = np.iinfo(np.int32).max if probs is None else probs.shape[1]
    if ids.min() < 0 or ids.max() >= limit:
        raise fail(
            "class_ids", f"numbers from {ids.min()} to {ids.max()}", f"class numbers from 0 to {limit - 1}"
        )
    if probs is not None and not (_all_finite(probs) and (probs >= 0).all() and (probs <= 1.001).all()):
        raise fail("class_probs", "numbers outside [0, 1] or NaN", "probabilities in [0, 1]")


def _all_finite(values: np.ndarray) -> bool:
    """np.isfinite converts float16 one by one; testing for an exponent of all ones is fast."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return not (((values.view(np.uint16) & 0x7C00) == 0x7C00).any())
