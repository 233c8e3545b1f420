"""The networks against the original implementation's recorded tensors, and the contracts of their inputs."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaModel

from modeling_uc2 import OBJECTIVES, UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model, triplet_loss

TOLERANCE = 1e-5
ATTENTION = ["eager", "sdpa"]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def lengths_to_mask(lengths, size):
    return (torch.arange(size)[None] < lengths[:, None]).long()


@pytest.fixture(scope="module")
def batch(reference):
    return {
        "input_ids": reference["input_ids"],
        "attention_mask": lengths_to_mask(reference["text_lengths"], 9),
        "region_features": reference["region_features"],
        "region_boxes": reference["region_boxes"],
        "region_attention_mask": lengths_to_mask(reference["region_counts"], 6),
    }


@pytest.fixture(scope="module")
def zeroed(batch, reference):
    """The batch with masked regions' features zeroed, as the data side does."""
    mask = reference["region_mask"]
    return {**batch, "region_features": batch["region_features"] * ~mask[..., None], "region_mask": mask}


@pytest.fixture(params=ATTENTION)
def pretraining_model(request, converted):
    return UC2ForPreTraining.from_pretrained(converted("pretraining"), attn_implementation=request.param).eval()


def only(batch, part):
    return {name: value for name, value in batch.items() if ("region" in name) == (part == "regions")}


class TestReference:
    @torch.no_grad()
    def test_encoder(self, pretraining_model, batch, reference):
        outputs = pretraining_model.uc2(**batch, output_hidden_states=True)
        text, regions = batch["attention_mask"].bool(), batch["region_attention_mask"].bool()
        for hidden, name in ((outputs.last_hidden_state, "hidden"), (outputs.hidden_states[1], "layer1")):
            assert_close(hidden[:, :9][text], reference[f"{name}_text"][text])
            assert_close(hidden[:, 9:][regions], reference[f"{name}_regions"][regions])
        assert_close(outputs.pooler_output, reference["pooled"])

    @torch.no_grad()
    def test_one_modality(self, pretraining_model, batch, reference):
        for part, mask in (("text", "attention_mask"), ("regions", "region_attention_mask")):
            hidden = pretraining_model.uc2(**only(batch, part)).last_hidden_state
            real = batch[mask].bool()
            assert_close(hidden[real], reference[f"{part}_only_hidden"][real])

    @torch.no_grad()
    def test_mlm(self, pretraining_model, batch, reference):
        inputs = {**batch, "input_ids": reference["mlm_input_ids"]}
        outputs = pretraining_model(**inputs, labels=reference["mlm_labels"], output_prediction_logits=True)
        assert_close(outputs.prediction_logits, reference["mlm_logits"])
        assert_close(outputs.loss, reference["mlm_loss"].mean())
        per_row = (reference["mlm_labels"] != -100).sum(dim=1)
        expected = torch.stack([part.sum() for part in reference["mlm_loss"].split(per_row.tolist())])
        assert_close(outputs.example_loss, expected)
        assert outputs.example_items.tolist() == per_row.tolist()

    @torch.no_grad()
    def test_mrtm(self, pretraining_model, batch, zeroed, reference):
        outputs = pretraining_model(**zeroed, region_labels=reference["mrtm_labels"], output_prediction_logits=True)
        assert_close(outputs.prediction_logits, reference["mrtm_logits"])
        assert_close(outputs.loss, reference["mrtm_loss"].mean())
        kept = pretraining_model(
            **batch, region_mask=reference["region_mask"], region_labels=reference["mrtm_labels"]
        )
        assert_close(kept.loss, reference["mrtm_loss_feature_kept"].mean())

    @torch.no_grad()
    def test_vtlm(self, pretraining_model, batch, reference):
        outputs = pretraining_model(
            input_ids=reference["vtlm_input_ids"],
            position_ids=reference["vtlm_position_ids"],
            attention_mask=lengths_to_mask(reference["vtlm_text_lengths"], 12),
            **{name: value[:2] for name, value in only(batch, "regions").items()},
            labels=reference["vtlm_labels"],
            objective_ids=torch.full((2,), OBJECTIVES.index("vtlm")),
        )
        assert_close(outputs.loss, reference["vtlm_loss"].mean())
        assert outputs.objective_items[OBJECTIVES.index("vtlm")] == 4

    @torch.no_grad()
    def test_itm(self, pretraining_model, batch, reference):
        outputs = pretraining_model(**batch, itm_labels=reference["itm_labels"])
        assert_close(outputs.itm_logits, reference["itm_logits"])
        assert_close(outputs.example_loss, reference["itm_loss"])

    @torch.no_grad()
    def test_ablation_objectives(self, pretraining_model, zeroed, reference):
        mask, probs = reference["region_mask"], reference["region_class_probs"]
        kl = pretraining_model(**zeroed, region_class_probs=probs * mask[..., None])
        assert_close(kl.loss, reference["mrc_kl_loss"].sum(dim=1).mean())
        # The original never asks for the background, class 0.
        classes = torch.where(mask, probs[..., 1:].argmax(dim=-1) + 1, -100)
        assert_close(pretraining_model(**zeroed, region_class_labels=classes).loss, reference["mrc_loss"].mean())
        regression = pretraining_model(**zeroed, region_feature_targets=reference["region_features"])
        assert_close(regression.loss, reference["mrfr_loss"].mean())

    @torch.no_grad()
    @pytest.mark.parametrize("attention", ATTENTION)
    def test_retrieval(self, converted, batch, reference, attention):
        model = UC2ForRetrieval.from_pretrained(converted("retrieval"), attn_implementation=attention).eval()
        outputs = model(**batch, group_size=3)
        assert_close(outputs.logits, reference["rank_logits"])
        assert_close(triplet_loss(outputs.logits.view(2, 3)), reference["rank_loss"])
        assert_close(outputs.loss, reference["rank_loss"].mean())

    @torch.no_grad()
    @pytest.mark.parametrize("attention", ATTENTION)
    def test_vqa(self, converted, batch, reference, attention):
        model = UC2ForVQA.from_pretrained(converted("vqa"), attn_implementation=attention).eval()
        outputs = model(**batch, labels=reference["vqa_targets"])
        assert_close(outputs.logits, reference["vqa_logits"])
        assert_close(outputs.loss, reference["vqa_loss"].sum(dim=1).mean())

    @torch.no_grad()
    def test_padding_and_order_do_not_matter(self, pretraining_model, batch, reference):
        order = [3, 0, 5, 1, 4, 2]
        padded = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4), value=1),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
            "region_features": torch.nn.functional.pad(batch["region_features"], (0, 0, 0, 3), value=7.0),
            "region_boxes": torch.nn.functional.pad(batch["region_boxes"], (0, 0, 0, 3)),
            "region_attention_mask": torch.nn.functional.pad(batch["region_attention_mask"], (0, 3)),
        }
        outputs = pretraining_model.uc2(**{name: value[order] for name, value in padded.items()})
        assert_close(outputs.pooler_output, reference["pooled"][order])
        real = batch["region_attention_mask"].bool()
        restored = outputs.last_hidden_state[torch.tensor(order).argsort(), 13:19]
        assert_close(restored[real], reference["hidden_regions"][real])


class TestMixedBatch:
    """One forward for every objective equals one forward per objective."""

    def labels(self, reference):
        return {
            "labels": reference["mlm_labels"],
            "region_labels": reference["mrtm_labels"],
            "itm_labels": reference["itm_labels"],
        }

    @torch.no_grad()
    def test_sum_of_means(self, pretraining_model, batch, reference):
        together = pretraining_model(**batch, **self.labels(reference))
        alone = [pretraining_model(**batch, **{name: value}).loss for name, value in self.labels(reference).items()]
        assert_close(together.loss, sum(alone))

    @torch.no_grad()
    def test_weights_and_counts_of_the_whole_update(self, pretraining_model, batch, reference):
        pretraining_model.config.objective_weights = {"mlm": 2.0, "itm": 0.5, "mrtm": 0.0}
        counts = torch.full((len(OBJECTIVES),), 100)
        loss = pretraining_model(**batch, **self.labels(reference), num_items_in_batch=counts).loss
        mlm, _, itm = (
            pretraining_model(**batch, **{name: value}) for name, value in self.labels(reference).items()
        )
        expected = 2.0 * mlm.objective_loss[0] / 100 + 0.5 * itm.objective_loss[1] / 100
        assert_close(loss, expected)

    def test_every_parameter_has_a_gradient(self, converted, batch, reference):
        model = UC2ForPreTraining.from_pretrained(converted("pretraining")).train()
        model(**batch, labels=reference["mlm_labels"]).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    @torch.no_grad()
    def test_without_labels(self, pretraining_model, batch):
        outputs = pretraining_model(**batch)
        assert outputs.loss is None
        assert outputs.prediction_logits.shape == (6, 15, 120)
        assert outputs.itm_logits.shape == (6, 2)


class TestBadInput:
    @pytest.fixture(scope="class")
    def model(self, converted):
        return UC2Model.from_pretrained(converted("pretraining")).eval()

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda b: b.update(region_features=b["region_features"][..., :20]), "region_feature_size=24"),
            (lambda b: b.update(region_boxes=b["region_boxes"] * 500), "expected 0 <= x1 <= x2 <= 1"),
            (lambda b: b["region_features"][1, 0].fill_(float("nan")), r"region_features\[1, 0\]"),
            (lambda b: b.update(attention_mask=b["attention_mask"][:, :4]), "attention_mask is"),
            (lambda b: b.update(region_attention_mask=b["region_attention_mask"][:, :4]), "region_attention_mask is"),
            (lambda b: b.update(input_ids=torch.full((6, 65), 9), attention_mask=None), "positions for 64"),
            (lambda b: b["input_ids"][1, 2].fill_(120), r"input_ids\[1, 2\] is 120; expected an id in \[0, 120\)"),
            (lambda b: b["input_ids"][0, 0].fill_(-1), r"input_ids\[0, 0\] is -1"),
            (lambda b: b.update(position_ids=torch.full((6, 9), 66)), r"position_ids\[0, 0\] is 66"),
            (lambda b: b.update(token_type_ids=torch.full((6, 9), 2)), r"token_type_ids\[0, 0\] is 2"),
            (lambda b: b.update(input_ids=b["input_ids"][0]), r"input_ids is \(9,\); expected \(batch, tokens\)"),
            (lambda b: b.update(input_ids=None, inputs_embeds=torch.zeros(6, 9, 5)), "hidden_size=32"),
            (lambda b: b.pop("region_boxes"), "needs region_boxes"),
            (lambda b: b.clear(), "neither text"),
            (lambda b: (b["attention_mask"][2].zero_(), b["region_attention_mask"][2].zero_()), r"Examples \[2\]"),
            (lambda b: b.update(input_ids=b["input_ids"][:5], attention_mask=None), "5 texts but 6 region sets"),
        ],
    )
    def test_one_clear_sentence(self, model, batch, change, message):
        inputs = {name: value.clone() for name, value in batch.items()}
        change(inputs)
        with pytest.raises(ValueError, match=message):
            model(**inputs)

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": 30, "num_attention_heads": 4},
            {"hidden_dropout_prob": 1.5},
            {"region_feature_size": 0},
            {"type_vocab_size": 1},
            {"pad_token_id": 300000},
            {"objectives": ["mlm", "nsp"]},
            {"objective_weights": {"nsp": 1.0}},
            {"hidden_size": "32"},
        ],
    )
    def test_invalid_config(self, fields):
        with pytest.raises(StrictDataclassError):
            UC2Config(**fields)


class TestTextEncoder:
    @pytest.fixture(scope="class")
    def xlmr_folder(self, tmp_path_factory):
        config = XLMRobertaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=20,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
        folder = tmp_path_factory.mktemp("xlmr")
        XLMRobertaForMaskedLM(config).save_pretrained(folder)
        return folder

    @torch.no_grad()
    def test_text_part_is_xlmr(self, xlmr_folder):
        ids = torch.tensor([[0, 5, 6, 7, 2, 1], [0, 8, 9, 10, 11, 2]])
        mask = (ids != 1).long()
        model = UC2ForPreTraining.from_text_encoder(xlmr_folder, region_feature_size=8).eval()
        xlmr = XLMRobertaForMaskedLM.from_pretrained(xlmr_folder).eval()
        logits = model(input_ids=ids, attention_mask=mask).prediction_logits
        assert_close(logits[mask.bool()], xlmr(input_ids=ids, attention_mask=mask).logits[mask.bool()])
        assert model.lm_head.decoder.weight is model.uc2.embeddings.word_embeddings.weight

    def test_pooler_is_loaded_when_present(self, tmp_path, xlmr_folder):
        XLMRobertaModel(XLMRobertaConfig.from_pretrained(xlmr_folder)).save_pretrained(tmp_path)
        model = UC2Model.from_text_encoder(tmp_path)
        expected = XLMRobertaModel.from_pretrained(tmp_path).pooler.dense.weight
        assert torch.equal(model.pooler.dense.weight, expected)

    def test_saved_under_its_own_names(self, xlmr_folder, tmp_path):
        model = UC2ForPreTraining.from_text_encoder(xlmr_folder, region_feature_size=8)
        model.save_pretrained(tmp_path)
        reloaded, report = UC2ForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        for (name, before), after in zip(model.named_parameters(), reloaded.parameters(), strict=True):
            assert torch.equal(before, after), name


def test_retrieval_head_starts_as_the_match_row(converted, batch):
    pretrained = UC2ForPreTraining.from_pretrained(converted("pretraining")).eval()
    retrieval = UC2ForRetrieval.from_pretraining(converted("pretraining"))
    with torch.no_grad():
        match = pretrained(**batch, itm_labels=torch.zeros(6, dtype=torch.long)).itm_logits[:, 1:]
        assert_close(retrieval(**batch).logits, match)
