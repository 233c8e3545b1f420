"""Checkpoints that are whole or not used: written beside their place, renamed, and checked before a run goes on.

A checkpoint is written to `_unfinished/`, gets a list of its files and their sizes, reaches the disk, and only then
takes its name `checkpoint-N`. So a process killed at any moment, or a full disk, leaves the earlier ones usable.
"""

import json
import os
import re
import shutil
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from uc2.data_error import DataError, Found
from uc2.hub import PublishingTrainer

logger = logging.get_logger(__name__)

FILE_LIST = "checkpoint_files.json"
# Names with a leading underscore are not pushed to the Hub.
UNFINISHED = "_unfinished"
SET_ASIDE = "_unusable-"


class ResumableTrainer(PublishingTrainer):
    """A Trainer that a kill at any moment costs the steps since the last checkpoint, and nothing else."""

    _unfinished: str | None = None  # where a checkpoint is being written

    def save_extras(self, checkpoint: Path) -> None:
        """Writes what else a run needs to go on from this checkpoint; called on the process that writes it."""

    def _run_epoch(self, *args, **kwargs):
        # The Trainer would train one step more when it goes on from the last checkpoint of a finished run.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        written, final = run / UNFINISHED / name, run / name
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = str(run / UNFINISHED)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if self.args.should_save:
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            self.save_extras(written)
            _list_files(written)
            if final.exists():
                shutil.rmtree(final)
            os.replace(written, final)
            _to_disk(run)
            _drop_old(run, self.args.save_total_limit, self.state.best_model_checkpoint)
            shutil.rmtree(run / UNFINISHED)
        self.accelerator.wait_for_everyone()


def _list_files(checkpoint: Path) -> None:
    """Writes the list by which a whole checkpoint is known, once all it names is on the disk."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    sizes = {file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in files}
    listing = checkpoint / FILE_LIST
    listing.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in (*files, listing, *{file.parent for file in files}):
        _to_disk(path)


def _drop_old(run: Path, limit: int | None, best: str | None) -> None:
    """Keeps the last `limit` checkpoints, and the best one. A dropped one loses its name before its files."""
    if not limit or limit < 0:
        return
    checkpoints = sort_checkpoints(str(run), use_mtime=True, best_model_checkpoint=best)  # the last two: best, newest
    protected = 2 if best in checkpoints[:-1] else 1
    for checkpoint in checkpoints[: -max(limit, protected)]:
        os.replace(checkpoint, run / UNFINISHED / Path(checkpoint).name)


def _to_disk(path: Path) -> None:
    """Survives a crash of the machine, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_problem(checkpoint: str | os.PathLike) -> str | None:
    """Why a run cannot go on from a checkpoint, in words; None for a whole one. Reads no tensors."""
    try:
        sizes = json.loads(Path(checkpoint, FILE_LIST).read_text(encoding="utf-8"))
        expected = {str(name): int(size) for name, size in sizes.items()}
    except FileNotFoundError:
        return f"it has no {FILE_LIST}, so it was not written to its end"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its {FILE_LIST} is broken ({error})"
    for name, size in expected.items():
        file = Path(checkpoint, name)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def last_checkpoint(folder: str | os.PathLike, *, set_aside: bool = True) -> str | None:
    """The last whole checkpoint of a run, None without one.

    Later ones that are not whole are renamed with `set_aside`; on several processes, on one of them only.
    """
    numbers = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*"))
    for number in sorted((int(match[1]) for match in numbers if match), reverse=True):
        checkpoint = Path(folder, f"checkpoint-{number}")
        problem = checkpoint_problem(checkpoint)
        if problem is None:
            return str(checkpoint)
        if set_aside:
            aside = Path(folder, SET_ASIDE + checkpoint.name)
            logger.warning(f"{checkpoint} is not used: {problem}. It is renamed to {aside.name}.")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)
    return None


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that the options name, else the last whole one of the output folder, else None.

    Raises:
        DataError: the one named is not there or not whole. One without list of files, which another program wrote,
            is taken as it is.
    """
    named = args.resume_from_checkpoint
    if named is None:
        last = last_checkpoint(args.output_dir, set_aside=args.process_index == 0)
        if last is not None:
            logger.warning(f"Resuming from {last}.")
        return last
    if not Path(named, TRAINER_STATE_NAME).is_file():
        raise DataError(file=named, found=Found(f"no {TRAINER_STATE_NAME}"), expected="a checkpoint to resume from")
    problem = checkpoint_problem(named) if Path(named, FILE_LIST).exists() else None
    if problem is not None:
        raise DataError(file=named, found=Found(problem), expected="a whole checkpoint")
    return named


def saved_history(folder: str | os.PathLike) -> list[dict]:
    """What the run in a folder had logged by its last whole checkpoint; nothing without one."""
    last = last_checkpoint(folder, set_aside=False)
    return [] if last is None else TrainerState.load_from_json(str(Path(last, TRAINER_STATE_NAME))).log_history
