"""What transformers' own model suite asks of every model class, on tiny UC2 networks of random weights.

The suite itself runs with `make transformers-suite`; these are the same contracts, condensed.
"""

import copy

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from modeling_uc2 import OBJECTIVES, UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model

BATCH, TEXT, REGIONS, HIDDEN, LAYERS, ATTENTION_HEADS, VOCABULARY, FEATURES = 3, 7, 4, 32, 2, 4, 99, 16
OUTPUT = {
    UC2Model: "last_hidden_state",
    UC2ForPreTraining: "itm_logits",
    UC2ForRetrieval: "logits",
    UC2ForVQA: "logits",
}
HEADS = [UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA]
every_class = pytest.mark.parametrize("model_class", OUTPUT)
every_head = pytest.mark.parametrize("model_class", HEADS)


def tiny_config(**changes) -> UC2Config:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": ATTENTION_HEADS,
        "intermediate_size": 37,
        "max_position_embeddings": 40,
        "region_feature_size": FEATURES,
        "num_region_classes": 5,
        "num_labels": 3,
        "objectives": list(OBJECTIVES),
    }
    return UC2Config(**{**sizes, **changes})


def tiny_model(model_class, **changes):
    set_seed(0)
    return model_class(tiny_config(**changes)).eval()


def tiny_inputs() -> dict[str, torch.Tensor]:
    """Three examples; the second has two tokens and one region fewer."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(BATCH, REGIONS, 2, generator=generator) / 2
    inputs = {
        "input_ids": torch.randint(4, VOCABULARY, (BATCH, TEXT), generator=generator),
        "attention_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
        "region_features": torch.randn(BATCH, REGIONS, FEATURES, generator=generator),
        "region_boxes": torch.cat([corner, corner + 0.3], dim=-1),
        "region_attention_mask": torch.ones(BATCH, REGIONS, dtype=torch.long),
    }
    inputs["input_ids"][1, -2:], inputs["attention_mask"][1, -2:] = 1, 0
    inputs["region_attention_mask"][1, -1:] = 0
    return inputs


def with_labels(model_class) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs()
    if model_class is UC2ForPreTraining:
        inputs["labels"] = torch.where(inputs["input_ids"] % 2 == 0, inputs["input_ids"], -100)
        inputs["region_labels"] = torch.full((BATCH, REGIONS), -100)
        inputs["region_labels"][:, 0] = 5
        inputs["itm_labels"] = torch.tensor([0, 1, 1])
        inputs["objective_ids"] = torch.tensor([0, 1, 2])
    else:
        inputs["labels"] = torch.ones(BATCH) if model_class is UC2ForRetrieval else torch.rand(BATCH, 3)
    return inputs


def run(model, **changes) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**tiny_inputs(), **changes})[OUTPUT[type(model)]]


def equal_states(one: nn.Module, other: nn.Module, prefix: str = "") -> bool:
    states = one.state_dict(), other.state_dict()
    names = [name for name in states[0] if name.startswith(prefix)]
    return bool(names) and all(torch.equal(states[0][name], states[1][name]) for name in names)


# Saving and loading


@every_class
def test_save_and_load(model_class, tmp_path):
    model = tiny_model(model_class)
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert equal_states(model, loaded)
    torch.testing.assert_close(run(loaded.eval()), run(model))


@every_class
def test_half_precision_is_kept(model_class, tmp_path):
    tiny_model(model_class).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = model_class.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert run(loaded.eval()).dtype == torch.bfloat16


@every_head
def test_base_weights_load_into_a_head_and_back(model_class, tmp_path):
    base = tiny_model(UC2Model)
    base.save_pretrained(tmp_path / "base")
    head, report = model_class.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert equal_states(base, head.uc2)
    assert report["missing_keys"] and not any(name.startswith("uc2.") for name in report["missing_keys"])
    head.save_pretrained(tmp_path / "head")
    assert equal_states(UC2Model.from_pretrained(tmp_path / "head"), base)


@every_class
def test_nothing_is_left_uninitialised(model_class):
    """Built on the meta device and filled by `_init_weights` alone: constant 0 or 1, or normal with 0.02."""
    set_seed(0)
    model = model_class.from_pretrained(None, config=tiny_config(), state_dict={})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == "cpu", name
        mean, deviation = tensor.detach().mean().item(), tensor.detach().std(correction=0).item()
        constant = deviation == 0 and mean in (0, 1)
        assert constant or (abs(deviation - 0.02) < 0.01 and abs(mean) < 0.01), f"{name}: {mean}, {deviation}"


def test_ties():
    model = tiny_model(UC2ForPreTraining)
    assert model.lm_head.decoder.weight is model.uc2.embeddings.word_embeddings.weight
    untied = tiny_model(UC2ForPreTraining, tie_word_embeddings=False)
    assert untied.lm_head.decoder.weight is not untied.uc2.embeddings.word_embeddings.weight


@pytest.mark.parametrize("tied", [True, False])
def test_ties_survive_saving(tied, tmp_path):
    tiny_model(UC2ForPreTraining, tie_word_embeddings=tied).save_pretrained(tmp_path)
    loaded = UC2ForPreTraining.from_pretrained(tmp_path)
    same = loaded.lm_head.decoder.weight is loaded.uc2.embeddings.word_embeddings.weight
    assert same is tied


# Embeddings


@every_class
@pytest.mark.parametrize("size", [VOCABULARY + 10, VOCABULARY - 9])
def test_resize_token_embeddings(model_class, size, tmp_path):
    model = tiny_model(model_class)
    kept = min(size, VOCABULARY)
    before = model.get_input_embeddings().weight[:kept].clone()
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert torch.equal(model.get_input_embeddings().weight[:kept], before)
    inputs = {"input_ids": tiny_inputs()["input_ids"].clamp(max=kept - 1)}
    if model_class is UC2ForPreTraining:
        assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
        assert model.lm_head.decoder.bias.shape == (size,)
        text = {**inputs, "attention_mask": tiny_inputs()["attention_mask"]}
        with torch.no_grad():
            assert model(**text).prediction_logits.shape == (BATCH, TEXT, size)
    expected = run(model, **inputs)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(model_class.from_pretrained(tmp_path).eval(), **inputs), expected)


@every_class
def test_inputs_embeds_equal_input_ids(model_class):
    model = tiny_model(model_class)
    inputs = tiny_inputs()
    inputs["position_ids"] = model.base_model.embeddings.count_positions(inputs["input_ids"], None)
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embedded["input_ids"]
    with torch.no_grad():
        expected, found = model(**inputs), model(**embedded)
    torch.testing.assert_close(found[OUTPUT[model_class]], expected[OUTPUT[model_class]])


# Outputs


@every_class
def test_hidden_states_and_attentions(model_class):
    model = tiny_model(model_class)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**tiny_inputs(), output_hidden_states=True, output_attentions=True)
    length = TEXT + REGIONS
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(BATCH, length, HIDDEN)] * (LAYERS + 1)
    shape = (BATCH, ATTENTION_HEADS, length, length)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [shape] * LAYERS
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(BATCH, ATTENTION_HEADS, length))
        assert weights[1, :, :, TEXT - 2 : TEXT].abs().max() == weights[1, :, :, -1].abs().max() == 0
    if model_class is UC2Model:
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@every_class
def test_tuple_and_dict_outputs_agree(model_class):
    model = tiny_model(model_class)
    with torch.no_grad():
        as_dict, as_tuple = model(**tiny_inputs()), model(**tiny_inputs(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    for one, other in zip(as_dict.to_tuple(), as_tuple, strict=True):
        assert torch.equal(one, other)


@every_class
def test_batching_changes_nothing(model_class):
    model = tiny_model(model_class)
    together = run(model)
    for row in range(BATCH):
        alone = run(model, **{name: tensor[row : row + 1] for name, tensor in tiny_inputs().items()})
        real = torch.cat([tiny_inputs()["attention_mask"], tiny_inputs()["region_attention_mask"]], dim=1)[
            row
        ]
        kept = real.bool() if model_class is UC2Model else slice(None)
        torch.testing.assert_close(alone[0][kept], together[row][kept], atol=1e-5, rtol=1e-5)


@every_class
def test_evaluation_is_deterministic_and_training_is_not(model_class):
    model = tiny_model(model_class)
    assert torch.equal(run(model), run(model))
    assert not torch.equal(run(model.train()), run(model))


# Attention


@every_class
def test_eager_equals_sdpa(model_class):
    model = tiny_model(model_class)
    model.set_attn_implementation("eager")
    eager = run(model)
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    real = torch.cat([tiny_inputs()["attention_mask"], tiny_inputs()["region_attention_mask"]], dim=1).bool()
    kept = real if model_class is UC2Model else slice(None)
    torch.testing.assert_close(run(model)[kept], eager[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_without_masks_looks_both_ways(implementation):
    """sdpa turns causal when it gets no mask, unless the module says otherwise."""
    model = tiny_model(UC2Model)
    model.set_attn_implementation(implementation)
    inputs = {name: tensor for name, tensor in tiny_inputs().items() if "attention" not in name}
    changed = {**inputs, "region_features": inputs["region_features"] + 1}
    with torch.no_grad():
        first, second = (model(**given).last_hidden_state[:, 0] for given in (inputs, changed))
    assert (first - second).abs().max() > 1e-4


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attn_implementation"):
        tiny_model(UC2Model).set_attn_implementation("no_such_attention")


# Training


@every_head
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model_class, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(model_class, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model(**with_labels(model_class)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, f"{name} has no gradient"
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@every_class
def test_gradients_reach_hidden_states(model_class):
    model = tiny_model(model_class)
    outputs = model(**tiny_inputs(), output_hidden_states=True)
    outputs.hidden_states[0].retain_grad()
    outputs[OUTPUT[model_class]].flatten()[0].backward()
    assert outputs.hidden_states[0].grad.abs().sum() > 0


# Configuration


def test_config_round_trip(tmp_path):
    config = tiny_config(objective_weights={"mlm": 0.5}, id2label={0: "yes", 1: "no", 2: "two"})
    config.save_pretrained(tmp_path)
    loaded = UC2Config.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.id2label == {0: "yes", 1: "no", 2: "two"}
    assert UC2Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_default_config_is_xlm_roberta_base():
    config = UC2Config()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (250002, 768, 12)
    assert (config.layer_norm_eps, config.encoder_layer_norm_eps) == (1e-5, 1e-12)


def test_config_types_are_checked():
    with pytest.raises(StrictDataclassError, match="hidden_size"):
        tiny_config(hidden_size="32")


@every_class
def test_model_common_attributes(model_class):
    model = tiny_model(model_class)
    assert model.base_model_prefix == "uc2"
    assert model.base_model is (model if model_class is UC2Model else model.uc2)
    assert model.main_input_name == "input_ids"
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    embeddings = nn.Embedding(VOCABULARY, HIDDEN)
    model.set_input_embeddings(embeddings)
    assert model.get_input_embeddings() is embeddings
    counted = sum(np.prod(parameter.shape) for parameter in model.parameters())
    assert model.num_parameters() == counted < 1_000_000
