"""What the training scripts' options have in common."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class UC2TrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults that every script of UC2 shares (paper A.1)."""

    # The Trainer would drop the region inputs, which it does not know.
    remove_unused_columns: bool = field(default=False)
    weight_decay: float = field(default=0.01)
    report_to: str | None = field(default="none")

    def __post_init__(self):
        # Without this, each CPU process of a launch would train alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
