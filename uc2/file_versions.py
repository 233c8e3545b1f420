"""Which version of its input a result was made from, so that a restart notices when the input has changed."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path


def file_versions(paths: Sequence[str | os.PathLike]) -> dict[str, str]:
    """Path -> digest of the names, sizes and times of change of all files there; Hub ids are left out."""
    return {str(path): _version(Path(path)) for path in paths if os.path.exists(path)}


def _version(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    states = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    listing = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
