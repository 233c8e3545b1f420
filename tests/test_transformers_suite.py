"""transformers' own shared suites, `ModelTesterMixin` and `ProcessorTesterMixin`, on tiny UC2 models.

They are in the source release of transformers but not in the wheel: `make transformers-suite` fetches the release
that is installed and runs this file; without it (`UC2_TRANSFORMERS_TESTS` unset) there is nothing to run. What most
matters of them is tested at every run in `test_shared_suites.py` and `test_processor_suite.py`.
"""

import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import build_tokenizer
from transformers import AutoTokenizer

from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model
from processing_uc2 import UC2Processor

FOLDER = os.environ.get("UC2_TRANSFORMERS_TESTS")
if FOLDER is None:
    pytest.skip("the source release of transformers is not at hand: make transformers-suite", allow_module_level=True)

BATCH, TEXT, REGIONS, FEATURES, VOCABULARY, LABELS = 3, 7, 4, 16, 99, 3
# What the suites import and the source release leaves out: generation and export, which UC2 has no part in.
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def suite_module(name: str):
    """One file of the release's tests as a module of a package."""
    package = "transformers_tests"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(Path(FOLDER))]
        for module, mixin in LEFT_OUT.items():
            folder = f"{package}.{module.partition('.')[0]}"
            sys.modules[folder] = types.ModuleType(folder)
            sys.modules[folder].__path__ = []
            sys.modules[f"{package}.{module}"] = types.ModuleType(module)
            setattr(sys.modules[f"{package}.{module}"], mixin, type(mixin, (), {}))
        sys.modules["fetch_hub_objects_for_ci"] = types.ModuleType("fetch_hub_objects_for_ci")
        sys.modules["fetch_hub_objects_for_ci"].url_to_local_path = lambda url, *_: url
    return importlib.import_module(f"{package}.{name}")


class UC2ModelTester:
    """A tiny configuration and its inputs, as the suite asks for them."""

    batch_size, seq_length, is_training = BATCH, TEXT, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    encoder_seq_length = key_length = TEXT + REGIONS

    def get_config(self) -> UC2Config:
        return UC2Config(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=40,
            region_feature_size=FEATURES,
            num_labels=LABELS,
        )

    def prepare_config_and_inputs_for_common(self):
        corner = torch.rand(BATCH, REGIONS, 2) / 2
        inputs = {
            "input_ids": torch.randint(4, VOCABULARY, (BATCH, TEXT)),
            "attention_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
            "region_features": torch.randn(BATCH, REGIONS, FEATURES),
            "region_boxes": torch.cat([corner, corner + 0.3], dim=-1),
            "region_attention_mask": torch.ones(BATCH, REGIONS, dtype=torch.long),
        }
        return self.get_config(), inputs


class UC2ModelSuite(suite_module("test_modeling_common").ModelTesterMixin, unittest.TestCase):
    all_model_classes = (UC2Model, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA)

    def setUp(self):
        self.model_tester = UC2ModelTester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = dict(inputs_dict)
        if return_labels and model_class is UC2ForPreTraining:
            inputs["labels"] = torch.where(inputs["input_ids"] % 2 == 0, inputs["input_ids"], -100)
            inputs["region_labels"] = torch.full((BATCH, REGIONS), 5)
            inputs["itm_labels"] = torch.tensor([0, 1, 1])
        elif return_labels and model_class is not UC2Model:
            shape = (BATCH, LABELS) if model_class is UC2ForVQA else (BATCH,)
            inputs["labels"] = torch.ones(shape)
        return inputs

    def test_training(self):
        self._on_heads(super().test_training)

    def test_training_gradient_checkpointing(self):
        self._on_heads(super().test_training_gradient_checkpointing)

    def test_training_gradient_checkpointing_use_reentrant_false(self):
        self._on_heads(super().test_training_gradient_checkpointing_use_reentrant_false)

    def test_training_gradient_checkpointing_use_reentrant_true(self):
        self._on_heads(super().test_training_gradient_checkpointing_use_reentrant_true)

    def _on_heads(self, test):
        """UC2Model computes no loss; the suite knows base models by transformers' own lists only."""
        self.all_model_classes = type(self).all_model_classes[1:]
        test()


class UC2ProcessorSuite(suite_module("test_processing_common").ProcessorTesterMixin, unittest.TestCase):
    processor_class = UC2Processor

    @classmethod
    def _setup_tokenizer(cls):
        with tempfile.TemporaryDirectory() as folder:
            texts = ["lower newer upper older longer string"] * 3
            build_tokenizer(texts, vocab_size=80).save_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder)
