"""From other projects' region records to `RegionRow`: their names, their class numbering, their units."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uc2.data_error import DataError, Found
from uc2.region_rows import RegionRow, tidy_region_row

# Our field -> the names other projects give it. All number the classes without background, except
# `soft_labels` (UNITER) and a `cls_prob` (VOLTA) of 1,601 columns, which start with it.
NAMES = {
    "features": ("features", "x"),
    "boxes": ("boxes", "bbox"),
    "normalized_boxes": ("norm_bb",),
    "image_height": ("image_height", "img_h", "image_h"),
    "image_width": ("image_width", "img_w", "image_w"),
    "class_ids": ("class_ids", "objects_id", "obj_id"),
    "class_scores": ("class_scores", "objects_conf", "obj_conf", "conf"),
    "class_probs": ("class_probs", "cls_prob"),
    "class_probs_after_background": ("soft_labels",),
}
_WITH_BACKGROUND = 1601


@dataclass(frozen=True)
class RecordOptions:
    """What records leave open.

    Args:
        image_sizes: image id -> (height, width), for records without sizes. An image of unknown size whose
            boxes are normalised is stored as 1 x 1, so that its normalised boxes are right.
        no_classes: accept records without object classes: every region gets class 0 with score 1. That serves
            retrieval and VQA; region classes must then not be trained on (MRTM, MRC, Early Adaptation).
        image_id_pattern: what of a record's key is the image id: the first group of this expression.
    """

    image_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    no_classes: bool = False
    image_id_pattern: str = r"(.+?)(?:\.npz)?"


@dataclass(frozen=True)
class Record:
    """One image as another project stored it; `number` is its row in `file`, from 1."""

    key: str
    values: Mapping[str, Any]
    file: str
    number: int

    def get(self, ours: str) -> Any:
        return next((self.values[name] for name in NAMES[ours] if self.values.get(name) is not None), None)

    def require(self, ours: str) -> Any:
        value = self.get(ours)
        if value is None:
            expected = f"the regions' {ours} under one of the names {', '.join(NAMES[ours])}"
            raise self.fail(ours, f"only {', '.join(map(str, self.values)) or 'nothing'}", expected)
        return value

    def fail(self, ours: str, found: str, expected: str) -> DataError:
        found = Found(f"{found} (image {self.key!r})")
        return DataError(file=self.file, row=self.number, field=ours, found=found, expected=expected)


LazyRecord = Callable[[], Record]
"""What readers give for an image: a restart passes over those that are done without decoding them."""


def row_from_record(record: Record, options: RecordOptions) -> RegionRow:
    """The checked row of a record.

    Raises:
        DataError: something is missing, or the row does not fit `RegionRow`.
    """
    image_id = _image_id(record, options)
    height, width = _image_size(record, image_id, options)
    class_ids, class_scores, class_probs = _classes(record, options)
    row = RegionRow(
        image_id=image_id,
        image_height=height,
        image_width=width,
        boxes=_boxes(record, height, width),
        features=record.require("features"),
        class_ids=class_ids,
        class_scores=class_scores,
        class_probs=class_probs,
    )
    return tidy_region_row(row, file=record.file, number=record.number)


def _image_id(record: Record, options: RecordOptions) -> str:
    match = re.fullmatch(options.image_id_pattern, record.key)
    if not match or not match[1]:
        raise record.fail("image_id", repr(record.key), f"an id that fits {options.image_id_pattern!r}")
    return match[1]


def _image_size(record: Record, image_id: str, options: RecordOptions) -> tuple[int, int]:
    if record.get("image_height") is None and image_id in options.image_sizes:
        return options.image_sizes[image_id]
    if record.get("image_height") is None and record.get("normalized_boxes") is not None:
        return 1, 1
    try:
        return int(record.require("image_height")), int(record.require("image_width"))
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise record.fail("image_height", str(error), "the image's size in pixels") from error


def _boxes(record: Record, height: int, width: int) -> np.ndarray:
    if record.get("boxes") is not None:
        return _matrix(record, "boxes", (4,))
    # UNITER: x1, y1, x2, y2, width, height (and in some files the area), relative to the image.
    normalized = _matrix(record, "normalized_boxes", (4, 6, 7))
    return normalized[:, :4].astype(np.float32) * np.array([width, height, width, height], np.float32)


def _classes(record: Record, options: RecordOptions) -> tuple[Any, Any, np.ndarray | None]:
    """Class ids and scores as given, or else those of the likeliest object; and the probabilities, if any."""
    probs = _class_probs(record)
    ids, scores = record.get("class_ids"), record.get("class_scores")
    if options.no_classes and ids is None and probs is None:
        count = len(record.require("features"))
        return np.zeros(count, np.int64), np.ones(count, np.float32) if scores is None else scores, None
    if probs is not None and ids is None:
        ids = probs.argmax(axis=1)
        scores = probs.max(axis=1) if scores is None else scores
    if ids is None or scores is None:
        expected = "object classes and scores (or the option no_classes, for retrieval and VQA only)"
        raise record.fail("class_ids", f"only {', '.join(map(str, record.values))}", expected)
    return ids, scores, probs


def _class_probs(record: Record) -> np.ndarray | None:
    if record.get("class_probs_after_background") is not None:
        return _matrix(record, "class_probs_after_background")[:, 1:]
    if record.get("class_probs") is None:
        return None
    probs = _matrix(record, "class_probs")
    return probs[:, 1:] if probs.shape[1] == _WITH_BACKGROUND else probs


def _matrix(record: Record, ours: str, widths: tuple[int, ...] | None = None) -> np.ndarray:
    values = np.asarray(record.require(ours))
    if values.ndim != 2 or values.dtype.kind not in "fiu" or (widths and values.shape[1] not in widths):
        columns = " or ".join(map(str, widths)) if widths else "some"
        raise record.fail(ours, f"shape {values.shape}", f"numbers in {columns} columns, a row per region")
    return values
