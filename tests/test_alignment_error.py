"""Alignment error rate of Fast Align on Multi30K captions aligned by hand, against a diagonal baseline.

`fixtures/alignment/en-xx.jsonl` holds 20 pairs per language from Multi30K's validation split (`row` counts
its lines from 1), with sure and possible links in Pharaoh format over whitespace words.
"""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from uc2.word_alignment import WordAligner, parse_links, unit_texts

FIXTURES = Path(__file__).parent / "fixtures" / "alignment"
MULTI30K = Path(__file__).resolve().parents[2] / "shared" / "data" / "multi30k"
LANGUAGES = ("de", "fr", "cs")
TRAINING_PAIRS = 5000


def alignment_error_rate(found: list[set], sure: list[set], possible: list[set]) -> float:
    """1 - (|A & S| + |A & P|) / (|A| + |S|), with S the sure links, P all links (Och and Ney, 2003)."""
    right = sum(len(a & s) + len(a & (s | p)) for a, s, p in zip(found, sure, possible, strict=True))
    return 1 - right / (sum(map(len, found)) + sum(map(len, sure)))


def hand_aligned(language: str) -> list[dict]:
    lines = (FIXTURES / f"en-{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def diagonal(row: dict, language: str) -> set:
    """Each English word with the word at the same relative place."""
    words, others = len(row["en"].split()), len(row[language].split())
    return {(i, round(i * (others - 1) / max(words - 1, 1))) for i in range(words)}


def read(language: str, count: int) -> list[str]:
    with gzip.open(MULTI30K / f"train.{language}.gz", "rt", encoding="utf-8") as stream:
        return [line.rstrip("\n") for line in itertools.islice(stream, count)]


def test_error_rate_of_a_hand_worked_example():
    sure, possible = [{(0, 0), (1, 2)}], [{(2, 2)}]
    assert alignment_error_rate([{(0, 0), (1, 2)}], sure, possible) == 0
    # |A & S| = 1, |A & P| = 2, |A| = 3, |S| = 2
    assert alignment_error_rate([{(0, 0), (2, 2), (3, 3)}], sure, possible) == pytest.approx(1 - 3 / 5)


@pytest.mark.parametrize("language", LANGUAGES)
def test_hand_alignments_are_whole(language):
    rows = hand_aligned(language)
    assert len(rows) == 20
    for row in rows:
        words, others = len(row["en"].split()), len(row[language].split())
        links = parse_links(row["sure"]) + parse_links(row["possible"])
        assert len(set(links)) == len(links)
        assert all(i < words and j < others for i, j in links)
        assert {j for _, j in links} == set(range(others)), "every word of the translation has a reason"


@pytest.mark.skipif(not MULTI30K.exists(), reason="needs Multi30K captions to train on")
@pytest.mark.parametrize(("language", "at_most"), [("de", 0.2), ("fr", 0.1), ("cs", 0.25)])
def test_fast_align_beats_the_diagonal(language, at_most):
    rows = hand_aligned(language)
    captions = list(zip(read("en", TRAINING_PAIRS), read(language, TRAINING_PAIRS), strict=True))
    captions += [(row["en"], row[language]) for row in rows]
    # Whitespace words need no tokenizer.
    pairs = [(unit_texts(en, "en", None), unit_texts(other, language, None)) for en, other in captions]
    found = [set(parse_links(links)) for links in WordAligner(pairs)(pairs[-len(rows) :])]
    sure, possible = ([set(parse_links(row[kind])) for row in rows] for kind in ("sure", "possible"))
    error = alignment_error_rate(found, sure, possible)
    baseline = alignment_error_rate([diagonal(row, language) for row in rows], sure, possible)
    print(f"en-{language}: AER {error:.3f}, diagonal {baseline:.3f}")
    assert error <= at_most and error < 0.6 * baseline
