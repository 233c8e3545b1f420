"""The pre-training step against the same losses written down directly, gradient by gradient."""

import pytest
import torch
import torch.nn.functional as F
from transformers import set_seed

from modeling_uc2 import OBJECTIVES, UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model

MLM, ITM, MRTM, VTLM = (OBJECTIVES.index(name) for name in ("mlm", "itm", "mrtm", "vtlm"))
VOCABULARY, PAD = 90, 1
WEIGHTS = {"mlm": 0.5, "itm": 2.0, "mrtm": 1.5}


def build(model_class=UC2ForPreTraining, **changes):
    set_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 40, "max_position_embeddings": 30, "region_feature_size": 10, "num_labels": 4}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_class(UC2Config(**{**sizes, **changes})).train()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Four ragged examples; token ids repeat, within a caption and between captions."""
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(4, 5, 2, generator=generator) / 2
    inputs = {
        "input_ids": torch.randint(4, 12, (4, 7), generator=generator),
        "attention_mask": torch.arange(7) < torch.tensor([7, 4, 6, 7])[:, None],
        "region_features": torch.randn(4, 5, 10, generator=generator),
        "region_boxes": torch.cat([corner, corner + 0.4], dim=-1),
        "region_attention_mask": torch.arange(5) < torch.tensor([2, 5, 4, 3])[:, None],
    }
    inputs["input_ids"][~inputs["attention_mask"]] = PAD
    return inputs


@pytest.fixture
def batch(inputs) -> dict[str, torch.Tensor]:
    """One example of each objective of the paper."""
    labels, region_labels = torch.full((4, 7), -100), torch.full((4, 5), -100)
    labels[0, [1, 2, 6]] = torch.tensor([5, 60, 5])  # two targets alike, and alike with looked-up ids
    labels[3, [0, 4]] = torch.tensor([89, 7])
    region_labels[2, [0, 3]] = torch.tensor([8, 33])
    return inputs | {
        "labels": labels,
        "region_labels": region_labels,
        "itm_labels": torch.tensor([-100, 1, -100, -100]),
        "objective_ids": torch.tensor([MLM, ITM, MRTM, VTLM]),
    }


def plain_loss(model, batch, counts) -> torch.Tensor:
    """The weighted losses of `batch`, from logits of every position; `counts` divides each objective's sum."""
    names = ("labels", "region_labels", "itm_labels", "objective_ids")
    outputs = model.uc2(**{name: value for name, value in batch.items() if name not in names})
    logits = F.linear(
        model.lm_head.layer_norm(F.gelu(model.lm_head.dense(outputs.last_hidden_state))),
        model.lm_head.decoder.weight,
        model.lm_head.decoder.bias,
    )
    targets = torch.cat([batch["labels"], batch["region_labels"]], dim=1)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    matching = F.cross_entropy(model.itm_head(outputs.pooler_output), batch["itm_labels"], reduction="none")
    parts = {"mlm": losses[0].sum(), "itm": matching[1], "mrtm": losses[2].sum(), "vtlm": losses[3].sum()}
    return sum(WEIGHTS.get(name, 1.0) * part / counts[name] for name, part in parts.items())


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


class TestAgainstPlainLosses:
    @pytest.mark.parametrize("logit_rows", [2, 256])
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_loss_and_every_gradient(self, batch, monkeypatch, logit_rows, tied, checkpointing):
        monkeypatch.setattr("modeling_uc2.modeling_uc2.LOGIT_ROWS", logit_rows)
        model = build(objective_weights=WEIGHTS, tie_word_embeddings=tied)
        if checkpointing:
            model.activation_checkpointing_enable()
        expected = plain_loss(model, batch, {"mlm": 3, "itm": 1, "mrtm": 2, "vtlm": 2})
        expected_gradients = gradients(model, expected)
        loss = model(**batch).loss
        torch.testing.assert_close(loss, expected)
        assert_same_gradients(gradients(model, loss), expected_gradients)

    def test_counts_of_the_update_and_scaled_loss(self, batch):
        model = build(objective_weights=WEIGHTS)
        expected = gradients(model, 3 * plain_loss(model, batch, dict.fromkeys(("mlm", "itm", "mrtm", "vtlm"), 50)))
        counts = torch.full((len(OBJECTIVES),), 50)
        assert_same_gradients(gradients(model, 3 * model(**batch, num_items_in_batch=counts).loss), expected)

    def test_without_targets_of_words(self, batch):
        """ITM alone: the LM head runs on nothing, the word embeddings still get their own gradient."""
        del batch["labels"], batch["region_labels"], batch["objective_ids"]
        model = build()
        pooled = model.uc2(**{name: value for name, value in batch.items() if name != "itm_labels"}).pooler_output
        model.zero_grad()
        F.cross_entropy(model.itm_head(pooled), batch["itm_labels"]).backward()
        expected = model.uc2.embeddings.word_embeddings.weight.grad.clone()
        found = gradients(model, model(**batch).loss)["uc2.embeddings.word_embeddings.weight"]
        torch.testing.assert_close(found, expected)

    def test_gradients_accumulate(self, batch):
        model = build()
        once = gradients(model, model(**batch).loss)
        model(**batch).loss.backward()  # after the first, which `gradients` left in place
        doubled = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert_same_gradients(doubled, {name: 2 * gradient for name, gradient in once.items()})

    def test_evaluation_and_kept_logits_give_the_same_loss(self, batch):
        model = build()
        loss = model(**batch).loss
        kept = model(**batch, output_prediction_logits=True)
        assert kept.prediction_logits.shape == (7, VOCABULARY)
        assert_same_gradients(gradients(model, kept.loss), gradients(model, loss))
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).loss, loss)
            torch.testing.assert_close(model.eval()(**batch).loss, loss)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, batch, dtype):
        """Half-precision products stay as near to the float32 gradients as the plain losses' do."""
        counts = {"mlm": 3, "itm": 1, "mrtm": 2, "vtlm": 2}
        model = build(objective_weights=WEIGHTS)
        exact = gradients(model, plain_loss(model, batch, counts))
        with torch.autocast("cpu", dtype):
            plain, loss = plain_loss(model, batch, counts), model(**batch).loss
        plain, found = gradients(model, plain), gradients(model, loss)
        assert found["lm_head.decoder.bias"].dtype == torch.float32
        for name, gradient in exact.items():
            error, allowed = (found[name] - gradient).norm(), (plain[name] - gradient).norm()
            assert error <= 1.5 * allowed + 1e-6, name

    def test_frozen_word_embeddings(self, batch):
        model = build()
        expected = gradients(model, model(**batch).loss)
        model.uc2.embeddings.word_embeddings.weight.requires_grad_(False)
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name])

    def test_a_second_backward_is_refused(self, batch):
        model = build()
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError):
            (2 * loss).backward()


class TestReadIndex:
    def test_zero_where_nothing_is_read(self, inputs):
        model = build(UC2Model).eval()
        read = torch.zeros(4, 12, dtype=torch.bool)
        read[:, 0] = read[1, 3] = read[2, 9] = True
        with torch.no_grad():
            whole = model(**inputs)
            part = model(**inputs, read_index=read.nonzero(as_tuple=True))
            asked = model(**inputs, read_index=read.nonzero(as_tuple=True), output_hidden_states=True)
        torch.testing.assert_close(part.last_hidden_state[read], whole.last_hidden_state[read])
        assert part.last_hidden_state[~read].abs().max() == 0
        torch.testing.assert_close(part.pooler_output, whole.pooler_output)
        torch.testing.assert_close(asked.last_hidden_state, whole.last_hidden_state)

    @pytest.mark.parametrize("model_class", [UC2ForRetrieval, UC2ForVQA])
    def test_task_heads_read_the_first_token_alone(self, model_class, inputs):
        model = build(model_class)
        head = model.score_head if model_class is UC2ForRetrieval else model.classifier
        expected = head(model.uc2(**inputs).pooler_output)
        outputs = model(**inputs)
        torch.testing.assert_close(outputs.logits, expected)
        factors = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        assert_same_gradients(
            gradients(model, (outputs.logits * factors).sum()), gradients(model, (expected * factors).sum())
        )
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert (hidden[inputs_mask(inputs)].abs().sum(dim=-1) > 0).all()


def inputs_mask(inputs) -> torch.Tensor:
    return torch.cat([inputs["attention_mask"], inputs["region_attention_mask"]], dim=1)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("labels", lambda t: t[:, :4], r"labels is \(4, 4\); the inputs that it labels are \(4, 7\)"),
        ("region_labels", lambda t: t[:, :2], r"region_labels is \(4, 2\)"),
        ("labels", lambda t: t.masked_fill(t == 60, VOCABULARY), r"labels\[0, 2\] is 90; expected an id in \[0, 90\)"),
        ("region_labels", lambda t: t.masked_fill(t == 33, -1), r"region_labels\[2, 3\] is -1"),
    ],
)
def test_bad_targets(batch, name, change, message):
    with pytest.raises(ValueError, match=message):
        build()(**{**batch, name: change(batch[name])})


def test_one_count_for_all_objectives_is_refused(batch):
    """A plain Trainer counts the words of `labels` alone, which would mis-scale ITM and MRTM."""
    with pytest.raises(ValueError, match="one count for each of mlm, itm"):
        build()(**batch, num_items_in_batch=torch.tensor(5))


@pytest.mark.parametrize("options", [{"target_modules": ["query", "decoder"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_train(batch, options):
    """LoRA beside frozen weights, or a head of its own, gives the loss of the plain model at the start."""
    peft = pytest.importorskip("peft")
    model = build()
    expected = model(**batch).loss.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["query"], **options})).train()
    loss = adapted(**batch).loss
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(inputs, dtype):
    """Eager and sdpa agree with float32 as far as the format's digits go."""
    model = build(UC2Model).eval()
    mask = inputs_mask(inputs)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[mask]
        for attention in ("eager", "sdpa"):
            model.to(dtype).set_attn_implementation(attention)
            found = model(**inputs).last_hidden_state[mask]
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, atol=16 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("padded", [True, False])
def test_encoder_compiles_and_exports_as_one_graph(inputs, padded):
    if not padded:
        del inputs["attention_mask"], inputs["region_attention_mask"]
    model = build(UC2Model, num_hidden_layers=1).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(model, (), inputs).module()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)
        torch.testing.assert_close(exported(**inputs).last_hidden_state, expected)


def test_compiled_training_gives_the_same_gradients(batch):
    model = build(objective_weights=WEIGHTS, num_hidden_layers=1)
    expected = gradients(model, plain_loss(model, batch, {"mlm": 3, "itm": 1, "mrtm": 2, "vtlm": 2}))
    compiled = torch.compile(model, backend="aot_eager")
    assert_same_gradients(gradients(model, compiled(**batch).loss), expected)
