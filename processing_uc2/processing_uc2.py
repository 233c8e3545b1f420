"""UC2Processor: captions or questions + detected regions -> the inputs of a UC2 model (paper, section 3.2).

No labels and no randomness: masks and targets are made by the training data sets.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import cached_file

OBJECT_LABELS_NAME = "object_labels.json"
REGION_INPUT_NAMES = ["region_features", "region_boxes", "region_attention_mask"]
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
# A box may leave the image by this share of its size: float32 rounding of pixel coordinates, nothing more.
BOX_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Attached:
    """Something a processor uses but neither owns nor saves: copies of the processor share it."""

    detector: Any
    image_processor: Callable

    def __deepcopy__(self, memo):
        return self  # ProcessorMixin.to_dict copies every attribute, which must not be a detector's weights


class UC2Processor(ProcessorMixin):
    """Couples an XLM-R tokenizer with region features.

    Args:
        tokenizer: an XLM-R tokenizer (`<s> text </s>`).
        object_labels: names of the detector's classes, `{"en": [...], "de": [...]}`, one list per language
            in class order. MRTM and Early Adaptation read them; saved as `object_labels.json` beside the
            processor.
        max_regions: keep at most so many regions of an image.
        min_regions: keep at least so many, whatever their scores, where the image has them.
        region_threshold: between the two, keep the regions whose class score is above it (the original: 0.2).
            `None` keeps the first `max_regions` in the order given.
        feature_size: width F of a region feature.
        chat_template: accepted because every transformers processor does; UC2 has none.

    A region item is a dict, or any object, with
        features (n, F), finite;
        boxes (n, 4), x1, y1, x2, y2: pixels with `image_height` and `image_width`, else normalised to [0, 1];
            or `normalized_boxes` in place of `boxes`. Boxes that come with an image size but all lie in
            [0, 1] are taken as normalised: in pixels, they would all lie in one corner pixel;
        class_scores (n,), optional: without them the first `max_regions` are kept.
    """

    text_kwargs = {"padding": True}

    def __init__(
        self,
        tokenizer,
        object_labels=None,
        max_regions=100,
        min_regions=10,
        region_threshold=0.2,
        feature_size=2048,
        chat_template=None,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        for name, value in (("max_regions", max_regions), ("feature_size", feature_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if min_regions < 0:
            raise ValueError(f"min_regions must not be negative, found {min_regions}")
        if region_threshold is not None and not 0 <= region_threshold <= 1:
            raise ValueError(f"region_threshold must be a probability or None, found {region_threshold}")
        _check_object_labels(object_labels)
        self.object_labels = object_labels
        self.max_regions = max_regions
        self.min_regions = min_regions
        self.region_threshold = region_threshold
        self.feature_size = feature_size
        self._attached = None

    def attach_region_detector(self, detector, image_processor) -> "UC2Processor":
        """Let `processor(images=...)` take photographs. The detector is not saved with the processor.

        Args:
            detector: `UC2RegionDetector`, or any model that is called with what `image_processor` gives and
                `min_detections`, `max_detections`, `score_threshold`, and answers as that one does; used on
                the device it is on.
            image_processor: the detector's, such as `UC2DetectorImageProcessor()`.

        Returns:
            the processor itself.

        Raises:
            ValueError: the detector's features have another width than the processor's.
        """
        width = detector.config.feature_size
        if width != self.feature_size:
            raise ValueError(
                f"the detector gives features of width {width}, expected {self.feature_size} (feature_size)"
            )
        self._attached = _Attached(detector, image_processor)
        return self

    def __call__(self, text=None, regions=None, **kwargs: Unpack[ProcessingKwargs]) -> BatchFeature:
        """Encode one or many examples; one example gives a batch of 1.

        Args:
            text: a string or a list of them: `<s> text </s>`.
            regions: a region item (see the class) or a list of them. Text only and regions only are valid.
            text_pair: as `text`, the other-language captions of VTLM: `<s> text </s><s> text_pair </s>`, the
                positions of the second caption start again.
            images: instead of `regions`, an image or a list of them, in which the attached detector finds
                the regions, as one batch (see `attach_region_detector`).
            max_regions, min_regions, region_threshold: for this call, in place of the processor's.
            kwargs: `return_tensors` and the tokenizer's options: `padding` (default True), `truncation`,
                `max_length` and so on; lengths count text tokens. Regions are padded to the longest of the
                batch unless `padding` is off.

        Returns:
            BatchFeature with input_ids, attention_mask (B, T), with `text_pair` also position_ids (B, T);
            region_features (B, R, F) float32, region_boxes (B, R, 4) float32 in [0, 1],
            region_attention_mask (B, R).

        Raises:
            ValueError: an input that cannot be encoded, with the example and the region it is found in.
        """
        limits = {name: kwargs.pop(name, value) for name, value in self._region_limits().items()}
        # Taken out of kwargs and not named in the signature: transformers would look for an image processor
        # among the processor's own parts.
        images = _as_batch("images", kwargs.pop("images", None))
        text_pair = kwargs.pop("text_pair", None)
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        options = merged["text_kwargs"]
        return_tensors = options.pop("return_tensors", None)
        texts, pairs = _as_batch("text", text), _as_batch("text_pair", options.pop("text_pair", text_pair))
        regions = _as_batch("regions", regions)
        if images is not None and regions is not None:
            raise ValueError("images and regions are both given; expected one of them")
        _check_batch(texts, pairs, images if regions is None else regions)
        if images is not None:
            regions = self._detect(images, limits)

        data = {}
        if texts is not None:
            data.update(self._encode_text(texts, pairs, options))
        if regions is not None:
            pad = options.get("padding") not in (False, None, "do_not_pad")
            data.update(self._encode_region_batch(regions, limits, pad))
        return BatchFeature(data, tensor_type=return_tensors)

    # Text

    def join_pair(self, ids_a, ids_b) -> tuple[np.ndarray, np.ndarray]:
        """The VTLM layout of two captions' sub-word ids, given without special tokens.

        Returns:
            input_ids and position_ids, both (len(a) + len(b) + 4,) int64: `<s> a </s><s> b </s>`; positions
            count from pad + 1 as XLM-R's do, and again from there for the second caption, so that aligned
            words lie close.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        first = self.tokenizer.pad_token_id + 1
        input_ids = np.array([bos, *ids_a, eos, bos, *ids_b, eos], dtype=np.int64)
        lengths = (len(ids_a) + 2, len(ids_b) + 2)
        return input_ids, np.concatenate([np.arange(first, first + length) for length in lengths])

    def _encode_text(self, texts, pairs, options) -> dict:
        """Tokenize; with pairs, write UC2's layout over XLM-R's own pair layout, which is as long."""
        if pairs is None:
            return dict(self.tokenizer(texts, **options))
        if not options.get("add_special_tokens", True):
            raise ValueError(
                "text_pair needs the special tokens that part the two texts: add_special_tokens=False"
            )
        keep_mask = options.pop("return_attention_mask", True) is not False
        encoded = self.tokenizer(texts, pairs, return_attention_mask=True, **options)
        position_ids = []
        for row, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["attention_mask"], strict=True)):
            sources = encoded.sequence_ids(row)
            parts = [
                [token for token, source in zip(ids, sources, strict=True) if source == part]
                for part in (0, 1)
            ]
            joined, positions = self.join_pair(*parts)
            real = np.flatnonzero(mask)
            row_ids, row_positions = np.array(ids), np.full(len(ids), self.tokenizer.pad_token_id)
            row_ids[real], row_positions[real] = joined, positions
            encoded["input_ids"][row] = row_ids.tolist()
            position_ids.append(row_positions.tolist())
        data = dict(encoded, position_ids=position_ids)
        if not keep_mask:
            del data["attention_mask"]
        return data

    # Regions

    def select_regions(self, class_scores, **limits) -> np.ndarray:
        """Indices of the regions to keep, by falling score (the original's rule).

        Keeps the scores above `region_threshold`, but at least `min_regions` and at most `max_regions` of
        the n there are; with `region_threshold=None` the first `max_regions`, in the order given.

        Args:
            class_scores: (n,) probability of each region's class.
            limits: `max_regions`, `min_regions`, `region_threshold` where they differ from the processor's.
        """
        limits = {**self._region_limits(), **limits}
        class_scores = np.asarray(class_scores)
        if limits["region_threshold"] is None:
            return np.arange(min(limits["max_regions"], len(class_scores)))
        confident = int((class_scores > limits["region_threshold"]).sum())
        count = min(max(confident, limits["min_regions"]), limits["max_regions"])
        return np.argsort(-class_scores.astype(np.float32), kind="stable")[:count]

    def encode_regions(self, region, **limits) -> dict[str, np.ndarray]:
        """Check a region item and keep its best regions; nothing is padded.

        Args:
            region: a region item, see the class.
            limits: as for `select_regions`.

        Returns:
            region_features (n, F) in the dtype they come in, region_boxes (n, 4) float32 in [0, 1].

        Raises:
            ValueError: no features or boxes, a wrong shape or width, NaN or infinity, a box outside the
                image.
        """
        features = _region_field(region, "features")
        if features is None:
            raise ValueError("the region item has no 'features'")
        if features.ndim != 2 or features.shape[1] != self.feature_size:
            raise ValueError(
                f"features have shape {features.shape}, expected (number of regions, {self.feature_size})"
            )
        if not len(features):
            raise ValueError("the region item holds no regions, expected at least one")
        _check_finite("features", features)
        boxes = _normalized_boxes(region)
        if boxes.shape != (len(features), 4):
            raise ValueError(
                f"boxes have shape {boxes.shape}, expected {(len(features), 4)}: one per feature row"
            )
        boxes = _checked_boxes(boxes)
        scores = _region_field(region, "class_scores")
        if scores is None:
            kept = np.arange(min(len(features), limits.get("max_regions", self.max_regions)))
        elif scores.shape != (len(features),):
            raise ValueError(
                f"class_scores have shape {scores.shape}, expected {(len(features),)}: one per feature row"
            )
        else:
            _check_finite("class_scores", scores)
            kept = self.select_regions(scores, **limits)
        return {"region_features": features[kept], "region_boxes": boxes[kept]}

    def _region_limits(self) -> dict:
        return {name: getattr(self, name) for name in ("max_regions", "min_regions", "region_threshold")}

    def _detect(self, images: list, limits: dict) -> list[dict]:
        """The region items of images, found by the attached detector within the limits."""
        if self._attached is None:
            raise ValueError("images need a region detector: call attach_region_detector, or pass regions")
        detector, most, threshold = self._attached.detector, limits["max_regions"], limits["region_threshold"]
        # Upright, as the region store has them: a camera may note a turn instead of turning the pixels.
        images = [ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else image for image in images]
        output = detector(
            **self._attached.image_processor(images, return_tensors="pt").to(detector.device),
            min_detections=max(1, min(limits["min_regions"], most)),
            max_detections=most,
            score_threshold=-1 if threshold is None else threshold,
        )
        # A box that was pressed against the image's border may have no area left; it describes nothing.
        has_area = (output.region_boxes[..., 2:] > output.region_boxes[..., :2]).all(dim=-1)
        found = output.region_attention_mask.bool() & has_area
        fields = {
            "features": output.region_features,
            "normalized_boxes": output.normalized_boxes,
            "class_scores": output.class_scores,
        }
        return [
            {name: values[i][found[i]].float() for name, values in fields.items()} for i in range(len(images))
        ]

    def _encode_region_batch(self, regions, limits, pad: bool) -> dict:
        """Region items -> the region inputs: arrays padded to the longest, or without `pad` lists."""
        encoded = []
        for index, region in enumerate(regions):
            try:
                encoded.append(self.encode_regions(region, **limits))
            except ValueError as error:
                raise ValueError(f"regions[{index}]: {error}") from error
        counts = [len(example["region_boxes"]) for example in encoded]
        if not pad:
            return {
                "region_features": [example["region_features"].astype(np.float32) for example in encoded],
                "region_boxes": [example["region_boxes"] for example in encoded],
                "region_attention_mask": [[1] * count for count in counts],
            }
        shape = (len(encoded), max(counts))
        features = np.zeros((*shape, self.feature_size), dtype=np.float32)
        boxes = np.zeros((*shape, 4), dtype=np.float32)
        for row, (example, count) in enumerate(zip(encoded, counts, strict=True)):
            features[row, :count] = example["region_features"]
            boxes[row, :count] = example["region_boxes"]
        mask = (np.arange(shape[1]) < np.array(counts)[:, None]).astype(np.int64)
        return dict(zip(REGION_INPUT_NAMES, (features, boxes, mask), strict=True))

    # Saving and loading: the object labels (1,600 names in six languages) live in a file of their own.

    def to_dict(self) -> dict:
        """As every processor's, with the name of the label file in place of the labels."""
        output = super().to_dict()
        output["object_labels"] = OBJECT_LABELS_NAME if self.object_labels else None
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As every processor's, but independent of earlier calls and without a trace in the processor."""
        # The tokenizer's backend keeps the truncation and padding of its last call; loaded, they would be
        # every later call's defaults.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        # As a string: with `push_to_hub`, the library splits it.
        files = super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)
        # Written into the JSON by then; kept, a saved processor would differ from the one loaded from it.
        self.__dict__.pop("auto_map", None)
        return files

    def to_json_file(self, json_file_path):
        """Write the processor's JSON and the object labels beside it.

        Done here because `save_pretrained` calls it between taking stock of the folder and uploading what is
        new.
        """
        super().to_json_file(json_file_path)
        if self.object_labels:
            labels_path = os.path.join(os.path.dirname(json_file_path), OBJECT_LABELS_NAME)
            with open(labels_path, "w", encoding="utf-8") as file:
                json.dump(self.object_labels, file, ensure_ascii=False, indent=1)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As every processor's, with the object labels read from the same folder or Hub repository."""
        processor_dict, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if isinstance(processor_dict.get("object_labels"), str):
            hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            path = cached_file(pretrained_model_name_or_path, processor_dict["object_labels"], **hub_options)
            with open(path, encoding="utf-8") as file:
                processor_dict["object_labels"] = json.load(file)
        return processor_dict, unused

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Load the tokenizer without the processor's own options, which it would keep and save as its own."""
        own = set(inspect.signature(cls.__init__).parameters) - set(cls.get_attributes())
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)


def _check_object_labels(object_labels) -> None:
    """One list of class names per language, all of one length."""
    if object_labels is None:
        return
    if not isinstance(object_labels, Mapping) or not object_labels:
        raise ValueError(
            f"object_labels must be a dict language -> list of names, found {type(object_labels).__name__}"
        )
    counts = {language: len(labels) for language, labels in object_labels.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"object_labels must name the same classes in every language, found {counts}")


def _as_batch(name, value) -> list | None:
    """A single example -> a list of one; a list stays; None stays."""
    if value is None:
        return None
    batch = list(value) if isinstance(value, (list, tuple)) else [value]
    if not batch:
        raise ValueError(f"{name} is an empty list, expected at least one example")
    return batch


def _check_batch(texts, pairs, regions) -> None:
    """Text or regions are there, as many of the one as of the other, and text is text."""
    if texts is None and regions is None:
        raise ValueError("nothing to encode: pass text, regions or images, or text with one of them")
    if texts is None and pairs is not None:
        raise ValueError("text_pair needs text")
    for name, batch in (("text", texts), ("text_pair", pairs)):
        for index, item in enumerate(batch or []):
            words = (
                item if isinstance(item, (list, tuple)) else [item]
            )  # a list of words: is_split_into_words
            if not all(isinstance(word, str) for word in words):
                raise ValueError(f"{name}[{index}] is {item!r}, expected a string")
    counts = {
        name: len(batch)
        for name, batch in (("text", texts), ("text_pair", pairs), ("regions", regions))
        if batch
    }
    if len(set(counts.values())) > 1:
        raise ValueError(f"the numbers of examples differ: {counts}; pass one region item per text")


def _region_field(region, name) -> np.ndarray | None:
    """A field of a region item, a mapping or an object, as an array; None where it is not there."""
    value = region.get(name) if isinstance(region, Mapping) else getattr(region, name, None)
    if value is None:
        return None
    if hasattr(value, "detach"):  # a tensor, which may need gradients or lie on a GPU
        value = value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} hold {array.dtype} values, expected numbers")
    return array


def _normalized_boxes(region) -> np.ndarray:
    """The boxes of a region item in shares of the image, float32."""
    boxes = _region_field(region, "boxes")
    if boxes is None:
        boxes = _region_field(region, "normalized_boxes")
        if boxes is None:
            raise ValueError("the region item has neither 'boxes' nor 'normalized_boxes'")
        return boxes.astype(np.float32)
    boxes = boxes.astype(np.float32)
    height, width = _region_field(region, "image_height"), _region_field(region, "image_width")
    if (height is None) != (width is None):
        raise ValueError(
            "the region item has only one of 'image_height' and 'image_width', expected both or none"
        )
    if height is None or boxes.ndim != 2 or boxes.shape[1] != 4:
        return boxes
    if not (height > 0 and width > 0):
        raise ValueError(f"the image is {width} x {height} pixels, expected a positive size")
    if boxes.size and boxes.max() <= 1:
        return boxes
    return boxes / np.array([width, height, width, height], dtype=np.float32)


def _checked_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes (n, 4), finite, ordered and inside the image; rounding beyond its edge is cut off."""
    _check_finite("boxes", boxes)
    outside = ((boxes < -BOX_TOLERANCE) | (boxes > 1 + BOX_TOLERANCE)).any(axis=1)
    if outside.any():
        index = int(outside.argmax())
        raise ValueError(
            f"box {index} lies outside the image: {_shown(boxes[index])} in shares of its size, expected"
            " values in [0, 1] (boxes in pixels need 'image_height' and 'image_width')"
        )
    turned = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if turned.any():
        index = int(turned.argmax())
        raise ValueError(f"box {index} is {_shown(boxes[index])}, expected x1 <= x2 and y1 <= y2")
    return boxes.clip(0, 1)


def _shown(box) -> list[float]:
    return [round(float(value), 4) for value in box]


def _check_finite(name: str, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        region = int(np.argwhere(~finite)[0][0])
        raise ValueError(f"{name} of region {region} are not finite (NaN or infinity)")
