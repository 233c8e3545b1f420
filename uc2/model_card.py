"""Model cards: what a run knows about its model, put into a template and checked for the Hub.

The templates are the Markdown files of `model_cards/`; the metadata block is made by huggingface_hub's own
classes, so that language, base model, results (model-index) appear on the model's page. Nothing here uses the
network.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from uc2.atomic_files import atomic_file

PIPELINE_TAGS = {
    "pretraining": "feature-extraction",
    # Scores texts against an image, as CLIP does; the Hub has no tag of its own for retrieval.
    "retrieval": "zero-shot-image-classification",
    "vqa": "visual-question-answering",
    "detector": "object-detection",
}
"""The kinds of cards, and where the Hub lists such models."""

# A checkout has the templates beside the packages, an installed package has them inside `uc2`.
TEMPLATE_FOLDERS = (Path(__file__).parent / "model_cards", Path(__file__).parents[1] / "model_cards")
PAPER = "https://arxiv.org/abs/2104.00332"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "region_feature_size",
    "num_region_classes",
)


def write_model_card(
    folder: str | os.PathLike,
    kind: str,
    *,
    model_name: str,
    config=None,
    languages: Sequence[str] = (),
    data: Mapping | None = None,
    hyperparameters: Mapping | None = None,
    results: Iterable[Mapping] = (),
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
    tags: Sequence[str] = (),
    usage: str | None = None,
    notes: str | None = None,
) -> Path:
    """Writes `README.md` into the folder, whole or not at all.

    Args:
        folder: where the model was saved.
        kind: "pretraining", "retrieval", "vqa" or "detector".
        model_name: the name in the title and in the model-index.
        config: the model's configuration; its sizes are listed.
        languages: codes of the training languages.
        data, hyperparameters: names and values, listed as they are.
        results: dicts with `task`, `dataset`, `metric`, `value` and optionally `language`, `split`.
        base_model: what was fine-tuned. A local folder is named in the text but not in the metadata, where
            only Hub ids are valid. Without it, `hyperparameters["base_model"]` is taken.
        datasets: Hub ids of the training data.
        license, tags: metadata of the Hub.
        usage: Markdown in place of the template's usage example.
        notes: Markdown put under "Notes".
    Raises:
        ValueError: an unknown kind, a result that lacks a field or has no finite number as value.
    """
    if kind not in PIPELINE_TAGS:
        raise ValueError(f"unknown kind of model card {kind!r}; choose one of {', '.join(PIPELINE_TAGS)}")
    results = [_checked_result(result) for result in results]
    base_model = base_model or dict(hyperparameters or {}).get("base_model")
    metadata = ModelCardData(
        language=list(languages) or None,
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[kind],
        tags=["uc2", "vision-and-language", "multilingual", *tags],
        base_model=base_model if _is_hub_id(base_model) else None,
        datasets=list(datasets) or None,
        model_name=model_name,
        eval_results=[_eval_result(result) for result in results] or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(template_path(kind)),
        model_name=model_name,
        language_list=", ".join(languages) or "not stated",
        base_model_text=base_model,
        sizes=_table({name: getattr(config, name) for name in SIZES if hasattr(config, name)}),
        num_answers=getattr(config, "num_labels", None),
        data=_table(data or {}),
        hyperparameters=_table(hyperparameters or {}),
        results=_result_table(results),
        usage=usage,
        notes=notes,
        paper=PAPER,
    )
    path = Path(folder, "README.md")
    with atomic_file(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return path


def template_path(kind: str) -> Path:
    """The template of a kind of card, in a checkout or in an installed package."""
    for folder in TEMPLATE_FOLDERS:
        path = folder / f"{kind}.md"
        if path.is_file():
            return path
    raise FileNotFoundError(f"no {kind}.md in {' or '.join(map(str, TEMPLATE_FOLDERS))}")


def _checked_result(result: Mapping) -> dict:
    missing = [name for name in ("task", "dataset", "metric", "value") if name not in result]
    if missing:
        raise ValueError(f"the result {dict(result)} lacks {', '.join(missing)}")
    value = float(result["value"])
    if not math.isfinite(value):
        raise ValueError(
            f"the result {result['metric']!r} on {result['dataset']!r} is {value}: no finite number"
        )
    return {**result, "value": value}


def _eval_result(result: Mapping) -> EvalResult:
    """One entry of the model-index; the type is the machine-readable form of the name."""
    dataset = result["dataset"]
    if result.get("language"):
        dataset = f"{dataset} ({result['language']})"
    return EvalResult(
        task_type=_slug(result["task"]),
        task_name=result["task"],
        dataset_type=_slug(dataset),
        dataset_name=dataset,
        dataset_config=result.get("language"),
        dataset_split=result.get("split"),
        metric_type=_slug(result["metric"]),
        metric_name=result["metric"],
        metric_value=result["value"],
    )


def _slug(name: str) -> str:
    words = "".join(letter if letter.isalnum() or letter in "_@." else " " for letter in name.lower()).split()
    return "-".join(words)


def _is_hub_id(name: str | None) -> bool:
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _table(values: Mapping) -> str:
    """A Markdown table of names and values, without those that are None; empty without values."""
    rows = [[name.replace("_", " "), _shown(value)] for name, value in values.items() if value is not None]
    return _markdown_table(["", ""], rows) if rows else ""


def _result_table(results: Sequence[Mapping]) -> str:
    if not results:
        return ""
    rows = [
        [
            result["task"],
            result["dataset"],
            result.get("language") or "",
            result["metric"],
            f"{result['value']:.4g}",
        ]
        for result in results
    ]
    return _markdown_table(["Task", "Data", "Language", "Metric", "Value"], rows)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)
