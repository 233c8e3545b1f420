"""The region store: image id -> detected regions, memory-mapped, read without copying the features.

On disk a store is a directory of Arrow shards and a `store.json` that lists them. `boxes` are sorted by
falling class score, so that selecting regions (the original keeps scores above 0.2, at least 10, at most
100) is a slice. Features stay float16 from the file to the device.

    python -m uc2.region_store PATH        # checks every value of a store and prints a summary
"""

import argparse
import bisect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from uc2.arrow_files import arrow_batches
from uc2.data_error import DataError, Found
from uc2.region_codecs import Codec, codec_of
from uc2.region_rows import RegionRow, check_region_row
from uc2.region_tables import as_stores
from uc2.region_writer import CLASS_PROBS, MANIFEST, SCHEMA, crc32, read_manifest, write_region_store

__all__ = ["DataError", "RegionRow", "RegionStore", "write_region_store"]


class _Batch:
    """One record batch as plain numpy views, so that reading a row is a handful of slices."""

    def __init__(
        self, batch: pa.RecordBatch, file: Path, first_row: int, features: Codec, class_probs: Codec | None
    ):
        self.file, self.first_row = file, first_row
        self.feature_codec, self.class_codec = features, class_probs
        schema = SCHEMA if class_probs is None else SCHEMA.append(CLASS_PROBS)
        if not batch.schema.equals(schema):
            found = Found(
                f"the columns {', '.join(f'{field.name} ({field.type})' for field in batch.schema)}"
            )
            raise DataError(file=file, found=found, expected="the columns of a region store")
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
        self._check_increasing(self.offsets, len(self.boxes), "boxes")
        self.class_ids = self._region_values(batch, "class_ids")
        self.class_scores = self._region_values(batch, "class_scores")
        self.features = self._matrix(batch, "features", features)
        self.class_probs = None if class_probs is None else self._matrix(batch, "class_probs", class_probs)
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

    def _matrix(self, batch: pa.RecordBatch, name: str, codec: Codec) -> np.ndarray:
        """All cells of a binary column: (regions of the batch, codec.columns), a view of the file."""
        _, offsets, data = batch.column(name).buffers()
        offsets = np.frombuffer(offsets, np.int64, len(self.offsets))
        size = np.dtype(codec.dtype).itemsize
        self._check_offsets(offsets, self.offsets.astype(np.int64) * (size * codec.columns), name)
        if data.size < offsets[-1]:
            raise DataError(
                file=self.file, field=name, found=Found("a truncated column"), expected="a whole file"
            )
        return np.frombuffer(data, codec.dtype, int(offsets[-1]) // size).reshape(-1, codec.columns)

    def _check_offsets(self, found: np.ndarray, expected: np.ndarray, name: str) -> None:
        """Every cell must hold what `boxes` says: as many numbers, or bytes of the codec, per region."""
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
            features=self.feature_codec.decode(self.features[regions]),
            class_ids=self.class_ids[regions].astype(np.int64),
            class_scores=self.class_scores[regions],
            class_probs=None if self.class_probs is None else self.class_codec.decode(self.class_probs[regions]),
        )


class _Index:
    """Where every image is: image id -> row number over all shards, row number -> batch."""

    def __init__(self, directories: Sequence[Path]):
        self.rows: dict[str, int] = {}
        self.batches: list[_Batch] = []
        self.starts: list[int] = []  # number of each batch's first row
        manifests = [read_manifest(directory) for directory in directories]
        self.feature_size = manifests[0]["feature_size"]
        for directory, manifest in zip(directories, manifests, strict=True):
            if manifest["feature_size"] != self.feature_size:
                found = Found(f"features of width {manifest['feature_size']}")
                raise DataError(
                    file=directory, found=found, expected=f"{self.feature_size} as in {directories[0]}"
                )
            features = codec_of(manifest, "features", directory)
            probs = None if manifest["num_classes"] is None else codec_of(manifest, "class_probs", directory)
            for shard in manifest["shards"]:
                self._add_shard(directory / shard["file"], shard, features, probs)
        self.num_classes = self._shared_classes(
            directories, [manifest["num_classes"] for manifest in manifests]
        )

    @staticmethod
    def _shared_classes(directories: Sequence[Path], classes: Sequence[int | None]) -> int | None:
        """K if every image has class probabilities; None if some have none."""
        known = {count for count in classes if count is not None}
        if len(known) > 1:
            found = Found(f"{' and '.join(map(str, sorted(known)))} classes")
            raise DataError(file=directories[0], found=found, expected="equally many in all stores")
        return known.pop() if known and None not in classes else None

    def _add_shard(self, file: Path, shard: dict, features: Codec, class_probs: Codec | None) -> None:
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = Found("no such file" if size is None else f"{size} bytes")
            raise DataError(
                file=file, found=found, expected=f"the shard of {shard['bytes']} bytes that {MANIFEST} lists"
            )
        first_row = 1
        try:
            for batch in arrow_batches(file):
                self._add_batch(_Batch(batch, file, first_row, features, class_probs), batch)
                first_row += batch.num_rows
        except DataError:
            raise
        except (pa.ArrowException, OSError, TypeError, ValueError, AttributeError) as error:
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
                    expected=f"an id of its own (row {other.first_row + place} of {other.file} has it)",
                )

    def locate(self, image_id: str) -> tuple[_Batch, int]:
        row = self.rows[image_id]
        number = bisect.bisect_right(self.starts, row) - 1
        return self.batches[number], row - self.starts[number]


class RegionStore(Mapping[str, RegionRow]):
    """Read-only mapping from image id to `RegionRow`; the features are views of the memory-mapped file.

    Opening checks the structure of every shard (sizes, counts, unique ids) without reading features;
    `validate` checks every value. A store can be pickled or forked into `DataLoader` workers, which map the
    files themselves.

    Args:
        paths: one or several stores written by `write_region_store`, or directories of stores; or Parquet or
            Arrow files with the same columns (a file or a directory of them), which are converted once into a
            store beside them.

    Raises:
        DataError: a file is missing, truncated or not in the format, or an image id occurs twice.
    """

    def __init__(self, paths: str | os.PathLike | Sequence[str | os.PathLike]):
        several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not several:
            raise DataError(found=Found("no path"), expected="the path of a region store")
        self.paths = [store for path in several for store in as_stores(Path(path))]
        _ = self._index  # check now, not at the first read

    @cached_property
    def _index(self) -> _Index:
        return _Index(self.paths)

    def __getstate__(self) -> dict:
        return {"paths": self.paths}

    # By identity: a mapping would compare all rows, reading every feature of both stores.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

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
        paths = ", ".join(map(str, self.paths))
        return f"RegionStore({paths}: {len(self)} images, feature_size={self.feature_size})"

    @property
    def feature_size(self) -> int:
        """F, the width of a region's feature."""
        return self._index.feature_size

    @property
    def num_classes(self) -> int | None:
        """K, the width of `class_probs`; None where images have none."""
        return self._index.num_classes

    @cached_property
    def has_classes(self) -> bool:
        """Whether regions have object classes. Cells of a grid have none: all are of class 0 with score 1."""
        return any(batch.class_ids.any() or (batch.class_scores != 1).any() for batch in self._index.batches)

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
        """Check every byte and value; gives the first `max_errors` errors (none: the store is sound)."""
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
                    return errors
        damaged = {error.file for error in errors}
        found = (error for path in self.paths for error in _checksum_errors(path) if error.file not in damaged)
        return [*errors, *found][:max_errors]


def _checksum_errors(directory: Path) -> Iterator[DataError]:
    """Shards that are not as they were written. A store of an earlier version has no checksums to compare."""
    for shard in read_manifest(directory)["shards"]:
        found, expected = crc32(directory / shard["file"]), shard.get("crc32")
        if expected not in (None, found):
            yield DataError(file=directory / shard["file"], found=Found(f"checksum {found}"), expected=f"{expected}")


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
        f"features: {store.feature_size} float16; "
        f"class probabilities: {f'{classes} classes' if classes else 'none'}"
    )
    print(*(errors or ["every value is in order"]), sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
