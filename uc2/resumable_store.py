"""A region store that is written piece by piece and continued after the writer was killed at any moment.

While it grows, the store is the directory `<path>.partial`. Its sub-directory `progress` holds each finished
batch until the batches of a shard are joined into the shard's file; every file is written beside its place
and then renamed. Several processes may write, each its own shards. At the end `store.json` is added and the
directory takes its final name.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from uc2.arrow_files import arrow_batches
from uc2.atomic_files import write_json
from uc2.data_error import DataError, Found, OptionError
from uc2.region_codecs import Codec
from uc2.region_rows import RegionRow
from uc2.region_store import RegionStore
from uc2.region_writer import MANIFEST, read_manifest, shard_entry, write_region_store
from uc2.rows import write_jsonl

PLAN = "settings.json"
REPORT = "skipped.jsonl"


@dataclass(frozen=True, order=True)
class ShardKey:
    """Which images a shard holds: the `chunk`-th run of so many images of a unit of the source."""

    unit: int
    chunk: int

    @property
    def name(self) -> str:
        return f"shard-{self.unit:05d}-{self.chunk:06d}"


@dataclass(frozen=True)
class Done:
    """What was finished at some moment: shards, and the number of shards of the units that were listed."""

    shards: frozenset[str]
    chunks: dict[int, int]

    def has_shard(self, key: ShardKey) -> bool:
        return key.name in self.shards

    def has_unit(self, unit: int) -> bool:
        return unit in self.chunks and all(
            self.has_shard(ShardKey(unit, chunk)) for chunk in range(self.chunks[unit])
        )


class ResumableStore:
    """
    Args:
        path: the store to write.
        plan: every setting that the content depends on, as JSON. A store begun with another plan is not
            continued.

    Raises:
        OptionError: there is an unfinished or finished store of another plan.
    """

    def __init__(self, path: str | os.PathLike, plan: dict):
        self.path, self.plan = Path(path), plan
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.progress = self.partial / "progress"
        # The unfinished one first: another process may be giving it its final name just now.
        begun = [directory for directory in (self.partial, self.path) if (directory / PLAN).exists()]
        for directory in begun:
            self._check_plan(directory)
        if not begun and self.path.exists():
            raise OptionError(f"{self.path} exists, and not as a store made here; choose another place.")
        if not begun:
            self.progress.mkdir(parents=True, exist_ok=True)
            write_json(plan, self.partial / PLAN)

    @property
    def finished(self) -> bool:
        return (self.path / PLAN).exists()

    def _check_plan(self, directory: Path) -> None:
        found = _read_json(directory / PLAN)
        changed = sorted(
            key for key in found.keys() | self.plan.keys() if found.get(key) != self.plan.get(key)
        )
        if changed:
            key = changed[0]
            raise OptionError(
                f"{directory} was begun with other settings: {key} was {found.get(key)!r} and is now "
                f"{self.plan.get(key)!r}. Take the same settings, or another output, or remove it."
            )

    # --- batches and shards ---

    def done(self) -> Done:
        """A snapshot. Take it once per process: the one that finishes the store removes the records."""
        shards = frozenset(file.stem for file in self.progress.glob("shard-*.json"))
        units = self.progress.glob("unit-*.json")
        chunks = {
            int(file.stem.removeprefix("unit-")): _read_json(file)["chunks"] for file in units
        }
        return Done(shards, chunks)

    def has_batch(self, key: ShardKey, batch: int) -> bool:
        return (self._batch(key, batch) / REPORT).exists()

    def _batch(self, key: ShardKey, batch: int) -> Path:
        return self.progress / key.name / f"{batch:05d}"

    def write_batch(self, key: ShardKey, batch: int, rows: Sequence[RegionRow], skipped: list[dict]) -> None:
        """Adds a finished batch: its regions, and {"file", "image_id", "reason"} of each image without."""
        if rows:
            write_region_store(rows, self._batch(key, batch) / "store", overwrite=True)
        write_jsonl(skipped, self._batch(key, batch) / REPORT)

    def finish_shard(self, key: ShardKey, num_batches: int) -> bool:
        """Joins the shard's batches into its file, if all are there; gives whether they were."""
        if not all(self.has_batch(key, batch) for batch in range(num_batches)):
            return False
        batches = [self._batch(key, batch) for batch in range(num_batches)]
        stores = [batch / "store" for batch in batches if (batch / "store").exists()]
        record = {
            "skipped": [line for batch in batches for line in _read_json_lines(batch / REPORT)],
            "shard": None,
        }
        if stores:
            record["manifest"] = read_manifest(stores[0])
            record["shard"] = self._join(stores, f"{key.name}.arrow")
        write_json(record, self.progress / f"{key.name}.json")
        shutil.rmtree(
            self.progress / key.name, ignore_errors=True
        )  # the finishing process may remove it first
        return True

    def write_shard(
        self,
        key: ShardKey,
        rows: Iterable[RegionRow],
        source: str,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        """Adds a whole shard at once; `source` is what errors name, `codecs` as for `write_region_store`.

        Raises:
            DataError: a row breaks the format, or has another width than those of the first shard.
        """
        work = self.progress / key.name
        options = {"rows_per_shard": sys.maxsize, "overwrite": True, "source": source, "codecs": codecs}
        write_region_store(rows, work / "store", **options)
        manifest = read_manifest(work / "store")
        (shard,) = manifest["shards"]
        self._check_like_first(manifest, source)
        os.replace(work / "store" / shard["file"], self.partial / f"{key.name}.arrow")
        record = {"shard": shard | {"file": f"{key.name}.arrow"}, "manifest": manifest}
        write_json(record, self.progress / f"{key.name}.json")
        shutil.rmtree(work)

    def _check_like_first(self, manifest: dict, source: str) -> None:
        record = self.progress / f"{ShardKey(0, 0).name}.json"
        first = _read_json(record)["manifest"] if record.exists() else manifest
        for field in ("feature_size", "num_classes"):
            if manifest[field] != first[field]:
                expected = f"{first[field]} as before"
                raise DataError(file=source, field=field, found=manifest[field], expected=expected)

    def image_ids(self, key: ShardKey) -> list[str]:
        """The images of a finished shard."""
        batches = arrow_batches(self.partial / f"{key.name}.arrow")
        return [image_id for batch in batches for image_id in batch.column("image_id").to_pylist()]

    def discard(self) -> None:
        """Removes what was begun."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _join(self, stores: list[Path], name: str) -> dict:
        temporary, rows = self.progress / f"{name}.tmp", 0
        with pa.OSFile(str(temporary), "wb") as sink:
            writer = None
            for store in stores:
                for shard in read_manifest(store)["shards"]:
                    with (
                        pa.memory_map(str(store / shard["file"])) as source,
                        pa.ipc.open_file(source) as reader,
                    ):
                        writer = writer or pa.ipc.new_file(sink, reader.schema)
                        for index in range(reader.num_record_batches):
                            writer.write_batch(reader.get_batch(index))
                    rows += shard["rows"]
            writer.close()
        entry = shard_entry(temporary, rows)
        os.replace(temporary, self.partial / name)
        return entry | {"file": name}

    def note_chunks(self, unit: int, chunks: int) -> None:
        """Records how many shards a unit of the source has, once it was listed to its end."""
        write_json({"chunks": chunks}, self.progress / f"unit-{unit:05d}.json")

    # --- the end ---

    def is_complete(self, num_units: int) -> bool:
        if self.finished or (self.partial / MANIFEST).exists():
            return True
        done = self.done()
        return all(done.has_unit(unit) for unit in range(num_units))

    def finish(self) -> dict:
        """Gives the store its final name. Call it in one process, once `is_complete`; gives counts.

        Raises:
            DataError: no image could be read, or two images have one id.
        """
        if not self.finished:
            if not (self.partial / MANIFEST).exists():
                self._write_manifest()
            RegionStore(self.partial)  # checks the shards' structure and that image ids are unique
            # From here on progress is not needed; after a kill, the restart goes on here.
            shutil.rmtree(self.progress, ignore_errors=True)
            for leftover in self.partial.glob(".*.tmp"):  # of killed writers
                leftover.unlink()
            os.replace(self.partial, self.path)
        report = self.path / REPORT
        skipped = len(_read_json_lines(report)) if report.exists() else 0
        return {"images": read_manifest(self.path)["rows"], "skipped": skipped}

    def _write_manifest(self) -> None:
        records = [_read_json(file) for file in sorted(self.progress.glob("shard-*.json"))]
        if any("skipped" in record for record in records):  # sources whose images can fail
            skipped = [line for record in records for line in record["skipped"]]
            write_jsonl(skipped, self.partial / REPORT)
        records = [record for record in records if record["shard"]]
        if not records:
            raise DataError(
                file=self.partial / REPORT, found=Found("every image skipped"), expected="readable images"
            )
        shards = [record["shard"] for record in records]
        rows = sum(shard["rows"] for shard in shards)
        write_json({**records[0]["manifest"], "rows": rows, "shards": shards}, self.partial / MANIFEST)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_json_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]
