"""A stand-in for the region detector on the demo scenes: its regions come from the pixels.

Where a detector proposes boxes, `propose_boxes` jitters true ones and adds boxes of background. What is in
a box is read from the image alone: maps of a timm backbone's first stages, RoI-aligned, reduced to a few
hundred principal components, and classified by a softmax regression (the probe). Components and probe are
fitted on the training split, as the paper's detector was trained on images of its own (bottom-up attention).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants, get_session
from torchvision.ops import roi_align

from uc2.scene_layout import COLOURS, HORIZON, LABELS, SETTINGS, Scene

logger = logging.getLogger(__name__)

DETECTOR_SIZE = 96  # side to which the image is scaled for the backbone
GRIDS = (5, 4, 3)  # cells per side that a region is pooled to, for each of the backbone's first stages
MAX_OVERLAP = 0.12  # of a distractor box with any object, as a share of the box
_JITTER = 0.04  # standard deviation of a box edge, in widths (heights) of the box
_MIN_PROPOSALS = 6


@dataclass(frozen=True)
class Proposals:
    """Boxes (n, 4) as fractions of the side, with what they show: for fitting and checking the probe only."""

    boxes: np.ndarray
    labels: np.ndarray  # (n,) index into LABELS
    colours: np.ndarray  # (n,) index into COLOURS, -1 for background


def propose_boxes(scene: Scene, rng: np.random.Generator) -> Proposals:
    """A jittered box for every object and two to four boxes of background, in random order."""
    true = np.array([thing.box for thing in scene.objects])
    sizes = np.tile(true[:, 2:] - true[:, :2], 2)
    boxes = list(np.clip(true + rng.normal(0, _JITTER, true.shape) * sizes, 0, 1))
    labels = [LABELS.index(thing.kind) for thing in scene.objects]
    colours = [COLOURS.index(thing.colour) for thing in scene.objects]
    for _ in range(max(int(rng.integers(2, 5)), _MIN_PROPOSALS - len(boxes))):
        half = int(rng.integers(2))
        box = _background_box(rng, half, true)
        if box is not None:
            boxes.append(box)
            labels.append(LABELS.index(SETTINGS[scene.setting][half]))
            colours.append(-1)
    order = rng.permutation(len(boxes))
    return Proposals(np.array(boxes)[order], np.array(labels)[order], np.array(colours)[order])


def _background_box(rng: np.random.Generator, half: int, objects: np.ndarray) -> np.ndarray | None:
    """A box in the upper (0) or lower (1) half that shows hardly any object; None for no room."""
    for _ in range(40):
        width, height = rng.uniform(0.18, 0.42, 2)
        x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - HORIZON - height) + half * HORIZON
        shared_width = np.minimum(objects[:, 2], x + width) - np.maximum(objects[:, 0], x)
        shared_height = np.minimum(objects[:, 3], y + height) - np.maximum(objects[:, 1], y)
        shared = shared_width.clip(0) * shared_height.clip(0)
        if shared.max() <= MAX_OVERLAP * width * height:
            return np.array([x, y, x + width, y + height])
    return None


def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Whether the Hugging Face Hub answers; a failed download would be retried for most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
        return True
    except Exception as error:  # of the HTTP library under the Hub's client, which is its own affair
        logger.info("%s cannot be reached: %s", constants.ENDPOINT, error)
        return False


class RegionEncoder:
    """Pixels in boxes -> raw features, by the first stages of a timm backbone.

    Args:
        backbone: a timm model with feature stages.
        pretrained: True, False, or None for "if the Hub can be reached"; `self.pretrained` tells.
        seed: of the random weights.
    """

    def __init__(self, backbone: str = "resnet18", *, pretrained: bool | None = None, seed: int = 0):
        self.pretrained = hub_is_reachable() if pretrained is None else pretrained
        if not self.pretrained:
            logger.warning("%s has random weights (seed %d), not pretrained ones", backbone, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = timm.create_model(
                backbone, pretrained=self.pretrained, features_only=True, out_indices=tuple(range(len(GRIDS)))
            )
        self.model.eval()
        config = self.model.pretrained_cfg
        self.mean, self.std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, boxes: Sequence[np.ndarray]) -> torch.Tensor:
        """Features (all regions, width) of `images` (B, H, W, 3) uint8 with `boxes` B x (n, 4) in [0, 1]."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(
            pixels, size=DETECTOR_SIZE, mode="bilinear", antialias=True, align_corners=False
        )
        maps = self.model((pixels - self.mean) / self.std)
        rois = [torch.from_numpy(box).float() * DETECTOR_SIZE for box in boxes]
        pooled = [
            roi_align(
                stage,
                rois,
                grid,
                spatial_scale=stage.shape[-1] / DETECTOR_SIZE,
                sampling_ratio=2,
                aligned=True,
            )
            for stage, grid in zip(maps, GRIDS, strict=True)
        ]
        return torch.cat([stage.flatten(1) for stage in pooled], dim=1)


@dataclass(frozen=True)
class PrincipalComponents:
    """Standardisation and projection of raw features, scaled to unit variance on average."""

    mean: torch.Tensor  # (width,)
    projection: torch.Tensor  # (width, F), with the division by each raw feature's deviation

    @classmethod
    def fit(cls, raw: torch.Tensor, size: int, seed: int = 0) -> PrincipalComponents:
        """The first `size` components of `raw` (regions, width), fewer when there are fewer regions."""
        mean, deviation = raw.mean(0), raw.std(0).clamp(min=1e-4)
        standard = (raw - mean) / deviation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, _, components = torch.svd_lowrank(standard, q=min(size, *raw.shape), niter=2)
        scale = (standard @ components).std()
        return cls(mean, components / scale / deviation[:, None])

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw - self.mean) @ self.projection


@dataclass(frozen=True)
class SoftmaxProbe:
    """Linear class probabilities from features."""

    weight: torch.Tensor  # (F, classes)
    bias: torch.Tensor  # (classes,)

    @classmethod
    def fit(cls, features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> SoftmaxProbe:
        """Multinomial logistic regression with a small L2 penalty, by L-BFGS from zero."""
        weight = torch.zeros(features.shape[1], num_classes, requires_grad=True)
        bias = torch.zeros(num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(features @ weight + bias, labels) + 1e-3 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(weight.detach(), bias.detach())

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return (features @ self.weight + self.bias).softmax(-1)

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        return (self(features).argmax(-1) == labels).float().mean().item()
