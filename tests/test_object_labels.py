"""Object labels: every form they come in, and their sub-words."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uc2.data_error import DataError
from uc2.object_labels import LabelTokens, load_object_labels

SHARED = Path(__file__).resolve().parents[2] / "shared"

LABELS = {"en": ["dog", "red car", "hat"], "ja": ["犬", "赤い車", "帽子"]}
PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    "▁dog",
    "▁red",
    "▁car",
    "▁ha",
    "t",
    "犬",
    "赤い",
    "車",
    "▁帽子",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=3)
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>")


def fails(action, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        action()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_json_file_and_directory(tmp_path):
    file = tmp_path / "object_labels.json"
    file.write_text(json.dumps(LABELS), encoding="utf-8")
    assert load_object_labels(file) == LABELS
    assert load_object_labels(tmp_path) == LABELS


def test_text_files_with_synonyms_and_without_a_last_line_break(tmp_path):
    (tmp_path / "img_label_objects.txt").write_text("dog,puppy\nred car\nhat\n")
    (tmp_path / "img_label_objects_de.txt").write_text("Hund\nrotes Auto, Wagen\nHut")
    (tmp_path / "img_label_objects_ja.txt").write_text("犬、子犬\n赤い車\n帽子，キャップ", encoding="utf-8")
    (tmp_path / "README.txt").write_text("not a list")
    labels = load_object_labels(tmp_path)
    assert labels == {"en": LABELS["en"], "de": ["Hund", "rotes Auto", "Hut"], "ja": LABELS["ja"]}


def test_a_vocabulary_of_english_names(tmp_path):
    """As bottom-up attention has it: synonyms behind a comma."""
    (tmp_path / "objects_vocab.txt").write_text("yolk\nbathtub,tub\n")
    assert load_object_labels(tmp_path / "objects_vocab.txt") == {"en": ["yolk", "bathtub"]}
    with pytest.raises(DataError, match="none.txt"):
        load_object_labels(tmp_path / "none.txt")


def test_malformed_labels(tmp_path):
    file = tmp_path / "labels.json"
    for content, parts in (
        ({"en": ["dog"], "de": ["Hund", "Hut"]}, ["'de'", "2 classes", "1 as in 'en'"]),
        ({"en": ["dog", ""]}, ["'en[1]'"]),
        ({"en": ["dog", 3]}, ["'en[1]'", "found 3"]),
        ({"en": []}, ["'en'"]),
        ({}, ["at least one language"]),
        (["dog"], ["at least one language"]),
    ):
        file.write_text(json.dumps(content))
        fails(lambda: load_object_labels(file), str(file), *parts)
    file.write_text("{")
    fails(lambda: load_object_labels(file), str(file))
    fails(lambda: load_object_labels(tmp_path / "absent.json"), "absent.json")
    (tmp_path / "empty").mkdir()
    fails(lambda: load_object_labels(tmp_path / "empty"), "at least one language")
    (tmp_path / "empty" / "img_label_objects.txt").write_text("dog\n\nhat\n")
    fails(lambda: load_object_labels(tmp_path / "empty"), "img_label_objects.txt, row 2")


@pytest.mark.skipif(not SHARED.exists(), reason="the translated lists are not here")
def test_the_1600_classes_in_six_languages():
    labels = load_object_labels(SHARED / "data/coco_regions/object_labels")
    assert {language: len(names) for language, names in labels.items()} == dict.fromkeys(
        ("en", "cs", "de", "fr", "ja", "zh"), 1600
    )
    lists = (labels["en"], labels["de"], labels["zh"])
    assert [names[0] for names in lists] == ["yolk", "Eigelb", "蛋黄"]
    assert [names[-1] for names in lists] == ["buoy", "Boje", "浮标"]


def test_sub_words_of_labels(tokenizer):
    tokens = LabelTokens(LABELS, tokenizer)
    assert (tokens.languages, tokens.num_classes) == (("en", "ja"), 3)

    def pieces(class_id, language):
        return tokenizer.convert_ids_to_tokens(tokens.ids(class_id, language))

    assert [pieces(i, "en") for i in range(3)] == [["▁dog"], ["▁red", "▁car"], ["▁ha", "t"]]
    # The lone word start before a Japanese name is dropped.
    assert tokenizer.tokenize("犬") == ["▁", "犬"]
    assert [pieces(i, "ja") for i in range(3)] == [["犬"], ["赤い", "車"], ["▁帽子"]]
    assert tokens.ids(0, "ja").dtype == np.int64


def test_labels_that_are_not_there(tokenizer):
    tokens = LabelTokens(LABELS, tokenizer)
    with pytest.raises(KeyError, match="'fr'.*en, ja"):
        tokens.ids(0, "fr")
    for class_id in (-1, 3):
        with pytest.raises(IndexError, match="3 classes"):
            tokens.ids(class_id, "en")
    fails(lambda: LabelTokens({"en": ["▁"]}, tokenizer), "object_labels.en")
    fails(lambda: LabelTokens({"en": ["dog"], "ja": []}, tokenizer), "'ja'")
