"""What a pre-trained model can do, as one table: masked accuracies and zero-shot retrieval beside chance."""

from collections import Counter, defaultdict

import numpy as np

from modeling_uc2.configuration_uc2 import OBJECTIVES

from .retrieval import recall_at_k
from .scoring import score_matrix

COLUMNS = ("mlm", "vtlm", "tlm", "mrtm", "mrc", "itm")
CARD_TASKS = {
    "mlm": "masked language modelling",
    "vtlm": "visual translation language modelling",
    "tlm": "translation language modelling",
    "mrtm": "masked region-to-token modelling",
    "mrc": "masked region classification",
    "itm": "image-text matching",
}
IGNORED = -100


def evaluate_zero_shot_retrieval(
    model, processor, rows, store, *, languages: list[str], num_images: int, precision: str = "fp32"
) -> dict[str, float]:
    """Retrieval among the first `num_images` rows with the ITM head, without fine-tuning.

    Returns `average_recall_<language>` (per cent; mean of R@1, 5, 10 in both directions), each with
    `chance_average_recall_<language>`: what a constant scorer gets.
    """
    rows = rows.select(range(min(num_images, len(rows))))
    metrics = {}
    for language in languages:
        captioned = [(row["captions"][language], row["image_id"]) for row in rows if row["captions"].get(language)]
        if not captioned:
            continue
        texts, images = zip(*captioned, strict=True)
        position = {image: index for index, image in enumerate(dict.fromkeys(images))}
        text_to_image = np.array([position[image] for image in images])
        regions = [store[image] for image in position]
        scores = score_matrix(model, texts, regions, processor, precision=precision, progress=True)
        metrics[f"average_recall_{language}"] = recall_at_k(scores, text_to_image)["average_recall"]
        chance = recall_at_k(np.zeros_like(scores), text_to_image)["average_recall"]
        metrics[f"chance_average_recall_{language}"] = chance
    return metrics


def chance_accuracies(dataset, passes: int = 1) -> dict[str, float]:
    """`chance_<objective>_<language>`: the share of the most frequent target among a `PretrainingDataset`'s
    targets of its first epochs. A predictor that ignores its input cannot do better."""
    targets: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for key in range(passes * len(dataset)):
        example = dataset[key]
        cell = (OBJECTIVES[example["objective_id"]], dataset.languages[example["language_id"]])
        for name in ("labels", "region_labels", "region_class_labels"):
            if name in example:
                values = np.asarray(example[name])
                targets[cell].update(values[values != IGNORED].tolist())
        if example["itm_label"] != IGNORED:
            targets[cell].update([example["itm_label"]])
    return {
        f"chance_{objective}_{language}": max(counts.values()) / counts.total()
        for (objective, language), counts in targets.items()
        if counts
    }


def card_results(metrics: dict[str, float], languages: list[str]) -> list[dict]:
    """Every accuracy and recall of a language as an entry of the card's model-index, in per cent."""
    results = []
    for language in languages:
        for name in COLUMNS:
            key = f"{name}_{language}"
            if f"eval_accuracy_{key}" in metrics:
                result = {"task": CARD_TASKS[name], "metric": f"{name.upper()} accuracy"}
                value, chance = (100 * metrics[f"eval_{kind}_{key}"] for kind in ("accuracy", "chance"))
                results.append({**result, "language": language, "value": value, "chance": chance})
        if f"eval_average_recall_{language}" in metrics:
            result = {"task": "zero-shot retrieval", "metric": "zero-shot average recall"}
            value, chance = (metrics[f"eval_{kind}average_recall_{language}"] for kind in ("", "chance_"))
            results.append({**result, "language": language, "value": value, "chance": chance})
    return [{**result, "dataset": "held-out captions"} for result in results]


def report_table(metrics: dict[str, float], languages: list[str]) -> str:
    """A Markdown table, a row per language: per objective, accuracy and chance in per cent; zero-shot AR."""
    objectives = [name for name in COLUMNS if f"eval_accuracy_{name}" in metrics]
    columns = [(f"{name.upper()} accuracy", f"accuracy_{name}", f"chance_{name}", 100) for name in objectives]
    if any(name.startswith("eval_average_recall_") for name in metrics):
        columns.append(("zero-shot AR", "average_recall", "chance_average_recall", 1))
    lines = [
        "| language | " + " | ".join(f"{title} (chance)" for title, *_ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for language in languages:
        cells = []
        for _, name, chance, scale in columns:
            value, floor = (metrics.get(f"eval_{key}_{language}") for key in (name, chance))
            shown = "-" if value is None else f"{scale * value:.1f}"
            cells.append(shown if floor is None else f"{shown} ({scale * floor:.1f})")
        lines.append(f"| {language} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
