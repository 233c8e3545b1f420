"""The paper's ablations (Tables 3, 4 and 5, Fig. 4) in miniature, on the demo corpus.

    python prepare_corpus.py scenes --output_dir demo/corpus --num_train 2500 --num_val 150 --num_test 150
    python benchmarks/ablations.py                         # every setting, three seeds: some hours on 2 cores
    python benchmarks/ablations.py --settings full without-ea --seeds 0 --steps 2000

Each (setting, seed) is one run of run_pretraining.py with configs/pretrain_demo.yaml; finished runs are kept, so that
a stopped call goes on. Writes docs/ablations.md and docs/ablations.png: zero-shot average recall and held-out
accuracies, mean and spread over the seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from uc2.visualization import new_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "de", "fr", "cs", "ja", "zh")
MIX = {"itm": 9, "mlm": 12, "mrtm": 9, "vtlm": 3}


def mix(without: str | None = None, **replaced: str) -> list[str]:
    """The flag of the demo's mix, without an objective or with another in its place and at its rate."""
    rates = {replaced.get(name, name): rate for name, rate in MIX.items() if name != without}
    return ["--objective_mix", json.dumps(rates)]


SETTINGS = {
    # Tables 3 and 5: what each objective and Early Adaptation bring.
    "full": [],
    "without-ea": ["--ea_steps", "0"],
    "without-mlm": mix(without="mlm"),
    "without-itm": mix(without="itm"),
    "without-mrtm": mix(without="mrtm"),
    "without-vtlm": mix(without="vtlm"),
    "mrc-for-mrtm": mix(mrtm="mrc"),
    "mrc-kl-for-mrtm": mix(mrtm="mrc_kl"),
    # Table 4: English as the pivot, by text-only translation language modelling.
    "english-pivot": mix(vtlm="tlm"),
    # VTLM's co-masking.
    "co-masking-random": ["--co_masking", "random"],
    "co-masking-full": ["--co_masking", "full"],
    # Fig. 4: fewer languages.
    "en-only": [*mix(without="vtlm"), "--languages", "en"],
    "en-de": ["--languages", "en", "de"],
    "en-de-fr-cs": ["--languages", "en", "de", "fr", "cs"],
}
COLUMNS = {
    "zero-shot AR": "average_recall",
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
        command = [sys.executable, ROOT / "run_pretraining.py", ROOT / "configs/pretrain_demo.yaml", *flags]
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads(results.read_text(encoding="utf-8"))


def summary(metrics: dict[str, float], name: str) -> float | None:
    """A column's value in per cent: recall is averaged over the languages the run was evaluated in."""
    if name == "average_recall":
        recalls = [metrics[key] for key in (f"eval_{name}_{code}" for code in LANGUAGES) if key in metrics]
        return statistics.mean(recalls) if recalls else None
    value = metrics.get(f"eval_{name}")
    return None if value is None else 100 * value


def cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def write_report(runs: dict[str, list[dict]], args) -> None:
    header = ["setting", *COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for setting, results in runs.items():
        cells = [cell([summary(metrics, name) for metrics in results]) for name in COLUMNS.values()]
        lines.append("| " + " | ".join([setting, *cells]) + " |")
    chance = next(iter(runs.values()))[0]["eval_chance_average_recall_en"]
    text = (
        "# Ablations in miniature\n\n"
        f"Demo corpus, {args.steps} steps, seeds {args.seeds}; in per cent, mean ± standard deviation over the seeds. "
        f"Zero-shot AR is the average recall among 100 held-out scenes with the ITM head (chance {chance:.1f}), "
        "averaged over the run's languages; the others are held-out accuracies. Written by "
        "`benchmarks/ablations.py`.\n\n" + "\n".join(lines) + "\n\n![zero-shot average recall](ablations.png)\n"
    )
    notes = ROOT / "docs/ablations_notes.md"
    if notes.exists():
        text += "\n" + notes.read_text(encoding="utf-8")
    (ROOT / "docs/ablations.md").write_text(text, encoding="utf-8")
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
    panel.set_xlabel("zero-shot average recall, per cent")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "demo/ablations")
    args = parser.parse_args(argv)
    runs: dict[str, list[dict]] = {}
    for seed in args.seeds:
        for setting in args.settings:
            folder = args.output_dir / f"{setting}-seed{seed}-steps{args.steps}"
            runs.setdefault(setting, []).append(run(setting, seed, args.steps, folder))
            write_report(runs, args)
            print(f"{setting}, seed {seed}: AR {cell([summary(runs[setting][-1], 'average_recall')])}", flush=True)


if __name__ == "__main__":
    main()
