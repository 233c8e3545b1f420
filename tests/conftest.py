"""Fixtures shared by the tests: the original implementation's weights and what it computes with them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    return FIXTURES / "uc2"


@pytest.fixture(scope="session")
def reference_config(reference_folder) -> dict:
    return json.loads((reference_folder / "config.json").read_text())


@pytest.fixture(scope="session")
def reference(reference_folder) -> dict[str, torch.Tensor]:
    """`expected.safetensors`: inputs and outputs of the original in evaluation mode."""
    return load_file(reference_folder / "expected.safetensors")
