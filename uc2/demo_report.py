"""The end of `make demo`: the paper's tables in miniature and its Figure 3, from what the runs left behind.

    python -m uc2.demo_report demo

prints the tables and writes them, with the pictures, to demo/report.md.
"""

import json
import sys
from pathlib import Path

import numpy as np

from modeling_uc2 import UC2ForPreTraining
from processing_uc2 import UC2Processor

from .atomic_files import write_text
from .pretraining_report import report_table
from .region_store import RegionStore
from .rows import load_parallel_captions
from .scene_captions import GRAMMARS
from .visualization import draw_word_attention, heat_map, word_attention

# Folder of a retrieval run -> its row in Table 1.
RETRIEVAL_RUNS = {
    "retrieval-untrained": "not pre-trained, English-only",
    "retrieval-zero-shot": "pre-trained, no fine-tuning",
    "retrieval-en": "pre-trained, English-only",
    "retrieval-de": "pre-trained, German only",
    "retrieval": "pre-trained, all-language",
}
VQA_RUNS = {"vqa-en-untrained": "not pre-trained", "vqa-en": "pre-trained", "vqa-ja": "pre-trained"}
DATASET = "scenes"
ATTENTION_LANGUAGES = ("en", "de", "cs")


def retrieval_table(demo: Path) -> str:
    """Average recall per language and Meta-Ave of every run, and chance (paper Table 1)."""
    results = {name: _results(demo / folder) for folder, name in RETRIEVAL_RUNS.items()}
    languages = list(next(iter(results.values()))["datasets"][DATASET])
    lines = ["| average recall | " + " | ".join(languages) + " | Meta-Ave |", "|---|" + "---:|" * (len(languages) + 1)]

    def line(name: str, recalls: dict, meta: float) -> None:
        cells = [f"{recalls[language]['average_recall']:.1f}" for language in languages]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{meta:.1f}"]) + " |")

    chance = next(iter(results.values()))
    line("chance", chance["chance"][DATASET], chance["chance_meta_average"])
    for name, result in results.items():
        line(name, result["datasets"][DATASET], result["meta_average"])
    values = [
        [result["datasets"][DATASET][language]["average_recall"] for language in languages]
        for result in results.values()
    ]
    heat_map(
        np.array(values), list(results), languages, demo / "retrieval.png", title="Average recall", limits=(0, 100)
    )
    return "\n".join(lines)


def vqa_table(demo: Path) -> str:
    """Score, accuracy and BLEU of every run beside the best constant answer (paper Table 2)."""
    lines = ["| VQA | language | VQA score | accuracy | BLEU | best constant answer |", "|---|---|" + "---:|" * 4]
    for folder, name in VQA_RUNS.items():
        for language, row in _results(demo / folder)["datasets"][DATASET].items():
            cells = (row[key] for key in ("vqa_score", "accuracy", "bleu", "constant_vqa_score"))
            lines.append(f"| {name} | {language} | " + " | ".join(f"{value:.1f}" for value in cells) + " |")
    return "\n".join(lines)


def _results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def attention_picture(demo: Path) -> Path:
    """One object's word in several languages over the picture of a test scene (paper Fig. 3)."""
    model = UC2ForPreTraining.from_pretrained(demo / "pretraining")
    processor = UC2Processor.from_pretrained(demo / "pretraining")
    store = RegionStore(demo / "corpus/regions")
    labels = processor.object_labels
    for row in load_parallel_captions(str(demo / "corpus/test.jsonl")):
        region = store[row["image_id"]]
        # A captioned object whose name stands unchanged in every language's caption.
        for class_id in region.class_ids:
            words = {language: labels[language][class_id] for language in ATTENTION_LANGUAGES}
            if all(word in row["captions"][language] for language, word in words.items()):
                attentions = {
                    language: word_attention(model, processor, row["captions"][language], word, region)
                    for language, word in words.items()
                }
                image = demo / "corpus/images" / f"{row['image_id']}.png"
                return draw_word_attention(image, attentions, demo / "attention.png")
    raise ValueError("no test scene names an object in the same form in all of " + ", ".join(ATTENTION_LANGUAGES))


REPORT = """# The demo's results

All figures in per cent, chance in brackets.

## Pre-training: held-out accuracies, and retrieval with the ITM head without fine-tuning

{pretraining}

![losses and accuracies](pretraining/curves.png)

## Table 1 in miniature: retrieval among the held-out scenes, average recall

{retrieval}

![average recall](retrieval.png)

## Table 2 in miniature: visual question answering

{vqa}

## Figure 3 in miniature: where the word for one object looks, in three languages

![attention](attention.png)
"""


def main(argv: list[str] | None = None) -> None:
    (folder,) = sys.argv[1:] if argv is None else argv
    demo = Path(folder)
    metrics = _results(demo / "pretraining")
    report = REPORT.format(
        pretraining=report_table(metrics, list(GRAMMARS)), retrieval=retrieval_table(demo), vqa=vqa_table(demo)
    )
    attention_picture(demo)
    write_text(report, demo / "report.md")
    print(report, f"This report: {demo / 'report.md'}", sep="\n")


if __name__ == "__main__":
    main()
