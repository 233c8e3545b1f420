"""Text-image pairs scored per CPU second: `score_matrix` against the plain forward of every pair.

    python benchmarks/retrieval_scoring.py                          # base size, random weights
    python benchmarks/retrieval_scoring.py --model runs/retrieval   # trained: the rank correlation counts

The plain way scores one text after another against batches of images, padded to the longest, with eager
attention, and computes everything anew for every pair, as the original does. All ways run in this process,
in turns, on one thread; times are CPU times, so that other load on the machine matters little. Regions are
random, texts have 8 to 20 tokens. Two data sets: 36 regions per image, and 10 to 100.

One run on a busy AVX-512 core, 4 texts x 100 images, random weights: fp32 1.34 and 2.35 times the plain
rate (36, and 10 to 100 regions; largest difference 7e-7), int8 2.9 and 5.7 times (Spearman 0.92).
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from modeling_uc2 import UC2Config, UC2ForRetrieval
from uc2.scoring import score_matrix

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
def plain_scores(model, texts: list[str], images: list[dict], batch_size: int) -> np.ndarray:
    processor = NumberProcessor()
    scores = np.zeros((len(texts), len(images)), np.float32)
    for row, text in enumerate(texts):
        ids = torch.tensor([processor.tokenizer(text, True, 512)["input_ids"]])
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            logits = model(input_ids=ids.expand(len(batch), -1), **pad_regions(batch)).logits
            scores[row, start : start + batch_size] = logits[:, 0].numpy()
    return scores


def pad_regions(images: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(image["region_boxes"]) for image in images)
    features = torch.zeros(len(images), longest, images[0]["region_features"].shape[1])
    boxes, mask = torch.zeros(len(images), longest, 4), torch.zeros(len(images), longest, dtype=torch.long)
    for row, image in enumerate(images):
        count = len(image["region_boxes"])
        features[row, :count] = torch.from_numpy(image["region_features"]).float()
        boxes[row, :count] = torch.from_numpy(image["region_boxes"])
        mask[row, :count] = 1
    return {"region_features": features, "region_boxes": boxes, "region_attention_mask": mask}


def alternate(
    ways: dict[str, Callable[[], np.ndarray]], rounds: int
) -> Iterator[tuple[str, float, np.ndarray]]:
    """Run all ways in turns; yield (name, best CPU seconds, scores)."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        start = time.process_time()
        scores[name] = way()
        seconds[name].append(time.process_time() - start)
    for name in ways:
        yield name, min(seconds[name]), scores[name]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    ranks = [scores.ravel().argsort().argsort() for scores in (first, second)]
    return float(np.corrcoef(ranks)[0, 1])


def load_model(name_or_path: str | None) -> UC2ForRetrieval:
    if name_or_path:
        return UC2ForRetrieval.from_pretrained(name_or_path, attn_implementation="eager").eval()
    torch.manual_seed(0)
    # The size of the vocabulary does not matter here: tokens are looked up.
    return UC2ForRetrieval(UC2Config(vocab_size=1000, attn_implementation="eager")).eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub id of a retrieval model; random weights if left out")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plain_batch", type=int, default=400, help="images per forward of the plain way")
    parser.add_argument("--batch_tokens", type=int, default=2500)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load_model(arguments.model)

    print("| data | way | pairs per CPU second | ratio | largest difference | Spearman |")
    print("|---|---|---:|---:|---:|---:|")
    for data, counts in REGION_COUNTS.items():
        texts, images = make_data(model.config, arguments.texts, arguments.images, counts)

        def fast(precision, texts=texts, images=images):
            options = {"batch_tokens": arguments.batch_tokens, "precision": precision}
            return score_matrix(model, texts, images, NumberProcessor(), **options)

        def plain(texts=texts, images=images):
            return plain_scores(model, texts, images, arguments.plain_batch)

        ways = {
            "plain": plain,
            "fp32": lambda fast=fast: fast("fp32"),
            "int8": lambda fast=fast: fast("int8"),
        }
        pairs, reference = len(texts) * len(images), None
        for name, seconds, scores in alternate(ways, arguments.rounds):
            reference = (seconds, scores) if reference is None else reference
            difference, rank = np.abs(scores - reference[1]).max(), spearman(scores, reference[1])
            ratio = reference[0] / seconds
            print(
                f"| {data} | {name} | {pairs / seconds:.2f} | {ratio:.2f} | {difference:.1e} | {rank:.4f} |"
            )


if __name__ == "__main__":
    main()
