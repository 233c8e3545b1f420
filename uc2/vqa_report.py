"""What a VQA run leaves behind: the table (paper Table 2), results as JSON and CSV, the submission file."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from uc2.atomic_files import write_csv, write_json, write_text

METRICS = {"vqa_score": "VQA score", "accuracy": "accuracy", "bleu": "BLEU"}


def format_table(results: Mapping) -> str:
    """Markdown, in per cent: a row per data set and language, a column per metric and answer type.

    The last column is the best score of one answer given to every question, blind to question and image.
    """
    types = list(dict.fromkeys(kind for *_, row in _rows(results) for kind in row["answer_types"]))
    titles = ["questions", *METRICS.values(), *types, "best constant answer"]
    lines = ["| data set | language | " + " | ".join(titles) + " |", "|---|---|" + "---:|" * len(titles)]
    for name, language, row in _rows(results):
        cells = [f"{row['questions']:,}", *(f"{row[metric]:.1f}" for metric in METRICS)]
        for kind in types:
            scores = row["answer_types"].get(kind)
            cells.append("" if scores is None else f"{scores['vqa_score']:.1f}")
        cells.append(f"{row['constant_vqa_score']:.1f} ({row['constant_answer']})")
        lines.append(f"| {name} | {language} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(folder: str | os.PathLike, results: Mapping) -> None:
    """`results.json`, `results.csv` (a row per data set, language, answer type and metric), `table.md`."""
    folder = Path(folder)
    write_json(results, folder / "results.json")
    cells = [("dataset", "language", "answer_type", "metric", "value")]
    for name, language, row in _rows(results):
        for kind, scores in {"all": row, **row["answer_types"]}.items():
            cells += [(name, language, kind, metric, scores[metric]) for metric in METRICS if metric in scores]
    write_csv(cells, folder / "results.csv")
    write_text(format_table(results) + "\n", folder / "table.md")


def write_submission(
    path: str | os.PathLike, question_ids: Sequence[str], predictions: Sequence[str]
) -> None:
    """The official format: `[{"question_id": 262148000, "answer": "yes"}, …]`; ids of digits are numbers."""
    rows = [
        {"question_id": int(name) if name.isascii() and name.isdigit() else name, "answer": answer}
        for name, answer in zip(question_ids, predictions, strict=True)
    ]
    write_json(rows, path, indent=None)


def card_results(results: Mapping) -> list[dict]:
    """Every score as an entry of the card's model-index."""
    task = {"task": "visual question answering"}
    return [
        {**task, "dataset": name, "language": language, "metric": title, "value": row[metric]}
        | ({"chance": row["constant_vqa_score"]} if metric == "vqa_score" else {})
        for name, language, row in _rows(results)
        for metric, title in METRICS.items()
    ]


def _rows(results: Mapping) -> Iterator[tuple[str, str, Mapping]]:
    for name, languages in results["datasets"].items():
        for language, row in languages.items():
            yield name, language, row
