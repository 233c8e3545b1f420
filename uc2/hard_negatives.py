"""Mining of hard negatives while retrieval is trained (UC2, section 4, A.1), the same for every way of loading data.

Batches are built ahead of training, how far depends on the workers. So that neither this nor a restart changes what
is trained on, a mining counts from the `LAG`-th update after it, not from the first batch that happens to see it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from uc2.atomic_files import atomic_file
from uc2.data_error import DataError
from uc2.retrieval_data import RetrievalDataset
from uc2.sampling import EpochBatchSampler
from uc2.scoring import score_matrix

HARD_NEGATIVES_FILE = "hard_negatives.npz"
LAG = 64
TABLES = ("hard_images", "hard_rows", "mined_images", "mined_rows")


class MiningBatchSampler(EpochBatchSampler):
    """Yields lists of (key, number of the mining that the example's negatives come from).

    Args:
        every: updates between two minings.
        updates_ahead: how far the data loading runs ahead of training, at most.

    Raises:
        DataError: minings follow one another faster than data is loaded ahead.
    """

    def __init__(self, *args, every: int, updates_ahead: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.every, self.lag = every, min(LAG, every)
        if updates_ahead > self.lag:
            raise DataError(
                field="hard_negative_steps",
                found=every,
                expected=f"at least {updates_ahead} (so far ahead are batches built), or fewer dataloader_num_workers",
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, batch in enumerate(super().__iter__()):
            update = (self.epoch * len(self) + number) // self.multiple_of
            mining = max(0, update - self.lag) // self.every
            yield [(key, mining) for key in batch]


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
        self.dataset.keep_mining(state.global_step // self.every)

    def save(self, checkpoint: Path) -> None:
        path = Path(checkpoint, HARD_NEGATIVES_FILE)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: getattr(self.dataset, name).numpy() for name in TABLES})

    def load(self, checkpoint: str) -> None:
        """Go on with what had been mined at `checkpoint`; nothing, if that run did not mine."""
        path = Path(checkpoint, HARD_NEGATIVES_FILE)
        if not path.exists():
            return
        with np.load(path, allow_pickle=False) as mined:
            for name in TABLES:
                getattr(self.dataset, name).copy_(torch.from_numpy(mined[name]))
