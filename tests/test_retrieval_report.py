"""Evaluation over data sets, languages and folds, from score matrices with ties, against the definition."""

import csv
import json
from math import comb

import numpy as np
import pytest

import uc2.retrieval_report
from uc2.retrieval_data import RetrievalTestSet
from uc2.retrieval_report import evaluate_retrieval, format_table, write_results

KS = (1, 5, 10)


def chance_of_a_hit(right, wrong, k):
    """How likely one of the `right` scores is among the k best of all, equals in random order: by counting draws."""
    best = max(right)
    places = k - sum(score > best for score in wrong)
    if places <= 0:
        return 0.0
    tied_right, tied_wrong = sum(score == best for score in right), sum(score == best for score in wrong)
    drawn = min(places, tied_right + tied_wrong)
    return 1 - comb(tied_wrong, drawn) / comb(tied_right + tied_wrong, drawn)


def recalls_by_definition(scores, image_of_text):
    """`scores[text][image]` -> text-to-image R@1, 5, 10 and image-to-text R@1, 5, 10 in per cent."""
    images = sorted(set(image_of_text))
    text_to_image, image_to_text = [], []
    for k in KS:
        hits = [
            chance_of_a_hit([scores[text][own]], [scores[text][image] for image in images if image != own], k)
            for text, own in enumerate(image_of_text)
        ]
        text_to_image.append(100 * sum(hits) / len(hits))
        hits = []
        for image in images:
            column = [(scores[text][image], own == image) for text, own in enumerate(image_of_text)]
            right, wrong = ([score for score, is_own in column if is_own == side] for side in (True, False))
            hits.append(chance_of_a_hit(right, wrong, k))
        image_to_text.append(100 * sum(hits) / len(hits))
    return text_to_image + image_to_text


@pytest.fixture
def evaluation(monkeypatch):
    """Two data sets in three languages; `coco` in five folds, its captions in no order, one to five per image."""
    rng = np.random.default_rng(0)
    test_sets, matrices = [], {}
    sizes = (("flickr", "en", 30, 1), ("flickr", "de", 30, 1), ("coco", "ja", 100, 5))
    for name, language, num_images, folds in sizes:
        owners = rng.permutation(np.repeat(np.arange(num_images), rng.integers(1, 6, num_images)))
        first_seen = {image: number for number, image in enumerate(dict.fromkeys(owners.tolist()))}
        text_to_image = np.array([first_seen[image] for image in owners.tolist()])
        texts = [f"{name} {language} {number}" for number in range(len(owners))]
        images = [f"{name} {number}" for number in range(num_images)]
        test_sets.append(RetrievalTestSet(name, language, texts, images, text_to_image, folds))
        scores = np.round(rng.normal(size=(len(texts), num_images)), 1)
        scores[np.arange(len(texts)), text_to_image] += 1
        matrices |= {
            (text, image): scores[t, i] for t, text in enumerate(texts) for i, image in enumerate(images)
        }

    def scored(model, texts, regions, processor, **options):
        return np.array([[matrices[text, region] for region in regions] for text in texts], np.float32)

    monkeypatch.setattr(uc2.retrieval_report, "score_matrix", scored)
    store = {image: image for test_set in test_sets for image in test_set.image_ids}
    return test_sets, matrices, evaluate_retrieval(None, None, store, test_sets)


def test_recalls_are_those_of_the_definition(evaluation):
    test_sets, matrices, results = evaluation
    averages = []
    for test_set in test_sets:
        size = len(test_set.image_ids) // test_set.folds
        folds = []
        for fold in range(test_set.folds):
            images = test_set.image_ids[fold * size : (fold + 1) * size]
            texts = [t for t, own in enumerate(test_set.text_to_image) if test_set.image_ids[own] in images]
            scores = [[np.float32(matrices[test_set.texts[t], image]) for image in images] for t in texts]
            own = [images.index(test_set.image_ids[test_set.text_to_image[t]]) for t in texts]
            folds.append(recalls_by_definition(scores, own))
        expected = np.mean(folds, axis=0)
        found = results["datasets"][test_set.name][test_set.language]
        names = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in KS]
        np.testing.assert_allclose([found[name] for name in names], expected)
        assert found["average_recall"] == pytest.approx(np.mean(expected))
        averages.append(np.mean(expected))
        assert results["chance"][test_set.name][test_set.language]["text_to_image_r5"] == pytest.approx(500 / size)
    assert results["meta_average"] == pytest.approx(np.mean(averages))


def test_table_and_files_hold_the_numbers(evaluation, tmp_path):
    *_, results = evaluation
    lines = format_table(results).splitlines()
    german = results["datasets"]["flickr"]["de"]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:3] == ["flickr", "de", f"{german['text_to_image_r1']:.1f}"]
    assert cells[8] == f"{german['average_recall']:.1f}" and f"**{results['meta_average']:.1f}**" in lines[-1]
    write_results(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        rows = {(row["dataset"], row["language"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    assert len(rows) == 3 * 7 + 1
    assert rows["coco", "ja", "image_to_text_r10"] == results["datasets"]["coco"]["ja"]["image_to_text_r10"]
