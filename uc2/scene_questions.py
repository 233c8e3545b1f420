"""Questions about a demo scene with their answers, in English (VQA v2 style) and Japanese (VG-VQA style)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uc2.scene_captions import indefinite_article
from uc2.scene_layout import COLOURS, KINDS, Scene, SceneObject, relation_between
from uc2.scene_lexicon import COLOUR_WORDS, NOUNS

NUM_ANSWERS = 10  # people asked per English question, as in VQA v2
DISSENT = 0.06  # share of them who answer otherwise
ANSWER_TYPES = {
    "colour": "other",
    "relation": "other",
    "count": "number",
    "exists": "yes/no",
    "is_colour": "yes/no",
}

_SYNONYMS = {
    "purple": "violet",
    "cup": "mug",
    "car": "auto",
    "boat": "ship",
    "book": "notebook",
    "fish": "goldfish",
}
_ENGLISH_PLACES = {
    "left": "to the left of", "right": "to the right of", "above": "above", "below": "below",
}  # fmt: skip
_JAPANESE_PLACES = {"left": "左", "right": "右", "above": "上", "below": "下"}


@dataclass(frozen=True)
class Question:
    """A question about a scene: `topic` is a key of `ANSWER_TYPES`, `answer` a colour, kind, number or bool.

    `kind` is asked about; `colour` narrows it down ("relation") or is the proposed one ("is_colour");
    `place` is the relation asked for.
    """

    topic: str
    kind: str
    answer: str | int | bool
    colour: str | None = None
    place: str | None = None


def draw_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` different questions that the scene answers beyond doubt, over as many topics as possible."""
    by_topic = [
        list(rng.permutation(np.array(topic, dtype=object))) for topic in _possible_questions(scene, rng)
    ]
    order = [by_topic[i] for i in rng.permutation(len(by_topic)) if by_topic[i]]
    questions: list[Question] = []
    while len(questions) < count and any(order):
        for topic in order:
            if topic and len(questions) < count:
                questions.append(topic.pop())
    return questions


def _possible_questions(scene: Scene, rng: np.random.Generator) -> list[list[Question]]:
    """Everything that can be asked, a list per topic; yes and no questions in equal number."""
    by_kind: dict[str, list[SceneObject]] = {}
    for thing in scene.objects:
        by_kind.setdefault(thing.kind, []).append(thing)
    single = [things[0] for things in by_kind.values() if len(things) == 1]
    absent = [str(kind) for kind in rng.permutation([kind for kind in KINDS if kind not in by_kind])]
    colours = [Question("colour", thing.kind, thing.colour) for thing in single]
    counts = [Question("count", kind, len(things)) for kind, things in by_kind.items()]
    exists = [Question("exists", kind, True) for kind in by_kind]
    exists += [Question("exists", kind, False) for kind in absent[: len(by_kind)]]
    is_colour = []
    for thing in single:
        wrong = str(rng.choice([colour for colour in COLOURS if colour != thing.colour]))
        right = bool(rng.random() < 0.5)
        is_colour.append(Question("is_colour", thing.kind, right, thing.colour if right else wrong))
    return [colours, counts, exists, is_colour, _relation_questions(scene)]


def _relation_questions(scene: Scene) -> list[Question]:
    """ "What is left of X", wherever exactly one object clearly is."""
    questions = []
    for thing in scene.objects:
        if sum((other.kind, other.colour) == (thing.kind, thing.colour) for other in scene.objects) > 1:
            continue
        for place in _ENGLISH_PLACES:
            there = [other.kind for other in scene.objects if relation_between(other, thing) == place]
            if len(there) == 1:
                questions.append(Question("relation", thing.kind, there[0], thing.colour, place))
    return questions


def ask_in_english(question: Question) -> str:
    """The question's wording; "the" where the scene has exactly one."""
    noun = NOUNS[question.kind].en
    if question.topic == "colour":
        return f"What color is the {noun}?"
    if question.topic == "count":
        return f"How many {english_plural(noun)} are there?"
    if question.topic == "exists":
        return f"Is there {indefinite_article(noun)} {noun} in the picture?"
    if question.topic == "is_colour":
        return f"Is the {noun} {COLOUR_WORDS[question.colour].en}?"
    return f"What is {_ENGLISH_PLACES[question.place]} the {COLOUR_WORDS[question.colour].en} {noun}?"


def ask_in_japanese(question: Question) -> str:
    """The question's wording, with the noun's counter and います for what is alive."""
    noun = NOUNS[question.kind]
    exist = "います" if noun.alive else "あります"
    if question.topic == "colour":
        return f"{noun.ja}は何色ですか？"
    if question.topic == "count":
        how_many = "いくつ" if noun.ja_counter == "つ" else f"何{noun.ja_counter}"
        return f"{noun.ja}は{how_many}{exist}か？"
    if question.topic == "exists":
        return f"絵の中に{noun.ja}は{exist}か？"
    as_noun, attributive = COLOUR_WORDS[question.colour].ja
    if question.topic == "is_colour":
        return f"{noun.ja}は{as_noun if attributive.endswith('の') else attributive}ですか？"
    return f"{attributive}{noun.ja}の{_JAPANESE_PLACES[question.place]}には何が見えますか？"


def english_plural(noun: str) -> str:
    """The plural of a word of the lexicon."""
    if noun == "fish":
        return noun
    return noun[:-1] + "ies" if noun.endswith("fly") else noun + "s"


def english_answer(question: Question) -> str:
    if isinstance(question.answer, bool):
        return "yes" if question.answer else "no"
    return str(question.answer)


def japanese_answer(question: Question) -> str:
    if isinstance(question.answer, bool):
        return "はい" if question.answer else "いいえ"
    if question.topic == "count":
        return f"{question.answer}{NOUNS[question.kind].ja_counter}"
    return COLOUR_WORDS[question.answer].ja[0] if question.topic == "colour" else NOUNS[question.answer].ja


def english_answers(question: Question, rng: np.random.Generator) -> list[str]:
    """Ten people's answers, of which a few differ: a synonym, a miscount, a slip. Most agree."""
    truth = english_answer(question)
    if question.topic == "count":
        other = str(question.answer + 1)
    elif isinstance(question.answer, bool):
        other = "no" if question.answer else "yes"
    else:
        choices = COLOURS if question.topic == "colour" else KINDS
        other = _SYNONYMS.get(truth) or str(rng.choice([choice for choice in choices if choice != truth]))
    dissenters = min(int(rng.binomial(NUM_ANSWERS, DISSENT)), 3)
    answers = [truth] * (NUM_ANSWERS - dissenters) + [other] * dissenters
    return [answers[i] for i in rng.permutation(NUM_ANSWERS)]


def question_rows(image_id: str, questions: list[Question], rng: np.random.Generator) -> list[dict]:
    """Rows of the questions file: every question in English with ten answers and in Japanese with one."""
    rows = []
    for n, question in enumerate(questions):
        answer_type = ANSWER_TYPES[question.topic]
        for language, text, answers in (
            ("en", ask_in_english(question), english_answers(question, rng)),
            ("ja", ask_in_japanese(question), [japanese_answer(question)]),
        ):
            rows.append({
                "question_id": f"{image_id}-{language}-{n}", "image_id": image_id, "language": language,
                "question": text, "answers": answers, "answer_type": answer_type,
            })  # fmt: skip
    return rows
