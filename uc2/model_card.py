"""Model cards: what a run knows about its model, put into a template and checked for the Hub.

The templates are the Markdown files of `model_cards/`; the metadata block is made by huggingface_hub's own
classes, so that language, base model, results (model-index) appear on the model's page. Nothing here uses the
network.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open
from transformers import TrainingArguments

from uc2.atomic_files import write_text

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
OBJECTIVES = {
    "mlm": "masked language modelling (MLM)",
    "itm": "image-text matching (ITM)",
    "mrtm": "masked region-to-token modelling (MRTM)",
    "vtlm": "visual translation language modelling (VTLM)",
    "tlm": "text-only translation language modelling (TLM)",
    "mrc": "masked region classification (MRC)",
    "mrc_kl": "masked region classification with KL divergence (MRC-KL)",
    "mrfr": "masked region feature regression (MRFR)",
}
ARCHITECTURES = {
    "detector": "ResNet C4 Faster R-CNN with an attribute head; a region's feature is the mean of its last stage.",
}
ENCODER = "One Transformer encoder of XLM-R's shape over `[text ; regions]`; a region enters by its feature and box."
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "region_feature_size",
    "num_region_classes",
    # the detector's
    "depths",
    "widths",
    "feature_size",
    "num_classes",
    "num_attributes",
)


def write_model_card(
    folder: str | os.PathLike,
    kind: str,
    *,
    model_name: str,
    load_from: str | None = None,
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
        load_from: the folder or Hub id from which the examples load; the model's name if left out.
        config: the model's configuration; its sizes and objectives are listed.
        languages: codes of the training languages.
        data, hyperparameters: names and values, listed as they are.
        results: dicts with `task`, `dataset`, `metric`, `value` and optionally `language`, `split`, `chance`: the
            value that no knowledge of the input gives.
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
    hyperparameters = dict(hyperparameters or {})
    base_model = base_model or hyperparameters.get("base_model")
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
    text = _template(kind).render(
        card_data=metadata.to_yaml(),
        model_name=model_name,
        load_from=load_from or model_name,
        language_list=", ".join(languages) or "not stated",
        several_languages=len(languages) > 1,
        base_model_text=None if base_model is None else _shown(base_model),
        objectives=", ".join(OBJECTIVES[name] for name in getattr(config, "objectives", ())) or "not stated",
        early_adaptation=bool(hyperparameters.get("early_adaptation_steps")),
        architecture=ARCHITECTURES.get(kind, ENCODER),
        sizes=_table(_sizes(config, Path(folder))),
        has_curves=Path(folder, "curves.png").is_file(),
        has_chance=any(result.get("chance") is not None for result in results),
        num_answers=getattr(config, "num_labels", None),
        data=_table(data or {}),
        hyperparameters=_table(hyperparameters),
        results=_result_table(results),
        usage=usage,
        notes=notes,
        license_name=license,
        paper=PAPER,
    )
    path = Path(folder, "README.md")
    write_text(_without_gaps(text), path)
    return path


def card_names(args: TrainingArguments) -> dict[str, str]:
    """`model_name` and `load_from` of a run's card: its repository's, if it has one, else its folder's."""
    load_from = args.hub_model_id or args.output_dir
    return {"model_name": Path(load_from).absolute().name, "load_from": load_from}


def training_table(args: TrainingArguments, steps: int) -> dict:
    """The options of a run that every script has, for `hyperparameters`."""
    return {
        "learning_rate": args.learning_rate,
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warmup": args.warmup_steps,
        "optimiser_steps": steps,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "adam_betas": [args.adam_beta1, args.adam_beta2],
        "weight_decay": args.weight_decay,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
    }


def _template(kind: str):
    """The template of a kind of card, in a checkout or in an installed package."""
    if not any((folder / f"{kind}.md").is_file() for folder in TEMPLATE_FOLDERS):
        raise FileNotFoundError(f"no {kind}.md in {' or '.join(map(str, TEMPLATE_FOLDERS))}")
    loader = FileSystemLoader(TEMPLATE_FOLDERS, encoding="utf-8")
    options = {"trim_blocks": True, "keep_trailing_newline": True}
    return Environment(loader=loader, undefined=StrictUndefined, **options).get_template(f"{kind}.md")


def _without_gaps(text: str) -> str:
    """At most one empty line in a row: parts that are left out leave theirs behind."""
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


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
        metric_value=round(result["value"], 4),
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


def _sizes(config, folder: Path) -> dict:
    """The sizes that a configuration has, and the number of parameters in the folder's weights."""
    sizes = {name: getattr(config, name) for name in SIZES if hasattr(config, name)}
    parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return sizes | ({"parameters": parameters} if parameters else {})


def _table(values: Mapping) -> str:
    """A Markdown table of names and values, without those that are None; empty without values."""
    rows = [[name.replace("_", " "), _shown(value)] for name, value in values.items() if value is not None]
    return _markdown_table(["", ""], rows) if rows else ""


def _result_table(results: Sequence[Mapping]) -> str:
    """A row per data set and language, a column per metric; in parentheses what is reached by chance."""
    metrics = list(dict.fromkeys(result["metric"] for result in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        cells = rows.setdefault((result["dataset"], result.get("language") or ""), {})
        chance = "" if result.get("chance") is None else f" ({result['chance']:.1f})"
        cells[result["metric"]] = f"{result['value']:.1f}{chance}"
    lines = [[*place, *(cells.get(metric, "") for metric in metrics)] for place, cells in rows.items()]
    return _markdown_table(["Data", "Language", *metrics], lines) if results else ""


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    # A card is read by others, whom the author's folders tell nothing.
    return Path(value).name if isinstance(value, (str, Path)) and Path(value).is_absolute() else str(value)
