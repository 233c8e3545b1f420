"""Fixtures shared by the tests: the original implementation's weights and what it computes with them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_tokenizer import build_tokenizer

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


NOUNS = {
    "en": ["ball", "tree", "house", "fish"],
    "de": ["Ball", "Baum", "Haus", "Fisch"],
    "ja": ["ボール", "木", "家", "魚"],
}
SENTENCES = {"en": "a {} near a {}", "de": "ein {} neben einem {}", "ja": "{}の近くの{}"}


@dataclasses.dataclass(frozen=True)
class TinyCorpus:
    """A corpus of 24 "images" of two things each, as files in the documented formats."""

    captions: Path
    regions: Path
    object_labels: Path
    tokenizer: Path

    def flags(self) -> list[str]:
        """What run_pretraining.py needs to train a tiny UC2 on it."""
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
        }
        flags = {
            "train_file": self.captions,
            "eval_file": self.captions,
            "region_store": self.regions,
            "object_labels": self.object_labels,
            "tokenizer": self.tokenizer,
            "config_overrides": json.dumps(sizes),
            "report_to": "none",
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [*words, "--languages", *NOUNS]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> TinyCorpus:
    from uc2.region_store import RegionRow, write_region_store
    from uc2.rows import write_jsonl

    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(4, 12))
    captions, regions = [], []
    for index in range(24):
        first, second = rng.permutation(4)[:2]
        texts = {code: text.format(NOUNS[code][first], NOUNS[code][second]) for code, text in SENTENCES.items()}
        captions.append(
            {
                "image_id": f"image{index}",
                "captions": texts,
                "alignment": {"de": "0-0 1-1 2-2 3-3 4-4", "ja": "1-0"},
            }
        )
        classes = np.array([first, second, *rng.integers(4, size=rng.integers(1, 4))])
        probs = np.full((len(classes), 4), 0.05)
        probs[np.arange(len(classes)), classes] = 0.85
        corners = rng.uniform(0, 40, size=(len(classes), 2))
        regions.append(
            RegionRow(
                image_id=f"image{index}",
                image_height=100,
                image_width=100,
                boxes=np.hstack([corners, corners + rng.uniform(5, 50, size=(len(classes), 2))]).astype(np.float32),
                features=(prototypes[classes] + 0.1 * rng.normal(size=(len(classes), 12))).astype(np.float16),
                class_ids=classes,
                class_scores=np.full(len(classes), 0.85, np.float32),
                class_probs=probs.astype(np.float16),
            )
        )
    corpus = TinyCorpus(folder / "captions.jsonl", folder / "regions", folder / "labels.json", folder / "tokenizer")
    write_jsonl(captions, corpus.captions)
    write_region_store(regions, corpus.regions)
    corpus.object_labels.write_text(json.dumps(NOUNS), encoding="utf-8")
    texts = [text for row in captions for text in row["captions"].values()]
    build_tokenizer(texts, vocab_size=80).save_pretrained(corpus.tokenizer)
    return corpus
