"""Parquet and Arrow files with the columns of a region store: converted once into a store."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from uc2.arrow_files import arrow_batches
from uc2.data_error import DataError, Found
from uc2.region_rows import RegionRow, check_region_row, tidy_region_row
from uc2.region_writer import CLASS_PROBS, MANIFEST, SCHEMA, read_manifest, write_region_store

logger = logging.getLogger(__name__)


def as_store(path: Path) -> Path:
    """`path` if it is a store; else the store made from the Parquet or Arrow file(s) there, up to date."""
    if (path / MANIFEST).is_file():
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
        # Of several processes that open the same files, one converts and the others wait for it.
        with FileLock(f"{target}.lock"):
            if not _is_current(target, made_from):
                logger.warning(
                    "Converting %s (%d file(s)) once into the region store %s", path, len(files), target
                )
                write_region_store(
                    _table_rows(files), target, overwrite=True, source=path, made_from=made_from
                )
    return target


def _is_table(file: Path) -> bool:
    return file.suffix in (".parquet", ".arrow") and file.is_file()


def _is_current(target: Path, made_from: list) -> bool:
    return (target / MANIFEST).is_file() and read_manifest(target).get("made_from") == made_from


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
        missing = [name for name in SCHEMA.names if name not in batch.schema.names]
        if missing:
            found = Found(f"only the columns {', '.join(batch.schema.names)}")
            raise DataError(file=file, field=missing[0], found=found, expected="a column of this name")
        wanted = [name for name in (*SCHEMA.names, CLASS_PROBS.name) if name in batch.schema.names]
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
