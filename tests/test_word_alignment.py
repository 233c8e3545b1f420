"""Units and Fast Align: a synthetic corpus with a known dictionary, and hand-checked links of Multi30K."""

import gzip
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import XLMRobertaTokenizer

from uc2.data_error import DataError
from uc2.rows import load_parallel_captions
from uc2.word_alignment import (
    align,
    align_captions,
    alignment_units,
    format_links,
    main,
    parse_links,
    unit_texts,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"
MULTI30K = SHARED / "data" / "multi30k"

PIECES = (
    "▁ ▁two ▁dog s , ▁play ing . ▁zwei ▁H unde ▁spiel en ▁deux ▁chien ▁jou ent ▁dva ▁ps i ▁hraj í "
    "两 只 狗 玩 。 犬 が 遊 ぶ"
).split()


@pytest.fixture(scope="module")
def tokenizer():
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    return XLMRobertaTokenizer(vocab=[(piece, -1.0) for piece in [*specials, *PIECES]] + [("<mask>", 0.0)])


# --- units ---


@pytest.mark.parametrize(
    "language, text, spans",
    [
        ("en", "two dogs, playing.", [(0, 1), (1, 4), (4, 7)]),  # ▁two | ▁dog s , | ▁play ing .
        ("en", "  two   dogs ", [(0, 1), (1, 3)]),
        ("de", "zwei Hunde spielen", [(0, 1), (1, 3), (3, 5)]),
        ("fr", "deux chiens jouent", [(0, 1), (1, 3), (3, 5)]),
        ("cs", "dva psi hrají", [(0, 1), (1, 3), (3, 5)]),
        ("en", "two 狗 dog", [(0, 1), (1, 3), (3, 4)]),  # the lone ▁ belongs to the word after it
        ("zh", "两只狗玩。", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),  # ▁ 两 只 狗 玩 。
        ("ja", "犬が遊ぶ", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ("en", "", []),
    ],
)
def test_units_are_words_or_subwords(tokenizer, language, text, spans):
    assert alignment_units(text, language, tokenizer) == spans
    assert len(unit_texts(text, language, tokenizer)) == len(spans)


def test_units_with_offsets_that_include_the_space():
    """Tokenizers differ in whether a piece's offsets cover the space before it: both must work."""
    pieces = [("<unk>", 0.0), ("▁", -5.0), ("▁two", -1.0), ("▁dog", -1.0), ("s", -1.0)]
    backend = Tokenizer(models.Unigram(pieces, 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)

    def tokenize(text, **options):
        return {"offset_mapping": backend.encode(text).offsets}

    assert tokenize("two dogs")["offset_mapping"] == [(0, 3), (3, 7), (7, 8)]
    assert alignment_units("two dogs", "en", tokenize) == [(0, 1), (1, 3)]


def test_unit_texts_ignore_case_and_attached_punctuation(tokenizer):
    assert unit_texts("Two dogs, playing . A-B", "en", tokenizer) == ["two", "dogs", "playing", ".", "a-b"]
    assert unit_texts("两只", "zh", tokenizer) == ["▁", "两", "只"]


def test_links_round_trip():
    assert parse_links("0-0 1-12") == [(0, 0), (1, 12)] and format_links([(0, 0), (1, 12)]) == "0-0 1-12"
    assert parse_links("") == [] and format_links([]) == ""


# --- alignment ---

ADJECTIVES = {"red": "rouge", "young": "jeune", "calm": "calme", "thin": "mince", "big": "énorme"}
NOUNS = {"dog": "chien", "cat": "chat", "tree": "arbre", "king": "roi"}
VERBS = {"sleeps": "dort", "laughs": "rit", "waits": "attend"}
SWAPPED = "0-1 1-0 2-2"


def synthetic_pairs():
    """English adjective-noun-verb sentences; French puts the noun before the adjective."""
    triples = itertools.product(ADJECTIVES, NOUNS, VERBS)
    return [([a, n, v], [NOUNS[n], ADJECTIVES[a], VERBS[v]]) for a, n, v in triples]


def test_a_reordered_synthetic_corpus_is_aligned_exactly():
    pairs = synthetic_pairs()
    links = align(pairs)
    correct = sum(alignment == SWAPPED for alignment in links)
    assert correct >= 0.95 * len(pairs)


def test_alignment_is_deterministic():
    assert align(synthetic_pairs()) == align(synthetic_pairs())


def test_nothing_to_align():
    assert align([]) == []


@pytest.mark.skipif(not MULTI30K.exists(), reason="needs Multi30K")
@pytest.mark.parametrize(
    "language, expected",
    [
        # 0: Two young, White males are outside near many bushes.
        # 3: A man in a blue shirt is standing on a ladder cleaning a window.
        ("de", {0: [("two", "zwei"), ("outside", "freien"), ("many", "vieler"), ("bushes", "büsche")],
                3: [("man", "mann"), ("blue", "blauen"), ("ladder", "leiter"), ("window", "fenster")]}),
        ("fr", {0: [("two", "deux"), ("young", "jeunes"), ("near", "près"), ("bushes", "buissons")],
                3: [("man", "homme"), ("blue", "bleue"), ("ladder", "échelle"), ("window", "fenêtre")]}),
        ("cs", {0: [("two", "dva"), ("young", "mladí"), ("bushes", "keřů")],
                3: [("man", "muž"), ("ladder", "žebříku"), ("window", "okno")]}),
    ],
)  # fmt: skip
def test_multi30k_links_agree_with_a_reader(language, expected):
    units = [[unit_texts(text, code, None) for text in _captions(code, 2000)] for code in ("en", language)]
    pairs = list(zip(*units, strict=True))
    links = align(pairs)
    found = {}
    for row in expected:
        pivot_words, other_words = pairs[row]
        found[row] = {(pivot_words[i], other_words[j]) for i, j in parse_links(links[row])}
    missing = {row: [link for link in wanted if link not in found[row]] for row, wanted in expected.items()}
    assert not any(missing.values()), (missing, found)
    assert all(len(parse_links(alignment)) >= 1 for alignment in links)


def _captions(language: str, count: int) -> list[str]:
    with gzip.open(MULTI30K / f"train.{language}.gz", "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n") for line in itertools.islice(lines, count)]


# --- caption rows ---


def caption_rows() -> list[dict]:
    rows = []
    for number, (english, french) in enumerate(synthetic_pairs()):
        captions = {"en": " ".join(english) + ".", "fr": " ".join(french) + "."}
        rows.append({"image_id": str(number), "captions": captions})
    rows.append({"image_id": "kept", "captions": rows[0]["captions"], "alignment": {"fr": "0-0"}})
    rows.append({"image_id": "no French", "captions": {"en": "dog"}})
    rows.append({"image_id": "no English", "captions": {"fr": "chien"}})
    return rows


def test_command_line_adds_alignments_and_keeps_those_there(tokenizer, tmp_path):
    source, target, folder = tmp_path / "captions.jsonl", tmp_path / "aligned.jsonl", tmp_path / "tokenizer"
    source.write_text("".join(json.dumps(row) + "\n" for row in caption_rows()))
    tokenizer.save_pretrained(folder)
    main(["--input", str(source), "--output", str(target), "--tokenizer", str(folder)])
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["captions"] for row in rows] == [row["captions"] for row in caption_rows()]
    assert [row["alignment"] for row in rows[-3:]] == [{"fr": "0-0"}, {}, {}]
    aligned = [row["alignment"]["fr"] for row in rows[:-3]]
    assert aligned.count(SWAPPED) >= 0.95 * len(aligned)
    load_parallel_captions(str(target))  # what was written is valid input


@pytest.fixture
def command(tokenizer, tmp_path) -> list[str]:
    """Arguments but for the output's name: three languages."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "captions.jsonl"
    rows = [row | {"captions": row["captions"] | {"de": "zwei Hunde spielen"}} for row in caption_rows()]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--input", str(source), "--tokenizer", str(tmp_path / "tokenizer"), "--output"]


KILLED_RUN = """
import os, signal, sys
import uc2.word_alignment as word_alignment

# Dies at the given call of os.replace, by which every file gets its name.
replace, calls = os.replace, int(sys.argv[1])
def dying_replace(*names):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = dying_replace
word_alignment.main(sys.argv[2:])
"""


def test_killed_and_started_again_the_result_is_the_same(command, tmp_path):
    """SIGKILL when settings, a language's links and the output are about to get their names."""
    main([*command, str(tmp_path / "whole.jsonl")])
    target = tmp_path / "killed.jsonl"
    for call in ("1", "3", "2"):  # 1: settings; 3: French, German done; 2: the output, French done
        run = [sys.executable, "-c", KILLED_RUN, call, *command, str(target)]
        killed = subprocess.run(run, cwd=ROOT, capture_output=True)
        assert killed.returncode == -signal.SIGKILL and not target.exists(), killed.stderr
    assert sorted(path.name for path in (tmp_path / "killed.jsonl.work").iterdir() if path.suffix == ".jsonl") == [
        "de.jsonl",
        "fr.jsonl",
    ]
    main([*command, str(target)])
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".killed", "killed.jsonl.work"))]


def test_two_processes_give_the_same_bytes(command, tmp_path):
    main([*command, str(tmp_path / "one.jsonl")])
    main([*command, str(tmp_path / "two.jsonl"), "--num_processes", "2"])
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_unfinished_work_of_other_options_is_refused(tokenizer, tmp_path):
    source, work = tmp_path / "captions.jsonl", tmp_path / "out.jsonl.work"
    source.write_text("".join(json.dumps(row) + "\n" for row in caption_rows()))
    work.mkdir()
    (work / "settings.json").write_text('{"iterations": 4}')
    with pytest.raises(ValueError, match="other options"):
        main(["--input", str(source), "--output", str(tmp_path / "out.jsonl"), "--tokenizer", "unread"])


def test_training_on_a_part_of_the_pairs_still_aligns_all(tokenizer):
    rows = [row | {"alignment": {"en": None, "fr": None}} for row in caption_rows()[:-3]]
    aligned = align_captions(datasets.Dataset.from_list(rows), tokenizer, max_training_pairs=30)
    assert all(row["alignment"]["fr"] for row in aligned)


def test_links_of_unspaced_languages_count_subwords_and_avoid_the_lone_word_start(tokenizer):
    pairs = [("two dogs", "两狗"), ("dogs playing", "狗玩"), ("two", "两"), ("dogs", "狗")] * 10
    rows = [
        {"image_id": "a", "captions": {"en": en, "zh": zh}, "alignment": {"en": None, "zh": None}}
        for en, zh in pairs
    ]
    aligned = align_captions(datasets.Dataset.from_list(rows), tokenizer)
    links = [row["alignment"]["zh"] for row in aligned.select(range(4))]
    assert links == ["0-1 1-2", "0-1 1-2", "0-1", "0-1"]


def test_a_missing_pivot_is_an_error(tokenizer):
    rows = [{"image_id": "a", "captions": {"fr": "chien"}, "alignment": {"fr": None}}]
    with pytest.raises(DataError, match="pivot language 'en'"):
        align_captions(datasets.Dataset.from_list(rows), tokenizer)
