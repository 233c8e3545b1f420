"""Command lines of the scripts: YAML/JSON files and flags into dataclasses, flags last."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser

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
    return parser.parse_args_into_dataclasses(args=flags + argv, look_for_args_file=False)


def _read_settings(file: str, known: set[str], parser: HfArgumentParser) -> dict:
    try:
        text = Path(file).read_text(encoding="utf-8")
        values = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
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
