"""Two processes on a CPU, under every configuration of configs/accelerate, against one undisturbed process.

Nothing here ran on a GPU: NCCL, overlapping communication and speed are not tested.
"""

import importlib.util
import json
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from script_runs import NO_DROPOUT, SCRIPT, assert_same_weights, flags, history, losses, run
from torch.distributed.fsdp import MixedPrecisionPolicy

import run_pretraining
from uc2.distributed import keep_sums_exact

WORKER = Path(__file__).with_name("distributed_worker.py")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason='DeepSpeed is missing: pip install -e ".[deepspeed]"'
)
# 1 process x 2 micro-batches of up to 70 positions; 2 processes x 1 are the same update. Adam's rate is high enough
# and the gradients large enough for a wrong factor, or an update that is not clipped, to show.
COMMON = {
    "max_steps": 10,
    "save_steps": 2,
    "tokens_per_batch": 70,
    "config_overrides": json.dumps(NO_DROPOUT),
    "max_grad_norm": 0.5,
    "ea_steps": 4,
}
ONE = {**COMMON, "gradient_accumulation_steps": 2, "ea_batch_size": 10}
TWO = {**COMMON, "gradient_accumulation_steps": 1, "ea_batch_size": 5}


def launch(configuration: str, *arguments, **variables: str):
    """`accelerate launch` with a shipped configuration as it is, on 2 processes instead of its 8 GPUs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--main_process_port", port]
    command += ["--config_file", f"configs/accelerate/{configuration}.yaml", WORKER, *arguments]
    if configuration.startswith("zero"):
        variables["DS_ACCELERATOR"] = "cpu"
    if configuration == "fsdp2":
        variables["TEST_FSDP"] = "1"
    return run(command, TEST_LOGIT_ROWS="2", **variables)


def go_on(source: Path, target: Path, step: int) -> Path:
    """A folder that holds no more than `checkpoint-<step>` of another run."""
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    return target


@pytest.fixture(scope="module")
def one(tiny_corpus, tmp_path_factory) -> Path:
    """The undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("one")
    run_pretraining.main(flags(tiny_corpus, folder, **ONE))
    return folder


def assert_same_run(folder: Path, one: Path):
    """Losses, gradient norms, losses of Early Adaptation, evaluation and weights, up to rounding."""
    assert losses(folder) == pytest.approx(losses(one), rel=1e-4)
    norms = ([entry["grad_norm"] for entry in history(run) if "grad_norm" in entry] for run in (folder, one))
    assert next(norms) == pytest.approx(next(norms), rel=1e-3)
    assert_same_weights(folder, one, rtol=1e-3, atol=1e-5)
    metrics, expected = (json.loads((run / "results.json").read_text()) for run in (folder, one))
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


def assert_cut(reports: Path, one: Path, *, weights: bool):
    """Each of two processes held about half of Adam's moments, and of the weights if those are cut as well."""
    whole = sum(tensor.numel() for tensor in load_file(one / "model.safetensors").values())
    for report in (reports / "held_0.json", reports / "held_1.json"):
        held = json.loads(report.read_text())
        report.unlink()
        assert 0.45 * whole < held["moments"] < 0.55 * whole
        assert (0.45 * whole < held["weights"] < 0.55 * whole) if weights else held["weights"] == whole


def adaptation_losses(folder: Path) -> list[float]:
    return losses(folder / "early_adaptation/checkpoint-4")


def test_the_configuration_of_this_file_exercises_what_it_should(one):
    """Were no gradient clipped, no objective missing from an update, or all batches equally large, the comparisons
    below would prove less than they say."""
    logged = [entry for entry in history(one) if "loss" in entry]
    assert len(logged) == 10 and all(entry["grad_norm"] > 0.5 for entry in logged)
    assert any("items_vtlm" not in entry for entry in logged) and any("items_vtlm" in entry for entry in logged)
    assert len(set(adaptation_losses(one))) == 4


def test_ddp_trains_as_one_process(tiny_corpus, tmp_path, one):
    """configs/accelerate/ddp.yaml from the start: token budgets, objectives that one process lacks, Early Adaptation
    whose processes have different numbers of regions, clipping. The update is the same; gloo stands for NCCL."""
    result = launch("ddp", *flags(tiny_corpus, tmp_path, **TWO))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(tmp_path, one)
    assert adaptation_losses(tmp_path) == pytest.approx(adaptation_losses(one), rel=1e-4)


@needs_deepspeed
def test_checkpoints_go_round_all_strategies(tiny_corpus, tmp_path, one):
    """2 x ZeRO-2 from the start; its checkpoint under 2 x ZeRO-3; that one's under 2 x FSDP2; that one's in one
    process: each goes on as the undisturbed run did, data order, schedule, Adam's moments and clipping included.

    Both ZeRO stages and FSDP2 really cut the tensors here (asserted); what differs from a GPU is said in
    distributed_worker.py. Processes have different numbers of chunks of the vocabulary loss, in training and in
    evaluation, so a strategy that waits for the other process once per chunk would hang.
    """
    folders = {name: tmp_path / name for name in ("zero2", "zero3", "fsdp2", "one")}
    # Zero-shot retrieval sends processes separate ways, for which the sharded weights have to be put together.
    images = {"retrieval_images": 4}

    result = launch("zero2", *flags(tiny_corpus, folders["zero2"], **TWO), TEST_HELD=str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(folders["zero2"], one)
    assert_cut(tmp_path, one, weights=False)
    assert adaptation_losses(folders["zero2"]) == pytest.approx(adaptation_losses(one), rel=1e-4)

    for before, name, step in (("zero2", "zero3", 4), ("zero3", "fsdp2", 6)):
        folder = go_on(folders[before], folders[name], step)
        result = launch(name, *flags(tiny_corpus, folder, **TWO, **images), TEST_HELD=str(tmp_path))
        assert result.returncode == 0, result.stderr[-3000:]
        assert_cut(tmp_path, one, weights=True)
        results = json.loads((folder / "results.json").read_text())
        recalls = {key for key in results if "average_recall" in key}
        assert len(recalls) == 6
        (folder / "results.json").write_text(json.dumps({k: v for k, v in results.items() if k not in recalls}))
        assert_same_run(folder, one)

    folder = go_on(folders["fsdp2"], folders["one"], 8)
    run_pretraining.main(flags(tiny_corpus, folder, **ONE))
    assert_same_run(folder, one)


@pytest.mark.parametrize("mix", [{"itm": 1, "tlm": 1}])
def test_a_dead_process_ends_the_launch_and_the_run_goes_on(tiny_corpus, tmp_path, mix):
    """torchrun; checkpoints of one process on two; a process killed at step 5, and the run started again.

    The micro-batches hold one example: a process has no target of the text heads at all while the other has none of
    the ITM head. Region classification and regression have a head each, and never an example.
    """
    heads = {**NO_DROPOUT, "objectives": ["itm", "tlm", "mrc", "mrfr"]}
    common = {
        "max_steps": 8,
        "save_steps": 2,
        "objective_mix": json.dumps(mix),
        "config_overrides": json.dumps(heads),
        "per_device_train_batch_size": 1,
    }
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    run_pretraining.main(flags(tiny_corpus, undisturbed, gradient_accumulation_steps=2, **common))
    logged = [entry for entry in history(undisturbed) if "loss" in entry]
    assert any("items_itm" not in entry for entry in logged) and any("items_tlm" not in entry for entry in logged)
    go_on(undisturbed, folder, 2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER]
    command = [*launcher, *flags(tiny_corpus, folder, gradient_accumulation_steps=1, **common)]
    killed = run(command, TEST_DIE="1:5")
    assert killed.returncode != 0 and "Signal 9 (SIGKILL)" in killed.stderr
    assert (folder / "checkpoint-4").exists() and not (folder / "model.safetensors").exists()
    result = run(command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resuming from" in result.stderr and "checkpoint-4" in result.stderr
    assert_same_run(folder, undisturbed)


def test_other_batches_are_refused_in_the_middle_of_a_run(tiny_corpus, tmp_path, one):
    """Twice as many processes without half the accumulation would see some examples twice and others never."""
    folder = go_on(one, tmp_path / "run", 2)
    with pytest.raises(SystemExit, match=r"batch_plan.json.*gradient_accumulation_steps.*found 2, expected 4"):
        run_pretraining.main(flags(tiny_corpus, folder, **{**ONE, "gradient_accumulation_steps": 4}))
    with pytest.raises(SystemExit, match="tokens_per_batch.*found 70, expected 90"):
        run_pretraining.main(flags(tiny_corpus, folder, **{**ONE, "tokens_per_batch": 90}))
    accepted = {**ONE, "tokens_per_batch": 90, "ignore_data_skip": True}
    run_pretraining.main(flags(tiny_corpus, folder, **accepted))
    assert len(losses(folder)) == 10


def test_bfloat16_computes_nearly_the_same(tiny_corpus, tmp_path, one):
    """Autocast on the CPU; weights, moments and losses stay float32. 8 bits of mantissa are 0.4 per cent."""
    run_pretraining.main(flags(tiny_corpus, tmp_path, **ONE, bf16=True))
    assert losses(tmp_path) != losses(one)
    assert losses(tmp_path) == pytest.approx(losses(one), rel=4e-3)
    with safe_open(tmp_path / "checkpoint-10/adam.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}


def test_fsdp_sums_in_float32():
    """accelerate's policy would round losses and summed gradients to bfloat16."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=policy)
    keep_sums_exact(SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))))
    kept = plugin.mixed_precision_policy
    assert (kept.param_dtype, kept.reduce_dtype, kept.output_dtype) == (torch.bfloat16, torch.float32, None)


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("configs/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_configurations_leave_precision_to_the_script(path):
    assert "mixed_precision" not in path.read_text()
