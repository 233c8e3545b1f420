"""Runs of run_pretraining.py on the tiny corpus, and what the tests compare of them."""

import json
import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

import run_pretraining

SCRIPT = Path(run_pretraining.__file__)
NO_DROPOUT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def environment(**variables: str) -> dict[str, str]:
    paths = {"PYTHONPATH": str(SCRIPT.parent), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **paths, **variables}


def run(command: list, **variables: str) -> subprocess.CompletedProcess:
    """Starts a command as a user in the repository's folder does, with further environment variables."""
    return subprocess.run(
        [str(word) for word in command],
        env=environment(**variables),
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )


def flags(corpus, output_dir, **options) -> list[str]:
    options = {"do_train": True, "output_dir": output_dir, **options}
    return [*corpus.flags(), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


def assert_same_weights(first: Path, second: Path, **tolerance):
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
