"""VQADataset: encoded questions against the processor and `soft_targets`; the row checks."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from processing_uc2 import UC2Processor
from uc2.collator import UC2DataCollator
from uc2.region_store import RegionStore
from uc2.rows import DataError, write_jsonl
from uc2.sampling import EpochBatchSampler
from uc2.vqa import soft_targets
from uc2.vqa_data import VQADataset, load_questions_of

ANSWERS = [["red"] * 7 + ["blue"] * 3, ["Blue."], ["green"], ["two"] * 10]
LABEL2ID = {"red": 0, "blue": 1, "2": 2}


@pytest.fixture(scope="module")
def store(tiny_corpus):
    return RegionStore(tiny_corpus.regions)


@pytest.fixture(scope="module")
def processor(tiny_corpus):
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus.tokenizer)
    return UC2Processor(tokenizer, feature_size=12, min_regions=1, region_threshold=0.9, max_regions=3)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    questions = ["a ball", "a ball near a tree", "木の近くの家", "a house"]
    rows = [
        {
            "question_id": number,
            "image_id": f"image{number}",
            "language": "ja" if number == 2 else "en",
            "question": question,
            "answers": answers,
        }
        for number, (question, answers) in enumerate(zip(questions, ANSWERS, strict=True))
    ]
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_jsonl(rows, path)
    return str(path)


@pytest.fixture(scope="module")
def dataset(file, store, processor):
    return VQADataset(load_questions_of(file, store), store, processor, LABEL2ID, max_length=8)


def test_examples_are_what_the_processor_makes(dataset, store, processor):
    for row, answers in enumerate(ANSWERS):
        example = dataset[row + 3 * len(dataset)]  # the same in every epoch
        text, region = dataset.questions["question"][row], store[f"image{row}"]
        expected = processor(text=text, regions=region, return_tensors="np", truncation=True, max_length=8)
        np.testing.assert_array_equal(example["input_ids"], expected["input_ids"][0])
        np.testing.assert_allclose(example["region_features"], expected["region_features"][0])
        np.testing.assert_allclose(example["region_boxes"], expected["region_boxes"][0])
        np.testing.assert_array_equal(example["answer_targets"], soft_targets(answers, LABEL2ID))
        assert example["example_id"] == row + 3 * len(dataset)


def test_lengths_are_those_of_the_examples(dataset):
    keys = [6, 0, 3, 1]
    expected = [[len(dataset[key]["input_ids"]), len(dataset[key]["region_boxes"])] for key in keys]
    assert dataset.lengths(keys).tolist() == expected


def test_coverage(dataset):
    assert dataset.answer_coverage() == 3 / 4  # "green" is no class


def test_sampled_and_collated_batches(dataset):
    sampler = EpochBatchSampler(dataset, tokens_per_batch=30, seed=0)
    collator = UC2DataCollator(pad_token_id=1)
    rows = []
    for keys in sampler:
        batch = collator([dataset[key] for key in keys])
        assert batch["labels"].shape == (len(keys), 3)
        assert batch["input_ids"].numel() + batch["region_attention_mask"].numel() <= 30
        rows += batch["example_ids"].tolist()
    assert sorted(rows) == [0, 1, 2, 3]


def test_without_classes_there_are_no_targets(file, store, processor):
    dataset = VQADataset(load_questions_of(file, store, ["ja"]), store, processor)
    assert len(dataset) == 1 and "answer_targets" not in dataset[0]


def test_rows_are_checked(file, store, tmp_path):
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    del rows[2]["answers"]
    partly = tmp_path / "partly.jsonl"
    write_jsonl(rows, partly)
    for answers in ("required", "all or none"):
        with pytest.raises(DataError, match=r"partly.jsonl, row 3, field 'answers': found None"):
            load_questions_of([str(partly)], store, answers=answers)
    with pytest.raises(DataError, match="found only en, ja, expected rows in 'fr'"):
        load_questions_of(file, store, ["fr"])
    test_split = tmp_path / "test.jsonl"
    write_jsonl([{key: row[key] for key in row if key != "answers"} for row in rows], test_split)
    assert load_questions_of(str(test_split), store, answers="all or none")["answers"] == [None] * 4
    with pytest.raises(DataError, match="row 1, field 'answers'"):
        load_questions_of(str(test_split), store)


def test_broken_regions_are_found_before_training(file, tiny_corpus):
    from dataclasses import replace

    rows = dict(RegionStore(tiny_corpus.regions))
    features = rows["image1"].features.copy()
    features[0, 3] = np.nan
    rows["image1"] = replace(rows["image1"], features=features)
    with pytest.raises(DataError, match="image1"):
        load_questions_of(file, rows)
