"""PretrainingDataset: parallel captions + regions -> one example of one objective per key (section 3.3)."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property

import datasets
import numpy as np
from tqdm.auto import tqdm

from modeling_uc2.configuration_uc2 import OBJECTIVES
from uc2.caption_tokens import CaptionTokens
from uc2.data_error import DataError
from uc2.masking import CO_MASKING_MODES, IGNORE, co_mask_tokens, mask_regions, mask_tokens
from uc2.object_labels import LabelTokens
from uc2.pretraining_draws import MISMATCH, Distractors, Draws, ObjectiveTable, uniform

logger = logging.getLogger(__name__)

PAPER_MIX = {"itm": 9, "mlm": 12, "mrtm": 9, "vtlm": 3}
"""Relative frequency of the objectives in the paper's configuration."""

PAIR_OBJECTIVES = ("vtlm", "tlm")
REGION_OBJECTIVES = ("mrtm", "mrc", "mrc_kl", "mrfr")

# Label of a special token, which is never predicted.
_EDGE = np.array([IGNORE])


class PretrainingDataset:
    """Examples of the pre-training objectives, one objective per example.

    `dataset[key]` with `key = epoch * len(dataset) + row` is a function of (seed, key) alone, so that
    resumed, re-sharded and multi-process runs see the same stream. Its objective is drawn from
    `objective_mix`, renormalised over what the row can serve; its language evenly over those that serve it.

    | objective | text                               | regions     | target                                |
    |-----------|------------------------------------|-------------|---------------------------------------|
    | mlm       | 15 % masked                        | visible     | the masked sub-words                  |
    | itm       | visible; half the pairs mismatched | visible     | match or not                          |
    | mrtm      | visible                            | 15 % masked | a sub-word of the detected class name |
    | vtlm      | pivot + another one, co-masked     | visible     | the masked sub-words                  |
    | tlm       | pivot + another one, co-masked     | none        | the masked sub-words                  |
    | mrc       | visible                            | 15 % masked | the detected class                    |
    | mrc_kl    | visible                            | 15 % masked | the detector's class probabilities    |
    | mrfr      | visible                            | 15 % masked | the masked features                   |

    The class name that mrtm reads is the one in the caption's language.

    Args:
        captions: rows of `uc2.rows.load_parallel_captions`.
        region_store: mapping from image id to region row (`uc2.region_store.RegionStore`).
        processor: UC2Processor, for the tokenizer, the selection of regions and the pair layout.
        object_labels: class names by language, or a LabelTokens; only mrtm needs them. None takes the
            processor's.
        seed: >= 0.
        objective_mix: {objective: relative frequency}; zero leaves an objective out.
        languages: languages to draw from; None takes all of the captions.
        pivot_language: first caption of vtlm and tlm; the alignments must start from it.
        mlm_probability, mrtm_probability: share of sub-words and of regions that are masked.
        co_masking: "random", "full" or "mix" (`uc2.masking.co_mask_tokens`).
        itm_negative_share: share of ITM pairs that do not match.
        max_text_length: captions are cut to so many sub-words, special tokens not counted.
        num_proc: processes that tokenize the captions.

    Raises:
        ValueError: an option is out of range, or no row can serve an objective of the mix.
        DataError: an image is not in the store, or an alignment does not fit its captions.
    """

    def __init__(
        self,
        captions: datasets.Dataset,
        region_store: Mapping,
        processor,
        object_labels: LabelTokens | Mapping[str, Sequence[str]] | None = None,
        *,
        seed: int,
        objective_mix: Mapping[str, float] | None = None,
        languages: Sequence[str] | None = None,
        pivot_language: str = "en",
        mlm_probability: float = 0.15,
        mrtm_probability: float = 0.15,
        co_masking: str = "mix",
        itm_negative_share: float = 0.5,
        max_text_length: int = 60,
        num_proc: int | None = None,
    ):
        self.seed, self.co_masking, self.pivot_language = seed, co_masking, pivot_language
        self.mlm_probability, self.mrtm_probability = mlm_probability, mrtm_probability
        self.itm_negative_share, self.max_text_length = itm_negative_share, max_text_length
        self._check_options()
        mix = _checked_mix(PAPER_MIX if objective_mix is None else objective_mix)
        self.region_store, self.processor = region_store, processor
        self.languages = tuple(captions.features["captions"] if languages is None else languages)
        self._label_tokens = _label_tokens(object_labels, processor) if "mrtm" in mix else None
        self._texts = CaptionTokens(
            captions,
            processor.tokenizer,
            self.languages,
            pivot_language=pivot_language,
            max_length=max_text_length,
            num_proc=num_proc,
        )
        self._text_lengths = self._texts.lengths()
        self._image_ids, image_codes = _image_codes(captions, region_store)
        self._table = ObjectiveTable(self._serves(mix), mix)
        self._rows = self._table.usable_rows()
        self._check_every_objective_is_served(mix, image_codes)
        self._image_codes = image_codes
        self._distractors = Distractors(image_codes, self._texts.text_codes(), self._text_lengths > 0)
        tokenizer = processor.tokenizer
        # Kept apart: the tokenizer looks up its special ids anew at every access, which is slow.
        self._pad_token_id = tokenizer.pad_token_id
        self._start_of_text = np.array([tokenizer.bos_token_id])
        self._end_of_text = np.array([tokenizer.eos_token_id])
        self._replacements = {
            "mask_token_id": tokenizer.mask_token_id,
            "vocabulary": np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids),
        }
        self._report()

    # --- construction ---

    def _check_options(self) -> None:
        for name in ("mlm_probability", "mrtm_probability", "itm_negative_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a probability")
        if self.co_masking not in CO_MASKING_MODES:
            choices = ", ".join(CO_MASKING_MODES)
            raise ValueError(f"co_masking is {self.co_masking!r}, expected one of {choices}")
        if self.seed < 0 or self.max_text_length < 1:
            raise ValueError(
                f"seed is {self.seed}, max_text_length {self.max_text_length}; expected >= 0 and >= 1"
            )

    def _serves(self, mix: Mapping[str, float]) -> dict[str, np.ndarray]:
        """{objective: (n, L) bool}: the languages in which each row can serve it."""
        present = self._text_lengths > 0
        serves = {objective: present for objective in mix}
        for objective in set(mix) & set(PAIR_OBJECTIVES):
            serves[objective] = self._pairable(present)
        if "mrtm" in mix:
            labelled = np.array([language in self._label_tokens.languages for language in self.languages])
            serves["mrtm"] = present & labelled
        if "mrc_kl" in mix and self.region_store.num_classes is None:
            serves["mrc_kl"] = np.zeros_like(present)
        # Without object classes, as on a grid, the rows' are fillers.
        unserved = [] if self.region_store.has_classes else ["mrtm", "mrc", "mrc_kl"]
        return serves | {objective: np.zeros_like(present) for objective in unserved if objective in mix}

    def _pairable(self, present: np.ndarray) -> np.ndarray:
        """(n, L) bool: whether the row has this caption, the pivot's, and an alignment of the two."""
        if self.pivot_language not in self.languages:
            return np.zeros_like(present)
        has_pivot = present[:, [self.languages.index(self.pivot_language)]]
        return present & has_pivot & self._texts.aligned()

    def _check_every_objective_is_served(self, mix: Mapping[str, float], image_codes: np.ndarray) -> None:
        needs = {
            "vtlm": f"captions in '{self.pivot_language}' and another language with an alignment",
            "mrtm": "regions with object classes, and object labels in a language of the captions",
            "mrc": "regions with object classes",
            "mrc_kl": "regions with object classes and class probabilities",
            "itm": "at least two images",
        }
        shares = self._table.shares(self._rows) if len(self._rows) else dict.fromkeys(mix, 0.0)
        if "itm" in mix and self.itm_negative_share and image_codes.max(initial=0) == 0:
            shares["itm"] = 0.0
        for objective, share in shares.items():
            if share == 0:
                need = needs.get("vtlm" if objective == "tlm" else objective, "a caption")
                raise ValueError(
                    f"objective '{objective}' has weight {mix[objective]}, but no row can serve it: it needs "
                    f"{need} (languages: {', '.join(self.languages)})"
                )

    def _report(self) -> None:
        total = len(self._text_lengths)
        if len(self) < total:
            logger.warning("%d of %d rows serve no objective and are left out", total - len(self), total)
        if self._label_tokens is not None:
            missing = [code for code in self.languages if code not in self._label_tokens.languages]
            if missing:
                logger.warning("no object labels in %s: mrtm leaves these languages out", ", ".join(missing))
        shares = (f"{objective} {share:.1%}" for objective, share in self.achieved_mix().items())
        logger.info("%d rows; objectives: %s", len(self), ", ".join(shares))

    def achieved_mix(self) -> dict[str, float]:
        """Expected share of each objective, after renormalising over what each row can serve."""
        return self._table.shares(self._rows)

    # --- draws and lengths ---

    def __len__(self) -> int:
        return len(self._rows)

    def _draw(self, keys: np.ndarray) -> Draws:
        rows = self._rows[keys % len(self)]
        objectives, languages = self._table.draw(self.seed, keys, rows)
        text_rows, image_codes = rows.copy(), self._image_codes[rows]
        matches = np.full(len(keys), IGNORE)
        if "itm" in self._table.objectives:
            itm = objectives == self._table.objectives.index("itm")
            matches[itm] = 1
            wrong = np.flatnonzero(itm & (uniform(self.seed, keys, MISMATCH) < self.itm_negative_share))
            if len(wrong):
                found = self._distractors.draw(self.seed, keys[wrong], rows[wrong], languages[wrong])
                text_rows[wrong], image_codes[wrong], matches[wrong] = found[0], found[1], ~found[2]
        return Draws(self._table.objectives, objectives, languages, text_rows, image_codes, matches)

    @cached_property
    def _region_counts(self) -> np.ndarray:
        """(number of images,) regions that the processor keeps of each image."""
        select, scores = self.processor.select_regions, self.region_store.class_scores
        ids = tqdm(self._image_ids.to_pylist(), "counting regions", disable=len(self._image_ids) < 100_000)
        return np.fromiter((len(select(scores(image_id))) for image_id in ids), np.int32)

    def lengths(self, keys: np.ndarray) -> np.ndarray:
        """(m, 2): number of text tokens, special ones included, and of regions of each key's example."""
        draws = self._draw(np.asarray(keys))
        text = self._text_lengths[draws.text_rows, draws.languages] + 2
        regions = self._region_counts[draws.image_codes]
        for objective in set(draws.objectives) & set(PAIR_OBJECTIVES):
            chosen = draws.objective_indices == draws.objectives.index(objective)
            pivot = self.languages.index(self.pivot_language)
            text[chosen] += self._text_lengths[draws.text_rows[chosen], pivot] + 2
            if objective == "tlm":
                regions[chosen] = 0
        return np.stack([text, regions], axis=1)

    def length(self, key: int) -> tuple[int, int]:
        """(number of text tokens, number of regions) of `dataset[key]`, without building it."""
        text, regions = self.lengths(np.array([key]))[0].tolist()
        return text, regions

    # --- examples ---

    def __getitem__(self, key: int) -> dict:
        if key < 0:
            raise IndexError(f"key {key}; expected epoch * {len(self)} + row, which is not negative")
        draws = self._draw(np.array([key]))
        rng = np.random.default_rng((self.seed, int(key)))
        objective = draws.objectives[draws.objective_indices[0]]
        row, language = int(draws.text_rows[0]), self.languages[draws.languages[0]]
        example = self._text(objective, row, language, rng)
        example |= self._regions(objective, int(draws.image_codes[0]), language, rng)
        example["itm_label"] = int(draws.matches[0])
        example["objective_id"] = OBJECTIVES.index(objective)
        example["language_id"] = int(draws.languages[0])
        example["example_id"] = int(key)
        return example

    def image_id(self, key: int) -> str:
        """The image whose regions `dataset[key]` shows (the batch names its keys as `example_ids`)."""
        return self._image_ids[int(self._draw(np.array([key])).image_codes[0])].as_py()

    def _text(self, objective: str, row: int, language: str, rng: np.random.Generator) -> dict:
        """`input_ids`, `position_ids` and `labels`, special tokens included."""
        ids = self._texts.ids(row, language)
        if objective in PAIR_OBJECTIVES:
            return self._caption_pair(row, language, ids, rng)
        labels = np.full(len(ids), IGNORE)
        if objective == "mlm":
            ids, labels = mask_tokens(ids, rng, probability=self.mlm_probability, **self._replacements)
        first = self._pad_token_id + 1
        return {
            "input_ids": np.concatenate([self._start_of_text, ids, self._end_of_text]),
            "position_ids": np.arange(first, first + len(ids) + 2),
            "labels": np.concatenate([_EDGE, labels, _EDGE]),
        }

    def _caption_pair(self, row: int, language: str, ids: np.ndarray, rng: np.random.Generator) -> dict:
        pivot_ids, pivot_labels, other_ids, other_labels = co_mask_tokens(
            self._texts.ids(row, self.pivot_language),
            ids,
            self._texts.spans(row, self.pivot_language),
            self._texts.spans(row, language),
            self._texts.links(row, language),
            rng,
            probability=self.mlm_probability,
            mode=self.co_masking,
            **self._replacements,
        )
        input_ids, position_ids = self.processor.join_pair(pivot_ids, other_ids)
        labels = np.concatenate([_EDGE, pivot_labels, _EDGE, _EDGE, other_labels, _EDGE])
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def _regions(self, objective: str, image_code: int, language: str, rng: np.random.Generator) -> dict:
        """Region inputs, `region_mask` and the targets of the objectives that mask regions."""
        if objective == "tlm":
            size = self.region_store.feature_size
            features, boxes = np.zeros((0, size), np.float16), np.zeros((0, 4), np.float32)
            return _region_example(features, boxes)
        region = self.region_store[self._image_ids[image_code].as_py()]
        encoded = self.processor.encode_regions(region)
        features, boxes = encoded["region_features"], encoded["region_boxes"]
        if objective not in REGION_OBJECTIVES:
            return _region_example(features, boxes)
        masked_features, mask = mask_regions(features, rng, probability=self.mrtm_probability)
        example = _region_example(masked_features, boxes) | {"region_mask": mask}
        kept = self.processor.select_regions(region.class_scores)
        if objective == "mrtm":
            example["region_labels"][mask] = self._label_subwords(region, kept[mask], language, rng)
        elif objective == "mrc":
            example["region_class_labels"] = np.where(mask, region.class_ids[kept], IGNORE)
        elif objective == "mrc_kl":
            example["region_class_probs"] = region.class_probs[kept] * mask[:, None]
        else:
            example["region_feature_targets"] = features
        return example

    def _label_subwords(
        self, region, regions: np.ndarray, language: str, rng: np.random.Generator
    ) -> list[int]:
        """One random sub-word of each region's class name."""
        names = (self._label_tokens.ids(int(class_id), language) for class_id in region.class_ids[regions])
        return [int(name[rng.integers(len(name))]) for name in names]


def _region_example(features: np.ndarray, boxes: np.ndarray) -> dict:
    return {
        "region_features": features,
        "region_boxes": boxes,
        "region_mask": np.zeros(len(features), dtype=bool),
        "region_labels": np.full(len(features), IGNORE),
    }


def _checked_mix(mix: Mapping[str, float]) -> dict[str, float]:
    for objective, weight in mix.items():
        if objective not in OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; choices: {', '.join(OBJECTIVES)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"objective '{objective}' has weight {weight}, expected a number >= 0")
    positive = {objective: weight for objective, weight in mix.items() if weight > 0}
    if not positive:
        raise ValueError("objective_mix has no objective with a weight above 0")
    return positive


def _label_tokens(object_labels, processor) -> LabelTokens:
    labels = processor.object_labels if object_labels is None else object_labels
    if labels is None:
        raise ValueError("objective 'mrtm' needs object_labels, given to the dataset or to the processor")
    return LabelTokens(labels, processor.tokenizer) if isinstance(labels, Mapping) else labels


def _image_codes(captions: datasets.Dataset, region_store: Mapping):
    """The distinct image ids as an Arrow array, and for each row (n,) int32 the index of its image in it."""
    column = captions.select_columns("image_id").with_format("arrow")[:]["image_id"]
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy().astype(np.int32)
    for code, image_id in enumerate(encoded.dictionary.to_pylist()):
        if image_id not in region_store:
            raise DataError(
                row=int(np.argmax(codes == code)) + 1,
                field="image_id",
                found=image_id,
                expected="an image of the region store",
            )
    return encoded.dictionary, codes
