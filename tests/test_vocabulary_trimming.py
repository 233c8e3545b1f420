"""Vocabulary trimming: texts of kept sub-words are cut as before, and every model computes the same on them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model
from processing_uc2 import UC2Processor
from uc2.data_error import DataError
from uc2.object_labels import LabelTokens
from uc2.rows import write_jsonl
from uc2.scene_captions import GRAMMARS, describe
from uc2.scenes import draw_splits
from uc2.vocabulary_trimming import main, script_of, tokens_to_keep, trim_folder, trim_model, trim_tokenizer

HIDDEN, FEATURES = 16, 12
LABELS = {"en": ["cake", "dog"], "de": ["Kuchen", "Hund"], "ja": ["ケーキ", "犬"]}
SPECIAL = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]


@pytest.fixture(scope="module")
def captions() -> list[dict[str, str]]:
    """Parallel captions of 200 scenes in six languages."""
    scenes = draw_splits({"train": 200}, seed=0)["train"]
    return [{code: describe(scene.description, code, i) for code in GRAMMARS} for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def tokenizer(captions) -> XLMRobertaTokenizer:
    """Made as XLM-R's was: SentencePiece with NFKC, ids moved for the special tokens, `<mask>` last."""
    model = io.BytesIO()
    texts = [text for row in captions for text in row.values()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *(name for names in LABELS.values() for name in names)]),
        model_writer=model, model_type="unigram", vocab_size=420, character_coverage=1.0,
        normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces if piece.type == piece.NORMAL]
    return XLMRobertaTokenizer(
        vocab=[*SPECIAL, *pieces, ("<mask>", 0.0)],
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def texts_in(captions, *languages) -> list[str]:
    return [row[code] for row in captions for code in languages]


# --- the tokenizer ---

ALPHABET = "abc"
PIECES = st.dictionaries(
    st.text(ALPHABET + "▁", min_size=1, max_size=4), st.integers(-40, -1), min_size=3, max_size=25
)
TEXTS = st.lists(st.text(ALPHABET + "d ", min_size=1, max_size=12), min_size=1, max_size=4)
# `ab c d` costs 33; `<unk> bcd` costs 50 + 5, an unknown character being 10 below the lowest score, that of "cc".
UNKNOWN_COMPETES = {"▁": 0, "ab": -11, "c": -11, "d": -11, "bcd": -5, "cc": -40}


def unigram(pieces: dict[str, float]) -> XLMRobertaTokenizer:
    scored = [(piece, float(score)) for piece, score in pieces.items()]
    return XLMRobertaTokenizer(vocab=[*SPECIAL, *scored, ("<mask>", 0.0)])


@settings(max_examples=150, deadline=None)
@example(pieces=UNKNOWN_COMPETES, corpus=["abcd bcd"], others=[])
@given(pieces=PIECES, corpus=TEXTS, others=TEXTS)
def test_texts_of_kept_pieces_are_cut_as_before(pieces, corpus, others):
    """Vocabularies with gaps among the characters, and whole scores, so that ties occur."""
    full = unigram(pieces)
    if not any(full(corpus, add_special_tokens=False)["input_ids"]):
        return
    kept = tokens_to_keep(full, corpus).ids
    trimmed = trim_tokenizer(full, kept)
    for text in corpus + others:
        before, after = full(text)["input_ids"], trimmed(text)["input_ids"]
        if set(before) <= set(kept.tolist()):
            assert [kept[i] for i in after] == before
    assert set(np.concatenate(full(corpus)["input_ids"])) <= set(kept.tolist())


def test_without_the_lowest_score_an_unknown_character_would_win():
    full = unigram(UNKNOWN_COMPETES)
    assert full.tokenize("abcd") == ["▁", "ab", "c", "d"]
    kept = tokens_to_keep(full, ["abcd bcd"]).ids
    assert trim_tokenizer(full, kept).tokenize("abcd") == ["▁", "ab", "c", "d"]
    without = kept[kept != full.convert_tokens_to_ids("cc")]
    assert len(without) < len(kept)
    assert trim_tokenizer(full, without).tokenize("abcd") == ["▁", "a", "bcd"]  # 11 + 10 and 5


def test_special_tokens_and_normalisation_stay(tokenizer, captions):
    kept = tokens_to_keep(tokenizer, texts_in(captions, "en", "de")).ids
    trimmed = trim_tokenizer(tokenizer, kept)
    assert [trimmed.convert_tokens_to_ids(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert trimmed.mask_token_id == len(trimmed) - 1 == len(kept) - 1
    assert trimmed.convert_ids_to_tokens(range(len(kept))) == tokenizer.convert_ids_to_tokens(kept.tolist())
    texts = [("A ｂａｌｌ \u2003 and ﬁsh", None), ("a <mask> ball", None), ("a ball", "ein Ball"), ("", None)]
    for text, pair in texts:
        before, after = tokenizer(text, pair), trimmed(text, pair)
        assert [int(kept[i]) for i in after["input_ids"]] == before["input_ids"]
        assert tokenizer.decode(before["input_ids"]) == trimmed.decode(after["input_ids"])


def test_all_captions_in_kept_languages_are_cut_as_before(tokenizer, captions):
    kept = tokens_to_keep(tokenizer, texts_in(captions[:60], "en", "de")).ids
    trimmed = trim_tokenizer(tokenizer, kept)
    same = 0
    for text in texts_in(captions[60:], "en", "de", "fr"):
        before, after = tokenizer(text)["input_ids"], trimmed(text)["input_ids"]
        assert 3 not in after  # new words are spelled
        if set(before) <= set(kept.tolist()):
            assert [int(kept[i]) for i in after] == before
            same += 1
    assert 280 <= same < 420  # the other languages' words are cut anew
    assert len(kept) < 0.6 * len(tokenizer)
    assert 3 in trimmed("赤い魚")["input_ids"] and 3 not in tokenizer("赤い魚")["input_ids"]


def test_scripts():
    expected = {"a": "LATIN", "ř": "LATIN", "и": "CYRILLIC", "犬": "CJK", "ボ": "KATAKANA", "の": "HIRAGANA"}
    assert {char: script_of(char) for char in expected} == expected
    assert {script_of(char) for char in "7▁,。€"} == {None}


# --- models ---


def sizes(tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 66,
        "initializer_range": 0.3,
    }


def save_uc2(model_class, tokenizer, folder: Path) -> None:
    torch.manual_seed(0)
    model = model_class(UC2Config(**sizes(tokenizer), region_feature_size=FEATURES, num_labels=5))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at zero, where a wrong order would not show
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    UC2Processor(tokenizer, object_labels=LABELS, feature_size=FEATURES).save_pretrained(folder)


def outputs_of(model_class, folder: Path, texts: list[str]):
    rng = np.random.default_rng(0)
    regions = [
        {"features": rng.normal(size=(n, FEATURES)), "boxes": np.tile([0.1, 0.2, 0.6, 0.7], (n, 1))}
        for n in range(1, len(texts) + 1)
    ]
    inputs = UC2Processor.from_pretrained(folder)(text=texts, regions=regions, return_tensors="pt")
    with torch.no_grad():
        return model_class.from_pretrained(folder).eval()(**inputs, output_hidden_states=True)


@pytest.mark.parametrize("model_class", [UC2Model, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA])
def test_models_compute_the_same(model_class, tokenizer, captions, tmp_path):
    texts = texts_in(captions, "en", "de")
    save_uc2(model_class, tokenizer, tmp_path / "full")
    kept = trim_folder(str(tmp_path / "full"), texts, tmp_path / "trimmed", languages=["en", "de"])
    full, trimmed = (outputs_of(model_class, tmp_path / name, texts[:4]) for name in ("full", "trimmed"))
    assert set(full) == set(trimmed)
    for before, after in zip(full.hidden_states, trimmed.hidden_states, strict=True):
        assert torch.equal(before, after)
    for name in set(full) - {"hidden_states"}:
        before = full[name][..., kept.ids] if name == "prediction_logits" else full[name]
        # A product with fewer columns may be summed in another order.
        tolerance = 1e-6 if name == "prediction_logits" else 0
        torch.testing.assert_close(trimmed[name], before, atol=tolerance, rtol=tolerance)
    weights = [model_class.from_pretrained(tmp_path / name).num_parameters() for name in ("full", "trimmed")]
    per_token = HIDDEN + (model_class is UC2ForPreTraining)  # the embedding, and the LM head's bias
    assert weights[0] - weights[1] == (len(tokenizer) - len(kept.ids)) * per_token


def test_trimmed_folder_is_whole(tokenizer, captions, tmp_path):
    save_uc2(UC2ForPreTraining, tokenizer, tmp_path / "full")
    kept = trim_folder(str(tmp_path / "full"), texts_in(captions, "en"), tmp_path / "out", languages=["en", "ja"])
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("full", "out")]
    assert names[0] == names[1]
    assert AutoModel.from_pretrained(tmp_path / "out").config.vocab_size == len(kept.ids) == sum(kept.counts.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.object_labels == {code: LABELS[code] for code in ("en", "ja")}
    before, after = LabelTokens(LABELS, tokenizer), LabelTokens(processor.object_labels, processor.tokenizer)
    for code in ("en", "ja"):
        for class_id in range(2):
            assert kept.ids[after.ids(class_id, code)].tolist() == before.ids(class_id, code).tolist()


def test_a_text_encoder_gives_the_same_uc2(tokenizer, captions, tmp_path):
    """XLM-R's own folder holds the LM head and the pooler, which no single class of transformers has."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(**sizes(tokenizer), type_vocab_size=1)
    model = XLMRobertaForMaskedLM(config)
    model.roberta = XLMRobertaModel(config)
    model.tie_weights()
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    texts = texts_in(captions, "en", "de")
    kept = trim_folder(str(tmp_path / "full"), texts, tmp_path / "trimmed")
    results = []
    for name in ("full", "trimmed"):
        torch.manual_seed(0)
        uc2 = UC2ForPreTraining.from_text_encoder(tmp_path / name, region_feature_size=FEATURES).eval()
        inputs = AutoTokenizer.from_pretrained(tmp_path / name)(texts[:4], padding=True, return_tensors="pt")
        with torch.no_grad():
            encoded = uc2.uc2(**inputs)
            results.append((encoded.last_hidden_state, encoded.pooler_output, uc2(**inputs).prediction_logits))
    (hidden, pooled, logits), (*same, trimmed_logits) = results
    assert torch.equal(hidden, same[0]) and torch.equal(pooled, same[1])
    torch.testing.assert_close(trimmed_logits, logits[..., kept.ids], atol=1e-6, rtol=1e-6)


def test_trimming_trains_on(tokenizer, captions):
    """The head stays tied to the embeddings, and padding stays without gradient."""
    model = UC2ForPreTraining(UC2Config(**sizes(tokenizer), region_feature_size=FEATURES))
    kept = tokens_to_keep(tokenizer, texts_in(captions, "en")).ids
    trim_model(model, kept)
    assert model.lm_head.decoder.weight is model.uc2.embeddings.word_embeddings.weight
    ids = torch.tensor([[0, 5, 6, 2, 1]])
    hidden = model.uc2(input_ids=ids, attention_mask=ids.ne(1).long()).last_hidden_state
    hidden.sum().backward()
    assert model.uc2.embeddings.word_embeddings.weight.grad[1].abs().sum() == 0


# --- the command ---


def test_command_reads_every_kind_of_row(tokenizer, captions, tmp_path, capsys):
    save_uc2(UC2ForRetrieval, tokenizer, tmp_path / "full")
    rows = [{"image_id": str(i), "captions": row} for i, row in enumerate(captions[:50])]
    write_jsonl(rows, tmp_path / "parallel.jsonl")
    rows = [{"image_id": str(i), "language": "fr", "caption": row["fr"]} for i, row in enumerate(captions[50:90])]
    write_jsonl(rows, tmp_path / "captions.jsonl")
    rows = [
        {"question_id": i, "image_id": str(i), "language": code, "question": row[code]}
        for i, row in enumerate(captions[90:])
        for code in ["en" if i % 2 else "cs"]
    ]
    write_jsonl(rows, tmp_path / "questions.jsonl")
    (tmp_path / "more.txt").write_text("\n".join(texts_in(captions, "zh")), encoding="utf-8")
    (tmp_path / "labels.json").write_text(json.dumps({"de": ["Hund"], "fr": ["gâteau"]}), encoding="utf-8")
    files = [tmp_path / f"{name}.jsonl" for name in ("parallel", "captions", "questions")]
    words = ["--model", tmp_path / "full", "--output_dir", tmp_path / "out", "--keep_languages", "en", "fr"]
    words += ["--captions", *files, "--texts", tmp_path / "more.txt", "--object_labels", tmp_path / "labels.json"]
    kept = main([str(word) for word in words])
    texts = [
        *texts_in(captions[:50], "en", "fr"), *texts_in(captions[50:90], "fr"), *texts_in(captions[91::2], "en"),
        *texts_in(captions, "zh"), "gâteau", *LABELS["en"],
    ]  # fmt: skip
    used = {i for ids in tokenizer(texts)["input_ids"] for i in ids}
    assert used <= set(kept.ids.tolist())
    assert kept.counts["sub-words of the texts"] == len(used - {0, 1, 2, 3})
    assert f"{len(kept.ids)}  of {len(tokenizer)} sub-words kept" in capsys.readouterr().out
    assert len(UC2Processor.from_pretrained(tmp_path / "out").tokenizer) == len(kept.ids)
    with pytest.raises(SystemExit, match="out exists already"):
        main([str(word) for word in words])
    words[words.index("fr")] = "xx"
    words[words.index(tmp_path / "out")] = tmp_path / "other"
    with pytest.raises(SystemExit, match="found cs, de, en, fr, ja, zh, expected captions or questions in 'xx'"):
        main([str(word) for word in words])
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_trimmed_is_refused(tokenizer, captions, tmp_path):
    with pytest.raises(DataError, match="found no text"):
        tokens_to_keep(tokenizer, [])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(DataError, match="found a WordLevel model, expected a Unigram"):
        tokens_to_keep(words, ["a"])
    small = {**sizes(tokenizer), "vocab_size": 50}
    kept = tokens_to_keep(tokenizer, texts_in(captions, "en")).ids
    with pytest.raises(DataError, match="found 50 embeddings, expected one for each token, 4"):
        trim_model(UC2Model(UC2Config(**small)), kept)
    with pytest.raises(DataError, match="pad_token_id.*found 1.*in front"):
        trim_model(UC2Model(UC2Config(**sizes(tokenizer))), kept[2:])
    save_uc2(UC2Model, tokenizer, tmp_path / "full")
    with pytest.raises(SystemExit, match="no-such-file"):
        main(["--model", str(tmp_path / "full"), "--output_dir", str(tmp_path / "out"), "--texts", "no-such-file"])
