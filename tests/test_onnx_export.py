"""ONNX files of the three heads compute in onnxruntime what the models compute in PyTorch."""

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model
from processing_uc2 import UC2Processor
from uc2.data_error import DataError
from uc2.onnx_export import export_onnx, largest_difference, main, quantize_onnx, random_inputs
from uc2.region_store import RegionStore

TEXTS = ["a ball near a tree", "魚", "ein Haus neben einem Fisch"]
OUTPUTS = {
    UC2ForPreTraining: {"itm_logits", "prediction_logits"},
    UC2ForRetrieval: {"logits"},
    UC2ForVQA: {"logits"},
}


def tiny_model(model_class, **changes):
    torch.manual_seed(0)
    config = UC2Config(
        **{"vocab_size": 4000, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **changes},
        intermediate_size=32, max_position_embeddings=66, region_feature_size=12, initializer_range=0.3, num_labels=5,
    )  # fmt: skip
    return model_class(config).eval()


@pytest.fixture(scope="module", autouse=True)
def quiet_tracing():
    """pytest would format and keep every line of torch's trace, which takes longer than the export."""
    logger = logging.getLogger("torch.__trace")
    logger.propagate = False
    yield
    logger.propagate = True


@pytest.fixture(scope="module", params=list(OUTPUTS), ids=lambda kind: kind.__name__)
def exported(request, tiny_corpus, tmp_path_factory):
    """(model, its file, processor), the file written by the command from a saved folder."""
    folder = tmp_path_factory.mktemp("onnx")
    processor = UC2Processor(AutoTokenizer.from_pretrained(tiny_corpus.tokenizer), feature_size=12)
    model = tiny_model(request.param)
    model.save_pretrained(folder / "model")
    file = folder / "files" / "uc2.onnx"
    assert main(["--model", str(folder / "model"), "--output", str(file)]) < 1e-4
    assert [path.name for path in file.parent.iterdir()] == ["uc2.onnx"]
    onnx.checker.check_model(file, full_check=True)
    assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()
    return model, file, processor


def session_of(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def assert_same(model, session, inputs: dict) -> None:
    """`inputs` for both; onnxruntime gets an empty text or region set where PyTorch gets none."""
    batch = len(next(iter(inputs.values())))
    empty = {
        "input_ids": torch.zeros(batch, 0, dtype=torch.long),
        "attention_mask": torch.zeros(batch, 0, dtype=torch.long),
        "region_features": torch.zeros(batch, 0, 12),
        "region_boxes": torch.zeros(batch, 0, 4),
        "region_attention_mask": torch.zeros(batch, 0, dtype=torch.long),
    }
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: value.numpy() for name, value in {**empty, **inputs}.items()})
    assert set(names) == OUTPUTS[type(model)]
    with torch.no_grad():
        expected = model(**inputs)
    for name, value in zip(names, found, strict=True):
        np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=1e-5, err_msg=name)


def test_ragged_batches_of_the_processor(exported, tiny_corpus):
    model, file, processor = exported
    session, regions = session_of(file), list(RegionStore(tiny_corpus.regions).values())
    assert len({len(row.boxes) for row in regions[:3]}) > 1
    assert_same(model, session, dict(processor(text=TEXTS, regions=regions[:3], return_tensors="pt")))
    # Padding changes nothing: a row alone gives what it gives in the batch.
    for text, row in zip(TEXTS, regions, strict=False):
        assert_same(model, session, dict(processor(text=text, regions=row, return_tensors="pt")))
    assert_same(model, session, dict(processor(text=TEXTS, return_tensors="pt")))
    assert_same(model, session, dict(processor(regions=regions[:3], return_tensors="pt")))


def test_any_size(exported):
    """Batch, text length and number of regions are free, up to the longest text there are positions for."""
    model, file, _ = exported
    session = session_of(file)
    for shape in [(1, 1, 1), (1, 64, 100), (7, 2, 3), (2, 9, 1), (33, 5, 4)]:
        assert_same(model, session, random_inputs(model.config, *shape))


def test_int8_is_close_and_smaller(exported, tmp_path):
    model, file, _ = exported
    quantize_onnx(file, tmp_path / "int8.onnx")
    # The word embeddings, which are most of this model, take a byte a number in place of four.
    spared = 3 * model.get_input_embeddings().weight.numel()
    assert (tmp_path / "int8.onnx").stat().st_size < file.stat().st_size - 0.9 * spared
    inputs = random_inputs(model.config, 16, 6, 5)
    name = next(iter(OUTPUTS[type(model)] - {"prediction_logits"}))
    scores = session_of(tmp_path / "int8.onnx").run([name], {key: value.numpy() for key, value in inputs.items()})[0]
    with torch.no_grad():
        exact = model(**inputs)[name].numpy()
    assert np.corrcoef(scores.ravel(), exact.ravel())[0, 1] > 0.98 and not np.array_equal(scores, exact)


def test_command_writes_int8(tmp_path):
    model = tiny_model(UC2ForRetrieval, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out" / "int8.onnx")]
    assert 1e-4 < main([*words, "--precision", "int8"]) < 0.5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["int8.onnx"]
    stored = {tensor.data_type for tensor in onnx.load(tmp_path / "out" / "int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in stored


def test_a_file_of_other_weights_is_found_out(exported):
    """The command's own check can fail."""
    model, file, _ = exported
    other = tiny_model(type(model))
    with torch.no_grad():
        other.uc2.pooler.dense.bias += 0.01
    with pytest.raises(ValueError, match="off PyTorch's"):
        largest_difference(other, file)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    tiny_model(UC2Model).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "uc2.onnx")]
    with pytest.raises(SystemExit, match="found 'UC2Model', expected one of UC2ForPreTraining, UC2ForRetrieval"):
        main(words)
    with pytest.raises(DataError, match="found 'UC2Model'"):
        export_onnx(tiny_model(UC2Model), tmp_path / "uc2.onnx")
    monkeypatch.setattr("uc2.onnx_export.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(SystemExit, match="no package onnxscript, expected pip install onnx onnxscript onnxruntime"):
        main(words)
    assert not (tmp_path / "uc2.onnx").exists()
