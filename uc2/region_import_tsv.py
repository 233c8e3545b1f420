"""Bottom-up-attention TSV files: one image a line, arrays in base64. Reading and writing."""

import base64
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from uc2.atomic_files import atomic_file
from uc2.data_error import DataError, Found
from uc2.region_cells import decode_cells
from uc2.region_records import LazyRecord, Record
from uc2.region_store import RegionStore

LXMERT_COLUMNS = (
    "img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes",
    "features",
)  # fmt: skip
CLASSIC_COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
# Files without a header line are told apart by their number of columns.
_KNOWN_COLUMNS = {
    len(columns): columns
    for columns in (
        CLASSIC_COLUMNS,
        (*CLASSIC_COLUMNS, "cls_prob"),
        LXMERT_COLUMNS,
        (*LXMERT_COLUMNS, "cls_prob", "attrs", "classes"),
    )
}


def read_tsv(files: Sequence[str | os.PathLike], columns: Sequence[str] | None = None) -> Iterator[LazyRecord]:
    """Records of TSV files, in order.

    Args:
        columns: the names of the columns; by default those of the header line or, without one, of the known
            layout with as many columns (6 or 7: the original's, 10 or 13: LXMERT's and VOLTA's).
    """
    for file in map(str, files):
        names = columns
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                cells = line.rstrip(b"\r\n").split(b"\t")
                if names is None:
                    names = _columns(cells, file)
                is_header = number == 1 and b"features" in cells
                if cells != [b""] and not is_header:
                    yield partial(_record, cells, names, file, number)


def _columns(cells: Sequence[bytes], file: str) -> Sequence[str]:
    if b"features" in cells:
        return [cell.decode("utf-8", "replace") for cell in cells]
    if len(cells) not in _KNOWN_COLUMNS:
        expected = (
            f"{', '.join(map(str, _KNOWN_COLUMNS))} columns, a header line, or the names of the columns"
        )
        raise DataError(file=file, row=1, found=Found(f"{len(cells)} column(s)"), expected=expected)
    return _KNOWN_COLUMNS[len(cells)]


def _record(cells: Sequence[bytes], columns: Sequence[str], file: str, number: int) -> Record:
    if len(cells) != len(columns):
        found, expected = Found(f"{len(cells)} columns"), f"{len(columns)} ({', '.join(columns)})"
        raise DataError(file=file, row=number, found=found, expected=expected)
    try:
        values = {name: cell.decode("utf-8") for name, cell in zip(columns, cells, strict=True)}
    except UnicodeDecodeError as error:
        raise DataError(file=file, row=number, found=Found(str(error)), expected="UTF-8 text") from error
    key = values.get("img_id", values.get("image_id"))
    if not key:
        raise DataError(file=file, row=number, field="image_id", found=key, expected="a non-empty string")
    return decode_cells(Record(key, values, file, number))


def write_tsv(store: RegionStore, path: str | os.PathLike) -> Path:
    """Write a store as a TSV in LXMERT's layout (attributes, which stores do not have, are zeros)."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        for row in store.values():
            if any(character in row.image_id for character in "\t\r\n"):
                raise DataError(
                    field="image_id", found=row.image_id, expected="an id without tabs or line breaks"
                )
            count = len(row.boxes)
            cells = {
                "img_id": row.image_id,
                "img_h": row.image_height,
                "img_w": row.image_width,
                "objects_id": _encode(row.class_ids, "<i8"),
                "objects_conf": _encode(row.class_scores, "<f4"),
                "attrs_id": _encode(np.zeros(count), "<i8"),
                "attrs_conf": _encode(np.zeros(count), "<f4"),
                "num_boxes": count,
                "boxes": _encode(row.boxes, "<f4"),
                "features": _encode(row.features, "<f4"),
            }
            stream.write("\t".join(str(cells[name]) for name in LXMERT_COLUMNS) + "\n")
    return Path(path)


def _encode(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode("ascii")
