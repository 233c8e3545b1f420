"""The work of translating a corpus, cut into units that survive a kill.

    work_dir/
      settings.json               what the plan was made for
      plan/rows.jsonl             the corpus, each row with the number of its source sentence
      plan/units/de/000000.jsonl  sentences to translate into German, each once: {"sentence": 0, "text": "…"}
      results/de/000000.jsonl     the same rows with "translation" and "rejected" (a reason or null)

The plan appears as a whole, each result file as a whole. A unit is always translated in the same batches, so
neither kills nor the number of processes change a byte of the result.
"""

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from uc2.atomic_files import atomic_directory, remove_leftovers
from uc2.rows import write_jsonl
from uc2.translation_sources import ExistingTranslations


class TranslationWork:
    """One work directory.

    Args:
        directory: created by `plan`.
        source: language to translate from.
        languages: languages to translate into.
        unit_size: sentences of a unit; what a kill can cost.
    """

    def __init__(self, directory: Path, source: str, languages: Iterable[str], unit_size: int = 2000):
        self.directory, self.source = Path(directory), source
        self.languages = [language for language in languages if language != source]
        self.unit_size = unit_size

    @property
    def is_planned(self) -> bool:
        return (self.directory / "plan").is_dir()

    def plan(self, rows: Iterable[dict], existing: dict) -> None:
        """One pass over the corpus: joins translations that exist, numbers sentences and writes the units.

        Args:
            rows: parallel caption rows, read once.
            existing: {language: CaptionSource} of translations people already have.
        """
        remove_leftovers(self.directory / "plan")
        with atomic_directory(self.directory / "plan") as plan:
            with closing(sqlite3.connect(plan / "sentences.sqlite", isolation_level=None)) as database:
                database.execute("BEGIN")
                database.execute("CREATE TABLE sentence (id INTEGER PRIMARY KEY, text TEXT UNIQUE)")
                database.execute(
                    "CREATE TABLE missing (language, id, PRIMARY KEY (language, id)) WITHOUT ROWID"
                )
                translations = ExistingTranslations(existing, database)
                write_jsonl((self._planned(row, translations, database) for row in rows), plan / "rows.jsonl")
                for language in self.languages:
                    self._write_units(plan / "units" / language, language, database)
            (plan / "sentences.sqlite").unlink()

    def _planned(self, row: dict, translations: ExistingTranslations, database: sqlite3.Connection) -> dict:
        captions = row["captions"]
        joined = translations.add_to(row)
        text = captions.get(self.source)
        missing = [] if text is None else [code for code in self.languages if code not in captions]
        if not missing:
            return row | {"joined": joined}
        database.execute("INSERT OR IGNORE INTO sentence (text) VALUES (?)", (text,))
        (number,) = database.execute("SELECT id FROM sentence WHERE text = ?", (text,)).fetchone()
        wanted = [(code, number) for code in missing]
        database.executemany("INSERT OR IGNORE INTO missing VALUES (?, ?)", wanted)
        return row | {"joined": joined, "sentence": number}

    def _write_units(self, directory: Path, language: str, database: sqlite3.Connection) -> None:
        directory.mkdir(parents=True)
        query = "SELECT id, text FROM missing JOIN sentence USING (id) WHERE language = ? ORDER BY id"
        found = database.execute(query, (language,))
        for number in itertools.count():
            rows = found.fetchmany(self.unit_size)
            if not rows:
                break
            sentences = ({"sentence": sentence, "text": text} for sentence, text in rows)
            write_jsonl(sentences, directory / f"{number:06d}.jsonl")

    def units(self) -> list[tuple[str, Path, Path]]:
        """(language, unit file, result file) of all units, in order."""
        files = [(code, file) for code in self.languages for file in self._unit_files(code)]
        return [(code, file, self.directory / "results" / code / file.name) for code, file in files]

    def _unit_files(self, language: str) -> list[Path]:
        return sorted((self.directory / "plan" / "units" / language).glob("*.jsonl"))

    def translate(self, rank: int, processes: int, translate: Callable[[str, list[str]], list[dict]]) -> None:
        """Does this process's share of the units that have no result yet.

        Args:
            translate: (language, texts) -> one {"translation": str, "rejected": str | None} per text.
        """
        for language, unit, result in self.units()[rank::processes]:
            if not result.exists():
                result.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(result)
                rows = list(read_jsonl(unit))
                translations = translate(language, [row["text"] for row in rows])
                write_jsonl((row | found for row, found in zip(rows, translations, strict=True)), result)

    @property
    def is_translated(self) -> bool:
        return self.is_planned and all(result.exists() for _, _, result in self.units())

    def merged_rows(self, report: "TranslationReport") -> Iterator[dict]:
        """The corpus with the accepted translations; counts into `report`."""
        path = self.directory / "translations.sqlite"
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("BEGIN")
            database.execute(
                "CREATE TABLE translation (language, id, text, PRIMARY KEY (language, id)) WITHOUT ROWID"
            )
            for language, _, result in self.units():
                accepted = (row for row in read_jsonl(result) if report.count_sentence(language, row))
                values = ((language, row["sentence"], row["translation"]) for row in accepted)
                database.executemany("INSERT INTO translation VALUES (?, ?, ?)", values)
            for row in read_jsonl(self.directory / "plan" / "rows.jsonl"):
                yield self._merged(row, report, database)
        path.unlink()

    def _merged(self, row: dict, report: "TranslationReport", database: sqlite3.Connection) -> dict:
        number = row.pop("sentence", None)
        report.count_row(row["captions"], row.pop("joined"))
        for language in self.languages:
            if number is not None and language not in row["captions"]:
                query = "SELECT text FROM translation WHERE language = ? AND id = ?"
                found = database.execute(query, (language, number)).fetchone()
                report.count_caption(language, found is not None)
                if found:
                    row["captions"][language] = found[0]
        return row if row["alignment"] else {name: row[name] for name in ("image_id", "captions")}

    def rejected(self) -> Iterator[dict]:
        """Every translation that was left out: language, text, translation and the reason."""
        for language, _, result in self.units():
            for row in read_jsonl(result):
                if row["rejected"]:
                    yield {"language": language} | {
                        name: row[name] for name in ("text", "translation", "rejected")
                    }


class TranslationReport:
    """Counts over a corpus; equal for equal results, so it holds no times."""

    def __init__(self, languages: Iterable[str]):
        self.rows = self.joined = 0
        counts = ("present", "translated", "left_out", "sentences", "rejected")
        self.languages = {code: dict.fromkeys(counts, 0) | {"rejected": {}} for code in languages}

    def count_sentence(self, language: str, row: dict) -> bool:
        """Counts a unique sentence; gives whether its translation is accepted."""
        counts = self.languages[language]
        counts["sentences"] += 1
        if row["rejected"]:
            counts["rejected"][row["rejected"]] = counts["rejected"].get(row["rejected"], 0) + 1
        return not row["rejected"]

    def count_row(self, captions: dict, joined: int) -> None:
        self.rows += 1
        self.joined += joined
        for language in captions.keys() & self.languages.keys():
            self.languages[language]["present"] += 1

    def count_caption(self, language: str, translated: bool) -> None:
        self.languages[language]["translated" if translated else "left_out"] += 1

    def as_dict(self) -> dict:
        return {"rows": self.rows, "joined_captions": self.joined, "languages": self.languages}


def read_jsonl(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)
