"""Word alignment of translated captions with Fast Align (Dyer et al., 2013), which VTLM needs (section 3.3).

Links join *units*: whitespace words, or sub-words in languages written without spaces (`alignment_units`).

    python -m uc2.word_alignment --input captions.jsonl --output aligned.jsonl --tokenizer xlm-roberta-base
"""

import argparse
import itertools
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence

import datasets
import numpy as np
from thot.alignment import FastAlignModel, SymmetrizationHeuristic, SymmetrizedAligner
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from uc2.data_error import DataError
from uc2.rows import load_parallel_captions, write_jsonl

logger = logging.getLogger(__name__)

UNSPACED_LANGUAGES = frozenset({"ja", "zh", "th", "lo", "km", "my"})
"""Languages written without spaces between words: their units are sub-words."""

CHUNK = 10_000
"""Caption rows read and aligned at a time."""

WORD_START = "▁"
"""SentencePiece's mark of a word start, which may stand alone as a sub-word."""

Pair = tuple[Sequence[str], Sequence[str]]

_WORD = re.compile(r"\S+")
_OUTER_PUNCTUATION = re.compile(r"^\W+|\W+$")


# --- units ---


def alignment_units(text: str, language: str, tokenizer) -> list[tuple[int, int]]:
    """Sub-word spans [start, end) of the units that an alignment's indices count.

    | language             | unit i                                                                         |
    |----------------------|--------------------------------------------------------------------------------|
    | ja, zh, th, lo, …    | the i-th sub-word, so that (0, 1), (1, 2), …                                   |
    | every other          | the i-th of `text.split()`; empty span if the tokenizer drops the whole word   |

    Positions count from 0 without special tokens. `tokenizer` is a fast tokenizer (it must know offsets).
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return unit_spans(text, language, encoding["offset_mapping"])


def unit_spans(text: str, language: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """`alignment_units` of a caption already tokenized; `offsets` are its sub-words' character spans."""
    if language in UNSPACED_LANGUAGES:
        return [(position, position + 1) for position in range(len(offsets))]
    word_ends = [match.end() for match in _WORD.finditer(text)]
    # A sub-word belongs to the word that holds its last character. A piece that covers nothing but the space
    # before a word counts to that word, because the word before it ends at or before the space.
    last_characters = [max(start, end - 1) for start, end in offsets]
    words = np.searchsorted(word_ends, last_characters, side="right")
    bounds = np.searchsorted(words, np.arange(len(word_ends) + 1)).tolist()
    return list(itertools.pairwise(bounds))


def unit_texts(text: str, language: str, tokenizer) -> list[str]:
    """What Fast Align counts for each unit: lower case, words without the punctuation attached to them."""
    if language in UNSPACED_LANGUAGES:
        return [piece.lower() for piece in tokenizer.tokenize(text)]
    return [_OUTER_PUNCTUATION.sub("", word).lower() or word for word in text.split()]


# --- alignment ---


class WordAligner:
    """Fast Align in both directions, symmetrised with grow-diag-final-and.

    Args:
        pairs: sentence pairs to train on, each ([pivot unit, …], [other unit, …]).
        iterations: EM steps per direction.
    """

    def __init__(self, pairs: Iterable[Pair], *, iterations: int = 5):
        self._forward, self._backward = FastAlignModel(), FastAlignModel()
        for pivot, other in pairs:
            self._forward.add_sentence_pair(pivot, other)
            self._backward.add_sentence_pair(other, pivot)
        for model in (self._forward, self._backward):
            model.start_training()
            for _ in range(iterations):
                model.train()
            model.end_training()
        self._aligner = SymmetrizedAligner(self._forward, self._backward)
        self._aligner.heuristic = SymmetrizationHeuristic.GROW_DIAG_FINAL_AND

    def __call__(self, pairs: Sequence[Pair]) -> list[str]:
        """Links of each pair in Pharaoh format, "pivot unit-other unit" separated by spaces, sorted."""
        pivots, others = [list(pivot) for pivot, _ in pairs], [list(other) for _, other in pairs]
        found = self._aligner.get_best_alignments(pivots, others)
        return [format_links(zip(*matrix.to_numpy().nonzero(), strict=True)) for _, matrix in found]


def align(pairs: Sequence[Pair], *, iterations: int = 5) -> list[str]:
    """Align sentence pairs with a model trained on these very pairs.

    Args: `pairs`: ([pivot unit, …], [other unit, …]) per sentence pair. Returns: a Pharaoh string per pair.
    """
    pairs = list(pairs)
    return WordAligner(pairs, iterations=iterations)(pairs) if pairs else []


def format_links(links: Iterable[tuple[int, int]]) -> str:
    """[(0, 0), (1, 2)] -> "0-0 1-2"."""
    return " ".join(f"{pivot}-{other}" for pivot, other in links)


def parse_links(alignment: str) -> list[tuple[int, int]]:
    """"0-0 1-2" -> [(0, 0), (1, 2)]."""
    return [(int(pivot), int(other)) for pivot, other in (link.split("-") for link in alignment.split())]


# --- caption rows ---


def align_captions(
    rows: datasets.Dataset,
    tokenizer,
    *,
    pivot: str = "en",
    max_training_pairs: int = 200_000,
    iterations: int = 5,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """The parallel caption rows with an `alignment` for every caption beside one in the pivot language.

    Languages are done one after another, each by a model trained on at most `max_training_pairs` pairs spread
    evenly over the rows (about 6 kB of memory per pair), so that memory does not grow with the corpus.
    Alignments already there are kept.

    Args:
        rows: from `uc2.rows.load_parallel_captions`.
        cache_dir: where the Arrow files of the result go; None = the cache of `datasets`.
    Raises:
        DataError: no caption in the pivot language.
    """
    languages = list(rows.features["captions"])
    if pivot not in languages:
        expected = f"captions in the pivot language '{pivot}'"
        raise DataError(field="captions", found=languages, expected=expected)
    for language in languages:
        if language != pivot:
            missing = _rows_to_align(rows, pivot, language)
            if len(missing):
                logger.info("%s-%s: aligning %d caption pairs", pivot, language, len(missing))
                chosen = missing[:: -(-len(missing) // max_training_pairs)]
                pairs = _training_pairs(rows, chosen, pivot, language, tokenizer)
                aligner = WordAligner(pairs, iterations=iterations)
                rows = _add_alignment(rows, aligner, pivot, language, tokenizer, cache_dir)
    return rows


def _needs_alignment(captions: dict, alignment: dict, pivot: str, language: str) -> bool:
    return bool(captions[pivot] and captions[language]) and alignment[language] is None


def _rows_to_align(rows: datasets.Dataset, pivot: str, language: str) -> np.ndarray:
    """Indices of the rows that have both captions and no alignment yet."""
    wanted, start = [], 0
    for batch in rows.select_columns(["captions", "alignment"]).iter(CHUNK):
        both = zip(batch["captions"], batch["alignment"], strict=True)
        wanted += [start + i for i, (c, a) in enumerate(both) if _needs_alignment(c, a, pivot, language)]
        start += len(batch["captions"])
    return np.array(wanted, dtype=np.int64)


def _training_pairs(
    rows: datasets.Dataset, chosen: np.ndarray, pivot: str, language: str, tokenizer
) -> Iterator[Pair]:
    captions = rows.select_columns("captions").select(chosen)
    for row in tqdm(captions, desc=f"{pivot}-{language}: training", unit="pair"):
        yield _unit_pair(row["captions"], pivot, language, tokenizer)


def _unit_pair(captions: dict, pivot: str, language: str, tokenizer) -> Pair:
    return tuple(unit_texts(captions[code], code, tokenizer) for code in (pivot, language))


def _add_alignment(
    rows: datasets.Dataset, aligner: WordAligner, pivot: str, language: str, tokenizer, cache_dir: str | None
) -> datasets.Dataset:
    def add(batch: dict) -> dict:
        alignments = [dict(alignment) for alignment in batch["alignment"]]
        wanted = [
            (captions, alignment)
            for captions, alignment in zip(batch["captions"], alignments, strict=True)
            if _needs_alignment(captions, alignment, pivot, language)
        ]
        pairs = [_unit_pair(captions, pivot, language, tokenizer) for captions, _ in wanted]
        for (_, alignment), pair, links in zip(wanted, pairs, aligner(pairs), strict=True):
            alignment[language] = _without_lone_pieces(links, pair)
        return {"alignment": alignments}

    return rows.map(
        add,
        batched=True,
        batch_size=CHUNK,
        desc=f"{pivot}-{language}: aligning",
        cache_file_name=cache_dir and os.path.join(cache_dir, f"{language}.arrow"),
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex[:16],  # a trained model cannot be hashed
    )


def _without_lone_pieces(links: str, pair: Pair) -> str:
    """Drop links to the bare word-start piece, which is a unit of unspaced languages but means nothing."""
    pivot, other = pair
    return format_links((i, j) for i, j in parse_links(links) if WORD_START not in (pivot[i], other[j]))


def _present(values: dict) -> dict:
    return {language: value for language, value in values.items() if value is not None}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="uc2.word_alignment", description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, help="parallel captions")
    parser.add_argument("--output", required=True, help="JSON Lines file to write, with alignments")
    parser.add_argument("--pivot", default="en", help="language that the others are aligned to")
    parser.add_argument("--tokenizer", required=True, help="gives the units of unspaced languages")
    parser.add_argument("--max_training_pairs", type=int, default=200_000, help="per language")
    parser.add_argument("--iterations", type=int, default=5, help="EM steps per direction")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    rows = load_parallel_captions(args.input)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as cache_dir:
        aligned = align_captions(
            rows,
            tokenizer,
            pivot=args.pivot,
            max_training_pairs=args.max_training_pairs,
            iterations=args.iterations,
            cache_dir=cache_dir,
        )
        write_jsonl(
            (
                row | {"captions": _present(row["captions"]), "alignment": _present(row["alignment"])}
                for row in tqdm(aligned, desc="writing", unit="row")
            ),
            args.output,
        )


if __name__ == "__main__":
    main()
