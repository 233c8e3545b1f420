"""A run's output folder: one run at a time writes it, and what killed ones left half-written is removed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

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
    with _locked(Path(f"{args.output_dir}.lock"), args.output_dir):
        folder = Path(args.output_dir)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        for leftover in folder.rglob(UNFINISHED):
            shutil.rmtree(leftover)
        yield


@contextmanager
def _locked(file: Path, folder: str) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Unlike flock, this is not inherited by data loading processes, which outlive a killed run for seconds.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves open which
            os.close(descriptor)
            message = f"another run is writing {folder}; wait for its end, or choose another output_dir"
            raise BlockingIOError(message) from error
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # its last holder has just removed it
    try:
        yield
    finally:
        # Removed while it is held: whoever has opened it meanwhile starts over.
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
