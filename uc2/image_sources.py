"""Where photographs come from: a directory, a `datasets` data set, or webdataset tar files.

A source is split into units (one tar file each; a directory or a data set is one unit). The order of a
unit's images never changes, so that work can be divided and resumed by position.
"""

import glob
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from uc2.data_error import DataError, Found


@dataclass(frozen=True)
class ImageItem:
    """One image that has not been read yet."""

    image_id: str
    name: str  # file, or place within a file, for reports
    read: Callable[[], bytes]

    def decode(self) -> Image.Image:
        """The image in RGB, turned upright by its EXIF orientation. Raises whatever the decoder raises."""
        content = self.read()
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            # Pillow's own message holds a memory address, and reports must not differ between runs.
            raise ValueError(f"no image format is recognised in these {len(content)} bytes") from None
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would cut 16-bit greys off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")


@dataclass(frozen=True)
class ImageUnit:
    """A part of a source; `items` starts from the first image each time it is called."""

    name: str
    items: Callable[[], Iterator[ImageItem]]
    length: int | None  # None where only reading to the end would tell
    version: str  # changes when the images or their order change


def open_images(
    images: Sequence[str], *, split: str = "train", image_column: str = "image", id_column: str = "image_id"
) -> list[ImageUnit]:
    """The units of a source.

    Args:
        images: a directory of images (searched recursively; an image's id is its relative path without the
            ending); or a directory saved by `datasets`, or a Hub data set id, which is streamed; or one or
            several webdataset `.tar` files or patterns of them (an image's id is its key).
        split, image_column, id_column: for data sets.

    Raises:
        DataError: nothing there, or two images with one id.
    """
    tars = [name for pattern in images for name in _expand_tars(pattern)]
    if tars:
        return [_tar_unit(name) for name in tars]
    if len(images) != 1:
        raise DataError(found=list(images), expected="one directory or data set, or .tar files")
    path = Path(images[0])
    if path.is_dir() and not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return [_directory_unit(path)]
    return [_dataset_unit(images[0], split, image_column, id_column)]


def _expand_tars(pattern: str) -> list[str]:
    """Tar files of one argument, sorted; a directory counts if it holds tar files."""
    path = Path(pattern)
    if path.is_dir():
        return sorted(map(str, path.glob("*.tar")))
    if not pattern.endswith(".tar"):
        return []
    found = sorted(glob.glob(pattern))
    if not found:
        raise DataError(file=pattern, found=Found("no such file"), expected="a tar file")
    return found


def _directory_unit(root: Path) -> ImageUnit:
    endings = Image.registered_extensions()
    files = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix.lower() in endings and path.is_file()
    )
    if not files:
        raise DataError(
            file=root, found=Found("no image"), expected="files with the ending of an image format"
        )
    by_id: dict[str, Path] = {}
    for file in files:
        other = by_id.setdefault(file.with_suffix("").as_posix(), file)
        if other is not file:
            raise DataError(
                file=root / file, found=Found("an id that is taken"), expected=f"other than {other}'s"
            )

    def items() -> Iterator[ImageItem]:
        for image_id, file in by_id.items():
            yield ImageItem(image_id, file.as_posix(), (root / file).read_bytes)

    listing = hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()
    return ImageUnit(str(root), items, len(files), listing)


def _tar_unit(file: str) -> ImageUnit:
    endings = Image.registered_extensions()

    def items() -> Iterator[ImageItem]:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                if member.isfile() and f".{ending.lower()}" in endings:
                    image_id = f"{folder}/{key}".strip("./")
                    read = partial(_read_range, file, member.offset_data, member.size)
                    yield ImageItem(image_id, f"{file}:{member.name}", read)

    return ImageUnit(file, items, None, str(Path(file).stat().st_size))


def _read_range(file: str, offset: int, size: int) -> bytes:
    """A member of an uncompressed tar; unlike a `TarFile`, usable by several threads."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _dataset_unit(name: str, split: str, image_column: str, id_column: str) -> ImageUnit:
    if Path(name).is_dir():
        rows = datasets.load_from_disk(name)
        rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        length, version = len(rows), rows._fingerprint
    else:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        # Some formats tell their columns only with the first row.
        rows = rows if rows.column_names is not None else rows._resolve_features()
        length, version = None, str(rows.info.version)
    for column in (image_column, id_column):
        if column not in (rows.column_names or ()):
            raise DataError(
                file=name,
                field=column,
                found=Found(f"columns {rows.column_names}"),
                expected="this column as well",
            )
    if length is not None and len(set(rows[id_column])) < length:
        twice = next(image_id for image_id, count in Counter(rows[id_column]).items() if count > 1)
        raise DataError(file=name, field=id_column, found=twice, expected="every id once (it occurs again)")
    rows = rows.select_columns([image_column, id_column])
    rows = rows.cast_column(image_column, datasets.Image(decode=False))

    def items() -> Iterator[ImageItem]:
        for number, row in enumerate(rows, start=1):
            yield ImageItem(
                str(row[id_column]), f"{name}, row {number}", partial(_stored_bytes, row[image_column])
            )

    return ImageUnit(name, items, length, version)


def _stored_bytes(image: dict) -> bytes:
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
