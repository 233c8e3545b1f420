"""LMDB databases of regions: UNITER's and UC2's (msgpack or `.npz` values), VOLTA's and IGLUE's (pickles)."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from uc2.data_error import DataError, Found
from uc2.region_cells import decode_cells
from uc2.region_records import NAMES, LazyRecord, Record
from uc2.safe_decoding import DecodingError, loads_msgpack, loads_npz, loads_pickle

_KEY_LISTS = (b"__keys__", b"keys")  # UNITER's and VOLTA's entries that list the images
_PER_REGION = ("features", "normalized_boxes", "class_scores", "class_probs_after_background")


def read_uniter_lmdb(
    paths: Sequence[str | os.PathLike], region_counts: str | os.PathLike | None = None
) -> Iterator[LazyRecord]:
    """Records of databases such as `feat_th0.2_max100_min10` or `feat_numbb36`.

    Args:
        region_counts: a `nbb_….json`, image -> how many of its first regions count. By default the one that
            UNITER keeps beside the database (`nbb_th0.2_max100_min10.json`), if it is there.
    """
    for path in map(Path, paths):
        counts_file = Path(region_counts) if region_counts else _counts_beside(path)
        counts = _read_counts(counts_file) if counts_file else {}
        for number, key, content in _entries(path):
            yield partial(_uniter_record, number, key, content, path, counts_file, counts.get(key))


def _uniter_record(
    number: int, key: str, content: bytes, path: Path, counts_file: Path | None, count: Any
) -> Record:
    values = _decode(loads_npz if content[:2] == b"PK" else loads_msgpack, content, path, number)
    record = Record(key, values, str(path), number)
    return _keep_first(record, count, counts_file) if counts_file else record


def read_volta_lmdb(paths: Sequence[str | os.PathLike]) -> Iterator[LazyRecord]:
    """Records of databases of pickled dictionaries; their arrays are base64 (from TSV) or plain (HDF5)."""
    for path in map(Path, paths):
        for number, key, content in _entries(path):
            yield partial(_volta_record, number, key, content, path)


def _volta_record(number: int, key: str, content: bytes, path: Path) -> Record:
    return decode_cells(Record(key, _decode(loads_pickle, content, path, number), str(path), number))


def _entries(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Number, key and value of every image."""
    number = 0
    with _open(path) as database, database.begin() as transaction:
        for key, content in transaction.cursor():
            if key not in _KEY_LISTS:
                number += 1
                yield number, _key_text(key, path, number), content


def _key_text(key: bytes, path: Path, number: int) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(file=path, row=number, field="image_id", found=key, expected="UTF-8 text") from error


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("reading LMDB databases needs the package lmdb: pip install lmdb") from error
    try:
        with lmdb.open(
            str(path), readonly=True, lock=False, readahead=False, subdir=path.is_dir()
        ) as database:
            _check_size(path / "data.mdb" if path.is_dir() else path, database)
            yield database
    except lmdb.Error as error:
        raise DataError(file=path, found=Found(str(error)), expected="a whole LMDB database") from error


def _check_size(file: Path, database: Any) -> None:
    """A database cut off would be mapped beyond its end, which kills the process instead of failing."""
    needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    if file.stat().st_size < needed:
        raise DataError(file=file, found=Found(f"{file.stat().st_size} bytes"), expected=f"at least {needed}")


def count_entries(path: str | os.PathLike) -> int:
    """Number of entries, for progress bars."""
    with _open(Path(path)) as database:
        return database.stat()["entries"]


def _decode(decoder, content: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        values = decoder(content)
    except DecodingError as error:
        raise DataError(
            file=path, row=number, found=Found(str(error)), expected="the regions of an image"
        ) from error
    if not isinstance(values, dict):
        raise DataError(file=path, row=number, found=values, expected="a map of arrays")
    return values


def _counts_beside(path: Path) -> Path | None:
    name = path.name.removesuffix("_compressed")
    file = path.parent / f"nbb{name.removeprefix('feat')}.json"
    return file if name.startswith("feat_") and file.is_file() else None


def _read_counts(file: Path) -> dict[str, int]:
    try:
        counts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            file=file, found=Found(str(error)), expected="a JSON object image -> number"
        ) from error
    if not isinstance(counts, dict):
        raise DataError(file=file, found=counts, expected="a JSON object image -> number")
    return counts


def _keep_first(record: Record, count: Any, file: Path) -> Record:
    available = len(record.require("features"))
    if not isinstance(count, int) or not 1 <= count <= available:
        raise DataError(file=file, field=record.key, found=count, expected=f"a number from 1 to {available}")
    names = [name for ours in _PER_REGION for name in NAMES[ours] if name in record.values]
    cut = {name: record.values[name][:count] for name in names}
    return Record(record.key, {**record.values, **cut}, record.file, record.number)
