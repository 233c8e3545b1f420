"""Regions in HDF5 files (VOLTA, IGLUE) and in one `.npz` or `.npy` file per image."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from uc2.data_error import DataError, Found
from uc2.region_records import NAMES, LazyRecord, Record
from uc2.safe_decoding import DecodingError, loads_npy, loads_npz

_KNOWN = {name for names in NAMES.values() for name in names}
# Beside features in `<id>.npy`, the other arrays of the image: `<id>_boxes.npy`, `<id>_class_ids.npy`, …
_SIDE_FIELDS = sorted(_KNOWN - {"features", "x"})
_SIDE_ENDINGS = tuple(f"_{name}" for name in _SIDE_FIELDS)


def read_volta_h5(files: Sequence[str | os.PathLike]) -> Iterator[LazyRecord]:
    """Records of HDF5 files with a group per image, named by its id.

    A group holds features, boxes, obj_id, obj_conf, img_h and img_w.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading HDF5 files needs the package h5py: pip install h5py") from error
    for file in map(str, files):
        with _readable(file), h5py.File(file, "r") as groups:
            for number, key in enumerate(groups, start=1):
                yield partial(_group_record, groups, key, file, number)


@contextmanager
def _readable(file: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # a damaged file can make h5py raise any
        raise DataError(file=file, found=Found(str(error)), expected="a readable HDF5 file") from error


def _group_record(groups: Any, key: str, file: str, number: int) -> Record:
    with _readable(file):
        group = groups[key]
        if not hasattr(group, "keys"):
            found = Found(f"a data set '{group.name}'")
            raise DataError(file=file, row=number, found=found, expected="a group of data sets per image")
        return Record(key, {name: group[name][()] for name in group if name in _KNOWN}, file, number)


def image_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The `.npz` and `.npy` files under `paths`, in order, without those that belong to another."""
    found = [
        file for path in map(Path, paths) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
    ]
    files = [
        file for file in found if file.suffix in (".npz", ".npy") and not file.stem.endswith(_SIDE_ENDINGS)
    ]
    if not files:
        raise DataError(
            file=", ".join(map(str, paths)), found=Found("no file"), expected="an .npz or .npy per image"
        )
    return files


def read_image_files(paths: Sequence[str | os.PathLike]) -> Iterator[LazyRecord]:
    """Records of one file per image, the file's name without ending being the id.

    An `.npz` holds all arrays under any of the known names (`region_records.NAMES`); a `.npy` holds the
    features (n, F), and the files `<id>_<name>.npy` beside it the other arrays (`<id>_boxes.npy`,
    `<id>_image_height.npy`, …).
    """
    for number, file in enumerate(image_files(paths), start=1):
        yield partial(_file_record, file, number)


def _file_record(file: Path, number: int) -> Record:
    try:
        if file.suffix == ".npz":
            values = loads_npz(file.read_bytes())
        else:
            sides = {name: file.with_name(f"{file.stem}_{name}.npy") for name in _SIDE_FIELDS}
            arrays = {"features": file, **{name: side for name, side in sides.items() if side.is_file()}}
            values = {name: loads_npy(place.read_bytes()) for name, place in arrays.items()}
    except (DecodingError, OSError) as error:
        raise DataError(file=file, found=Found(str(error)), expected="arrays of numbers") from error
    return Record(file.stem, {name: _plain(value) for name, value in values.items()}, str(file), number)


def _plain(value: np.ndarray) -> Any:
    """A 0-d array (a size, a count) as its number."""
    return value[()] if value.ndim == 0 else value
