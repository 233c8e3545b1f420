"""Model cards: read back with huggingface_hub's own parser, checked by the Hub's rules, and their examples run."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from hub_metadata_rules import metadata_errors
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from modeling_uc2 import (
    UC2Config,
    UC2ForPreTraining,
    UC2ForRetrieval,
    UC2ForVQA,
    UC2RegionDetector,
    UC2RegionDetectorConfig,
)
from processing_uc2 import UC2DetectorImageProcessor, UC2Processor
from uc2 import model_card
from uc2.model_card import OBJECTIVES, PIPELINE_TAGS, write_model_card
from uc2.pretraining_report import card_results as pretraining_results
from uc2.retrieval_report import card_results as retrieval_results
from uc2.vqa_report import card_results as vqa_results

ROOT = Path(__file__).parents[1]
RESULTS = [
    {
        "task": "visual question answering",
        "dataset": "VQA v2",
        "metric": "VQA score",
        "value": 71.5,
        "language": "en",
        "chance": 24.25,
    },
    {
        "task": "visual question answering",
        "dataset": "VG-VQA",
        "metric": "accuracy",
        "value": 34,
        "language": "ja",
    },
]


def write(folder, kind="vqa", **changes):
    options = {
        "model_name": "uc2-vqa",
        "config": types.SimpleNamespace(hidden_size=768, num_labels=3129, vocab_size=250_002),
        "languages": ["en", "ja"],
        "data": {"questions": ["a.jsonl", "b.jsonl"], "rows": 443_757},
        "hyperparameters": {"learning_rate": 2e-5, "adam_betas": [0.9, 0.98], "base_model": "org/uc2-base"},
        "results": RESULTS,
    }
    return write_model_card(folder, kind, **{**options, **changes})


# Metadata


@pytest.mark.parametrize("kind", PIPELINE_TAGS)
def test_metadata_is_what_the_hub_reads(tmp_path, kind):
    path = write(tmp_path, kind)
    assert path == tmp_path / "README.md" and list(tmp_path.iterdir()) == [path]
    assert metadata_errors(path.read_text(encoding="utf-8")) == []
    card = ModelCard.load(path)
    assert card.data.language == ["en", "ja"] and card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers" and card.data.base_model == "org/uc2-base"
    assert card.data.pipeline_tag == PIPELINE_TAGS[kind] and "uc2" in card.data.tags
    assert card.data.model_name == "uc2-vqa"
    first, second = sorted(card.data.eval_results, key=lambda result: result.metric_type)
    assert first.task_type == "visual-question-answering"
    assert (first.dataset_config, first.metric_type) == ("ja", "accuracy")
    assert second.metric_value == 71.5 and second.dataset_name == "VQA v2 (en)"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("license: mine", "license"),
        ("language: English", "language"),
        ("pipeline_tag: retrieval-of-things", "pipeline_tag"),
        ("base_model: /home/me/uc2", "base_model"),
        ("model-index:\n- name: a\n  results:\n  - task: {type: t}", "dataset.name"),
        ("tags: [a, : b", "YAML"),
    ],
)
def test_the_rules_refuse_what_the_hub_refuses(metadata, words):
    (error, *_) = metadata_errors(f"---\n{metadata}\n---\n# A model\n")
    assert words in error


def test_a_local_base_model_is_not_in_the_metadata(tmp_path):
    card = ModelCard.load(write(tmp_path, base_model=str(tmp_path)))
    assert card.data.base_model is None and f"`{tmp_path.name}`" in card.text


# Text


def test_text_holds_every_value(tmp_path):
    text = write(tmp_path, notes="A note.").read_text(encoding="utf-8")
    rows = ("| Data | Language | VQA score | accuracy |", "| VQA v2 | en | 71.5 (24.2) |  |")
    rows += ("| VG-VQA | ja |  | 34.0 |",)
    values = ("a.jsonl, b.jsonl", "443,757", "2e-05", "0.9, 0.98", "A note.")
    for words in ("# uc2-vqa", "3,129 answers", *values, *rows, "@inproceedings{zhou2021uc2"):
        assert words in text
    assert "{{ " not in text and "{%" not in text


@pytest.mark.parametrize("kind", PIPELINE_TAGS)
def test_titles_stand_alone_and_nothing_is_left_out(tmp_path, kind):
    text = write(tmp_path, kind).read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    wanted = ["How to use", "Architecture", "Training data", "Training", "Results", "Limits and biases"]
    assert titles == [*wanted, "Deviations from the original", "Licence", "Citation"]
    assert len(re.findall(r"\n\n## .+\n\n", text)) == len(titles)
    assert "\n\n\n" not in text


def test_empty_parts_are_left_out(tmp_path):
    path = write(tmp_path, data=None, hyperparameters=None, results=[], config=None, usage="See the README.")
    text = path.read_text(encoding="utf-8")
    for title in ("## Training", "## Results", "## Notes", "## Architecture", "from_pretrained"):
        assert title not in text
    assert "See the README." in text and ModelCard.load(path).data.eval_results is None


def test_paths_of_the_author_are_not_told(tmp_path):
    data = {"captions": [str(tmp_path / "train.jsonl"), "own/captions.jsonl"]}
    text = write(tmp_path, data=data).read_text(encoding="utf-8")
    assert "| captions | train.jsonl, own/captions.jsonl |" in text and str(tmp_path) not in text


def test_the_objectives_are_those_of_the_model(tmp_path):
    config = UC2Config(objectives=["mlm", "mrc"])
    text = write(tmp_path, "pretraining", config=config).read_text(encoding="utf-8")
    assert "Objectives: masked language modelling (MLM), masked region classification (MRC).\n" in text
    assert "Early Adaptation" not in text and "VTLM" not in text
    text = write(tmp_path, "pretraining", hyperparameters={"early_adaptation_steps": 7}).read_text(encoding="utf-8")
    assert "before them, Early Adaptation" in text


def test_every_objective_has_a_name():
    from modeling_uc2 import OBJECTIVES as known

    assert list(OBJECTIVES) == list(known)


def test_curves_are_shown_where_there_are_some(tmp_path):
    assert "curves.png" not in write(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "curves.png").touch()
    assert "(curves.png)" in write(tmp_path).read_text(encoding="utf-8")


# Results of the scripts


def test_results_of_a_pre_training_are_in_per_cent_with_chance():
    metrics = {"eval_accuracy_itm_de": 0.9, "eval_chance_itm_de": 0.5, "eval_accuracy_itm": 0.8, "eval_loss": 2.0}
    metrics |= {"eval_average_recall_de": 40.0, "eval_chance_average_recall_de": 5.0}
    accuracy, recall = pretraining_results(metrics, ["en", "de"])
    assert (accuracy["metric"], accuracy["language"], accuracy["value"], accuracy["chance"]) == (
        "ITM accuracy", "de", pytest.approx(90), pytest.approx(50),
    )  # fmt: skip
    assert (recall["metric"], recall["value"], recall["chance"]) == ("zero-shot average recall", 40.0, 5.0)


def test_results_of_retrieval_and_vqa():
    cell = {"text_to_image_r1": 30.0, "average_recall": 50.0}
    chance = {"text_to_image_r1": 1.0, "average_recall": 2.0}
    results = {"datasets": {"m30k": {"de": cell}}, "chance": {"m30k": {"de": chance}}}
    rows = retrieval_results({**results, "meta_average": 50.0, "chance_meta_average": 2.0})
    assert [(row["metric"], row["value"], row["chance"]) for row in rows] == [
        ("text-to-image R@1", 30.0, 1.0),
        ("average recall", 50.0, 2.0),
        ("Meta-Ave", 50.0, 2.0),
    ]
    assert retrieval_results({}) == []
    row = {"vqa_score": 60.0, "accuracy": 55.0, "bleu": 50.0, "constant_vqa_score": 25.0}
    rows = vqa_results({"datasets": {"vqa": {"en": row}}})
    assert [(row["metric"], row["value"], row.get("chance")) for row in rows] == [
        ("VQA score", 60.0, 25.0),
        ("accuracy", 55.0, None),
        ("BLEU", 50.0, None),
    ]


# The examples


CLASSES = {"pretraining": UC2ForPreTraining, "retrieval": UC2ForRetrieval, "vqa": UC2ForVQA}


def save_tiny(kind: str, folder: Path, tokenizer: Path):
    """A tiny model of the kind with its processor; returns the configuration."""
    torch.manual_seed(0)
    if kind == "detector":
        sizes = {"depths": [1, 1, 1, 1], "widths": [4, 4, 8, 8], "num_classes": 7, "num_attributes": 5}
        config = UC2RegionDetectorConfig(**sizes, proposal_hidden_size=8)
        UC2RegionDetector(config).save_pretrained(folder)
        UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
        return config
    processor = UC2Processor(AutoTokenizer.from_pretrained(tokenizer), feature_size=12)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    answers = {0: "red", 1: "two"}
    config = UC2Config(vocab_size=len(processor.tokenizer), region_feature_size=12, id2label=answers, **sizes)
    CLASSES[kind](config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return config


@pytest.mark.parametrize("kind", PIPELINE_TAGS)
def test_the_example_runs_as_it_stands(kind, tmp_path, tiny_corpus):
    config = save_tiny(kind, tmp_path, tiny_corpus.tokenizer)
    text = write(tmp_path, kind, config=config, load_from=str(tmp_path)).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found, screen = {}, io.StringIO()
    with contextlib.redirect_stdout(screen):
        exec(compile(code, f"{kind}.md", "exec"), found)
    if kind == "pretraining":
        assert found["match"].shape == (2,) and found["encoded"].pooler_output.shape == (2, 16)
    elif kind == "retrieval":
        assert found["scores"].shape == (2,) and found["scores"].isfinite().all()
    elif kind == "vqa":
        assert {line.split()[1] for line in screen.getvalue().splitlines()} == {"red", "two"}
    else:
        assert found["found"].region_features.shape[::2] == (1, config.feature_size)


def test_the_number_of_parameters_is_that_of_the_saved_weights(tmp_path, tiny_corpus):
    config = save_tiny("retrieval", tmp_path, tiny_corpus.tokenizer)
    count = UC2ForRetrieval(config).num_parameters()
    assert f"| parameters | {count:,} |" in write(tmp_path, "retrieval", config=config).read_text(encoding="utf-8")


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "poem"}, "unknown kind of model card 'poem'; choose one of pretraining"),
        ({"results": [{"task": "a", "dataset": "b", "value": 1}]}, "lacks metric"),
        ({"results": [{**RESULTS[0], "value": float("nan")}]}, "no finite number"),
    ],
)
def test_bad_input_leaves_the_folder_alone(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_missing_template_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(model_card, "TEMPLATE_FOLDERS", (tmp_path,))
    with pytest.raises(FileNotFoundError, match="no vqa.md in"):
        write(tmp_path)


def test_an_installed_package_has_the_templates(tmp_path):
    """Builds the wheel's files with setuptools, offline, and looks for the templates where `uc2` looks."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "*.png", "runs", "demo")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-c", "from setuptools import build_meta as b; print(b.build_wheel('dist'))"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    names = zipfile.ZipFile(source / "dist" / done.stdout.split()[-1]).namelist()
    templates = {path.name for path in (ROOT / "model_cards").glob("*.md")}
    assert templates >= {f"{kind}.md" for kind in PIPELINE_TAGS}
    assert {f"uc2/model_cards/{name}" for name in templates} <= set(names)
