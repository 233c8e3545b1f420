"""A saved folder loads without this package, through every Auto class, from disk and from a Hub cache."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    XLMRobertaTokenizer,
)

from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2Model
from processing_uc2 import UC2Processor

LABELS = {"en": ["dog"], "ja": ["犬"]}
TEXT = "a dog on the beach"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
AUTO_CLASSES = {
    UC2Model: AutoModel,
    UC2ForPreTraining: AutoModelForPreTraining,
    UC2ForRetrieval: AutoModelForSequenceClassification,
    UC2ForVQA: AutoModelForVisualQuestionAnswering,
}
OUTPUTS = {
    UC2Model: "last_hidden_state",
    UC2ForPreTraining: "itm_logits",
    UC2ForRetrieval: "logits",
    UC2ForVQA: "logits",
}
# Runs under `python -I` in another directory: neither this repository nor an installed copy can be imported.
# One process for all the classes: starting it is the slow part.
CLEAN_PROCESS = """
import json, sys
import numpy, torch, transformers

for package in ("uc2", "modeling_uc2", "processing_uc2"):
    sys.modules[package] = None  # an import of it fails, installed or not
regions = dict(numpy.load("regions.npz"))
for name, auto_class, output, again in json.load(open("cases.json")):
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=True)
    assert config.model_type == "uc2", config
    processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(name, trust_remote_code=True).eval()
    inputs = processor(text=sys.argv[1], regions=regions, return_tensors="pt")
    with torch.no_grad():
        torch.save(model(**inputs)[output], auto_class + ".pt")
    model.save_pretrained(again)
    processor.save_pretrained(again)
"""


@functools.cache  # the training of a unigram tokenizer is not deterministic
def make_processor():
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=50, special_tokens=special, unk_token="<unk>")
    unigram.train_from_iterator([TEXT, "ein Hund am Strand"] * 3, trainer)
    vocabulary = json.loads(unigram.to_str())["model"]["vocab"]
    tokenizer = XLMRobertaTokenizer(vocab=[tuple(piece) for piece in vocabulary] + [("<mask>", 0.0)])
    return UC2Processor(tokenizer, object_labels=LABELS, feature_size=16)


def make_model(model_class):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = UC2Config(**sizes, intermediate_size=64, max_position_embeddings=40, region_feature_size=16)
    return model_class(config).eval()


def make_regions():
    rng = np.random.default_rng(0)
    boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0.25, 1, 1]], np.float32)
    return {"features": rng.standard_normal((2, 16)).astype(np.float32), "boxes": boxes}


def as_hub_cache(folder, cache):
    """The layout of a downloaded repository: a commit's snapshot and a ref that names the commit."""
    repository = cache / "models--me--uc2-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    return "me/uc2-tiny"


@pytest.fixture(scope="module")
def clean_process(tmp_path_factory):
    """The directory in which the clean process has loaded, run and saved again a folder of every class."""
    base = tmp_path_factory.mktemp("clean")
    cases = []
    for model_class, auto_class in AUTO_CLASSES.items():
        name = str(base / model_class.__name__)
        make_model(model_class).save_pretrained(name)
        make_processor().save_pretrained(name)
        if model_class is UC2ForRetrieval:
            name = as_hub_cache(Path(name), base / "cache" / "hub")
        cases.append((name, auto_class.__name__, OUTPUTS[model_class], f"again/{auto_class.__name__}"))
    (base / "cases.json").write_text(json.dumps(cases))
    np.savez(base / "regions.npz", **make_regions())
    offline = {"HF_HOME": str(base / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, TEXT],
        cwd=base,
        env={"PATH": os.environ["PATH"], **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return base


@pytest.mark.parametrize("model_class", AUTO_CLASSES)
def test_a_saved_folder_loads_without_the_package(clean_process, model_class):
    auto_class, output = AUTO_CLASSES[model_class], OUTPUTS[model_class]
    inputs = make_processor()(text=TEXT, regions=make_regions(), return_tensors="pt")
    with torch.no_grad():
        expected = make_model(model_class)(**inputs)[output]
    found = torch.load(clean_process / f"{auto_class.__name__}.pt", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    # What the clean process saved in turn is complete again.
    again = clean_process / "again" / auto_class.__name__
    files = {path.name for path in again.iterdir()}
    assert {"modeling_uc2.py", "configuration_uc2.py", "processing_uc2.py", "object_labels.json"} <= files
    processor = AutoProcessor.from_pretrained(again)
    assert processor.object_labels == LABELS
    with torch.no_grad():
        inputs = processor(text=TEXT, regions=make_regions(), return_tensors="pt")
        found = auto_class.from_pretrained(again).eval()(**inputs)[output]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_class", AUTO_CLASSES)
def test_with_the_package_no_trust_is_needed(tmp_path, model_class):
    make_model(model_class).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is UC2Config
    assert type(AUTO_CLASSES[model_class].from_pretrained(tmp_path)) is model_class
    assert type(AutoProcessor.from_pretrained(tmp_path)) is UC2Processor


def test_every_auto_class_loads_from_one_checkpoint(tmp_path):
    make_model(UC2ForPreTraining).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) >= {"AutoConfig", *(auto.__name__ for auto in AUTO_CLASSES.values())}
    for model_class, auto_class in AUTO_CLASSES.items():
        assert type(auto_class.from_pretrained(tmp_path)) is model_class
