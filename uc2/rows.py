"""Caption and question rows: checking, loading, writing.

Every row is checked before training sees it, and an error names the file, the row, the field, what was
found and what was expected (`DataError`). Rows come from JSON Lines, JSON, Parquet or Arrow files, from a
directory saved by `datasets`, or from the Hub; they are converted once into the `datasets` cache and
memory-mapped from there.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from uc2.atomic_files import atomic_file
from uc2.data_error import DataError, Found, shorten
from uc2.row_files import SUFFIXES, hub_rows, numbered_rows, reader_of

__all__ = [
    "LANGUAGES",
    "DataError",
    "check_images_in_store",
    "load_captions",
    "load_parallel_captions",
    "load_questions",
    "write_jsonl",
]

logger = logging.getLogger(__name__)

LANGUAGES = ("en", "de", "fr", "cs", "ja", "zh")
"""The six languages of the paper's pre-training corpus; any other code is allowed everywhere."""

# Pharaoh format: links "i-j" separated by single spaces; no link at all is the empty string.
_ALIGNMENT = re.compile(r"(\d+-\d+( \d+-\d+)*)?", re.ASCII)

# JSON can spell it, but UTF-8 cannot hold it.
_SURROGATE = re.compile("[\ud800-\udfff]")


# --- checks of single rows: each returns the row with exactly the documented fields ---


@dataclass
class _RowCheck:
    """Checks the fields of one row; knows where the row is so that errors can say it."""

    file: str
    row: int
    values: dict

    def fail(self, field: str, found: Any, expected: str) -> DataError:
        return DataError(file=self.file, row=self.row, field=field, found=found, expected=expected)

    def require(self, field: str) -> Any:
        if field not in self.values:
            keys = ", ".join(map(str, self.values)) or "no field"
            raise self.fail(field, Found(f"only {shorten(keys)}"), "the field to be present")
        return self.values[field]

    def text(self, field: str) -> str:
        return self.nonempty(field, self.require(field))

    def nonempty(self, field: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.fail(field, value, "a non-empty string")
        if _SURROGATE.search(value):
            raise self.fail(field, value, "text (half a surrogate pair is none)")
        return value

    def language(self, field: str, code: Any, languages: Sequence[str] | None) -> str:
        self.nonempty(field, code)
        if languages is not None and code not in languages:
            raise self.fail(field, code, f"one of the languages {', '.join(languages)}")
        return code


def _check_parallel(check: _RowCheck, languages: Sequence[str] | None) -> dict:
    captions = check.require("captions")
    if not isinstance(captions, dict):
        raise check.fail("captions", captions, 'an object such as {"en": "…", "de": "…"}')
    captions = {code: text for code, text in captions.items() if text is not None}
    if not captions:
        raise check.fail("captions", check.values["captions"], "a caption in at least one language")
    for code, text in captions.items():
        check.language(f"captions.{code}", code, languages)
        check.nonempty(f"captions.{code}", text)
    return {
        "image_id": check.text("image_id"),
        "captions": captions,
        "alignment": _check_alignment(check, captions),
    }


def _check_alignment(check: _RowCheck, captions: dict[str, str]) -> dict[str, str]:
    alignment = check.values.get("alignment")
    if alignment is None:
        return {}
    if not isinstance(alignment, dict):
        raise check.fail("alignment", alignment, 'an object such as {"de": "0-0 1-2"}')
    alignment = {code: links for code, links in alignment.items() if links is not None}
    for code, links in alignment.items():
        if code not in captions:
            raise check.fail(
                f"alignment.{code}", links, f"links only to captions of the row ({', '.join(captions)})"
            )
        if not isinstance(links, str) or not _ALIGNMENT.fullmatch(links):
            raise check.fail(f"alignment.{code}", links, "links in Pharaoh format such as '0-0 1-2'")
    return alignment


def _check_caption(check: _RowCheck, languages: Sequence[str] | None) -> dict:
    return {
        "image_id": check.text("image_id"),
        "language": check.language("language", check.require("language"), languages),
        "caption": check.text("caption"),
    }


def _check_question(check: _RowCheck, languages: Sequence[str] | None) -> dict:
    question_id = check.require("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, (str, int)):
        raise check.fail("question_id", question_id, "a non-empty string or a whole number")
    if isinstance(question_id, str):
        check.nonempty("question_id", question_id)
    answers = check.values.get("answers")
    if answers is not None and (not isinstance(answers, list) or not answers):
        raise check.fail("answers", answers, "a list of answers (leave the field out in a test split)")
    for number, answer in enumerate(answers or ()):
        check.nonempty(f"answers[{number}]", answer)
    answer_type = check.values.get("answer_type")
    return {
        "question_id": str(question_id),
        "image_id": check.text("image_id"),
        "language": check.language("language", check.require("language"), languages),
        "question": check.text("question"),
        "answers": answers,
        "answer_type": None if answer_type is None else check.nonempty("answer_type", answer_type),
    }


@dataclass(frozen=True)
class _RowKind:
    """What distinguishes the three kinds of rows: check, known fields, the field that must not repeat."""

    name: str
    check: Callable[[_RowCheck, Sequence[str] | None], dict]
    fields: tuple[str, ...]
    unique: str | None = None


_KINDS = {
    kind.name: kind
    for kind in (
        _RowKind("parallel captions", _check_parallel, ("image_id", "captions", "alignment")),
        _RowKind("captions", _check_caption, ("image_id", "language", "caption")),
        _RowKind(
            "questions",
            _check_question,
            ("question_id", "image_id", "language", "question", "answers", "answer_type"),
            unique="question_id",
        ),
    )
}


def _checked_rows(
    sources: Sequence[str], kind_name: str, languages: Sequence[str] | None, split: str, streaming: bool
) -> Iterator[dict]:
    kind = _KINDS[kind_name]
    seen: dict[Any, tuple[str, int]] = {}
    for source in sources:
        number, ignored = 0, set()
        for number, values in numbered_rows(source, split, streaming):
            if not isinstance(values, dict):
                raise DataError(
                    file=source, row=number, found=values, expected="an object with the fields of a row"
                )
            row = kind.check(_RowCheck(source, number, values), languages)
            ignored.update(values.keys() - set(kind.fields))
            if kind.unique:
                _check_unique(row[kind.unique], kind.unique, (source, number), seen)
            yield row
        if number == 0:
            raise DataError(file=source, found=Found("no row"), expected=f"rows of {kind.name}")
        if ignored:
            logger.warning("%s: the fields %s are not used.", source, ", ".join(sorted(ignored)))


def _check_unique(value: Any, field: str, place: tuple[str, int], seen: dict) -> None:
    first = seen.setdefault(value, place)
    if first is not place:
        expected = f"a value of its own (row {first[1]} of {first[0]} has it already)"
        raise DataError(file=place[0], row=place[1], field=field, found=value, expected=expected)


# --- public loading functions ---


def load_parallel_captions(files, *, languages=None, streaming: bool = False, split: str = "train"):
    """Rows for pre-training: several languages' captions of one image, with word alignments where they exist.

    Args:
        files: one or several `.jsonl`, `.json` (both also `.gz`), `.parquet` or `.arrow` paths, directories
            saved by `datasets`, or Hub ids.
        languages: the languages that may occur; None admits every language.
        streaming: give an `IterableDataset` that checks rows as they are read (and unique ids per file only);
            otherwise all are checked now.
        split: which split of a saved `DatasetDict` or Hub data set to read.

    Returns:
        `image_id` str, `captions` {language: str or None}, `alignment` {language: str or None}: links between
        the units of the English caption and of the other one, in Pharaoh format. All rows have the same
        languages, None where a caption is missing; streamed rows have only the languages present.

    Raises:
        DataError: at the first row that breaks the format.
    """
    sources = _sources(files)
    if streaming:
        return _stream(sources, "parallel captions", languages, split)
    # The columns must be known before rows are written; this first pass is cached like the second one.
    found = _convert(sources, "parallel captions", languages, split, {"language": datasets.Value("string")})
    per_language = {code: datasets.Value("string") for code in _in_order(found["language"])}
    features = {"image_id": datasets.Value("string"), "captions": per_language, "alignment": per_language}
    return _convert(sources, "parallel captions", languages, split, features)


def load_captions(files, *, languages=None, streaming: bool = False, split: str = "train"):
    """Rows for retrieval, one caption each: `image_id`, `language`, `caption` (arguments as above)."""
    names = _KINDS["captions"].fields
    return _load(
        files, "captions", languages, streaming, split, {name: datasets.Value("string") for name in names}
    )


def load_questions(files, *, languages=None, streaming: bool = False, split: str = "train"):
    """Rows for VQA (arguments as above).

    Returns:
        `question_id` (str, unique), `image_id`, `language`, `question`, `answers` (list of str; None in a
        test split), `answer_type` (str or None).
    """
    features = {name: datasets.Value("string") for name in _KINDS["questions"].fields}
    features["answers"] = datasets.List(datasets.Value("string"))
    return _load(files, "questions", languages, streaming, split, features)


def _load(files, kind_name: str, languages, streaming: bool, split: str, features: dict):
    sources = _sources(files)
    if streaming:
        return _stream(sources, kind_name, languages, split)
    return _convert(sources, kind_name, languages, split, features)


def _sources(files) -> list[str]:
    sources = [str(files)] if isinstance(files, (str, os.PathLike)) else [str(file) for file in files]
    if not sources:
        raise DataError(found=Found("no file"), expected="at least one file of rows")
    for source in sources:
        # A Hub id is "name" or "owner/name"; whatever looks like a file must exist.
        is_path = source.startswith((".", "/")) or source.count("/") > 1 or source.endswith(SUFFIXES)
        if is_path and not os.path.exists(source):
            raise DataError(file=source, found=Found("no such file"), expected="a file of rows")
        if os.path.isfile(source):
            reader_of(source)
    return sources


def _in_order(languages: Iterable[str]) -> list[str]:
    """The paper's languages first, in its order; then the others by name."""
    known = {code: position for position, code in enumerate(LANGUAGES)}
    return sorted(languages, key=lambda code: (known.get(code, len(known)), code))


def _stream(sources: list[str], kind_name: str, languages, split: str) -> datasets.IterableDataset:
    arguments = dict(kind_name=kind_name, languages=_as_tuple(languages), split=split, streaming=True)
    # A list among the arguments is what `datasets` splits over workers: here, file by file.
    return datasets.IterableDataset.from_generator(
        _checked_rows, gen_kwargs={"sources": sources, **arguments}
    )


def _convert(sources: list[str], kind_name: str, languages, split: str, features: dict) -> datasets.Dataset:
    """Checked rows in the `datasets` cache: memory-mapped, and reused while the sources do not change."""
    arguments = dict(
        # Tuples: `datasets` would take a list of files apart and read each by a generator of its own, which
        # could not tell a question id that an earlier file has.
        sources=tuple(sources),
        kind_name=kind_name,
        languages=_as_tuple(languages),
        split=split,
        versions=tuple(_version(source, split) for source in sources),
        features=features,
    )
    try:
        return datasets.Dataset.from_generator(
            _rows_for_cache, features=datasets.Features(features), gen_kwargs=arguments
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _rows_for_cache(sources, kind_name, languages, split, versions, features) -> Iterator[dict]:
    """Checked rows with every column of `features`; or only the languages that parallel captions have.

    `versions` is not read here; as part of the cache key it makes a changed file be converted anew.
    """
    rows = _checked_rows(sources, kind_name, languages, split, streaming=False)
    if "language" in features and kind_name == "parallel captions":
        yield from ({"language": code} for code in {code: None for row in rows for code in row["captions"]})
        return
    for row in rows:
        for field in ("captions", "alignment"):
            if field in row:
                row[field] = {code: row[field].get(code) for code in features[field]}
        yield row


def _version(source: str, split: str) -> tuple:
    """Size and modification time of every file of a local source; the fingerprint of a Hub data set."""
    path = Path(source)
    if not path.exists():
        return (hub_rows(source, split)._fingerprint,)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def _as_tuple(languages: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if languages is None else tuple(languages)


def check_images_in_store(dataset: datasets.Dataset, files, store, *, split: str = "train") -> None:
    """Every row's image must have regions: DataError for the first one whose `image_id` is not in `store`.

    Args:
        dataset: rows as loaded from `files` and `split` (map-style, in file order).
        files: named in the error.
        store: any container of image ids, such as a `RegionStore`.
    """
    sources = _sources(files)
    position = 0
    for batch in dataset.select_columns("image_id").iter(batch_size=10_000):
        for image_id in batch["image_id"]:
            if image_id not in store:
                source, row = _locate(sources, split, position)
                raise DataError(
                    file=source,
                    row=row,
                    field="image_id",
                    found=image_id,
                    expected="an image of the region store",
                )
            position += 1


def _locate(sources: list[str], split: str, position: int) -> tuple[str, int]:
    """File and row number of the loaded row at `position`; re-read, since blank lines make the two differ."""
    numbered = ((source, number) for source in sources for number, _ in numbered_rows(source, split))
    return next(itertools.islice(numbered, position, None))


def write_jsonl(rows: Iterable[dict], path: str | os.PathLike) -> Path:
    """Write `rows` as UTF-8 JSON Lines, the whole file or nothing (temporary file, then rename)."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Path(path)
