"""PretrainingDataset: objectives, languages, distractors, targets and lengths on a six-language corpus."""

import dataclasses
import pickle
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tiny_tokenizer import build_tokenizer
from torch.utils.data import DataLoader

from modeling_uc2.configuration_uc2 import OBJECTIVES
from processing_uc2 import UC2Processor
from uc2.collator import UC2DataCollator
from uc2.data_error import DataError
from uc2.pretraining_data import PretrainingDataset
from uc2.region_store import RegionRow, RegionStore, write_region_store
from uc2.sampling import EpochBatchSampler

LANGUAGES = ("en", "de", "fr", "cs", "ja", "zh")
CAPTIONS = {
    "en": "a red dog runs over the green meadow number {}",
    "de": "ein roter Hund rennt über die grüne Wiese Nummer {}",
    "fr": "un chien rouge court sur le pré vert numéro {}",
    "cs": "červený pes běží přes zelenou louku číslo {}",
    "ja": "赤い犬が緑の草原を走る番号{}",
    "zh": "一只红色的狗跑过绿色的草地编号{}",
}
DOGS = {"en": "dog {}", "de": "Hund {}", "fr": "chien {}", "cs": "pes {}", "ja": "犬{}", "zh": "狗{}"}
LABELS = {code: [text.format(i) for i in range(4)] for code, text in DOGS.items()}
NUM_ROWS, FEATURE_SIZE, NUM_CLASSES = 40, 8, 4


class DictStore(dict):
    """What PretrainingDataset needs of a region store."""

    feature_size, num_classes, has_classes = FEATURE_SIZE, NUM_CLASSES, True

    def class_scores(self, image_id):
        return self[image_id].class_scores


def region_row(image_id: str, seed: int) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    count = 10 + seed % 7
    corners = np.sort(rng.random((count, 2, 2), dtype=np.float32), axis=1)
    return SimpleNamespace(
        image_id=image_id,
        image_height=100,
        image_width=200,
        normalized_boxes=np.concatenate([corners[:, 0], corners[:, 1]], axis=1),
        boxes=None,
        features=(np.abs(rng.normal(size=(count, FEATURE_SIZE))) + 1).astype(np.float16),
        class_ids=rng.integers(NUM_CLASSES, size=count),
        class_scores=np.sort(rng.random(count, dtype=np.float32))[::-1].copy(),
        class_probs=rng.dirichlet(np.ones(NUM_CLASSES), size=count).astype(np.float16),
    )


def caption_row(i: int, languages=LANGUAGES, aligned=("de", "fr", "cs", "ja", "zh")) -> dict:
    return {
        "image_id": f"image{i}",
        "captions": {code: CAPTIONS[code].format(i) if code in languages else None for code in LANGUAGES},
        "alignment": {code: "1-1 2-2" if code in aligned else None for code in LANGUAGES},
    }


@pytest.fixture(scope="module")
def processor():
    texts = [text.format(i) for text in CAPTIONS.values() for i in range(NUM_ROWS)] + sum(LABELS.values(), [])
    tokenizer = build_tokenizer(texts, vocab_size=220, max_piece_length=4)
    return UC2Processor(tokenizer, LABELS, max_regions=14, feature_size=FEATURE_SIZE)


@pytest.fixture(scope="module")
def store():
    return DictStore({f"image{i}": region_row(f"image{i}", i) for i in range(NUM_ROWS)})


@pytest.fixture(scope="module")
def rows():
    return datasets.Dataset.from_list([caption_row(i) for i in range(NUM_ROWS)])


@pytest.fixture(scope="module")
def make(processor, store, rows):
    def build(*, captions=rows, **options):
        return PretrainingDataset(captions, store, processor, **({"seed": 3} | options))

    return build


def only(objective: str) -> dict:
    return {"objective_mix": {objective: 1}}


def texts_of(processor, example) -> list[str]:
    """The captions of an example with its labels put back over the masked tokens."""
    ids = np.where(example["labels"] == -100, example["input_ids"], example["labels"])
    ends = np.flatnonzero(ids == processor.tokenizer.eos_token_id)
    starts = np.flatnonzero(ids == processor.tokenizer.bos_token_id)
    return [processor.tokenizer.decode(ids[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


def row_of(store, features) -> str:
    """The image whose features these are."""
    return next(key for key, row in store.items() if (row.features[0] == features[0]).all())


def test_objectives_and_languages_are_drawn_by_the_paper_mix(make):
    dataset = make()
    draws = [dataset[key] for key in range(4000)]
    counts = Counter(OBJECTIVES[example["objective_id"]] for example in draws)
    for objective, weight in {"itm": 9, "mlm": 12, "mrtm": 9, "vtlm": 3}.items():
        expected = weight / 33
        assert abs(counts[objective] / 4000 - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000)
        assert dataset.achieved_mix()[objective] == pytest.approx(expected)
    languages = Counter(e["language_id"] for e in draws if OBJECTIVES[e["objective_id"]] == "mlm")
    assert sorted(languages) == list(range(6))
    assert all(abs(count / counts["mlm"] - 1 / 6) < 0.05 for count in languages.values())


def test_mix_is_renormalised_over_what_a_row_can_serve(make, rows):
    english_only = [caption_row(i, languages=("en",), aligned=()) for i in range(NUM_ROWS // 2)]
    captions = datasets.Dataset.from_list(english_only + rows.to_list()[NUM_ROWS // 2 :])
    dataset = make(captions=captions, objective_mix={"mlm": 1, "vtlm": 3})
    assert dataset.achieved_mix() == pytest.approx({"mlm": (1 + 0.25) / 2, "vtlm": 0.75 / 2})
    for key in range(200):
        example = dataset[key]
        if key % NUM_ROWS < NUM_ROWS // 2:
            assert (example["objective_id"], example["language_id"]) == (OBJECTIVES.index("mlm"), 0)


def test_rows_that_serve_nothing_are_left_out(make, rows, caplog):
    captions = datasets.Dataset.from_list([caption_row(0, aligned=()), *rows.to_list()[1:]])
    dataset = make(captions=captions, **only("vtlm"))
    assert len(dataset) == NUM_ROWS - 1
    assert "1 of 40 rows" in caplog.text


@pytest.mark.parametrize("language", LANGUAGES)
def test_mlm_masks_one_caption_of_the_language_and_shows_all_regions(make, processor, store, language):
    dataset = make(**only("mlm"), languages=[language])
    masked = 0
    for key in range(NUM_ROWS * 10):
        example = dataset[key]
        expected = CAPTIONS[language].format(key % NUM_ROWS)
        ids = processor.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert texts_of(processor, example) == [processor.tokenizer.decode(ids)]
        assert row_of(store, example["region_features"]) == f"image{key % NUM_ROWS}"
        assert not example["region_mask"].any()
        assert example["itm_label"] == -100 and (example["region_labels"] == -100).all()
        masked += (example["labels"] != -100).mean() * len(example["labels"]) / (len(example["labels"]) - 2)
    assert abs(masked / (NUM_ROWS * 10) - 0.15) < 0.03  # a little above: at least one


def test_itm_half_the_pairs_mismatch_half_of_them_by_image_and_half_by_caption(make, processor, store):
    dataset = make(**only("itm"), languages=["en"])
    outcome = Counter()
    for key in range(2000):
        example = dataset[key]
        own = key % NUM_ROWS
        caption = int("".join(filter(str.isdigit, texts_of(processor, example)[0])))
        image = int(row_of(store, example["region_features"])[len("image") :])
        assert example["itm_label"] == int(caption == image) and own in (caption, image)
        assert (example["labels"] == -100).all() and not example["region_mask"].any()
        outcome["match" if caption == image else "image" if caption == own else "caption"] += 1
    assert abs(outcome["match"] / 2000 - 0.5) < 0.056
    assert abs(outcome["image"] / 2000 - 0.25) < 0.05 and abs(outcome["caption"] / 2000 - 0.25) < 0.05


def test_itm_distractors_never_truly_match(make, store, processor):
    """Rows 0..9 share one caption, rows 10..19 one image: neither may be each other's distractor."""
    parts = [caption_row(i) for i in range(30)]
    for i in range(10):
        parts[i]["captions"]["en"] = "A  dog" if i % 2 else "a dog"  # told apart by case and spacing only
    for i in range(10, 20):
        parts[i]["image_id"] = "image10"
    captions = datasets.Dataset.from_list(parts)
    dataset = make(captions=captions, **only("itm"), languages=["en"], itm_negative_share=1.0)
    same = [processor.tokenizer(text)["input_ids"] for text in ("a dog", "A dog")]
    for key in range(1000):
        example = dataset[key]
        assert example["itm_label"] == 0
        image = int(row_of(store, example["region_features"])[len("image") :])
        if example["input_ids"].tolist() in same:
            assert image >= 10
        elif image == 10:
            number = int("".join(filter(str.isdigit, texts_of(processor, example)[0])))
            assert not 10 <= number < 20


def test_itm_distractor_captions_come_from_rows_that_have_the_language(make, processor):
    parts = [caption_row(i, languages=("en", "de") if i < 3 else ("en",), aligned=()) for i in range(20)]
    dataset = make(captions=datasets.Dataset.from_list(parts), **only("itm"), itm_negative_share=1.0)
    for key in range(400):
        example = dataset[key]
        word = {"en": "meadow", "de": "Wiese"}[dataset.languages[example["language_id"]]]
        assert word in texts_of(processor, example)[0] and example["itm_label"] == 0


def test_itm_with_nothing_to_tell_apart_keeps_matching_pairs(make):
    parts = [caption_row(i) for i in range(3)]
    for part in parts:
        part["captions"] = parts[0]["captions"]
    dataset = make(captions=datasets.Dataset.from_list(parts), **only("itm"))
    assert all(dataset[key]["itm_label"] == 1 for key in range(100))


@pytest.mark.parametrize("language", LANGUAGES)
def test_mrtm_predicts_a_subword_of_the_label_in_the_captions_language(make, processor, store, language):
    dataset = make(**only("mrtm"), languages=[language])
    tokenizer = processor.tokenizer
    masked = zeroed = total = 0
    for key in range(NUM_ROWS * 10):
        example = dataset[key]
        row, mask = store[f"image{key % NUM_ROWS}"], example["region_mask"]
        assert mask.any() and ((example["region_labels"] != -100) == mask).all()
        for region in np.flatnonzero(mask):  # regions are stored by falling score: kept ones come first
            pieces = tokenizer.tokenize(LABELS[language][row.class_ids[region]])
            target = tokenizer.convert_ids_to_tokens(int(example["region_labels"][region]))
            assert target in set(pieces) - {"▁"}
        gone = (example["region_features"] == 0).all(axis=1)
        assert (example["region_features"][~gone] == row.features[: len(gone)][~gone]).all()
        assert (example["labels"] == -100).all()
        masked, zeroed, total = masked + mask.sum(), zeroed + gone.sum(), total + len(mask)
    assert 0.13 < masked / total < 0.2 and 0.85 < zeroed / masked < 0.95


def test_mrtm_leaves_out_languages_without_labels_and_says_so(make, caplog):
    labels = {code: LABELS[code] for code in ("en", "de")}
    dataset = make(object_labels=labels, **only("mrtm"))
    assert {dataset[key]["language_id"] for key in range(200)} == {0, 1}
    assert "no object labels in fr, cs, ja, zh" in caplog.text


@pytest.mark.parametrize("language", ["de", "fr", "cs", "ja", "zh"])
@pytest.mark.parametrize("mode", ["random", "full"])
def test_vtlm_masks_the_aligned_units_of_both_captions(make, processor, language, mode):
    dataset = make(**only("vtlm"), languages=["en", language], co_masking=mode)
    tokenizer = processor.tokenizer
    for key in range(80):
        example = dataset[key]
        row = key % NUM_ROWS
        texts = [CAPTIONS[code].format(row) for code in ("en", language)]
        pivot, other = (tokenizer(text, add_special_tokens=False) for text in texts)
        n, m = len(pivot["input_ids"]), len(other["input_ids"])
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        ids = np.array([bos, *pivot["input_ids"], eos, bos, *other["input_ids"], eos])
        picked = example["labels"] != -100
        assert (example["labels"][picked] == ids[picked]).all()
        assert (example["input_ids"][~picked] == ids[~picked]).all()
        positions = [*range(pad + 1, pad + n + 3), *range(pad + 1, pad + m + 3)]
        assert example["position_ids"].tolist() == positions
        assert example["language_id"] == 1 and not example["region_mask"].any()
        # The alignment is 1-1 2-2: units 1 and 2, whitespace words or, in ja and zh, sub-words.
        words = np.array(pivot.word_ids())
        other_words = np.arange(m) if language in ("ja", "zh") else np.array(other.word_ids())
        masked = set(words[picked[1 : n + 1]])
        assert set(other_words[picked[n + 3 : n + 3 + m]]) == masked & {1, 2}


def test_tlm_is_vtlm_without_regions(make):
    vtlm, tlm = make(**only("vtlm")), make(**only("tlm"))
    for key in range(30):
        a, b = vtlm[key], tlm[key]
        assert b["region_features"].shape == (0, FEATURE_SIZE) and b["region_boxes"].shape == (0, 4)
        assert (a["labels"] == b["labels"]).all() and (a["input_ids"] == b["input_ids"]).all()


def test_pivot_language_is_an_option(make, processor, rows):
    dataset = make(**only("vtlm"), languages=["de", "fr"], pivot_language="de")
    first, second = texts_of(processor, dataset[0])
    assert "roter" in first and "chien" in second


def test_ablation_objectives_mask_as_mrtm_and_carry_their_targets(make, store):
    for objective, name in (("mrc", "class_labels"), ("mrc_kl", "class_probs"), ("mrfr", "feature_targets")):
        example = make(**only(objective))[5]
        mask, row, target = example["region_mask"], store["image5"], example[f"region_{name}"]
        assert mask.any() and not mask.all() and (example["region_labels"] == -100).all()
        kept = slice(0, len(mask))
        if objective == "mrc":
            assert (target == np.where(mask, row.class_ids[kept], -100)).all()
        elif objective == "mrc_kl":
            assert (target[mask] == row.class_probs[kept][mask]).all() and (target[~mask] == 0).all()
        else:
            assert (target[mask] == row.features[kept][mask]).all()


def test_an_example_is_a_function_of_seed_and_key(make):
    first, again, other_seed = make(), make(), make(seed=4)
    copy = pickle.loads(pickle.dumps(first))
    for key in (0, 7, NUM_ROWS + 7, 10**9):
        for example in (again[key], copy[key]):
            for name, value in first[key].items():
                assert np.array_equal(value, example[name])
    assert any(not np.array_equal(first[k]["input_ids"], other_seed[k]["input_ids"]) for k in range(5))
    epochs = [first[7 + NUM_ROWS * epoch]["input_ids"] for epoch in range(5)]
    assert any(not np.array_equal(epochs[0], ids) for ids in epochs[1:])


def test_lengths_are_those_of_the_examples(make):
    dataset = make(objective_mix={name: 1 for name in OBJECTIVES})
    keys = np.arange(600)
    lengths = dataset.lengths(keys)
    for key in keys:
        example = dataset[key]
        expected = (len(example["input_ids"]), len(example["region_features"]))
        assert tuple(lengths[key]) == expected == dataset.length(int(key))


def test_real_store_sampler_workers_and_collator(make, processor, store, rows, tmp_path):
    """What the Trainer's loader gives, with and without worker processes."""
    boxes = {key: row.normalized_boxes * np.float32([200, 100, 200, 100]) for key, row in store.items()}
    fields = {key: vars(row) | {"boxes": boxes[key]} for key, row in store.items()}
    names = [field.name for field in dataclasses.fields(RegionRow)]
    rows_of_store = (RegionRow(**{name: values[name] for name in names}) for values in fields.values())
    write_region_store(rows_of_store, tmp_path / "store")
    mapped = PretrainingDataset(rows, RegionStore(tmp_path / "store"), processor, seed=3)
    dataset = make()
    sampler = EpochBatchSampler(dataset, seed=0, tokens_per_batch=300, multiple_of=2)
    loaders = [
        DataLoader(data, batch_sampler=sampler, collate_fn=UC2DataCollator(), num_workers=workers)
        for data, workers in ((dataset, 0), (mapped, 2))
    ]
    for keys, batch, same in zip(sampler, *loaders, strict=True):
        assert (batch["attention_mask"].sum(1).numpy() == dataset.lengths(np.array(keys))[:, 0]).all()
        assert batch["input_ids"].shape[1] + batch["region_features"].shape[1] <= 300 / len(keys)
        for name, value in batch.items():
            torch.testing.assert_close(value, same[name], rtol=0, atol=1e-6)


def test_long_captions_are_cut_each(make):
    dataset = make(objective_mix={"mlm": 1, "vtlm": 1}, max_text_length=5)
    for key in range(200):
        example = dataset[key]
        expected = 7 if example["objective_id"] == OBJECTIVES.index("mlm") else 14
        assert len(example["input_ids"]) == len(example["labels"]) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective_mix": {"mlm": 1, "mrtn": 1}}, "unknown objective 'mrtn'; choices: mlm, itm"),
        ({"objective_mix": {"mlm": -1}}, "weight -1"),
        ({"objective_mix": {"mlm": 0}}, "no objective"),
        ({"languages": ["de", "fr"]}, "'vtlm' has weight 3, but no row can serve it"),
        ({"languages": ["en"]}, "'vtlm' has weight 3"),
        ({"languages": ["de"], "object_labels": {"en": LABELS["en"]}, **only("mrtm")}, "object labels"),
        ({"co_masking": "some"}, "random, full, mix"),
        ({"mlm_probability": 15}, "mlm_probability is 15"),
    ],
)
def test_bad_options_are_refused_at_construction(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_objectives_that_the_data_cannot_serve_say_what_they_need(make, processor, store, rows):
    with pytest.raises(ValueError, match="'itm' has weight 1.*at least two images"):
        make(captions=datasets.Dataset.from_list([caption_row(0), caption_row(0)]), **only("itm"))
    without_probs = DictStore(store)
    without_probs.num_classes = None
    with pytest.raises(ValueError, match="'mrc_kl' has weight 1.*class probabilities"):
        PretrainingDataset(rows, without_probs, processor, seed=0, **only("mrc_kl"))
    grid = DictStore(store)
    grid.has_classes = False
    for objective in ("mrtm", "mrc", "mrc_kl"):
        with pytest.raises(ValueError, match=f"'{objective}' has weight 1.*regions with object classes"):
            PretrainingDataset(rows, grid, processor, seed=0, **only(objective))
    unlabelled = UC2Processor(processor.tokenizer, feature_size=FEATURE_SIZE)
    with pytest.raises(ValueError, match="'mrtm' needs object_labels"):
        PretrainingDataset(rows, store, unlabelled, seed=0)


def test_an_image_that_is_not_in_the_store_is_named(make, rows):
    captions = datasets.Dataset.from_list([*rows.to_list(), caption_row(0) | {"image_id": "elsewhere"}])
    with pytest.raises(DataError, match="row 41, field 'image_id': found 'elsewhere'"):
        make(captions=captions)


def test_an_alignment_that_does_not_fit_its_captions_is_named(make, rows):
    bad = caption_row(0)
    bad["alignment"]["de"] = "0-0 2-40"
    with pytest.raises(DataError, match="row 1, field 'alignment.de': found '2-40', expected units below 10"):
        make(captions=datasets.Dataset.from_list([bad]), objective_mix={"mlm": 1})
