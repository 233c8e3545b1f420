"""Configuration of the region detector: the Visual Genome Faster R-CNN of Anderson et al. (CVPR 2018)."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class UC2RegionDetectorConfig(PreTrainedConfig):
    r"""
    Configuration of [`UC2RegionDetector`]. The defaults are the detector whose regions UC2 was trained on.

    Args:
        depths (`list[int]`, defaults to `[3, 4, 23, 3]`): residual blocks per stage (ResNet-101).
        widths (`list[int]`, defaults to `[64, 128, 256, 512]`): bottleneck widths per stage; a stage puts out
            four times as many channels, so a region's feature is 4 x 512 = 2048 numbers.
        num_classes, num_attributes (`int`): object classes and attributes, without the background entry that
            each of the two heads adds as its last one.
        anchor_sizes, anchor_ratios (`list[float]`): side of an anchor in pixels of the resized image, and
            height / width.
        anchors (`list[list[float]]`, *optional*): x1, y1, x2, y2 of each anchor around the origin, instead of
            sizes and ratios.
        proposal_hidden_size (`int`): channels of the proposal head.
        proposals_before_nms, proposals_after_nms (`int`), proposal_nms_threshold (`float`): proposals kept.
        nms_threshold (`float`): intersection over union above which the lower-scored of two detections goes.
        score_threshold (`float`, *optional*): detections with a lower class probability are dropped while
            more than `min_detections` remain; `None` keeps all. The regions of the paper used 0.2.
        min_detections, max_detections (`int`): bounds of the regions per image; equal for a fixed number.
        box_weights (`list[float]`): factors by which the box head's deltas were multiplied in training.

    Invalid values raise a `huggingface_hub.errors.StrictDataclassError` that names the field.
    """

    model_type = "uc2_region_detector"
    _auto_class = "AutoConfig"

    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    num_classes: int = 1600
    num_attributes: int = 400
    anchor_sizes: list[float | int] | tuple[float | int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: list[float | int] | tuple[float | int, ...] = (0.5, 1, 2)
    anchors: list[list[float]] | None = None
    proposal_hidden_size: int = 512
    proposals_before_nms: int = 6000
    proposals_after_nms: int = 300
    proposal_nms_threshold: float | int = 0.7
    nms_threshold: float | int = 0.3
    score_threshold: float | int | None = 0.2
    min_detections: int = 10
    max_detections: int = 100
    box_weights: list[float | int] | tuple[float | int, ...] = (10, 10, 5, 5)

    def __post_init__(self, **kwargs):
        for name in ("depths", "widths", "anchor_sizes", "anchor_ratios", "box_weights"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @property
    def feature_size(self) -> int:
        """Width of a region's feature."""
        return 4 * self.widths[-1]

    def validate_stages(self):
        if len(self.depths) != 4 or len(self.widths) != 4:
            raise ValueError(
                f"UC2RegionDetectorConfig.depths and .widths name the four stages of a ResNet; "
                f"found {self.depths} and {self.widths}."
            )
        if len(self.box_weights) != 4:
            raise ValueError(
                f"UC2RegionDetectorConfig.box_weights is {self.box_weights}; expected 4 numbers."
            )

    def validate_detections(self):
        if not 1 <= self.min_detections <= self.max_detections:
            raise ValueError(
                f"UC2RegionDetectorConfig: 1 <= min_detections <= max_detections must hold; "
                f"found {self.min_detections} and {self.max_detections}."
            )


__all__ = ["UC2RegionDetectorConfig"]
