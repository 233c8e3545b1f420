"""run_pretraining.py as its users run it: in one process, killed and resumed, in two processes, on bad data."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoProcessor

import run_pretraining

SCRIPT = Path(run_pretraining.__file__)
NO_DROPOUT = json.dumps(
    {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent), "HF_HUB_OFFLINE": "1"}


def run(command: list, **kwargs) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [str(word) for word in command], env=environment(), capture_output=True, text=True, timeout=120, **kwargs
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def flags(corpus, output_dir, **options) -> list[str]:
    options = {"do_train": True, "output_dir": output_dir, **options}
    return [*corpus.flags(), *(str(word) for name, value in options.items() for word in (f"--{name}", value))]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_weights(first: Path, second: Path, **tolerance):
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_trains_evaluates_saves_and_reports(tiny_corpus, tmp_path, capsys):
    metrics = run_pretraining.main(
        flags(tiny_corpus, tmp_path, max_steps=4, ea_steps=3, ea_batch_size=4, retrieval_images=8)
    )
    for objective in ("mlm", "itm", "mrtm", "vtlm"):
        assert 0 <= metrics[f"eval_accuracy_{objective}"] <= 1
    assert metrics["eval_chance_average_recall_de"] == pytest.approx(100 * (1 + 5 + 8) / 24)
    assert "| ja |" in capsys.readouterr().out
    written = {path.name for path in tmp_path.iterdir()}
    assert {"README.md", "curves.png", "results.json", "model.safetensors", "object_labels.json"} <= written
    AutoModelForPreTraining.from_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)


def test_goes_on_from_a_checkpoint_with_another_objective_set(tiny_corpus, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run_pretraining.main(flags(tiny_corpus, first, max_steps=1))
    mix = json.dumps({"mlm": 1, "mrc": 1, "tlm": 1})
    options = {"model_name_or_path": first, "objective_mix": mix, "config_overrides": "{}", "max_steps": 1}
    metrics = run_pretraining.main(flags(tiny_corpus, second, **options))
    assert {"eval_loss_mlm", "eval_loss_mrc", "eval_loss_tlm"} <= metrics.keys()
    assert "eval_loss_mrtm" not in metrics


def test_held_out_objectives_and_weights_may_differ_from_the_mix(tiny_corpus, tmp_path):
    """An ablation is evaluated on the objective it leaves out, and a weight replaces an objective's share."""
    options = {"objective_mix": '{"itm": 1, "mlm": 3}', "objective_weights": '{"itm": 1.0}'}
    metrics = run_pretraining.main(
        flags(tiny_corpus, tmp_path, max_steps=1, eval_objective_mix='{"itm": 1, "vtlm": 1}', **options)
    )
    assert {name for name in metrics if name.startswith("eval_loss_")} == {"eval_loss_itm", "eval_loss_vtlm"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["objective_weights"] == {"itm": 1.0, "mlm": 0.75}


def test_killed_and_resumed_equals_undisturbed(tiny_corpus, tmp_path):
    """SIGKILL after some checkpoint, in the middle of whatever the run is doing; dropout is on."""
    options = {"max_steps": 12, "save_steps": 2, "ea_steps": 4, "num_train_epochs": 4}
    run_pretraining.main(flags(tiny_corpus, tmp_path / "undisturbed", **options))
    command = [sys.executable, SCRIPT, *flags(tiny_corpus, tmp_path / "killed", **options)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([str(word) for word in command], env=environment(), stdout=log, stderr=log)
        deadline = time.time() + 120
        # save_total_limit is off, so that a complete checkpoint stays once it is there.
        while not (tmp_path / "killed/checkpoint-4/trainer_state.json").exists():
            assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/model.safetensors").exists(), "the run ended before it was killed"
    run_pretraining.main(flags(tiny_corpus, tmp_path / "killed", **options))
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert len(losses(tmp_path / "killed")) == 12
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed", rtol=0, atol=0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun() -> list:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def accelerate_launch() -> list:
    """Two CPU processes need --multi_gpu; `--cpu --num_processes 2` would start one."""
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options["main_process_port"] = free_port()
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *words]


@pytest.mark.parametrize("launcher", [torchrun, accelerate_launch])
def test_two_processes_train_as_one(tiny_corpus, tmp_path, launcher):
    """Two processes of one micro-batch against one process of two: the same losses and weights."""
    common = {"max_steps": 5, "per_device_train_batch_size": 3, "config_overrides": NO_DROPOUT, "ea_steps": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    expected = run_pretraining.main(flags(tiny_corpus, one, gradient_accumulation_steps=2, **common))
    run([*launcher(), SCRIPT, *flags(tiny_corpus, two, gradient_accumulation_steps=1, **common)])
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert_same_weights(one, two, rtol=1e-3, atol=1e-5)
    metrics = json.loads((two / "results.json").read_text())
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_bad_row_stops_before_the_first_step(tiny_corpus, tmp_path):
    rows = tiny_corpus.captions.read_text(encoding="utf-8").splitlines()
    rows[2] = json.dumps({"image_id": "nowhere", "captions": {"en": "a ball"}})
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(rows), encoding="utf-8")
    arguments = flags(tiny_corpus, tmp_path / "out")
    arguments[arguments.index("--train_file") + 1] = str(captions)
    with pytest.raises(SystemExit, match="captions.jsonl, row 3, field 'image_id'"):
        run_pretraining.main(arguments)
    assert not (tmp_path / "out").exists()


def test_unknown_option_in_a_file_is_named(tiny_corpus, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("lerning_rate: 1.0e-4\n")
    with pytest.raises(SystemExit):
        run_pretraining.main([str(settings), *flags(tiny_corpus, tmp_path / "out")])
    assert "settings.yaml: unknown option 'lerning_rate'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pretrain_paper.yaml", "pretrain_demo.yaml"])
def test_shipped_configurations_parse(name):
    from uc2.arguments import parse
    from uc2.pretraining_arguments import (
        DataArguments,
        EarlyAdaptationArguments,
        ModelArguments,
        PretrainingArguments,
        ReportArguments,
    )

    kinds = (ModelArguments, DataArguments, EarlyAdaptationArguments, ReportArguments, PretrainingArguments)
    *_, args = parse(kinds, [str(SCRIPT.parent / "configs" / name), "--bf16", "false"])
    assert args.do_train
