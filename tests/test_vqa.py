"""VQA metrics: hand-worked examples, and the plain reading of the official definition."""

import itertools
import math
import random

import numpy as np
import pytest

from uc2.vqa import (
    CONTRACTIONS,
    answer_scores,
    best_constant_answer,
    bleu,
    bleu_tokenizer,
    build_answer_vocabulary,
    derive_answer_type,
    evaluate_answers,
    normalize_answer,
    shared_answer_vocabulary,
    soft_targets,
    vqa_score,
)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("a an the", ""),
        ("1,000", "1000"),  # a comma between digits: marks disappear
        ("black/white", "black white"),  # elsewhere they become a space
        ("black / white", "black white"),  # or disappear beside one
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("2.5", "2.5"),
        ("U.S.A.", "usa"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("new\nline\t", "new line"),
        ("一つ", "一つ"),
        ("  ", ""),
    ],
)
def test_normalisation_by_hand(answer, normalised):
    assert normalize_answer(answer) == normalised


def test_contractions_lack_one_apostrophe():
    assert len(CONTRACTIONS) == 114 and CONTRACTIONS["y'alld've"] == "y'all'd've"
    for short, word in CONTRACTIONS.items():
        if short != "somebody'd":
            assert short.replace("'", "") == word.replace("'", "") and len(word) == len(short) + 1


def official_reading(answer):
    """The rules of https://visualqa.org/evaluation.html, mark by mark and word by word."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    digits_around_comma = any(
        answer[i] == "," and answer[i - 1].isdecimal() and answer[i + 1].isdecimal()
        for i in range(1, len(answer) - 1)
    )
    text = ""
    for mark in answer:
        if mark in ";/[]\"{}()=+\\_-><@`,?!":
            beside_space = mark + " " in answer or " " + mark in answer
            text += "" if beside_space or digits_around_comma else " "
        else:
            text += mark
    text = "".join(
        letter for i, letter in enumerate(text) if letter != "." or text[i + 1 : i + 2].isdecimal()
    )
    digits = "zero one two three four five six seven eight nine ten".split()
    words = []
    for word in text.lower().split():
        word = "0" if word == "none" else str(digits.index(word)) if word in digits else word
        if word not in ("a", "an", "the"):
            words.append({"dont": "don't", "its": "its", "isnt": "isn't"}.get(word, word))
    return " ".join(words)


def test_normalisation_of_random_answers():
    rng = random.Random(1)
    parts = ["a", "The", "two", "none", "10", "1,5", "2.", ".5", "x.y", "dont", "isnt", "its", ",", "-", "t-shirt",
             "?", "!", "'", ":", " ", " ", "\n", "(", ")", "/", ";", "&", "#", "1", "0", "ten"]  # fmt: skip
    for _ in range(5000):
        answer = "".join(rng.choices(parts, k=rng.randint(1, 6)))
        assert normalize_answer(answer) == official_reading(answer), repr(answer)


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_score_by_hand_for_ten_answers(matches, score):
    assert vqa_score("Two.", ["2"] * matches + ["other"] * (10 - matches)) == pytest.approx(score)


def test_score_is_the_mean_over_leave_one_out_subsets():
    rng = random.Random(0)
    for count in (2, 3, 4, 10):
        for _ in range(50):
            answers = rng.choices("abcd"[1:] + "x", k=count)
            subsets = list(itertools.combinations(answers, count - 1))
            mean = sum(min(subset.count("x") / 3, 1) for subset in subsets) / count
            assert vqa_score("x", answers) == pytest.approx(mean)


def test_a_single_answer_is_right_or_wrong():
    assert vqa_score("黒", ["黒"]) == 1.0 and vqa_score("白", ["黒"]) == 0.0
    with pytest.raises(ValueError, match="no answer"):
        vqa_score("x", [])


def test_vocabulary_is_by_frequency_then_alphabet():
    answers = [["yes", "Yes", "no"], ["two"], ["2", "the"], ["blue", "ant"]]
    assert build_answer_vocabulary(answers, 10) == ["2", "yes", "ant", "blue", "no"]
    assert build_answer_vocabulary(reversed(answers), 3) == ["2", "yes", "ant"]
    assert build_answer_vocabulary(["red", "red", "blue"], 1) == ["red"]
    with pytest.raises(ValueError, match="at least 1"):
        build_answer_vocabulary(answers, 0)


def test_shared_vocabulary_takes_the_most_frequent_of_each_language():
    answers = [["yes"], ["yes"], ["2"], ["はい"], ["2"], ["2"], ["いいえ"]]
    languages = ["en", "en", "en", "ja", "ja", "ja", "ja"]
    assert shared_answer_vocabulary(answers, languages, 2) == ["yes", "2", "いいえ"]


def test_soft_targets_are_the_usual_ones():
    answers = ["a cat"] * 2 + ["dog"] * 7 + ["cow"]
    vocabulary = ["dog", "cat", "horse"]
    np.testing.assert_allclose(soft_targets(answers, vocabulary), [1, 0.6, 0], atol=1e-7)
    np.testing.assert_allclose(soft_targets(answers, {"cow": 0}), [0.3], atol=1e-7)
    assert (
        soft_targets(["cat"], vocabulary).tolist() == [0, 1, 0] and soft_targets([], []).dtype == np.float32
    )
    for answer, score in answer_scores(answers).items():
        assert score == pytest.approx(min(0.3 * answers.count(answer), 1)) or answer == "cat"


@pytest.mark.parametrize(
    ("answers", "kind"),
    [(["Yes", "no", "yes"], "yes/no"), (["いいえ"], "yes/no"), (["two"], "number"), (["2人"], "number"),
     (["一つ"], "number"), (["3.5"], "number"),
     (["red"], "other"), (["黒"], "other"), (["2 dogs here"], "other")],
)  # fmt: skip
def test_answer_type(answers, kind):
    assert derive_answer_type(answers) == kind


def test_bleu_by_hand():
    """2-word answers, effective order 2: unigrams 3/4 right, bigrams 1/2, equal lengths."""
    score = bleu(["red car", "big dog"], [["red car"], ["big cat"]])
    assert score == pytest.approx(100 * math.sqrt(3 / 4 * 1 / 2))
    assert bleu(["red", "big dog"], [["blue", "red"], ["big dog"]]) == pytest.approx(100)


def test_japanese_is_split_into_words():
    pytest.importorskip("MeCab")
    assert bleu_tokenizer("ja") == "ja-mecab"
    # 赤い 車 / 青い 車: one of two words, no word pair (smoothed: half of one); characters: two of three
    assert bleu(["赤い車"], [["青い車"]], "ja-mecab") == pytest.approx(100 * math.sqrt(1 / 2 * 1 / 2))


def test_without_mecab_characters_are_compared_and_said_so(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level("WARNING"):
        assert bleu_tokenizer("ja") == "char"
    assert "MeCab" in caplog.text and bleu_tokenizer("zh") == "zh" and bleu_tokenizer("de") == "13a"


def test_evaluation_per_language_and_type():
    predictions = ["yes", "2", "red", "黒"]
    answers = [["yes"] * 10, ["2"] * 3 + ["3"] * 7, ["blue"] * 10, ["黒"]]
    results = evaluate_answers(predictions, answers, ["en", "en", "en", "ja"], [None, None, "colour", None])
    english, japanese = results["en"], results["ja"]
    assert english["questions"] == 3 and english["vqa_score"] == pytest.approx((100 + 90 + 0) / 3)
    assert english["accuracy"] == pytest.approx(100 / 3)  # "3" is what most said to the second
    assert {name: row["vqa_score"] for name, row in english["answer_types"].items()} == pytest.approx(
        {"yes/no": 100, "number": 90, "colour": 0}
    )
    assert japanese["vqa_score"] == japanese["accuracy"] == 100 and japanese["bleu"] == pytest.approx(100)
    assert english["constant_answer"] == "3" or english["constant_vqa_score"] == pytest.approx(100 / 3)


def test_best_constant_answer():
    answers = [["a1"] * 10, ["b"] * 3 + ["c"] * 7, ["b"] * 10]
    assert best_constant_answer(answers) == ("b", pytest.approx(1.9 / 3))
