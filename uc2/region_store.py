"""The region store: image id -> detected regions, memory-mapped, read without copying the features.

On disk a store is a directory of Arrow shards and a `store.json` that lists them. `boxes` are sorted by falling class
score, so that selecting regions (the paper's preprocessing keeps scores above 0.2, at least 10, at most 100) is a slice.
Features stay float16 from the file to the device.

    python -m uc2.region_store PATH        # checks every value of a store and prints a summary
"""

import argparse
import bisect
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from uc2.rows import DataError, Found, arrow_batches

logger = logging.getLogger(__name__)

_ROWS_PER_BATCH = 128  # rows held in memory while writing: 50 MB at 100 regions of 2,048 float16 numbers
_MANIFEST = "store.json"
_SCHEMA = pa.schema(
    {
        "image_id": pa.string(),
        "image_height": pa.int32(),
        "image_width": pa.int32(),
        "boxes": pa.list_(pa.list_(pa.float32(), 4)),
        "features": pa.large_binary(),
        "class_ids": pa.list_(pa.int32()),
        "class_scores": pa.list_(pa.float32()),
    }
)
_CLASS_PROBS = pa.field("class_probs", pa.large_binary())


@dataclass(frozen=True)
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
        size = (self.image_width, self.image_height) * 2
        return np.clip(self.boxes / np.asarray(size, np.float32), 0.0, 1.0)


# --- checks ---


def tidy_region_row(row: RegionRow) -> RegionRow:
    """The row with the store's number types, sorted by falling score, boxes that overshoot by rounding clipped."""
    scores = np.asarray(row.class_scores, np.float32)
    order = slice(None)
    if scores.ndim == 1 and (scores[1:] > scores[:-1]).any():
        order = np.argsort(-scores, kind="stable")
        lengths = {len(array) for array in (row.boxes, row.features, row.class_ids)}
        if lengths != {len(scores)}:
            return replace(row, class_scores=scores)  # check_region_row names the array that does not fit
    probs = None if row.class_probs is None else _half(row.class_probs)[order]
    return replace(
        row,
        boxes=_clip_overshoot(np.asarray(row.boxes, np.float32)[order], row.image_height, row.image_width),
        features=_half(row.features)[order],
        class_ids=np.asarray(row.class_ids, np.int64)[order],
        class_scores=scores[order],
        class_probs=probs,
    )


def _half(values) -> np.ndarray:
    # A number beyond the float16 range becomes infinite, which check_region_row reports with its row.
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16, copy=False)


def _clip_overshoot(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Detectors place box edges up to one pixel outside; that much (1 % in a tiny image) is moved onto the border."""
    size = np.asarray((width, height) * 2, np.float32)
    slack = np.minimum(1.0, 0.01 * size)
    clipped = np.clip(boxes, 0.0, size)
    return np.where(np.abs(boxes - clipped) <= slack, clipped, boxes)


def check_region_row(row: RegionRow, *, file=None, number: int | None = None) -> None:
    """DataError unless every value of the row is as `RegionRow` says; `file` and `number` tell where the row is."""

    def fail(field: str, found: str, expected: str) -> DataError:
        found = Found(f"{found} (image {row.image_id!r})")
        return DataError(file=file, row=number, field=field, found=found, expected=expected)

    if not isinstance(row.image_id, str) or not row.image_id:
        raise DataError(
            file=file, row=number, field="image_id", found=row.image_id, expected="a non-empty string"
        )
    for field in ("image_height", "image_width"):
        size = getattr(row, field)
        if not isinstance(size, (int, np.integer)) or not 0 < size < 2**31:
            raise fail(field, repr(size), "a positive whole number of pixels")
    _check_shapes(row, fail)
    _check_boxes(row, fail)
    _check_classes(row, fail)
    if not _all_finite(row.features):
        region = int(np.flatnonzero(~np.isfinite(row.features).all(axis=1))[0])
        raise fail(
            "features", f"NaN or infinity in region {region}", "finite numbers within the float16 range"
        )


def _check_shapes(row: RegionRow, fail) -> None:
    count = len(row.boxes)
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
    """np.isfinite converts float16 number by number; an exponent of all ones is the same test, ten times as fast."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    return not (((values.view(np.uint16) & 0x7C00) == 0x7C00).any())


# --- writing ---


def write_region_store(
    rows: Iterable[RegionRow],
    path: str | os.PathLike,
    *,
    rows_per_shard: int = 1000,
    overwrite: bool = False,
    source: str | os.PathLike | None = None,
) -> Path:
    """Write `rows` as a region store, streaming; the whole store appears at the end, or nothing does.

    Features and probabilities become float16, regions are sorted by falling score, box edges that overshoot the image
    by at most a pixel are clipped. All rows have the same feature width and number of classes.

    Args:
        rows: one per image, consumed once.
        path: the directory to create.
        rows_per_shard: images per Arrow file.
        overwrite: replace an existing store (at the end, by renaming).
        source: the file that errors name, if the rows come from one.

    Raises:
        DataError: at the first row that breaks the format.
        FileExistsError: `path` exists and `overwrite` is not set.
    """
    return _write_store(rows, Path(path), rows_per_shard, overwrite, source, made_from=None)


def _write_store(rows, path: Path, rows_per_shard: int, overwrite: bool, source, made_from) -> Path:
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}; expected at least 1")
    if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; remove it or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        writer = _StoreWriter(temporary, rows_per_shard, source or path)
        writer.write(rows)
        writer.finish(made_from)
        temporary.chmod(path.parent.stat().st_mode & 0o777)  # mkdtemp's directory is private to its owner
        _move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _move_into_place(temporary: Path, path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        # A directory with files cannot be replaced in one step: the old one steps aside first.
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
        os.replace(path, aside)
        os.replace(temporary, path)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, path)


class _StoreWriter:
    """Collects checked rows into record batches and shards inside `directory`."""

    def __init__(self, directory: Path, rows_per_shard: int, source):
        self.directory, self.rows_per_shard, self.source = directory, rows_per_shard, source
        self.places: dict[str, int] = {}  # image id -> row number
        self.shards: list[dict] = []
        self.widths: tuple[int, int | None] | None = None  # F, K of every row

    def write(self, rows: Iterable[RegionRow]) -> None:
        numbered = enumerate(rows, start=1)
        for number, row in numbered:
            first = self._checked(row, number)
            self._write_shard(first, numbered)
        if not self.shards:
            raise DataError(
                file=self.source, found=Found("no image"), expected="the regions of at least one image"
            )

    def _write_shard(self, first: RegionRow, numbered: Iterator[tuple[int, RegionRow]]) -> None:
        name, count = f"shard-{len(self.shards):05d}.arrow", 1
        pending = [first]
        schema = _SCHEMA if self.widths[1] is None else _SCHEMA.append(_CLASS_PROBS)
        with pa.OSFile(str(self.directory / name), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            while count < self.rows_per_shard:
                number, row = next(numbered, (None, None))
                if number is None:
                    break
                if len(pending) == _ROWS_PER_BATCH:
                    writer.write_batch(_record_batch(pending, schema))
                    pending.clear()
                pending.append(self._checked(row, number))
                count += 1
            writer.write_batch(_record_batch(pending, schema))
        self.shards.append({"file": name, "rows": count, "bytes": (self.directory / name).stat().st_size})

    def _checked(self, row: RegionRow, number: int) -> RegionRow:
        row = tidy_region_row(row)
        check_region_row(row, file=self.source, number=number)
        widths = row.features.shape[1], None if row.class_probs is None else row.class_probs.shape[1]
        self.widths = self.widths or widths
        for field, width, first in zip(("features", "class_probs"), widths, self.widths, strict=True):
            if width != first:
                expected = f"{first} as in the first row"
                raise DataError(
                    file=self.source,
                    row=number,
                    field=field,
                    found=Found(f"width {width}"),
                    expected=expected,
                )
        if row.image_id in self.places:
            expected = f"an id of its own (row {self.places[row.image_id]} has it already)"
            raise DataError(
                file=self.source, row=number, field="image_id", found=row.image_id, expected=expected
            )
        self.places[row.image_id] = number
        return row

    def finish(self, made_from) -> None:
        manifest = {
            "format": "uc2-region-store",
            "rows": len(self.places),
            "feature_size": self.widths[0],
            "num_classes": self.widths[1],
            "shards": self.shards,
        }
        if made_from is not None:
            manifest["made_from"] = made_from
        (self.directory / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _record_batch(rows: Sequence[RegionRow], schema: pa.Schema) -> pa.RecordBatch:
    offsets = pa.array(np.cumsum([0] + [len(row.boxes) for row in rows]), pa.int32())

    def lists(arrays: Sequence[np.ndarray], element: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), element))

    corners = pa.array(np.concatenate([row.boxes.reshape(-1) for row in rows]), pa.float32())
    columns = {
        "image_id": [row.image_id for row in rows],
        "image_height": [int(row.image_height) for row in rows],
        "image_width": [int(row.image_width) for row in rows],
        "boxes": pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(corners, 4)),
        "features": [_little_endian(row.features) for row in rows],
        "class_ids": lists([row.class_ids for row in rows], pa.int32()),
        "class_scores": lists([row.class_scores for row in rows], pa.float32()),
    }
    if "class_probs" in schema.names:
        columns["class_probs"] = [_little_endian(row.class_probs) for row in rows]
    arrays = [
        pa.array(column, field.type) if isinstance(column, list) else column.cast(field.type)
        for column, field in zip(columns.values(), schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _little_endian(values: np.ndarray) -> bytes:
    return np.ascontiguousarray(values, "<f2").tobytes()


# --- reading ---


class _Batch:
    """One record batch as plain numpy views, so that reading a row is a handful of slices."""

    def __init__(
        self, batch: pa.RecordBatch, file: Path, first_row: int, feature_size: int, num_classes: int | None
    ):
        self.file, self.first_row = file, first_row
        self.feature_size, self.num_classes = feature_size, num_classes
        for name in batch.schema.names:
            if batch.column(name).null_count:
                raise DataError(
                    file=file, field=name, found=Found("missing values"), expected="a value in every row"
                )
        self.heights = batch.column("image_height").to_numpy()
        self.widths = batch.column("image_width").to_numpy()
        boxes = batch.column("boxes")
        self.offsets = boxes.offsets.to_numpy()  # row i's regions: offsets[i] to offsets[i + 1]
        self.boxes = boxes.values.values.to_numpy().reshape(-1, 4)
        self.class_ids = self._region_values(batch, "class_ids")
        self.class_scores = self._region_values(batch, "class_scores")
        self.features = self._half_matrix(batch, "features", feature_size)
        self.class_probs = (
            None if num_classes is None else self._half_matrix(batch, "class_probs", num_classes)
        )
        self._check_increasing(self.offsets, len(self.boxes), "boxes")
        if (self.counts < 1).any() or (self.heights < 1).any() or (self.widths < 1).any():
            raise DataError(
                file=file, found=Found("images without boxes or size"), expected="boxes in every image"
            )

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.offsets)

    def _region_values(self, batch: pa.RecordBatch, name: str) -> np.ndarray:
        column = batch.column(name)
        self._check_offsets(column.offsets.to_numpy(), self.offsets, name)
        return column.values.to_numpy()

    def _half_matrix(self, batch: pa.RecordBatch, name: str, width: int) -> np.ndarray:
        """The cells of a binary column one after another: (regions of the batch, width) float16, a view of the file."""
        _, offsets, data = batch.column(name).buffers()
        offsets = np.frombuffer(offsets, np.int64, len(self.offsets))
        self._check_offsets(offsets, self.offsets.astype(np.int64) * (2 * width), name)
        if data.size < offsets[-1]:
            raise DataError(
                file=self.file, field=name, found=Found("a truncated column"), expected="a whole file"
            )
        return np.frombuffer(data, "<f2", int(offsets[-1]) // 2).reshape(-1, width)

    def _check_offsets(self, found: np.ndarray, expected: np.ndarray, name: str) -> None:
        """Every cell must hold what `boxes` says: as many numbers, or 2 * width bytes, per region."""
        different = np.flatnonzero(found != expected)
        if different.size:
            row = max(int(different[0]) - 1, 0)
            sizes = int(found[row + 1] - found[row]), int(expected[row + 1] - expected[row])
            unit = "bytes" if name in ("features", "class_probs") else "numbers"
            raise DataError(
                file=self.file,
                row=self.first_row + row,
                field=name,
                found=Found(f"{sizes[0]} {unit}"),
                expected=f"{sizes[1]} for {int(self.counts[row])} boxes",
            )

    def _check_increasing(self, offsets: np.ndarray, limit: int, name: str) -> None:
        if offsets[0] != 0 or offsets[-1] > limit or (np.diff(offsets) < 0).any():
            raise DataError(
                file=self.file, field=name, found=Found("broken list offsets"), expected="an intact file"
            )

    def row(self, image_id: str, position: int) -> RegionRow:
        regions = slice(self.offsets[position], self.offsets[position + 1])
        return RegionRow(
            image_id=image_id,
            image_height=int(self.heights[position]),
            image_width=int(self.widths[position]),
            boxes=self.boxes[regions],
            features=self.features[regions],
            class_ids=self.class_ids[regions].astype(np.int64),
            class_scores=self.class_scores[regions],
            class_probs=None if self.class_probs is None else self.class_probs[regions],
        )


class _Index:
    """Where every image is: image id -> row number over all shards, row number -> batch."""

    def __init__(self, directories: Sequence[Path]):
        self.rows: dict[str, int] = {}
        self.batches: list[_Batch] = []
        self.starts: list[int] = []  # number of each batch's first row
        manifests = [_read_manifest(directory) for directory in directories]
        self.feature_size = manifests[0]["feature_size"]
        for directory, manifest in zip(directories, manifests, strict=True):
            if manifest["feature_size"] != self.feature_size:
                found = Found(f"features of width {manifest['feature_size']}")
                raise DataError(
                    file=directory, found=found, expected=f"{self.feature_size} as in {directories[0]}"
                )
            for shard in manifest["shards"]:
                self._add_shard(directory / shard["file"], shard, manifest)
        classes = {manifest["num_classes"] for manifest in manifests}
        # Probabilities count only if every image has them, all over the same classes.
        self.num_classes = classes.pop() if len(classes) == 1 else None

    def _add_shard(self, file: Path, shard: dict, manifest: dict) -> None:
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = Found("no such file" if size is None else f"{size} bytes")
            raise DataError(
                file=file, found=found, expected=f"the shard of {shard['bytes']} bytes that {_MANIFEST} lists"
            )
        first_row = 1
        try:
            for batch in arrow_batches(file):
                self._add_batch(
                    _Batch(batch, file, first_row, manifest["feature_size"], manifest["num_classes"]), batch
                )
                first_row += batch.num_rows
        except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
            raise DataError(
                file=file, found=Found(f"an unreadable shard ({error})"), expected="a shard of a store"
            ) from error
        if first_row - 1 != shard["rows"]:
            raise DataError(file=file, found=Found(f"{first_row - 1} rows"), expected=f"{shard['rows']} rows")

    def _add_batch(self, views: _Batch, batch: pa.RecordBatch) -> None:
        start = len(self.rows)
        self.batches.append(views)
        self.starts.append(start)
        for position, image_id in enumerate(batch.column("image_id").to_pylist()):
            if self.rows.setdefault(image_id, start + position) != start + position:
                other, place = self.locate(image_id)
                raise DataError(
                    file=views.file,
                    row=views.first_row + position,
                    field="image_id",
                    found=image_id,
                    expected=f"an id of its own (row {other.first_row + place} of {other.file} has it already)",
                )

    def locate(self, image_id: str) -> tuple[_Batch, int]:
        row = self.rows[image_id]
        number = bisect.bisect_right(self.starts, row) - 1
        return self.batches[number], row - self.starts[number]


def _read_manifest(directory: Path) -> dict:
    file = directory / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        complete = (
            manifest["format"] == "uc2-region-store"
            and {"feature_size", "num_classes", "shards"} <= manifest.keys()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            file=file, found=Found(f"{error!r}"), expected="the description of a region store"
        ) from error
    if not complete:
        raise DataError(file=file, found=manifest, expected="the description of a region store")
    return manifest


class RegionStore(Mapping[str, RegionRow]):
    """Read-only mapping from image id to `RegionRow`; the features are views of the memory-mapped file.

    Opening checks the structure of every shard (sizes, counts, unique ids) without reading features; `validate`
    checks every value. A store may be pickled or forked into `DataLoader` workers, which map the files themselves.

    Args:
        paths: one or several stores written by `write_region_store`; or Parquet or Arrow files with the same columns
            (a file or a directory of them), which are converted once into a store beside them.

    Raises:
        DataError: a file is missing, truncated or not in the format, or an image id occurs twice.
    """

    def __init__(self, paths: str | os.PathLike | Sequence[str | os.PathLike]):
        several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not several:
            raise DataError(found=Found("no path"), expected="the path of a region store")
        self.paths = [_as_store(Path(path)) for path in several]
        _ = self._index  # check now, not at the first read

    @cached_property
    def _index(self) -> _Index:
        return _Index(self.paths)

    def __getstate__(self) -> dict:
        return {"paths": self.paths}

    def __getitem__(self, image_id: str) -> RegionRow:
        batch, position = self._index.locate(image_id)
        return batch.row(image_id, position)

    def __contains__(self, image_id) -> bool:
        return image_id in self._index.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.rows)

    def __len__(self) -> int:
        return len(self._index.rows)

    def __repr__(self) -> str:
        return f"RegionStore({[str(path) for path in self.paths]}, images={len(self)}, feature_size={self.feature_size})"

    @property
    def feature_size(self) -> int:
        """F, the width of a region's feature."""
        return self._index.feature_size

    @property
    def num_classes(self) -> int | None:
        """K, the width of `class_probs`; None where images have none."""
        return self._index.num_classes

    @cached_property
    def region_counts(self) -> np.ndarray:
        """(len(store),) int64: regions of every image, in the order of `list(store)`."""
        return np.concatenate([batch.counts for batch in self._index.batches]).astype(np.int64)

    def num_regions(self, image_id: str) -> int:
        batch, position = self._index.locate(image_id)
        return int(batch.offsets[position + 1] - batch.offsets[position])

    def class_scores(self, image_id: str) -> np.ndarray:
        """(n,) float32, falling; reads nothing else of the row."""
        batch, position = self._index.locate(image_id)
        return batch.class_scores[batch.offsets[position] : batch.offsets[position + 1]]

    def validate(self, max_errors: int = 10) -> list[DataError]:
        """Check every value of every row; the first `max_errors` errors, so an empty list means a sound store."""
        errors: list[DataError] = []
        for image_id in self:
            batch, position = self._index.locate(image_id)
            try:
                check_region_row(
                    batch.row(image_id, position), file=batch.file, number=batch.first_row + position
                )
            except DataError as error:
                errors.append(error)
                if len(errors) == max_errors:
                    break
        return errors


# --- other people's files: converted once ---


def _as_store(path: Path) -> Path:
    """`path` if it is a store; else the store made from the Parquet or Arrow file(s) there, up to date."""
    if (path / _MANIFEST).is_file():
        return path
    files = sorted(file for file in path.rglob("*") if _is_table(file)) if path.is_dir() else [path]
    if not path.exists() or not files or not all(map(_is_table, files)):
        found = Found(
            "no such file" if not path.exists() else "neither a region store nor Parquet or Arrow files"
        )
        raise DataError(
            file=path, found=found, expected="a region store (a directory with store.json) or such files"
        )
    target = path.with_name(f"{path.name}.region_store")
    made_from = [
        [str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns] for file in files
    ]
    if not _is_current(target, made_from):
        logger.warning("Converting %s (%d files) once into the region store %s.", path, len(files), target)
        _write_store(_table_rows(files), target, 1000, True, path, made_from)
    return target


def _is_table(file: Path) -> bool:
    return file.suffix in (".parquet", ".arrow") and file.is_file()


def _is_current(target: Path, made_from: list) -> bool:
    return (target / _MANIFEST).is_file() and _read_manifest(target).get("made_from") == made_from


def _table_rows(files: Sequence[Path]) -> Iterator[RegionRow]:
    for file in files:
        number = 0
        try:
            for batch in _table_batches(file):
                for cells in batch.to_pylist():
                    number += 1
                    row = tidy_region_row(_row_from_cells(cells, file, number))
                    check_region_row(row, file=file, number=number)
                    yield row
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                file=file, found=Found(f"an unreadable file ({error})"), expected="a whole file"
            ) from error


def _table_batches(file: Path) -> Iterator[pa.RecordBatch]:
    batches = (
        pq.ParquetFile(file).iter_batches(batch_size=16) if file.suffix == ".parquet" else arrow_batches(file)
    )
    for batch in batches:
        missing = [name for name in _SCHEMA.names if name not in batch.schema.names]
        if missing:
            found = Found(f"only the columns {', '.join(batch.schema.names)}")
            raise DataError(file=file, field=missing[0], found=found, expected="a column of this name")
        wanted = [name for name in (*_SCHEMA.names, _CLASS_PROBS.name) if name in batch.schema.names]
        # Slices keep the memory flat for tables that come as one large batch.
        yield from (batch.select(wanted).slice(start, 16) for start in range(0, batch.num_rows, 16))


def _row_from_cells(cells: dict, file: Path, number: int) -> RegionRow:
    def fail(field: str, found, expected: str) -> DataError:
        return DataError(file=file, row=number, field=field, found=found, expected=expected)

    def numbers(field: str, dtype: type) -> np.ndarray:
        try:
            return np.asarray(cells[field], dtype)
        except (TypeError, ValueError) as error:
            raise fail(field, cells[field], "a list of numbers, as many per box") from error

    def half(field: str, count: int) -> np.ndarray:
        content = cells[field]
        if not isinstance(content, bytes) or not content or len(content) % (2 * count):
            found = Found(f"{len(content)} bytes") if isinstance(content, bytes) else content
            raise fail(
                field,
                found,
                f"little-endian float16 numbers of {count} boxes: a multiple of {2 * count} bytes",
            )
        return np.frombuffer(content, "<f2").reshape(count, -1)

    boxes = numbers("boxes", np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise fail("boxes", cells["boxes"], "a list of at least one [x1, y1, x2, y2]")
    return RegionRow(
        image_id=cells["image_id"],
        image_height=cells["image_height"],
        image_width=cells["image_width"],
        boxes=boxes,
        features=half("features", len(boxes)),
        class_ids=numbers("class_ids", np.int64),
        class_scores=numbers("class_scores", np.float32),
        class_probs=half("class_probs", len(boxes)) if cells.get("class_probs") is not None else None,
    )


def main(argv: list[str] | None = None) -> int:
    """Check a store; returns the exit status, 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Check every value of a region store.")
    parser.add_argument("path", nargs="+", help="region store(s), or Parquet or Arrow files")
    parser.add_argument("--max_errors", type=int, default=10)
    arguments = parser.parse_args(argv)
    try:
        store = RegionStore(arguments.path)
        errors = store.validate(arguments.max_errors)
    except DataError as error:
        print(error)
        return 1
    counts, classes = store.region_counts, store.num_classes
    print(f"{len(store)} images, {counts.sum()} regions ({counts.min()} to {counts.max()} per image)")
    print(
        f"features: {store.feature_size} float16; class probabilities: {f'{classes} classes' if classes else 'none'}"
    )
    print(*(errors or ["every value is in order"]), sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
