"""Copies region stores with smaller columns: the `quantise` command of `prepare_corpus.py`.

    python prepare_corpus.py quantise --input regions --output regions-int8 --features int8
    python prepare_corpus.py quantise --input regions --output regions-pq --features pq --group_size 8

The copy reads as any store does, giving float16; docs/scale.md has its size and what it costs in accuracy.
Killed and started again, it goes on.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from uc2.arguments import check_minimum, parse
from uc2.atomic_files import atomic_file, sole_writer
from uc2.data_error import OptionError
from uc2.file_versions import file_versions
from uc2.region_codecs import CENTROIDS, CODEBOOK, Codec, Int8, ProductQuantised, TopClasses, read_codebook
from uc2.region_store import RegionStore
from uc2.region_writer import read_manifest
from uc2.resumable_store import ResumableStore, ShardKey

logger = logging.getLogger(__name__)


@dataclass
class QuantisationArguments:
    input: list[str] = field(metadata={"help": "Region stores."})
    output: str = field(metadata={"help": "The region store to write; progress is kept in <output>.partial."})
    features: Literal["float16", "int8", "pq"] = field(
        default="float16", metadata={"help": "A byte per number, or (product quantisation) per group of numbers."}
    )
    group_size: int = field(default=8, metadata={"help": "pq: neighbouring numbers that share a byte."})
    codebook: str | None = field(
        default=None, metadata={"help": "pq: a store made by this command, whose codebook is taken over."}
    )
    sample: int = field(default=20_000, metadata={"help": "pq: regions that the codebook is learnt from."})
    iterations: int = field(default=15, metadata={"help": "pq: steps of k-means."})
    top_classes: int | None = field(
        default=None, metadata={"help": "Keep this many of the class probabilities, by default all."}
    )
    seed: int = field(default=0, metadata={"help": "pq: draws the sample and the first centroids."})
    rows_per_shard: int = field(default=1000, metadata={"help": "Images per file of the store."})

    def __post_init__(self):
        check_minimum(self, group_size=1, sample=CENTROIDS, iterations=1, rows_per_shard=1)
        if self.features == "float16" and self.top_classes is None:
            raise OptionError("nothing to do: give --features int8 or pq, or --top_classes")

    def plan(self) -> dict:
        """What the content of the copy depends on."""
        return {k: v for k, v in vars(self).items() if k != "output"} | {"input": file_versions(self.input)}


def learn_codebook(
    store: RegionStore, group_size: int, *, sample: int = 20_000, iterations: int = 15, seed: int = 0
) -> np.ndarray:
    """Centroids of every group of neighbouring numbers, by k-means on about `sample` regions of random images.

    Returns:
        (F / group_size, 256, group_size) float16.

    Raises:
        OptionError: the width F is no multiple of `group_size`, or the store has too few regions.
    """
    if store.feature_size % group_size:
        raise OptionError(f"--group_size {group_size} does not divide the features' width {store.feature_size}")
    rng = np.random.default_rng(seed)
    counts = store.region_counts
    order = rng.permutation(len(counts))
    chosen = order[: np.searchsorted(np.cumsum(counts[order]), sample) + 1]
    ids = list(store)
    features = np.concatenate([store[ids[index]].features for index in sorted(chosen)])
    if len(features) < CENTROIDS:
        raise OptionError(f"a codebook needs at least {CENTROIDS} regions; there are {len(features)}")
    groups = torch.from_numpy(features).unflatten(1, (-1, group_size))
    generator = torch.Generator().manual_seed(seed)
    codebook = [
        _k_means(groups[:, number].float(), iterations, generator)
        for number in tqdm(range(groups.shape[1]), desc="codebook", unit="group")
    ]
    return torch.stack(codebook).half().numpy()


def _k_means(points: torch.Tensor, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """(n, d) -> (256, d) centroids; one that no point is nearest to stays where it is."""
    centroids = points[torch.randperm(len(points), generator=generator)[:CENTROIDS]].clone()
    for _ in range(iterations):
        nearest = (points @ centroids.T - centroids.square().sum(1) / 2).argmax(1)
        counts = torch.bincount(nearest, minlength=CENTROIDS)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def _codecs(args: QuantisationArguments, source: RegionStore, partial: Path) -> dict[str, Codec]:
    """The codecs of the copy; a codebook is learnt once and kept in it."""
    codecs: dict[str, Codec] = {}
    if args.features == "int8":
        codecs["features"] = Int8(source.feature_size)
    elif args.features == "pq":
        file = partial / CODEBOOK
        if not file.exists():
            if args.codebook:
                codebook = read_codebook(Path(args.codebook) / CODEBOOK, source.feature_size)
            else:
                options = {"sample": args.sample, "iterations": args.iterations, "seed": args.seed}
                codebook = learn_codebook(source, args.group_size, **options)
            with atomic_file(file) as temporary, open(temporary, "wb") as stream:
                np.save(stream, codebook)
        codecs["features"] = ProductQuantised(read_codebook(file, source.feature_size))
    if args.top_classes is not None:
        classes = source.num_classes or 0
        if not 0 < args.top_classes <= classes:
            raise OptionError(f"--top_classes is {args.top_classes}; the store has probabilities of {classes} classes")
        codecs["class_probs"] = TopClasses(classes, args.top_classes)
    return codecs


def quantise(args: QuantisationArguments) -> None:
    """Writes the copy, shard by shard."""
    source = RegionStore(args.input)
    with sole_writer(args.output):
        store = ResumableStore(args.output, args.plan())
        if not store.is_complete(1):
            codecs, done, ids = _codecs(args, source, store.partial), store.done(), list(source)
            starts = range(0, len(ids), args.rows_per_shard)
            for chunk, start in enumerate(tqdm(starts, desc="quantise", unit="shard")):
                key = ShardKey(0, chunk)
                if not done.has_shard(key):
                    rows = (source[image_id] for image_id in ids[start : start + args.rows_per_shard])
                    store.write_shard(key, rows, args.input[0], codecs)
            store.note_chunks(0, len(starts))
        store.finish()


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    (args,) = parse((QuantisationArguments,), sys.argv[1:] if argv is None else argv)
    quantise(args)
    before, after = (sum(map(_num_bytes, RegionStore(paths).paths)) for paths in (args.input, args.output))
    logger.info("%s: %.1f MB, %.1f %% of the original's", args.output, after / 1e6, 100 * after / before)


def _num_bytes(directory: Path) -> int:
    return sum(shard["bytes"] for shard in read_manifest(directory)["shards"])


if __name__ == "__main__":
    main()
