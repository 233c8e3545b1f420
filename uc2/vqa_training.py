"""Fine-tuning for question answering with the Hugging Face Trainer, and answering (paper 4.1.2, A.1)."""

from collections.abc import Mapping

import torch
from torch.utils.data import DataLoader

from uc2.checkpoints import ResumableTrainer
from uc2.non_finite import check_finite
from uc2.sampling import EpochBatchSampler, evaluation_loader, train_loader
from uc2.vqa import evaluate_answers
from uc2.vqa_data import VQADataset


class VQATrainer(ResumableTrainer):
    """Trains `UC2ForVQA`; the loss is the mean over the questions of the whole update, on all processes.

    Args:
        tokens_per_batch: padded positions (text and regions) of one micro-batch; without it, micro-batches
            hold `per_device_train_batch_size` questions.
        eval_dataset: name -> VQADataset whose questions have answers.
    """

    # `compute_loss` divides by the questions of the whole update, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args, tokens_per_batch: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.tokens_per_batch = tokens_per_batch

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        sampler = EpochBatchSampler(
            self.train_dataset,
            batch_size=None if self.tokens_per_batch else args.per_device_train_batch_size,
            tokens_per_batch=self.tokens_per_batch,
            seed=args.seed if args.data_seed is None else args.data_seed,
            multiple_of=args.world_size * args.gradient_accumulation_steps,
        )
        return train_loader(self, sampler)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Questions of the update: micro-batches filled by tokens differ in their number."""
        if not batch_samples:  # no micro-batch left in this epoch
            return None
        questions = torch.tensor(sum(len(batch["labels"]) for batch in batch_samples), device=device)
        return self.accelerator.reduce(questions, reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        image_ids = (self.train_dataset.image_id(key) for key in inputs["example_ids"].tolist())
        inputs = {name: value for name, value in inputs.items() if name != "example_ids"}
        outputs = model(**inputs)
        check_finite(outputs.loss, image_ids, self.state.global_step, self.args)
        # The model gives the mean of its micro-batch, and processes average their gradients.
        share = len(inputs["labels"]) * self.accelerator.num_processes / num_items_in_batch
        loss = outputs.loss * share
        return (loss, outputs) if return_outputs else loss

    def predict_answers(self, dataset: VQADataset) -> list[str]:
        """The highest-scoring class of every question, in the order of the rows, on every process."""
        loader, counted = evaluation_loader(self, dataset)
        model = self._wrap_model(self.model, training=False).to(self.args.device).eval()
        chosen = torch.zeros(len(dataset), dtype=torch.long, device=self.args.device)
        for index, batch in enumerate(loader):
            batch = self._prepare_inputs(batch)
            rows = batch.pop("example_ids")
            batch.pop("labels", None)
            with torch.inference_mode(), self.compute_loss_context_manager():
                logits = model(**batch).logits
            if index < counted:
                chosen[rows] = logits.argmax(dim=-1)
        chosen = self.accelerator.reduce(chosen, reduction="sum").tolist()
        return [self.model.config.id2label[label] for label in chosen]

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores of every data set and language, and `vqa_score`, their mean; for `eval_strategy="steps"`."""
        datasets: Mapping[str, VQADataset] = self.eval_dataset if eval_dataset is None else eval_dataset
        results = {
            name: evaluate_dataset(self.predict_answers(dataset), dataset)
            for name, dataset in datasets.items()
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in flat_metrics(results).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def evaluate_dataset(predictions: list[str], dataset: VQADataset) -> dict[str, dict]:
    questions = dataset.questions
    return evaluate_answers(
        predictions, questions["answers"], questions["language"], list(questions["answer_type"])
    )


def flat_metrics(results: Mapping[str, Mapping[str, Mapping]]) -> dict[str, float]:
    """`vqa_score`, the mean over data sets and languages, and `<data set>_<language>_<metric>`."""
    cells = [(name, language, row) for name, rows in results.items() for language, row in rows.items()]
    flat = {"vqa_score": sum(row["vqa_score"] for *_, row in cells) / len(cells)}
    for name, language, row in cells:
        flat |= {f"{name}_{language}_{metric}": row[metric] for metric in ("vqa_score", "accuracy", "bleu")}
    return flat
