"""A saved folder loads without this package, through every Auto class, from disk and from a Hub cache.

Also what such a process saves in turn, a Trainer's checkpoint, and the detector that finds a photograph's regions.
"""

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
    Trainer,
    TrainingArguments,
    XLMRobertaTokenizer,
)

from modeling_uc2 import (
    UC2Config,
    UC2ForPreTraining,
    UC2ForRetrieval,
    UC2ForVQA,
    UC2Model,
    UC2RegionDetector,
    UC2RegionDetectorConfig,
)
from processing_uc2 import UC2DetectorImageProcessor, UC2Processor

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
        torch.save(model(**inputs)[output], f"{again}.pt")
    # Saved by this process, loaded again by it, and saved once more.
    for folder in (again, again + "-twice"):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)

# Photographs, with a detector that is loaded and saved the same way.
processor.min_regions = 3
name, images = "detector", list(numpy.load("images.npz").values())
for folder in ("detector", "again/detector"):
    image_processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    detector = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    detector.save_pretrained("again/detector")
    image_processor.save_pretrained("again/detector")
processor.attach_region_detector(detector, image_processor)
torch.save(dict(processor(text=[sys.argv[1]] * 2, images=images, return_tensors="pt")), "photographs.pt")
"""
TINY_DETECTOR = UC2RegionDetectorConfig(
    depths=[1, 1, 1, 1],
    widths=[2, 2, 4, 4],  # features of width 16, as the processor's
    num_classes=7,
    num_attributes=5,
    anchor_sizes=[16, 32, 64],
    proposal_hidden_size=8,
    proposals_after_nms=40,
)


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


@functools.cache
def make_detector():
    torch.manual_seed(0)
    return UC2RegionDetector(TINY_DETECTOR).eval()


def make_images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in ((60, 90), (70, 50))]


def trainer_checkpoint(folder) -> Path:
    """What transformers' own Trainer leaves of a retrieval model after one step that changes nothing."""
    inputs = make_processor()(text=TEXT, regions=make_regions(), return_tensors="pt")
    example = {name: values[0] for name, values in inputs.items()} | {"labels": torch.tensor(1.0)}
    options = {"max_steps": 1, "save_steps": 1, "learning_rate": 0.0, "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        model=make_model(UC2ForRetrieval),
        args=TrainingArguments(folder, remove_unused_columns=False, disable_tqdm=True, **options),
        train_dataset=[example],
        processing_class=make_processor(),
    )
    trainer.train()
    return Path(folder, "checkpoint-1")


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
    checkpoint = trainer_checkpoint(base / "trained")
    cases.append((str(checkpoint), "AutoModelForSequenceClassification", "logits", "again/checkpoint"))
    make_detector().save_pretrained(base / "detector")
    UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(base / "detector")
    np.savez(base / "images.npz", *make_images())
    (base / "again").mkdir()
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
    assert torch.equal(torch.load(clean_process / "again" / f"{auto_class.__name__}.pt", weights_only=True), expected)

    # What the clean process saved in turn, once and twice, is complete again.
    for name in (auto_class.__name__, f"{auto_class.__name__}-twice"):
        again = clean_process / "again" / name
        files = {path.name for path in again.iterdir()}
        assert {"modeling_uc2.py", "configuration_uc2.py", "processing_uc2.py", "object_labels.json"} <= files
        processor = AutoProcessor.from_pretrained(again)
        assert processor.object_labels == LABELS
        with torch.no_grad():
            inputs = processor(text=TEXT, regions=make_regions(), return_tensors="pt")
            assert torch.equal(auto_class.from_pretrained(again).eval()(**inputs)[output], expected)


def test_a_trainers_checkpoint_loads_without_the_package(clean_process):
    inputs = make_processor()(text=TEXT, regions=make_regions(), return_tensors="pt")
    with torch.no_grad():
        expected = make_model(UC2ForRetrieval)(**inputs).logits
    assert torch.equal(torch.load(clean_process / "again" / "checkpoint.pt", weights_only=True), expected)


def test_a_detector_loads_without_the_package(clean_process):
    """Twice saved and loaded; a processor that takes photographs with it gives the same inputs."""
    processor = make_processor()
    inputs = torch.load(clean_process / "photographs.pt", weights_only=True)
    image_processor = UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    processor.attach_region_detector(make_detector(), image_processor)
    expected = processor(text=[TEXT] * 2, images=make_images(), min_regions=3, return_tensors="pt")
    processor._attached = None
    assert inputs.keys() == expected.keys() and expected["region_features"].shape[2] == 16
    for name, values in expected.items():
        assert torch.equal(inputs[name], values), name


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
