"""The EA loss by hand, what it may change, and that it brings regions to their label's word embedding."""

import math

import numpy as np
import pytest
import torch

from modeling_uc2 import UC2Config, UC2ForPreTraining
from uc2.data_error import DataError
from uc2.early_adaptation import (
    EarlyAdaptationDataset,
    EarlyAdaptationModel,
    class_distribution,
    early_adaptation_loss,
    label_embeddings,
)


class FourLabels:
    """LabelTokens of four classes: one sub-word each, the last with two."""

    num_classes, languages = 4, ("en", "de")

    def ids(self, class_id, language):
        words = {"en": [[5], [6], [7], [8, 9]], "de": [[10], [11], [12], [13, 14]]}
        return np.array(words[language][class_id])


def tiny_model() -> UC2ForPreTraining:
    torch.manual_seed(0)
    return UC2ForPreTraining(
        UC2Config(
            vocab_size=20,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            region_feature_size=8,
            num_region_classes=4,
            hidden_dropout_prob=0.0,
        )
    )


def test_loss_by_hand():
    # Cosines of (1, 0) with (2, 0) and (0, 3) are 1 and 0: softmax e/(e+1), 1/(e+1).
    regions, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    p, q = torch.tensor([[0.75, 0.25]]), [math.e / (math.e + 1), 1 / (math.e + 1)]
    expected = 0.75 * math.log(0.75 / q[0]) + 0.25 * math.log(0.25 / q[1])
    torch.testing.assert_close(early_adaptation_loss(regions, labels, p), torch.tensor([expected]), atol=1e-6, rtol=0)
    # With temperature 1/2 the cosines double.
    q = [math.e**2 / (math.e**2 + 1), 1 / (math.e**2 + 1)]
    expected = 0.75 * math.log(0.75 / q[0]) + 0.25 * math.log(0.25 / q[1])
    torch.testing.assert_close(early_adaptation_loss(regions, labels, p, 0.5), torch.tensor([expected]))


def test_label_embedding_is_the_mean_of_its_subwords():
    model = tiny_model()
    words = model.get_input_embeddings().weight
    table = label_embeddings(model, FourLabels(), "en")
    torch.testing.assert_close(table[3], (words[8] + words[9]) / 2)
    torch.testing.assert_close(table[0], words[5])


def test_distribution_without_class_probs():
    probs = class_distribution(np.array([2, 0]), np.array([0.7, 0.1]), 4)
    np.testing.assert_allclose(probs, [[0.1, 0.1, 0.7, 0.1], [0.1, 0.3, 0.3, 0.3]], rtol=1e-6)


def test_adapts_the_region_encoder_and_nothing_else():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = EarlyAdaptationModel(model, FourLabels(), ["en", "de"], temperature=0.1)
    features, boxes = torch.eye(8)[:4].unsqueeze(0), torch.tensor([0.1, 0.1, 0.5, 0.5]).expand(1, 4, 4)
    targets = torch.eye(4).unsqueeze(0)
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = stage(features, boxes, targets)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("uc2.region_embeddings.") for name in changed)
    encoded = stage.region_embeddings(features, boxes, stage.token_type)[0]
    cosine = torch.nn.functional.cosine_similarity(
        encoded[:, None], label_embeddings(model, FourLabels(), "de")[None], dim=-1
    )
    assert cosine.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_regions_without_object_classes_are_refused():
    class Grid(dict):
        has_classes = False

    with pytest.raises(DataError, match="regions with object classes for Early Adaptation"):
        EarlyAdaptationDataset(Grid(), None, 4)
