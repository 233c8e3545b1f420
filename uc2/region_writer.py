"""Writing a region store: Arrow shards and the `store.json` that lists them."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from uc2.atomic_files import atomic_directory
from uc2.data_error import DataError, Found
from uc2.region_codecs import Codec, Float16, describe_codec
from uc2.region_rows import RegionRow, tidy_region_row

_ROWS_PER_BATCH = 128  # rows held in memory while writing: 50 MB at 100 regions of 2,048 float16 numbers
MANIFEST = "store.json"
SCHEMA = pa.schema(
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
CLASS_PROBS = pa.field("class_probs", pa.large_binary())


def write_region_store(
    rows: Iterable[RegionRow],
    path: str | os.PathLike,
    *,
    rows_per_shard: int = 1000,
    overwrite: bool = False,
    source: str | os.PathLike | None = None,
    made_from: list | None = None,
    codecs: Mapping[str, Codec] | None = None,
) -> Path:
    """Write `rows` as a region store, streaming; the whole store appears at the end, or nothing does.

    Features and probabilities become float16, regions are sorted by falling score, box edges that overshoot
    the image by at most a pixel are clipped. All rows have the same feature width and number of classes.

    Args:
        rows: one per image, consumed once.
        path: the directory to create.
        rows_per_shard: images per Arrow file.
        overwrite: replace an existing store (at the end, by renaming).
        source: the file that errors name, if the rows come from one.
        made_from: recorded in `store.json`: the files of a conversion, by which a stale store is recognised.
        codecs: of `features` and `class_probs`, where they are not kept in float16.

    Raises:
        DataError: at the first row that breaks the format.
        FileExistsError: `path` exists and `overwrite` is not set.
    """
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}; expected at least 1")
    with atomic_directory(path, overwrite=overwrite) as directory:
        writer = _StoreWriter(directory, rows_per_shard, source or path, codecs or {})
        writer.write(rows)
        writer.finish(made_from)
    return Path(path)


class _StoreWriter:
    """Collects checked rows into record batches and shards inside `directory`."""

    def __init__(self, directory: Path, rows_per_shard: int, source, codecs: Mapping[str, Codec]):
        self.directory, self.rows_per_shard, self.source = directory, rows_per_shard, source
        self.codecs = codecs
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
        schema = SCHEMA if self.widths[1] is None else SCHEMA.append(CLASS_PROBS)
        with pa.OSFile(str(self.directory / name), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            while count < self.rows_per_shard:
                number, row = next(numbered, (None, None))
                if number is None:
                    break
                if len(pending) == _ROWS_PER_BATCH:
                    writer.write_batch(_record_batch(pending, schema, self.codecs))
                    pending.clear()
                pending.append(self._checked(row, number))
                count += 1
            writer.write_batch(_record_batch(pending, schema, self.codecs))
        self.shards.append(shard_entry(self.directory / name, count))

    def _checked(self, row: RegionRow, number: int) -> RegionRow:
        row = tidy_region_row(row, file=self.source, number=number)
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

    def finish(self, made_from: list | None) -> None:
        manifest = {
            "format": "uc2-region-store",
            "rows": len(self.places),
            "feature_size": self.widths[0],
            "num_classes": self.widths[1],
            "shards": self.shards,
        }
        if self.codecs:
            manifest["encodings"] = {field: describe_codec(codec) for field, codec in self.codecs.items()}
        if made_from is not None:
            manifest["made_from"] = made_from
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _record_batch(rows: Sequence[RegionRow], schema: pa.Schema, codecs: Mapping[str, Codec]) -> pa.RecordBatch:
    offsets = pa.array(np.cumsum([0] + [len(row.boxes) for row in rows]), pa.int32())

    def lists(arrays: Sequence[np.ndarray], element: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), element))

    def cells(field: str) -> list[bytes]:
        matrices = [getattr(row, field) for row in rows]
        codec = codecs.get(field) or Float16(matrices[0].shape[1])
        return [codec.encode(matrix).tobytes() for matrix in matrices]

    corners = pa.array(np.concatenate([row.boxes.reshape(-1) for row in rows]), pa.float32())
    columns = {
        "image_id": [row.image_id for row in rows],
        "image_height": [int(row.image_height) for row in rows],
        "image_width": [int(row.image_width) for row in rows],
        "boxes": pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(corners, 4)),
        "features": cells("features"),
        "class_ids": lists([row.class_ids for row in rows], pa.int32()),
        "class_scores": lists([row.class_scores for row in rows], pa.float32()),
    }
    if "class_probs" in schema.names:
        columns["class_probs"] = cells("class_probs")
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def shard_entry(file: Path, rows: int) -> dict:
    """What `store.json` says of a shard."""
    return {"file": file.name, "rows": rows, "bytes": file.stat().st_size, "crc32": crc32(file)}


def crc32(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def read_manifest(directory: Path) -> dict:
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            file=file, found=Found(f"{error!r}"), expected="the description of a region store"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != "uc2-region-store":
        raise DataError(file=file, found=manifest, expected="the description of a region store")
    _check_numbers(file, manifest, "", ("rows", "feature_size"))
    if manifest.setdefault("num_classes", None) is not None:
        _check_numbers(file, manifest, "", ("num_classes",))
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not shards or not all(isinstance(shard, dict) for shard in shards):
        raise DataError(file=file, field="shards", found=shards, expected="a list of shards")
    for number, shard in enumerate(shards):
        _check_numbers(file, shard, f"shards[{number}].", ("rows", "bytes"))
        if not isinstance(shard.get("file"), str) or "\0" in shard["file"]:
            raise DataError(file=file, field=f"shards[{number}].file", found=shard.get("file"), expected="a name")
    return manifest


def _check_numbers(file: Path, values: dict, place: str, names: Sequence[str]) -> None:
    for name in names:
        value = values.get(name)
        if not isinstance(value, int) or not 0 < value < 2**63:
            raise DataError(file=file, field=place + name, found=value, expected="a positive whole number")
