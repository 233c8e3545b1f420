"""Runs published on the Hub by the scripts, and loaded from it: the real client against a test double of the Hub.

What happens to uploads, tokens and revisions: `test_hub_publishing.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import ACCOUNTS, MODEL_FILES, TOKEN, connect
from hub_double import HubDouble
from huggingface_hub import ModelCard

import run_pretraining
import run_retrieval
import run_vqa
from modeling_uc2 import UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA
from processing_uc2 import UC2Processor
from uc2.hub import files_to_publish
from uc2.region_store import RegionStore
from uc2.rows import write_jsonl

ROOT = Path(__file__).parents[1]
RUNS = {"pretraining": "org/uc2", "retrieval": "org/uc2-retrieval", "vqa": "ann/vqa"}


@pytest.fixture(scope="module")
def published(tmp_path_factory, tiny_corpus):
    """A Hub to which each script has pushed its run; the folder with the runs; the corpus's processor."""
    folder = tmp_path_factory.mktemp("published")
    with HubDouble(ACCOUNTS) as hub, pytest.MonkeyPatch.context() as patch:
        connect(patch, hub.endpoint, folder / "cache")
        patch.chdir(folder)
        common = ["--max_steps", "4", "--save_steps", "2", "--disable_tqdm", "True", "--hub_token", TOKEN]
        common += ["--push_to_hub", "True", "--logging_steps", "1", "--report_to", "tensorboard"]
        run_pretraining.main(
            [*tiny_corpus.flags(), "--do_train", "True", "--output_dir", "runs/uc2", "--ea_steps", "3", *common]
            + ["--hub_model_id", "org/uc2"]
        )
        rows = [json.loads(line) for line in tiny_corpus.captions.read_text(encoding="utf-8").splitlines()]
        write_jsonl(
            [
                {"image_id": row["image_id"], "language": code, "caption": row["captions"][code]}
                for row in rows[:8]
                for code in ("en", "de")
            ],
            "captions.jsonl",
        )
        write_jsonl(
            [
                {"question_id": str(i), "image_id": row["image_id"], "language": "en", "question": "a ball?"}
                | {"answers": ["yes" if i % 2 else "no"]}
                for i, row in enumerate(rows)
            ],
            "questions.jsonl",
        )
        tuning = ["--model", "runs/uc2", "--region_store", str(tiny_corpus.regions), *common]
        run_retrieval.main(
            [*tuning, "--train_files", "captions.jsonl", "--eval_files", "toy=captions.jsonl"]
            + ["--output_dir", "runs/retrieval", "--hub_model_id", "org/uc2-retrieval"]
        )
        # Without hub_model_id: the folder's name, among the user's own.
        run_vqa.main(
            [*tuning, "--train_files", "questions.jsonl", "--eval_files", "toy=questions.jsonl"]
            + ["--num_answers", "2", "--output_dir", "runs/vqa"]
        )
        yield hub, folder


def files_of(hub: HubDouble, name: str):
    return hub.repositories[RUNS[name]].files()


# What the scripts publish


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_one_commit_with_all_that_others_need(published, name):
    hub, folder = published
    files = files_of(hub, name)
    assert set(files) >= MODEL_FILES | ({"object_labels.json"} if name != "vqa" else set())
    assert any("tfevents" in path and path.startswith("runs/") for path in files)
    if name == "pretraining":
        assert any(path.startswith("early_adaptation/runs/") and "tfevents" in path for path in files)
    assert len(hub.repositories[RUNS[name]].messages) == 2, "the initial commit and the run's"
    local = folder / "runs" / RUNS[name].replace("org/uc2-", "org/").rpartition("/")[2]
    assert files["model.safetensors"].content == (local / "model.safetensors").read_bytes()
    assert json.loads(files["results.json"].content) == json.loads((local / "results.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_and_the_token_stay_at_home(published, name):
    hub, folder = published
    assert list((folder / "runs" / "uc2").glob("checkpoint-*/trainer_state.json"))  # there are some
    for path, file in files_of(hub, name).items():
        assert not path.endswith((".pt", ".bin", ".pth", ".npz", ".arrow")) and "checkpoint" not in path, path
        assert TOKEN.encode() not in file.content, path


@pytest.mark.parametrize("name", RUNS)
def test_the_card_is_ours_and_loads_from_the_repository(published, name):
    hub, _ = published
    card = ModelCard(files_of(hub, name)["README.md"].content.decode())
    assert card.data.model_name == RUNS[name].rpartition("/")[2]
    assert f'name = "{RUNS[name]}"' in card.text and "## Limits" in card.text
    assert card.data.eval_results and "generated" not in card.text


def test_what_is_published_of_a_folder(tmp_path):
    published = """README.md adapter/adapter_model.safetensors config.json curves.png modeling_uc2.py
        model-00001-of-00002.safetensors model.safetensors.index.json object_labels.json predictions_toy.json
        results.csv runs/a/events.out.tfevents.1 table.md tokenizer.json""".split()
    kept = """.README.md.x.tmp .hidden.json _unfinished/model.safetensors _unfinished/runs/tfevents.2
        adapter/.hidden.json checkpoint-1/model.safetensors checkpoint-1/runs/tfevents.3 hard_negatives.npz
        non_finite_batch_step3.json optimizer.pt scores/a.npy scoring/a/0.npy trainer_state.json
        training_args.bin""".split()
    for name in (*published, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files_to_publish(tmp_path) == sorted(published)


# Loading


LOAD = """
import sys
import numpy, torch, transformers

for package in sys.argv[3:]:
    sys.modules[package] = None  # an import of it fails, installed or not
if not sys.argv[3:]:
    import modeling_uc2, processing_uc2
trust = {"trust_remote_code": True} if sys.argv[3:] else {}
regions, cases, outputs = dict(numpy.load("regions.npz")), sys.argv[1].split(), {}
for case in cases:
    name, auto_class, output = case.split(",")
    assert transformers.AutoConfig.from_pretrained(name, **trust).model_type == "uc2"
    processor = transformers.AutoProcessor.from_pretrained(name, **trust)
    model = getattr(transformers, auto_class).from_pretrained(name, **trust).eval()
    assert type(model).__module__.startswith("transformers_modules." if trust else "modeling_uc2.")
    inputs = processor(text="a ball near a tree", regions=regions, return_tensors="pt")
    with torch.no_grad():
        outputs[auto_class] = model(**inputs)[output]
torch.save(outputs, sys.argv[2])
"""
CASES = {
    "AutoModel": ("pretraining", UC2ForPreTraining, "last_hidden_state"),
    "AutoModelForPreTraining": ("pretraining", UC2ForPreTraining, "itm_logits"),
    "AutoModelForSequenceClassification": ("retrieval", UC2ForRetrieval, "logits"),
    "AutoModelForVisualQuestionAnswering": ("vqa", UC2ForVQA, "logits"),
}


@pytest.mark.parametrize("packages", [["uc2", "modeling_uc2", "processing_uc2"], []], ids=["without", "with"])
def test_every_auto_class_loads_from_the_hub(published, tiny_corpus, tmp_path, packages):
    """In another process: without the package as remote code, and with it without trusting any."""
    hub, folder = published
    sent = len(hub.requests)
    row = RegionStore(tiny_corpus.regions)["image0"]
    names = ("features", "boxes", "class_scores")
    regions = {name: getattr(row, name) for name in names} | {"image_height": 100, "image_width": 100}
    np.savez(tmp_path / "regions.npz", **regions)
    cases = [f"{RUNS[name]},{auto_class},{output}" for auto_class, (name, _, output) in CASES.items()]
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {} if packages else {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(["-I"] if packages else []), "-c", LOAD, " ".join(cases), "out.pt", *packages]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.requests) > sent  # nothing came from elsewhere
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for auto_class, (name, model_class, output) in CASES.items():
        local = folder / "runs" / {"pretraining": "uc2"}.get(name, name)
        inputs = UC2Processor.from_pretrained(local)(text="a ball near a tree", regions=regions, return_tensors="pt")
        model = model_class.from_pretrained(local).eval()
        with torch.no_grad():
            expected = (model.uc2 if auto_class == "AutoModel" else model)(**inputs)[output]
        assert torch.equal(found[auto_class], expected), auto_class
