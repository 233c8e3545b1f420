"""A run's output folder: one run at a time writes it, and what killed ones left half-written is removed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

from uc2.atomic_files import sole_writer
from uc2.checkpoints import UNFINISHED


@contextmanager
def exclusive_output(args: TrainingArguments) -> Iterator[None]:
    """Keeps other runs out of `args.output_dir` until this one ends, however it ends.

    Of the processes of one launch, the first stands for all.

    Raises:
        BlockingIOError: another run is writing there.
    """
    if args.process_index > 0:
        yield
        return
    with sole_writer(args.output_dir):
        folder = Path(args.output_dir)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        for leftover in folder.rglob(UNFINISHED):
            shutil.rmtree(leftover)
        yield
