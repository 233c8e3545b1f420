"""Evaluates a model on retrieval test sets and writes what came out: table, JSON, CSV, recall curve, grid."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uc2.atomic_files import atomic_file
from uc2.retrieval import SearchHit, average_metrics, fold_indices, meta_average, recall_at_k, score_matrix
from uc2.retrieval_data import RetrievalTestSet
from uc2.scoring import save_scores

KS = (1, 5, 10)
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
    metrics = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in KS] + ["average_recall"]
    titles = [f"{way} R@{k}" for way in ("T→I", "I→T") for k in KS] + ["AR", "AR by chance"]
    lines = ["| data set | language | " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(titles)]
    for name, language, recalls in _rows(results["datasets"]):
        values = [recalls[metric] for metric in metrics]
        values.append(results["chance"][name][language]["average_recall"])
        lines.append(f"| {name} | {language} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    averages = f"**{results['meta_average']:.1f}** | {results['chance_meta_average']:.1f}"
    lines.append("| **Meta-Ave** | |" + " |" * len(metrics[:-1]) + f" {averages} |")
    return "\n".join(lines)


def write_results(folder: str | os.PathLike, results: dict) -> None:
    """`results.json`, `results.csv` (a row per data set, language and metric), `table.md`, `recall.png`."""
    folder = Path(folder)
    with atomic_file(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    with (
        atomic_file(folder / "results.csv") as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as f,
    ):
        writer = csv.writer(f)
        writer.writerow(("dataset", "language", "metric", "value"))
        for name, language, recalls in _rows(results["datasets"]):
            writer.writerows((name, language, metric, value) for metric, value in recalls.items())
        writer.writerow(("", "", "meta_average", results["meta_average"]))
    with atomic_file(folder / "table.md") as temporary:
        temporary.write_text(format_table(results) + "\n", encoding="utf-8")
    plot_recall(results, folder / "recall.png")


def plot_recall(results: dict, path: str | os.PathLike) -> None:
    """Recall@k over k, a panel per direction and a line per data set and language, with chance dotted."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, way, title in zip(
        panels, ("text_to_image", "image_to_text"), ("text to image", "image to text"), strict=True
    ):
        for name, language, recalls in _rows(results["datasets"]):
            line = panel.plot(
                KS, [recalls[f"{way}_r{k}"] for k in KS], marker="o", label=f"{name} {language}"
            )
            chance = results["chance"][name][language]
            panel.plot(KS, [chance[f"{way}_r{k}"] for k in KS], linestyle=":", color=line[0].get_color())
        panel.set(title=title, xlabel="k", xticks=KS, ylim=(0, 100))
    panels[0].set_ylabel("Recall@k in % (dotted: chance)")
    panels[1].legend(fontsize="small")
    _save_figure(plt, figure, path)


def save_search_grid(hits: Sequence[SearchHit], image_dir: str | os.PathLike, title: str, path) -> None:
    """The found images side by side, with rank, id and probability.

    Raises:
        FileNotFoundError: if a found image is not in `image_dir` as `<image id>.jpg`, `.jpeg` or `.png`.
    """
    from PIL import Image

    files = [find_image(image_dir, hit.item) for hit in hits]
    plt = _pyplot()
    columns = min(5, len(hits))
    rows = -(-len(hits) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows + 0.5), squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for rank, (hit, file, panel) in enumerate(zip(hits, files, panels.flat, strict=False), start=1):
        with Image.open(file) as image:
            panel.imshow(image.convert("RGB"))
        panel.set_title(f"{rank}. {hit.item}  {hit.probability:.2f}", fontsize="small")
    figure.suptitle(title)
    _save_figure(plt, figure, path)


def find_image(image_dir: str | os.PathLike, image_id: str) -> Path:
    """The picture of an image id in a folder."""
    candidates = [Path(image_dir, image_id + ending) for ending in ("", *IMAGE_ENDINGS)]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{image_dir} has no picture of image {image_id!r} ({', '.join(IMAGE_ENDINGS)})")


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # writes files; needs no display
    import matplotlib.pyplot as plt

    return plt


def _save_figure(plt, figure, path: str | os.PathLike) -> None:
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
