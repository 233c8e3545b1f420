"""run_vqa.py, in-process and under torchrun, on a tiny model and corpus."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForVQA
from processing_uc2 import UC2Processor
from uc2.region_store import RegionStore, write_region_store
from uc2.rows import write_jsonl
from uc2.vqa import vqa_score

ROOT = Path(__file__).parents[1]
# The question tells the answer; of ten people, one mostly disagrees.
QUESTIONS = {
    "en": {"a ball near a tree": "red", "a house near a fish": "blue", "a tree near a house": "two"},
    "ja": {"木の近くの家": "黒", "魚の近くの木": "二つ"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_corpus) -> Path:
    """Question files, with and without answers, and a pre-trained model of random weights."""
    folder = tmp_path_factory.mktemp("vqa")
    for language, pairs in QUESTIONS.items():
        rows = []
        for number in range(24):
            question, answer = list(pairs.items())[number % len(pairs)]
            row = {
                "question_id": f"{number}{'1' if language == 'en' else '2'}",
                "image_id": f"image{number}",
                "language": language,
                "question": question,
                "answers": [answer] * 9 + ["other"] if language == "en" else [answer],
            }
            rows.append(row)
        write_jsonl(rows, folder / f"{language}.jsonl")
        unanswered = [{name: row[name] for name in row if name != "answers"} for row in rows]
        write_jsonl(unanswered, folder / f"{language}_test.jsonl")
    from transformers import AutoTokenizer

    processor = UC2Processor(AutoTokenizer.from_pretrained(tiny_corpus.tokenizer), feature_size=12)
    config = UC2Config(
        vocab_size=len(processor.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, region_feature_size=12, num_region_classes=4,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    import torch

    torch.manual_seed(0)
    UC2ForPreTraining(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def flags(folder, tiny_corpus, output, **changes) -> list[str]:
    options = {
        "model_name_or_path": folder / "model",
        "region_stores": tiny_corpus.regions,
        "train_files": folder / "en.jsonl",
        "eval_files": f"toy={folder / 'en.jsonl'}",
        "num_answers": 3,
        "output_dir": output,
        "max_steps": 60,
        "learning_rate": 1e-2,
        "tokens_per_batch": 100,
        "logging_steps": 10,
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    words = []
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.fixture(scope="module")
def trained(folder, tiny_corpus) -> Path:
    from run_vqa import main

    main(flags(folder, tiny_corpus, folder / "trained", eval_strategy="steps", eval_steps=20))
    return folder / "trained"


def test_scores_are_those_of_the_predictions(folder, trained):
    """The submission file, scored here, gives the results; and the question is enough to know the answer."""
    rows = [json.loads(line) for line in open(folder / "en.jsonl", encoding="utf-8")]
    submission = json.load(open(trained / "predictions_toy.json", encoding="utf-8"))
    assert [entry["question_id"] for entry in submission] == [int(row["question_id"]) for row in rows]
    scores = [vqa_score(entry["answer"], row["answers"]) for entry, row in zip(submission, rows, strict=True)]
    results = json.load(open(trained / "results.json", encoding="utf-8"))
    english = results["datasets"]["toy"]["en"]
    assert english["vqa_score"] == pytest.approx(100 * np.mean(scores)) == pytest.approx(100)
    assert set(english["answer_types"]) == {"number", "other"} and english["bleu"] == pytest.approx(100)
    assert english["constant_vqa_score"] < 50 and results["answer_coverage"] == 1
    table = (trained / "table.md").read_text(encoding="utf-8")
    assert "| toy | en | 24 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |" in table
    cells = list(csv.DictReader(open(trained / "results.csv", encoding="utf-8")))
    assert {
        "dataset": "toy",
        "language": "en",
        "answer_type": "number",
        "metric": "vqa_score",
        "value": "100.0",
    } in cells


def test_model_folder_is_complete(trained, tiny_corpus):
    model = UC2ForVQA.from_pretrained(trained)
    assert model.config.id2label == {0: "2", 1: "blue", 2: "red"} or len(model.config.id2label) == 3
    assert model.config.label2id[model.config.id2label[1]] == 1
    assert UC2Processor.from_pretrained(trained).feature_size == 12
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "visual-question-answering" and len(card.data.eval_results) == 3
    assert (trained / "curves.png").stat().st_size > 10_000
    history = json.load(open(trained / "trainer_state.json"))["log_history"]
    assert [line["step"] for line in history if "eval_vqa_score" in line] == [20, 40, 60]


def test_a_fine_tuned_model_answers_without_training(folder, trained, tiny_corpus, tmp_path):
    from run_vqa import main

    options = {"model_name_or_path": trained, "train_files": None}
    files = [str(folder / "en.jsonl"), f"blind={folder / 'en_test.jsonl'}"]
    results = main(flags(folder, tiny_corpus, tmp_path, eval_files=files, **options))
    assert results["datasets"]["en"] == json.load(open(trained / "results.json"))["datasets"]["toy"]
    assert "blind" not in results["datasets"]
    predictions = [json.load(open(tmp_path / f"predictions_{name}.json")) for name in ("en", "blind")]
    assert predictions[0] == predictions[1] and not (tmp_path / "README.md").exists()


def test_one_head_for_two_languages(folder, tiny_corpus, tmp_path):
    from run_vqa import main

    files = [str(folder / f"{language}.jsonl") for language in QUESTIONS]
    options = {"train_files": files, "eval_files": files, "answer_vocabulary": "shared", "max_steps": 80}
    results = main(flags(folder, tiny_corpus, tmp_path, **options))
    labels = list(UC2ForVQA.from_pretrained(tmp_path).config.id2label.values())
    assert len(labels) == 5 and set(labels[3:]) == {"黒", "二つ"}
    assert results["datasets"]["en"]["en"]["vqa_score"] == results["datasets"]["ja"]["ja"]["vqa_score"] == 100


def test_two_processes_give_the_same_metrics_as_one(folder, tiny_corpus, tmp_path):
    """Two micro-batches of an update, on one process or on two: same weights, answers and scores."""
    from run_vqa import main

    common = {"max_steps": 6, "logging_steps": 1, "learning_rate": 3e-3}
    alone = main(flags(folder, tiny_corpus, tmp_path / "one", gradient_accumulation_steps=2, **common))
    script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run_vqa.py"]
    command = [
        sys.executable,
        *script,
        *flags(folder, tiny_corpus, tmp_path / "two", ddp_backend="gloo", **common),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    together = json.load(open(tmp_path / "two" / "results.json", encoding="utf-8"))
    assert together["datasets"] == alone["datasets"]
    losses = [
        [
            line["loss"]
            for line in json.load(open(tmp_path / name / "trainer_state.json"))["log_history"]
            if "loss" in line
        ]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def rewrite(source: Path, target: Path, change) -> Path:
    rows = [json.loads(line) for line in open(source, encoding="utf-8")]
    change(rows)
    target.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[2].pop("answers"), ["row 3", "'answers'", "answers to train on"]),
        (lambda rows: rows[4].update(answers=[]), ["row 5", "'answers'"]),
        (lambda rows: rows[1].update(image_id="nowhere"), ["row 2", "'nowhere'", "region store"]),
        (lambda rows: rows[3].update(question=" "), ["row 4", "'question'"]),
        (lambda rows: [row.update(answers=["the"]) for row in rows], ["'answers'", "no answer that is among"]),
        (lambda rows: rows[5].update(question_id=rows[0]["question_id"]), ["row 6", "question_id"]),
    ],
)
def test_bad_rows_stop_before_the_first_step(folder, tiny_corpus, tmp_path, change, words):
    from run_vqa import main

    file = rewrite(folder / "en.jsonl", tmp_path / "bad.jsonl", change)
    with pytest.raises(SystemExit) as stop:
        main(flags(folder, tiny_corpus, tmp_path / "out", train_files=file))
    message = str(stop.value)
    assert "\n" not in message and "bad.jsonl" in message and all(word in message for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"languages": ["en", "xx"]}, "only en, expected rows in 'xx'"),
        ({"eval_languages": "de"}, "only en, expected rows in 'de'"),
        ({"train_files": None, "eval_files": None}, "neither train_files nor eval_files"),
        ({"train_files": None}, "UC2ForPreTraining', expected UC2ForVQA"),
        ({"answer_vocabulary": "nothing.json"}, "own, shared or a JSON file"),
        ({"num_answers": 0}, "at least 1"),
        ({"model_name_or_path": "/no/such/model"}, "'/no/such/model', expected a folder or Hub id"),
        ({"eval_files": None, "eval_strategy": "steps"}, "expected no, or eval_files with answers"),
        ({"eval_files": "=x"}, "found '=x', expected name=value"),
        ({"eval_files": ["a=x", "a=y"]}, "found 'a=y', expected name=value, each name once"),
        ({"tokens_per_batch": -1}, "field 'tokens_per_batch': found -1, expected at least 0"),
        ({"tokens_per_batch": 5}, r"field 'tokens_per_batch': found 5, expected at least \d+, the tokens and regions"),
        ({"max_length": 63}, "field 'max_length': found 63, expected 3 to 62"),
    ],
)
def test_bad_options_stop_before_the_first_step(folder, tiny_corpus, tmp_path, changes, words):
    from run_vqa import main

    with pytest.raises(SystemExit, match=words):
        main(flags(folder, tiny_corpus, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_two_languages_need_a_shared_vocabulary(folder, tiny_corpus, tmp_path):
    from run_vqa import main

    files = [str(folder / f"{language}.jsonl") for language in QUESTIONS]
    with pytest.raises(SystemExit, match="found en, ja, expected one of them .* answer_vocabulary=shared"):
        main(flags(folder, tiny_corpus, tmp_path / "out", train_files=files))


def test_regions_of_another_width(folder, tiny_corpus, tmp_path):
    """A store whose features the model cannot read."""
    from dataclasses import replace

    from run_vqa import main

    rows = RegionStore(tiny_corpus.regions).values()
    write_region_store((replace(row, features=row.features[:, :5]) for row in rows), tmp_path / "narrow")
    with pytest.raises(SystemExit, match="features of width 5, expected 12"):
        main(flags(folder, tiny_corpus, tmp_path / "out", region_stores=tmp_path / "narrow"))


def test_a_loss_that_is_not_finite_stops_and_names_the_images(folder, tiny_corpus, tmp_path, monkeypatch):
    from run_vqa import main

    forward = UC2ForVQA.forward

    def poisoned(self, **inputs):
        outputs = forward(self, **inputs)
        if outputs.loss is not None:
            outputs["loss"] = outputs.loss * float("nan")
        return outputs

    monkeypatch.setattr(UC2ForVQA, "forward", poisoned)
    with pytest.raises(SystemExit, match=r"loss is nan at step 0.*non_finite_batch_step0.json"):
        main(flags(folder, tiny_corpus, tmp_path / "out"))
    saved = json.loads((tmp_path / "out" / "non_finite_batch_step0.json").read_text())
    assert saved["image_ids"] and all(name.startswith("image") for name in saved["image_ids"])
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("vqa_*.yaml")), ids=lambda path: path.stem)
def test_configurations_parse(path, monkeypatch):
    from run_vqa import DataArguments, VQATrainingArguments
    from uc2.arguments import parse

    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    data, args = parse((DataArguments, VQATrainingArguments), [str(path), "--output_dir", "elsewhere"])
    assert data.train_files and data.eval_files and args.output_dir == "elsewhere"
    assert data.tokens_per_batch == (0 if "demo" in path.stem else 10_240) and args.weight_decay == 0.01
