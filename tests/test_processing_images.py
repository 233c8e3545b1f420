"""UC2Processor(images=...): photographs -> model inputs with a detector attached; and the Auto classes."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, XLMRobertaTokenizer

from modeling_uc2 import UC2Config, UC2ForRetrieval, UC2RegionDetector, UC2RegionDetectorConfig
from processing_uc2 import UC2DetectorImageProcessor, UC2Processor
from uc2.region_extractors import regions_from_images

ROOT = Path(__file__).resolve().parents[1]
REGION_NAMES = {"region_features", "region_boxes", "region_attention_mask"}
TINY = UC2RegionDetectorConfig(
    depths=[1, 1, 1, 1],
    widths=[4, 4, 8, 8],
    num_classes=7,
    num_attributes=5,
    anchor_sizes=[16, 32, 64],
    proposal_hidden_size=8,
    proposals_after_nms=40,
)


@pytest.fixture(scope="module")
def tokenizer():
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁dog", "▁cat"]
    return XLMRobertaTokenizer(vocab=[(piece, -1.0) for piece in pieces] + [("<mask>", 0.0)])


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return UC2RegionDetector(TINY).eval()


@pytest.fixture(scope="module")
def image_processor():
    return UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.fixture
def processor(tokenizer, detector, image_processor):
    processor = UC2Processor(tokenizer, feature_size=TINY.feature_size, min_regions=3, max_regions=6)
    return processor.attach_region_detector(detector, image_processor)


def photograph(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


IMAGES = [photograph(90, 60), photograph(50, 70)]


def test_images_are_what_the_stores_regions_of_them_are(processor, detector, image_processor):
    """The same inputs as by way of the region store, whose features are rounded to float16."""
    limits = {"min_detections": 3, "max_detections": 6, "score_threshold": 0.2}
    stored = regions_from_images(detector, IMAGES, image_processor=image_processor, **limits)
    expected = processor(["a dog", "a cat"], regions=stored, return_tensors="pt")
    found = processor(["a dog", "a cat"], images=IMAGES, return_tensors="pt")
    assert found.keys() == expected.keys() and set(found) > REGION_NAMES
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4)


def test_a_batch_makes_no_difference(processor):
    both = processor(images=IMAGES, return_tensors="pt")
    for row, image in enumerate(IMAGES):
        alone = processor(images=image, return_tensors="pt")
        count = alone["region_boxes"].shape[1]
        assert set(alone) == REGION_NAMES
        for name in REGION_NAMES:
            torch.testing.assert_close(alone[name][0], both[name][row, :count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "limits, count", [({}, 3), ({"min_regions": 5, "max_regions": 5}, 5), ({"min_regions": 8}, 6)]
)
def test_the_calls_limits_reach_the_detector(processor, limits, count):
    """No probability is above 1, so the least number is kept."""
    inputs = processor(images=IMAGES[0], region_threshold=1.0, **limits, return_tensors="pt")
    assert inputs["region_boxes"].shape == (1, count, 4)


def test_a_turn_noted_by_the_camera_is_done(processor):
    turned, exif = IMAGES[0].rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    turned.info["exif"] = exif.tobytes()
    upright, found = (processor(images=image, return_tensors="pt") for image in (IMAGES[0], turned))
    torch.testing.assert_close(found["region_features"], upright["region_features"])


def test_without_a_threshold_the_most_regions_are_kept(processor):
    inputs = processor(images=IMAGES, region_threshold=None, return_tensors="pt")
    assert inputs["region_attention_mask"].tolist() == [[1] * 6] * 2


def test_a_detector_in_half_precision_serves(tokenizer, detector, image_processor):
    processor = UC2Processor(tokenizer, feature_size=TINY.feature_size)
    processor.attach_region_detector(copy.deepcopy(detector).bfloat16(), image_processor)
    assert processor(images=IMAGES[0], return_tensors="pt")["region_features"].dtype == torch.float32


def test_the_inputs_go_into_a_model(processor):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = UC2Config(**sizes, intermediate_size=16, region_feature_size=TINY.feature_size)
    with torch.no_grad():
        logits = UC2ForRetrieval(config).eval()(**processor(["a dog"] * 2, images=IMAGES, return_tensors="pt")).logits
    assert logits.shape == (2, 1) and logits.isfinite().all()


def test_the_detector_is_neither_copied_nor_saved(processor, detector, tmp_path):
    assert copy.deepcopy(processor)._attached.detector is detector
    assert "detector" not in processor.to_json_string() and repr(processor)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="attach_region_detector"):
        loaded(images=IMAGES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": IMAGES, "regions": {"features": [[0.0]]}}, "both given"),
        ({"images": IMAGES, "text": ["a dog"]}, "numbers of examples differ"),
        ({"images": []}, "images is an empty list"),
    ],
)
def test_wrong_calls(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_a_detector_of_another_width_is_refused(tokenizer, detector, image_processor):
    with pytest.raises(ValueError, match="width 32, expected 2048"):
        UC2Processor(tokenizer).attach_region_detector(detector, image_processor)


def test_the_auto_classes_load_a_saved_detector(detector, image_processor, tmp_path):
    detector.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UC2RegionDetectorConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, UC2RegionDetector)
    prepared = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(prepared, UC2DetectorImageProcessor) and prepared.size == image_processor.size
    inputs = prepared(IMAGES, return_tensors="pt")
    assert torch.equal(loaded(**inputs).region_features, detector(**inputs).region_features)


def test_the_packages_import_without_a_network():
    code = "import socket; socket.socket.connect = None; import modeling_uc2, processing_uc2"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
