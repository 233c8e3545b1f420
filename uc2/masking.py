"""The masking rules of UC2 (Zhou et al., CVPR 2021, section 3.3): pure functions of arrays and a generator.

They see captions without their special tokens and never change their arguments. Labels are always the
untouched ids; -100 marks positions that are not predicted.
"""

from collections.abc import Sequence

import numpy as np

IGNORE = -100
CO_MASKING_MODES = ("random", "full", "mix")
MASK, RANDOM, KEEP = range(3)

Span = tuple[int, int]


def _pick(size: int, probability: float, rng: np.random.Generator) -> np.ndarray:
    """(size,) bool: each position with `probability`, one random position where the draw picked none."""
    if size == 0:
        raise ValueError("nothing to mask: the sequence is empty")
    picked = rng.random(size) < probability
    if not picked.any():
        picked[rng.integers(size)] = True
    return picked


def _draw_treatments(size: int, rng: np.random.Generator) -> np.ndarray:
    """(size,) of MASK 80 %, RANDOM 10 %, KEEP 10 % (BERT's rule, section 3.3 "as MLM does")."""
    return np.digitize(rng.random(size), (0.8, 0.9))


def _replace(
    input_ids: np.ndarray,
    positions: np.ndarray,
    treatments: np.ndarray,
    rng: np.random.Generator,
    mask_token_id: int,
    vocabulary: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Apply one treatment to each of the positions. Returns new ids and labels, both (l,)."""
    masked, labels = input_ids.copy(), np.full_like(input_ids, IGNORE)
    labels[positions] = input_ids[positions]
    masked[positions[treatments == MASK]] = mask_token_id
    randomised = positions[treatments == RANDOM]
    masked[randomised] = vocabulary[rng.integers(len(vocabulary), size=len(randomised))]
    return masked, labels


def mask_tokens(
    input_ids: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_token_id: int,
    vocabulary: np.ndarray,
    probability: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Masked language modelling (MLM): predict 15 % of the sub-words, at least one.

    Of the predicted ones 80 % become `mask_token_id`, 10 % a random id of `vocabulary` (the ordinary ids,
    without special tokens), 10 % stay.

    Args: `input_ids` (l,) integer ids without special tokens, l >= 1.
    Returns: `masked_ids (l,)`, `labels (l,)`.
    """
    positions = np.flatnonzero(_pick(len(input_ids), probability, rng))
    treatments = _draw_treatments(len(positions), rng)
    return _replace(input_ids, positions, treatments, rng, mask_token_id, vocabulary)


def co_mask_tokens(
    pivot_ids: np.ndarray,
    other_ids: np.ndarray,
    pivot_spans: Sequence[Span],
    other_spans: Sequence[Span],
    links: Sequence[tuple[int, int]],
    rng: np.random.Generator,
    *,
    mask_token_id: int,
    vocabulary: np.ndarray,
    probability: float = 0.15,
    mode: str = "mix",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Visual translation language modelling (VTLM): mask a pivot caption and its translation together.

    Pivot sub-words are picked as in MLM. The words they belong to decide what is masked opposite:

    | mode   | pivot caption                    | each word linked to a picked pivot word |
    |--------|----------------------------------|------------------------------------------|
    | random | the picked sub-words             | one random sub-word                      |
    | full   | all sub-words of a picked word   | all sub-words                            |
    | mix    | half the pairs as `random`, half with both captions masked as MLM does, unrelated  |

    A pivot word without a link masks nothing opposite. A linked word shares the 80/10/10 treatment of its
    pivot word (the first one, if it has several), so that one side never gives the other away.

    Args:
        pivot_ids, other_ids: (l,), (m,) ids without special tokens.
        pivot_spans, other_spans: sub-word span [start, end) of each unit (`word_alignment.alignment_units`).
        links: pairs (pivot unit, other unit). Units beyond the spans (cut captions) are ignored.
    Returns: `masked_pivot (l,)`, `pivot_labels (l,)`, `masked_other (m,)`, `other_labels (m,)`.
    """
    if mode not in CO_MASKING_MODES:
        raise ValueError(f"co-masking mode is {mode!r}, expected one of {', '.join(CO_MASKING_MODES)}")
    tokens = {"mask_token_id": mask_token_id, "vocabulary": vocabulary}
    if mode == "mix" and rng.random() < 0.5:
        return (
            *mask_tokens(pivot_ids, rng, probability=probability, **tokens),
            *mask_tokens(other_ids, rng, probability=probability, **tokens),
        )
    positions = np.flatnonzero(_pick(len(pivot_ids), probability, rng))
    treatments = _draw_treatments(len(positions), rng)
    word_treatments = _treatments_by_word(positions, treatments, pivot_spans)
    if mode == "full":
        positions, treatments = _whole_words(word_treatments, pivot_spans, positions, treatments)
    linked = _linked_words(word_treatments, links, len(other_spans))
    other_positions, other_treatments = _opposite_positions(linked, other_spans, rng, whole=mode == "full")
    return (
        *_replace(pivot_ids, positions, treatments, rng, **tokens),
        *_replace(other_ids, other_positions, other_treatments, rng, **tokens),
    )


def _treatments_by_word(
    positions: np.ndarray, treatments: np.ndarray, spans: Sequence[Span]
) -> dict[int, int]:
    """{word: treatment of its first picked sub-word}, in order; sub-words outside every word are left out."""
    found = dict(zip(positions.tolist(), treatments.tolist(), strict=True))
    by_word: dict[int, int] = {}
    for word, (start, end) in enumerate(spans):
        for position in range(start, end):
            if position in found:
                by_word.setdefault(word, found[position])
    return by_word


def _whole_words(
    word_treatments: dict[int, int], spans: Sequence[Span], positions: np.ndarray, treatments: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Extend picked positions to all sub-words of their words, which then share one treatment."""
    chosen = dict(zip(positions.tolist(), treatments.tolist(), strict=True))
    for word, treatment in word_treatments.items():
        chosen.update((position, treatment) for position in range(*spans[word]))
    return np.array(list(chosen), dtype=np.int64), np.array(list(chosen.values()), dtype=np.int64)


def _linked_words(
    word_treatments: dict[int, int], links: Sequence[tuple[int, int]], num_other_words: int
) -> dict[int, int]:
    """{linked word of the other caption: treatment of its first picked pivot word}."""
    linked: dict[int, int] = {}
    for pivot_word, other_word in sorted(map(tuple, links)):
        if pivot_word in word_treatments and other_word < num_other_words:
            linked.setdefault(other_word, word_treatments[pivot_word])
    return linked


def _opposite_positions(
    linked: dict[int, int], spans: Sequence[Span], rng: np.random.Generator, *, whole: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sub-word positions to mask in the other caption, and their treatments."""
    chosen: dict[int, int] = {}
    for word, treatment in linked.items():
        start, end = spans[word]
        if start == end:
            continue  # nothing left of the word: it was cut off, or the tokenizer dropped it
        subwords = range(start, end) if whole else (int(rng.integers(start, end)),)
        chosen.update((position, treatment) for position in subwords)
    return np.array(list(chosen), dtype=np.int64), np.array(list(chosen.values()), dtype=np.int64)


def mask_regions(
    region_features: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: float = 0.15,
    zero_probability: float = 0.9,
) -> tuple[np.ndarray, np.ndarray]:
    """Masked region modelling (MRTM and its ablations): mask 15 % of the regions, at least one.

    The feature of a masked region is zeroed in 90 % of the cases and kept in 10 %.

    Args: `region_features` (n, F), n >= 1.
    Returns: `masked_features (n, F)` (a copy), `region_mask (n,)` bool, True for kept ones too, because the
    model adds its mask vector to both.
    """
    region_mask = _pick(len(region_features), probability, rng)
    zeroed = region_mask & (rng.random(len(region_features)) < zero_probability)
    masked = region_features.copy()
    masked[zeroed] = 0
    return masked, region_mask
