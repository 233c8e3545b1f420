"""Evaluates a model on retrieval test sets and writes what came out: table, JSON, CSV, recall curve, grid."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uc2.atomic_files import write_csv, write_json, write_text
from uc2.data_error import DataError, Found
from uc2.retrieval import SearchHit, average_metrics, fold_indices, meta_average, recall_at_k, score_matrix
from uc2.retrieval_data import RetrievalTestSet
from uc2.scoring import save_scores
from uc2.visualization import image_grid, recall_curves

KS = (1, 5, 10)
WAYS = {"text_to_image": "T→I", "image_to_text": "I→T"}
METRICS = {f"{way}_r{k}": f"{sign} R@{k}" for way, sign in WAYS.items() for k in KS}
METRICS["average_recall"] = "AR"
CARD_METRICS = {f"{way}_r{k}": f"{way.replace('_', '-')} R@{k}" for way in WAYS for k in KS}
CARD_METRICS["average_recall"] = "average recall"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png")


def evaluate_retrieval(
    model,
    processor,
    store: Mapping,
    test_sets: Sequence[RetrievalTestSet],
    *,
    resume_dir: str | os.PathLike | None = None,
    save_dir: str | os.PathLike | None = None,
    **scoring_options,
) -> dict:
    """Score all pairs of every test set (paper Table 1).

    Args:
        resume_dir: a folder for finished blocks of scores, see `score_matrix`.
        save_dir: a folder for the score matrices, a .npy file per test set and fold.
    Returns:
        `{"datasets": {name: {language: recalls}}, "chance": the same for a constant scorer, "meta_average"}`.
    """
    results: dict = {"datasets": {}, "chance": {}}
    for test_set in test_sets:
        recalls, chance = [], []
        folds = fold_indices(test_set.text_to_image, len(test_set.image_ids), test_set.folds)
        for fold, (texts, images) in enumerate(folds):
            name = f"{test_set.name}.{test_set.language}.{fold}"
            scores = score_matrix(
                model,
                [test_set.texts[text] for text in texts],
                [store[test_set.image_ids[image]] for image in images],
                processor,
                resume_dir=None if resume_dir is None else Path(resume_dir, name),
                **scoring_options,
            )
            if save_dir is not None:
                save_scores(Path(save_dir, f"{name}.npy"), scores)
            text_to_image = test_set.text_to_image[texts] - images[0]
            recalls.append(recall_at_k(scores, text_to_image, KS))
            chance.append(recall_at_k(np.zeros_like(scores), text_to_image, KS))
        results["datasets"].setdefault(test_set.name, {})[test_set.language] = average_metrics(recalls)
        results["chance"].setdefault(test_set.name, {})[test_set.language] = average_metrics(chance)
    for part, name in (("datasets", "meta_average"), ("chance", "chance_meta_average")):
        results[name] = meta_average(rows["average_recall"] for *_, rows in _rows(results[part]))
    return results


def flat_metrics(results: dict) -> dict[str, float]:
    """`{"meta_average", "<data set>_<language>_<metric>"}`: what the Trainer logs."""
    flat = {"meta_average": results["meta_average"]}
    for name, language, recalls in _rows(results["datasets"]):
        flat |= {f"{name}_{language}_{metric}": value for metric, value in recalls.items()}
    return flat


def _rows(by_dataset: Mapping) -> list[tuple[str, str, dict[str, float]]]:
    return [
        (name, language, recalls)
        for name, languages in by_dataset.items()
        for language, recalls in languages.items()
    ]


def format_table(results: dict) -> str:
    """Table 1's layout in Markdown: R@1/5/10 each way and AR per data set and language, then Meta-Ave."""
    metrics, titles = list(METRICS), [*METRICS.values(), "AR by chance"]
    lines = ["| data set | language | " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(titles)]
    for name, language, recalls in _rows(results["datasets"]):
        values = [recalls[metric] for metric in metrics]
        values.append(results["chance"][name][language]["average_recall"])
        lines.append(f"| {name} | {language} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    averages = f"**{results['meta_average']:.1f}** | {results['chance_meta_average']:.1f}"
    lines.append("| **Meta-Ave** | |" + " |" * len(metrics[:-1]) + f" {averages} |")
    return "\n".join(lines)


def card_results(results: dict) -> list[dict]:
    """Every recall as an entry of the card's model-index, beside that of a constant scorer, and Meta-Ave."""
    if not results:
        return []
    rows = [
        {"task": "retrieval", "dataset": name, "language": language, "metric": CARD_METRICS[metric]}
        | {"value": value, "chance": results["chance"][name][language][metric]}
        for name, language, recalls in _rows(results["datasets"])
        for metric, value in recalls.items()
    ]
    average = {"metric": "Meta-Ave", "value": results["meta_average"], "chance": results["chance_meta_average"]}
    return [*rows, {"task": "retrieval", "dataset": "all data sets and languages", **average}]


def write_results(folder: str | os.PathLike, results: dict) -> None:
    """`results.json`, `results.csv` (a row per data set, language, metric), `table.md`, `recall_*.png`."""
    folder = Path(folder)
    write_json(results, folder / "results.json")
    cells = [("dataset", "language", "metric", "value")]
    for name, language, recalls in _rows(results["datasets"]):
        cells += [(name, language, metric, value) for metric, value in recalls.items()]
    write_csv([*cells, ("", "", "meta_average", results["meta_average"])], folder / "results.csv")
    write_text(format_table(results) + "\n", folder / "table.md")
    for direction in WAYS:
        plot_recall(results, folder / f"recall_{direction}.png", direction)


def plot_recall(results: dict, path: str | os.PathLike, direction: str) -> None:
    """Recall@k over k, a line per data set and language, and chance; `direction`: which metric's prefix."""
    curves = {
        f"{name} {language}": {k: recalls[f"{direction}_r{k}"] for k in KS}
        for name, language, recalls in _rows(results["datasets"])
    }
    chance = average_metrics([recalls for *_, recalls in _rows(results["chance"])])
    chance = {k: chance[f"{direction}_r{k}"] for k in KS}
    recall_curves(curves, path, chance=chance, title=direction.replace("_", " "))


def save_search_grid(hits: Sequence[SearchHit], image_dir: str | os.PathLike, title: str, path) -> None:
    """The found images side by side, with rank, id and probability.

    Raises:
        DataError: if a found image is not in `image_dir` as `<image id>.jpg`, `.jpeg` or `.png`.
    """
    files = [find_image(image_dir, hit.item) for hit in hits]
    titles = [f"{rank}. {hit.item}  {hit.probability:.2f}" for rank, hit in enumerate(hits, start=1)]
    image_grid(files, titles, path, heading=title)


def find_image(image_dir: str | os.PathLike, image_id: str) -> Path:
    """The picture of an image id in a folder."""
    candidates = [Path(image_dir, image_id + ending) for ending in ("", *IMAGE_ENDINGS)]
    for path in candidates:
        if path.is_file():
            return path
    found, expected = Found("no such picture"), f"a file with one of the endings {', '.join(IMAGE_ENDINGS)}"
    raise DataError(file=Path(image_dir, image_id), found=found, expected=expected)
