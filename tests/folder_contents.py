"""What is below a folder, to compare two of them."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by its path within the folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
