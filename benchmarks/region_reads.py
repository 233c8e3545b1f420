"""Random reads of region features per CPU second: the region store against UNITER's LMDB with msgpack.

Both hold the same regions in float16, UNITER's one msgpack map of msgpack-numpy arrays per image. A read
ends with features and boxes in the tensors of a padded batch, where a collator puts them. UNITER's data set
makes float32 tensors of every image first; the second comparison leaves even that out and compares the bare
containers.

    python benchmarks/region_reads.py [--images 2000] [--regions 36] [--feature_size 2048]
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import msgpack
import msgpack_numpy
import numpy as np
import torch

from uc2.region_store import RegionRow, RegionStore, write_region_store

BATCH = 32


def make_rows(images: int, regions: int, feature_size: int) -> Iterator[RegionRow]:
    rng = np.random.default_rng(0)
    for number in range(images):
        corners = rng.uniform(0, 300, (regions, 2)).astype(np.float32)
        yield RegionRow(
            image_id=f"image_{number:08d}",
            image_height=480,
            image_width=640,
            boxes=np.concatenate([corners, corners + 100], axis=1),
            features=rng.random((regions, feature_size), dtype=np.float32).astype(np.float16),
            class_ids=rng.integers(0, 1600, regions),
            class_scores=np.sort(rng.random(regions, dtype=np.float32))[::-1],
        )


def write_uniter_lmdb(store: RegionStore, path: Path) -> None:
    with lmdb.open(str(path), map_size=1 << 40) as database, database.begin(write=True) as transaction:
        for row in store.values():
            boxes = row.normalized_boxes
            sizes = boxes[:, 2:] - boxes[:, :2]
            value = {
                "features": row.features,
                "norm_bb": np.concatenate([boxes, sizes], axis=1).astype(np.float16),
                "conf": row.class_scores.astype(np.float16),
            }
            packed = msgpack.dumps(value, default=msgpack_numpy.encode, use_bin_type=True)
            transaction.put(row.image_id.encode(), packed)


Read = Callable[[str, torch.Tensor, torch.Tensor], None]


def store_reader(path: Path) -> Read:
    store = RegionStore(path)

    def read(image_id: str, features: torch.Tensor, boxes: torch.Tensor) -> None:
        row = store[image_id]
        features.numpy()[: len(row.features)] = row.features
        boxes.numpy()[: len(row.features), :4] = row.normalized_boxes

    return read


def lmdb_reader(database: lmdb.Environment, as_float32: bool) -> Read:
    transaction = database.begin(buffers=True)

    def read(image_id: str, features: torch.Tensor, boxes: torch.Tensor) -> None:
        value = msgpack.loads(transaction.get(image_id.encode()), object_hook=msgpack_numpy.decode, raw=False)
        if as_float32:
            image_features = torch.tensor(value["features"]).float()
            image_boxes = torch.tensor(value["norm_bb"]).float()
            features[: len(image_features)] = image_features
            boxes[: len(image_boxes)] = image_boxes
        else:
            features.numpy()[: len(value["features"])] = value["features"]
            boxes.numpy()[: len(value["features"])] = value["norm_bb"]

    return read


def reads_per_cpu_second(read: Read, ids: list[str], features: torch.Tensor, rounds: int) -> float:
    """Median over `rounds` passes through `ids`, after one read that opens the files."""
    boxes = torch.zeros(*features.shape[:2], 6)
    read(ids[0], features[0], boxes[0])
    rates = []
    for _ in range(rounds):
        start = time.process_time()
        for number, image_id in enumerate(ids):
            read(image_id, features[number % BATCH], boxes[number % BATCH])
        rates.append(len(ids) / (time.process_time() - start))
    return float(np.median(rates))


def main(argv: list[str] | None = None) -> float:
    """Print the rates; give the ratio to UNITER's reading."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--feature_size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # CPU seconds of one reading process
    half = torch.zeros(BATCH, options.regions, options.feature_size, dtype=torch.float16)
    ids = [f"image_{number:08d}" for number in np.random.default_rng(1).permutation(options.images)]
    with tempfile.TemporaryDirectory() as directory:
        store, lmdb_path = Path(directory, "store"), Path(directory, "uniter.lmdb")
        write_region_store(make_rows(options.images, options.regions, options.feature_size), store)
        write_uniter_lmdb(RegionStore(store), lmdb_path)
        database = lmdb.open(str(lmdb_path), readonly=True, lock=False, readahead=False)
        contenders = {
            "region store, float16": (store_reader(store), half),
            "LMDB + msgpack, float32 tensors (UNITER)": (lmdb_reader(database, True), half.float()),
            "LMDB + msgpack, kept float16": (lmdb_reader(database, False), half),
        }
        rates = [
            reads_per_cpu_second(read, ids, batch, options.rounds) for read, batch in contenders.values()
        ]
    for name, rate in zip(contenders, rates, strict=True):
        print(f"{name:42s} {rate:9,.0f} images per CPU second   region store: {rates[0] / rate:.2f}x")
    return rates[0] / rates[1]


if __name__ == "__main__":
    main()
