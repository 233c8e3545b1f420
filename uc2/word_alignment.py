"""Word alignment of translated captions with Fast Align (Dyer et al., 2013), which VTLM needs (section 3.3).

Links join *units*: whitespace words, or sub-words in languages written without spaces (`alignment_units`).

    python -m uc2.word_alignment --input captions.jsonl --output aligned.jsonl --tokenizer xlm-roberta-base

Killed at any moment and started again with the same options, it goes on with the languages that are not done;
the result does not change by a byte. `aligned.jsonl.work/` holds the finished languages until the end.
"""

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import datasets
import numpy as np
from thot.alignment import FastAlignModel, SymmetrizationHeuristic, SymmetrizedAligner
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from uc2.atomic_files import atomic_file, remove_leftovers, sole_writer, write_json
from uc2.child_processes import exit_with_parent
from uc2.data_error import DataError, OptionError
from uc2.file_versions import file_versions
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

    Args:
        rows: from `uc2.rows.load_parallel_captions`.
        max_training_pairs, iterations: see `language_links`, which does one language after another.
        cache_dir: where the Arrow file of the result goes; None = the cache of `datasets`.
    Raises:
        DataError: no caption in the pivot language.
    """
    options = {"max_training_pairs": max_training_pairs, "iterations": iterations}
    links = {
        language: list(language_links(rows, tokenizer, language, pivot=pivot, **options))
        for language in _languages_beside(pivot, rows)
    }

    def add(batch: dict, indices: list[int]) -> dict:
        alignments = zip(indices, batch["alignment"], strict=True)
        return {
            "alignment": [dict(there) | {code: links[code][i] for code in links} for i, there in alignments]
        }

    return rows.map(
        add,
        batched=True,
        with_indices=True,
        cache_file_name=cache_dir and os.path.join(cache_dir, "aligned.arrow"),
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex[:16],  # `links` may be too large to hash
    )


def _languages_beside(pivot: str, rows: datasets.Dataset) -> list[str]:
    languages = list(rows.features["captions"])
    if pivot not in languages:
        expected = f"captions in the pivot language '{pivot}'"
        raise DataError(field="captions", found=languages, expected=expected)
    return [language for language in languages if language != pivot]


def language_links(
    rows: datasets.Dataset,
    tokenizer,
    language: str,
    *,
    pivot: str = "en",
    max_training_pairs: int = 200_000,
    iterations: int = 5,
) -> Iterator[str | None]:
    """For every row the links of one language's caption; None where it or the pivot's is missing.

    The model is trained on at most `max_training_pairs` pairs spread evenly over the rows (about 6 kB of memory
    per pair), so that memory does not grow with the corpus. Alignments already there are kept.
    """
    missing = _rows_to_align(rows, pivot, language)
    if not len(missing):
        yield from itertools.chain.from_iterable(
            (there[language] for there in batch["alignment"])
            for batch in rows.select_columns("alignment").iter(CHUNK)
        )
        return
    logger.info("%s-%s: aligning %d caption pairs", pivot, language, len(missing))
    chosen = missing[:: -(-len(missing) // max_training_pairs)]
    aligner = WordAligner(_training_pairs(rows, chosen, pivot, language, tokenizer), iterations=iterations)
    for batch in rows.select_columns(["captions", "alignment"]).iter(CHUNK):
        links = [there[language] for there in batch["alignment"]]
        both = enumerate(zip(batch["captions"], batch["alignment"], strict=True))
        wanted = [i for i, (captions, there) in both if _needs_alignment(captions, there, pivot, language)]
        pairs = [_unit_pair(batch["captions"][i], pivot, language, tokenizer) for i in wanted]
        for i, pair, found in zip(wanted, pairs, aligner(pairs), strict=True):
            links[i] = _without_lone_pieces(found, pair)
        yield from links


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


def _without_lone_pieces(links: str, pair: Pair) -> str:
    """Drop links to the bare word-start piece, which is a unit of unspaced languages but means nothing."""
    pivot, other = pair
    return format_links((i, j) for i, j in parse_links(links) if WORD_START not in (pivot[i], other[j]))


# --- command ---


class AlignmentWork:
    """The languages of one output, each a file of links (JSON: a string or null, a line per row).

    Args:
        args: of the command line, see `_parser`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, Path(args.output)
        self.directory = Path(f"{args.output}.work")

    def start(self) -> None:
        """Makes the work directory, or checks that the one there belongs to this run.

        Raises:
            OptionError: it comes from other options or other input files.
        """
        record = self.directory / "settings.json"
        settings = {k: v for k, v in vars(self.args).items() if k not in ("output", "num_processes")}
        settings["files"] = file_versions(self.args.input)
        if not record.exists():
            remove_leftovers(record)
            write_json(settings, record)
        elif json.loads(record.read_text(encoding="utf-8")) != settings:
            raise OptionError(f"{self.directory} is of a run with other options or input; remove it")

    def links_file(self, language: str) -> Path:
        return self.directory / f"{language}.jsonl"

    def align(self, rows: datasets.Dataset, languages: Sequence[str]) -> None:
        """Writes the links of those languages that have none yet."""
        tokenizer = AutoTokenizer.from_pretrained(self.args.tokenizer)
        options = {name: getattr(self.args, name) for name in ("pivot", "max_training_pairs", "iterations")}
        for language in languages:
            if not self.links_file(language).exists():
                remove_leftovers(self.links_file(language))
                links = language_links(rows, tokenizer, language, **options)
                with atomic_file(self.links_file(language)) as temporary, open(temporary, "w") as stream:
                    stream.writelines(json.dumps(found) + "\n" for found in links)

    def align_in_processes(self, rows: datasets.Dataset, languages: Sequence[str]) -> None:
        """`align` with each `num_processes`-th language in a process of its own."""
        context = multiprocessing.get_context("spawn")
        shares = [languages[rank :: self.args.num_processes] for rank in range(self.args.num_processes)]
        processes = [context.Process(target=_align_share, args=(self, rows, share)) for share in shares if share]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("A process failed (see above); start again with the same command to continue.")

    def finish(self, rows: datasets.Dataset, languages: Sequence[str]) -> None:
        """Joins the rows and the links of all languages, and removes the work directory."""
        remove_leftovers(self.output)
        with ExitStack() as stack:
            files = [stack.enter_context(open(self.links_file(language))) for language in languages]
            write_jsonl(_joined(rows, languages, files), self.output)
        shutil.rmtree(self.directory)


def _align_share(work: AlignmentWork, rows: datasets.Dataset, languages: Sequence[str]) -> None:
    exit_with_parent()
    logging.basicConfig(level=logging.INFO)
    work.align(rows, languages)


def _joined(rows: datasets.Dataset, languages: Sequence[str], files: Sequence[Iterable[str]]) -> Iterator[dict]:
    lines = zip(rows, *files, strict=True)
    for row, *links in tqdm(lines, total=len(rows), desc="writing", unit="row"):
        found = dict(zip(languages, map(json.loads, links), strict=True))
        alignment = _present(row["alignment"] | found)
        yield row | {"captions": _present(row["captions"]), "alignment": alignment}


def _present(values: dict) -> dict:
    return {language: value for language, value in values.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uc2.word_alignment", description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, help="parallel captions")
    parser.add_argument("--output", required=True, help="JSON Lines file to write, with alignments")
    parser.add_argument("--pivot", default="en", help="language that the others are aligned to")
    parser.add_argument("--tokenizer", required=True, help="gives the units of unspaced languages")
    parser.add_argument("--max_training_pairs", type=int, default=200_000, help="per language; about 6 kB each")
    parser.add_argument("--iterations", type=int, default=5, help="EM steps per direction")
    parser.add_argument("--num_processes", type=int, default=1, help="languages aligned at the same time")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    if args.num_processes < 1:
        raise OptionError(f"--num_processes is {args.num_processes}; expected at least 1")
    rows = load_parallel_captions(args.input)
    languages = _languages_beside(args.pivot, rows)
    with sole_writer(args.output):
        work = AlignmentWork(args)
        work.start()
        if args.num_processes > 1:
            work.align_in_processes(rows, languages)
        else:
            work.align(rows, languages)
        work.finish(rows, languages)


if __name__ == "__main__":
    main()
