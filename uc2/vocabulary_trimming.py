"""Drops the sub-words that a corpus never uses: 192 of the 278 million parameters of a base UC2 are embeddings.

    python -m uc2.vocabulary_trimming --model runs/uc2 --output_dir runs/uc2-small \\
        --captions captions.jsonl questions.jsonl --keep_languages en de fr cs

reads a UC2 folder (any head, with its processor) or an XLM-R text encoder before pre-training, and writes a folder
of the same kind with fewer rows in the embeddings and in the LM head. What is kept:

- the sub-words of every caption, question and plain text in the languages to keep, and of the object labels in
  these languages;
- the special tokens;
- every single character, of the scripts that occur, that is a sub-word: new words are spelled where they must be;
- the sub-word with the lowest score.

A text whose sub-words are all kept is cut exactly as before, so that the model computes the same: of all ways to
cut it, some are gone, but not the best one. The last rule is what makes this certain. A character that is no
sub-word costs a fixed amount below the lowest score; were that to rise, an unknown character followed by a good
sub-word could come out best.
"""

import json
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, XLMRobertaForMaskedLM, XLMRobertaModel

from modeling_uc2 import UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model
from processing_uc2 import UC2Processor
from uc2.arguments import parse
from uc2.atomic_files import atomic_directory
from uc2.data_error import DataError, Found
from uc2.object_labels import load_object_labels
from uc2.row_files import numbered_rows
from uc2.rows import load_captions, load_parallel_captions, load_questions
from uc2.script_errors import told_in_one_sentence

MODEL_CLASSES = {
    kind.__name__: kind
    for kind in (UC2Model, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, XLMRobertaModel, XLMRobertaForMaskedLM)
}
TEXTS_AT_A_TIME = 10_000


# --- texts ---


def corpus_texts(files: Iterable[str], languages: Sequence[str]) -> Iterator[str]:
    """The texts of caption and question files (docs/data_formats.md) in the languages; in all, for none named.

    Raises:
        DataError: at a row that breaks its format; a language has no text in any of the files.
    """
    found = set()
    for file in files:
        for language, text in _texts_by_language(file):
            found.add(language)
            if not languages or language in languages:
                yield text
    for language in languages:
        if language not in found:
            present = Found(", ".join(sorted(found)) or "no text")
            raise DataError(field="keep_languages", found=present, expected=f"captions or questions in {language!r}")


def _texts_by_language(file: str) -> Iterator[tuple[str, str]]:
    first = next((row for _, row in numbered_rows(file, "train")), {})
    if "captions" in first:
        for row in load_parallel_captions(file, streaming=True):
            yield from ((language, text) for language, text in row["captions"].items() if text)
    elif "question" in first:
        yield from ((row["language"], row["question"]) for row in load_questions(file, streaming=True))
    else:
        yield from ((row["language"], row["caption"]) for row in load_captions(file, streaming=True))


def plain_texts(files: Iterable[str]) -> Iterator[str]:
    """The lines of UTF-8 text files."""
    for file in files:
        try:
            with open(file, encoding="utf-8") as lines:
                yield from lines
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(file=file, found=Found(str(error)), expected="a UTF-8 text file") from error


# --- what is kept ---


@dataclass(frozen=True)
class KeptTokens:
    """Ids to keep, ascending, `(n,)` int64, of `size`; and how many each rule adds to those before it."""

    ids: np.ndarray
    size: int
    counts: dict[str, int]


def tokens_to_keep(tokenizer, texts: Iterable[str]) -> KeptTokens:
    """The sub-words to keep so that `texts` and every text made of the same sub-words are cut as before.

    Args:
        tokenizer: a fast Unigram tokenizer (XLM-R's).

    Raises:
        DataError: a tokenizer of another kind; no text.
    """
    vocabulary = _unigram(tokenizer)["vocab"]
    used = np.zeros(len(tokenizer), dtype=bool)
    texts = iter(texts)
    while chunk := list(islice(texts, TEXTS_AT_A_TIME)):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
            used[ids] = True
    if not used.any():
        raise DataError(found=Found("no text"), expected="captions, questions or texts in the languages to keep")

    kept, counts = np.zeros_like(used), {}

    def keep(rule: str, ids) -> None:
        before = kept.sum()
        kept[ids] = True
        counts[rule] = int(kept.sum() - before)

    special = [*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]
    keep("special tokens", special)
    keep("sub-words of the texts", used)
    scripts = {script_of(char) for i in np.flatnonzero(used) if i < len(vocabulary) for char in vocabulary[i][0]}
    single = [i for i, (piece, _) in enumerate(vocabulary) if len(piece) == 1]
    keep("single characters", [i for i in single if script_of(vocabulary[i][0]) in scripts | {None}])
    keep("lowest score", int(np.argmin([score for _, score in vocabulary])))
    return KeptTokens(np.flatnonzero(kept), len(used), counts)


def script_of(char: str) -> str | None:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, HIRAGANA, CJK, …; None for what is no letter.

    Digits, punctuation, signs and the word mark "▁" belong to every language.
    """
    if unicodedata.category(char)[0] not in "LM":
        return None
    return unicodedata.name(char, "UNNAMED").split()[0]


def _unigram(tokenizer) -> dict:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "Unigram":
        raise DataError(
            field="tokenizer", found=Found(f"a {model['type']} model"), expected="a Unigram model, as XLM-R's is"
        )
    return model


# --- trimming ---


def trim_tokenizer(tokenizer, kept: np.ndarray):
    """A tokenizer with the kept sub-words only; their new ids are their places in `kept`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    new_id = {old: new for new, old in enumerate(kept.tolist())}
    model = state["model"]
    model["vocab"] = [model["vocab"][old] for old in new_id if old < len(model["vocab"])]
    model["unk_id"] = new_id[model["unk_id"]]
    for token in state["added_tokens"]:
        token["id"] = new_id[token["id"]]
    for token in state["post_processor"]["special_tokens"].values():
        token["ids"] = [new_id[old] for old in token["ids"]]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        return type(tokenizer).from_pretrained(folder)


@torch.no_grad()
def trim_model(model, kept: np.ndarray) -> None:
    """Leaves the kept rows in the word embeddings and, where there is one, in the LM head; in place.

    Raises:
        DataError: the embeddings have no row for a token to keep; the token of padding, from whose id positions
            are counted, or of the start or the end would get another id.
    """
    rows = torch.from_numpy(kept)
    embeddings, config = model.get_input_embeddings(), model.config
    if rows[-1] >= embeddings.num_embeddings:
        found = Found(f"{embeddings.num_embeddings} embeddings")
        raise DataError(field="vocab_size", found=found, expected=f"one for each token, {int(rows[-1]) + 1} or more")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        special = getattr(config, name)
        if special >= len(kept) or kept[special] != special:
            raise DataError(field=name, found=special, expected="the special tokens in front, as XLM-R has them")
    model.set_input_embeddings(
        nn.Embedding.from_pretrained(
            embeddings.weight[rows].clone(), freeze=False, padding_idx=embeddings.padding_idx
        )
    )
    decoder = model.get_output_embeddings()
    if decoder is not None:
        decoder.weight = nn.Parameter(decoder.weight[rows].clone())
        decoder.bias = nn.Parameter(decoder.bias[rows].clone())
        decoder.out_features = len(kept)
        if hasattr(model.lm_head, "bias"):  # XLM-R's head and decoder share one
            model.lm_head.bias = decoder.bias
    config.vocab_size = len(kept)
    model.tie_weights()


def load_model(name_or_path: str):
    """A model of any of `MODEL_CLASSES`, in the precision it was saved in."""
    config = AutoConfig.from_pretrained(name_or_path)
    architecture = (config.architectures or [config.model_type])[0]
    if architecture not in MODEL_CLASSES:
        raise DataError(
            file=name_or_path, field="architectures", found=architecture, expected=f"one of {', '.join(MODEL_CLASSES)}"
        )
    model = MODEL_CLASSES[architecture].from_pretrained(name_or_path, dtype="auto")
    if architecture == "XLMRobertaForMaskedLM":
        # This class leaves out the pooler of its checkpoint, and UC2 starts from that pooler.
        model.roberta = XLMRobertaModel.from_pretrained(name_or_path, dtype="auto")
        model.tie_weights()
    return model


def trim_folder(
    name_or_path: str, texts: Iterable[str], output_dir: str | Path, *, languages: Sequence[str] = ()
) -> KeptTokens:
    """Writes a trimmed copy of a UC2 or XLM-R folder, whole or not at all.

    Args:
        texts: everything whose sub-words are to be kept, besides the object labels of the folder's processor.
        languages: of the labels to keep; all, for none named.

    Raises:
        DataError: see `tokens_to_keep` and `trim_model`.
        FileExistsError: `output_dir` exists and is not empty.
    """
    with atomic_directory(output_dir) as folder:
        model = load_model(name_or_path)
        if model.config.model_type == "xlm-roberta":
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            kept = tokens_to_keep(tokenizer, texts)
            trim_tokenizer(tokenizer, kept.ids).save_pretrained(folder)
        else:
            processor = UC2Processor.from_pretrained(name_or_path)
            labels = labels_in(processor.object_labels or {}, languages)
            kept = tokens_to_keep(processor.tokenizer, chain(texts, *labels.values()))
            processor.tokenizer = trim_tokenizer(processor.tokenizer, kept.ids)
            processor.object_labels = labels or None
            processor.save_pretrained(folder)
        trim_model(model, kept.ids)
        model.save_pretrained(folder)
    return kept


def labels_in(object_labels: Mapping[str, list[str]], languages: Sequence[str]) -> dict[str, list[str]]:
    return {code: names for code, names in object_labels.items() if not languages or code in languages}


@dataclass
class TrimmingArguments:
    """Drop the sub-words that a corpus never uses from a UC2 or XLM-R folder."""

    model: str = field(metadata={"help": "UC2 or XLM-R folder, or Hub id"})
    output_dir: str = field(metadata={"help": "folder to write, new or empty"})
    captions: list[str] = field(
        default_factory=list, metadata={"help": "rows of captions, parallel captions or questions"}
    )
    texts: list[str] = field(
        default_factory=list, metadata={"help": "further UTF-8 texts, all kept: the language you expect later"}
    )
    keep_languages: list[str] = field(
        default_factory=list, metadata={"help": "languages of the rows and labels to keep. Default: all"}
    )
    object_labels: str | None = field(
        default=None, metadata={"help": "object labels to keep as well; those of the folder's processor always are"}
    )


def main(argv: list[str] | None = None) -> KeptTokens:
    (arguments,) = parse([TrimmingArguments], sys.argv[1:] if argv is None else argv)
    languages = arguments.keep_languages
    with told_in_one_sentence():
        labels = load_object_labels(arguments.object_labels) if arguments.object_labels else {}
        texts = chain(
            corpus_texts(arguments.captions, languages),
            plain_texts(arguments.texts),
            *labels_in(labels, languages).values(),
        )
        try:
            kept = trim_folder(arguments.model, texts, arguments.output_dir, languages=languages)
        except FileExistsError as error:
            raise SystemExit(f"error: {error}") from error
    for rule, count in kept.counts.items():
        print(f"{count:9,}  {rule}")
    print(f"{len(kept.ids):9,}  of {kept.size:,} sub-words kept; wrote {arguments.output_dir}")
    return kept


if __name__ == "__main__":
    main()
