"""Says a scene's `Description` in English, German, French, Czech, Japanese or Chinese.

One small grammar a language: noun phrases with agreement and case, a relation clause, a listing clause.
Every grammar offers `listing(items, setting)`, `relation(first, name, second)` and `also(items)`; the first
two return several wordings of the same facts, of which `describe` takes one.
"""

from __future__ import annotations

from collections.abc import Sequence

from uc2.scene_layout import Description, Item
from uc2.scene_lexicon import COLOUR_WORDS, NOUNS, SETTING_PHRASES, SIZE_WORDS


def describe(description: Description, language: str, wording: int = 0) -> str:
    """The caption; `wording` (any non-negative int) chooses among the ways to say it.

    Raises KeyError for a language without a grammar; `GRAMMARS` lists them.
    """
    grammar, items = GRAMMARS[language], description.items
    if not description.relations:
        return _choose(grammar.listing(items, description.setting), wording)
    clauses = [
        _choose(grammar.relation(items[i], name, items[j]), wording + n)
        for n, (i, name, j) in enumerate(description.relations)
    ]
    related = {index for i, _, j in description.relations for index in (i, j)}
    rest = [item for index, item in enumerate(items) if index not in related]
    if rest:
        clauses.append(grammar.also(rest))
    return grammar.join_clauses(clauses)


def _choose(wordings: Sequence[str], wording: int) -> str:
    return wordings[wording % len(wordings)]


def _enumerate(phrases: Sequence[str], last: str, comma: str = ", ") -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(phrases) == 1:
        return phrases[0]
    return comma.join(phrases[:-1]) + last + phrases[-1]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


class English:
    """Article by the next sound; size before colour before noun."""

    relations = {
        "left": "to the left of",
        "right": "to the right of",
        "above": "above",
        "below": "below",
        "next": "next to",
    }

    def noun_phrase(self, item: Item) -> str:
        words = [SIZE_WORDS[item.size].en] if item.size else []
        words += [COLOUR_WORDS[item.colour].en, NOUNS[item.kind].en]
        return f"{indefinite_article(words[0])} {' '.join(words)}"

    def listing(self, items: Sequence[Item], setting: str | None) -> list[str]:
        things = _enumerate([self.noun_phrase(item) for item in items], " and ")
        place = SETTING_PHRASES[setting]["en"] if setting else ""
        front = f"{place} there is {things}" if place else f"in the picture there is {things}"
        return [
            _sentence(front),
            _sentence(f"there is {things} {place}".strip()),
            _sentence(f"you can see {things} {place}".strip()),
        ]

    def relation(self, first: Item, name: str, second: Item) -> list[str]:
        a, b, where = self.noun_phrase(first), self.noun_phrase(second), self.relations[name]
        return [f"{a} is {where} {b}", f"{where} {b} there is {a}"]

    def also(self, items: Sequence[Item]) -> str:
        return f"there is also {_enumerate([self.noun_phrase(item) for item in items], ' and ')}"

    def join_clauses(self, clauses: Sequence[str]) -> str:
        return _sentence(_enumerate(clauses, ", and "))


def indefinite_article(word: str) -> str:
    """ "an" before a vowel letter, which is right for every word of the lexicon."""
    return "an" if word[0] in "aeiou" else "a"


class German:
    """Gender, mixed adjective declension, V2 order; relations govern the dative."""

    articles = {
        "nom": {"m": "ein", "f": "eine", "n": "ein"},
        "acc": {"m": "einen", "f": "eine", "n": "ein"},
        "dat": {"m": "einem", "f": "einer", "n": "einem"},
    }
    endings = {
        "nom": {"m": "er", "f": "e", "n": "es"},
        "acc": {"m": "en", "f": "e", "n": "es"},
        "dat": {"m": "en", "f": "en", "n": "en"},
    }
    relations = {
        "left": "links von",
        "right": "rechts von",
        "above": "über",
        "below": "unter",
        "next": "neben",
    }

    def noun_phrase(self, item: Item, case: str = "nom") -> str:
        noun = NOUNS[item.kind]
        stems = [SIZE_WORDS[item.size].de] if item.size else []
        stems.append(COLOUR_WORDS[item.colour].de)
        adjectives = [stem + self.endings[case][noun.de_gender] for stem in stems]
        return " ".join([self.articles[case][noun.de_gender], *adjectives, noun.de])

    def listing(self, items: Sequence[Item], setting: str | None) -> list[str]:
        subject = _enumerate([self.noun_phrase(item) for item in items], " und ")
        seen = _enumerate([self.noun_phrase(item, "acc") for item in items], " und ")
        place = SETTING_PHRASES[setting]["de"] if setting else "auf dem Bild"
        front = f"{place} sind {subject} zu sehen"
        return [
            _sentence(front),
            _sentence(f"{place} sieht man {seen}"),
            _sentence(f"{place} gibt es {seen}"),
        ]

    def relation(self, first: Item, name: str, second: Item) -> list[str]:
        a, b, where = self.noun_phrase(first), self.noun_phrase(second, "dat"), self.relations[name]
        return [f"{a} ist {where} {b}", f"{where} {b} ist {a}"]

    def also(self, items: Sequence[Item]) -> str:
        return f"es gibt auch {_enumerate([self.noun_phrase(item, 'acc') for item in items], ' und ')}"

    def join_clauses(self, clauses: Sequence[str]) -> str:
        return _sentence(_enumerate(clauses, " und "))


class French:
    """Gender agreement; size before the noun, colour after it; "de" elides before a vowel."""

    relations = {
        "left": "à gauche d'",
        "right": "à droite d'",
        "above": "au-dessus d'",
        "below": "au-dessous d'",
        "next": "à côté d'",
    }

    def noun_phrase(self, item: Item) -> str:
        noun = NOUNS[item.kind]
        form = "mf".index(noun.fr_gender)
        words = [("un", "une")[form]]
        if item.size:
            words.append(SIZE_WORDS[item.size].fr[form])
        return " ".join([*words, noun.fr, COLOUR_WORDS[item.colour].fr[form]])

    def listing(self, items: Sequence[Item], setting: str | None) -> list[str]:
        things = _enumerate([self.noun_phrase(item) for item in items], " et ")
        place = SETTING_PHRASES[setting]["fr"] if setting else "sur l'image"
        return [
            _sentence(f"{place}, il y a {things}"),
            _sentence(f"{place}, on voit {things}"),
            _sentence(f"il y a {things} {place}"),
        ]

    def relation(self, first: Item, name: str, second: Item) -> list[str]:
        a, where = self.noun_phrase(first), self.relations[name] + self.noun_phrase(second)
        return [f"{a} est {where}", f"{where}, il y a {a}"]

    def also(self, items: Sequence[Item]) -> str:
        return f"il y a aussi {_enumerate([self.noun_phrase(item) for item in items], ' et ')}"

    def join_clauses(self, clauses: Sequence[str]) -> str:
        return _sentence(_enumerate(clauses, ", et "))


class Czech:
    """No article; adjectives agree in gender, animacy and case; relations govern genitive or instrumental."""

    cases = ("nom", "gen", "acc", "ins")
    endings = {
        "nom": {"m": "ý", "ma": "ý", "f": "á", "n": "é"},
        "gen": {"m": "ého", "ma": "ého", "f": "é", "n": "ého"},
        "acc": {"m": "ý", "ma": "ého", "f": "ou", "n": "é"},
        "ins": {"m": "ým", "ma": "ým", "f": "ou", "n": "ým"},
    }
    relations = {
        "left": ("vlevo od", "gen"),
        "right": ("vpravo od", "gen"),
        "above": ("nad", "ins"),
        "below": ("pod", "ins"),
        "next": ("vedle", "gen"),
    }

    def noun_phrase(self, item: Item, case: str = "nom") -> str:
        noun = NOUNS[item.kind]
        stems = [SIZE_WORDS[item.size].cs] if item.size else []
        stems.append(COLOUR_WORDS[item.colour].cs)
        adjectives = [stem + self.endings[case][noun.cs_gender] for stem in stems]
        return " ".join([*adjectives, noun.cs[self.cases.index(case)]])

    def listing(self, items: Sequence[Item], setting: str | None) -> list[str]:
        subject = _enumerate([self.noun_phrase(item) for item in items], " a ")
        seen = _enumerate([self.noun_phrase(item, "acc") for item in items], " a ")
        place = SETTING_PHRASES[setting]["cs"] if setting else "na obrázku"
        return [
            _sentence(f"{place} je {subject}"),
            _sentence(f"{place} vidíme {seen}"),
            _sentence(f"{place} je vidět {subject}"),
        ]

    def relation(self, first: Item, name: str, second: Item) -> list[str]:
        where, case = self.relations[name]
        a, b = self.noun_phrase(first), self.noun_phrase(second, case)
        return [f"{a} je {where} {b}", f"{where} {b} je {a}"]

    def also(self, items: Sequence[Item]) -> str:
        return f"je tam také {_enumerate([self.noun_phrase(item) for item in items], ' a ')}"

    def join_clauses(self, clauses: Sequence[str]) -> str:
        return _sentence(_enumerate(clauses, " a "))


class Japanese:
    """Modifiers before the noun, と between nouns, の before a place, に or が by role.

    います is for what is alive, あります for the rest; a list that mixes the two takes 見えます.
    """

    relations = {"left": "左", "right": "右", "above": "上", "below": "下", "next": "隣"}

    def noun_phrase(self, item: Item) -> str:
        size = SIZE_WORDS[item.size].ja[1] if item.size else ""
        return size + COLOUR_WORDS[item.colour].ja[1] + NOUNS[item.kind].ja

    def exist(self, items: Sequence[Item]) -> str:
        alive = {NOUNS[item.kind].alive for item in items}
        if len(alive) > 1:
            return "見えます"
        return "います" if alive.pop() else "あります"

    def listing(self, items: Sequence[Item], setting: str | None) -> list[str]:
        things = "と".join(self.noun_phrase(item) for item in items)
        place = SETTING_PHRASES[setting]["ja"] if setting else "絵の中に"
        return [
            f"{place}{things}が{self.exist(items)}。",
            f"{place}{things}が見えます。",
            f"{place}は{things}が{self.exist(items)}。",
        ]

    def relation(self, first: Item, name: str, second: Item) -> list[str]:
        a, where = self.noun_phrase(first), f"{self.noun_phrase(second)}の{self.relations[name]}"
        return [f"{a}が{where}に{self.exist([first])}", f"{where}に{a}が{self.exist([first])}"]

    def also(self, items: Sequence[Item]) -> str:
        return f"{'と'.join(self.noun_phrase(item) for item in items)}も{self.exist(items)}"

    def join_clauses(self, clauses: Sequence[str]) -> str:
        return "".join(clause + "。" for clause in clauses)


class Chinese:
    """Numeral, measure word, colour with 的, size next to the noun."""

    relations = {"left": "左边", "right": "右边", "above": "上方", "below": "下方", "next": "旁边"}

    def noun_phrase(self, item: Item) -> str:
        noun = NOUNS[item.kind]
        size = SIZE_WORDS[item.size].zh if item.size else ""
        return f"一{noun.zh_measure}{COLOUR_WORDS[item.colour].zh}的{size}{noun.zh}"

    def listing(self, items: Sequence[Item], setting: str | None) -> list[str]:
        things = _enumerate([self.noun_phrase(item) for item in items], "和", "、")
        place = SETTING_PHRASES[setting]["zh"] if setting else "图中"
        return [f"{place}有{things}。", f"{place}可以看到{things}。", f"在{place}能看到{things}。"]

    def relation(self, first: Item, name: str, second: Item) -> list[str]:
        a, where = self.noun_phrase(first), f"{self.noun_phrase(second)}的{self.relations[name]}"
        return [f"{a}在{where}", f"{where}有{a}"]

    def also(self, items: Sequence[Item]) -> str:
        return f"还有{_enumerate([self.noun_phrase(item) for item in items], '和', '、')}"

    def join_clauses(self, clauses: Sequence[str]) -> str:
        return "，".join(clauses) + "。"


GRAMMARS = {
    "en": English(),
    "de": German(),
    "fr": French(),
    "cs": Czech(),
    "ja": Japanese(),
    "zh": Chinese(),
}


def unspaced_words() -> set[str]:
    """The Japanese and Chinese words that carry meaning: what a sub-word should not reach over."""
    adjectives = [*COLOUR_WORDS.values(), *SIZE_WORDS.values()]
    words = {form for adjective in adjectives for form in (adjective.ja[1], adjective.zh)}
    words |= {form for noun in NOUNS.values() for form in (noun.ja, noun.zh, f"一{noun.zh_measure}")}
    words |= {phrases[language] for phrases in SETTING_PHRASES.values() for language in ("ja", "zh")}
    return words.union(Japanese.relations.values(), Chinese.relations.values())
