"""Retrieval groups and test sets: what is drawn, from what, and how bad data is refused."""

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeling_uc2 import triplet_loss
from uc2.data_error import DataError
from uc2.region_store import RegionRow, RegionStore, write_region_store
from uc2.retrieval_data import RetrievalCollator, RetrievalDataset, load_captions_of, load_test_sets
from uc2.rows import write_jsonl

FEATURES = 4


class StubProcessor:
    """A token per character; every region kept."""

    def tokenizer(self, text, truncation, max_length):
        return {"input_ids": [0, *map(ord, text)][: max_length - 1] + [2]}

    def encode_regions(self, region):
        return {"region_features": region.features, "region_boxes": region.normalized_boxes}


def region_row(image_id, value=1.0):
    return RegionRow(
        image_id=image_id,
        image_height=10,
        image_width=20,
        boxes=np.array([[0, 0, 20, 10], [2, 2, 4, 4]], np.float32),
        features=np.full((2, FEATURES), value, np.float16),
        class_ids=np.array([1, 2]),
        class_scores=np.array([0.9, 0.3], np.float32),
    )


def caption_rows(num_images=6, languages=("en", "de"), per_image=2):
    return [
        {"image_id": f"i{image}", "language": language, "caption": f"{language} {image} {number}"}
        for image in range(num_images)
        for language in languages
        for number in range(per_image)
    ]


def make_dataset(rows=None, **options):
    rows = caption_rows() if rows is None else rows
    store = {row["image_id"]: region_row(row["image_id"], int(row["image_id"][1:])) for row in rows}
    return RetrievalDataset(datasets.Dataset.from_list(rows), store, StubProcessor(), **options)


@pytest.fixture
def store(tmp_path):
    return RegionStore(write_region_store([region_row(f"i{n}") for n in range(6)], tmp_path / "store"))


def read(pair):
    """(caption, image number) of an encoded pair."""
    return "".join(map(chr, pair["input_ids"][1:-1])), int(pair["region_features"][0, 0])


def test_a_group_is_the_true_pair_then_wrong_images_then_wrong_captions():
    dataset = make_dataset(num_negative_images=2, num_negative_captions=3)
    group = [read(pair) for pair in dataset[7]]
    caption, image = caption_rows()[7]["caption"], int(caption_rows()[7]["image_id"][1:])
    assert len(group) == dataset.group_size == 6
    assert group[0] == (caption, image)
    assert [text for text, _ in group[:3]] == [caption] * 3
    assert [number for _, number in group[3:]] == [image] * 3
    assert len(set(group)) == 6  # drawn without repetition


def test_negatives_never_match_in_any_language_and_are_even():
    dataset = make_dataset()
    counts = np.zeros(6)
    for epoch in range(40):
        for row, (true, wrong_image, wrong_caption) in enumerate(
            [read(pair) for pair in dataset[epoch * len(dataset) + row]] for row in range(len(dataset))
        ):
            assert wrong_image[1] != true[1]
            language, image, _ = wrong_caption[0].split()
            assert int(image) != true[1]
            assert language == caption_rows()[row]["language"]
            counts[wrong_image[1]] += 1
    expected = 40 * len(dataset) / 6
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("twin", ["en 0 0", "En 0  0.", " EN 0 0 !"])
def test_captions_that_read_alike_are_no_negatives(twin):
    rows = caption_rows(3, ("en",), 1) + [{"image_id": "i1", "language": "en", "caption": twin}]
    dataset = make_dataset(rows)
    # Row 0 is "en 0 0" of image 0; image 1 has the same words, so only image 2 is wrong for it.
    assert [dataset.is_wrong_image(0, image) for image in range(3)] == [False, False, True]
    # Image 1 is also described by "en 0 0", so for its row 1 only row 2 is a wrong caption.
    assert [dataset.is_wrong_caption(1, row) for row in range(4)] == [False, False, True, False]
    for epoch in range(20):
        assert [int(drawn[0]) for drawn in dataset.draw_negatives(1 + epoch * 4)] in ([0, 2], [2, 2])


def test_draws_depend_on_seed_and_key_only():
    first, second, other = make_dataset(), make_dataset(), make_dataset(seed=1)
    keys = [0, 100, 3, 57]
    drawn = [[read(pair) for pair in first[key]] for key in keys]
    assert drawn == [[read(pair) for pair in second[key]] for key in keys[::-1]][::-1]
    assert drawn != [[read(pair) for pair in other[key]] for key in keys]
    row = [first.draw_negatives(epoch * len(first)) for epoch in range(20)]
    assert len({(int(images[0]), int(rows[0])) for images, rows in row}) > 5


def test_mined_negatives_come_first():
    dataset = make_dataset(num_negative_images=2, num_negative_captions=1)
    dataset.set_hard_negatives(0, [5], [21])
    for epoch in range(5):
        images, rows = dataset.draw_negatives(epoch * len(dataset))
        assert images[0] == 5 and images[1] not in (0, 5)
        assert list(rows) == [21]


def test_the_only_candidate_is_repeated():
    dataset = make_dataset(caption_rows(2, ("en",), 1), num_negative_images=3)
    assert [read(pair)[1] for pair in dataset[0]] == [0, 1, 1, 1, 0]


def test_rows_without_a_negative_are_refused():
    with pytest.raises(DataError, match="no caption in 'de' of another image than 'i0'"):
        make_dataset(caption_rows(3, ("en",)) + caption_rows(1, ("de",)))
    with pytest.raises(ValueError, match="not both 0"):
        make_dataset(num_negative_images=0, num_negative_captions=0)


def test_the_collator_flattens_groups_and_adds_what_the_loss_needs():
    dataset = make_dataset()
    groups = [dataset[0], dataset[5]]
    batch = RetrievalCollator(lambda pairs: {"pairs": pairs}, 3)(groups)
    assert len(batch["pairs"]) == 6 and batch["group_size"] == 3
    batch = RetrievalCollator(lambda pairs: {"pairs": pairs}, 3, "bce")(groups)
    assert batch["labels"].tolist() == [1, 0, 0, 1, 0, 0] and "group_size" not in batch
    with pytest.raises(ValueError, match="triplet or bce"):
        RetrievalCollator(None, 3, "hinge")


def test_the_triplet_loss_is_the_originals(reference_folder):
    expected = load_file(reference_folder / "expected.safetensors")
    loss = triplet_loss(expected["rank_logits"].view(-1, 3), margin=0.2)
    torch.testing.assert_close(loss, expected["rank_loss"], atol=1e-5, rtol=0)


def test_test_sets_by_data_set_and_language(tmp_path, store):
    flickr, coco = tmp_path / "flickr.jsonl", tmp_path / "coco.jsonl"
    write_jsonl(caption_rows(4), flickr)
    write_jsonl(caption_rows(6, ("en", "ja"), 1), coco)
    files = {"flickr": flickr, "coco": coco}
    sets = load_test_sets(files, store, folds={"coco": 3})
    assert [(s.name, s.language, s.folds) for s in sets] == [
        ("flickr", "en", 1), ("flickr", "de", 1), ("coco", "en", 3), ("coco", "ja", 3),
    ]  # fmt: skip
    german = sets[1]
    assert german.image_ids == ["i0", "i1", "i2", "i3"]
    assert german.texts[:3] == ["de 0 0", "de 0 1", "de 1 0"]
    assert german.text_to_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [(s.name, s.language) for s in load_test_sets(files, store, ["ja"])] == [("coco", "ja")]
    with pytest.raises(DataError, match="no row in 'fr'"):
        load_test_sets(files, store, ["en", "fr"])
    with pytest.raises(DataError, match="4 folds of equal size"):
        load_test_sets(files, store, folds={"coco": 4})
    with pytest.raises(DataError, match="found 'vg', expected one of flickr, coco"):
        load_test_sets(files, store, folds={"vg": 4})


def test_bad_captions_and_regions_are_refused(tmp_path, store):
    path = tmp_path / "captions.jsonl"
    write_jsonl(caption_rows(3), path)
    assert len(load_captions_of(path, store, ["de"])) == 6
    with pytest.raises(DataError, match="found de, en, expected rows in 'zz'"):
        load_captions_of(path, store, ["zz"])
    write_jsonl([*caption_rows(3), {"image_id": "lost", "language": "en", "caption": "a"}], path)
    with pytest.raises(DataError, match=r"captions.jsonl, row 13, field 'image_id': found 'lost'"):
        load_captions_of(path, store, None)
    write_jsonl(caption_rows(3), path)
    broken = {f"i{n}": region_row(f"i{n}", np.nan if n == 2 else 1) for n in range(3)}
    with pytest.raises(DataError, match="NaN or infinity in region 0 .*i2"):
        load_captions_of(path, broken, None)
