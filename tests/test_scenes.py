"""The demo corpus: grammar against hand-written captions, questions, pixels, regions, tokenizer, repeats."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from uc2.object_labels import LabelTokens, load_object_labels
from uc2.region_store import RegionStore
from uc2.rows import check_images_in_store, load_captions, load_parallel_captions, load_questions
from uc2.scene_captions import GRAMMARS, describe
from uc2.scene_images import COLOUR_RGB, render
from uc2.scene_layout import (
    COLOURS,
    KINDS,
    LABELS,
    Description,
    Item,
    Scene,
    SceneObject,
    draw_scene,
    relation_between,
)
from uc2.scene_questions import (
    Question,
    ask_in_english,
    ask_in_japanese,
    draw_questions,
    english_answers,
    japanese_answer,
)
from uc2.scenes import build_demo_corpus, draw_splits, main

SETTINGS = {"num_train": 160, "num_val": 16, "num_test": 16, "pretrained": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_demo_corpus(tmp_path_factory.mktemp("demo") / "corpus", **SETTINGS)


# --- grammar ---


@pytest.mark.parametrize(
    ("language", "caption"),
    [
        ("en", "A small orange apple is to the left of a white umbrella."),
        ("de", "Ein kleiner orangefarbener Apfel ist links von einem weißen Regenschirm."),
        ("fr", "Une petite pomme orange est à gauche d'un parapluie blanc."),
        ("cs", "Malé oranžové jablko je vlevo od bílého deštníku."),
        ("ja", "小さなオレンジのりんごが白い傘の左にあります。"),
        ("zh", "一个橙色的小苹果在一把白色的雨伞的左边。"),
    ],
)
def test_relation_with_size(language, caption):
    items = (Item("apple", "orange", "small"), Item("umbrella", "white"))
    assert describe(Description(items, ((0, "left", 1),)), language) == caption


@pytest.mark.parametrize(
    ("language", "caption"),
    [
        ("en", "Above a purple lamp there is a green bird, and there is also a red fish."),
        ("de", "Über einer violetten Lampe ist ein grüner Vogel und es gibt auch einen roten Fisch."),
        ("fr", "Au-dessus d'une lampe violette, il y a un oiseau vert, et il y a aussi un poisson rouge."),
        ("cs", "Nad fialovou lampou je zelený pták a je tam také červená ryba."),
        ("ja", "紫のランプの上に緑の鳥がいます。赤い魚もいます。"),
        ("zh", "一盏紫色的灯的上方有一只绿色的鸟，还有一条红色的鱼。"),
    ],
)
def test_relation_in_the_other_order_and_a_third_object(language, caption):
    items = (Item("bird", "green"), Item("lamp", "purple"), Item("fish", "red"))
    assert describe(Description(items, ((0, "above", 1),)), language, wording=1) == caption


@pytest.mark.parametrize(
    ("language", "caption"),
    [
        ("en", "There is a black kite, a blue house and a large white cat in a meadow."),
        (
            "de",
            "Auf einer Wiese sieht man einen schwarzen Drachen, ein blaues Haus und eine große weiße Katze.",
        ),
        ("fr", "Dans un pré, on voit un cerf-volant noir, une maison bleue et un grand chat blanc."),
        ("cs", "Na louce vidíme černého draka, modrý dům a velkou bílou kočku."),
        ("ja", "草原に黒い凧と青い家と大きな白い猫が見えます。"),
        ("zh", "草地上可以看到一只黑色的风筝、一座蓝色的房子和一只白色的大猫。"),
    ],
)
def test_listing_takes_the_accusative_where_it_should(language, caption):
    items = (Item("kite", "black"), Item("house", "blue"), Item("cat", "white", "large"))
    assert describe(Description(items, setting="meadow"), language, wording=1) == caption


@pytest.mark.parametrize(
    ("wording", "language", "caption"),
    [
        (0, "de", "Im Schnee sind ein gelbes Boot und eine rote Blume zu sehen."),
        (0, "cs", "Ve sněhu je žlutá loďka a červená květina."),
        (0, "ja", "雪の上に黄色い船と赤い花があります。"),
        (2, "fr", "Il y a un bateau jaune et une fleur rouge dans la neige."),
    ],
)
def test_listing_in_other_wordings(wording, language, caption):
    items = (Item("boat", "yellow"), Item("flower", "red"))
    assert describe(Description(items, setting="snow"), language, wording) == caption


def test_japanese_existence_follows_what_is_alive():
    def exist(*kinds):
        return GRAMMARS["ja"].exist([Item(kind, "red") for kind in kinds])

    assert (exist("cat"), exist("cup"), exist("cat", "cup")) == ("います", "あります", "見えます")


# --- questions ---


def test_questions_in_both_languages():
    count = Question("count", "butterfly", 2)
    assert ask_in_english(count) == "How many butterflies are there?"
    assert (ask_in_japanese(count), japanese_answer(count)) == ("蝶は何匹いますか？", "2匹")
    relation = Question("relation", "house", "car", "green", "left")
    assert ask_in_english(relation) == "What is to the left of the green house?"
    assert ask_in_japanese(relation) == "緑の家の左には何が見えますか？"
    assert ask_in_english(Question("exists", "umbrella", False)) == "Is there an umbrella in the picture?"
    assert ask_in_japanese(Question("is_colour", "ball", True, "white")) == "ボールは白いですか？"
    assert ask_in_japanese(Question("is_colour", "ball", True, "purple")) == "ボールは紫ですか？"


def test_every_answer_follows_from_the_scene():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        questions = draw_questions(scene, rng, 8)
        assert len(set(questions)) == len(questions) == 8
        for question in questions:
            assert question.answer == _answer_by_hand(scene, question)


def _answer_by_hand(scene: Scene, question: Question):
    same = [thing for thing in scene.objects if thing.kind == question.kind]
    if question.topic == "count":
        return len(same)
    if question.topic == "exists":
        return bool(same)
    if question.topic == "relation":
        (named,) = [thing for thing in same if thing.colour == question.colour]
        axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[question.place]
        (there,) = [thing for thing in scene.objects if relation_between(thing, named) == question.place]
        assert sign * (there.centre[axis] - named.centre[axis]) > 0
        return there.kind
    (only,) = same
    return only.colour if question.topic == "colour" else only.colour == question.colour


def test_ten_people_mostly_agree():
    rng = np.random.default_rng(0)
    answers = [english_answers(Question("colour", "cup", "red"), rng) for _ in range(200)]
    agreeing = [row.count("red") for row in answers]
    assert {len(row) for row in answers} == {10} and min(agreeing) >= 7
    assert 0.9 < np.mean(agreeing) / 10 < 1


# --- scenes and pictures ---


def test_scenes_of_a_test_split_are_told_apart():
    scenes = draw_splits({"train": 50, "test": 60}, seed=1)
    described = [scene.described for split in scenes.values() for scene in split]
    assert len(set(described)) == len(described)
    for i, scene in enumerate(scenes["test"]):
        fitting = [j for j, other in enumerate(scenes["test"]) if scene.described <= other.contents]
        assert fitting == [i]


def test_relations_need_a_clear_offset():
    ball = SceneObject("ball", "red", "small", (0.1, 0.4, 0.3, 0.6))
    assert relation_between(ball, SceneObject("cup", "red", "small", (0.6, 0.45, 0.8, 0.65))) == "left"
    assert relation_between(ball, SceneObject("cup", "red", "small", (0.6, 0.0, 0.8, 0.1))) is None
    assert relation_between(ball, SceneObject("cup", "red", "small", (0.1, 0.1, 0.3, 0.3))) == "below"


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_shows_its_colour_inside_its_box_only(kind):
    box = (0.3, 0.3, 0.7, 0.7)
    thing = SceneObject(kind, "purple", "large", box)
    picture = render(Scene("meadow", (thing,), None), 128, np.random.default_rng(0))
    pixels = np.asarray(picture, dtype=float)
    near = np.abs(pixels - COLOUR_RGB["purple"]).max(-1) < 40
    rows, columns = near.nonzero()
    assert near.mean() > 0.01
    assert min(rows.min(), columns.min()) >= 0.3 * 128 - 3 and max(rows.max(), columns.max()) <= 0.7 * 128 + 3


# --- the corpus ---


def test_files_are_what_the_readers_expect(corpus):
    for split, count in (("train", 160), ("val", 16), ("test", 16)):
        store = RegionStore(corpus / "regions" / split)
        parallel = load_parallel_captions(str(corpus / f"{split}.jsonl"))
        captions = load_captions(str(corpus / f"captions_{split}.jsonl"))
        questions = load_questions(str(corpus / f"questions_{split}.jsonl"))
        assert (len(store), len(parallel), len(captions)) == (count, count, 6 * count)
        check_images_in_store(parallel, str(corpus / f"{split}.jsonl"), store)
        assert all(row["alignment"][code] for row in parallel for code in ("de", "fr", "cs", "ja", "zh"))
        assert {row["language"]: len(row["answers"]) for row in questions} == {"en": 10, "ja": 1}
        for name in store:
            row = store[name]
            assert row.class_probs.shape == (len(row.boxes), len(LABELS)) and len(row.boxes) >= 4
            with Image.open(corpus / "images" / f"{name}.png") as picture:
                picture.load()
                assert picture.size == (row.image_width, row.image_height) == (192, 192)


def test_probe_reads_kind_and_colour_from_held_out_pixels(corpus):
    report = json.loads((corpus / "corpus.json").read_text())
    assert report["probe_accuracy"]["kind"] > 0.8 and report["probe_accuracy"]["colour"] > 0.8
    assert len(COLOURS) == 8 and report["backbone_weights"] == "random, seed 0"


def test_tokenizer_is_like_xlm_roberta(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3, len(tokenizer) - 1]
    for row in load_captions(str(corpus / "captions_train.jsonl")):
        ids = tokenizer(row["caption"])["input_ids"]
        assert ids[0] == 0 and ids[-1] == 2 and 3 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["caption"]
    labels = load_object_labels(corpus)
    assert LabelTokens(labels, tokenizer).num_classes == len(LABELS)
    assert tokenizer.tokenize("ein Regenschirm")[-1] == "▁Regenschirm"
    assert "雨伞" in tokenizer.tokenize(labels["zh"][LABELS.index("umbrella")])


def test_two_builds_are_equal_and_a_finished_one_is_reused(corpus, tmp_path, capsys):
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    main(["--output_dir", str(tmp_path / "again"), *flags])
    files = [file.relative_to(corpus) for file in corpus.rglob("*") if file.is_file()]
    assert len(files) > 200
    for file in files:
        if file.name != "corpus.json":  # it tells the seconds
            assert (corpus / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    before = (corpus / "corpus.json").stat().st_mtime_ns
    build_demo_corpus(corpus, **SETTINGS)
    assert (corpus / "corpus.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError):
        build_demo_corpus(corpus, **SETTINGS, seed=1)


def test_impossible_settings_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="num_val is 0"):
        build_demo_corpus(tmp_path / "corpus", num_val=0)
    assert not list(tmp_path.iterdir())
