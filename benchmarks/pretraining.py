"""Tokens per second and peak memory of a pre-training step, one measure after another.

    python benchmarks/pretraining.py                    # base size (278 M parameters), about 20 minutes on 2 cores
    python benchmarks/pretraining.py --size small       # a minute

Every row of the table is a process of its own (so that peak memory is its own), and all rows see the same
examples: captions of 8 to 30 tokens with 10 to 100 regions, 2048 wide. Only real tokens and regions count,
never padding. The first row is the plain way: batches composed at random, padded, eager attention, the
for-loop AdamW. Ratios are to that row.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from modeling_uc2 import OBJECTIVES, UC2Config, UC2ForPreTraining
from uc2.collator import UC2DataCollator
from uc2.masking import mask_regions, mask_tokens
from uc2.sampling import EpochBatchSampler

SIZES = {
    "base": {},
    "small": {"vocab_size": 30000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"intermediate_size": 1024},
}
PLAIN = {"attention": "eager", "grouped": False, "optimizer": "for-loop", "checkpointing": False}
VARIANTS = {
    "plain": {},
    "+ sdpa": {"attention": "sdpa"},
    "+ length grouping": {"attention": "sdpa", "grouped": True},
    "+ fused AdamW": {"attention": "sdpa", "grouped": True, "optimizer": "fused"},
    "+ activation checkpointing": {"attention": "sdpa", "grouped": True, "optimizer": "fused", "checkpointing": True},
}


class RandomExamples:
    """Synthetic examples of the four objectives; `lengths` as the sampler asks for."""

    def __init__(self, config: UC2Config, size: int = 4096):
        self.config = config
        rng = np.random.default_rng(0)
        self.text = rng.integers(8, 31, size)
        self.regions = rng.integers(10, 101, size)
        self.objectives = rng.choice(4, size, p=np.array([12, 9, 9, 3]) / 33)

    def __len__(self) -> int:
        return len(self.text)

    def lengths(self, keys: np.ndarray) -> np.ndarray:
        rows = np.asarray(keys) % len(self)
        return np.stack([self.text[rows], self.regions[rows]], axis=1)

    def __getitem__(self, key: int) -> dict:
        rng = np.random.default_rng(key)
        row = key % len(self)
        length, count, objective = int(self.text[row]), int(self.regions[row]), OBJECTIVES[self.objectives[row]]
        ids = rng.integers(4, self.config.vocab_size - 1, length)
        features = rng.standard_normal((count, self.config.region_feature_size), dtype=np.float32).astype(np.float16)
        corners = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4).astype(np.float32)
        labels, region_labels = np.full(length, -100), np.full(count, -100)
        mask = np.zeros(count, bool)
        if objective in ("mlm", "vtlm"):
            ids, labels = mask_tokens(ids, rng, mask_token_id=3, vocabulary=np.arange(4, self.config.vocab_size))
        elif objective == "mrtm":
            features, mask = mask_regions(features, rng)
            region_labels[mask] = rng.integers(4, self.config.vocab_size, mask.sum())
        return {
            "input_ids": ids,
            "position_ids": np.arange(2, length + 2),
            "labels": labels,
            "region_features": features,
            "region_boxes": corners,
            "region_mask": mask,
            "region_labels": region_labels,
            "itm_label": int(rng.integers(2)) if objective == "itm" else -100,
            "objective_id": OBJECTIVES.index(objective),
        }


def build_batches(config: UC2Config, budget: int, steps: int, grouped: bool) -> list[dict]:
    """`steps` batches of about `budget` padded positions: grouped by length, or composed at random."""
    examples = RandomExamples(config)
    sampler = EpochBatchSampler(examples, tokens_per_batch=budget, seed=0, group_by_length=grouped)
    collate = UC2DataCollator()
    return [collate([examples[key] for key in keys]) for keys in islice(sampler, steps)]


def build_optimizer(model, kind: str) -> torch.optim.Optimizer:
    options = {"fused": {"fused": True}, "for-loop": {"foreach": False}}[kind]
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01, **options)


def measure(size: str, budget: int, steps: int, settings: dict) -> dict:
    """Trains `steps` steps after one that warms up; returns real tokens/s, peak memory in GB, padding share."""
    torch.manual_seed(0)
    config = UC2Config(**SIZES[size], attn_implementation=settings["attention"])
    model = UC2ForPreTraining(config).train()
    if settings["checkpointing"]:
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(model, settings["optimizer"])
    batches = build_batches(config, budget, steps + 1, settings["grouped"])
    real = padded = 0
    for index, batch in enumerate(batches):
        if index == 1:
            start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if index:
            masks = (batch["attention_mask"], batch["region_attention_mask"])
            real += sum(int(mask.sum()) for mask in masks)
            padded += sum(mask.numel() for mask in masks)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "tokens_per_second": real / seconds,
        "peak_gb": peak,
        "padding": 1 - real / padded,
        "tflops": model_flops(config, real) / seconds / 1e12,
    }


def model_flops(config: UC2Config, tokens: int) -> float:
    """FLOPs of training on `tokens` positions: 6 x encoder parameters x positions (attention and heads, a few
    per cent here, left out). Per second and divided by the machine's peak this is the utilisation (MFU)."""
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return 6.0 * layer * config.num_hidden_layers * tokens


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--tokens_per_batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--variant", choices=VARIANTS, help="measure one and print it as JSON")
    args = parser.parse_args(argv)
    if args.variant:
        settings = {**PLAIN, **VARIANTS[args.variant]}
        print(json.dumps(measure(args.size, args.tokens_per_batch, args.steps, settings)))
        return
    print("| variant | real tokens/s | ratio | peak memory, GB | ratio | padding | model TFLOP/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    first = None
    for name in VARIANTS:
        command = [sys.executable, Path(__file__), "--variant", name, "--size", args.size]
        command += ["--tokens_per_batch", args.tokens_per_batch, "--steps", args.steps]
        output = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        first = first or row
        speed, memory = row["tokens_per_second"], row["peak_gb"]
        print(
            f"| {name} | {speed:.0f} | {speed / first['tokens_per_second']:.2f} | {memory:.2f} "
            f"| {memory / first['peak_gb']:.2f} | {row['padding']:.0%} "
            f"| {row['tflops']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
