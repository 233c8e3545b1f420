"""Decoding other projects' serialised arrays without running anything that is in them.

Pickles (VOLTA) can call any function, and msgpack-numpy (UNITER) unpickles arrays of objects. Here both are
read with decoders that admit containers, strings, numbers and arrays of numbers, and nothing else.
"""

import io
import pickle
import re
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np

_NUMBER_TYPE = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1)")


class DecodingError(ValueError):
    """The bytes are malformed, or hold something that is not plain data."""


# What a malformed .npy file can make numpy raise: it parses the header as Python's literals.
NPY_ERRORS = (ValueError, OSError, EOFError, SyntaxError, tokenize.TokenError, TypeError, MemoryError, RecursionError)


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    """Array over the bytes `data`; refuses every type but numbers (objects would be unpickled)."""
    dtype = dtype.decode("ascii") if isinstance(dtype, bytes) else dtype
    if not isinstance(dtype, str) or not _NUMBER_TYPE.fullmatch(dtype):
        raise DecodingError(f"an array of type {dtype!r}; only numbers are read")
    return np.frombuffer(data, dtype).reshape(tuple(shape), order=order)


# --- msgpack with msgpack-numpy's arrays ---


def loads_msgpack(content: bytes) -> Any:
    """Decode one msgpack value; maps `{nd, type, shape, data}` become arrays (views of `content`'s copy)."""
    import msgpack

    try:
        return msgpack.unpackb(content, object_hook=_array_from_map, raw=False)
    except DecodingError:
        raise
    except Exception as error:  # whatever malformed bytes make msgpack raise
        raise DecodingError(f"malformed msgpack ({error!r})") from error


def _array_from_map(value: dict) -> Any:
    # msgpack-numpy's keys are bytes or, from some versions, text.
    keys = {
        key.decode("ascii", "replace") if isinstance(key, bytes) else key: item for key, item in value.items()
    }
    if "nd" not in keys:
        return value
    if keys["nd"]:
        return _array(keys["data"], keys["type"], keys["shape"])
    return _array(keys["data"], keys["type"], ())[()]


# --- npz ---


def loads_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file; arrays of objects are left out, as reading one would unpickle it."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = {name.removesuffix(".npy"): _load_npy(archive.read(name)) for name in archive.namelist()}
    except (*NPY_ERRORS, zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, zlib.error) as error:
        raise DecodingError(f"a malformed .npz ({error})") from error
    return {name: array for name, array in arrays.items() if array is not None}


def loads_npy(content: bytes) -> np.ndarray:
    """The array of an `.npy` file; one of objects is refused, as reading it would unpickle it."""
    try:
        array = _load_npy(content)
    except NPY_ERRORS as error:
        raise DecodingError(f"a malformed .npy ({error})") from error
    if array is None:
        raise DecodingError("an array of objects; only numbers are read")
    return array


def _load_npy(content: bytes) -> np.ndarray | None:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise DecodingError(f"an array of format version {version}")
    if read_header[version](stream)[2].hasobject:
        return None
    return np.load(io.BytesIO(content), allow_pickle=False)


# --- pickle ---


class _Dtype:
    """Stands for numpy.dtype in a pickle: only the name of a number type, with its byte order."""

    def __init__(self, name: str, align: bool = False, copy: bool = True):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        self.name = state[1].replace("|", "") + self.name


class _Array:
    """Stands for numpy.ndarray in a pickle: made empty, then filled from its shape, type and bytes."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _array(data, dtype.name, shape, "F" if is_fortran else "C")


def _empty_array(kind: type, shape: tuple, code: bytes) -> _Array:
    return _Array()


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    # How protocol 5 writes arrays.
    return _array(data, dtype.name, shape, order)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return _array(data, dtype.name, ())[()]


def _latin1(text: str, encoding: str) -> bytes:
    # How protocol 2 writes bytes.
    return text.encode("latin1")


_ADMITTED = {
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _latin1,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _empty_array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _PlainUnpickler(pickle.Unpickler):
    """Finds only the inert stand-ins above; any other name in a pickle, hence any call, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise DecodingError(f"a pickle that uses {module}.{name}; only plain data is read")
        return _ADMITTED[module, name]


def loads_pickle(content: bytes) -> Any:
    """Decode a pickle of containers, strings, numbers and arrays of numbers; refuse any other."""
    try:
        return _unwrap(_PlainUnpickler(io.BytesIO(content)).load())
    except DecodingError:
        raise
    except Exception as error:  # a malformed pickle can make the unpickler raise anything
        raise DecodingError(f"a malformed pickle ({error!r})") from error


def _unwrap(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unwrap(item) for item in value]
    return value
