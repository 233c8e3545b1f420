"""Pictures: the attention numbers against the model's own, and that what is drawn lands where it should."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from modeling_uc2 import UC2Config, UC2ForRetrieval
from processing_uc2 import UC2Processor
from uc2 import visualization
from uc2.region_store import RegionStore
from uc2.visualization import (
    WordAttention,
    draw_word_attention,
    heat_map,
    image_grid,
    recall_curves,
    training_curves,
    word_attention,
    word_tokens,
)


@pytest.fixture(scope="module")
def processor(tiny_corpus):
    return UC2Processor(AutoTokenizer.from_pretrained(tiny_corpus.tokenizer), feature_size=12)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    config = UC2Config(
        vocab_size=len(processor.tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, region_feature_size=12, num_region_classes=4,
        initializer_range=0.3,
    )  # fmt: skip
    return UC2ForRetrieval(config)


@pytest.fixture(scope="module")
def region(tiny_corpus):
    return RegionStore(tiny_corpus.regions)["image0"]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), float)


def test_word_attention_is_the_model_s(model, processor, region):
    """Attention of one layer and head, taken by hand from a plain eager forward."""
    text, word = "a ball near a tree", "tree"
    model.train()
    attention = word_attention(model, processor, text, word, region, layer=1, head=0)
    assert model.training and model.config._attn_implementation == "sdpa"  # left as it was
    model.eval()
    inputs = processor(text=text, regions=region, return_tensors="pt")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model.uc2(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    tokens = word_tokens(processor.tokenizer, text, word)
    expected = layers[1][0, 0, tokens][:, inputs["input_ids"].shape[1] :].mean(0)
    np.testing.assert_allclose(attention.weights, expected / expected.sum(), atol=1e-6)
    np.testing.assert_allclose(attention.boxes, inputs["region_boxes"][0], atol=1e-6)
    averaged = word_attention(model, processor, text, word, region)
    to_regions = torch.stack(layers)[:, 0, :, tokens, inputs["input_ids"].shape[1] :].mean((0, 1, 2))
    np.testing.assert_allclose(averaged.weights, to_regions / to_regions.sum(), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "word"), [("a ball near a tree", "ball"), ("木の近くの家", "近く"), ("ein Haus neben", "Haus")]
)
def test_word_tokens_spell_the_word(processor, text, word):
    ids = processor.tokenizer(text)["input_ids"]
    pieces = processor.tokenizer.convert_ids_to_tokens(ids)
    spelt = "".join(pieces[position] for position in word_tokens(processor.tokenizer, text, word))
    assert word in spelt.replace("▁", "") and "▁" not in spelt[1:]


def test_what_is_not_there_is_named(model, processor, region):
    with pytest.raises(ValueError, match="the word 'dog' is not in the text 'a ball'"):
        word_attention(model, processor, "a ball", "dog", region)
    with pytest.raises(ValueError, match="there is no layer 2; the model has 2"):
        word_attention(model, processor, "a ball", "ball", region, layer=2)
    with pytest.raises(ValueError, match="there is no head -3"):
        word_attention(model, processor, "a ball", "ball", region, head=-3)


def test_the_attended_box_lights_up(tmp_path):
    """One box has all the attention: the picture is warm (red over blue) there and grey elsewhere."""
    boxes = np.array([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]], np.float32)
    attention = WordAttention("a ball", "ball", boxes, np.array([1.0, 0.0]))
    image = Image.new("RGB", (200, 200), (120, 120, 120))
    path = draw_word_attention(image, {"en": attention}, tmp_path / "attention.png", outlined=0)
    warmth = pixels(path)[..., 0] - pixels(path)[..., 2]
    height, width = warmth.shape
    middle = warmth[height // 2]
    assert middle[width // 4] > 50 and abs(middle[int(width * 0.6)]) < 5
    image.save(tmp_path / "image.png")
    languages = {code: attention for code in ("en", "de", "cs", "ja")}
    wide = draw_word_attention(tmp_path / "image.png", languages, tmp_path / "languages.png")
    assert Image.open(wide).width > 2 * Image.open(path).width
    with pytest.raises(ValueError, match="no attention"):
        draw_word_attention(image, {}, tmp_path / "none.png")


def test_characters_without_a_font_are_said_not_boxed(tmp_path, recwarn):
    attention = WordAttention("部屋のベッド", "ベッド", np.array([[0, 0, 1, 1]], np.float32), np.ones(1))
    draw_word_attention(Image.new("RGB", (50, 50)), {"ja": attention}, tmp_path / "ja.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_training_curves(tmp_path):
    history = [
        {"step": step, "loss": 1.0, "loss_mlm": 5 / step, "loss_itm": 0.7, "eval_loss_mlm": 4 / step,
         "eval_accuracy_mlm": 0.5, "eval_accuracy_mlm_de": 0.4}
        for step in range(1, 30)
    ]  # fmt: skip
    two = training_curves(history, tmp_path / "two.png")
    three = training_curves(
        history, tmp_path / "three.png", early_adaptation=[{"step": 1, "loss": 2.0}, {"train_loss": 1.0}]
    )
    assert Image.open(three).width > Image.open(two).width
    tuned = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_vqa_score": 50.0}]
    assert training_curves(tuned, tmp_path / "tuned.png", metrics=["eval_vqa_score"]).exists()
    assert training_curves([], tmp_path / "empty.png").exists()


def test_a_language_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(visualization, "save_figure", lambda figure, path: figures.append(figure))
    accuracies = {"mlm": ("en", "de", "ja"), "vtlm": ("de", "ja")}  # VTLM's captions are named by the second language
    history = [
        {"step": 1, **{f"eval_{what}_{name}{end}": 0.5 for what in ("loss", "accuracy") for end in ends}}
        for name, languages in accuracies.items()
        for ends in [("", *(f"_{language}" for language in languages))]
    ]
    training_curves(history, tmp_path / "curves.png")
    lines = [line for panel in figures[0].axes for line in panel.get_lines()]
    colours = {name: [line.get_color() for line in lines if line.get_label() == name] for name in ("en", "de", "ja")}
    assert [len(found) for found in colours.values()] == [1, 2, 2]
    assert len({colour for found in colours.values() for colour in found}) == 3
    assert all(len(set(found)) == 1 for found in colours.values())


def test_heat_map(tmp_path):
    values = [[10, 90], [np.nan, 50]]
    assert heat_map(values, ["a", "b"], ["en", "de"], tmp_path / "map.png", title="AR").exists()
    with pytest.raises(ValueError, match=r"values are \(2, 2\), but there are 1 rows"):
        heat_map(values, ["a"], ["en", "de"], tmp_path / "bad.png")
    assert not (tmp_path / "bad.png").exists()


def test_recall_curves(tmp_path):
    curves = {"en": {1: 20.0, 5: 50.0}, "de": {1: 10.0, 5: 40.0}}
    assert recall_curves(curves, tmp_path / "recall.png", chance={1: 1.0, 5: 5.0}).exists()


def test_image_grid_keeps_rank_order(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [Image.new("RGB", (80, 80), colour) for colour in colours]
    path = image_grid(
        images, ["1", "2", "3"], tmp_path / "grid.png", columns=3, heading="ein Hund", correct=[1, 0, 0]
    )
    row = pixels(path)[pixels(path).shape[0] // 2]
    seen = [
        int(pixel.argmax()) for pixel in row[[row.shape[0] // 6, row.shape[0] // 2, row.shape[0] * 5 // 6]]
    ]
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="3 images and 1 titles"):
        image_grid(images, ["1"], tmp_path / "bad.png")
