"""The paper's ablations (Tables 3, 4 and 5, Fig. 4) in miniature, on the demo corpus.

    make demo/corpus/corpus.json
    python benchmarks/ablations.py                       # every setting, three seeds: an hour or two on 2 cores
    python benchmarks/ablations.py --settings full without-ea --seeds 0 --steps 2000

Each (setting, seed) is one run of run_pretraining.py with configs/pretrain_demo.yaml, evaluated on all objectives,
also on those it was not trained with; finished runs are kept, so that a stopped call goes on. Writes
docs/ablations.md and docs/ablations.png after every run: mean and spread over the seeds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from uc2.atomic_files import atomic_directory
from uc2.rows import write_jsonl
from uc2.visualization import new_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "de", "fr", "cs", "ja", "zh")
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
COLUMNS = {
    "zero-shot AR": "average_recall",
    "AR without en": "average_recall_other",
    "ITM": "accuracy_itm",
    "MLM": "accuracy_mlm",
    "MRTM": "accuracy_mrtm",
    "VTLM": "accuracy_vtlm",
}


def run(setting: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """The metrics of one run, from its results.json if it has finished before."""
    results = folder / "results.json"
    if not results.exists():
        flags = ["--output_dir", folder, "--seed", seed, "--max_steps", steps, "--save_strategy", "no"]
        flags += ["--eval_strategy", "no", "--disable_tqdm", "true", "--report_to", "none", *SETTINGS[setting]]
        if "--languages" not in flags:
            flags += ["--eval_objective_mix", json.dumps(MIX)]
        command = [sys.executable, ROOT / "run_pretraining.py", ROOT / "configs/pretrain_demo.yaml", *flags]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            words = [str(word) for word in command]
            subprocess.run(words, check=True, cwd=ROOT, stdout=log, stderr=log, env=environment)
    return json.loads(results.read_text(encoding="utf-8"))


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


def summary(metrics: dict[str, float], name: str) -> float | None:
    """A column's value in per cent: recall is averaged over the six languages, or over all but English."""
    if name.startswith("average_recall"):
        codes = LANGUAGES[1:] if name.endswith("other") else LANGUAGES
        recalls = [metrics.get(f"eval_average_recall_{code}") for code in codes]
        recalls = [recall for recall in recalls if recall is not None]
        return statistics.mean(recalls) if recalls else None
    value = metrics.get(f"eval_{name}")
    return None if value is None else 100 * value


def cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def table(runs: dict[str, list[dict]], settings: list[str]) -> str:
    lines = ["| setting | runs | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (1 + len(COLUMNS))]
    for setting in settings:
        if setting in runs:
            cells = [cell([summary(metrics, name) for metrics in runs[setting]]) for name in COLUMNS.values()]
            lines.append("| " + " | ".join([setting, str(len(runs[setting])), *cells]) + " |")
    return "\n".join(lines)


def finished_runs(args) -> dict[str, list[dict]]:
    """{setting: metrics of each seed} of all runs of this length in the output folder, of earlier calls too."""
    runs: dict[str, list[dict]] = {}
    for setting in SETTINGS:
        for results in sorted(args.output_dir.glob(f"{setting}-seed*-steps{args.steps}/results.json")):
            runs.setdefault(setting, []).append(json.loads(results.read_text(encoding="utf-8")))
    return runs


def write_report(runs: dict[str, list[dict]], args) -> None:
    """docs/ablations.md, with what docs/ablations_notes.md says about it, and docs/ablations.png."""
    chance = next(iter(runs.values()))[0]["eval_chance_average_recall_en"]
    parts = [
        "# Ablations in miniature",
        f"Demo corpus, {args.steps} steps a run; in per cent, mean ± standard deviation over the runs, which differ "
        "in their seed. Zero-shot AR is the average recall among 100 held-out scenes with the ITM head and no "
        f"fine-tuning (chance {chance:.1f}); the others are held-out accuracies, also of objectives that a run was "
        "not trained with. Written by `benchmarks/ablations.py`.",
    ]
    for title, settings in TABLES.items():
        parts += [f"## {title}", table(runs, settings)]
    parts.append("![zero-shot average recall](ablations.png)")
    notes = ROOT / "docs/ablations_notes.md"
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8").rstrip())
    (ROOT / "docs/ablations.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(runs, ROOT / "docs/ablations.png")


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    figure = new_figure(8, 0.4 * len(runs) + 1)
    panel = figure.subplots()
    for place, (setting, results) in enumerate(runs.items()):
        values = [summary(metrics, "average_recall") or 0.0 for metrics in results]
        colour = "tab:orange" if setting == "full" else "tab:blue"
        panel.barh(place, statistics.mean(values), color=colour, height=0.6)
        panel.plot(values, [place] * len(values), ".", color="black")
    panel.set_yticks(range(len(runs)), list(runs))
    panel.invert_yaxis()
    panel.set_xlabel("zero-shot average recall, per cent; a dot is a seed")
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
    wanted = [(setting, seed) for seed in args.seeds for setting in args.settings]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = [args.output_dir / f"{setting}-seed{seed}-steps{args.steps}" for setting, seed in wanted]
        results = pool.map(lambda task, folder: run(*task, args.steps, folder), wanted, folders)
        for (setting, seed), metrics in zip(wanted, results, strict=True):
            write_report(finished_runs(args), args)
            print(f"{setting}, seed {seed}: AR {cell([summary(metrics, 'average_recall')])}", flush=True)


if __name__ == "__main__":
    main()
