"""Fine-tuning for retrieval with the Hugging Face Trainer; mining of hard negatives (UC2, section 4, A.1)."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from uc2.atomic_files import atomic_file
from uc2.checkpoints import ResumableTrainer
from uc2.non_finite import check_finite
from uc2.retrieval_data import RetrievalDataset
from uc2.sampling import EpochBatchSampler, SetEpochCallback
from uc2.scoring import score_matrix

HARD_NEGATIVES_FILE = "hard_negatives.npz"


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
        sampler = EpochBatchSampler(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
            group_by_length=False,  # a group's negatives are of any length, so there is nothing to gain
            multiple_of=args.world_size * args.gradient_accumulation_steps,
        )
        self.add_callback(SetEpochCallback(sampler))
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        images = inputs.pop("example_ids")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        image_ids = (self.train_dataset.image_ids[image] for image in images.tolist())
        check_finite(loss, image_ids, self.state.global_step, self.args)
        return (loss, outputs) if return_outputs else loss

    def save_extras(self, checkpoint: Path) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, HardNegativesCallback):
                callback.save(checkpoint)

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Recalls of the current weights; for `eval_strategy="steps"` and choosing the best checkpoint."""
        recalls = self.evaluate_recall(self.accelerator.unwrap_model(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in recalls.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def mine_hard_negatives(model, dataset: RetrievalDataset, rows: np.ndarray, **scoring_options) -> None:
    """Make the highest-scoring wrong images and captions among `rows` the negatives of each of these rows.

    Scores all captions of `rows` against all of their images, with the model as it is. On several processes,
    call it on each of them with the same rows.
    """
    images = np.unique(dataset.image_of_row[rows])
    texts = [dataset.captions[int(row)]["caption"] for row in rows]
    regions = [dataset.store[dataset.image_ids[image]] for image in images]
    scores = score_matrix(model, texts, regions, dataset.processor, **scoring_options)
    for position, row in enumerate(rows.tolist()):
        own_column = np.searchsorted(images, dataset.image_of_row[row])
        wrong_images = _best(scores[position], images, partial(dataset.is_wrong_image, row))
        wrong_rows = _best(scores[:, own_column], rows, partial(dataset.is_wrong_caption, row))
        dataset.set_hard_negatives(
            row,
            list(islice(wrong_images, dataset.num_negative_images)),
            list(islice(wrong_rows, dataset.num_negative_captions)),
        )


def _best(scores: np.ndarray, items: np.ndarray, accept: Callable[[int], bool]) -> Iterator[int]:
    """The accepted items, highest score first."""
    return filter(accept, items[np.argsort(-scores, kind="stable")].tolist())


class HardNegativesCallback(TrainerCallback):
    """Every `every` steps, mines negatives for `pool_size` rows drawn anew; keeps the others' last ones.

    What has been mined is saved with each checkpoint and read again when training resumes.
    """

    def __init__(
        self, dataset: RetrievalDataset, *, every: int, pool_size: int, seed: int, **scoring_options
    ):
        if every < 1 or pool_size < 2:
            raise ValueError(f"mining needs every >= 1 and pool_size >= 2, found {every} and {pool_size}")
        self.dataset, self.every, self.pool_size, self.seed = dataset, every, pool_size, seed
        self.scoring_options = scoring_options

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        rng = np.random.default_rng((self.seed, state.global_step))
        rows = rng.choice(len(self.dataset), min(self.pool_size, len(self.dataset)), replace=False)
        mine_hard_negatives(model, self.dataset, np.sort(rows), **self.scoring_options)

    def save(self, checkpoint: Path) -> None:
        path = Path(checkpoint, HARD_NEGATIVES_FILE)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=self.dataset.hard_images.numpy(), rows=self.dataset.hard_rows.numpy())

    def load(self, checkpoint: str) -> None:
        """Go on with what had been mined at `checkpoint`; nothing, if that run did not mine."""
        path = Path(checkpoint, HARD_NEGATIVES_FILE)
        if not path.exists():
            return
        with np.load(path, allow_pickle=False) as mined:
            self.dataset.hard_images.copy_(torch.from_numpy(mined["images"]))
            self.dataset.hard_rows.copy_(torch.from_numpy(mined["rows"]))
