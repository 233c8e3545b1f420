"""What `prepare_corpus.py translate` reads: captions to translate, and translations people already have."""

import gzip
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from uc2.data_error import DataError, Found
from uc2.row_files import SUFFIXES, numbered_rows
from uc2.rows import load_parallel_captions

IMAGE_FIELDS = ("image_id", "image", "img_id")
CAPTION_FIELDS = ("captions", "caption", "text")
"""Fields of JSON, Parquet and Hub rows in which an image and its caption are looked for, in this order."""


@dataclass(frozen=True)
class CaptionSource:
    """Where captions come from and how their rows are laid out.

    Attributes:
        files: any source that `uc2.row_files` reads; or text files with a caption a line, and TSV.
        image_ids: for text files, a file with the image id of each line.
        beside: for text files without one, the source whose rows the lines go with, one by one.
        language: language of captions that do not say it.
        split: split of a saved `DatasetDict` or Hub data set.
        image_field, caption_field: where rows keep them; None: `IMAGE_FIELDS`, `CAPTION_FIELDS`.
        tsv_columns: what the columns of TSV files are; "image_id" and "caption" must be among them.
    """

    files: Sequence[str]
    language: str = "en"
    image_ids: str | None = None
    beside: "CaptionSource | None" = None
    split: str = "train"
    image_field: str | None = None
    caption_field: str | None = None
    tsv_columns: Sequence[str] = ("image_id", "caption")

    def rows(self) -> Iterator[dict]:
        """Parallel caption rows {"image_id", "captions", "alignment"}, read one by one.

        Raises:
            DataError: at the first row without an image id or a caption.
        """
        for file in self.files:
            plain = file.removesuffix(".gz")
            if plain.endswith(".tsv"):
                yield from self._tsv_rows(file)
            elif plain.endswith(SUFFIXES) or not Path(file).is_file():
                yield from self._table_rows(file)
            else:
                yield from self._text_rows(file)

    def _text_rows(self, file: str) -> Iterator[dict]:
        for (number, caption), image_id in same_length(lines(file), self._image_ids_of_lines(file), file):
            yield self._row(image_id, caption, file, number)

    def _image_ids_of_lines(self, file: str) -> Iterator[str]:
        if self.image_ids is not None:
            return (image_id for _, image_id in lines(self.image_ids))
        if self.beside is not None:
            return (row["image_id"] for row in self.beside.rows())
        expected = "--image_ids, a file with the image id of each line"
        raise DataError(file=file, found=Found("captions without image ids"), expected=expected)

    def _tsv_rows(self, file: str) -> Iterator[dict]:
        columns = tuple(self.tsv_columns)
        image, caption = columns.index("image_id"), columns.index("caption")
        for number, line in lines(file):
            cells = line.split("\t")
            if len(cells) != len(columns):
                expected = f"the {len(columns)} columns {', '.join(columns)}"
                raise DataError(
                    file=file, row=number, found=Found(f"{len(cells)} columns"), expected=expected
                )
            if number > 1 or tuple(cells) != columns:  # the first line may name the columns
                yield self._row(cells[image], cells[caption], file, number)

    def _table_rows(self, file: str) -> Iterator[dict]:
        for number, values in numbered_rows(file, self.split, streaming=True):
            if number == 1 and self._is_parallel(values):
                yield from map(
                    _documented_row, load_parallel_captions(file, streaming=True, split=self.split)
                )
                return
            image_id = self._field(values, self.image_field, IMAGE_FIELDS, file, number)
            caption = self._field(values, self.caption_field, CAPTION_FIELDS, file, number)
            yield self._row(image_id, caption, file, number, values.get("language"))

    def _is_parallel(self, values) -> bool:
        return (
            isinstance(values, dict)
            and self.image_field is self.caption_field is None
            and isinstance(values.get("captions"), dict)
            and "image_id" in values
        )

    def _field(self, values, name: str | None, choices: Sequence[str], file: str, number: int):
        names = choices if name is None else (name,)
        found = values if isinstance(values, dict) else {}
        for choice in names:
            if found.get(choice) is not None:
                return found[choice]
        shown = Found(f"the fields {', '.join(map(str, found))}")
        raise DataError(file=file, row=number, found=shown, expected=f"one of the fields {', '.join(names)}")

    def _row(self, image_id, caption, file: str, number: int, language: str | None = None) -> dict:
        captions = caption if isinstance(caption, dict) else {language or self.language: caption}
        captions = {code: text for code, text in captions.items() if text is not None}
        for code, text in captions.items():
            if not isinstance(text, str) or not text.strip():
                raise DataError(file=file, row=number, field=code, found=text, expected="a non-empty caption")
        if not str(image_id).strip():
            raise DataError(file=file, row=number, field="image_id", found=image_id, expected="an image id")
        captions = {code: " ".join(text.split()) for code, text in captions.items()}
        return {"image_id": str(image_id), "captions": captions, "alignment": {}}


def _documented_row(row: dict) -> dict:
    return {name: row[name] for name in ("image_id", "captions", "alignment")}


def lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file, which may be gzipped, each with its number from 1."""
    if not Path(file).is_file():
        raise DataError(file=file, found=Found("no such file"), expected="a text file")
    opened = gzip.open(file, "rt", encoding="utf-8-sig") if file.endswith(".gz") else None
    # newline="\n": captions may hold other characters that Python would take for line ends.
    with opened or open(file, encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.rstrip("\r\n")


def same_length(first: Iterator, second: Iterator, file: str) -> Iterator[tuple]:
    """`zip`; DataError naming `file` if one is longer."""
    number = 0
    try:
        for pair in zip(first, second, strict=True):
            number += 1
            yield pair
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        expected = "as many lines as captions to go with them"
        raise DataError(file=file, row=number + 1, found=Found(str(error)), expected=expected) from error


class ExistingTranslations:
    """Translations people already have, looked up by image; kept on disk, so that memory stays flat.

    An image may have several captions: its k-th source caption gets its k-th translation.

    Args:
        sources: {language: source}; rows that hold several languages (UC2's and CCLM's JSON files) count for
            each of them, captions that do not name a language for the given one.
        database: an open SQLite database to write to.
    """

    def __init__(self, sources: dict[str, CaptionSource], database: sqlite3.Connection):
        self._database = database
        self._languages = set()
        database.execute(
            "CREATE TABLE existing (language TEXT, image_id TEXT, place INTEGER, caption TEXT,"
            " PRIMARY KEY (language, image_id, place)) WITHOUT ROWID"
        )
        database.execute(
            "CREATE TABLE place (language TEXT, image_id TEXT, next INTEGER,"
            " PRIMARY KEY (language, image_id)) WITHOUT ROWID"
        )
        for source in sources.values():
            for row in source.rows():
                for language, caption in row["captions"].items():
                    self._languages.add(language)
                    values = (language, row["image_id"], self._next_place(language, row["image_id"]), caption)
                    database.execute("INSERT INTO existing VALUES (?, ?, ?, ?)", values)
        database.execute("DELETE FROM place")

    def _next_place(self, language: str, image_id: str) -> int:
        statement = (
            "INSERT INTO place VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET next = next + 1 RETURNING next"
        )
        return self._database.execute(statement, (language, image_id)).fetchone()[0]

    def add_to(self, row: dict) -> int:
        """Puts the translations of the row's image beside its captions; gives their number.

        Rows must come in the order of the source. Captions the row has already win.
        """
        added = 0
        if self._languages:
            place = self._next_place("", row["image_id"])
            for language in sorted(self._languages - row["captions"].keys()):
                found = self._database.execute(
                    "SELECT caption FROM existing WHERE language = ? AND image_id = ? AND place = ?",
                    (language, row["image_id"], place),
                ).fetchone()
                if found:
                    row["captions"][language] = found[0]
                    added += 1
        return added
