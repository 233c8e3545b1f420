"""Runs a script's `main` in forked processes, which cost no imports, and kills them where it hurts.

A process counts events: every touch of a file in its output folder or its own `datasets` cache, every call that
writes tensors, every optimiser step, every pass over data. Told to, it kills itself with SIGKILL at the n-th event;
where that event writes tensors, the file is left half-written.
"""

import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
import safetensors.torch
import torch
import torch.utils.data
from torch.optim.optimizer import register_optimizer_step_pre_hook

COMPARED = ("model.safetensors", "results", "table", "predictions", "curves", "recall", "README")
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree")


class Events:
    """Counts events in this process, writes their names to a log, and dies at the one chosen."""

    def __init__(self, folder: Path, log: Path, die_at: int | None):
        self.folder, self.die_at, self.count = str(folder), die_at, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def happen(self, name: str, half_written: str | None = None) -> None:
        self.count += 1
        os.write(self.log, f"{name}\n".encode())
        if self.count == self.die_at:
            if half_written is not None:
                os.truncate(half_written, os.path.getsize(half_written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        sys.addaudithook(self._audit)
        torch.save = self._watched_writer(torch.save)
        safetensors.torch.save_file = self._watched_writer(safetensors.torch.save_file)
        sys.modules["transformers.modeling_utils"].safe_save_file = safetensors.torch.save_file
        register_optimizer_step_pre_hook(lambda *_: self.happen("optimizer step"))
        iterate = torch.utils.data.DataLoader.__iter__
        torch.utils.data.DataLoader.__iter__ = lambda loader: (self.happen("pass over data"), iterate(loader))[1]

    def _audit(self, name: str, arguments: tuple) -> None:
        if name in FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            # `shutil.rmtree` names files relative to an open folder.
            if path.startswith(self.folder) or name in ("os.remove", "os.rmdir") and not path.startswith("/"):
                self.happen(f"{name} {Path(path).name}")

    def _watched_writer(self, write: Callable) -> Callable:
        def watched(content, file, *arguments, **options):
            write(content, file, *arguments, **options)
            if isinstance(file, (str, os.PathLike)):
                self.happen(f"tensors {Path(file).name}", half_written=os.fspath(file))

        return watched


def words(flags: dict) -> list[str]:
    """Options as on a command line; a list is several words."""
    values = {name: value if isinstance(value, list) else [value] for name, value in flags.items()}
    return [word for name, value in values.items() for word in (f"--{name}", *map(str, value))]


class ForkedScript:
    """Runs of one script with one set of options, each with an output folder of its own under `folder`."""

    def __init__(self, main: Callable[[list[str]], object], flags: dict, folder: Path):
        self.main, self.flags, self.folder = main, flags, folder

    def start(self, name: str, *, die_at: int | None = None, before: Callable[[], None] | None = None, **changes):
        """A process that runs the script into `folder / name`, after `before()`, with changed options."""
        output = self.folder / name

        def run() -> None:
            stream = os.open(self.log(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2, sys.stdout.fileno(), sys.stderr.fileno()):  # pytest has put in its own
                os.dup2(stream, descriptor)
            logging.getLogger().handlers.clear()  # pytest's, too
            torch.set_num_threads(1)
            datasets.config.HF_DATASETS_CACHE = f"{output}.cache"
            if before is not None:
                before()
            Events(output, self.folder / f"{name}.events", die_at).watch()
            status = 1
            try:
                self.main(words({"output_dir": output, **self.flags, **changes}))
                status = 0
            except SystemExit as stop:
                print(stop.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        return process

    def run(self, name: str, **options) -> int:
        """The exit code; minus the signal's number for a killed process."""
        process = self.start(name, **options)
        process.join(timeout=120)
        assert process.exitcode is not None, f"{name} hangs: {self.said(name)}"
        return process.exitcode

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        return self.log(name).read_text(errors="replace")[-3000:]

    def events(self, name: str) -> list[str]:
        return (self.folder / f"{name}.events").read_text().splitlines()

    def undisturbed(self) -> Path:
        if not (self.folder / "undisturbed").exists():
            assert self.run("undisturbed") == 0, self.said("undisturbed")
        return self.folder / "undisturbed"

    def kill_until_finished(self, name: str, rng: random.Random) -> Path:
        """Kills it up to three times, and then lets it finish; the kinds of events are equally likely."""
        self.undisturbed()
        kinds: dict[str, list[int]] = {}
        for number, event in enumerate(self.events("undisturbed"), start=1):
            kinds.setdefault(event.split()[0], []).append(number)
        moments = []
        for _ in range(rng.randint(1, 3)):
            code = self.run(name, die_at=rng.choice(rng.choice(list(kinds.values()))))
            if code == 0:  # fewer events were left than in a whole run
                break
            assert code == -signal.SIGKILL, self.said(name)
            moments.append(f"{len(self.events(name))} ({self.events(name)[-1]})")
        print(f"{name} killed at its events {', then '.join(moments)}")
        assert self.run(name) == 0, self.said(name)
        return self.folder / name


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(folder: Path, expected: Path) -> None:
    """Equal losses, weights, results, answers and curves, and no file more or less."""
    assert losses(folder) == losses(expected)
    assert len(losses(folder)) >= 5
    assert files(folder) == files(expected)
    for name in sorted(files(expected)):
        if name.startswith(COMPARED):
            found, wanted = ((run / name).read_bytes() for run in (folder, expected))
            # The card names the folder.
            assert found.replace(folder.name.encode(), expected.name.encode()) == wanted, name
