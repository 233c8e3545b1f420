"""Rows of any source, each with its number: JSON Lines, JSON, Parquet, Arrow, a saved data set, the Hub."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from uc2.arrow_files import arrow_batches
from uc2.data_error import DataError, Found, shorten


def _json_line_rows(file: str) -> Iterator[tuple[int, Any]]:
    with _open_bytes(file) as lines:
        for number, line in enumerate(lines, start=1):
            # A byte order mark, which some editors write, is not part of the first row.
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if line:
                yield number, _parse_json(line, file, number)


def _json_rows(file: str) -> Iterator[tuple[int, Any]]:
    """A `.json` file is a list of rows or, as `datasets` also allows, JSON Lines."""
    with _open_bytes(file) as stream:
        start = next((line.strip() for line in stream if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
        if not start.startswith(b"["):
            yield from _json_line_rows(file)
            return
    with _open_bytes(file) as stream:
        rows = _parse_json(stream.read(), file, None)
    yield from enumerate(rows, start=1)


def _open_bytes(file: str):
    return gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb")


def _parse_json(content: bytes, file: str, row: int | None) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    # ValueError: also numbers of thousands of digits; RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise DataError(
            file=file, row=row, found=Found(f"malformed JSON ({error})"), expected="one JSON object"
        ) from error


def _parquet_rows(file: str) -> Iterator[tuple[int, dict]]:
    batches = pq.ParquetFile(file).iter_batches(batch_size=1000)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _arrow_rows(file: str) -> Iterator[tuple[int, dict]]:
    batches = arrow_batches(file)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


_READERS = {".jsonl": _json_line_rows, ".json": _json_rows, ".parquet": _parquet_rows, ".arrow": _arrow_rows}


SUFFIXES = (*_READERS, ".gz")


def reader_of(file: str) -> Callable[[str], Iterator[tuple[int, Any]]]:
    suffix = Path(file.removesuffix(".gz")).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            file=file, found=Found(f"a file ending in '{suffix}'"), expected=f"one of {', '.join(_READERS)}"
        )
    return _READERS[suffix]


def numbered_rows(source: str, split: str, streaming: bool = False) -> Iterator[tuple[int, Any]]:
    """Rows of a file, of a directory saved by `datasets`, or of a Hub data set, numbered from 1.

    The number is the line number in JSON Lines. `split` picks one of a saved `DatasetDict` or of a Hub data
    set.
    """
    path = Path(source)
    if path.is_file():
        try:
            yield from reader_of(source)(source)
        except DataError:
            raise
        except (pa.ArrowException, OSError, EOFError, zlib.error, ValueError) as error:
            raise DataError(
                file=source, found=Found(f"an unreadable file ({error})"), expected="a whole file"
            ) from error
    elif path.is_dir():
        yield from enumerate(_saved_rows(source, split), start=1)
    else:
        yield from enumerate(hub_rows(source, split, streaming), start=1)


def hub_rows(source: str, split: str, streaming: bool = False):
    """A data set of the Hub, or of the cache of earlier downloads."""
    try:
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        found = Found(f"no data set to load ({shorten(str(error), 200)})")
        raise DataError(file=source, found=found, expected="a file of rows, or a data set of the Hub") from error


def _saved_rows(source: str, split: str) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(source)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        found = Found(f"no readable data set in the folder ({error})")
        raise DataError(file=source, found=found, expected="what `save_to_disk` of `datasets` wrote") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise DataError(
            file=source, found=Found(f"the splits {', '.join(loaded)}"), expected=f"a split '{split}'"
        )
    return loaded[split]
