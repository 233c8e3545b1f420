"""The region detector against the tensors that the public PyTorch port computes with the same weights."""

import json
import math
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.ops import nms

from modeling_uc2.configuration_uc2_detector import UC2RegionDetectorConfig
from modeling_uc2.modeling_uc2_detector import UC2RegionDetector, make_anchors, select_regions
from processing_uc2.image_processing_uc2_detector import UC2DetectorImageProcessor

FIXTURES = Path(__file__).parent / "fixtures" / "region_detector"
PHOTOGRAPH = (
    Path(__file__).resolve().parents[2] / "shared/data/coco_regions/images/COCO_train2014_000000573195.jpg"
)
TINY = UC2RegionDetectorConfig(
    depths=[1, 1, 2, 1],
    widths=[4, 4, 8, 8],
    num_classes=7,
    num_attributes=5,
    anchor_sizes=[16, 32, 64],
    proposal_hidden_size=8,
    proposals_after_nms=40,
    score_threshold=None,
    min_detections=3,
    max_detections=20,
)


def reference_weight(name: str, shape: list[int]) -> torch.Tensor:
    """The deterministic weight of the reference, a function of its name."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("running_mean"):
        return 0.1 * noise
    if name.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if name.endswith(".norm.weight"):
        return (0.25 if ".conv3." in name else 1.0) * (1 + 0.1 * noise)
    if name.endswith("bias"):
        return 0.02 * noise
    if "cell_anchors" in name:
        return make_anchors([32, 64, 128, 256, 512], [0.5, 1, 2])
    if "embedding" in name:
        return noise
    gains = {
        "backbone.stem.conv1.weight": 1 / 60,
        "cls_score.weight": 0.5,
        "attr_score.weight": 0.5,
        "bbox_pred.weight": 0.05,
        "anchor_deltas.weight": 0.1,
    }
    gain = next((gain for ending, gain in gains.items() if name.endswith(ending)), 1.0)
    return noise * gain * math.sqrt((2 if len(shape) == 4 else 1) / math.prod(shape[1:]))


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "expected.safetensors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The full-size detector, loaded from a folder as the public checkpoint is laid out."""
    folder = tmp_path_factory.mktemp("frcnn")
    shapes = json.loads((FIXTURES / "state_dict_shapes.json").read_text())
    save_file({name: reference_weight(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return UC2RegionDetector.from_frcnn_checkpoint(
        folder, proposals_after_nms=100, score_threshold=None, min_detections=10, max_detections=36
    )


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return UC2RegionDetector(TINY).eval()


def assert_close(actual, wanted):
    """Within 1e-4 of the tensor's largest value."""
    assert actual.shape == wanted.shape
    difference = (actual - wanted).abs().max() / wanted.abs().max()
    assert difference < 1e-4, f"relative difference {difference:.1e}"


def random_images(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@torch.no_grad()
def test_every_recorded_tensor_is_reproduced(reference, expected):
    sizes = [(240, 359)]
    cells = reference.backbone(expected["pixel_values"], sizes)
    assert_close(cells[:, ::16], expected["res4_every_16th_channel"])

    (boxes,), (logits,) = reference.propose(cells, sizes)
    assert_close(boxes, expected["proposal_boxes"])
    assert_close(logits, expected["proposal_logits"])

    (features,), (class_logits,), (attribute_logits,), (deltas,) = reference.describe(cells, [boxes[:8]])
    assert_close(features, expected["region_features_first8"])
    assert_close(class_logits, expected["class_logits_first8"])
    assert_close(attribute_logits, expected["attribute_logits_first8"])
    assert_close(deltas.flatten(1)[:, :64], expected["box_deltas_first8_first64"])

    original_sizes = (expected["image_sizes"] * expected["scales_yx"]).round()
    output = reference(expected["pixel_values"], expected["image_sizes"], original_sizes)
    assert output.class_ids[0].tolist() == expected["final_obj_ids"].tolist()
    assert output.attribute_ids[0].tolist() == expected["final_attr_ids"].tolist()
    assert_close(output.class_scores[0], expected["final_obj_probs"])
    assert_close(output.attribute_scores[0], expected["final_attr_probs"])
    assert_close(output.region_boxes[0], expected["final_boxes"])
    assert_close(output.normalized_boxes[0], expected["final_normalized_boxes"])
    assert_close(output.region_features[0, :4], expected["final_roi_features_first4"])
