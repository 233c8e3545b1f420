"""What a pre-training example is about: objective, language, and whether caption and image belong together.

All draws are functions of (seed, key), computed for any number of keys at once, so that a sampler can know an
epoch's lengths without building its examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uc2.key_hash import hash_keys, uniform

# Independent streams of the random source; every attempt to find a distractor uses one more.
OBJECTIVE, LANGUAGE, MISMATCH, SIDE, DISTRACTOR = range(5)
MAX_ATTEMPTS = 64


class ObjectiveTable:
    """Which objective and language a row may draw.

    Rows that can serve the same languages for the same objectives are one *kind*; there are few kinds.

    Args:
        serves: {objective: (n, L) bool, the languages in which each row can serve it}.
        mix: {objective: weight > 0}. Weights are renormalised over what a row can serve, its language is
            drawn evenly among those that serve the objective.
    """

    def __init__(self, serves: Mapping[str, np.ndarray], mix: Mapping[str, float]):
        self.objectives = tuple(mix)
        stacked = np.stack([serves[objective] for objective in self.objectives], axis=1)  # (n, O, L)
        packed = np.packbits(stacked.reshape(len(stacked), -1), axis=1)
        _, first, self._kinds = np.unique(_as_scalars(packed), return_index=True, return_inverse=True)
        self._served = stacked[first]  # (kinds, O, L)
        weights = self._served.any(axis=2) * np.array([float(mix[name]) for name in self.objectives])
        totals = weights.sum(axis=1, keepdims=True)
        self._shares = np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)
        self._cumulative = self._shares.cumsum(axis=1)[:, :-1]  # the last bound is 1: never passed
        self._num_languages = self._served.sum(axis=2)
        # (kinds, O, L): the served languages first, in order.
        self._languages = np.argsort(~self._served, axis=2, kind="stable")

    def usable_rows(self) -> np.ndarray:
        """Indices of the rows that can serve an objective."""
        return np.flatnonzero((self._shares.sum(axis=1) > 0)[self._kinds])

    def shares(self, rows: np.ndarray) -> dict[str, float]:
        """Expected share of each objective among examples of these rows."""
        counts = np.bincount(self._kinds[rows], minlength=len(self._shares))
        return dict(zip(self.objectives, (counts @ self._shares / len(rows)).tolist(), strict=True))

    def draw(self, seed: int, keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m,) index into `objectives` and (m,) language index for each key and its row."""
        kinds = self._kinds[rows]
        passed = uniform(seed, keys, OBJECTIVE)[:, None] >= self._cumulative[kinds]
        # Rounding may leave a bound just below 1: then the last objective that has a share is meant.
        last = len(self.objectives) - 1 - (self._shares[:, ::-1] > 0).argmax(axis=1)
        objectives = np.minimum(passed.sum(axis=1), last[kinds])
        choice = (uniform(seed, keys, LANGUAGE) * self._num_languages[kinds, objectives]).astype(np.int64)
        return objectives, self._languages[kinds, objectives, choice]


def _as_scalars(packed: np.ndarray) -> np.ndarray:
    """(n, bytes) uint8 -> (n,) one opaque value per row, which `np.unique` sorts faster than rows."""
    return np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1])))[:, 0]


class Distractors:
    """Captions or images drawn to make mismatched pairs for ITM (section 3.3).

    Args:
        image_codes: (n,) which image each row is about.
        text_codes: (n, L) uint64, equal for equal captions of one language (whatever codes for missing ones).
        present: (n, L) bool, whether the caption exists.
    """

    def __init__(self, image_codes: np.ndarray, text_codes: np.ndarray, present: np.ndarray):
        self._image_codes, self._text_codes = image_codes, text_codes
        languages, rows = np.nonzero(present.T)
        # The rows that have a caption, language after language; where each language starts.
        self._rows_with = rows.astype(np.int32)
        self._starts = np.searchsorted(languages, np.arange(present.shape[1] + 1))
        self._true_pairs = np.sort(_pair_codes(text_codes[rows, languages], image_codes[rows]))

    def draw(
        self, seed: int, keys: np.ndarray, rows: np.ndarray, languages: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Replace the caption or the image, each half the time, by another row's that does not truly match.

        A caption truly matches an image if any row of that image has the same text. A key for which no
        distractor is found in 64 attempts (captions are all alike, say) stays a matching pair.

        Returns: `text_rows (m,)`, `image_codes (m,)`, `found (m,)` bool.
        """
        text_rows, image_codes = rows.copy(), self._image_codes[rows]
        found = np.zeros(len(keys), dtype=bool)
        replaces_image = uniform(seed, keys, SIDE) < 0.5
        pending = np.arange(len(keys))
        for attempt in range(MAX_ATTEMPTS):
            if not len(pending):
                break
            candidates = self._candidates(seed, keys[pending], languages[pending], DISTRACTOR + attempt)
            texts = np.where(replaces_image[pending], rows[pending], candidates)
            images = self._image_codes[np.where(replaces_image[pending], candidates, rows[pending])]
            good = ~self._match(texts, languages[pending], images)
            chosen = pending[good]
            text_rows[chosen], image_codes[chosen], found[chosen] = texts[good], images[good], True
            pending = pending[~good]
        return text_rows, image_codes, found

    def _candidates(self, seed: int, keys: np.ndarray, languages: np.ndarray, stream: int) -> np.ndarray:
        """(m,) random rows that have a caption in the language."""
        starts = self._starts[languages]
        counts = (self._starts[languages + 1] - starts).astype(np.uint64)
        return self._rows_with[starts + (hash_keys(seed, keys, stream) % counts).astype(np.int64)]

    def _match(self, text_rows: np.ndarray, languages: np.ndarray, image_codes: np.ndarray) -> np.ndarray:
        """(m,) bool: whether some row of the image has this caption text."""
        codes = _pair_codes(self._text_codes[text_rows, languages], image_codes)
        places = np.searchsorted(self._true_pairs, codes)
        return self._true_pairs[np.minimum(places, len(self._true_pairs) - 1)] == codes


def _pair_codes(text_codes: np.ndarray, image_codes: np.ndarray) -> np.ndarray:
    """(m,) uint64 codes of (caption text, image) pairs; `text_codes` are already well mixed."""
    return text_codes + image_codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Draws:
    """What m examples are about, arrays of shape (m,)."""

    objectives: Sequence[str]
    objective_indices: np.ndarray  # into `objectives`
    languages: np.ndarray  # index of the (second) caption's language
    text_rows: np.ndarray  # row the captions come from
    image_codes: np.ndarray
    matches: np.ndarray  # ITM: 1 match, 0 not; other objectives: -100
