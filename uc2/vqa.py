"""Visual question answering (paper 4.1.2): the official accuracy, BLEU, answer vocabulary and soft targets.

The VQA accuracy of an answer is the mean over the leave-one-out subsets of the (ten) given answers of
min(matches / 3, 1), all normalised as https://visualqa.org/evaluation.html says.
"""

import functools
import importlib.util
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from sacrebleu.metrics import BLEU

logger = logging.getLogger(__name__)

ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = dict(
    zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True)
) | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Each is recognised with one of its apostrophes missing.
CONTRACTED_WORDS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED_WORDS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # a slip of the official table, kept: scores must agree with it

YES_NO = frozenset("yes no ja nein oui non ano ne はい いいえ いえ 是 不是 否 没有 有".split())
_NUMBER = re.compile(r"\d[\d.,:]*\D{0,2}|[〇一二三四五六七八九十百千万]+[つ人個本台匹頭枚羽个只辆张]?")

# sacrebleu's tokenizers; the default suits languages that separate words by spaces.
BLEU_TOKENIZERS = {"ja": "ja-mecab", "zh": "zh"}


# ---- the official accuracy ----


@functools.lru_cache(maxsize=1 << 18)
def normalize_answer(answer: str) -> str:
    """The official normalisation: punctuation, lower case, number words, articles, contractions.

    A punctuation mark disappears where it touches a space, or in an answer with a number such as 1,000;
    elsewhere it becomes a space. A full stop survives only before a digit.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        touches_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if touches_space or has_thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """The official VQA accuracy of a prediction, in [0, 1]; with a single answer, whether it matches.

    The given answers are normalised as well, also where all agree; the official code leaves those as they are.
    The formula is the same for fewer than ten: of two answers both must match, for a score of 1/3.

        vqa_score("two", ["2"] * 3 + ["3"] * 7) == 0.9: without one of the three "2" there are two matches
        (2/3), without one of the seven "3" there are three (1): (3 * 2/3 + 7 * 1) / 10

    Raises:
        ValueError: there is no answer to compare with.
    """
    if not answers:
        raise ValueError("there is no answer to compare the prediction with")
    prediction = normalize_answer(prediction)
    return _score(sum(normalize_answer(answer) == prediction for answer in answers), len(answers))


def _score(matches: int, count: int) -> float:
    """Mean over the subsets that leave out one of `count` answers, `matches` of which match."""
    if count == 1:
        return float(matches)
    without_match = matches * min((matches - 1) / 3, 1.0)
    without_other = (count - matches) * min(matches / 3, 1.0)
    return (without_match + without_other) / count


# ---- training targets ----


def build_answer_vocabulary(answers: Iterable[Sequence[str]], num_answers: int) -> list[str]:
    """The most frequent normalised answers, most frequent first; equals in alphabetical order.

    Args:
        answers: the given answers of each question; every one counts, also repeated ones.
        num_answers: at most so many; the paper takes 3,129 for VQA v2 and 3,000 for VG-VQA Japanese.
    """
    if num_answers < 1:
        raise ValueError(f"num_answers is at least 1, found {num_answers}")
    counts = Counter(
        normalize_answer(answer)
        for given in answers
        for answer in ([given] if isinstance(given, str) else given)
    )
    counts.pop("", None)  # an answer of articles or punctuation alone is no class
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:num_answers]


def shared_answer_vocabulary(
    answers: Iterable[Sequence[str]], languages: Iterable[str], num_answers: int
) -> list[str]:
    """One head for several languages: the union of each language's `num_answers` most frequent answers.

    Languages come in order of their codes; an answer that several share ("2") is one class.
    """
    by_language: dict[str, list[Sequence[str]]] = defaultdict(list)
    for given, language in zip(answers, languages, strict=True):
        by_language[language].append(given)
    vocabularies = (build_answer_vocabulary(by_language[code], num_answers) for code in sorted(by_language))
    return list(dict.fromkeys(answer for vocabulary in vocabularies for answer in vocabulary))


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Each given answer, normalised, with its VQA accuracy: 0.3, 0.6, 0.9, 1 for 1, 2, 3, 4 of ten."""
    counts = Counter(map(normalize_answer, answers))
    return {answer: _score(count, len(answers)) for answer, count in counts.items()}


def soft_targets(answers: Sequence[str], vocabulary: Sequence[str] | Mapping[str, int]) -> np.ndarray:
    """`(len(vocabulary),)` float32: every class's VQA accuracy for the question.

    For ten answers these are the usual min(0.3 * count, 1); for a single answer, 0 or 1.

    Args:
        vocabulary: the answers in class order, or answer -> class.
    """
    classes = (
        vocabulary if isinstance(vocabulary, Mapping) else {name: i for i, name in enumerate(vocabulary)}
    )
    targets = np.zeros(len(classes), dtype=np.float32)
    for answer, score in answer_scores(answers).items():
        if answer in classes:
            targets[classes[answer]] = score
    return targets


# ---- evaluation ----


def most_frequent_answer(answers: Sequence[str]) -> str:
    """The answer most people gave, normalised; of equals, the one given first."""
    return Counter(map(normalize_answer, answers)).most_common(1)[0][0]


def derive_answer_type(answers: Sequence[str]) -> str:
    """VQA v2's types, from the most frequent answer: "yes/no", "number" or "other"."""
    answer = most_frequent_answer(answers)
    if answer in YES_NO:
        return "yes/no"
    return "number" if _NUMBER.fullmatch(answer) else "other"


def bleu_tokenizer(language: str) -> str:
    """sacrebleu's tokenizer for the language.

    Japanese needs MeCab (`pip install sacrebleu[ja]`, part of this package's requirements); without it single
    characters are compared, which is said in the log and in the results.
    """
    name = BLEU_TOKENIZERS.get(language, "13a")
    if name == "ja-mecab" and importlib.util.find_spec("MeCab") is None:
        logger.warning(
            "MeCab is not installed: Japanese BLEU compares characters (pip install 'sacrebleu[ja]')."
        )
        return "char"
    return name


def bleu(predictions: Sequence[str], answers: Sequence[Sequence[str]], tokenizer: str = "13a") -> float:
    """sacrebleu's corpus BLEU in per cent; all different answers of a question are its references.

    Answers are a word or two: n-gram orders longer than every answer do not count (effective order).
    """
    different = [list(dict.fromkeys(given)) for given in answers]
    most = max(map(len, different))
    # sacrebleu wants the first references of all questions, then the second ones, …; None where there is none
    references = [
        [given[place] if place < len(given) else None for given in different] for place in range(most)
    ]
    return BLEU(tokenize=tokenizer, effective_order=True).corpus_score(list(predictions), references).score


def evaluate_answers(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    languages: Sequence[str],
    answer_types: Sequence[str | None] | None = None,
) -> dict[str, dict]:
    """Scores in per cent, per language and answer type (paper Table 2).

    Returns:
        language -> `questions`, `vqa_score`, `accuracy` (the prediction is the most frequent answer), `bleu`,
        `bleu_tokenizer`, `constant_answer` and its `constant_vqa_score` (the best of all single answers to
        every question: what a model that sees neither question nor image can reach), and `answer_types`:
        type -> `questions`, `vqa_score`, `accuracy`. A missing type is derived from the answers.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, language in enumerate(languages):
        groups[language].append(row)
    scores = np.array([vqa_score(guess, given) for guess, given in zip(predictions, answers, strict=True)])
    right = np.array(
        [normalize_answer(guess) == most_frequent_answer(given)
         for guess, given in zip(predictions, answers, strict=True)]
    )  # fmt: skip
    types = [
        (answer_types[row] if answer_types else None) or derive_answer_type(given)
        for row, given in enumerate(answers)
    ]
    results = {}
    for language, rows in groups.items():
        tokenizer = bleu_tokenizer(language)
        constant, constant_score = best_constant_answer([answers[row] for row in rows])
        results[language] = _means(scores, right, rows) | {
            "bleu": bleu(
                [normalize_answer(predictions[row]) for row in rows],
                [list(map(normalize_answer, answers[row])) for row in rows],
                tokenizer,
            ),
            "bleu_tokenizer": tokenizer,
            "constant_answer": constant,
            "constant_vqa_score": 100 * constant_score,
            "answer_types": {
                name: _means(scores, right, [row for row in rows if types[row] == name])
                for name in sorted({types[row] for row in rows})
            },
        }
    return results


def _means(scores: np.ndarray, right: np.ndarray, rows: Sequence[int]) -> dict[str, float]:
    return {
        "questions": len(rows),
        "vqa_score": 100 * float(scores[rows].mean()),
        "accuracy": 100 * float(right[rows].mean()),
    }


def best_constant_answer(answers: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The one answer that scores best when given to every question, with its mean VQA accuracy."""
    totals: Counter = Counter()
    for given in answers:
        totals.update(answer_scores(given))
    best = min(totals, key=lambda answer: (-totals[answer], answer))
    return best, totals[best] / len(answers)
