"""Sanity checks of machine translations: a caption that fails one is left out of the corpus and reported."""

import re
import unicodedata
from collections import Counter

# Characters of a translation per character of its English source, measured on caption corpora; 1 elsewhere.
LENGTH_RATIOS = {"ja": 0.45, "zh": 0.32, "ko": 0.5, "th": 0.9, "ar": 0.85, "he": 0.8}

# First words of the Unicode names of the letters a language is written with. Not listed: not checked.
SCRIPTS = {
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "zh": ("CJK",),
    "ko": ("HANGUL", "CJK"),
    "ru": ("CYRILLIC",),
    "uk": ("CYRILLIC",),
    "bg": ("CYRILLIC",),
    "el": ("GREEK",),
    "ar": ("ARABIC",),
    "fa": ("ARABIC",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
} | dict.fromkeys(
    "cs da de en es fi fr hu id it nl no pl pt ro sk sv sw tr vi".split(), ("LATIN", "MODIFIER", "FEMININE")
)

LENGTH_SLACK = 12
"""Characters by which a translation may always miss the expected length: short texts vary freely."""

COPY_MIN_WORDS = 3
"""From this many words on, a translation equal to its source is a copy; "Taxi" is a translation of "taxi"."""

# A piece of 2 to 40 characters four times in a row: what a decoder that is stuck produces.
_STUCK = re.compile(r"(.{2,40}?)\1{3}", re.DOTALL)


def rejection(source: str, translation: str, language: str, *, length_ratio: float = 3.0) -> str | None:
    """Why `translation` cannot stand beside `source`, in a word; None if it can.

    | reason          | the translation …                                                                |
    |-----------------|----------------------------------------------------------------------------------|
    | empty           | has no letter and no digit                                                       |
    | script          | has fewer than half its letters in the scripts of `language`; or kana in Chinese |
    | copied_source   | is the source again, which has at least three words                              |
    | repetition      | says the same piece four times in a row                                          |
    | length_ratio    | is `length_ratio` times longer or shorter than is usual for `language`           |
    """
    if not any(character.isalnum() for character in translation):
        return "empty"
    if not has_script(translation, language):
        return "script"
    if len(source.split()) >= COPY_MIN_WORDS and _letters(source) == _letters(translation):
        return "copied_source"
    if _STUCK.search(translation) and not _STUCK.search(source):
        return "repetition"
    expected = len(source) * LENGTH_RATIOS.get(language, 1.0)
    ratio = len(translation) / expected
    if abs(len(translation) - expected) > LENGTH_SLACK and not 1 / length_ratio <= ratio <= length_ratio:
        return "length_ratio"
    return None


def has_script(text: str, language: str) -> bool:
    """Whether at least half the letters of `text` belong to the scripts of `language` (True if unknown)."""
    scripts = SCRIPTS.get(language)
    found = Counter(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in text if letter.isalpha())
    if scripts is None or not found:
        return True
    if language == "zh" and found["HIRAGANA"] + found["KATAKANA"]:
        return False
    return 2 * sum(found[script] for script in scripts) >= found.total()


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())
