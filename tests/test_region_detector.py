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
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_uc2.configuration_uc2_detector import UC2RegionDetectorConfig
from modeling_uc2.modeling_uc2_detector import (
    UC2RegionDetector,
    apply_deltas,
    convert_frcnn_weights,
    make_anchors,
    select_regions,
)
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
        return torch.tensor(make_anchors([32, 64, 128, 256, 512], [0.5, 1, 2]))
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
    weights = {name: reference_weight(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return UC2RegionDetector.from_frcnn_checkpoint(
        folder, proposals_after_nms=100, score_threshold=None, min_detections=10, max_detections=36
    )


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = UC2RegionDetector(TINY).eval()
    for name, buffer in model.named_buffers():  # statistics as after training: padding would no longer be 0
        buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else 0))
    return model


def assert_close(actual, wanted):
    """Within 1e-4 of the tensor's largest value."""
    assert actual.shape == wanted.shape
    difference = (actual - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
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

    ((features, class_logits, attribute_logits, deltas),) = reference.describe(cells, [boxes[:8]])
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


def test_image_processor_makes_the_recorded_pixels(expected):
    if not PHOTOGRAPH.exists():
        pytest.skip("the photograph is not here")
    processor = UC2DetectorImageProcessor(size={"shortest_edge": 240, "longest_edge": 1333})
    inputs = processor(Image.open(PHOTOGRAPH), return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_sizes"], expected["image_sizes"])
    assert torch.allclose(inputs["original_sizes"] / inputs["image_sizes"], expected["scales_yx"])


def test_image_processor_by_hand():
    """Shortest edge 800 unless the longest exceeds 1333; BGR minus mean; zeros right and below."""
    red = Image.new("RGB", (100, 200), (255, 0, 0))
    wide = Image.new("RGB", (400, 100), (0, 0, 255))
    inputs = UC2DetectorImageProcessor()([red, wide], return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[1333, 667], [333, 1333]]
    assert inputs["original_sizes"].tolist() == [[200, 100], [100, 400]]
    assert inputs["pixel_values"].shape == (2, 3, 1333, 1333)
    mean = torch.tensor([102.9801, 115.9465, 122.7717])
    assert torch.allclose(inputs["pixel_values"][0, :, 0, 0], torch.tensor([0.0, 0, 255]) - mean)
    assert torch.allclose(inputs["pixel_values"][1, :, 332, 1332], torch.tensor([255.0, 0, 0]) - mean)
    assert not inputs["pixel_values"][0, :, :, 667:].any() and not inputs["pixel_values"][1, :, 333:].any()


def test_image_processor_takes_any_mode_and_refuses_numbers_that_are_no_pixels():
    processor = UC2DetectorImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    images = [Image.new(mode, (40, 32)) for mode in ("L", "P", "RGBA", "CMYK", "1")]
    assert processor(images, return_tensors="pt")["pixel_values"].shape == (5, 3, 32, 40)
    assert processor(Image.new("RGB", (1, 900)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 16)
    with pytest.raises(ValueError, match="uint8"):
        processor(np.zeros((32, 32, 3), np.float32))


def test_an_image_has_the_same_regions_alone_and_in_a_padded_batch(tiny):
    processor = UC2DetectorImageProcessor(size={"shortest_edge": 97, "longest_edge": 171})
    images = random_images((120, 97), (97, 140), (64, 64), (90, 310))
    options = {"output_class_probs": True, "max_detections": 40}
    together = tiny(**processor(images, return_tensors="pt"), **options)
    assert len(set(together.region_attention_mask.sum(1).tolist())) > 1  # so that there is padding to test
    for i, image in enumerate(images):
        alone = tiny(**processor(image, return_tensors="pt"), **options)
        count = int(together.region_attention_mask[i].sum())
        assert alone.region_boxes.shape == (1, count, 4)
        for name, values in alone.items():
            assert_close(together[name][i, :count], values[0])
            assert not together[name][i, count:].any()


def test_boxes_are_in_the_original_image_and_scores_fall(tiny):
    processor = UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 200})
    output = tiny(**processor(random_images((100, 300)), return_tensors="pt"), output_class_probs=True)
    boxes = output.region_boxes[0]
    assert (boxes >= 0).all() and (boxes[:, 2::4] <= 300.01).all() and (boxes[:, 3::4] <= 100.01).all()
    assert boxes[:, 2].max() > 150
    torch.testing.assert_close(output.normalized_boxes[0] * torch.tensor([300, 100, 300, 100]), boxes)
    scores = output.class_scores[0]
    assert (scores.diff() <= 0).all()
    assert torch.equal(output.class_probs[0].max(-1).values, scores)
    assert torch.equal(output.class_probs[0].argmax(-1), output.class_ids[0])


def test_number_of_regions(tiny):
    inputs = UC2DetectorImageProcessor(size={"shortest_edge": 96, "longest_edge": 200})(
        random_images((96, 140), (120, 96)), return_tensors="pt"
    )

    def count(**options):
        return tiny(**inputs, **options).region_attention_mask.sum(1).tolist()

    assert count(min_detections=15, max_detections=15) == [15, 15]
    assert count(min_detections=4, max_detections=4) == [4, 4]
    assert count(min_detections=5, max_detections=20, score_threshold=1.0) == [5, 5]
    assert all(
        5 <= number <= 20 for number in count(min_detections=5, max_detections=20, score_threshold=-1.0)
    )
    with pytest.raises(ValueError, match="min_detections"):
        count(min_detections=21)


def test_selection_by_hand():
    """Boxes 0 and 1 overlap by 0.9, box 2 stands apart, box 3 overlaps box 2 by 0.5."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [20, 0, 30, 5]])
    scores = torch.tensor([0.5, 0.9, 0.3, 0.1])

    def select(score_threshold, least, most):
        chosen = select_regions(boxes, scores, 0.3, score_threshold=score_threshold, least=least, most=most)
        return chosen.tolist()

    assert select(None, 1, 9) == [1, 2]  # 0 and 3 are suppressed
    assert select(0.4, 1, 9) == [1]  # 2 is below the threshold …
    assert select(0.4, 2, 9) == [1, 2]  # … but at least two are wanted
    assert select(None, 3, 9) == [1, 0, 2]  # the best suppressed one joins, in its place
    assert select(None, 1, 1) == [1]
    assert select(None, 9, 9) == [1, 0, 2, 3]  # there are no more


def test_deltas_by_hand():
    box = torch.tensor([[10.0, 20, 30, 60]])  # centre (20, 40), 20 x 40
    deltas = torch.tensor([[1.0, -1, math.log(2) * 5, 100]])
    moved = apply_deltas(box, deltas, [10, 10, 5, 5])
    height = 40 * 1000 / 16  # growth is bounded
    torch.testing.assert_close(moved, torch.tensor([[2.0, 36 - height / 2, 42, 36 + height / 2]]))


def test_given_boxes_are_described_in_their_order(tiny):
    inputs = UC2DetectorImageProcessor(size={"shortest_edge": 96, "longest_edge": 200})(
        random_images((192, 280), (240, 192)), return_tensors="pt"
    )
    found = tiny(**inputs)
    boxes = [
        torch.tensor([[0.0, 0, 280, 192], [10, 20, 60, 90], [0, 0, 280, 192]]),
        torch.tensor([[5.0, 5, 99, 99]]),
    ]
    given = tiny(**inputs, boxes=boxes)
    assert given.region_attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    torch.testing.assert_close(given.region_boxes[0], boxes[0])
    assert torch.equal(given.region_features[0, 0], given.region_features[0, 2])
    assert not torch.equal(given.region_features[0, 0], given.region_features[0, 1])
    assert found.region_features.shape[-1] == given.region_features.shape[-1] == 32


def test_half_precision_finds_about_the_same(tiny):
    inputs = UC2DetectorImageProcessor(size={"shortest_edge": 96, "longest_edge": 200})(
        random_images((96, 140)), return_tensors="pt"
    )
    box = [torch.tensor([[10.0, 10, 90, 80]])]
    exact = tiny(**inputs, boxes=box).region_features
    half = UC2RegionDetector(TINY).eval()
    half.load_state_dict(tiny.state_dict())
    features = half.to(torch.bfloat16)(**inputs, boxes=box).region_features
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact).abs().max() < 0.1 * exact.abs().max()


# --- checkpoints ---


def frcnn_names(model):
    """The public names of a tiny model's weights, by the shapes file: same names, other numbers of blocks."""
    shapes = json.loads((FIXTURES / "state_dict_shapes.json").read_text())
    ours = model.state_dict()
    public = convert_frcnn_weights({name: name for name in shapes})
    weights = {theirs: ours[name] for name, theirs in public.items() if name in ours}
    anchors = torch.tensor(make_anchors(TINY.anchor_sizes, TINY.anchor_ratios))
    return weights | {"proposal_generator.anchor_generator.cell_anchors.0": anchors}


def test_every_public_name_is_mapped(reference):
    shapes = json.loads((FIXTURES / "state_dict_shapes.json").read_text())
    counted = [name for name in shapes if not name.endswith("num_batches_tracked")]
    assert len(reference.state_dict()) == len(counted) - 1  # the anchors are part of the configuration
    assert reference.config.depths == [3, 4, 23, 3] and reference.config.widths == [64, 128, 256, 512]
    assert (reference.config.num_classes, reference.config.num_attributes) == (1600, 400)


def test_pytorch_checkpoint_and_folder_of_safetensors_give_the_same_model(tiny, tmp_path):
    torch.save(frcnn_names(tiny), tmp_path / "pytorch_model.bin")
    limits = {"min_detections": 3, "max_detections": 20, "score_threshold": None, "proposals_after_nms": 40}
    loaded = UC2RegionDetector.from_frcnn_checkpoint(tmp_path, **limits)
    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()
    again = UC2RegionDetector.from_pretrained(tmp_path / "saved")
    pixel_values = torch.randn(1, 3, 96, 140, generator=torch.Generator().manual_seed(0)) * 50
    wanted = tiny(pixel_values)
    for model in (loaded, again):
        for name, values in model(pixel_values).items():
            assert torch.equal(values, wanted[name]), name


def test_wrong_checkpoints_are_refused(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        UC2RegionDetector.from_frcnn_checkpoint(tmp_path)
    weights = frcnn_names(tiny)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not found"):
        UC2RegionDetector.from_frcnn_checkpoint(tmp_path)
    del weights["backbone.res3.0.conv2.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 parameters are missing.*layer2.0.conv2"):
        UC2RegionDetector.from_frcnn_checkpoint(tmp_path)


def test_saved_folder_loads_with_its_own_code(tiny, tmp_path):
    """In a process that cannot import this package."""
    tiny.save_pretrained(tmp_path / "model")
    UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 99}).save_pretrained(
        tmp_path / "model"
    )
    program = (
        "import sys, torch\n"
        "from transformers import AutoImageProcessor, AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert processor.size['longest_edge'] == 99, processor.size\n"
        "torch.save(model(torch.ones(1, 3, 64, 99)).region_features, sys.argv[2])\n"
    )
    # -I: neither this directory nor the environment is read; the module cache goes beside the files.
    code = f"import os; os.environ['HF_MODULES_CACHE'] = {str(tmp_path / 'modules')!r}\n{program}"
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "model"), str(tmp_path / "features.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "features.pt"), tiny(torch.ones(1, 3, 64, 99)).region_features)


def test_configuration_names_what_is_wrong():
    with pytest.raises(StrictDataclassError, match="min_detections"):
        UC2RegionDetectorConfig(min_detections=20, max_detections=10)
    with pytest.raises(StrictDataclassError, match="four stages"):
        UC2RegionDetectorConfig(depths=[1, 1, 1])
