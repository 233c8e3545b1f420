"""A tokenizer that looks like XLM-R's, trained on a handful of sentences."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import XLMRobertaTokenizer


def build_tokenizer(texts: Iterable[str], **options) -> XLMRobertaTokenizer:
    """A small Unigram vocabulary laid out as XLM-R's: four special ids first, <mask> last.

    `options` are the trainer's, such as `vocab_size`.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False, **options
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)])
