"""Object class names in every language, and their sub-words.

MRTM (paper, section 3.3) predicts for a masked region a sub-word of the detected class's name in the
language of the caption; Early Adaptation reads the same table.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uc2.data_error import DataError, Found

# img_label_objects.txt is English; img_label_objects_de.txt is German.
_TEXT_FILE = re.compile(r"img_label_objects(?:_(?P<language>[A-Za-z-]+))?\.txt")


def load_object_labels(path: str | os.PathLike) -> dict[str, list[str]]:
    """Names of the object classes by language: `labels["de"][i]` names class i.

    Args:
        path: a JSON file `{"en": ["yolk", …], "de": […]}`; or a directory with such an `object_labels.json`;
            or a text file of English names such as bottom-up attention's `objects_vocab.txt`; or a directory
            of text files `img_label_objects.txt`, `img_label_objects_de.txt`, …, in which
            line i is class i and commas separate synonyms, of which the first is taken.

    Raises:
        DataError: a name is missing, or the languages do not have equally many classes.
    """
    path = Path(path)
    if path.is_dir() and (path / "object_labels.json").is_file():
        path = path / "object_labels.json"
    if path.suffix == ".txt":
        labels = {"en": _read_names(path)}
    else:
        labels = _read_text_files(path) if path.is_dir() else _read_json(path)
    _check(labels, path)
    return labels


def _read_json(path: Path) -> dict[str, list[str]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        expected = "a JSON file of object labels by language"
        raise DataError(file=path, found=Found(str(error)), expected=expected) from error


def _read_text_files(directory: Path) -> dict[str, list[str]]:
    matches = ((file, _TEXT_FILE.fullmatch(file.name)) for file in sorted(directory.iterdir()))
    return {match["language"] or "en": _read_names(file) for file, match in matches if match}


def _read_names(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        expected = "a UTF-8 text file, a class name a line"
        raise DataError(file=file, found=Found(str(error)), expected=expected) from error
    return [_first_synonym(line, file, row) for row, line in enumerate(lines, 1)]


def _first_synonym(line: str, file: Path, row: int) -> str:
    # Translated lists separate synonyms by the comma of their script.
    for name in re.split("[,，、]", line):
        if name.strip():
            return name.strip()
    raise DataError(file=file, row=row, found=line, expected="the name of an object class")


def _check(labels: Mapping[str, Sequence[str]], path: Path) -> None:
    if not isinstance(labels, dict) or not labels:
        raise DataError(file=path, found=labels, expected="object labels of at least one language")
    count = None
    for language, names in labels.items():
        if not isinstance(names, list) or not names:
            raise DataError(file=path, field=language, found=names, expected="a list of class names")
        for class_id, name in enumerate(names):
            if not isinstance(name, str) or not name.strip():
                raise DataError(
                    file=path, field=f"{language}[{class_id}]", found=name, expected="a class name"
                )
        count = count or len(names)
        if len(names) != count:
            expected = f"{count} as in '{next(iter(labels))}'"
            raise DataError(
                file=path, field=language, found=Found(f"{len(names)} classes"), expected=expected
            )


class LabelTokens:
    """Sub-word ids of every class name in every language, computed once.

    Args:
        object_labels: as `load_object_labels` gives them.
        tokenizer: an XLM-R style (SentencePiece) tokenizer. The lone word-start piece "▁", which precedes
            names in scripts without spaces, says nothing about the object and is dropped.

    Raises:
        DataError: a name has no sub-word left.
    """

    def __init__(self, object_labels: Mapping[str, Sequence[str]], tokenizer):
        _check({code: list(names) for code, names in object_labels.items()}, Path("object_labels"))
        lone = tokenizer.convert_tokens_to_ids("▁")
        self._ids = {
            language: [
                _without_lone_piece(ids, lone, language, names[class_id])
                for class_id, ids in enumerate(tokenizer(list(names), add_special_tokens=False)["input_ids"])
            ]
            for language, names in object_labels.items()
        }

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self._ids)

    @property
    def num_classes(self) -> int:
        return len(next(iter(self._ids.values())))

    def ids(self, class_id: int, language: str) -> np.ndarray:
        """(m,) int64, m >= 1: the sub-words of class `class_id` in `language`."""
        if language not in self._ids:
            raise KeyError(f"no object labels in '{language}'; there are labels in {', '.join(self._ids)}")
        if not 0 <= class_id < self.num_classes:
            raise IndexError(f"class {class_id} has no object label; there are {self.num_classes} classes")
        return self._ids[language][class_id]


def _without_lone_piece(ids: Sequence[int], lone: int, language: str, name: str) -> np.ndarray:
    kept = np.asarray([token for token in ids if token != lone], np.int64)
    if not kept.size:
        raise DataError(field=f"object_labels.{language}", found=name, expected="a name the tokenizer knows")
    return kept
