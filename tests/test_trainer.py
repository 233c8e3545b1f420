"""The trainer's sums: over micro-batches, objectives and languages, against the plain computation."""

import copy
import json

import pytest
import torch
from transformers import AutoTokenizer

from modeling_uc2 import OBJECTIVES, UC2Config, UC2ForPreTraining
from processing_uc2 import UC2Processor
from uc2.collator import UC2DataCollator
from uc2.object_labels import load_object_labels
from uc2.pretraining_arguments import PretrainingArguments
from uc2.pretraining_data import PretrainingDataset
from uc2.region_store import RegionStore
from uc2.rows import load_parallel_captions
from uc2.trainer import BOOKKEEPING, UC2Trainer, count_items, objective_metrics

MIXES = [
    {"mlm": 12, "itm": 9, "mrtm": 9, "vtlm": 3},
    {"mlm": 1, "tlm": 1, "mrc": 1, "mrc_kl": 1, "mrfr": 1},
]


def build(corpus, mix, tmp_path, **arguments):
    processor = UC2Processor(
        AutoTokenizer.from_pretrained(corpus.tokenizer), load_object_labels(corpus.object_labels), feature_size=12
    )
    dataset = PretrainingDataset(
        load_parallel_captions(corpus.captions), RegionStore(corpus.regions), processor, seed=0, objective_mix=mix
    )
    torch.manual_seed(0)
    config = UC2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        region_feature_size=12,
        num_region_classes=4,
        objectives=list(mix),
        objective_weights={name: 0.1 + index for index, name in enumerate(mix)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    defaults = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return UC2Trainer(
        model=UC2ForPreTraining(config),
        args=PretrainingArguments(**{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=UC2DataCollator(pad_token_id=1),
    )


@pytest.mark.parametrize("mix", MIXES)
def test_counts_are_the_models_own(tiny_corpus, tmp_path, mix):
    trainer = build(tiny_corpus, mix, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[key] for key in range(24)])
    inputs = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    assert count_items(batch).tolist() == trainer.model(**inputs).objective_items.tolist()
    assert all(count_items(batch)[OBJECTIVES.index(name)] > 0 for name in mix)


@pytest.mark.parametrize("mix", MIXES)
def test_micro_batches_add_up_to_the_large_batch(tiny_corpus, tmp_path, mix):
    """8 + 4 + 12 examples, normalised over the update, give the loss and gradient of 24 at once."""
    trainer = build(tiny_corpus, mix, tmp_path)
    trainer.model.train()
    examples = [trainer.train_dataset[key] for key in range(24)]
    whole = trainer.data_collator(copy.deepcopy(examples))
    parts = [trainer.data_collator(examples[start:end]) for start, end in ((0, 8), (8, 12), (12, 24))]

    def gradients(batches):
        trainer.model.zero_grad()
        counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts) for batch in batches]
        sum(losses).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        return sum(losses).detach(), gradient

    for one, several in zip(gradients([whole]), gradients(parts), strict=True):
        torch.testing.assert_close(one, several, atol=1e-6, rtol=1e-5)


def test_evaluation_equals_one_example_at_a_time(tiny_corpus, tmp_path):
    trainer = build(tiny_corpus, MIXES[0], tmp_path, per_device_eval_batch_size=7)
    metrics = trainer.evaluate()
    dataset, model = trainer.eval_dataset, trainer.model.eval()
    correct, items, losses = {}, {}, {}
    for key in range(len(dataset)):
        example = dataset[key]
        objective = OBJECTIVES[example["objective_id"]]
        cell = (objective, dataset.languages[example["language_id"]])
        batch = trainer.data_collator([example])
        with torch.no_grad():
            outputs = model(**{name: value for name, value in batch.items() if name not in BOOKKEEPING})
        correct[cell] = correct.get(cell, 0) + outputs.example_correct.item()
        items[cell] = items.get(cell, 0) + outputs.example_items.item()
        losses[objective] = losses.get(objective, 0) + outputs.example_loss.item()
    for (objective, language), count in items.items():
        expected = correct[objective, language] / count
        assert metrics[f"eval_accuracy_{objective}_{language}"] == pytest.approx(expected)
    for objective, loss in losses.items():
        count = sum(value for (name, _), value in items.items() if name == objective)
        assert metrics[f"eval_loss_{objective}"] == pytest.approx(loss / count, rel=1e-4)


def test_metrics_by_hand():
    totals = torch.zeros(3, 2, len(OBJECTIVES))
    totals[:, 0, 0] = torch.tensor([6.0, 1.0, 4.0])  # mlm, first language: loss, correct, items
    totals[:, 1, 0] = torch.tensor([2.0, 3.0, 4.0])
    totals[:, 1, 1] = torch.tensor([1.0, 1.0, 2.0])  # itm, second language
    metrics = objective_metrics(totals, ["en", "de"], {"mlm": 2.0, "itm": 3.0})
    assert metrics == {
        "loss": 2.0 * 1.0 + 3.0 * 0.5,
        "loss_mlm": 1.0,
        "accuracy_mlm": 0.5,
        "accuracy_mlm_en": 0.25,
        "accuracy_mlm_de": 0.75,
        "loss_itm": 0.5,
        "accuracy_itm": 0.5,
        "accuracy_itm_de": 0.5,
    }


def test_logs_every_objective(tiny_corpus, tmp_path):
    trainer = build(tiny_corpus, MIXES[0], tmp_path, max_steps=3, logging_steps=1, per_device_train_batch_size=12)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = trainer.model.config.objective_weights
    assert len(logged) == 3
    for entry in logged:
        present = [name for name in MIXES[0] if f"items_{name}" in entry]
        expected = sum(weights[name] * entry[f"loss_{name}"] for name in present)
        assert entry["loss"] == pytest.approx(expected, rel=1e-5)
    assert {name for entry in logged for name in MIXES[0] if f"items_{name}" in entry} == set(MIXES[0])


def test_non_finite_loss_stops_and_names_the_images(tiny_corpus, tmp_path):
    trainer = build(tiny_corpus, MIXES[0], tmp_path, max_steps=3, per_device_train_batch_size=4)
    with torch.no_grad():
        trainer.model.itm_head.bias.fill_(float("nan"))
        trainer.model.lm_head.decoder.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="non_finite_batch_step0.json"):
        trainer.train()
    saved = json.loads((tmp_path / "non_finite_batch_step0.json").read_text())
    assert 0 < len(saved["image_ids"]) <= 4 and all(name.startswith("image") for name in saved["image_ids"])


@pytest.mark.parametrize(
    "arguments, message",
    [({"average_tokens_across_devices": False}, "average"), ({"label_smoothing_factor": 0.1}, "label_smoothing")],
)
def test_refuses_what_would_change_the_loss(tiny_corpus, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_corpus, MIXES[0], tmp_path, **arguments)
