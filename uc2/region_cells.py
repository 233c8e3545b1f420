"""The base64 cells in which bottom-up-attention files keep arrays; VOLTA's databases hold the same cells."""

import base64
from dataclasses import replace
from typing import Any

import numpy as np

from uc2.region_records import NAMES, Record

# Bytes per box tell the number type; a feature or probability is a float32, however many there are per box.
_TYPES = {
    "boxes": {16: "<f4", 32: "<f8"},
    "class_ids": {8: "<i8", 4: "<i4"},
    "class_scores": {4: "<f4", 8: "<f8"},
}
_MATRICES = ("boxes", "features", "class_probs")
_VECTORS = ("class_ids", "class_scores")


def decode_cells(record: Record) -> Record:
    """The record with every text cell of an array replaced by the array, (num_boxes,) or (num_boxes, width).

    Values that are arrays already stay as they are.
    """
    values = dict(record.values)
    cells = {
        (ours, name): values[name]
        for ours in _MATRICES + _VECTORS
        for name in NAMES[ours]
        if isinstance(values.get(name), (str, bytes))
    }
    for (ours, name), cell in cells.items():
        values[name] = _decode(record, ours, cell, _count(record))
    return replace(record, values=values)


def _count(record: Record) -> int:
    text = record.values.get("num_boxes")
    try:
        count = int(text)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise record.fail("num_boxes", repr(text), "a positive whole number")
    return count


def _decode(record: Record, ours: str, cell: str | bytes, count: int) -> np.ndarray:
    try:
        content = base64.b64decode(cell, validate=True)
    except ValueError as error:
        raise record.fail(ours, f"malformed base64 ({error})", "a base64 array") from error
    dtype = _number_type(ours, len(content) / count)
    if dtype is None:
        sizes = " or ".join(map(str, _TYPES.get(ours, ["a multiple of 4"])))
        raise record.fail(ours, f"{len(content)} bytes for {count} boxes", f"{sizes} bytes per box")
    values = np.frombuffer(content, dtype)
    return values.reshape(count, -1) if ours in _MATRICES else values


def _number_type(ours: str, bytes_per_box: float) -> Any:
    if ours in _TYPES:
        return _TYPES[ours].get(bytes_per_box)
    return "<f4" if bytes_per_box and bytes_per_box % 4 == 0 else None
