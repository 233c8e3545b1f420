"""Training with the Hugging Face Trainer: per-objective losses that add up exactly, over any split of a batch."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from modeling_uc2.configuration_uc2 import OBJECTIVES, TEXT_OBJECTIVES

from .distributed import is_zero3, keep_sums_exact, whole_model
from .non_finite import check_finite
from .portable_checkpoints import PortableTrainer
from .sampling import EpochBatchSampler, check_plan, evaluation_loader, save_plan, train_loader

IGNORED = -100
# Entries of a batch that say where an example comes from; no network reads them.
BOOKKEEPING = ("example_ids", "language_ids")


def count_items(batch: dict) -> torch.LongTensor:
    """Targets of each objective in a batch, `(len(OBJECTIVES),)`: what `UC2ForPreTraining` will take a loss over."""
    counts = torch.zeros(len(OBJECTIVES), dtype=torch.long, device=batch["objective_ids"].device)
    words = (batch["labels"] != IGNORED).sum(dim=1)
    for name in TEXT_OBJECTIVES:
        index = OBJECTIVES.index(name)
        counts[index] = words[batch["objective_ids"] == index].sum()
    counts[OBJECTIVES.index("mrtm")] = (batch["region_labels"] != IGNORED).sum()
    counts[OBJECTIVES.index("itm")] = (batch["itm_labels"] != IGNORED).sum()
    if "region_class_labels" in batch:
        counts[OBJECTIVES.index("mrc")] = (batch["region_class_labels"] != IGNORED).sum()
    if "region_class_probs" in batch:
        counts[OBJECTIVES.index("mrc_kl")] = (batch["region_class_probs"].float().sum(dim=-1) > 0).sum()
    if "region_feature_targets" in batch:
        index = OBJECTIVES.index("mrfr")
        counts[index] = batch["region_mask"][batch["objective_ids"] == index].sum()
    return counts


class UC2Trainer(PortableTrainer):
    """Pre-trains `UC2ForPreTraining` on mixed batches of a `PretrainingDataset`.

    Each objective's loss is the mean over its own targets of the whole update: all micro-batches, all processes.
    Hence 1 process x 4 micro-batches, 2 x 2 and one large batch give the same gradient.

    Args:
        tokens_per_batch: padded tokens (text and regions) of one micro-batch; without it, micro-batches hold
            `per_device_train_batch_size` examples.
        eval_passes: draws of objective, language and masks per row of the evaluation set. A small set needs
            several for figures that mean something.
    """

    # The model divides by the counts of the whole update, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, tokens_per_batch: int | None = None, eval_passes: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_passes = eval_passes
        if self.args.n_gpu > 1:
            raise ValueError("One process sees several GPUs; start one process per GPU with `accelerate launch`.")
        if not self.args.average_tokens_across_devices:
            raise ValueError("UC2 averages over the targets of all processes; leave average_tokens_across_devices on.")
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not supported: the losses are computed inside the model.")
        keep_sums_exact(self)
        self.tokens_per_batch = tokens_per_batch
        # Apple's GPUs have no float64.
        self._sum_type = torch.float32 if self.args.device.type == "mps" else torch.float64
        self._running = self._zeros(2, len(OBJECTIVES))
        self._resumed_from: str | None = None

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=self._sum_type, device=self.args.device)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        # The Trainer gives all processes one seed: they would drop out the same positions.
        torch.manual_seed(self.args.seed + self.args.process_index)
        self._resumed_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ---- batches ----
    def get_train_dataloader(self) -> DataLoader:
        self._sampler = EpochBatchSampler(
            self.train_dataset,
            batch_size=None if self.tokens_per_batch else self.args.per_device_train_batch_size,
            tokens_per_batch=self.tokens_per_batch,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            multiple_of=self.args.world_size * self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
        )
        if self._resumed_from is not None and not self.args.ignore_data_skip:
            check_plan(self._sampler, self._resumed_from)
        return train_loader(self, self._sampler)

    def save_extras(self, checkpoint: Path) -> None:
        super().save_extras(checkpoint)
        save_plan(self._sampler, checkpoint)

    # ---- loss ----
    def _get_num_items_in_batch(self, batch_samples, device):
        counts = sum(count_items(batch).to(device) for batch in batch_samples)
        if not torch.is_tensor(counts):  # no micro-batch left in this epoch
            return None
        return self.accelerator.reduce(counts, reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model_inputs = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        loss, outputs = super().compute_loss(
            model, model_inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            image_ids = (self.train_dataset.image_id(key) for key in inputs["example_ids"].tolist())
            check_finite(loss, image_ids, self.state.global_step, self.args)
            self._running[0] += outputs.objective_loss.detach()
            self._running[1] += outputs.objective_items
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `loss_<objective>` and `items_<objective>` since the last log line, over all processes."""
        if "loss" in logs:
            loss, items = self.accelerator.reduce(self._running.clone(), reduction="sum").cpu()
            for name, total, count in zip(OBJECTIVES, loss.tolist(), items.tolist(), strict=True):
                if count:
                    logs[f"loss_{name}"] = total / count
                    logs[f"items_{name}"] = int(count)
            self._running.zero_()
        super().log(logs, start_time)

    # ---- evaluation ----
    def _model_to_evaluate(self) -> nn.Module:
        if is_zero3(self.model):
            # ZeRO-3 gathers weights call by call, but the LM head is called once per so many targets, of which
            # processes have different numbers: they would wait for each other without end.
            return whole_model(self)
        if self.accelerator._models:
            return self.model
        # Nothing was trained before: the device, and autocast, are still missing.
        model = self.model.to(self.args.device)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return model
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss and accuracy of every objective, over all and per language, exact for any number of processes.

        The masks and pairings are those of the evaluation set's first epochs, so that runs can be compared.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset.")
        loader, counted = evaluation_loader(self, dataset, self.eval_passes)
        model = self._model_to_evaluate().eval()
        # [loss, correct, items] of every (language, objective)
        totals = self._zeros(3, len(dataset.languages), len(OBJECTIVES))
        for index, batch in enumerate(loader):
            batch = self._prepare_inputs(batch)
            languages = batch["language_ids"]
            model_inputs = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**model_inputs)
            if index < counted:
                cells = (languages, batch["objective_ids"])
                parts = (outputs.example_loss, outputs.example_correct, outputs.example_items)
                for table, values in zip(totals, parts, strict=True):
                    table.index_put_(cells, values.to(table.dtype), accumulate=True)
        totals = self.accelerator.reduce(totals, reduction="sum").cpu()
        metrics = objective_metrics(totals, dataset.languages, self.model.config.objective_weights)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


# Objectives whose targets have one right answer.
COUNTED_OBJECTIVES = ("mlm", "itm", "mrtm", "vtlm", "tlm", "mrc")


def objective_metrics(totals: torch.Tensor, languages: list[str], weights: dict | None) -> dict[str, float]:
    """Sums `(3 = loss, correct, items; languages; objectives)` -> losses and accuracies by name.

    Keys: `loss` (weighted as in training), `loss_<objective>`, `accuracy_<objective>`,
    `accuracy_<objective>_<language>`; an objective without targets has none.
    """
    metrics, weighted = {}, 0.0
    for index, objective in enumerate(OBJECTIVES):
        loss, correct, items = totals[:, :, index].double()
        if not items.sum():
            continue
        metrics[f"loss_{objective}"] = (loss.sum() / items.sum()).item()
        weighted += (weights or {}).get(objective, 1.0) * metrics[f"loss_{objective}"]
        if objective in COUNTED_OBJECTIVES:
            metrics[f"accuracy_{objective}"] = (correct.sum() / items.sum()).item()
            for language, right, count in zip(languages, correct.tolist(), items.tolist(), strict=True):
                if count:
                    metrics[f"accuracy_{objective}_{language}"] = right / count
    return {"loss": weighted, **metrics}

