"""Photographs in memory -> rows of a region store: detected regions, or a grid of timm features."""

import json
from collections.abc import Sequence

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import cached_file

from modeling_uc2.modeling_uc2_detector import UC2RegionDetector
from processing_uc2.image_processing_uc2_detector import UC2DetectorImageProcessor
from uc2.data_error import OptionError
from uc2.region_rows import RegionRow


def regions_from_images(
    detector: UC2RegionDetector,
    images: Sequence[Image.Image],
    *,
    image_processor: UC2DetectorImageProcessor | None = None,
    image_ids: Sequence[str] | None = None,
    class_probs: bool = False,
    **options,
) -> list[RegionRow]:
    """The regions of photographs, computed as one batch on the detector's device.

    Args:
        image_processor: default: `UC2DetectorImageProcessor()`, 800 to 1,333 pixels.
        image_ids: default: "0", "1", ….
        class_probs: also give the probabilities of all object classes.
        options: `min_detections`, `max_detections`, `score_threshold`, `boxes` of
            `UC2RegionDetector.forward`.
    """
    inputs = (image_processor or UC2DetectorImageProcessor())(images, return_tensors="pt")
    inputs = inputs.to(detector.device)
    output = detector(**inputs, output_class_probs=class_probs, **options)
    masks = output.region_attention_mask == 1
    if options.get("boxes") is None:
        # A box that was pressed against the border may have no area left; it describes nothing.
        masks &= (output.region_boxes[..., 2:] > output.region_boxes[..., :2]).all(dim=-1)
    rows = []
    for i, (image, some) in enumerate(zip(images, masks, strict=True)):
        row = RegionRow(
            image_id=str(i) if image_ids is None else image_ids[i],
            image_height=image.height,
            image_width=image.width,
            boxes=output.region_boxes[i][some].cpu().numpy(),
            features=output.region_features[i][some].half().cpu().numpy(),
            class_ids=output.class_ids[i][some].cpu().numpy(),
            class_scores=output.class_scores[i][some].cpu().numpy(),
            class_probs=output.class_probs[i][some].half().cpu().numpy() if class_probs else None,
        )
        rows.append(row)
    return rows


class GridFeatures:
    """Features of any timm backbone, pooled to a g x g grid; each cell is a region of the image.

    Images are resized to the backbone's input size without cropping, so that the cells cover the whole
    image. A grid has no object classes: every cell is of class 0 with score 1.

    Args:
        backbone: a timm model name, `hf-hub:…` or `local-dir:…`; its pretrained weights are used.
        grid: g.
    """

    def __init__(self, backbone: str, grid: int, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.model = timm.create_model(backbone, pretrained=True, num_classes=0).eval().to(device, dtype)
        self.grid, self.device, self.dtype = grid, device, dtype
        data = timm.data.resolve_model_data_config(self.model)
        self.height, self.width = data["input_size"][1:]
        self.resample = getattr(Image.Resampling, data["interpolation"].upper())
        self.mean, self.std = (np.array(data[name], np.float32) for name in ("mean", "std"))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], image_ids: Sequence[str]) -> list[RegionRow]:
        pixels = np.stack(
            [np.asarray(image.resize((self.width, self.height), self.resample)) for image in images]
        )
        pixels = torch.from_numpy((pixels / np.float32(255) - self.mean) / self.std).permute(0, 3, 1, 2)
        (cells,) = self.model.forward_intermediates(
            pixels.to(self.device, self.dtype),
            indices=1,
            norm=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        if min(cells.shape[-2:]) < self.grid:
            height, width = cells.shape[-2:]
            raise OptionError(
                f"--grid {self.grid} is finer than this backbone's {height} x {width} feature map."
            )
        pooled = F.adaptive_avg_pool2d(cells, self.grid)  # (B, F, g, g)
        features = pooled.flatten(2).transpose(1, 2).half().cpu().numpy()  # (B, g * g, F), row by row
        return [
            self._row(image, image_id, some)
            for image, image_id, some in zip(images, image_ids, features, strict=True)
        ]

    def _row(self, image: Image.Image, image_id: str, features: np.ndarray) -> RegionRow:
        edges = np.arange(self.grid + 1, dtype=np.float32) / self.grid
        y1, x1 = (corner.ravel() for corner in np.meshgrid(edges[:-1], edges[:-1], indexing="ij"))
        y2, x2 = (corner.ravel() for corner in np.meshgrid(edges[1:], edges[1:], indexing="ij"))
        size = np.array([image.width, image.height] * 2, np.float32)
        count = self.grid**2
        return RegionRow(
            image_id=image_id,
            image_height=image.height,
            image_width=image.width,
            boxes=np.stack([x1, y1, x2, y2], axis=1) * size,
            features=features,
            class_ids=np.zeros(count, np.int64),
            class_scores=np.ones(count, np.float32),
        )


def load_detector(name_or_path: str, **config_overrides) -> UC2RegionDetector:
    """A detector of this package, or one in the public port's format (see `from_frcnn_checkpoint`)."""
    file = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        with open(file, encoding="utf-8") as stream:
            if json.load(stream).get("model_type") == UC2RegionDetector.config_class.model_type:
                return UC2RegionDetector.from_pretrained(name_or_path, **config_overrides)
    return UC2RegionDetector.from_frcnn_checkpoint(name_or_path, **config_overrides)
