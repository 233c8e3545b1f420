"""Early Adaptation (paper section 3.3): warms the region encoder up before it meets the transformer.

The softmax over cosine similarities between an encoded region and the word embeddings of all class labels is
pulled towards the detector's class distribution (KL divergence). Everything but the region encoder is frozen.
"""

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from modeling_uc2 import UC2PreTrainedModel

from .checkpoints import ResumableTrainer, checkpoint_to_resume
from .data_error import DataError, Found
from .object_labels import LabelTokens
from .sampling import EpochBatchSampler, train_loader


def early_adaptation_loss(
    regions: torch.Tensor, label_embeddings: torch.Tensor, class_probs: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(class_probs || softmax(cos(region, label) / temperature)), per region.

    Args:
        regions (`(N, H)`), label_embeddings (`(K, H)`), class_probs (`(N, K)`, rows sum to 1).

    Returns `(N,)`.
    """
    cosine = F.normalize(regions.float(), dim=-1) @ F.normalize(label_embeddings.float(), dim=-1).T
    log_probs = (cosine / temperature).log_softmax(dim=-1)
    return F.kl_div(log_probs, class_probs.float(), reduction="none").sum(dim=-1)


def label_embeddings(model: UC2PreTrainedModel, labels: LabelTokens, language: str) -> torch.Tensor:
    """Mean word embedding of each label's sub-words in one language, `(K, H)`."""
    words = model.get_input_embeddings().weight.detach()
    ids = (torch.from_numpy(labels.ids(index, language)) for index in range(labels.num_classes))
    return torch.stack([words[label].mean(dim=0) for label in ids])


def class_distribution(class_ids: np.ndarray, class_scores: np.ndarray, num_classes: int) -> np.ndarray:
    """`(n, K)` float32 for stores without `class_probs`: the detected class keeps its score, the rest is even."""
    rest = (1.0 - class_scores) / (num_classes - 1)
    probs = np.repeat(rest[:, None].astype(np.float32), num_classes, axis=1)
    probs[np.arange(len(class_ids)), class_ids] = class_scores
    return probs


class EarlyAdaptationDataset(Dataset):
    """One image of a region store per key = epoch * images + image: its selected regions and their class
    distributions."""

    def __init__(self, region_store, processor, num_classes: int):
        if not region_store.has_classes:
            expected = "regions with object classes for Early Adaptation (--ea_steps 0 leaves it out)"
            raise DataError(found=Found("none in the region store"), expected=expected)
        self.region_store, self.processor, self.num_classes = region_store, processor, num_classes
        # A list of millions of strings would be copied into every loader process, reference count by count.
        self.image_ids = pa.array(list(region_store), pa.large_string())

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int) -> dict[str, np.ndarray]:
        row = self.region_store[self.image_ids[key % len(self)].as_py()]
        kept = self.processor.select_regions(row.class_scores)
        if row.class_probs is None:
            probs = class_distribution(row.class_ids[kept], row.class_scores[kept], self.num_classes)
        else:
            probs = row.class_probs[kept].astype(np.float32)
            probs /= probs.sum(axis=1, keepdims=True)
        return {**self.processor.encode_regions(row), "class_probs": probs}


def concatenate_regions(examples: list[dict]) -> dict[str, torch.Tensor]:
    """All regions of a batch behind one another, `(1, N, …)`: no transformer reads them, so nothing is padded."""
    return {
        name: torch.from_numpy(np.concatenate([example[name] for example in examples])).unsqueeze(0)
        for name in examples[0]
    }


class EarlyAdaptationModel(nn.Module):
    """The region encoder of a UC2 model under the EA loss; its parameters are the model's own."""

    def __init__(self, model: UC2PreTrainedModel, labels: LabelTokens, languages: list[str], temperature: float):
        super().__init__()
        self.region_embeddings = model.base_model.region_embeddings
        token_type = model.base_model.embeddings.token_type_embeddings.weight[1].detach().clone()
        self.register_buffer("token_type", token_type, persistent=False)
        tables = torch.stack([label_embeddings(model, labels, language) for language in languages])
        self.register_buffer("labels", tables, persistent=False)
        self.temperature = temperature

    def forward(self, region_features, region_boxes, class_probs, num_items_in_batch=None) -> dict[str, torch.Tensor]:
        """The mean loss over regions and languages; with `num_items_in_batch`, this batch's share of the mean over
        so many regions."""
        regions = self.region_embeddings(region_features, region_boxes, self.token_type)[0]
        losses = [
            early_adaptation_loss(regions, table, class_probs[0], self.temperature) for table in self.labels
        ]
        count = len(regions) if num_items_in_batch is None else num_items_in_batch
        return {"loss": torch.stack(losses).mean(dim=0).sum() / count}


class EarlyAdaptationTrainer(ResumableTrainer):
    """The loss of an update is the mean over its regions, whichever process has them: 1 process x 8 images and
    2 x 4 make the same update."""

    # The model divides by the regions of the whole update.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader:
        sampler = EpochBatchSampler(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            seed=self.args.seed,
            multiple_of=self.args.world_size * self.args.gradient_accumulation_steps,
            group_by_length=False,  # nothing is padded
            drop_last=True,
        )
        return train_loader(self, sampler)

    def _get_num_items_in_batch(self, batch_samples, device):
        regions = sum(batch["region_features"].shape[1] for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(regions, device=device), reduction="sum")


def adapt_region_encoder(
    model: UC2PreTrainedModel,
    region_store,
    processor,
    labels: LabelTokens,
    *,
    languages: list[str],
    args: TrainingArguments,
    temperature: float = 1.0,
) -> list[dict]:
    """Runs the EA stage in place and returns its log history.

    `args.output_dir` holds the stage's checkpoints; it goes on from the last one.
    """
    stage = EarlyAdaptationModel(model, labels, languages, temperature)
    trainer = EarlyAdaptationTrainer(
        model=stage,
        args=args,
        train_dataset=EarlyAdaptationDataset(region_store, processor, labels.num_classes),
        data_collator=concatenate_regions,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    return trainer.state.log_history
