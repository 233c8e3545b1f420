"""huggingface_hub's real client, pointed to the test double of the Hub; accounts and files of the tests there."""

from pathlib import Path

import huggingface_hub
import pytest
import transformers
from hub_double import Account

TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34
ACCOUNTS = {TOKEN: Account("ann", ("org",)), READ_TOKEN: Account("ann", ("org",), role="read")}
# What every published model comes with.
MODEL_FILES = {
    "model.safetensors",
    "config.json",
    "configuration_uc2.py",
    "modeling_uc2.py",
    "processing_uc2.py",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "results.json",
    "curves.png",
}


def connect(patch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Points the client of this process to the double. It reads its environment only when it is imported."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    patch.setattr(transformers.utils.hub, "_hf_api", None)
    patch.delenv("HF_TOKEN", raising=False)
