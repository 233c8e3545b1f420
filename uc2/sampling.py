"""Batches of keys: `key = epoch * n + row`, grouped by length so that little of a batch is padding."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from uc2.atomic_files import write_json
from uc2.data_error import DataError, Found

logger = logging.getLogger(__name__)

PLAN_FILE = "batch_plan.json"


class EpochBatchSampler:
    """Yields lists of keys, a plan per epoch that depends on (seed, epoch) alone.

    Every key of an epoch comes once, except for what `drop_last` drops. The number of batches is a multiple
    of `multiple_of` and the same in every epoch, on which the learning-rate schedule and resuming rely.
    Batches are spread at random, so that the micro-batches of one update differ in length and objective.

    There is no `batch_size` attribute on purpose: accelerate would take it for the size of every batch.

    Args:
        dataset: has `len()`, and `lengths(keys) -> (m, 2)`: text tokens and regions of the examples; the
            lengths are read only to group or to fill a token budget.
        batch_size: examples per batch; or instead
        tokens_per_batch: budget of padded positions, B * (longest text + most regions), of a batch.
        seed: of the order.
        multiple_of: processes * accumulation steps.
        group_by_length: put examples alike in regions and text together.
        shuffle: False keeps the order of the rows (or of their lengths, when grouped).
        drop_last: drop the incomplete batch and what exceeds the multiple; otherwise the largest batches are
            halved until the number fits.

    Raises:
        ValueError: not exactly one batch size given, an example larger than the budget, or too few examples
            for `multiple_of` batches.
    """

    def __init__(
        self,
        dataset,
        *,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        seed: int,
        multiple_of: int = 1,
        group_by_length: bool = True,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        if (batch_size is None) == (tokens_per_batch is None):
            raise ValueError("give either batch_size or tokens_per_batch")
        if min(batch_size or 1, tokens_per_batch or 1, multiple_of) < 1:
            raise ValueError("batch_size, tokens_per_batch and multiple_of are at least 1")
        if len(dataset) < multiple_of:
            raise ValueError(f"{len(dataset)} examples do not fill {multiple_of} batches")
        self._dataset, self._num_examples, self._budget = dataset, batch_size, tokens_per_batch
        self.seed, self.multiple_of, self.drop_last = seed, multiple_of, drop_last
        self.group_by_length, self.shuffle = group_by_length, shuffle
        self.epoch = 0
        # Two samplers with equal plans yield the same batches.
        self.plan = {
            "examples": len(dataset),
            "batch_size": batch_size,
            "tokens_per_batch": tokens_per_batch,
            "micro_batches_per_update": multiple_of,
            "seed": seed,
            "group_by_length": group_by_length,
            "shuffle": shuffle,
            "drop_last": drop_last,
        }
        batches = self._cut(0)
        self._num_batches = self._count_batches(len(batches))
        self._planned_epoch, self._planned = 0, self._arrange(0, batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches, the same in every epoch."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        if self._planned_epoch != self.epoch:
            self._planned_epoch, self._planned = self.epoch, self._arrange(self.epoch, self._cut(self.epoch))
        for batch in self._planned:
            yield batch.tolist()

    def _count_batches(self, natural: float) -> int:
        """The `natural` number of epoch 0 with room for epochs whose draws are longer, as a multiple."""
        if self._budget is not None:
            # Lengths vary with the draws: the number of batches has a relative spread of about 1/2 sqrt(n).
            natural *= 1.005 + 1.5 / np.sqrt(len(self._dataset))
        units = natural / self.multiple_of
        count = int(units if self.drop_last else np.ceil(units)) * self.multiple_of
        # Batches cannot hold fewer than one example each.
        most = len(self._dataset) // self.multiple_of * self.multiple_of
        return min(max(count, self.multiple_of), most)

    def _arrange(self, epoch: int, batches: list[np.ndarray]) -> list[np.ndarray]:
        """Bring the batches to their number, in random order if they are shuffled."""
        batches = _split_to(batches, self._num_batches)
        # Without grouping the keys are in random order already. Left in it, 1 process x 8 examples and 2 x 4 see
        # the same examples in each update.
        if self.shuffle and self.group_by_length:
            order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(batches))
            batches = [batches[place] for place in order]
        surplus = len(batches) - self._num_batches
        if surplus and not self.drop_last:
            logger.warning("epoch %d: %d of %d batches left out", epoch, surplus, len(batches))
        return batches[: self._num_batches]

    def _cut(self, epoch: int) -> list[np.ndarray]:
        """The epoch's keys, ordered and cut into batches, as many as there are."""
        rows = len(self._dataset)
        keys = epoch * rows + np.arange(rows)
        if self.shuffle:
            keys = np.random.default_rng((self.seed, epoch, 0)).permutation(keys)
        if self._budget is None and not self.group_by_length:
            return self._equal_batches(keys)
        lengths = np.asarray(self._dataset.lengths(keys))
        if self.group_by_length:
            order = _order_by_length(lengths, self._examples_per_batch(lengths))
            keys, lengths = keys[order], lengths[order]
        if self._budget is None:
            return self._equal_batches(keys)
        return np.split(keys, _budget_cuts(lengths, self._budget))

    def _equal_batches(self, keys: np.ndarray) -> list[np.ndarray]:
        size = self._num_examples
        end = len(keys) // size * size if self.drop_last and len(keys) >= size else len(keys)
        return [keys[start : start + size] for start in range(0, end, size)]

    def _examples_per_batch(self, lengths: np.ndarray) -> float:
        return self._num_examples or max(1.0, self._budget / max(1.0, lengths.sum(axis=1).mean()))


def _order_by_length(lengths: np.ndarray, examples_per_batch: float) -> np.ndarray:
    """Order in which neighbours have alike numbers of regions and of text tokens.

    Examples are cut into strips of similar region counts and sorted by text length within each, up and down
    in turn, so that the ends of strips meet. With s strips of m batches in all, a batch spans about
    1/s of the spread of regions and s/m of that of text; s balances the two. Equals keep their given order.
    """
    text, regions = lengths.T
    batches = max(1.0, len(lengths) / examples_per_batch)
    spread = (regions.std() + 1e-9) / (text.std() + 1e-9)
    strips = int(np.clip(np.sqrt(batches * spread), 1, batches))
    by_regions = np.argsort(regions, kind="stable")
    strip = np.empty(len(lengths), dtype=np.int64)
    strip[by_regions] = np.arange(len(lengths)) * strips // len(lengths)
    return np.lexsort((np.where(strip % 2, -text, text), strip))


def _budget_cuts(lengths: np.ndarray, budget: int) -> list[int]:
    """Where to cut so that each batch holds as many examples as B * (longest text + most regions) allows."""
    largest = int(lengths.sum(axis=1).max(initial=0))
    if largest > budget:
        raise ValueError(f"tokens_per_batch is {budget}, but an example has {largest} positions")
    # No batch holds more examples than its shortest one would allow.
    window = budget // max(1, int(lengths.sum(axis=1).min(initial=budget))) + 1
    cuts, start = [], 0
    while start < len(lengths):
        widest = np.maximum.accumulate(lengths[start : start + window], axis=0).sum(axis=1)
        padded = widest * np.arange(1, len(widest) + 1)  # rises: the first excess ends the batch
        start += int(np.searchsorted(padded, budget, side="right"))
        cuts.append(start)
    return cuts[:-1]


def _split_to(batches: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Halve the largest batches until there are `count`."""
    sizes = np.array([len(batch) for batch in batches])
    while len(batches) < count:
        order = np.argsort(-sizes, kind="stable")
        chosen = order[: count - len(batches)]
        chosen = chosen[sizes[chosen] > 1]
        halves = [half for place in chosen for half in np.array_split(batches[place], 2)]
        taken = set(chosen.tolist())
        batches = [batch for place, batch in enumerate(batches) if place not in taken] + halves
        sizes = np.array([len(batch) for batch in batches])
    return batches


class SetEpochCallback(TrainerCallback):
    """Tells the sampler the epoch.

    The Trainer and accelerate do so themselves, but not in an epoch resumed midway on several processes:
    accelerate then hides the sampler behind another one.
    """

    def __init__(self, sampler: EpochBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


def train_loader(trainer: Trainer, sampler: EpochBatchSampler) -> DataLoader:
    """The sampler's batches of `trainer.train_dataset`, in turn over the processes, in step with its epochs."""
    args = trainer.args
    trainer.add_callback(SetEpochCallback(sampler))
    loader = DataLoader(
        trainer.train_dataset,
        batch_sampler=sampler,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
    )
    return trainer.accelerator.prepare(loader)


def evaluation_loader(trainer: Trainer, dataset, passes: int = 1) -> tuple[DataLoader, int]:
    """This process's share of the batches of `passes` epochs in order, and how many of them count.

    Every process gets the same number of batches, for strategies that communicate in each forward pass; a
    process with one batch less repeats one, which is to be left out of the sums.
    """
    args = trainer.args
    sampler = EpochBatchSampler(dataset, batch_size=args.per_device_eval_batch_size, seed=0, shuffle=False)
    batches = []
    for epoch in range(passes):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    mine = batches[args.process_index :: args.world_size]
    counted = len(mine)
    if counted < -(-len(batches) // args.world_size):
        mine.append(batches[0])
    loader = DataLoader(
        dataset, batch_sampler=mine, collate_fn=trainer.data_collator, num_workers=args.dataloader_num_workers
    )
    return loader, counted


def save_plan(sampler: EpochBatchSampler, checkpoint: str | os.PathLike) -> None:
    """Leaves in a checkpoint how its run cuts epochs into batches."""
    write_json(sampler.plan, Path(checkpoint, PLAN_FILE))


def check_plan(sampler: EpochBatchSampler, checkpoint: str | os.PathLike) -> None:
    """The batches after a checkpoint are those that its own run would have seen next.

    The number of processes may differ if gradient_accumulation_steps makes up for it.

    Raises:
        DataError: they are not, so that some examples of the epoch would come twice and others not at all.
    """
    file = Path(checkpoint, PLAN_FILE)
    saved = json.loads(file.read_text(encoding="utf-8"))
    for name, value in sampler.plan.items():
        if saved.get(name) != value:
            field = "processes x gradient_accumulation_steps" if name == "micro_batches_per_update" else name
            raise DataError(
                file=file,
                field=field,
                found=Found(str(saved.get(name))),
                expected=f"{value} as in this run, whose batches would repeat and skip examples of the epoch; set it"
                " back, or accept that with --ignore_data_skip true",
            )
