"""Model cards: read back with huggingface_hub's own parser; found in a checkout and when installed."""

import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from uc2 import model_card
from uc2.model_card import PIPELINE_TAGS, write_model_card

ROOT = Path(__file__).parents[1]
RESULTS = [
    {
        "task": "visual question answering",
        "dataset": "VQA v2",
        "metric": "VQA score",
        "value": 71.5,
        "language": "en",
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


@pytest.mark.parametrize("kind", PIPELINE_TAGS)
def test_metadata_is_what_the_hub_reads(tmp_path, kind):
    path = write(tmp_path, kind)
    assert path == tmp_path / "README.md" and list(tmp_path.iterdir()) == [path]
    card = ModelCard.load(path)
    assert card.data.language == ["en", "ja"] and card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers" and card.data.base_model == "org/uc2-base"
    assert card.data.pipeline_tag == PIPELINE_TAGS[kind] and "uc2" in card.data.tags
    assert card.data.model_name == "uc2-vqa"
    first, second = sorted(card.data.eval_results, key=lambda result: result.metric_type)
    assert first.task_type == "visual-question-answering"
    assert (first.dataset_config, first.metric_type) == ("ja", "accuracy")
    assert second.metric_value == 71.5 and second.dataset_name == "VQA v2 (en)"


def test_text_holds_every_value(tmp_path):
    text = write(tmp_path, notes="A note.").read_text(encoding="utf-8")
    result = "| visual question answering | VQA v2 | en | VQA score | 71.5 |"
    values = ("a.jsonl, b.jsonl", "443,757", "2e-05", "0.9, 0.98", "A note.")
    for words in ("# uc2-vqa", "3129 answers", *values, result, "@inproceedings{zhou2021uc2"):
        assert words in text
    assert "{{" not in text and "{%" not in text and "## How to use\n\n```python" in text


def test_python_of_the_usage_examples_compiles(tmp_path):
    for kind in PIPELINE_TAGS:
        text = write(tmp_path, kind).read_text(encoding="utf-8")
        compile(text.split("```python\n")[1].split("```")[0], kind, "exec")


def test_empty_parts_are_left_out(tmp_path):
    path = write(tmp_path, data=None, hyperparameters=None, results=[], config=None, usage="See the README.")
    text = path.read_text(encoding="utf-8")
    for title in ("## Training", "## Results", "## Notes", "## Architecture", "from_pretrained"):
        assert title not in text
    assert "See the README." in text and ModelCard.load(path).data.eval_results is None


def test_local_base_model_is_not_in_the_metadata(tmp_path):
    card = ModelCard.load(write(tmp_path, base_model=str(tmp_path)))
    assert card.data.base_model is None and f"`{tmp_path}`" in card.text


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
    assert {f"uc2/model_cards/{kind}.md" for kind in PIPELINE_TAGS} <= set(names)
