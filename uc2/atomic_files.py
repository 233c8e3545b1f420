"""Files and directories that appear whole or not at all (written beside their place, then renamed), by one writer."""

import csv
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sole_writer(path: str | os.PathLike) -> Iterator[None]:
    """Lets one process at a time write `path`. The right ends with the process, however it ends.

    Raises:
        BlockingIOError: another process is writing it.
    """
    file = Path(f"{path}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Unlike flock, this is not inherited by data loading processes, which outlive a killed run for seconds.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves open which
            os.close(descriptor)
            message = f"another run is writing {path}; wait for its end, or choose another output"
            raise BlockingIOError(message) from error
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # its last holder has just removed it
    try:
        yield
    finally:
        # Removed while it is held: whoever has opened it meanwhile starts over.
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path to write to; on success it becomes `path`, replacing an existing file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's file is private to its owner
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_text(text: str, path: str | os.PathLike) -> None:
    """Writes `text` as UTF-8, the whole file or nothing."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(value, path: str | os.PathLike, indent: int | None = 2) -> None:
    """Writes `value` as UTF-8 JSON, the whole file or nothing."""
    write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", path)


def write_csv(rows: Iterable[Sequence], path: str | os.PathLike) -> None:
    """Writes rows of cells as UTF-8 CSV, the whole file or nothing."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)


@contextmanager
def atomic_directory(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary directory to fill; on success it becomes `path`.

    Raises:
        FileExistsError: `path` is a file or a directory that is not empty, and `overwrite` is not set.
    """
    path = Path(path)
    if _is_occupied(path) and not overwrite:
        raise FileExistsError(f"{path} exists already; remove it or ask to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's directory is private to its owner
        _move_into_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Removes what killed writers of `path` left beside it. Only where nobody else is writing `path`."""
    path = Path(path)
    for ending in ("tmp", "old"):
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.{ending}"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _is_occupied(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _move_into_place(temporary: Path, path: Path) -> None:
    if not _is_occupied(path):
        os.replace(temporary, path)
        return
    # A directory with files cannot be replaced in one step: the old one steps aside first.
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
    os.replace(path, aside / path.name)
    os.replace(temporary, path)
    shutil.rmtree(aside)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
