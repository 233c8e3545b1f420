"""Command lines of the scripts: YAML/JSON files and flags into dataclasses, flags last."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from uc2.data_error import DataError

FILE_ENDINGS = (".yaml", ".yml", ".json")


def parse(dataclass_types: Sequence[type], argv: Sequence[str]) -> tuple:
    """Parses `[FILE …] [--flag value …]` into one instance of each dataclass.

    Files are read in order and override one another; flags override files. A key that no dataclass has, or a
    file that cannot be read, ends the program with one sentence that names file and key.
    """
    argv = list(argv)
    parser = HfArgumentParser(dataclass_types)
    files = []
    while argv and not argv[0].startswith("-"):
        files.append(argv.pop(0))
    known = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    settings: dict = {}
    for file in files:
        if not file.endswith(FILE_ENDINGS):
            parser.error(f"unexpected argument {file!r}; settings files end in {', '.join(FILE_ENDINGS)}")
        settings.update(_read_settings(file, known, parser))
    flags = [word for name, value in settings.items() for word in _as_flag(name, value)]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=flags + argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown option {unknown[0]!r}")
    return tuple(parsed)


def check_minimum(arguments, **least: float) -> None:
    """DataError for the first named option whose value is below its least one."""
    for name, minimum in least.items():
        value = getattr(arguments, name)
        if value < minimum:
            raise DataError(field=name, found=value, expected=f"at least {minimum}")


def parse_pairs(option: str, words: Sequence[str]) -> dict[str, str]:
    """`name=value` words -> a dict, for an option that takes several.

    Raises:
        DataError: a word without `=`, a name given twice, or one that cannot be part of a file's name.
    """
    pairs: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not (name and value) or name in pairs or "/" in name:
            expected = "name=value, each name once and without a slash"
            raise DataError(field=option, found=word, expected=expected)
        pairs[name] = value
    return pairs


def _read_settings(file: str, known: set[str], parser: HfArgumentParser) -> dict:
    try:
        text = Path(file).read_text(encoding="utf-8")
        values = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"{file} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"{file} holds {type(values).__name__}; expected a mapping of option names to values")
    for name in values:
        if name not in known:
            parser.error(f"{file}: unknown option {name!r}")
    return values


def _as_flag(name: str, value) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]
