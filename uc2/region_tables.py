"""Parquet and Arrow files with the columns of a region store: converted once into a store."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from uc2.arrow_files import arrow_batches
from uc2.data_error import DataError, Found
from uc2.region_rows import RegionRow, tidy_region_row
from uc2.region_writer import CLASS_PROBS, MANIFEST, SCHEMA, read_manifest, write_region_store

logger = logging.getLogger(__name__)


def as_stores(path: Path) -> list[Path]:
    """`path` if it is a store; the stores in it; or the store made from Parquet or Arrow files there."""
    if (path / MANIFEST).is_file():
        return [path]
    parts = [file.parent for file in sorted(path.glob(f"*/{MANIFEST}"))]
    return parts or [_converted(path)]


def _converted(path: Path) -> Path:
    """The up-to-date store beside `path`, made now if it is not there."""
    files = _table_files(path)
    target = path.with_name(f"{path.name}.region_store")
    names = [str(file.relative_to(path.parent)) for file in files]
    states = [file.stat() for file in files]
    made_from = [[name, state.st_size, state.st_mtime_ns] for name, state in zip(names, states, strict=True)]
    if not _is_current(target, made_from):
        # Of several processes that open the same files, one converts and the others wait for it.
        with FileLock(f"{target}.lock"):
            if not _is_current(target, made_from):
                _remove_leftovers(target)
                logger.warning(
                    "Converting %s once into the region store %s (%d files)", path, target, len(files)
                )
                rows = _table_rows(files)
                write_region_store(rows, target, overwrite=True, source=path, made_from=made_from)
    return target


def _remove_leftovers(target: Path) -> None:
    """Delete what a killed conversion left behind; called under the lock, so no other one is running."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(leftover)


def _table_files(path: Path) -> list[Path]:
    expected = f"a region store (a directory with {MANIFEST}), or Parquet or Arrow files"
    if not path.exists():
        raise DataError(file=path, found=Found("no such file"), expected=expected)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in (".parquet", ".arrow")]
    if not files:
        raise DataError(file=path, found=Found("none of these"), expected=expected)
    return files


def _is_current(target: Path, made_from: list) -> bool:
    return (target / MANIFEST).is_file() and read_manifest(target).get("made_from") == made_from


def _table_rows(files: Sequence[Path]) -> Iterator[RegionRow]:
    for file in files:
        number = 0
        try:
            for batch in _table_batches(file):
                for cells in batch.to_pylist():
                    number += 1
                    yield tidy_region_row(_row_from_cells(cells, file, number), file=file, number=number)
        except DataError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
            found = Found(f"an unreadable file ({error})")
            raise DataError(file=file, found=found, expected="a whole file") from error


def _table_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Batches of a few rows, so that memory stays flat whatever the file's own batches are."""
    is_parquet = file.suffix == ".parquet"
    batches = pq.ParquetFile(file).iter_batches(batch_size=16) if is_parquet else arrow_batches(file)
    for batch in batches:
        for name in SCHEMA.names:
            if name not in batch.schema.names:
                found = Found(f"only the columns {', '.join(batch.schema.names)}")
                raise DataError(file=file, field=name, found=found, expected="a column of this name")
        wanted = [name for name in (*SCHEMA.names, CLASS_PROBS.name) if name in batch.schema.names]
        yield from (batch.select(wanted).slice(start, 16) for start in range(0, batch.num_rows, 16))


def _row_from_cells(cells: dict, file: Path, number: int) -> RegionRow:
    if not isinstance(cells["boxes"], list):
        expected = "a list of x1, y1, x2, y2"
        raise DataError(file=file, row=number, field="boxes", found=cells["boxes"], expected=expected)
    count = len(cells["boxes"])

    def matrix(field: str) -> np.ndarray:
        content = cells[field]
        if not isinstance(content, bytes) or not content or not count or len(content) % (2 * count):
            found = Found(f"{len(content)} bytes") if isinstance(content, bytes) else content
            expected = f"float16 numbers of {count} boxes (a multiple of {2 * count} bytes)"
            raise DataError(file=file, row=number, field=field, found=found, expected=expected)
        return np.frombuffer(content, "<f2").reshape(count, -1)

    has_probs = cells.get(CLASS_PROBS.name) is not None
    probs = matrix(CLASS_PROBS.name) if has_probs else None
    return RegionRow(**{**cells, "features": matrix("features"), CLASS_PROBS.name: probs})
