"""Text-image pairs scored per CPU second: `score_matrix` against the plain forward of every pair.

    python benchmarks/retrieval_scoring.py                          # base size, random weights
    python benchmarks/retrieval_scoring.py --model demo/retrieval --captions demo/corpus/captions_test.jsonl \\
        --region_store demo/corpus/regions/test                     # trained: the rank correlation counts

The plain way scores one text after another against batches of images, padded to the longest, with eager
attention, and computes everything anew for every pair, the last layer for every position. "original" is that
with GELU spelt out as the original does (x/2 (1 + erf(x/sqrt 2)), several passes over memory); "plain" has
torch's GELU. All ways run in this process, in turns; a ratio is the median over the rounds of the ratio within
a round, of CPU times, so that other load on the machine matters little. Without a model and captions, regions
are random and texts have 8 to 20 tokens. Two data sets: 36 regions per image, and 10 to 100.

One run on a busy core with AMX, 4 texts x 64 images, base size, random weights, packing of the weights included,
times the original (plain): 36 regions fp32 1.42 (1.14), bf16 5.7 (4.6), int8 4.7 (3.8); 10 to 100 regions fp32
2.1 (1.8), bf16 8.3 (7.1), int8 7.0 (6.0); fp32 within 8e-7 of plain. In fp32 nine tenths of the time are matrix
products at the core's peak, so that no more is to be had exactly. On the trained demo model and its captions the
rank correlation of int8 is 0.9997 and of bf16 1.0000; on random weights 0.977 and 0.998.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from modeling_uc2 import UC2Config, UC2ForRetrieval
from processing_uc2 import UC2Processor
from uc2.region_store import RegionStore
from uc2.retrieval_data import load_test_sets
from uc2.scoring import score_matrix
from uc2.scoring_layers import PRECISIONS

REGION_COUNTS = {"36 regions": (36, 36), "10 to 100 regions": (10, 100)}


class NumberProcessor:
    """Stands in for UC2Processor: texts are token ids, regions are encoded already."""

    def tokenizer(self, text: str, truncation: bool, max_length: int) -> dict:
        return {"input_ids": [0, *map(int, text.split()), 2][:max_length]}

    def encode_regions(self, region: dict) -> dict:
        return region


def make_data(config: UC2Config, num_texts: int, num_images: int, counts: tuple[int, int]):
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(4, 900, rng.integers(6, 19)))) for _ in range(num_texts)]
    images = []
    for _ in range(num_images):
        count = rng.integers(counts[0], counts[1] + 1)
        corners = np.sort(rng.random((count, 2, 2), np.float32), axis=1)
        features = np.maximum(rng.normal(0, 1, (count, config.region_feature_size)), 0).astype(np.float16)
        images.append({"region_features": features, "region_boxes": corners.reshape(count, 4)})
    return texts, images


@torch.inference_mode()
def plain_scores(model, texts: list[str], images: list, processor, batch_size: int) -> np.ndarray:
    scores = np.zeros((len(texts), len(images)), np.float32)
    for row, text in enumerate(texts):
        ids = torch.tensor([processor.tokenizer(text, truncation=True, max_length=64)["input_ids"]])
        for start in range(0, len(images), batch_size):
            batch = [processor.encode_regions(image) for image in images[start : start + batch_size]]
            # Not the model's own forward, which skips what the head does not read of the last layer.
            pooled = model.uc2(input_ids=ids.expand(len(batch), -1), **pad_regions(batch)).pooler_output
            scores[row, start : start + batch_size] = model.score_head(pooled)[:, 0].numpy()
    return scores


def pad_regions(images: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(image["region_boxes"]) for image in images)
    features = torch.zeros(len(images), longest, images[0]["region_features"].shape[1])
    boxes, mask = torch.zeros(len(images), longest, 4), torch.zeros(len(images), longest, dtype=torch.long)
    for row, image in enumerate(images):
        count = len(image["region_boxes"])
        features[row, :count] = torch.from_numpy(np.array(image["region_features"])).float()
        boxes[row, :count] = torch.from_numpy(np.array(image["region_boxes"]))
        mask[row, :count] = 1
    return {"region_features": features, "region_boxes": boxes, "region_attention_mask": mask}


def alternate(
    ways: dict[str, Callable[[], np.ndarray]], rounds: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Run all ways in turns; yield (name, CPU seconds of each round, scores)."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        start = time.process_time()
        scores[name] = way()
        seconds[name].append(time.process_time() - start)
    for name in ways:
        yield name, np.array(seconds[name]), scores[name]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    ranks = [scores.ravel().argsort().argsort() for scores in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])


def load_model(name_or_path: str | None, hidden_act: str) -> UC2ForRetrieval:
    settings = {"attn_implementation": "eager", "hidden_act": hidden_act}
    if name_or_path:
        return UC2ForRetrieval.from_pretrained(name_or_path, **settings).eval()
    torch.manual_seed(0)
    # The size of the vocabulary does not matter here: tokens are looked up.
    return UC2ForRetrieval(UC2Config(vocab_size=1000, **settings)).eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub id of a retrieval model; random weights if left out")
    parser.add_argument("--captions", help="caption rows to score, each language on its own")
    parser.add_argument("--region_store", help="regions of the captions' images")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plain_batch", type=int, default=400, help="images per forward of the plain way")
    parser.add_argument("--batch_tokens", type=int, default=2500)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, "gelu")
    original = load_model(arguments.model, "gelu_python")
    processor = UC2Processor.from_pretrained(arguments.model) if arguments.captions else NumberProcessor()

    print(f"{arguments.threads} thread(s), {arguments.texts} texts x {arguments.images} images\n")
    print("| data | way | pairs per CPU second | x original | x plain | largest difference | Spearman |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for data, (texts, images) in data_sets(arguments, model.config):
        pairs = len(texts) * len(images)
        ways = {
            "original": partial(plain_scores, original, texts, images, processor, arguments.plain_batch),
            "plain": partial(plain_scores, model, texts, images, processor, arguments.plain_batch),
        }
        for precision in arguments.precisions:
            options = {"precision": precision, "batch_tokens": arguments.batch_tokens, "max_length": 64}
            ways[precision] = partial(score_matrix, model, texts, images, processor, **options)
        rows = {name: (seconds, scores) for name, seconds, scores in alternate(ways, arguments.rounds)}
        for name, (seconds, scores) in rows.items():
            ratios = [np.median(rows[base][0] / seconds) for base in ("original", "plain")]
            difference = np.abs(scores - rows["plain"][1]).max()
            rank = spearman(scores, rows["plain"][1])
            print(
                f"| {data} | {name} | {pairs / np.median(seconds):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} "
                f"| {difference:.1e} | {rank:.4f} |",
                flush=True,
            )


def data_sets(arguments, config: UC2Config) -> Iterator[tuple[str, tuple[list[str], list]]]:
    """Name, texts and images: the captions given, or random ones."""
    if not arguments.captions:
        for name, counts in REGION_COUNTS.items():
            yield name, make_data(config, arguments.texts, arguments.images, counts)
        return
    store = RegionStore(arguments.region_store)
    for test_set in load_test_sets({"captions": arguments.captions}, store):
        images = [store[image_id] for image_id in test_set.image_ids[: arguments.images]]
        yield test_set.language, (test_set.texts[: arguments.texts], images)


if __name__ == "__main__":
    main()
