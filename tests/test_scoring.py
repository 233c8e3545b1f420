"""The fast score matrix against the plain forward of every pair, its resuming, and several processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import uc2.scoring
import uc2.scoring_layers
from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval
from uc2.retrieval import recall_at_k, search, search_captions
from uc2.scoring import save_scores, score_matrix

ROOT = Path(__file__).resolve().parents[1]
FEATURES = 16


class SpaceTokenizer:
    """Words are numbers already; `<s> … </s>` around them."""

    def __call__(self, text, truncation, max_length):
        return {"input_ids": [0, *map(int, text.split())][: max_length - 1] + [2]}


class StubProcessor:
    """What `score_matrix` asks of a processor, with regions that are dicts of arrays."""

    tokenizer = SpaceTokenizer()

    def encode_regions(self, region):
        return region


def make_model(cls=UC2ForRetrieval, seed=0, **sizes):
    torch.manual_seed(seed)
    config = UC2Config(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, region_feature_size=FEATURES, initializer_range=0.2, **sizes,
    )  # fmt: skip
    return cls(config).eval()


def make_data(num_texts=9, num_images=7, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(map(str, rng.integers(4, 60, rng.integers(1, 12)))) for _ in range(num_texts)]
    images = []
    for _ in range(num_images):
        n = rng.integers(2, 9)
        corners = np.sort(rng.uniform(size=(n, 2, 2)), axis=1).astype(np.float32)
        features = rng.normal(size=(n, FEATURES)).astype(np.float16)
        images.append({"region_features": features, "region_boxes": corners.reshape(n, 4)})
    return texts, images


@torch.no_grad()
def plain_scores(model, texts, images):
    """One pair per forward of the public model."""
    scores = np.zeros((len(texts), len(images)), np.float32)
    for t, text in enumerate(texts):
        ids = torch.tensor([SpaceTokenizer()(text, True, 38)["input_ids"]])
        for i, image in enumerate(images):
            outputs = model(
                input_ids=ids,
                region_features=torch.from_numpy(image["region_features"])[None],
                region_boxes=torch.from_numpy(image["region_boxes"])[None],
            )
            if isinstance(model, UC2ForRetrieval):
                scores[t, i] = outputs.logits.item()
            else:
                scores[t, i] = outputs.itm_logits[0, 1] - outputs.itm_logits[0, 0]
    return scores


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(uc2.scoring, "TEXTS_PER_BLOCK", 4)
    monkeypatch.setattr(uc2.scoring, "IMAGES_PER_BLOCK", 3)


@pytest.mark.parametrize("cls", [UC2ForRetrieval, UC2ForPreTraining])
@pytest.mark.parametrize("batch_tokens", [1, 60, 2500])
def test_scores_equal_the_plain_forward(cls, batch_tokens, small_blocks):
    model, (texts, images) = make_model(cls), make_data()
    scores = score_matrix(model, texts, images, StubProcessor(), batch_tokens=batch_tokens)
    expected = plain_scores(model, texts, images)
    assert scores.dtype == np.float32 and scores.std() > 0.05
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_model_of_one_layer(small_blocks):
    model, (texts, images) = make_model(), make_data()
    del model.uc2.encoder.layer[1]
    scores = score_matrix(model, texts, images, StubProcessor())
    np.testing.assert_allclose(scores, plain_scores(model, texts, images), atol=1e-5)


def test_each_text_and_image_is_embedded_once(small_blocks, monkeypatch):
    model, (texts, images) = make_model(), make_data()
    calls = {"embed_text": 0, "embed_regions": 0}
    for name in calls:
        original = getattr(model.uc2, name)

        def counted(*args, name=name, original=original):
            calls[name] += len(args[0])
            return original(*args)

        monkeypatch.setattr(model.uc2, name, counted)
    score_matrix(model, texts, images, StubProcessor())
    assert calls == {"embed_text": len(texts), "embed_regions": len(images)}


def test_the_mode_of_the_model_is_left_as_it_was():
    model, (texts, images) = make_model().train(), make_data()
    scores = score_matrix(model, texts, images, StubProcessor())
    assert model.training and model.uc2.encoder.layer[0].training
    np.testing.assert_allclose(scores, plain_scores(model.eval(), texts, images), atol=1e-5)


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.98), ("bf16", 0.98)])
def test_lower_precision_keeps_the_order(precision, limit):
    model, (texts, images) = make_model(), make_data(12, 12)
    weights = [parameter.clone() for parameter in model.parameters()]
    exact = score_matrix(model, texts, images, StubProcessor())
    scores = score_matrix(model, texts, images, StubProcessor(), precision=precision)
    assert not np.array_equal(scores, exact)
    ranks = [matrix.ravel().argsort().argsort() for matrix in (scores, exact)]
    assert np.corrcoef(ranks)[0, 1] > limit  # Spearman's correlation
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_another_activation_than_gelu():
    model, (texts, images) = make_model(hidden_act="relu"), make_data()
    scores = score_matrix(model, texts, images, StubProcessor())
    np.testing.assert_allclose(scores, plain_scores(model, texts, images), atol=1e-5)


def test_without_onednn(monkeypatch):
    """As on a GPU or a machine whose torch lacks the packed operators."""
    model, (texts, images) = make_model(), make_data()
    monkeypatch.setattr(uc2.scoring_layers, "_has_operators", lambda library, *names: False)
    scores = score_matrix(model, texts, images, StubProcessor())
    np.testing.assert_allclose(scores, plain_scores(model, texts, images), atol=1e-5)
    with pytest.raises(ValueError, match="int8 needs a CPU and torch built with oneDNN"):
        score_matrix(model, texts, images, StubProcessor(), precision="int8")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_adapters_count(precision):
    """A model with LoRA adapters that are not merged scores as its own forward does."""
    peft = pytest.importorskip("peft")
    model, (texts, images) = make_model(), make_data()
    before = plain_scores(model, texts, images)
    settings = peft.LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False, lora_dropout=0.5)
    adapted = peft.get_peft_model(model, settings).train()
    scores = score_matrix(adapted, texts, images, StubProcessor(), precision=precision)
    expected = plain_scores(model.eval(), texts, images)
    assert np.abs(expected - before).max() > 0.4
    np.testing.assert_allclose(scores, expected, atol={"fp32": 1e-5, "int8": 0.1}[precision])


@pytest.mark.parametrize("gelu", [False, True])
def test_int8_products_are_within_the_rounding_of_both_sides(gelu):
    """Each factor is off by half a step at most: the error of a sum of K products is bounded by that."""
    torch.manual_seed(0)
    linear, hidden = torch.nn.Linear(48, 10), torch.randn(3, 5, 48) * 3 + 1
    int8 = uc2.scoring_layers._Int8Linear(linear.weight.detach(), linear.bias.detach(), gelu, rows=15)
    exact = linear(hidden)
    step = (hidden.max() - hidden.min()) / int8.levels
    weight_step = linear.weight.abs().amax(dim=1) / 127
    bound = 48 * (step / 2 * linear.weight.abs().amax(dim=1) + weight_step / 2 * (hidden.abs().max() + step / 2))
    exact = torch.nn.functional.gelu(exact) if gelu else exact
    error = (int8(hidden) - exact).abs()
    assert (error < 1.2 * bound).all() and error.mean() < 0.02 and error.max() > 0
    zeros = int8(torch.zeros(1, 48))  # nothing to scale by
    torch.testing.assert_close(zeros, (torch.nn.functional.gelu(linear.bias) if gelu else linear.bias)[None])


def test_a_model_in_half_precision():
    model, (texts, images) = make_model(), make_data()
    exact = score_matrix(model, texts, images, StubProcessor())
    scores = score_matrix(model.to(torch.bfloat16), texts, images, StubProcessor())
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, exact, atol=0.1)


def test_a_killed_evaluation_continues(tmp_path, small_blocks, monkeypatch):
    model, (texts, images) = make_model(), make_data()
    expected = score_matrix(model, texts, images, StubProcessor())
    original, scored = uc2.scoring._PairScorer.score, []

    def killed(self, block):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(block.index)
        return original(self, block)

    monkeypatch.setattr(uc2.scoring._PairScorer, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        score_matrix(model, texts, images, StubProcessor(), resume_dir=tmp_path)
    first = list(scored)
    monkeypatch.setattr(
        uc2.scoring._PairScorer, "score", lambda s, block: (scored.append(block.index), original(s, block))[1]
    )
    scores = score_matrix(model, texts, images, StubProcessor(), resume_dir=tmp_path)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert sorted(scored) == list(range(9)) and scored[:4] == first  # 3 x 3 blocks, none of them twice


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    model, (texts, images) = make_model(), make_data()
    score_matrix(model, texts, images, StubProcessor(), resume_dir=tmp_path)
    other_images = [{**images[0], "region_boxes": images[0]["region_boxes"] / 2}, *images[1:]]
    for changed, arguments in {
        "model": (make_model(seed=1), texts, images),
        "texts": (model, texts[::-1], images),
        "regions": (model, texts, other_images),
    }.items():
        with pytest.raises(ValueError, match=rf"its {changed} differ"):
            score_matrix(*arguments, StubProcessor(), resume_dir=tmp_path)
    with pytest.raises(ValueError, match="its precision differ"):
        score_matrix(model, texts, images, StubProcessor(), resume_dir=tmp_path, precision="int8")


def test_long_texts_are_cut_to_what_the_model_takes():
    model, (texts, images) = make_model(), make_data()
    texts[0] = "5 " * 200
    scores = score_matrix(model, texts, images, StubProcessor())
    np.testing.assert_allclose(scores, plain_scores(model, texts, images), atol=1e-5)


def test_errors_are_clear():
    model, (texts, images) = make_model(), make_data()
    with pytest.raises(ValueError, match="one of fp32, bf16, int8"):
        score_matrix(model, texts, images, StubProcessor(), precision="int4")
    with pytest.raises(ValueError, match="0 texts and 7 images"):
        score_matrix(model, [], images, StubProcessor())
    images[3]["region_features"][0, 0] = np.nan
    with pytest.raises(ValueError, match="image 3 is NaN"):
        score_matrix(model, texts, images, StubProcessor())


def test_an_image_that_cannot_be_encoded_is_named():
    class Refusing(StubProcessor):
        def encode_regions(self, region):
            if len(region["region_boxes"]) > 8:
                raise ValueError("too many boxes")
            return region

    model, (texts, images) = make_model(), make_data()
    images[2] = {name: np.repeat(array, 8, axis=0) for name, array in images[2].items()}
    with pytest.raises(ValueError, match="image 2: too many boxes"):
        score_matrix(model, texts, images, Refusing())


def test_saving_leaves_one_whole_file(tmp_path):
    save_scores(tmp_path / "scores.npy", np.eye(3, dtype=np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), np.eye(3))


def test_search_returns_the_best_first():
    model, (texts, images) = make_model(), make_data()
    store = {f"image{i}": image for i, image in enumerate(images)}
    scores = plain_scores(model, texts, images)
    hits = search(model, StubProcessor(), texts[2], store, top_k=3)
    best = np.argsort(-scores[2])[:3]
    assert [hit.item for hit in hits] == [f"image{i}" for i in best]
    assert hits[0].probability == pytest.approx(1 / (1 + np.exp(-scores[2].max())), abs=1e-5)
    captions = search_captions(model, StubProcessor(), images[1], texts, top_k=100)
    assert [hit.item for hit in captions] == [texts[i] for i in np.argsort(-scores[:, 1])]


def test_a_model_that_is_right_by_construction(monkeypatch):
    """The score is made to be the negative distance between a number in the text and one in the image."""
    model = make_model()
    texts, images = make_data(20, 20)
    texts = [f"{number + 10} {text}" for number, text in enumerate(texts)]
    for number, image in enumerate(images):
        image["region_features"][0, 0] = number + 10
    scorer = uc2.scoring._PairScorer
    original = scorer._embed

    def embed(self, block):
        original(self, block)
        for i in block.texts:
            self.texts[i][:] = self.token_ids[i][1]
        for i in block.images:
            self.images[i][:] = float(self.regions[i]["region_features"][0, 0])

    def forward(self, rows, first_qkv, index, lengths):
        ends = torch.from_numpy(lengths - 1)[:, None]
        return -(rows[index[:, 0], 0] - rows[index.gather(1, ends)[:, 0], 0]).abs()

    monkeypatch.setattr(scorer, "_embed", embed)
    monkeypatch.setattr(scorer, "_forward", forward)
    scores = score_matrix(model, texts, images, StubProcessor())
    np.testing.assert_array_equal(scores, -np.abs(np.subtract.outer(np.arange(20), np.arange(20))))
    assert recall_at_k(scores, np.arange(20))["average_recall"] == 100.0


def test_two_processes_return_the_same_matrix(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, numpy as np, torch.distributed as dist
            sys.path[:0] = [{root!r}, {tests!r}]
            import uc2.scoring
            from test_scoring import StubProcessor, make_data, make_model
            uc2.scoring.TEXTS_PER_BLOCK, uc2.scoring.IMAGES_PER_BLOCK = 4, 3
            dist.init_process_group("gloo")
            texts, images = make_data()
            scores = uc2.scoring.score_matrix(
                make_model(), texts, images, StubProcessor(), resume_dir={blocks!r}
            )
            np.save(f"{out}/scores{{dist.get_rank()}}.npy", scores)
            """
        ).format(root=str(ROOT), tests=str(ROOT / "tests"), out=tmp_path, blocks=str(tmp_path / "blocks"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script)], check=True, env=environment, timeout=120, capture_output=True)
    texts, images = make_data()
    expected = plain_scores(make_model(), texts, images)
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"scores{rank}.npy"), expected, atol=1e-5)
    assert len(list((tmp_path / "blocks").glob("block_*.npy"))) == 9
    fingerprint = json.loads((tmp_path / "blocks" / "fingerprint.json").read_text())
    assert fingerprint.keys() >= {"model", "texts", "regions"}


def test_blocks_of_another_evaluation_or_damaged_ones_are_not_used(tmp_path, small_blocks, caplog):
    """A folder that lost its fingerprint to a kill in the middle of its removal, and a truncated file."""
    texts, images = make_data()
    options = {"processor": StubProcessor(), "resume_dir": tmp_path}
    score_matrix(make_model(seed=1), texts, images, **options)
    (tmp_path / "fingerprint.json").unlink()
    model = make_model(seed=2)
    expected = score_matrix(model, texts, images, StubProcessor())
    np.testing.assert_array_equal(score_matrix(model, texts, images, **options), expected)
    newest = max(tmp_path.glob("block_000000*.npy"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:100])
    np.testing.assert_array_equal(score_matrix(model, texts, images, **options), expected)
    assert "cannot be read" in caplog.text
