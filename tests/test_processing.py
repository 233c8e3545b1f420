"""UC2Processor: layouts by hand, selection by hand, one clear error per bad input, saving and loading."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoProcessor, XLMRobertaTokenizer

from processing_uc2 import UC2Processor
from uc2.region_store import RegionRow

F = 6
SENTENCES = ["ein Hund am Strand", "a dog on the beach", "犬が浜辺にいる", "un chien sur la plage"]
LABELS = {"en": ["dog", "beach"], "de": ["Hund", "Strand"], "ja": ["犬", "浜辺"]}


def make_tokenizer():
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>")
    unigram.train_from_iterator(SENTENCES * 3, trainer)
    vocabulary = json.loads(unigram.to_str())["model"]["vocab"]
    return XLMRobertaTokenizer(vocab=[tuple(piece) for piece in vocabulary] + [("<mask>", 0.0)])


@pytest.fixture
def processor():
    return UC2Processor(make_tokenizer(), object_labels=LABELS, max_regions=8, min_regions=2, feature_size=F)


def region(n=3, **changes):
    """n regions in an image of 40 x 20 pixels; box i is (i, i, 20, 10)."""
    boxes = np.array([[i, i, 20, 10] for i in range(n)], dtype=np.float32)
    features = np.arange(n * F, dtype=np.float16).reshape(n, F)
    item = {"features": features, "boxes": boxes, "image_height": 20, "image_width": 40}
    return {name: value for name, value in {**item, **changes}.items() if value is not None}


# Text


def test_single_text_is_a_batch_of_one(processor):
    inputs = processor("ein Hund", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    ids = processor.tokenizer("ein Hund", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"].tolist() == [[0, *ids, 2]]


def test_texts_are_padded_and_cut_as_the_tokenizer_does(processor):
    options = {"padding": "max_length", "max_length": 7, "truncation": True, "return_tensors": "pt"}
    ours, theirs = processor(SENTENCES, **options), processor.tokenizer(SENTENCES, **options)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert processor(SENTENCES, return_tensors="np")["input_ids"].ndim == 2  # padded by default
    lengths = {len(ids) for ids in processor(SENTENCES, padding=False)["input_ids"]}
    assert len(lengths) > 1


def test_join_pair(processor):
    ids, positions = processor.join_pair([7, 8], [9])
    assert ids.tolist() == [0, 7, 8, 2, 0, 9, 2]
    assert positions.tolist() == [2, 3, 4, 5, 2, 3, 4]


def test_text_pair_has_the_vtlm_layout(processor):
    """`<s> a </s><s> b </s>`, positions restarted, padding at position pad."""
    first, second = ["ein Hund", "Hund"], ["a dog on the beach", "dog"]
    inputs = processor(first, text_pair=second, return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        ids_a, ids_b = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (a, b))
        expected = [0, *ids_a, 2, 0, *ids_b, 2]
        padding = [1] * (width - len(expected))
        assert inputs["input_ids"][row].tolist() == expected + padding
        positions = [*range(2, 4 + len(ids_a)), *range(2, 4 + len(ids_b))]
        assert inputs["position_ids"][row].tolist() == positions + padding
        assert inputs["attention_mask"][row].sum() == len(expected)


def test_text_pair_is_cut_to_max_length(processor):
    inputs = processor(
        SENTENCES[:2], text_pair=SENTENCES[2:], truncation=True, max_length=9, return_tensors="pt"
    )
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (2, 9)
    assert (inputs["input_ids"] == 0).sum(dim=1).tolist() == [2, 2]
    assert (inputs["input_ids"] == 2).sum(dim=1).tolist() == [2, 2]


def test_text_pair_padded_on_the_left(processor):
    processor.tokenizer.padding_side = "left"
    inputs = processor(["ein Hund", "Hund"], text_pair=["a dog on the beach", "dog"], return_tensors="pt")
    last = inputs["attention_mask"][1].bool()
    assert not last[0] and (inputs["position_ids"][1][~last] == 1).all()
    assert inputs["input_ids"][1][last][0] == 0


# Regions


def test_regions_are_padded_and_normalised(processor):
    inputs = processor(["Hund", "dog"], regions=[region(2), region(4)], return_tensors="pt")
    assert inputs["region_features"].shape == (2, 4, F)
    assert inputs["region_features"].dtype == inputs["region_boxes"].dtype == torch.float32
    assert inputs["region_attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert inputs["region_boxes"][0].tolist() == pytest.approx(
        np.array([[0, 0, 0.5, 0.5], [1 / 40, 1 / 20, 0.5, 0.5], [0] * 4, [0] * 4])
    )
    assert inputs["region_features"][0, 2:].abs().sum() == 0
    assert inputs["region_features"][1].numpy() == pytest.approx(region(4)["features"])


def test_regions_only_and_single_example(processor):
    inputs = processor(regions=region(3), return_tensors="pt")
    assert set(inputs) == {"region_features", "region_boxes", "region_attention_mask"}
    assert inputs["region_boxes"].shape == (1, 3, 4)


def test_without_padding_regions_are_lists(processor):
    inputs = processor(regions=[region(2), region(3)], padding=False)
    assert [len(boxes) for boxes in inputs["region_boxes"]] == [2, 3]
    assert inputs["region_attention_mask"] == [[1, 1], [1, 1, 1]]


def as_row(item):
    rest = {"class_ids": np.zeros(3, np.int64), "class_scores": np.array([0.9, 0.8, 0.7], np.float32)}
    return RegionRow(image_id="1", **item, **rest)


@pytest.mark.parametrize(
    "change",
    [
        lambda item: item,
        as_row,
        lambda item: {"features": item["features"], "boxes": item["boxes"] / [40, 20, 40, 20]},
        lambda item: {"features": item["features"], "normalized_boxes": item["boxes"] / [40, 20, 40, 20]},
        lambda item: {**item, "boxes": item["boxes"] / [40, 20, 40, 20]},
        lambda item: {name: torch.tensor(value) for name, value in item.items()},
        lambda item: {name: np.asarray(value).tolist() for name, value in item.items()},
    ],
    ids=["pixels", "store row", "shares", "normalized_boxes", "shares with image size", "tensors", "lists"],
)
def test_every_form_of_a_region_item_gives_the_same(processor, change):
    expected = processor(regions=region(3), return_tensors="pt")
    found = processor(regions=change(region(3)), return_tensors="pt")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    ("scores", "limits", "expected"),
    [
        ([0.9, 0.5, 0.3, 0.1], {}, [0, 1, 2]),  # above 0.2
        ([0.9, 0.1, 0.1, 0.1], {}, [0, 1]),  # at least 2
        ([0.9, 0.8, 0.7, 0.6], {"max_regions": 3}, [0, 1, 2]),  # at most 3
        ([0.1, 0.9, 0.3, 0.2], {}, [1, 2]),  # by falling score; 0.2 is not above 0.2
        ([0.1, 0.2, 0.3, 0.4], {"region_threshold": None, "max_regions": 3}, [0, 1, 2]),  # the first ones
        ([0.9], {"min_regions": 5}, [0]),  # at most as many as there are
        ([0.9, 0.8, 0.7], {"min_regions": 5, "max_regions": 1}, [0]),  # the maximum wins
    ],
)
def test_select_regions(processor, scores, limits, expected):
    assert processor.select_regions(scores, **limits).tolist() == expected


def test_selection_applies_to_features_and_boxes(processor):
    scores = [0.1, 0.9, 0.3]
    encoded = processor.encode_regions(region(3, class_scores=scores))
    assert encoded["region_features"].dtype == np.float16
    assert encoded["region_features"][:, 0].tolist() == [F, 2 * F]
    assert encoded["region_boxes"][:, 0].tolist() == pytest.approx([1 / 40, 2 / 40])
    called = processor(regions=region(3, class_scores=scores), max_regions=1, return_tensors="pt")
    assert called["region_features"][0, :, 0].tolist() == [F]
    assert processor(regions=region(9), return_tensors="pt")["region_boxes"].shape == (1, 8, 4)


def test_rounding_at_the_edge_is_cut_off(processor):
    boxes = np.array([[0, 0, np.nextafter(np.float32(40), np.float32(50)), 20]])
    assert processor.encode_regions(region(1, boxes=boxes))["region_boxes"].max() == 1


NAN = np.full((3, F), np.nan)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            region(3, features=np.ones((3, 5))),
            r"features have shape \(3, 5\), expected \(number of regions, 6\)",
        ),
        (region(3, features=np.ones(6)), "features have shape"),
        (region(3, features=NAN), r"features of region 0 are not finite"),
        (region(3, features=None), "no 'features'"),
        (region(3, features=[["a"] * F] * 3), "expected numbers"),
        (region(3, boxes=None), "neither 'boxes' nor 'normalized_boxes'"),
        (region(3, boxes=np.ones((2, 4))), r"boxes have shape \(2, 4\), expected \(3, 4\)"),
        (region(1, boxes=[[0, 0, 41, 10]]), r"box 0 lies outside the image: \[0.0, 0.0, 1.025, 0.5\]"),
        (region(1, boxes=[[-1, 0, 4, 10]]), "box 0 lies outside the image"),
        (region(1, boxes=[[20, 0, 4, 10]]), "expected x1 <= x2"),
        (region(1, boxes=[[0, 0, np.inf, 10]]), "boxes of region 0 are not finite"),
        (region(2, image_height=None, image_width=None), "pixels need 'image_height' and 'image_width'"),
        (region(2, image_height=None), "only one of"),
        (region(2, image_height=0), "expected a positive size"),
        (region(0), "holds no regions"),
        (region(3, class_scores=[0.5]), r"class_scores have shape \(1,\)"),
        (region(2, class_scores=[0.5, np.nan]), "class_scores of region 1 are not finite"),
    ],
)
def test_bad_regions_give_one_sentence_with_the_example(processor, item, message):
    with pytest.raises(ValueError, match=rf"regions\[1\]: .*{message}"):
        processor(regions=[region(3), item])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to encode"),
        ({"text": []}, "text is an empty list"),
        ({"text": ["a", 3]}, r"text\[1\] is 3, expected a string"),
        (
            {"text": ["a", "b"], "regions": [region()]},
            "numbers of examples differ: {'text': 2, 'regions': 1}",
        ),
        ({"text": ["a"], "text_pair": [None]}, r"text_pair\[0\] is None, expected a string"),
        ({"text": ["a"], "text_pair": ["a", "b"]}, "numbers of examples differ"),
        ({"text_pair": ["a"], "regions": region()}, "text_pair needs text"),
        ({"text": "a", "text_pair": "b", "add_special_tokens": False}, "text_pair needs the special tokens"),
    ],
)
def test_bad_calls_give_one_sentence(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_regions", 0),
        ("min_regions", -1),
        ("region_threshold", 2),
        ("feature_size", 0),
        ("object_labels", {"en": ["a"], "de": []}),
        ("object_labels", ["a"]),
    ],
)
def test_bad_options_fail_at_construction(option, value):
    with pytest.raises(ValueError, match=option):
        UC2Processor(make_tokenizer(), **{option: value})


# Saving and loading


def test_decode_and_input_names(processor):
    ids = processor(SENTENCES[0])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == [SENTENCES[0]]
    assert processor.decode(ids[0], skip_special_tokens=True) == SENTENCES[0]
    assert processor.model_input_names == list(processor(SENTENCES[0]))


@pytest.mark.parametrize("loader", [UC2Processor, AutoProcessor])
def test_save_and_load(processor, tmp_path, loader):
    processor(SENTENCES[0], truncation=True, max_length=4, padding="max_length")  # must leave no trace
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "object_labels.json").read_text(encoding="utf-8")) == LABELS
    assert "浜辺" not in (tmp_path / "processor_config.json").read_text(encoding="utf-8")
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is UC2Processor
    assert loaded.object_labels == LABELS
    assert loaded.to_dict() == processor.to_dict()
    assert loaded(SENTENCES, regions=[region()] * 4)["input_ids"] == processor(SENTENCES)["input_ids"]


def test_options_at_loading(processor, tmp_path):
    processor.save_pretrained(tmp_path / "first")
    loaded = UC2Processor.from_pretrained(tmp_path / "first", max_regions=5, object_labels=None)
    assert (loaded.max_regions, loaded.object_labels) == (5, None)
    loaded.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "object_labels.json").exists()
    assert "max_regions" not in (tmp_path / "second" / "tokenizer_config.json").read_text()
    assert UC2Processor.from_pretrained(tmp_path / "second").max_regions == 5


def test_lost_object_labels_are_an_error(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "object_labels.json").unlink()
    with pytest.raises(OSError, match="object_labels.json"):
        UC2Processor.from_pretrained(tmp_path)
