"""run_pretraining.py as its users run it: in one process, killed and resumed, on bad data."""

import json
import signal
import subprocess
import sys
import time

import pytest
from folder_contents import contents
from script_runs import NO_DROPOUT, SCRIPT, assert_same_weights, environment, flags, losses
from transformers import AutoModelForPreTraining, AutoProcessor

import run_pretraining


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


def test_evaluating_alone_changes_nothing_but_the_results(tiny_corpus, tmp_path):
    options = {"max_steps": 2, "config_overrides": json.dumps(NO_DROPOUT)}
    trained = run_pretraining.main(flags(tiny_corpus, tmp_path, **options))
    before = contents(tmp_path)
    options |= {"do_train": False, "model_name_or_path": tmp_path, "config_overrides": "{}", "ea_steps": 3}
    evaluated = run_pretraining.main(flags(tiny_corpus, tmp_path, **options))
    assert evaluated == pytest.approx(trained | {"epoch": 0})
    after = contents(tmp_path)
    assert json.loads(after.pop("results.json")) == evaluated and json.loads(before.pop("results.json")) == trained
    assert after == before
    with pytest.raises(ValueError, match="resume_from_checkpoint goes on training"):
        run_pretraining.main(flags(tiny_corpus, tmp_path, **options, resume_from_checkpoint=tmp_path / "checkpoint-2"))


def test_best_model_is_loaded_at_the_end_and_when_a_finished_run_starts_again(tiny_corpus, tmp_path):
    """A learning rate that ruins the model: the best checkpoint is an early one."""
    options = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "learning_rate": 0.3}
    options |= {"load_best_model_at_end": True, "lr_scheduler_type": "constant", "save_total_limit": 1}
    for _ in range(2):
        run_pretraining.main(flags(tiny_corpus, tmp_path, **options))
        state = json.loads((tmp_path / "trainer_state.json").read_text())
        losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        assert state["best_global_step"] == min(list(losses)[:3], key=losses.get)
        assert_same_weights(tmp_path, tmp_path / f"checkpoint-{state['best_global_step']}", rtol=0, atol=0)
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["eval_loss"] == pytest.approx(state["best_metric"])


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
