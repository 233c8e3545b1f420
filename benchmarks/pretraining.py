"""Speed and memory of a pre-training step, one measure after another.

    python benchmarks/pretraining.py                    # base size (278 M parameters), about 20 minutes on 2 cores
    python benchmarks/pretraining.py --size small       # two minutes

The plain way composes batches at random, pads them, attends eagerly, computes the last layer everywhere, holds the
vocabulary logits and both gradients of the word embeddings, and updates with the for-loop AdamW. Each row of the
table adds one measure to the row above; rows marked "alone" add theirs to the last cumulative row.

All rows train on examples of 8 to 30 tokens with 10 to 100 regions, 2048 wide, in updates of equally many *real*
tokens and regions; padding never counts. Every measurement is a process of its own, so that peak memory is its
own; the rows take turns for several rounds, and the table shows medians, by the clock and by CPU time: on a machine
that others use too, trust the latter.

Model FLOPs utilisation (MFU) = model FLOPs per CPU second / FLOPs per CPU second of a 2048 x 2048 matrix product,
measured in the same process on the same threads. Model FLOPs of a step, of real positions alone, without anything
computed twice:
    encoder      6 L (4 H^2 + 2 H I) n + 12 L H n^2     per example of n positions
    regions      4 F H                                  per region (its features need no gradient)
    vocabulary   6 (V H + H^2)                          per position with a target
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from modeling_uc2 import OBJECTIVES, UC2Config, UC2ForPreTraining
from uc2.collator import UC2DataCollator
from uc2.masking import mask_regions, mask_tokens
from uc2.sampling import EpochBatchSampler

SIZES = {
    "base": {},
    "small": {"vocab_size": 30000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"intermediate_size": 1024},
}


@dataclass(frozen=True)
class Variant:
    """How a step is computed; the defaults are the plain way."""

    grouped: bool = False
    own_loss: bool = False  # the model's forward, instead of `plain_loss`
    optimizer: str = "for-loop"
    attention: str = "eager"
    checkpointing: bool = False
    compiled: bool = False


ALL = {"grouped": True, "own_loss": True, "optimizer": "fused"}
VARIANTS = {
    "plain": Variant(),
    "+ length grouping": Variant(grouped=True),
    "+ positions read, one table gradient": Variant(grouped=True, own_loss=True),
    "+ fused AdamW": Variant(**ALL),
    "alone: sdpa": Variant(**ALL, attention="sdpa"),
    "alone: activation checkpointing": Variant(**ALL, checkpointing=True),
    "alone: torch.compile": Variant(**ALL, compiled=True),
}
COSTS = """What each measure costs:
- length grouping: batches hold examples alike in length instead of a uniform draw; the order of batches stays random.
- positions read, one table gradient: the last layer's feed-forward runs where a loss reads it, the vocabulary loss
  makes its gradient in chunks beside the loss, the word embeddings' two gradients share one table. The same numbers up
  to rounding; no second derivative, and one loss per `backward()`.
- fused AdamW: nothing; another order of rounding.
- sdpa: nothing. On a CPU it has no fused kernel with attention dropout, so that training gains
  next to nothing there.
- activation checkpointing: every layer's forward is computed twice.
- torch.compile: minutes before the first step (left out here) and again for new kinds of shapes."""


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


def build_batches(config: UC2Config, tokens: int, steps: int, grouped: bool, seed: int) -> list[dict]:
    """`steps` batches of about `tokens` real positions: grouped by length, or composed at random."""
    examples = RandomExamples(config)
    real = examples.lengths(np.arange(len(examples))).sum()
    budget = tokens
    for _ in range(4):  # the budget counts padding, which depends on the composition
        sampler = EpochBatchSampler(examples, tokens_per_batch=int(budget), seed=seed, group_by_length=grouped)
        budget *= tokens / (real / len(sampler))
    collate = UC2DataCollator()
    return [collate([examples[key] for key in keys]) for keys in islice(sampler, steps)]


def build_optimizer(model, kind: str) -> torch.optim.Optimizer:
    options = {"fused": {"fused": True}, "for-loop": {"foreach": False}}[kind]
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01, **options)


def plain_loss(model: UC2ForPreTraining, batch: dict) -> torch.Tensor:
    """MLM + VTLM + MRTM and ITM, written down directly: what `UC2ForPreTraining.forward` computes in pieces."""
    names = ("labels", "region_labels", "itm_labels", "objective_ids")
    labels, region_labels, itm_labels, objective_ids = (batch[name] for name in names)
    outputs = model.uc2(**{name: value for name, value in batch.items() if name not in names})
    hidden, length = outputs.last_hidden_state, labels.shape[1]
    regions = region_labels != -100
    loss = F.cross_entropy(model.lm_head(hidden[:, length:][regions]), region_labels[regions], reduction="sum")
    loss = loss / regions.sum().clamp(min=1)
    for name in ("mlm", "vtlm"):
        words = (labels != -100) & (objective_ids == OBJECTIVES.index(name)).unsqueeze(1)
        losses = F.cross_entropy(model.lm_head(hidden[:, :length][words]), labels[words], reduction="sum")
        loss = loss + losses / words.sum().clamp(min=1)
    pairs = itm_labels != -100
    losses = F.cross_entropy(model.itm_head(outputs.pooler_output[pairs]), itm_labels[pairs], reduction="sum")
    return loss + losses / pairs.sum().clamp(min=1)


def model_flops(config: UC2Config, batch: dict) -> float:
    """Model FLOPs of a training step, by the formula at the top of this file."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    regions = batch["region_attention_mask"].sum(dim=1).double()
    lengths = batch["attention_mask"].sum(dim=1).double() + regions
    targets = sum(float((batch[name] != -100).sum()) for name in ("labels", "region_labels"))
    linear = 6 * layers * (4 * hidden**2 + 2 * hidden * config.intermediate_size) * lengths.sum()
    attention = 12 * layers * hidden * (lengths**2).sum()
    projection = 4 * config.region_feature_size * hidden * regions.sum()
    return float(linear + attention + projection) + 6 * (config.vocab_size * hidden + hidden**2) * targets


def seconds(function: Callable[[], None]) -> np.ndarray:
    """Wall-clock and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def matmul_peak() -> float:
    """FLOPs per CPU second of a large matrix product, the best of several."""
    left, right = torch.randn(2, 2048, 2048)
    return max(2 * 2048**3 / seconds(lambda: left @ right)[1] for _ in range(5))


def measure(size: str, tokens: int, steps: int, variant: Variant, seed: int) -> dict:
    """Trains `steps` steps after one that warms up."""
    torch.manual_seed(seed)
    config = UC2Config(**SIZES[size], attn_implementation=variant.attention)
    model = UC2ForPreTraining(config).train()
    if variant.checkpointing:
        model.activation_checkpointing_enable()
    if variant.compiled:
        for layer in model.uc2.encoder.layer:
            layer.compile(dynamic=True)
    optimizer = build_optimizer(model, variant.optimizer)
    batches = build_batches(config, tokens, steps + 1, variant.grouped, seed)

    def step(batch):
        loss = model(**batch).loss if variant.own_loss else plain_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(batches[0])
    peak_flops = matmul_peak()
    wall, cpu = sum(seconds(lambda batch=batch: step(batch)) for batch in batches[1:])
    masks = [batch[name] for batch in batches[1:] for name in ("attention_mask", "region_attention_mask")]
    real = sum(int(mask.sum()) for mask in masks)
    flops = sum(model_flops(config, batch) for batch in batches[1:])
    return {
        "tokens_per_second": real / wall,
        "tokens_per_cpu_second": real / cpu,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "padding": 1 - real / sum(mask.numel() for mask in masks),
        "mfu": flops / cpu / peak_flops,
    }


def print_table(results: dict[str, list[dict]]) -> None:
    """Medians over the rounds; ratios are to the first row."""
    print("| measure | real tokens/s | ratio | ratio, CPU time | peak memory, GB | ratio | padding | MFU |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()
    }
    first = next(iter(medians.values()))
    for name, row in medians.items():
        wall, cpu, peak = (row[key] / first[key] for key in ("tokens_per_second", "tokens_per_cpu_second", "peak_gb"))
        print(
            f"| {name} | {row['tokens_per_second']:.0f} | {wall:.2f} | {cpu:.2f} | {row['peak_gb']:.2f} | {peak:.2f} "
            f"| {row['padding']:.0%} | {row['mfu']:.0%} |"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--tokens", type=int, default=2400, help="real tokens and regions of an update")
    parser.add_argument("--steps", type=int, default=3, help="steps of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows to measure")
    parser.add_argument("--json", action="store_true", help="measure the first row once, here, and print it as JSON")
    args = parser.parse_args(argv)
    if args.json:
        print(json.dumps(measure(args.size, args.tokens, args.steps, VARIANTS[args.variants[0]], args.seed)))
        return
    results = {name: [] for name in args.variants}
    for seed in range(args.seed, args.seed + args.rounds):
        for name in args.variants:
            command = [sys.executable, __file__, "--json", "--variants", name, "--size", args.size]
            command += ["--tokens", args.tokens, "--steps", args.steps, "--seed", seed]
            output = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
            results[name].append(json.loads(output.stdout.splitlines()[-1]))
            print(f"{name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(f"{args.size}, {args.tokens} real positions an update, {torch.get_num_threads()} threads\n")
    print_table(results)
    print(f"\n{COSTS}")


if __name__ == "__main__":
    main()
