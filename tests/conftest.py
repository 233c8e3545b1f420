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


@pytest.fixture(scope="session")
def converted(reference_folder, tmp_path_factory):
    """`converted("vqa")`: the folder that the converter makes of the original's weights for that head."""
    from uc2.convert_checkpoint import main

    folders = {}

    def convert(head: str) -> Path:
        if head not in folders:
            folders[head] = tmp_path_factory.mktemp("converted") / head
            checkpoint = reference_folder / f"{head}_state_dict.safetensors"
            config = reference_folder / "config.json"
            arguments = {"checkpoint": checkpoint, "config": config, "head": head, "output_dir": folders[head]}
            main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])
        return folders[head]

    return convert
