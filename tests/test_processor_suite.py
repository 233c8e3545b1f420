"""What transformers' own processor suite asks of every processor.

The suite itself (`ProcessorTesterMixin`) is not in the released wheel; these are the same contracts, condensed, for a
processor whose parts are a tokenizer and, attached, a detector. Saving, loading and decoding: `test_processing.py`.
"""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.testing_utils import check_json_file_has_correct_format

from processing_uc2 import UC2Processor

TEXTS = ["a ball near a tree", "ein Haus neben einem Fisch", "家の近くの魚"]
OPTIONS = {"max_regions": 7, "min_regions": 3, "region_threshold": 0.3, "feature_size": 5}
REGIONS = {"features": np.ones((4, 5)), "boxes": np.tile(np.array([0, 0, 0.5, 0.5]), (4, 1))}


@pytest.fixture
def processor(tiny_corpus) -> UC2Processor:
    return UC2Processor(AutoTokenizer.from_pretrained(tiny_corpus.tokenizer), {"en": ["ball"]}, **OPTIONS)


@pytest.fixture
def saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    return tmp_path


# What it is made of


def test_parts_are_found_by_their_names():
    assert UC2Processor.get_attributes() == ["tokenizer"]


def test_a_wrong_part_is_refused(processor):
    with pytest.raises((TypeError, ValueError)):
        UC2Processor(tokenizer=processor)


def test_keyword_arguments_are_typed():
    (kwargs,) = (
        parameter
        for parameter in inspect.signature(UC2Processor.__call__).parameters.values()
        if parameter.kind == parameter.VAR_KEYWORD
    )
    assert kwargs.annotation == Unpack[ProcessingKwargs]


# Saving and loading


def test_json_holds_every_option(processor, tmp_path):
    (file, *_) = processor.save_pretrained(tmp_path)
    check_json_file_has_correct_format(file)
    values = json.loads(processor.to_json_string())
    for name, value in OPTIONS.items():
        assert values[name] == value == getattr(processor, name)
    assert values["processor_class"] == "UC2Processor"


def test_a_loaded_processor_is_the_saved_one(processor, saved):
    loaded = UC2Processor.from_pretrained(saved)
    assert loaded.to_dict() == processor.to_dict()
    assert type(loaded.tokenizer) is type(processor.tokenizer)
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert repr(loaded).partition("\n")[0] == repr(processor).partition("\n")[0]
    loaded.save_pretrained(saved / "again")
    assert UC2Processor.from_pretrained(saved / "again").to_dict() == processor.to_dict()


def test_loaded_parts_make_the_loaded_processor(saved):
    parts = {"tokenizer": AutoTokenizer.from_pretrained(saved)}
    built = UC2Processor(**parts, object_labels={"en": ["ball"]}, **OPTIONS)
    assert built.to_dict() == UC2Processor.from_pretrained(saved).to_dict()


def test_options_of_the_tokenizer_go_through(processor, saved):
    tokens = {"bos_token": "(BOS)", "cls_token": "(CLS)", "sep_token": "(SEP)"}
    expected = AutoTokenizer.from_pretrained(saved, **tokens)
    loaded = UC2Processor.from_pretrained(saved, **tokens, max_regions=9)
    assert loaded.tokenizer.get_vocab() == expected.get_vocab() != processor.tokenizer.get_vocab()
    assert {name: getattr(loaded.tokenizer, name) for name in tokens} == tokens and loaded.max_regions == 9


def test_parts_may_be_given_when_loading(processor, saved):
    tokenizer = copy.deepcopy(processor.tokenizer)
    assert UC2Processor.from_pretrained(saved, tokenizer=tokenizer).tokenizer is tokenizer


@pytest.mark.parametrize("again", [copy.deepcopy, lambda processor: pickle.loads(pickle.dumps(processor))])
def test_copies_are_equal(processor, again):
    """Data loader workers get one, by fork or by pickle."""
    copied = again(processor)
    assert copied.to_dict() == processor.to_dict() and copied.object_labels == processor.object_labels
    assert copied(TEXTS)["input_ids"] == processor(TEXTS)["input_ids"]


def test_chat_templates_are_saved_beside(processor, tmp_path):
    processor.chat_template = "test template"
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "test template"
    assert "test template" not in (tmp_path / "processor_config.json").read_text()
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == loaded.tokenizer.chat_template == "test template"


def test_several_chat_templates(processor, tmp_path):
    processor.chat_template = {"default": "one", "other": "two"}
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "one"
    assert (tmp_path / "additional_chat_templates" / "other.jinja").read_text() == "two"
    assert UC2Processor.from_pretrained(tmp_path).chat_template == processor.chat_template


# Calls


@pytest.mark.parametrize("texts", [TEXTS[0], TEXTS])
@pytest.mark.parametrize("options", [{}, {"padding": "longest", "return_tensors": "np"}, {"return_tensors": "pt"}])
def test_texts_are_encoded_as_the_tokenizer_does(processor, texts, options):
    found = processor(text=texts, **options)
    expected = processor.tokenizer([texts] if isinstance(texts, str) else texts, **{"padding": True, **options})
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert type(found[name]) is type(values) and np.array_equal(found[name], values)


def test_input_names(processor):
    """Without regions, the tokenizer's; those of the regions come behind."""
    text = processor(TEXTS[0])
    assert processor.model_input_names == list(text)
    both = processor(TEXTS[0], regions=REGIONS)
    assert list(both) == [*text, "region_features", "region_boxes", "region_attention_mask"]
    assert processor(text=TEXTS[0], regions=REGIONS).keys() == both.keys()


def test_nothing_is_no_input(processor):
    for arguments in ({}, {"text": None}, {"return_tensors": "pt"}):
        with pytest.raises(ValueError, match="nothing to encode"):
            processor(**arguments)


def test_defaults_of_the_tokenizer_are_kept(tiny_corpus):
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus.tokenizer, max_length=37, padding="max_length")
    assert UC2Processor(tokenizer)(TEXTS[0], return_tensors="pt")["input_ids"].shape == (1, 37)


def test_a_call_overrides_the_tokenizers_defaults(tiny_corpus):
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus.tokenizer, max_length=17, padding="longest")
    inputs = UC2Processor(tokenizer)(TEXTS[0], return_tensors="pt", max_length=21, padding="max_length")
    assert inputs["input_ids"].shape == (1, 21)


def test_options_may_be_nested(processor):
    """As `text_kwargs` and `common_kwargs`, with the same meaning as flat ones."""
    flat = {"padding": "max_length", "max_length": 29, "return_tensors": "pt"}
    nested = {
        "text_kwargs": {"padding": "max_length", "max_length": 29},
        "common_kwargs": {"return_tensors": "pt"},
    }
    expected, found = (processor(TEXTS[0], regions=REGIONS, **options) for options in (flat, nested))
    assert found["input_ids"].shape == (1, 29)
    for name in expected:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("padding", ["max_length", "do_not_pad"])
def test_an_option_given_twice_is_refused(processor, padding):
    with pytest.raises(ValueError, match="padding"):
        processor(TEXTS[0], padding="max_length", text_kwargs={"padding": padding})


def test_a_call_leaves_no_trace(processor):
    """The next call, and the file, are as if it had not been."""
    before, expected = processor.to_dict(), processor(TEXTS)["input_ids"]
    processor(TEXTS, truncation=True, max_length=5, padding="max_length", max_regions=1, regions=[REGIONS] * 3)
    assert processor.to_dict() == before and processor(TEXTS)["input_ids"] == expected


def test_texts_are_decoded_as_the_tokenizer_does(processor):
    ids = processor(TEXTS, padding=False)["input_ids"]
    for options in ({}, {"skip_special_tokens": True}):
        assert processor.batch_decode(ids, **options) == processor.tokenizer.batch_decode(ids, **options)
        assert processor.decode(ids[0], **options) == processor.tokenizer.decode(ids[0], **options)
