"""Others' region features into a region store, and back.

    python prepare_corpus.py import --format tsv --input train2014_obj36.tsv --output regions
    python prepare_corpus.py import --format uniter_lmdb --input feat_th0.2_max100_min10 --output regions
    python prepare_corpus.py import --export --input regions --output regions.tsv

Formats: `tsv` (bottom-up attention, LXMERT, VOLTA), `uniter_lmdb` (UNITER, UC2), `volta_lmdb` and
`volta_h5` (VOLTA, IGLUE), `npz` (one `.npz` or `.npy` per image). Killed and started again, it goes on with
the shard that was under way. Malformed input is one `DataError`, and nothing is left then.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from uc2.atomic_files import sole_writer
from uc2.data_error import DataError, Found, OptionError
from uc2.file_versions import file_versions
from uc2.region_import_files import image_files, read_image_files, read_volta_h5
from uc2.region_import_lmdb import count_entries, read_uniter_lmdb, read_volta_lmdb
from uc2.region_import_tsv import read_tsv, write_tsv
from uc2.region_records import LazyRecord, RecordOptions, row_from_record
from uc2.region_rows import RegionRow
from uc2.region_store import RegionStore
from uc2.region_writer import read_manifest
from uc2.resumable_store import ResumableStore, ShardKey


@dataclass(frozen=True)
class _Format:
    """How to read a format, which option is its own, how to count its images (None: not known beforehand)."""

    read: Callable[..., Iterator[LazyRecord]]
    option: str | None = None
    count: Callable[[Sequence[str]], int] | None = None


def _count_lmdb(paths: Sequence[str]) -> int:
    return sum(map(count_entries, paths))


FORMATS = {
    "tsv": _Format(read_tsv, option="columns"),
    "uniter_lmdb": _Format(read_uniter_lmdb, option="region_counts", count=_count_lmdb),
    "volta_lmdb": _Format(read_volta_lmdb, count=_count_lmdb),
    "volta_h5": _Format(read_volta_h5),
    "npz": _Format(read_image_files, count=lambda paths: len(image_files(paths))),
}


def import_regions(
    format: str,
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    options: RecordOptions | None = None,
    rows_per_shard: int = 1000,
    **format_options,
) -> Path:
    """Write the regions in `inputs` as the store `output`.

    Args:
        format: one of `FORMATS`.
        inputs: files, databases or directories, read in order.
        options: what the records leave open.
        rows_per_shard: images per file of the store; what a kill can cost.
        format_options: `columns` for tsv, `region_counts` for uniter_lmdb.

    Raises:
        DataError: at the first record that is malformed; nothing is left then.
        OptionError: `output`, finished or not, comes from other settings or input.
        OptionError: `output` exists and is something else.
        BlockingIOError: another process is writing `output`.
    """
    if format not in FORMATS:
        raise OptionError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    chosen, inputs = FORMATS[format], [str(path) for path in inputs]
    if set(format_options) - {chosen.option}:
        raise OptionError(
            f"the format {format} does not take {', '.join(set(format_options) - {chosen.option})}"
        )
    for path in inputs:
        if not os.path.exists(path):
            raise DataError(
                file=path, found=Found("no such file"), expected=f"regions in the format {format}"
            )
    if rows_per_shard < 1:
        raise OptionError(f"rows_per_shard is {rows_per_shard}; expected at least 1")
    options = options or RecordOptions()
    settings = {name: str(value) for name, value in (asdict(options) | format_options).items()}
    settings["image_sizes"] = hashlib.sha256(settings["image_sizes"].encode()).hexdigest()[:16]  # may be millions
    plan = {"format": format, "inputs": file_versions(inputs), "rows_per_shard": rows_per_shard} | settings
    with sole_writer(output):
        store = ResumableStore(output, plan)
        try:
            if not store.is_complete(1):
                total = chosen.count(inputs) if chosen.count else None
                # Closed at an error, too: a database that stays open cannot be opened again.
                with (
                    closing(chosen.read(inputs, **format_options)) as records,
                    tqdm(records, total=total, unit="image", desc=format) as shown,
                ):
                    _write_shards(store, shown, options, rows_per_shard, ", ".join(inputs))
            store.finish()
        except DataError:
            store.discard()
            raise
    return Path(output)


def _write_shards(
    store: ResumableStore, records: Iterable[LazyRecord], options: RecordOptions, rows_per_shard: int, source: str
) -> None:
    """Writes the shards that are not there yet."""
    done, numbers, records = store.done(), {}, iter(records)
    for chunk in itertools.count():
        first, key = next(records, None), ShardKey(0, chunk)
        if first is None:
            break
        some = itertools.chain([first], itertools.islice(records, rows_per_shard - 1))
        if done.has_shard(key):
            deque(some, maxlen=0)  # passed over
            numbers |= {image_id: number for number, image_id in enumerate(store.image_ids(key), len(numbers) + 1)}
        else:
            store.write_shard(key, _rows(some, options, numbers), source)
    if not chunk:
        raise DataError(file=source, found=Found("no image"), expected="the regions of at least one image")
    store.note_chunks(0, chunk)


def _rows(records: Iterable[LazyRecord], options: RecordOptions, numbers: dict[str, int]) -> Iterator[RegionRow]:
    """The rows of records; `numbers` are the images seen so far, counted from 1."""
    for decode in records:
        record = decode()
        row = row_from_record(record, options)
        if row.image_id in numbers:
            expected = f"an id of its own (image {numbers[row.image_id]} has it already)"
            raise DataError(
                file=record.file, row=record.number, field="image_id", found=row.image_id, expected=expected
            )
        numbers[row.image_id] = len(numbers) + 1
        yield row


def _read_image_sizes(file: str | None) -> dict[str, tuple[int, int]]:
    if file is None:
        return {}
    try:
        sizes = json.loads(Path(file).read_text(encoding="utf-8"))
        return {image_id: (int(height), int(width)) for image_id, (height, width) in sizes.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        expected = 'a JSON object {"image id": [height, width]}'
        raise DataError(file=file, found=Found(str(error)), expected=expected) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=FORMATS, default="tsv")
    parser.add_argument("--input", nargs="+", required=True, help="files, databases or directories")
    parser.add_argument("--output", required=True, help="the store to write, or the TSV file with --export")
    parser.add_argument("--export", action="store_true", help="write the store --input as a TSV file")
    parser.add_argument("--columns", type=lambda text: text.split(","), help="tsv: names of the columns")
    parser.add_argument("--region_counts", help="uniter_lmdb: nbb_….json, how many first regions to keep")
    parser.add_argument("--image_sizes", help='JSON file {"image id": [height, width]}')
    parser.add_argument(
        "--image_id_pattern", type=re.compile, help="expression whose first group is the image id"
    )
    parser.add_argument("--no_classes", action="store_true", help="accept regions without object classes")
    parser.add_argument("--rows_per_shard", type=int, default=1000, help="images per file of the store")
    return parser


def main(argv: list[str] | None = None) -> Path:
    """The command line; gives the path written."""
    arguments = _parser().parse_args(argv)
    if arguments.export:
        return write_tsv(RegionStore(arguments.input), arguments.output)
    options = {"image_sizes": _read_image_sizes(arguments.image_sizes), "no_classes": arguments.no_classes}
    if arguments.image_id_pattern:
        options["image_id_pattern"] = arguments.image_id_pattern.pattern
    own = {
        name: getattr(arguments, name) for name in ("columns", "region_counts") if getattr(arguments, name)
    }
    output = import_regions(
        arguments.format,
        arguments.input,
        arguments.output,
        options=RecordOptions(**options),
        rows_per_shard=arguments.rows_per_shard,
        **own,
    )
    print(f"{output}: regions of {read_manifest(output)['rows']} images")
    return output


if __name__ == "__main__":
    main()
