"""Others' region features into a region store, and back.

    python -m uc2.region_import --format tsv --input train2014_obj36.tsv --output regions/
    python -m uc2.region_import --format uniter_lmdb --input feat_th0.2_max100_min10 --output regions/
    python -m uc2.region_import --export --input regions/ --output regions.tsv

Formats: `tsv` (bottom-up attention, LXMERT, VOLTA), `uniter_lmdb` (UNITER, UC2), `volta_lmdb` and
`volta_h5` (VOLTA, IGLUE), `npz` (one `.npz` or `.npy` per image). The store appears whole at the end, or
not at all; malformed input is one `DataError`.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from uc2.atomic_files import remove_leftovers
from uc2.data_error import DataError, Found
from uc2.region_import_files import image_files, read_image_files, read_volta_h5
from uc2.region_import_lmdb import count_entries, read_uniter_lmdb, read_volta_lmdb
from uc2.region_import_tsv import read_tsv, write_tsv
from uc2.region_records import Record, RecordOptions, row_from_record
from uc2.region_store import RegionStore, write_region_store


@dataclass(frozen=True)
class _Format:
    """How to read a format, which option is its own, how to count its images (None: not known beforehand)."""

    read: Callable[..., Iterator[Record]]
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
    overwrite: bool = False,
    **format_options,
) -> Path:
    """Write the regions in `inputs` as the store `output`.

    Args:
        format: one of `FORMATS`.
        inputs: files, databases or directories, read in order.
        options: what the records leave open.
        format_options: `columns` for tsv, `region_counts` for uniter_lmdb.

    Raises:
        DataError: at the first record that is malformed; nothing is written then.
        FileExistsError: `output` exists and `overwrite` is not set.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    chosen, inputs = FORMATS[format], [str(path) for path in inputs]
    if set(format_options) - {chosen.option}:
        raise ValueError(
            f"the format {format} does not take {', '.join(set(format_options) - {chosen.option})}"
        )
    for path in inputs:
        if not os.path.exists(path):
            raise DataError(
                file=path, found=Found("no such file"), expected=f"regions in the format {format}"
            )
    remove_leftovers(output)
    options, total = options or RecordOptions(), chosen.count(inputs) if chosen.count else None
    with tqdm(chosen.read(inputs, **format_options), total=total, unit="image", desc=format) as records:
        return write_region_store(
            (row_from_record(record, options) for record in records),
            output,
            rows_per_shard=rows_per_shard,
            overwrite=overwrite,
            source=", ".join(inputs),
        )


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
    parser.add_argument("--rows_per_shard", type=int, default=1000)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing store")
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
    return import_regions(
        arguments.format,
        arguments.input,
        arguments.output,
        options=RecordOptions(**options),
        rows_per_shard=arguments.rows_per_shard,
        overwrite=arguments.overwrite,
        **own,
    )


if __name__ == "__main__":
    try:
        print(main())
    except (DataError, OSError, ImportError, ValueError) as error:
        sys.exit(str(error))
