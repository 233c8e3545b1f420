"""The paper's ablations (Tables 3, 4 and 5, Fig. 4) in miniature, on the demo corpus.

    make demo/corpus/corpus.json
    python benchmarks/ablations.py                       # every setting, three seeds: 100 minutes on 2 cores
    python benchmarks/ablations.py --settings full without-ea --seeds 0 --steps 2000

Each (setting, seed) is one run of run_pretraining.py with configs/pretrain_demo.yaml, evaluated on all objectives,
also on those it was not trained with, and, as in the paper, one of run_retrieval.py on English captions alone,
evaluated in all six languages. Finished runs are kept, so that a stopped call goes on. Writes docs/ablations.md and
docs/ablations.png after every run: mean and spread over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from uc2.atomic_files import atomic_directory
from uc2.rows import write_jsonl
from uc2.visualization import new_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "test")
MIX = {"itm": 9, "mlm": 12, "mrtm": 9, "vtlm": 3}


def mix(without: str | None = None, **replaced: str) -> list[str]:
    """The flag of the paper's mix, without an objective or with another in its place and at its rate."""
    rates = {replaced.get(name, name): rate for name, rate in MIX.items() if name != without}
    return ["--objective_mix", json.dumps(rates)]


CORPUS = ROOT / "demo/corpus"
GERMAN_FIRST = ROOT / "demo/ablations/german_first"
SETTINGS = {
    "full": [],
    "mlm-itm": ["--objective_mix", json.dumps({"itm": 9, "mlm": 12})],
    "without-ea": ["--ea_steps", "0"],
    "without-mlm": mix(without="mlm"),
    "without-itm": mix(without="itm"),
    "without-mrtm": mix(without="mrtm"),
    "without-vtlm": mix(without="vtlm"),
    "mrc-for-mrtm": mix(mrtm="mrc"),
    "mrc-kl-for-mrtm": mix(mrtm="mrc_kl"),
    "english-pivot": mix(vtlm="tlm"),
    "german-first": [
        *("--pivot_language", "de", "--train_file", str(GERMAN_FIRST / "train.jsonl")),
        *("--eval_file", str(GERMAN_FIRST / "test.jsonl")),
    ],
    "co-masking-random": ["--co_masking", "random"],
    "co-masking-full": ["--co_masking", "full"],
    "en-only": [*mix(without="vtlm"), "--languages", "en"],
    "en-de": ["--languages", "en", "de"],
    "en-de-fr-cs": ["--languages", "en", "de", "fr", "cs"],
}
TABLES = {
    "Tables 3 and 5: objectives, Early Adaptation, co-masking": [
        *("full", "mlm-itm", "without-ea", "without-mlm", "without-itm", "without-mrtm", "without-vtlm"),
        *("mrc-for-mrtm", "mrc-kl-for-mrtm", "co-masking-random", "co-masking-full"),
    ],
    "Table 4: what the languages meet in (images; English text; German captions as the first ones)": [
        *("full", "english-pivot", "german-first"),
    ],
    "Fig. 4: number of languages": ["en-only", "en-de", "en-de-fr-cs", "full"],
}
RECALLS = ("fine-tuned AR, en", "fine-tuned AR, other five", "AR before")
COLUMNS = (*RECALLS, *(objective.upper() for objective in MIX))
FINE_TUNED = "retrieval-en"


def run(setting: str, seed: int, args) -> Path:
    """Pre-trains, then fine-tunes on English captions; what has its results.json is not run again."""
    folder = args.output_dir / f"{setting}-seed{seed}-steps{args.steps}"
    flags = ["--seed", str(seed), "--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none"]
    pretraining = ["--max_steps", str(args.steps), "--eval_strategy", "no", *SETTINGS[setting]]
    if "--languages" not in pretraining:
        pretraining += ["--eval_objective_mix", json.dumps(MIX)]
    run_script("run_pretraining.py", "configs/pretrain_demo.yaml", folder, [*flags, *pretraining])
    fine_tuning = ["--model", str(folder), "--train_languages", "en"]
    run_script("run_retrieval.py", "configs/retrieval_demo.yaml", folder / FINE_TUNED, [*flags, *fine_tuning])
    return folder


def run_script(script: str, config: str, folder: Path, flags: list[str]) -> None:
    if (folder / "results.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / script, ROOT / config, "--output_dir", folder, *flags]
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=log, env=environment)


def read_metrics(folder: Path) -> dict[str, float]:
    """A run's table row in per cent, without the objectives that it was not evaluated on."""
    pretraining = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    fine_tuned = json.loads((folder / FINE_TUNED / "results.json").read_text(encoding="utf-8"))
    recalls = {code: row["average_recall"] for code, row in fine_tuned["datasets"]["scenes"].items()}
    before = [value for name, value in pretraining.items() if name.startswith("eval_average_recall_")]
    means = (recalls.pop("en"), statistics.mean(recalls.values()), statistics.mean(before))
    row = dict(zip(RECALLS, means, strict=True))
    row |= {"chance": fine_tuned["chance_meta_average"], "chance before": pretraining["eval_chance_average_recall_en"]}
    accuracies = {objective: pretraining.get(f"eval_accuracy_{objective}") for objective in MIX}
    return row | {name.upper(): 100 * value for name, value in accuracies.items() if value is not None}


def align_to_german() -> None:
    """Training and test captions, aligned together, with links that start from the German caption."""
    if GERMAN_FIRST.exists():
        return
    with atomic_directory(GERMAN_FIRST) as folder:
        lines = {split: (CORPUS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines() for split in SPLITS}
        rows = [json.loads(line) for split in SPLITS for line in lines[split]]
        unaligned = [{name: row[name] for name in ("image_id", "captions")} for row in rows]
        write_jsonl(unaligned, folder / "unaligned.jsonl")
        flags = ["--input", folder / "unaligned.jsonl", "--output", folder / "aligned.jsonl", "--pivot", "de"]
        command = [sys.executable, ROOT / "prepare_corpus.py", "align", *flags, "--tokenizer", CORPUS / "tokenizer"]
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT)
        aligned = (folder / "aligned.jsonl").read_text(encoding="utf-8").splitlines()
        for split in SPLITS:
            own, aligned = aligned[: len(lines[split])], aligned[len(lines[split]) :]
            (folder / f"{split}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")


def cell(rows: list[dict[str, float]], column: str) -> str:
    values = [row[column] for row in rows if column in row]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(runs: dict[str, list[dict]], settings: list[str]) -> str:
    lines = ["| setting | runs | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (1 + len(COLUMNS))]
    for setting in settings:
        if setting in runs:
            cells = [cell(runs[setting], column) for column in COLUMNS]
            lines.append("| " + " | ".join([setting, str(len(runs[setting])), *cells]) + " |")
    return "\n".join(lines)


def finished_runs(args) -> dict[str, list[dict]]:
    """{setting: row of each seed} of all finished runs of this length in the output folder, of earlier calls too."""
    runs: dict[str, list[dict]] = {}
    for setting in SETTINGS:
        for results in sorted(args.output_dir.glob(f"{setting}-seed*-steps{args.steps}/{FINE_TUNED}/results.json")):
            runs.setdefault(setting, []).append(read_metrics(results.parents[1]))
    return runs


def write_report(runs: dict[str, list[dict]], args) -> None:
    """docs/ablations.md, with what docs/ablations_notes.md says about it, and docs/ablations.png."""
    row = next(iter(runs.values()))[0]
    parts = [
        "# Ablations in miniature",
        f"Demo corpus, {args.steps:,} steps of pre-training a run; in per cent, mean ± standard deviation over the "
        "runs, which differ in their seed. Fine-tuned AR is the average recall among 150 held-out scenes after "
        "fine-tuning on English captions alone, in English and, zero-shot, in the other five languages; AR before is "
        "that of the ITM head among 100 scenes without fine-tuning, over the languages of pre-training (chance: "
        f"{row['chance']:.1f} and {row['chance before']:.1f}). The others are held-out accuracies, also of objectives "
        "that a run was not trained with. Written by `benchmarks/ablations.py`.",
    ]
    for title, settings in TABLES.items():
        parts += [f"## {title}", table(runs, settings)]
    parts.append("![average recall](ablations.png)")
    notes = ROOT / "docs/ablations_notes.md"
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8").rstrip())
    (ROOT / "docs/ablations.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(runs, ROOT / "docs/ablations.png")


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """The three average recalls, a bar per setting and a dot per seed."""
    figure = new_figure(11, 0.35 * len(runs) + 1)
    panels = figure.subplots(1, len(RECALLS), sharey=True)
    for panel, column in zip(panels, RECALLS, strict=True):
        for place, (setting, rows) in enumerate(runs.items()):
            values = [row[column] for row in rows]
            colour = "tab:orange" if setting == "full" else "tab:blue"
            panel.barh(place, statistics.mean(values), color=colour, height=0.6)
            panel.plot(values, [place] * len(values), ".", color="black")
        panel.set_title(column, fontsize="medium")
        panel.set_xlim(0, 100)
    panels[0].set_yticks(range(len(runs)), list(runs))
    panels[0].invert_yaxis()
    figure.supxlabel("per cent; a dot is a seed", fontsize="small")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo/ablations")
    args = parser.parse_args(argv)
    if "german-first" in args.settings:
        align_to_german()
    pool = ThreadPoolExecutor(args.jobs)
    try:
        runs = [pool.submit(run, setting, seed, args) for seed in args.seeds for setting in args.settings]
        for finished in as_completed(runs):
            folder = finished.result()
            write_report(finished_runs(args), args)
            row = read_metrics(folder)
            print(f"{folder.name}: " + ", ".join(f"{name} {row[name]:.1f}" for name in RECALLS), flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
