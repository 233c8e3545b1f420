"""The region detector of UC2: a Faster R-CNN trained on Visual Genome (Anderson et al., CVPR 2018).

The backbone is timm's ResNet with the three differences of the Caffe original: a stage's stride sits in the
first 1x1 convolution, batch norm is frozen, and the stem's max-pool rounds up without padding. Its fourth
stage runs on each pooled region, with stride 1 and dilation 2; the mean of its output is the region's
feature.

Shapes: B images, H x W pixels (resized, padded), h x w cells of the stage-3 map (16 pixels each), P proposals
and R regions of an image, F feature width, C classes, A attributes. Boxes are x1, y1, x2, y2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import FrozenBatchNorm2d, clip_boxes_to_image, nms, roi_pool
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import cached_file

from .configuration_uc2_detector import UC2RegionDetectorConfig

CELL = 16  # pixels of the image per cell of the stage-3 map
POOLED = 14  # a region is pooled to POOLED x POOLED cells
REGIONS_AT_ONCE = 128  # regions in the fourth stage at a time: 0.2 GB of activations in float32
# A box may grow by at most this factor (in log), so that a wild delta cannot overflow.
MAX_LOG_GROWTH = math.log(1000 / 16)
CHECKPOINT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass
class UC2RegionDetectorOutput(ModelOutput):
    """
    The regions of B images by falling class score, padded with zeros to the largest number R.

    Args:
        region_features (`(B, R, F)`): mean-pooled output of the fourth stage.
        region_boxes (`(B, R, 4)`): boxes in pixels of the original images.
        normalized_boxes (`(B, R, 4)`): the same divided by the original width and height.
        region_attention_mask (`(B, R)`): 1 for a region, 0 for padding.
        class_ids, class_scores (`(B, R)`): most probable class (0 … C-1, no background) and its probability.
        attribute_ids, attribute_scores (`(B, R)`): most probable attribute and its probability.
        class_probs (`(B, R, C)`, on request): of all classes; they sum to 1 less the background's.
    """

    region_features: torch.FloatTensor | None = None
    region_boxes: torch.FloatTensor | None = None
    normalized_boxes: torch.FloatTensor | None = None
    region_attention_mask: torch.LongTensor | None = None
    class_ids: torch.LongTensor | None = None
    class_scores: torch.FloatTensor | None = None
    attribute_ids: torch.LongTensor | None = None
    attribute_scores: torch.FloatTensor | None = None
    class_probs: torch.FloatTensor | None = None


# --- backbone ---


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm whose statistics and affine map never change; `device` and `dtype` are what timm passes."""

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torchvision multiplies and adds in two passes over the map; the fused kernel needs one.
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class CaffeBottleneck(Bottleneck):
    """timm's bottleneck with its stride in the first convolution."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, (1, 1)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """`valid` (B, 1, h, w) is 0 on the cells that a smaller image of the batch does not have."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = _zero_padding(x, valid)  # conv2 is the one that reads neighbouring cells
        x = self.act2(self.bn2(self.conv2(x)))
        return self.act3(self.bn3(self.conv3(x)) + shortcut)


class CaffeResNet(ResNet):
    """Stages 1 to 3 over the image (`forward`), stage 4 over pooled regions (`layer4`)."""

    def __init__(self, depths: list[int], widths: list[int]):
        super().__init__(
            CaffeBottleneck,
            depths,
            num_classes=0,
            global_pool="",
            channels=widths,
            norm_layer=FrozenBatchNorm,
            zero_init_last=False,
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.layer4[0].conv1.stride = self.layer4[0].downsample[0].stride = (1, 1)
        for block in self.layer4:
            block.conv2.dilation = block.conv2.padding = (2, 2)

    def forward(self, pixel_values: torch.Tensor, image_sizes: list[tuple[int, int]]) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 4 * widths[2], h, w), for each image the same as if it were alone.

        Zeros around an image act as a convolution's own padding does. Behind the first batch norm the padded
        cells are no longer 0; so they are set to 0 before every operation that reads neighbours.
        """
        x = self.act1(self.bn1(self.conv1(pixel_values)))
        sizes = [tuple((length + 1) // 2 for length in size) for size in image_sizes]
        x = self.maxpool(_zero_padding(x, _valid_cells(sizes, x)))
        sizes = [tuple(length // 2 for length in size) for size in sizes]
        for stage in (self.layer1, self.layer2, self.layer3):
            if stage is not self.layer1:
                sizes = [tuple((length + 1) // 2 for length in size) for size in sizes]
            stride = stage[0].conv1.stride[0]
            valid = _valid_cells(sizes, x[:, :, ::stride, ::stride])
            for block in stage:
                x = block(x, valid)
        return _zero_padding(x, valid)


def stage3_size(size: tuple[int, int]) -> tuple[int, int]:
    """Cells of the stage-3 map, for an image of (height, width) pixels."""
    return tuple(((length + 1) // 4 + 3) // 4 for length in size)


def _valid_cells(sizes: list[tuple[int, int]], x: torch.Tensor) -> torch.Tensor | None:
    """(B, 1, h, w) of 1 where a map of each (height, width) has cells; None if all fill `x` (B, c, h, w)."""
    height, width = x.shape[-2:]
    if all(size == (height, width) for size in sizes):
        return None
    heights, widths = torch.tensor(sizes, device=x.device).T[:, :, None, None, None]
    rows = torch.arange(height, device=x.device)[None, None, :, None]
    columns = torch.arange(width, device=x.device)[None, None, None, :]
    return ((rows < heights) & (columns < widths)).to(x.dtype)


def _zero_padding(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    return x if valid is None else x * valid


# --- heads ---


class ProposalHead(nn.Module):
    """Region proposal network: an objectness logit and four box deltas per anchor and cell."""

    def __init__(self, channels: int, hidden: int, num_anchors: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, hidden, kernel_size=3, padding=1)
        self.objectness_logits = nn.Conv2d(hidden, num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(hidden, 4 * num_anchors, kernel_size=1)

    def forward(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, c, h, w) -> logits (B, h, w, a), deltas (B, h, w, a, 4)."""
        hidden = F.relu(self.conv(cells))
        deltas = self.anchor_deltas(hidden).permute(0, 2, 3, 1)
        return self.objectness_logits(hidden).permute(0, 2, 3, 1), deltas.unflatten(-1, (-1, 4))


class RegionPredictor(nn.Module):
    """Class, attribute and box of a region; the attribute from the feature and the predicted class."""

    def __init__(self, feature_size: int, num_classes: int, num_attributes: int):
        super().__init__()
        self.cls_score = nn.Linear(feature_size, num_classes + 1)  # the last one is background
        self.bbox_pred = nn.Linear(feature_size, 4 * num_classes)
        self.cls_embedding = nn.Embedding(num_classes + 1, feature_size // 8)
        self.fc_attr = nn.Linear(feature_size + feature_size // 8, feature_size // 4)
        self.attr_score = nn.Linear(feature_size // 4, num_attributes + 1)  # the last one is "none"

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(n, F) -> class logits (n, C + 1), attribute logits (n, A + 1), box deltas (n, C, 4)."""
        class_logits = self.cls_score(features)
        class_embedding = self.cls_embedding(class_logits.argmax(-1))
        hidden = F.relu(self.fc_attr(torch.cat([features, class_embedding], dim=-1)))
        return class_logits, self.attr_score(hidden), self.bbox_pred(features).unflatten(-1, (-1, 4))


def make_anchors(sizes: list[float], ratios: list[float]) -> list[list[float]]:
    """Boxes around the origin, one per size and ratio: area is size ** 2, height / width is the ratio."""
    anchors = []
    for size in sizes:
        for ratio in ratios:
            width = size / math.sqrt(ratio)
            height = ratio * width
            anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    return anchors


def apply_deltas(boxes: torch.Tensor, deltas: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """Boxes (n, 4) moved by deltas (n, 4) (R-CNN, Girshick et al. 2014, appendix C): the centre by dx * width
    and dy * height, the size by factors exp(dw) and exp(dh). `weights` is what deltas are multiplied with."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + 0.5 * size
    deltas = deltas / deltas.new_tensor(weights)
    centre = centre + deltas[:, :2] * size
    size = size * deltas[:, 2:].clamp(max=MAX_LOG_GROWTH).exp()
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=1)


# --- detector ---


class UC2RegionDetector(PreTrainedModel):
    """Photographs -> regions: boxes with features, classes and attributes. Inference only."""

    config: UC2RegionDetectorConfig
    config_class = UC2RegionDetectorConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _auto_class = "AutoModel"

    def __init__(self, config: UC2RegionDetectorConfig):
        super().__init__(config)
        num_anchors = len(config.anchors or make_anchors(config.anchor_sizes, config.anchor_ratios))
        self.backbone = CaffeResNet(config.depths, config.widths)
        self.proposal_head = ProposalHead(4 * config.widths[2], config.proposal_hidden_size, num_anchors)
        self.predictor = RegionPredictor(config.feature_size, config.num_classes, config.num_attributes)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Conv2d) and module.bias is None:  # the backbone's
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Conv2d | nn.Linear):
            # Small: a fresh detector proposes the anchors, hardly moved, and not boxes outside the image.
            init.normal_(module.weight, std=0.001)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.01)
        elif isinstance(module, FrozenBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        boxes: list[torch.Tensor] | None = None,
        min_detections: int | None = None,
        max_detections: int | None = None,
        score_threshold: float | None = None,
        output_class_probs: bool = False,
        return_dict: bool | None = None,
    ) -> UC2RegionDetectorOutput | tuple:
        """The regions of a batch of images; an image's regions do not depend on its neighbours in the batch.

        Args:
            pixel_values: (B, 3, H, W), as `UC2DetectorImageProcessor` makes it.
            image_sizes: (B, 2) height and width within the padding; without it every image is H x W.
            original_sizes: (B, 2) height and width of the files; without it, `image_sizes`.
            boxes: for each image (n, 4) boxes in original pixels. Given these, nothing is searched or
                dropped: regions are exactly these boxes in this order.
            min_detections, max_detections, score_threshold: instead of the configuration's. Equal bounds
                give a fixed number, as long as there are that many proposals. A threshold below 0 drops
                nothing.
        """
        if image_sizes is None:
            image_sizes = torch.tensor(pixel_values.shape[-2:]).expand(len(pixel_values), 2)
        original_sizes = image_sizes if original_sizes is None else original_sizes
        sizes = [(int(height), int(width)) for height, width in image_sizes.tolist()]
        # (B, 4): original pixels per resized pixel, along x, y, x, y
        scales = (original_sizes / image_sizes).flip(1).repeat(1, 2).to(pixel_values.device)
        cells = self.backbone(pixel_values.to(self.dtype), sizes)
        if boxes is None:
            limits = self._limits(min_detections, max_detections, score_threshold)
            proposals, _ = self.propose(cells, sizes)
            described = self.describe(cells, proposals)
            images = [
                self._detect(*inputs, limits, output_class_probs)
                for inputs in zip(proposals, described, sizes, strict=True)
            ]
        else:
            given = [some.to(scale) / scale for some, scale in zip(boxes, scales, strict=True)]
            images = [
                {"boxes": some, **self._labels(*described, output_class_probs)}
                for some, described in zip(given, self.describe(cells, given), strict=True)
            ]
        output = _pad_regions(images, scales, original_sizes.to(pixel_values.device))
        use_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return output.to_tuple() if use_tuple else output

    def _limits(self, least: int | None, most: int | None, threshold: float | None) -> dict:
        """Arguments of `select_regions`: what the caller gave, else the configuration's."""
        limits = {
            "least": self.config.min_detections if least is None else least,
            "most": self.config.max_detections if most is None else most,
            "score_threshold": self.config.score_threshold if threshold is None else threshold,
        }
        if not 1 <= limits["least"] <= limits["most"]:
            raise ValueError(f"1 <= min_detections <= max_detections must hold; found {limits}.")
        return limits

    def propose(
        self, cells: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Proposals of each image, by falling objectness.

        Args:
            cells: (B, c, h, w), the stage-3 map.
            sizes: height and width of each image in resized pixels.

        Returns:
            Boxes (P, 4) in resized pixels and objectness logits (P,) of each image.
        """
        logits, deltas = self.proposal_head(cells)
        proposals = [
            self._propose_one(logits[i, :height, :width], deltas[i, :height, :width], sizes[i])
            for i, (height, width) in enumerate(map(stage3_size, sizes))
        ]
        return [boxes for boxes, _ in proposals], [scores for _, scores in proposals]

    def _propose_one(self, logits: torch.Tensor, deltas: torch.Tensor, size: tuple[int, int]):
        """Logits (h, w, a) and deltas (h, w, a, 4) of one image -> boxes (P, 4), logits (P,)."""
        config = self.config
        anchors = torch.tensor(
            config.anchors or make_anchors(config.anchor_sizes, config.anchor_ratios), device=logits.device
        )
        scores, best = logits.flatten().float().sort(descending=True)
        scores, best = scores[: config.proposals_before_nms], best[: config.proposals_before_nms]
        cell, anchor = best // len(anchors), best % len(anchors)
        corner = torch.stack([cell % logits.shape[1], cell // logits.shape[1]], dim=1) * CELL
        boxes = apply_deltas(
            anchors[anchor] + corner.repeat(1, 2), deltas.reshape(-1, 4)[best].float(), [1, 1, 1, 1]
        )
        boxes = clip_boxes_to_image(boxes, size)
        some = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # clipping may leave no area
        boxes, scores = boxes[some], scores[some]
        keep = nms(boxes, scores, config.proposal_nms_threshold)[: config.proposals_after_nms]
        return boxes[keep], scores[keep]

    def describe(
        self, cells: torch.Tensor, boxes: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What the network says about each image's boxes.

        Args:
            cells: (B, c, h, w), the stage-3 map.
            boxes: (P, 4) for each image, in resized pixels.

        Returns:
            For each image: features (P, F), class logits (P, C + 1), attribute logits (P, A + 1) and box
            deltas (P, C, 4).
        """
        counts = [len(some) for some in boxes]
        image = torch.arange(len(boxes)).repeat_interleave(torch.tensor(counts)).to(cells.device)
        regions = torch.cat([image[:, None].float(), torch.cat(boxes).float()], dim=1)
        # Pooling in float32: float16 cannot tell neighbouring pixels apart beyond 2,048.
        features = [
            self.backbone.layer4(roi_pool(cells.float(), some, POOLED, 1 / CELL).to(cells.dtype)).mean((2, 3))
            for some in regions.split(REGIONS_AT_ONCE)
        ]
        features = torch.cat(features)
        values = (features, *self.predictor(features))
        return list(zip(*(value.split(counts) for value in values), strict=True))

    def _detect(
        self,
        proposals: torch.Tensor,
        described: tuple,
        size: tuple[int, int],
        limits: dict,
        class_probs: bool,
    ) -> dict[str, torch.Tensor]:
        """The regions of one image: each proposal moved by the deltas of its class, then the best of them."""
        regions = self._labels(*described, class_probs)
        deltas = described[3][torch.arange(len(proposals)), regions["class_ids"]].float()  # (P, 4)
        boxes = clip_boxes_to_image(apply_deltas(proposals, deltas, self.config.box_weights), size)
        keep = select_regions(boxes, regions["class_scores"], self.config.nms_threshold, **limits)
        return {name: values[keep] for name, values in ({"boxes": boxes} | regions).items()}

    def _labels(
        self, features, class_logits, attribute_logits, _, class_probs: bool
    ) -> dict[str, torch.Tensor]:
        """A probability for the likeliest class and attribute.

        As in the original, "none" is left out of the attributes before the softmax, background out of the
        classes after it.
        """
        probs = class_logits.float().softmax(-1)[:, :-1]
        class_scores, class_ids = probs.max(-1)
        attribute_scores, attribute_ids = attribute_logits[:, :-1].float().softmax(-1).max(-1)
        regions = {
            "region_features": features,
            "class_ids": class_ids,
            "class_scores": class_scores,
            "attribute_ids": attribute_ids,
            "attribute_scores": attribute_scores,
        }
        return regions | ({"class_probs": probs} if class_probs else {})

    @classmethod
    def from_frcnn_checkpoint(cls, name_or_path: str, **config_overrides) -> "UC2RegionDetector":
        """The detector with the weights of a public checkpoint such as `unc-nlp/frcnn-vg-finetuned`.

        Args:
            name_or_path: Hub id, or a folder with `model.safetensors` or `pytorch_model.bin` (which is read
                without executing pickles).
            config_overrides: fields of `UC2RegionDetectorConfig`. Depths and widths, anchors, and the numbers
                of classes and attributes are read off the weights.

        `save_pretrained` then writes a folder with safetensors that `from_pretrained` loads.
        """
        weights = convert_frcnn_weights(_load_frcnn_weights(name_or_path))
        config = UC2RegionDetectorConfig(**{**_settings_from(weights), **config_overrides})
        with torch.device("meta"):
            model = cls(config)
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        if missing or unexpected:
            raise ValueError(
                f"{name_or_path} does not hold this detector: {len(missing)} parameters are missing "
                f"({missing[:3]}), {len(unexpected)} are unexpected ({unexpected[:3]})."
            )
        return model.eval()


def select_regions(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    nms_threshold: float,
    *,
    score_threshold: float | None,
    least: int,
    most: int,
) -> torch.Tensor:
    """Indices (R,) by falling score, least <= R <= most as far as there are candidates.

    What non-maximum suppression keeps and what scores above the threshold; if these are fewer than `least`,
    the best of those below the threshold, then the best of the suppressed ones as well.
    """
    kept = nms(boxes, scores, nms_threshold)
    if score_threshold is not None:
        kept = kept[: max(int((scores[kept] > score_threshold).sum()), least)]
    kept = kept[:most]
    if len(kept) < least:
        order = scores.argsort(descending=True, stable=True)
        others = order[~torch.isin(order, kept)]
        kept = torch.cat([kept, others[: least - len(kept)]])
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
    return kept


def _pad_regions(
    images: list[dict[str, torch.Tensor]], scales: torch.Tensor, original_sizes: torch.Tensor
) -> UC2RegionDetectorOutput:
    """Stacks the images' regions; boxes go from resized to original pixels by `scales` (B, 4)."""
    padded = {name: pad_sequence([image[name] for image in images], batch_first=True) for name in images[0]}
    boxes = padded.pop("boxes") * scales[:, None]
    counts = torch.tensor([len(image["boxes"]) for image in images], device=boxes.device)
    return UC2RegionDetectorOutput(
        region_boxes=boxes,
        normalized_boxes=boxes / original_sizes.flip(1).repeat(1, 2)[:, None],
        region_attention_mask=(torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]).long(),
        **padded,
    )


# --- public checkpoints ---


def convert_frcnn_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of the public port (`backbone.res4.0.conv1.norm.weight` …) under this model's names.

    The anchors, which are no parameters here, come along as `anchors`.
    """
    prefixes = {
        "backbone.stem.": "backbone.",
        "backbone.res2.": "backbone.layer1.",
        "backbone.res3.": "backbone.layer2.",
        "backbone.res4.": "backbone.layer3.",
        "roi_heads.res5.": "backbone.layer4.",
        "roi_heads.box_predictor.": "predictor.",
        "proposal_generator.rpn_head.": "proposal_head.",
        "proposal_generator.anchor_generator.cell_anchors.0": "anchors",
    }
    parts = {"shortcut.norm.": "downsample.1.", "shortcut.": "downsample.0."}
    parts |= {f"conv{i}.norm.": f"bn{i}." for i in (1, 2, 3)}
    converted = {}
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue  # counts training steps; frozen batch norm has no use for it
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None:
            name = prefixes[prefix] + name[len(prefix) :]
        part = next((part for part in parts if part in name), None)
        converted[name if part is None else name.replace(part, parts[part])] = tensor
    return converted


def _load_frcnn_weights(name_or_path: str) -> dict[str, torch.Tensor]:
    for name in CHECKPOINT_FILES:
        file = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and name.endswith(".safetensors"):
            return load_file(file)
        if file is not None:
            return torch.load(file, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"{name_or_path} has neither of {', '.join(CHECKPOINT_FILES)}.")


def _settings_from(weights: dict[str, torch.Tensor]) -> dict:
    """The fields of the configuration that converted weights determine; takes the anchors out of them."""
    blocks = [f"backbone.layer{stage}.{{}}.conv3.weight" for stage in (1, 2, 3, 4)]
    needed = [block.format(0) for block in blocks]
    needed += ["predictor.cls_score.weight", "predictor.attr_score.weight", "proposal_head.conv.weight"]
    missing = [name for name in (*needed, "anchors") if name not in weights]
    if missing:
        raise ValueError(f"These are not the weights of a Faster R-CNN with attributes: {missing} not found.")
    return {
        "depths": [
            next(i for i in range(len(weights)) if block.format(i) not in weights) for block in blocks
        ],
        "widths": [weights[block.format(0)].shape[1] for block in blocks],
        "num_classes": len(weights["predictor.cls_score.weight"]) - 1,
        "num_attributes": len(weights["predictor.attr_score.weight"]) - 1,
        "proposal_hidden_size": len(weights["proposal_head.conv.weight"]),
        "anchors": weights.pop("anchors").tolist(),
    }


__all__ = ["UC2RegionDetector", "UC2RegionDetectorOutput", "convert_frcnn_weights"]
