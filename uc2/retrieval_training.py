"""Fine-tuning for retrieval with the Hugging Face Trainer (UC2, section 4, A.1)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from uc2.checkpoints import ResumableTrainer
from uc2.distributed import whole_model
from uc2.hard_negatives import HardNegativesCallback, MiningBatchSampler
from uc2.non_finite import check_finite
from uc2.sampling import EpochBatchSampler, train_loader


class RetrievalTrainer(ResumableTrainer):
    """Trains `UC2ForRetrieval` on groups of a `RetrievalDataset`; a batch holds `batch size` groups.

    Args:
        evaluate_recall: called with the unwrapped model on every process; returns `{metric: number}`, which
            `evaluate` logs with the usual prefix. It replaces the loop over an evaluation set, because recall
            needs all pairs.
    """

    def __init__(self, *args, evaluate_recall: Callable[[torch.nn.Module], dict[str, float]], **kwargs):
        super().__init__(*args, **kwargs)
        # The loss is a mean over the micro-batch, so the Trainer has to average over micro-batches.
        self.model_accepts_loss_kwargs = False
        self.evaluate_recall = evaluate_recall

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        options = {
            "batch_size": args.per_device_train_batch_size,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "group_by_length": False,  # a group's negatives are of any length, so there is nothing to gain
            "multiple_of": args.world_size * args.gradient_accumulation_steps,
        }
        mining = self._mining()
        if mining is None:
            sampler = EpochBatchSampler(self.train_dataset, **options)
        else:
            # A loader with workers sends them this much ahead; accelerate takes one batch more.
            batches_ahead = args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2) + 2
            updates_ahead = -(-batches_ahead // args.gradient_accumulation_steps)
            sampler = MiningBatchSampler(
                self.train_dataset, every=mining.every, updates_ahead=updates_ahead, **options
            )
        return train_loader(self, sampler)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        images = inputs.pop("example_ids")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        image_ids = (self.train_dataset.image_ids[image] for image in images.tolist())
        check_finite(loss, image_ids, self.state.global_step, self.args)
        return (loss, outputs) if return_outputs else loss

    def save_extras(self, checkpoint: Path) -> None:
        mining = self._mining()
        if mining is not None:
            mining.save(checkpoint)

    def _mining(self) -> HardNegativesCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, HardNegativesCallback)), None)

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Recalls of the current weights; for `eval_strategy="steps"` and choosing the best checkpoint."""
        recalls = self.evaluate_recall(whole_model(self))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in recalls.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
