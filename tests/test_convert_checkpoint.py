"""The converter against the original implementation's reference checkpoints and VOLTA's names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_uc2 import UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA
from uc2.convert_checkpoint import CheckpointError, main, read_state_dict

FIXTURES = Path(__file__).parent / "fixtures" / "uc2"
CONFIG = FIXTURES / "config.json"
HEADS = {"pretraining": UC2ForPreTraining, "retrieval": UC2ForRetrieval, "vqa": UC2ForVQA}
# Layer 0 of VOLTA's state dict is the attention and layer 1 the feed-forward part of the first encoder layer.
# Written down name by name, from the classes of its `volta/encoders.py` and `volta/embeddings.py`.
VOLTA_NAMES = {
    "roberta.embeddings.": "bert.embeddings.",
    "roberta.img_embeddings.img_linear.": "bert.embeddings.image_embeddings.",
    "roberta.img_embeddings.img_layer_norm.": "bert.embeddings.image_layer_norm.",
    "roberta.img_embeddings.pos_linear.": "bert.embeddings.image_location_embeddings.",
    "roberta.img_embeddings.pos_layer_norm.": "bert.embeddings.image_location_layer_norm.",
    "roberta.img_embeddings.LayerNorm.": "bert.embeddings.v_LayerNorm.",
    "roberta.encoder.layer.0.attention.self.": "bert.encoder.layer.0.attention_self.",
    "roberta.encoder.layer.0.attention.output.": "bert.encoder.layer.0.attention_output.",
    "roberta.encoder.layer.0.intermediate.": "bert.encoder.layer.1.intermediate.",
    "roberta.encoder.layer.0.output.": "bert.encoder.layer.1.output.",
    "roberta.encoder.layer.1.attention.self.": "bert.encoder.layer.2.attention_self.",
    "roberta.encoder.layer.1.attention.output.": "bert.encoder.layer.2.attention_output.",
    "roberta.encoder.layer.1.intermediate.": "bert.encoder.layer.3.intermediate.",
    "roberta.encoder.layer.1.output.": "bert.encoder.layer.3.output.",
    "roberta.pooler.": "bert.t_pooler.",
    "cls.dense.": "cls.predictions.transform.dense.",
    "cls.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "cls.bias": "cls.predictions.bias",
    "cls.decoder.weight": "cls.predictions.decoder.weight",
    "itm_output.": "cls.bi_seq_relationship.",
}


def original(head):
    return load_file(FIXTURES / f"{head}_state_dict.safetensors")


def volta_state_dict():
    """The reference weights under VOLTA's names, with the second names of its shared modules."""
    state = {}
    for name, tensor in original("pretraining").items():
        for theirs, voltas in VOLTA_NAMES.items():
            if name.startswith(theirs):
                state[voltas + name.removeprefix(theirs)] = tensor
    for name in list(state):
        for part in ("query", "key", "value", "dense", "LayerNorm"):
            if name.startswith("bert.encoder."):
                state[name.replace(f".{part}.", f".v_{part}.")] = state[name]
    types = state["bert.embeddings.new_token_type_embeddings.weight"]
    state["bert.embeddings.image_token_type_embeddings.weight"] = types
    state["cls.imagePredictions.decoder_dict.0.weight"] = torch.zeros(3, 32)
    return state


def convert(tmp_path, checkpoint, head="pretraining", config=CONFIG):
    """Convert a state dict or file into a new folder."""
    if isinstance(checkpoint, dict):
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        checkpoint = tmp_path / "checkpoint.pt"
    arguments = ["--checkpoint", str(checkpoint), "--config", str(config), "--head", head]
    main([*arguments, "--output_dir", str(tmp_path / "converted")])
    return tmp_path / "converted"


def back(tmp_path, folder, head):
    main(
        ["--to_original", "--checkpoint", str(folder), "--head", head, "--output_dir", str(tmp_path / "back")]
    )
    return tmp_path / "back"


def reference_inputs():
    expected = load_file(FIXTURES / "expected.safetensors")
    text, regions = expected["text_lengths"], expected["region_counts"]
    inputs = {name: expected[name] for name in ("input_ids", "region_features", "region_boxes")}
    inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < text[:, None]).long()
    inputs["region_attention_mask"] = (torch.arange(6) < regions[:, None]).long()
    return inputs, expected


@pytest.mark.parametrize(
    ("head", "output", "recorded"),
    [
        ("pretraining", "itm_logits", "itm_logits"),
        ("retrieval", "logits", "rank_logits"),
        ("vqa", "logits", "vqa_logits"),
    ],
)
def test_a_converted_folder_computes_what_the_original_did(tmp_path, head, output, recorded):
    model = HEADS[head].from_pretrained(convert(tmp_path, FIXTURES / f"{head}_state_dict.safetensors", head))
    inputs, expected = reference_inputs()
    with torch.no_grad():
        computed = model.eval()(**inputs)[output]
    torch.testing.assert_close(computed, expected[recorded], rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_the_way_back_is_bit_equal(tmp_path, head):
    source = original(head)
    target = torch.load(
        back(tmp_path, convert(tmp_path, source, head), head) / "model_step_0.pt", weights_only=True
    )
    dropped = {name for name in source if name.startswith("vis_cls.")}
    if head == "retrieval":
        dropped |= {"itm_output.weight", "itm_output.bias"}
    assert target.keys() == source.keys() - dropped
    assert all(torch.equal(target[name], source[name]) for name in target)


def test_the_way_back_writes_a_configuration_that_converts_again(tmp_path):
    folder = back(tmp_path, convert(tmp_path, FIXTURES / "model_step_0.pt"), "pretraining")
    config = json.loads((folder / "config.json").read_text())
    original_config = json.loads(CONFIG.read_text())
    shared = original_config.keys() - {"num_answers", "valid_label_token_ids"}
    assert {name: config[name] for name in shared} == {name: original_config[name] for name in shared}
    (tmp_path / "again").mkdir()
    convert(tmp_path / "again", folder / "model_step_0.pt", config=folder / "config.json")


def test_sizes_come_from_the_tensors(tmp_path):
    """A RoBERTa configuration knows no regions, and XLM-R's says one token type."""
    config = {
        "num_attention_heads": 4,
        "type_vocab_size": 1,
        "model_type": "xlm-roberta",
        "num_hidden_layers": 2,
    }
    (tmp_path / "roberta.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="type_vocab_size is 1, the tensors say 2"):
        folder = convert(tmp_path, original("vqa"), "vqa", tmp_path / "roberta.json")
    found = UC2ForVQA.from_pretrained(folder).config
    assert (found.vocab_size, found.hidden_size, found.intermediate_size) == (120, 32, 64)
    assert (found.max_position_embeddings, found.region_feature_size, found.num_labels) == (66, 24, 7)
    assert (found.layer_norm_eps, found.encoder_layer_norm_eps) == (1e-5, 1e-12)


def test_our_own_configuration_is_understood(tmp_path):
    first = convert(tmp_path, FIXTURES / "model_step_0.pt")
    (tmp_path / "again").mkdir()
    second = convert(tmp_path / "again", FIXTURES / "model_step_0.pt", config=first / "config.json")
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())


def test_half_precision_stays_half(tmp_path):
    half = {name: tensor.half() for name, tensor in original("retrieval").items()}
    folder = convert(tmp_path, half, "retrieval")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}


def test_volta(tmp_path):
    (tmp_path / "original").mkdir()
    state = volta_state_dict()
    model = UC2ForPreTraining.from_pretrained(convert(tmp_path, state))
    reference = UC2ForPreTraining.from_pretrained(convert(tmp_path / "original", original("pretraining")))
    ours, theirs = model.state_dict(), reference.state_dict()
    mask = "uc2.region_embeddings.mask_embedding"
    assert not ours.pop(mask).any()  # VOLTA has none
    assert {name for name in theirs.keys() - ours.keys() if not name.startswith("region_")} == {mask}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.config.objectives == ["mlm", "itm", "mrtm", "vtlm"]


def test_volta_with_unshared_modules_is_refused(tmp_path):
    state = volta_state_dict()
    state["bert.encoder.layer.2.attention_self.v_key.bias"] = torch.ones(32)
    with pytest.raises(
        CheckpointError, match=r"layer\.2\.attention_self\.v_key\.bias and .*key\.bias must be equal"
    ):
        convert(tmp_path, state)


def test_volta_fine_tuned_heads_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="only its pre-training head"):
        convert(tmp_path, volta_state_dict(), "vqa")


@pytest.mark.parametrize("head", HEADS)
def test_every_missing_tensor_is_named(tmp_path, head):
    source = original(head)
    needed = [name for name in source if not name.startswith(("vis_cls.", "feat_regress.weight"))]
    if head == "retrieval":
        needed = [name for name in needed if not name.startswith("itm_output.")]
    for name in needed[:: len(needed) // 8]:
        left = {key: tensor for key, tensor in source.items() if key != name}
        with pytest.raises(CheckpointError, match=f"missing .*{name}"):
            convert(tmp_path, left, head)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"roberta.extra.weight": torch.ones(2)}, "unknown roberta.extra.weight"),
        (
            lambda state: state | {"cls.decoder.bias": torch.ones(120)},
            "cls.decoder.bias and cls.bias must be equal",
        ),
        (
            lambda state: state | {"roberta.pooler.dense.bias": torch.ones(9)},
            r"pooler.dense.bias has shape \(9,\)",
        ),
        (lambda state: {"encoder.weight": torch.ones(2)}, "names such as encoder.weight"),
        (lambda state: {"model": state, "step": 3}, "no plain state dict"),
        (
            lambda state: {k: v for k, v in state.items() if ".layer.1." not in k},
            "missing roberta.encoder.layer.1.",
        ),
    ],
)
def test_other_checkpoints_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path, change(original("pretraining")))
    assert not (tmp_path / "converted").exists()


def test_the_head_must_be_the_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="'vqa'.*missing vqa_output"):
        convert(tmp_path, original("retrieval"), "vqa")
    folder = convert(tmp_path, original("retrieval"), "retrieval")
    with pytest.raises(CheckpointError, match="does not hold a model with the head 'vqa'"):
        back(tmp_path, folder, "vqa")


def test_the_number_of_heads_is_required(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no num_attention_heads"):
        convert(tmp_path, FIXTURES / "model_step_0.pt", config=tmp_path / "config.json")


def test_stored_code_is_not_run(tmp_path):
    torch.save({"roberta.weight": Path}, tmp_path / "code.pt")
    with pytest.raises(Exception, match="more than tensors"):
        read_state_dict(tmp_path / "code.pt")


def test_safetensors_and_pt_are_the_same(tmp_path):
    save_file(original("vqa"), tmp_path / "vqa.safetensors")
    assert read_state_dict(tmp_path / "vqa.safetensors").keys() == original("vqa").keys()


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "uc2.convert_checkpoint",
        "--checkpoint",
        str(FIXTURES / "model_step_0.pt"),
    ]
    options = ["--config", str(CONFIG), "--head", "pretraining", "--output_dir", str(tmp_path / "out")]
    subprocess.run([*command, *options], check=True, cwd=FIXTURES.parents[2], capture_output=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
