"""Trains a small tokenizer that looks like XLM-R's: SentencePiece unigram pieces and the same special ids."""

from __future__ import annotations

import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterable

import sentencepiece
from transformers import XLMRobertaTokenizer

SPECIAL_PIECES = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in XLM-R; <mask> is the last id
_WORD_START = "▁"
_EDGE = "\t"  # marks the edges of unspaced words in the training text; never part of a caption
_MAX_PIECE = 16


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 1200, unspaced_words: Iterable[str] = ()
) -> XLMRobertaTokenizer:
    """An `XLMRobertaTokenizer` of at most `vocab_size` pieces with specials; the same for the same texts.

    The text is taken as it is (no normalisation): a fast XLM-R tokenizer built from a vocabulary has none.

    Args:
        unspaced_words: words of languages without spaces. No piece reaches over the edge of one: in a corpus
            of few patterns whole phrases would become pieces, which neither alignment nor MRTM could use.
    """
    words = sorted(unspaced_words, key=lambda word: (-len(word), word))
    edges = re.compile("|".join(map(re.escape, words)) or "(?!)")
    lines = [edges.sub(rf"{_EDGE}\g<0>{_EDGE}", text) for text in texts]
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seeds:
        seeds.writelines(f"{piece}\t{count}\n" for piece, count in _seed_pieces(lines))
        seeds.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - len(SPECIAL_PIECES) + 2,  # counts <unk>, <s>, </s>; <mask> is ours
            seed_sentencepieces_file=seeds.name,
            pretokenization_delimiter=_EDGE,
            max_sentencepiece_length=_MAX_PIECE,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [
        (trained.id_to_piece(i), trained.get_score(i))
        for i in range(len(trained))
        if not (trained.is_control(i) or trained.is_unknown(i))
    ]
    vocab = [*((piece, 0.0) for piece in SPECIAL_PIECES), *pieces, ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab)


def _seed_pieces(lines: list[str]) -> list[tuple[str, int]]:
    """Every run of letters within a word, with its count in the corpus.

    SentencePiece's own seeds are runs that occur in two *different* words, so that a word which resembles no
    other, however frequent, would never be a piece: common in a corpus of some hundred words.
    """
    words = Counter(word for line in lines for word in _pretokens(line))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + _MAX_PIECE) + 1):
                counts[word[start:end]] += count
    frequent = ((piece, count) for piece, count in counts.items() if count > 1 or len(piece) == 1)
    return sorted(frequent, key=lambda seed: (-seed[1] * len(seed[0]), seed[0]))


def _pretokens(line: str) -> Iterable[str]:
    """The stretches that pieces stay within: words with their mark, without punctuation, between edges."""
    for part in re.split(_EDGE, _WORD_START + _WORD_START.join(line.split(" "))):
        yield from re.findall(rf"{_WORD_START}?\w+|[^\w{_WORD_START}]|{_WORD_START}", part)
