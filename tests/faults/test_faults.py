"""Each script through one fault after another, in one output folder: a clear sentence each time, and at the end what
an undisturbed run gives."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time

import pytest
import tiny_scripts
import torch
from forked_script import ForkedScript, assert_same_run, losses
from torch.optim.optimizer import register_optimizer_step_post_hook

from uc2.region_store import RegionStore

SCRIPTS = ("pretraining", "retrieval", "vqa")


@pytest.fixture(scope="module")
def script_of(tiny_corpus, tmp_path_factory):
    """`script_of("vqa")`, made once."""
    made = {}

    def script(name: str) -> ForkedScript:
        if name not in made:
            made[name] = getattr(tiny_scripts, name)(tiny_corpus, tmp_path_factory.mktemp(name))
        return made[name]

    return script


def sentence(script: ForkedScript, **options) -> str:
    """What a run into the folder `faulty` said last before it stopped with status 1; no traceback."""
    assert script.run("faulty", **options) == 1, script.said("faulty")
    assert "Traceback" not in script.said("faulty"), script.said("faulty")
    return script.said("faulty").strip().splitlines()[-1]


def small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def kill_a_worker() -> None:
    """The process that prepares batches dies in the middle of one."""
    read = RegionStore.__getitem__

    def dies(store, image_id):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(store, image_id)

    RegionStore.__getitem__ = dies


def break_weights() -> None:
    """Every weight is NaN after an update."""

    def poison(optimizer, *_):
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.fill_(float("nan"))

    register_optimizer_step_post_hook(poison)


def wait_until(path, process) -> None:
    deadline = time.time() + 120
    while not path.exists():
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_fault_after_another(script_of, name):
    script = script_of(name)
    expected, run = script.undisturbed(), script.folder / "faulty"

    # No room for the optimiser's state (76 kB): the first checkpoint is not finished.
    assert sentence(script, before=small_files_only).startswith("error: the disk is full (")
    assert not (run / "checkpoint-2").exists()

    assert "DataLoader worker" in sentence(script, before=kill_a_worker, dataloader_num_workers=1)

    message = sentence(script, before=break_weights)
    assert message.startswith("error: the loss is nan at step")
    (report,) = run.glob("non_finite_batch_step*.json")
    assert str(report) in message
    images = json.loads(report.read_text())["image_ids"]
    assert images and set(images) <= {f"image{number}" for number in range(24)}
    report.unlink()

    # A run with a worker process, which outlives it: while it lasts, no other may write here.
    first = script.start("faulty", die_at=len(script.events("undisturbed")) // 2, dataloader_num_workers=1)
    wait_until(script.folder / "faulty.lock", first)
    os.kill(first.pid, signal.SIGSTOP)
    other = ForkedScript(script.main, {**script.flags}, script.folder / "other")
    other.folder.mkdir()
    assert other.run("second", output_dir=run) == 1
    assert other.said("second").strip() == (
        f"error: another run is writing {run}; wait for its end, or choose another output"
    )
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode in (0, -signal.SIGKILL)

    # Whatever was left behind, the run ends as the undisturbed one.
    assert script.run("faulty") == 0, script.said("faulty")
    assert_same_run(run, expected)


@pytest.mark.parametrize("damage", ["model.safetensors", "adam.safetensors", "trainer_state.json", "missing"])
def test_a_damaged_checkpoint_is_not_used(script_of, damage):
    script = script_of("pretraining")
    expected, run = script.undisturbed(), script.folder / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(expected, run)
    last = run / "checkpoint-5"
    if damage == "missing":
        (last / "scheduler.pt").unlink()
        reason = "scheduler.pt is missing"
    else:
        size = (last / damage).stat().st_size
        os.truncate(last / damage, size // 2)
        reason = f"{damage} has {size // 2} bytes, not {size}"
    named = {"resume_from_checkpoint": last}
    assert script.run("damaged", **named) == 1
    assert script.said("damaged").strip().endswith(f"error: {last}: found {reason}, expected a whole checkpoint")
    assert script.run("damaged") == 0, script.said("damaged")
    log = script.log("damaged").read_text()
    assert f"checkpoint-5 is not used: {reason}" in log and f"Resuming from {run / 'checkpoint-4'}" in log
    shutil.rmtree(run / "_unusable-checkpoint-5")
    assert_same_run(run, expected)


def test_a_full_disk(script_of):
    """A file system of 300 kB that fills up for real; needs the right to mount one."""
    script = script_of("vqa")
    expected, run = script.undisturbed(), script.folder / "full"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "uc2-test", str(run)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a file system")
    try:
        assert script.run("full") == 1
        message = script.said("full").strip().splitlines()[-1]
        assert message.startswith("error: the disk is full (") and "Traceback" not in script.said("full")
        subprocess.run(["mount", "-o", "remount,size=30m", str(run)], check=True)
        assert script.run("full") == 0, script.said("full")
        assert_same_run(run, expected)
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_a_finished_run_is_left_as_it_is(script_of):
    for name in SCRIPTS:
        script = script_of(name)
        expected, again = script.undisturbed(), script.folder / "again"
        shutil.copytree(expected, again)
        assert script.run("again") == 0, script.said("again")
        assert losses(again) == losses(expected)
        assert (again / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
