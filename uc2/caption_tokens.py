"""Parallel captions as sub-word ids: tokenized in batches, cached by `datasets`, read without copying."""

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from uc2.data_error import DataError
from uc2.word_alignment import parse_links, unit_spans


class CaptionTokens:
    """Sub-words, alignment units and links of every row's captions.

    Args:
        captions: rows of `uc2.rows.load_parallel_captions`, n of them.
        tokenizer: a fast tokenizer.
        languages: the L languages to read.
        pivot_language: the language the alignments start from.
        max_length: longer captions are cut to so many sub-words (special tokens not counted).
        num_proc: processes to tokenize with.

    Raises:
        DataError: an alignment names a unit that its caption does not have.
    """

    def __init__(
        self,
        captions: datasets.Dataset,
        tokenizer,
        languages: Sequence[str],
        *,
        pivot_language: str,
        max_length: int,
        num_proc: int | None = None,
    ):
        self.languages = tuple(languages)
        self._table = captions.map(
            _Tokenize(tokenizer, self.languages, pivot_language, max_length),
            batched=True,
            with_indices=True,
            remove_columns=captions.column_names,
            features=_features(self.languages),
            num_proc=num_proc,
            desc="tokenizing captions",
        )
        self._open_columns()

    def _open_columns(self) -> None:
        self._columns = {
            name: _ListColumn(self._table.data.column(name))
            for name, feature in self._table.features.items()
            if isinstance(feature, datasets.List)
        }

    def __getstate__(self) -> dict:
        # The views point into memory-mapped files: a worker process opens its own.
        return {name: value for name, value in self.__dict__.items() if name != "_columns"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_columns()

    def ids(self, row: int, language: str) -> np.ndarray:
        """(l,) int32 sub-word ids without special tokens; empty if the caption is missing."""
        return self._columns[f"{language}.ids"][row]

    def spans(self, row: int, language: str) -> list[tuple[int, int]]:
        """Sub-word span [start, end) of each alignment unit."""
        return list(itertools.pairwise(self._columns[f"{language}.bounds"][row].tolist()))

    def links(self, row: int, language: str) -> list[tuple[int, int]]:
        """(pivot unit, unit of `language`) pairs."""
        flat = self._columns[f"{language}.links"][row].tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def lengths(self) -> np.ndarray:
        """(n, L) int32: sub-words of each caption, 0 where it is missing."""
        return np.stack([self._columns[f"{code}.ids"].lengths for code in self.languages], axis=1)

    def aligned(self) -> np.ndarray:
        """(n, L) bool: whether the caption has an alignment with the pivot language's."""
        return np.stack([self._columns[f"{code}.links"].present for code in self.languages], axis=1)

    def text_codes(self) -> np.ndarray:
        """(n, L) uint64, equal for captions of one language that differ at most in case and spacing."""
        columns = (self._table.data.column(f"{code}.text_code").to_numpy() for code in self.languages)
        return np.stack([column.view(np.uint64) for column in columns], axis=1)


def _features(languages: Sequence[str]) -> datasets.Features:
    integers = datasets.List(datasets.Value("int32"))
    return datasets.Features(
        {f"{code}.{name}": integers for code in languages for name in ("ids", "bounds", "links")}
        | {f"{code}.text_code": datasets.Value("int64") for code in languages}
    )


@dataclass
class _Tokenize:
    """The function mapped over the caption rows. A class, so that `datasets` can hash it for its cache."""

    tokenizer: Any
    languages: tuple[str, ...]
    pivot_language: str
    max_length: int

    def __call__(self, batch: dict, indices: list[int]) -> dict:
        columns: dict[str, list] = {}
        num_units = {}
        for language in self.languages:
            texts = [captions.get(language) or "" for captions in batch["captions"]]
            encoding = self.tokenizer(
                texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            units = [
                unit_spans(text, language, offsets)
                for text, offsets in zip(texts, encoding["offset_mapping"], strict=True)
            ]
            num_units[language] = [len(spans) for spans in units]
            columns[f"{language}.ids"] = [ids[: self.max_length] for ids in encoding["input_ids"]]
            columns[f"{language}.bounds"] = [self._bounds(spans) for spans in units]
            columns[f"{language}.text_code"] = [_text_code(language, text) for text in texts]
        for language in self.languages:
            columns[f"{language}.links"] = [
                self._links(alignment, language, i, num_units, row)
                for i, (alignment, row) in enumerate(zip(batch["alignment"], indices, strict=True))
            ]
        return columns

    def _bounds(self, spans: list[tuple[int, int]]) -> list[int]:
        ends = [0, *(end for _, end in spans)]
        return [min(end, self.max_length) for end in ends]

    def _links(self, alignment: dict, language: str, i: int, num_units: dict, row: int) -> list[int] | None:
        links = alignment.get(language)
        if links is None or self.pivot_language not in num_units or language == self.pivot_language:
            return None
        parsed = parse_links(links)
        limits = num_units[self.pivot_language][i], num_units[language][i]
        for link in parsed:
            if link[0] >= limits[0] or link[1] >= limits[1]:
                raise DataError(
                    row=row + 1,
                    field=f"alignment.{language}",
                    found=f"{link[0]}-{link[1]}",
                    expected=f"units below {limits[0]} ({self.pivot_language}) and {limits[1]} ({language}); "
                    "align with the pivot language and the tokenizer of this run",
                )
        return [unit for link in parsed for unit in link]


def _text_code(language: str, text: str) -> int:
    content = f"{language} {' '.join(text.split()).casefold()}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little", signed=True)


class _ListColumn:
    """Rows of an Arrow column of integer lists as numpy views: a look-up is one bisection and two slices."""

    def __init__(self, column: pa.ChunkedArray):
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._views = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self._starts = [0, *itertools.accumulate(len(chunk) for chunk in chunks)]
        self.present = np.concatenate([chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in chunks])
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self._views]) * self.present

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = bisect_right(self._starts, row) - 1
        offsets, values = self._views[chunk]
        row -= self._starts[chunk]
        return values[offsets[row] : offsets[row + 1]]
