"""UC2DataCollator: padding, masks and keys that only some examples have."""

import numpy as np
import pytest
import torch

from uc2.collator import UC2DataCollator


def example(num_tokens: int, num_regions: int, **more) -> dict:
    return {
        "input_ids": np.arange(10, 10 + num_tokens),
        "position_ids": np.arange(2, 2 + num_tokens),
        "labels": np.full(num_tokens, 7),
        "region_features": np.full((num_regions, 3), 0.5, np.float16),
        "region_boxes": np.full((num_regions, 4), 0.25, np.float32),
        "region_mask": np.ones(num_regions, bool),
        "region_labels": np.full(num_regions, 8),
        "itm_label": 1,
        "objective_id": 2,
        "language_id": 3,
    } | more


def test_a_ragged_batch_padded_by_hand():
    batch = UC2DataCollator(pad_token_id=1)([example(2, 3), example(4, 1)])
    expected = {
        "input_ids": [[10, 11, 1, 1], [10, 11, 12, 13]],
        "position_ids": [[2, 3, 1, 1], [2, 3, 4, 5]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[7, 7, -100, -100], [7, 7, 7, 7]],
        "region_attention_mask": [[1, 1, 1], [1, 0, 0]],
        "region_mask": [[True, True, True], [True, False, False]],
        "region_labels": [[8, 8, 8], [8, -100, -100]],
        "itm_labels": [1, 1],
        "objective_ids": [2, 2],
        "language_ids": [3, 3],
    }
    for name, values in expected.items():
        assert batch[name].tolist() == values, name
    assert batch["region_features"].shape == (2, 3, 3) and batch["region_features"].dtype == torch.float16
    assert batch["region_features"][1, 1:].eq(0).all() and batch["region_features"][0].eq(0.5).all()
    assert batch["region_boxes"].dtype == torch.float32
    assert set(batch) == {*expected, "region_features", "region_boxes"}


def test_keys_of_some_examples_are_filled_for_the_others():
    probs, targets = np.full((2, 5), 0.2, np.float16), np.ones((2, 3), np.float16)
    classes = np.array([4, -100])
    items = [
        example(3, 2, region_class_probs=probs),
        example(3, 4, region_class_labels=np.full(4, 1)),
        example(3, 2, region_feature_targets=targets, region_class_labels=classes),
    ]
    batch = UC2DataCollator()(items)
    assert batch["region_class_probs"].shape == (3, 4, 5) and batch["region_class_probs"][1:].eq(0).all()
    assert batch["region_class_labels"].tolist() == [[-100] * 4, [1] * 4, [4, -100, -100, -100]]
    assert batch["region_feature_targets"].sum() == 6


def test_text_without_regions_beside_and_without_others():
    mixed = UC2DataCollator()([example(3, 0), example(3, 2)])
    assert mixed["region_attention_mask"].tolist() == [[0, 0], [1, 1]]
    alone = UC2DataCollator()([example(3, 0), example(2, 0)])
    assert alone["region_features"].shape == (2, 0, 3) and alone["region_attention_mask"].shape == (2, 0)


def test_question_answering_targets_become_labels():
    items = [
        {"input_ids": np.arange(n), "answer_targets": np.array([0.0, 0.3, 1.0], np.float32)} for n in (2, 3)
    ]
    batch = UC2DataCollator()(items)
    assert batch["labels"].shape == (2, 3) and batch["labels"].dtype == torch.float32
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_options():
    collator = UC2DataCollator(pad_token_id=9, feature_dtype=torch.float32, pad_to_multiple_of=8)
    batch = collator([example(3, 9)])
    assert batch["input_ids"].shape == (1, 8) and batch["input_ids"][0, 3:].eq(9).all()
    assert batch["region_features"].shape == (1, 16, 3) and batch["region_features"].dtype == torch.float32


def test_read_only_features_of_a_mapped_store_are_copied():
    item = example(2, 2)
    item["region_features"].setflags(write=False)
    batch = UC2DataCollator()([item])
    batch["region_features"].zero_()
    assert item["region_features"].all()


def test_errors_name_the_key():
    with pytest.raises(ValueError, match="cannot pad colour; known keys: input_ids"):
        UC2DataCollator()([example(2, 2, colour=1)])
    with pytest.raises(ValueError, match=r"example 1: region_boxes has shape \(3, 4\), expected \(2, 4\)"):
        UC2DataCollator()([example(2, 2), example(2, 2, region_boxes=np.zeros((3, 4)))])
    with pytest.raises(ValueError, match=r"example 1: region_features has shape \(2, 5\)"):
        UC2DataCollator()([example(2, 2), example(2, 2, region_features=np.zeros((2, 5)))])
