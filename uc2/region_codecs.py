"""How a store keeps the numbers of a region: in float16, or smaller at a cost in accuracy (docs/scale.md).

A codec turns n rows of `width` float16 numbers into n rows of `columns` elements of `dtype`, and back. A store
names its codecs in `store.json`, unless they are `Float16`:

    "encodings": {"features": {"name": "pq", "file": "codebook.npy"}, "class_probs": {"name": "top", "count": 20}}
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from uc2.data_error import DataError, Found

CODEBOOK = "codebook.npy"
CENTROIDS = 256  # of a group: a code is one byte


@dataclass(frozen=True)
class Float16:
    """As they are: reading is a view of the file."""

    width: int
    dtype = "<f2"

    @property
    def columns(self) -> int:
        return self.width

    def encode(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, self.dtype)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        return rows


@dataclass(frozen=True)
class Int8:
    """256 evenly spaced steps from a region's least to its largest number, which are kept in float32 before them."""

    width: int
    dtype = "u1"

    @property
    def columns(self) -> int:
        return 8 + self.width

    def encode(self, values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        least, most = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
        steps = np.rint((values - least) / np.maximum(most - least, np.finfo(np.float32).tiny) * 255)
        bounds = np.concatenate([least, most], axis=1).astype("<f4")
        return np.concatenate([bounds.view(np.uint8), steps.astype(np.uint8)], axis=1)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        bounds = np.ascontiguousarray(rows[:, :8]).view("<f4")
        least, most = bounds[:, :1], bounds[:, 1:]
        return (least + rows[:, 8:] * ((most - least) / np.float32(255))).astype(np.float16)


@dataclass(frozen=True, eq=False)
class ProductQuantised:
    """A byte per group of neighbouring numbers: the nearest of the group's centroids (Jégou et al., 2011).

    Args:
        codebook: (groups, 256, width / groups) float16.
    """

    codebook: np.ndarray
    dtype = "u1"

    @property
    def width(self) -> int:
        return self.codebook.shape[0] * self.codebook.shape[2]

    @property
    def columns(self) -> int:
        return len(self.codebook)

    @cached_property
    def _centroids(self) -> tuple[np.ndarray, np.ndarray]:
        """(groups, width / groups, 256) and the halves of their squared lengths (groups, 1, 256), float32."""
        centroids = self.codebook.astype(np.float32).transpose(0, 2, 1)
        return centroids, (centroids**2).sum(axis=1, keepdims=True) / 2

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.arange(self.columns) * CENTROIDS

    def encode(self, values: np.ndarray) -> np.ndarray:
        centroids, half_lengths = self._centroids
        parts = values.astype(np.float32).reshape(len(values), self.columns, -1).transpose(1, 0, 2)
        return (parts @ centroids - half_lengths).argmax(axis=2).T.astype(np.uint8)  # the nearest

    def decode(self, rows: np.ndarray) -> np.ndarray:
        centroids = self.codebook.reshape(-1, self.codebook.shape[2])
        return centroids[rows + self._offsets].reshape(len(rows), self.width)


@dataclass(frozen=True)
class TopClasses:
    """The `count` largest of a region's `width` probabilities: class numbers, then values; the others become 0."""

    width: int
    count: int
    dtype = "<u2"

    @property
    def columns(self) -> int:
        return 2 * self.count

    def encode(self, values: np.ndarray) -> np.ndarray:
        ids = np.argsort(-values.astype(np.float32), axis=1, kind="stable")[:, : self.count]
        kept = np.take_along_axis(values, ids, axis=1)
        return np.concatenate([ids.astype("<u2"), np.ascontiguousarray(kept, "<f2").view("<u2")], axis=1)

    def decode(self, rows: np.ndarray) -> np.ndarray:
        values = np.zeros((len(rows), self.width), np.float16)
        if (rows[:, : self.count] >= self.width).any():
            found = Found(f"class {rows[:, : self.count].max()}")
            raise DataError(field="class_probs", found=found, expected=f"class numbers below {self.width}")
        kept = np.ascontiguousarray(rows[:, self.count :]).view("<f2")
        np.put_along_axis(values, rows[:, : self.count].astype(np.int64), kept, axis=1)
        return values


Codec = Float16 | Int8 | ProductQuantised | TopClasses


def describe_codec(codec: Codec) -> dict[str, Any]:
    """What `store.json` says about a codec other than `Float16`."""
    if isinstance(codec, Int8):
        return {"name": "int8"}
    if isinstance(codec, ProductQuantised):
        return {"name": "pq", "file": CODEBOOK}
    return {"name": "top", "count": codec.count}


def codec_of(manifest: dict, field: str, directory: Path) -> Codec:
    """The codec of `features` or `class_probs` in the store `directory`.

    Raises:
        DataError: a codec that is not known here, or a codebook that is not there or does not fit.
    """
    width = manifest["feature_size" if field == "features" else "num_classes"]
    encodings = manifest.get("encodings", {})
    match encodings.get(field) if isinstance(encodings, dict) else encodings:
        case None:
            return Float16(width)
        case {"name": "int8"}:
            return Int8(width)
        case {"name": "pq"}:
            return ProductQuantised(read_codebook(directory / CODEBOOK, width))
        case {"name": "top", "count": int(count)} if 0 < count <= width < 2**16:
            return TopClasses(width, count)
        case other:
            expected = '{"name": "int8"}, {"name": "pq"} or {"name": "top", "count": …}'
            raise DataError(file=directory / "store.json", field=f"encodings.{field}", found=other, expected=expected)


def read_codebook(file: Path, width: int) -> np.ndarray:
    """(groups, 256, width / groups) float16."""
    try:
        codebook = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(file=file, found=Found(str(error)), expected="a codebook") from error
    shape = codebook.shape
    if len(shape) != 3 or shape[1] != CENTROIDS or shape[0] * shape[2] != width or not np.isfinite(codebook).all():
        found = Found(f"numbers of shape {shape}")
        raise DataError(file=file, found=found, expected=f"finite ones of (groups, {CENTROIDS}, {width} / groups)")
    return codebook.astype(np.float16, copy=False)
