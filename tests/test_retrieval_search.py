"""A picture as a query: its regions are the detector's, from Python and on the command line."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_region_detector import TINY
from transformers import XLMRobertaTokenizer

from modeling_uc2 import UC2Config, UC2ForRetrieval
from modeling_uc2.modeling_uc2_detector import UC2RegionDetector
from processing_uc2 import UC2Processor
from uc2.data_error import DataError
from uc2.region_extractors import regions_from_images
from uc2.retrieval import search_captions
from uc2.retrieval_search import SearchArguments, search_and_show

CAPTIONS = ["a dog", "a cat", "dog dog", "a cat a dog"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model, its processor, and a folder with a detector and a picture."""
    folder = tmp_path_factory.mktemp("search")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁dog", "▁cat"]
    tokenizer = XLMRobertaTokenizer(vocab=[(piece, -1.0) for piece in pieces] + [("<mask>", 0.0)])
    processor = UC2Processor(tokenizer, feature_size=TINY.feature_size, min_regions=3, max_regions=6)
    torch.manual_seed(0)
    config = UC2Config(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, region_feature_size=TINY.feature_size, initializer_range=0.3,
    )  # fmt: skip
    UC2RegionDetector(TINY).save_pretrained(folder / "detector")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return UC2ForRetrieval(config).eval(), processor, folder


def test_a_picture_finds_the_captions_that_its_regions_find(parts, capsys):
    model, processor, folder = parts
    picture = folder / "picture.png"
    find = SearchArguments(search_image=str(picture), detector=str(folder / "detector"), top_k=3)
    hits = search_and_show(find, model, processor, {}, CAPTIONS, folder)
    detector = UC2RegionDetector.from_pretrained(folder / "detector")
    limits = {"min_detections": 3, "max_detections": 6, "score_threshold": 0.2}
    with Image.open(picture) as opened:
        [row] = regions_from_images(detector, [opened.convert("RGB")], **limits)
    expected = search_captions(model, processor, row, CAPTIONS, top_k=3)
    assert [hit.item for hit in hits] == [hit.item for hit in expected]
    np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in expected], atol=5e-3)
    assert capsys.readouterr().out.splitlines()[0].endswith(hits[0].item)


def test_what_cannot_be_searched_is_said(parts):
    model, processor, folder = parts
    (folder / "text.png").write_text("no picture")
    for name, detector, message in (
        ("lost", None, "field 'search_image': found 'lost', expected an image of the region store, or a picture"),
        (folder / "picture.png", None, "field 'detector': found None, expected one to find the regions of .*png"),
        (folder / "text.png", str(folder / "detector"), "text.png: found no picture, expected a picture file"),
    ):
        find = SearchArguments(search_image=str(name), detector=detector)
        with pytest.raises(DataError, match=message):
            search_and_show(find, model, processor, {}, CAPTIONS, folder)
    with pytest.raises(DataError, match="found no caption, expected captions to search among"):
        search_and_show(SearchArguments(search_image="x"), model, processor, {"x": None}, [], folder)
