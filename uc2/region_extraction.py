"""Photographs -> region store: the `regions` command of `prepare_corpus.py`.

Images are listed in a fixed order, and every `images_per_shard` of them make a shard of the store. Process r
of n does the shards r, r + n, … (or whole tar files, if there are at least n), batch by batch; a finished
batch is on disk, so a restart computes only the batches that were under way. The store's bytes do not depend
on restarts or on the number of processes.
"""

import logging
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

from processing_uc2.image_processing_uc2_detector import UC2DetectorImageProcessor
from uc2.arguments import parse
from uc2.atomic_files import sole_writer
from uc2.child_processes import exit_with_parent
from uc2.data_error import DataError, OptionError
from uc2.image_sources import ImageItem, ImageUnit, open_images
from uc2.region_extractors import GridFeatures, load_detector, regions_from_images
from uc2.region_rows import RegionRow, tidy_region_row
from uc2.resumable_store import Done, ResumableStore, ShardKey

__all__ = ["RegionExtractionArguments", "main", "regions_from_images"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
Extractor = Callable[[Sequence[Image.Image], Sequence[str]], list[RegionRow]]


@dataclass
class RegionExtractionArguments:
    """What to read, what to compute, where to write. The content depends on all but the last group."""

    images: list[str] = field(
        metadata={"help": "A directory of images, a data set (saved, or a Hub id), or webdataset .tar files."}
    )
    output: str = field(metadata={"help": "The region store to write; progress is kept in <output>.partial."})
    detector: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a UC2RegionDetector or of unc-nlp/frcnn-vg-finetuned."},
    )
    backbone: str | None = field(
        default=None,
        metadata={"help": "Instead of a detector: a timm model whose feature map is pooled to a grid."},
    )
    grid: int = field(default=7, metadata={"help": "With --backbone: grid x grid regions per image."})
    min_regions: int = field(default=10, metadata={"help": "Regions per image, at least."})
    max_regions: int = field(
        default=100, metadata={"help": "Regions per image, at most; equal for a fixed number."}
    )
    region_threshold: float = field(
        default=0.2, metadata={"help": "Beyond min_regions, regions score above this; below 0: no threshold."}
    )
    proposals: int | None = field(
        default=None,
        metadata={
            "help": "Boxes described per image, of which regions are selected; default: the detector's."
        },
    )
    class_probs: bool = field(
        default=False, metadata={"help": "Store the probabilities of all object classes."}
    )
    shortest_edge: int = field(default=800, metadata={"help": "Images are resized to this shorter edge …"})
    longest_edge: int = field(default=1333, metadata={"help": "… unless their longer edge exceeds this."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Computing precision."}
    )
    split: str = field(default="train", metadata={"help": "Split of a data set."})
    image_column: str = field(
        default="image", metadata={"help": "Column of a data set that holds the image."}
    )
    id_column: str = field(
        default="image_id", metadata={"help": "Column of a data set that holds the image id."}
    )
    batch_size: int = field(default=8, metadata={"help": "Images computed together."})
    images_per_shard: int = field(default=1000, metadata={"help": "Images per file of the store."})
    num_processes: int = field(
        default=1, metadata={"help": "Processes on this machine, one per GPU; or use `accelerate launch`."}
    )
    num_workers: int = field(default=4, metadata={"help": "Threads per process that read and decode images."})

    def __post_init__(self):
        if (self.detector is None) == (self.backbone is None):
            raise OptionError("Give either --detector or --backbone.")
        for name in ("grid", "batch_size", "images_per_shard", "num_processes", "num_workers", "min_regions"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.min_regions > self.max_regions:
            raise OptionError(f"--min_regions {self.min_regions} exceeds --max_regions {self.max_regions}.")

    def plan(self, units: Sequence[ImageUnit]) -> dict:
        """What the content of the store depends on."""
        incidental = ("output", "num_processes", "num_workers")
        settings = {name: value for name, value in vars(self).items() if name not in incidental}
        return settings | {"units": [[unit.name, unit.version] for unit in units]}


def make_extractor(arguments: RegionExtractionArguments, device: str) -> Extractor:
    dtype = getattr(torch, arguments.dtype)
    if arguments.backbone is not None:
        return GridFeatures(arguments.backbone, arguments.grid, device, dtype)
    overrides = {} if arguments.proposals is None else {"proposals_after_nms": arguments.proposals}
    detector = load_detector(arguments.detector, **overrides).eval().to(device, dtype)
    size = {"shortest_edge": arguments.shortest_edge, "longest_edge": arguments.longest_edge}
    image_processor = UC2DetectorImageProcessor(size=size)

    def extract(images: Sequence[Image.Image], image_ids: Sequence[str]) -> list[RegionRow]:
        return regions_from_images(
            detector,
            images,
            image_processor=image_processor,
            image_ids=image_ids,
            class_probs=arguments.class_probs,
            min_detections=arguments.min_regions,
            max_detections=arguments.max_regions,
            score_threshold=arguments.region_threshold,
        )

    return extract


# --- work of one process ---


@dataclass(frozen=True)
class Batch:
    key: ShardKey
    number: int
    items: list[ImageItem]
    shard_batches: int  # batches of its whole shard


@dataclass(frozen=True)
class Worker:
    """Process `rank` of `world_size`."""

    rank: int
    world_size: int

    def owns(self, key: ShardKey, num_units: int) -> bool:
        # Each process reads its own tar files, as long as there are enough of them.
        number = key.unit if num_units >= self.world_size else key.unit + key.chunk
        return number % self.world_size == self.rank

    def lists(self, unit: int, num_units: int) -> bool:
        """Whether this process has shards in the unit."""
        return num_units < self.world_size or unit % self.world_size == self.rank

    def counts(self, unit: int, num_units: int) -> bool:
        """Whether this process records the unit's number of shards: exactly one does."""
        return self.rank == (0 if num_units < self.world_size else unit % self.world_size)

    def shards(
        self, units: Sequence[ImageUnit], store: ResumableStore, done: Done, images_per_shard: int
    ) -> Iterator[tuple[ShardKey, list[ImageItem]]]:
        """This process' shards that were not done before, and their images."""
        for number, unit in enumerate(units):
            if not self.lists(number, len(units)) or done.has_unit(number):
                continue
            chunk = -1
            for chunk, items in enumerate(in_runs(unit.items(), images_per_shard)):
                key = ShardKey(number, chunk)
                if self.owns(key, len(units)) and not done.has_shard(key):
                    yield key, items
            if self.counts(number, len(units)) and number not in done.chunks:
                store.note_chunks(number, chunk + 1)

    def num_images_left(
        self,
        units: Sequence[ImageUnit],
        store: ResumableStore,
        done: Done,
        arguments: RegionExtractionArguments,
    ) -> int | None:
        """Images that this process has yet to do, where the source knows its length."""
        if any(unit.length is None for unit in units):
            return None
        left = 0
        for number, unit in enumerate(units):
            for chunk, shard in enumerate(in_runs(range(unit.length), arguments.images_per_shard)):
                key = ShardKey(number, chunk)
                if self.owns(key, len(units)) and not done.has_shard(key):
                    batches = enumerate(in_runs(shard, arguments.batch_size))
                    left += sum(len(batch) for i, batch in batches if not store.has_batch(key, i))
        return left


def batches_to_do(
    shards: Iterable[tuple[ShardKey, list[ImageItem]]], store: ResumableStore, batch_size: int
) -> Iterator[Batch]:
    """The batches of these shards that were not done before."""
    for key, items in shards:
        runs = list(in_runs(items, batch_size))
        left = [number for number in range(len(runs)) if not store.has_batch(key, number)]
        if not left:  # a kill came between the last batch and the shard
            store.finish_shard(key, len(runs))
        for number in left:
            yield Batch(key, number, runs[number], len(runs))


def in_runs(items: Iterable, length: int) -> Iterator[list]:
    """Lists of `length` consecutive items; the last may be shorter."""
    items = iter(items)
    while run := list(islice(items, length)):
        yield run


def decode_ahead(
    batches: Iterable[Batch], num_workers: int
) -> Iterator[tuple[Batch, list[tuple], list[dict]]]:
    """Batches, their decoded images and a report of the others; the next batch is decoded meanwhile."""
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append((batch, [pool.submit(_decode, item) for item in batch.items]))
            if len(waiting) > 1:
                yield _decoded(*waiting.popleft())
        while waiting:
            yield _decoded(*waiting.popleft())


def _decode(item: ImageItem) -> tuple[Image.Image | None, str]:
    try:
        return item.decode(), ""
    except Exception as error:  # decoders raise many kinds on damaged files; the reason goes into the report
        return None, f"{type(error).__name__}: {error}"


def _decoded(batch: Batch, futures: list) -> tuple[Batch, list[tuple], list[dict]]:
    results = list(zip(batch.items, (future.result() for future in futures), strict=True))
    images = [(item, image) for item, (image, _) in results if image is not None]
    return batch, images, [_skip(item, reason) for item, (image, reason) in results if image is None]


def _skip(item: ImageItem, reason: str) -> dict:
    logger.warning("%s is skipped: %s", item.name, reason)
    return {"file": item.name, "image_id": item.image_id, "reason": reason}


def extract_batch(extractor: Extractor, images: list[tuple]) -> tuple[list[RegionRow], list[dict]]:
    """Rows of the decoded images, and a report of those whose regions no store can hold (none found, NaN)."""
    if not images:
        return [], []
    rows, skipped = [], []
    computed = extractor([image for _, image in images], [item.image_id for item, _ in images])
    for (item, _), row in zip(images, computed, strict=True):
        try:
            rows.append(tidy_region_row(row))
        except DataError as error:
            skipped.append(_skip(item, str(error)))
    return rows, skipped


def run_worker(worker: Worker, arguments: RegionExtractionArguments) -> None:
    """Does this process' share of the store."""
    units = open_units(arguments)
    store = ResumableStore(arguments.output, arguments.plan(units))
    done = store.done()
    if store.is_complete(len(units)):
        return
    extractor = make_extractor(arguments, pick_device(worker.rank))
    shards = worker.shards(units, store, done, arguments.images_per_shard)
    batches = decode_ahead(batches_to_do(shards, store, arguments.batch_size), arguments.num_workers)
    total = worker.num_images_left(units, store, done, arguments)
    with _progress_bar(total, worker) as bar:
        for batch, images, unreadable in batches:
            rows, unusable = extract_batch(extractor, images)
            store.write_batch(batch.key, batch.number, rows, unreadable + unusable)
            store.finish_shard(batch.key, batch.shard_batches)
            bar.update(len(batch.items))


def _progress_bar(total: int | None, worker: Worker) -> tqdm:
    """Images per second and the time left, for the first process' share."""
    interval = 0.5 if sys.stderr.isatty() else 10  # seconds; log files need fewer lines
    description = "regions" if worker.world_size == 1 else f"regions, process 1 of {worker.world_size}"
    return tqdm(total=total, unit="image", disable=worker.rank > 0, mininterval=interval, desc=description)


def open_units(arguments: RegionExtractionArguments) -> list[ImageUnit]:
    return open_images(
        arguments.images,
        split=arguments.split,
        image_column=arguments.image_column,
        id_column=arguments.id_column,
    )


def pick_device(rank: int) -> str:
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


# --- all processes ---


def main(argv: list[str] | None = None) -> None:
    """The `regions` sub-command; see `RegionExtractionArguments`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (arguments,) = parse([RegionExtractionArguments], sys.argv[1:] if argv is None else argv)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    worker = Worker(int(os.environ["RANK"]), launched) if launched > 1 else Worker(0, arguments.num_processes)
    if worker.rank > 0:
        run_worker(worker, arguments)
        return
    with sole_writer(arguments.output):
        ranks = range(1, worker.world_size) if launched == 1 else ()
        helpers = [_start(Worker(rank, worker.world_size), arguments) for rank in ranks]
        try:
            run_worker(worker, arguments)
            _finish(arguments, helpers)
        finally:
            for helper in helpers:
                helper.terminate()


def _start(worker: Worker, arguments: RegionExtractionArguments) -> multiprocessing.Process:
    # A forked process could not use CUDA.
    process = multiprocessing.get_context("spawn").Process(
        target=_run_helper, args=(worker, arguments), daemon=True
    )
    process.start()
    return process


def _run_helper(worker: Worker, arguments: RegionExtractionArguments) -> None:
    exit_with_parent()
    run_worker(worker, arguments)


def _finish(arguments: RegionExtractionArguments, helpers: list[multiprocessing.Process]) -> None:
    """Waits for the other processes' shards, then gives the store its name."""
    units = open_units(arguments)
    store = ResumableStore(arguments.output, arguments.plan(units))
    while not store.is_complete(len(units)):
        if any(helper.exitcode for helper in helpers):
            raise RuntimeError("A process failed (see above); start again with the same command to continue.")
        time.sleep(POLL_SECONDS)
    counts = store.finish()
    logger.info(
        "%s: regions of %d images, %d skipped (skipped.jsonl)",
        store.path,
        counts["images"],
        counts["skipped"],
    )


if __name__ == "__main__":
    main()
