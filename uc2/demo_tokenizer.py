"""Trains a small tokenizer that looks like XLM-R's: SentencePiece unigram pieces and the same special ids."""

from __future__ import annotations

import io
from collections.abc import Iterable

import sentencepiece
from transformers import XLMRobertaTokenizer

SPECIAL_PIECES = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in XLM-R; <mask> is the last id


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1200) -> XLMRobertaTokenizer:
    """An `XLMRobertaTokenizer` of at most `vocab_size` pieces with specials; the same for the same texts.

    The text is taken as it is (no normalisation): a fast XLM-R tokenizer rebuilt from its vocabulary has none.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size
        - len(SPECIAL_PIECES)
        + 2,  # SentencePiece counts <unk>, <s>, </s>; <mask> is ours
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
