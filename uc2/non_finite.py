"""Stopping at a loss that is not finite, before it reaches the weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import TrainingArguments

from uc2.atomic_files import write_json


class NonFiniteLoss(FloatingPointError):
    """The loss of a batch is NaN or infinite; the message names the file that lists the batch's images."""


def check_finite(loss: torch.Tensor, image_ids: Iterable[str], step: int, args: TrainingArguments) -> None:
    """Leaves the batch's images behind in `args.output_dir` if its loss is not finite.

    Raises:
        NonFiniteLoss: the loss is not finite. No update has been made with it.
    """
    if torch.isfinite(loss):
        return
    process = f"_process{args.process_index}" if args.world_size > 1 else ""
    path = Path(args.output_dir, f"non_finite_batch_step{step}{process}.json")
    content = {"step": step, "loss": str(loss.item()), "image_ids": sorted(set(image_ids))}
    write_json(content, path)
    raise NonFiniteLoss(
        f"the loss is {loss.item()} at step {step}; the batch's image ids are in {path}, and the last checkpoint is"
        " untouched"
    )
