"""The demo's stand-in for XLM-R: a small, untrained encoder whose word embeddings are already multilingual.

What UC2 gets from XLM-R, words of one meaning lying together whatever their language, comes here from
cross-lingual latent semantic indexing (Dumais et al., 1997): the captions of one row, in all languages, are one
document, and the leading singular vectors of the term-document matrix are the word embeddings.
"""

import os
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, XLMRobertaConfig, XLMRobertaForMaskedLM

# Share of an embedding that is the word's own: translations would otherwise be one and the same vector, and a
# masked word's language could not be told.
OWN_SHARE = 0.25
# Words must outweigh positions for a small model to match words with regions early on; and they must be large
# beside an optimiser step, which would otherwise undo within an epoch what Early Adaptation matches regions with.
WORD_STD, POSITION_STD, LINEAR_STD = 0.2, 0.04, 0.1


def latent_semantic_embeddings(documents: Iterable[np.ndarray], vocab_size: int, width: int) -> np.ndarray:
    """Documents as arrays of token ids -> `(vocab_size, width)` float32 rows of unit length.

    Each row is a meaning plus `OWN_SHARE` of a random vector; a term that occurs in every document, or in none,
    has no meaning to tell.
    """
    rows = [np.bincount(ids, minlength=vocab_size) > 0 for ids in documents]
    present = np.array(rows, dtype=np.float32)
    frequency = present.mean(axis=0)
    idf = np.where(frequency > 0, np.log(1 / np.maximum(frequency, 1e-9)), 0.0)
    left, values, _ = np.linalg.svd((present * idf).T.astype(np.float32), full_matrices=False)
    terms = np.zeros((vocab_size, width), dtype=np.float32)
    rank = min(width, len(values))
    terms[:, :rank] = left[:, :rank] * values[:rank]
    lengths = np.linalg.norm(terms, axis=1, keepdims=True)
    terms = np.where(lengths > 1e-3 * lengths.max(), terms / np.maximum(lengths, 1e-9), 0.0)
    own = np.random.default_rng(0).normal(scale=width**-0.5, size=terms.shape)
    terms = (terms + OWN_SHARE * own).astype(np.float32)
    return terms / np.linalg.norm(terms, axis=1, keepdims=True)


def save_demo_text_encoder(
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    captions: Iterable[Mapping[str, str | None]],
    *,
    hidden_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    seed: int = 0,
) -> None:
    """Writes an `xlm-roberta` checkpoint and its tokenizer, for `UC2ForPreTraining.from_text_encoder`.

    Args:
        captions: `{language: caption}` of each row, as `load_parallel_captions` gives them.
    """
    documents = []
    for row in captions:
        encoded = tokenizer([text for text in row.values() if text], add_special_tokens=False)["input_ids"]
        documents.append(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded]))
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=130,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=LINEAR_STD,
        # So small a model underfits: dropout would only slow it down.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    model = XLMRobertaForMaskedLM(config)
    words = latent_semantic_embeddings(documents, config.vocab_size, hidden_size)
    embeddings = model.roberta.embeddings
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(torch.from_numpy(words) * WORD_STD * hidden_size**0.5)
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.mul_(POSITION_STD / LINEAR_STD)
        # The logits keep the size they had with words of `LINEAR_STD`.
        model.lm_head.layer_norm.weight.fill_(LINEAR_STD / WORD_STD)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
