"""One collator for pre-training, retrieval and VQA: pads every known key of encoded examples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class _Key:
    """How one key of an example becomes one tensor of the batch.

    `length` names what its first axis runs along: "text" or "regions" (padded to the longest of the batch),
    "fixed" (equally long everywhere) or None (a scalar). `fill` pads, and stands in where an example lacks
    the key; the fill "pad_token_id" is the tokenizer's.
    """

    batch_name: str
    length: str | None
    fill: float | str = 0
    dtype: type | None = np.int64  # None: as the examples have it


KEYS = {
    "input_ids": _Key("input_ids", "text", "pad_token_id"),
    "position_ids": _Key("position_ids", "text", "pad_token_id"),
    "labels": _Key("labels", "text", -100),
    "region_features": _Key("region_features", "regions", dtype=None),
    "region_boxes": _Key("region_boxes", "regions", dtype=np.float32),
    "region_mask": _Key("region_mask", "regions", dtype=bool),
    "region_labels": _Key("region_labels", "regions", -100),
    "region_class_labels": _Key("region_class_labels", "regions", -100),
    "region_class_probs": _Key("region_class_probs", "regions", dtype=None),
    "region_feature_targets": _Key("region_feature_targets", "regions", dtype=None),
    "itm_label": _Key("itm_labels", None, -100),
    "objective_id": _Key("objective_ids", None, -100),
    "language_id": _Key("language_ids", None, -100),
    "example_id": _Key("example_ids", None, -100),
    "answer_targets": _Key("labels", "fixed", dtype=np.float32),
}
"""Every key an example may have; the names on the left are the examples', `batch_name` is the batch's."""

MASKS = {"text": ("attention_mask", "input_ids"), "regions": ("region_attention_mask", "region_features")}


@dataclass
class UC2DataCollator:
    """Pads encoded examples (dicts of arrays and numbers) into a batch of tensors.

    Adds `attention_mask (B, T)` and `region_attention_mask (B, R)`, 1 where real. A key that only some
    examples have is filled for the others (-100 for labels, 0 for targets).

    Args:
        pad_token_id: the tokenizer's; also pads `position_ids`, as in XLM-R.
        feature_dtype: cast of `region_features`; None leaves them as stored (float16), half the traffic to
            the device.
        pad_to_multiple_of: round T and R up to a multiple, for tensor cores or a compiled model.

    Raises:
        ValueError: a key that no table row knows, or arrays that do not fit each other.
    """

    pad_token_id: int = 1
    feature_dtype: torch.dtype | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        keys = dict.fromkeys(key for example in examples for key in example)
        unknown = [key for key in keys if key not in KEYS]
        if unknown:
            raise ValueError(f"cannot pad {', '.join(unknown)}; known keys: {', '.join(KEYS)}")
        lengths = {
            axis: _lengths(examples, source) for axis, (_, source) in MASKS.items() if source in keys
        }
        batch = {KEYS[key].batch_name: self._pad(key, examples, lengths) for key in keys}
        for axis, counts in lengths.items():
            batch[MASKS[axis][0]] = (np.arange(self._padded(counts)) < counts[:, None]).astype(np.int64)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        if self.feature_dtype is not None and "region_features" in tensors:
            tensors["region_features"] = tensors["region_features"].to(self.feature_dtype)
        return tensors

    def _padded(self, counts: np.ndarray) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-int(counts.max()) // multiple) * multiple

    def _pad(self, key: str, examples: Sequence[dict], lengths: dict[str, np.ndarray]) -> np.ndarray:
        """(B, …): the key's arrays side by side, padded along their first axis."""
        rule = KEYS[key]
        fill = self.pad_token_id if rule.fill == "pad_token_id" else rule.fill
        values = [np.asarray(example[key]) if key in example else None for example in examples]
        first = next(value for value in values if value is not None)
        shape = first.shape
        if rule.length in MASKS:
            shape = (self._padded(lengths[rule.length]), *shape[1:])
        padded = np.full((len(examples), *shape), fill, dtype=rule.dtype or first.dtype)
        for row, value in enumerate(values):
            if value is not None:
                _check_fits(key, row, value, first, lengths.get(rule.length))
                padded[(row, slice(len(value))) if value.ndim else row] = value
        return padded


def _lengths(examples: Sequence[dict], source: str) -> np.ndarray:
    """(B,) real length of each example along an axis, that of the key that defines it; 0 if absent."""
    return np.array([len(example[source]) if source in example else 0 for example in examples])


def _check_fits(
    key: str, row: int, value: np.ndarray, first: np.ndarray, lengths: np.ndarray | None
) -> None:
    expected = first.shape if lengths is None else (int(lengths[row]), *first.shape[1:])
    if value.shape != expected:
        raise ValueError(f"example {row}: {key} has shape {value.shape}, expected {expected}")
