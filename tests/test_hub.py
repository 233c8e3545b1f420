"""Publishing on the Hub and loading from it, with huggingface_hub's real client against a test double of the Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hub_double import Account, HubDouble
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoProcessor

import run_pretraining
import run_retrieval
import run_vqa
from modeling_uc2 import UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA, UC2RegionDetector, UC2RegionDetectorConfig
from processing_uc2 import UC2DetectorImageProcessor, UC2Processor
from uc2 import hub as publishing
from uc2.hub import HubError, files_to_publish, publish
from uc2.region_store import RegionStore
from uc2.rows import write_jsonl

ROOT = Path(__file__).parents[1]
TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34
ACCOUNTS = {TOKEN: Account("ann", ("org",)), READ_TOKEN: Account("ann", ("org",), role="read")}
RUNS = {"pretraining": "org/uc2", "retrieval": "org/uc2-retrieval", "vqa": "ann/vqa"}
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
    assert list((folder / "runs" / "uc2").glob("checkpoint-*/optimizer.pt"))  # there are some
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


# Pushing by hand


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubDouble(ACCOUNTS) as hub:
        connect(monkeypatch, hub.endpoint, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The client waits longer and longer before it tries again.
        monkeypatch.setattr(huggingface_hub.utils._http, "time", type("Time", (), {"sleep": lambda seconds: None}))
        yield hub


@pytest.fixture(scope="module")
def run_folder(published) -> Path:
    return published[1] / "runs" / "uc2"


def test_model_and_processor_push_themselves(hub, run_folder):
    model, processor = UC2ForPreTraining.from_pretrained(run_folder), UC2Processor.from_pretrained(run_folder)
    model.push_to_hub("org/by-hand", tags=["ball"])
    processor.push_to_hub("org/by-hand")
    files = hub.repositories["org/by-hand"].files()
    assert set(files) == MODEL_FILES - {"results.json", "curves.png"} | {"object_labels.json", ".gitattributes"}
    loaded = AutoModelForPreTraining.from_pretrained("org/by-hand")
    for name, tensor in load(files["model.safetensors"].content).items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert AutoProcessor.from_pretrained("org/by-hand").object_labels == processor.object_labels
    card = ModelCard(files["README.md"].content.decode())
    assert card.data.tags == ["ball"]


def test_saving_may_push_too(hub, run_folder, tmp_path):
    """`save_pretrained(push_to_hub=True)` uploads what it writes: code and object labels included."""
    model, processor = UC2ForPreTraining.from_pretrained(run_folder), UC2Processor.from_pretrained(run_folder)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved")
    processor.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved")
    found = set(hub.repositories["org/saved"].files())
    assert found >= MODEL_FILES - {"README.md", "results.json", "curves.png"} | {"object_labels.json"}


def test_the_detector_pushes_itself(hub):
    sizes = {"depths": [1, 1, 1, 1], "widths": [4, 4, 8, 8], "num_classes": 7, "num_attributes": 5}
    detector = UC2RegionDetector(UC2RegionDetectorConfig(**sizes, proposal_hidden_size=8)).eval()
    image_processor = UC2DetectorImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    detector.push_to_hub("org/detector")
    image_processor.push_to_hub("org/detector")
    code = {"configuration_uc2_detector.py", "modeling_uc2_detector.py", "image_processing_uc2_detector.py"}
    assert set(hub.repositories["org/detector"].files()) >= {"preprocessor_config.json", "model.safetensors", *code}
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    inputs = AutoImageProcessor.from_pretrained("org/detector")([image], return_tensors="pt")
    found = AutoModel.from_pretrained("org/detector")(**inputs)
    assert torch.equal(found.region_features, detector(**inputs).region_features)


# Revisions


def test_a_pinned_revision_stays_what_it_was(hub, run_folder):
    model = UC2ForPreTraining.from_pretrained(run_folder)
    first = model.push_to_hub("org/pinned").oid
    old = model.itm_head.bias.detach().clone()
    with torch.no_grad():
        model.itm_head.bias += 1
    model.push_to_hub("org/pinned")
    for revision, expected in ((first, old), ("main", old + 1), (None, old + 1)):
        loaded = AutoModelForPreTraining.from_pretrained("org/pinned", revision=revision, code_revision=revision)
        assert torch.equal(loaded.itm_head.bias, expected)
    with pytest.raises(OSError, match="no-such-branch"):
        AutoModelForPreTraining.from_pretrained("org/pinned", revision="no-such-branch")


def test_a_branch_is_made_and_main_left_alone(hub, run_folder):
    commit = publish(run_folder, "org/branched", revision="tried")
    repository = hub.repositories["org/branched"]
    assert repository.branches["tried"] == commit.oid != repository.branches["main"]
    assert set(repository.files("main")) == {".gitattributes"}


# Publishing again


def test_a_second_upload_sends_what_is_new_and_deletes_old_weights(hub, run_folder):
    model = UC2ForPreTraining.from_pretrained(run_folder)
    model.push_to_hub("org/again", max_shard_size="5KB")
    assert "model.safetensors.index.json" in hub.repositories["org/again"].files()
    publish(run_folder, "org/again")
    files = hub.repositories["org/again"].files()
    assert [path for path in files if "safetensors" in path] == ["model.safetensors"]
    sent = len(hub.requests)
    publish(run_folder, "org/again")
    assert not any(request.startswith("PUT") or "/commit/" in request for request in hub.requests[sent:])


# Faults


def test_an_upload_that_breaks_off_once_goes_on(hub, run_folder):
    with hub.dropping("PUT", "/storage/", times=1) as drop:
        publish(run_folder, "org/shaky")
    assert drop[2] == 0
    assert set(hub.repositories["org/shaky"].files()) >= MODEL_FILES


@pytest.mark.parametrize("place", [("PUT", "/storage/"), ("POST", "/commit/"), ("POST", "/preupload/")])
def test_an_interrupted_upload_changes_nothing_and_can_be_repeated(hub, run_folder, place, capsys):
    with hub.dropping(*place), pytest.raises(SystemExit) as stopped:
        publishing.main([str(run_folder), "org/broken"])
    sentence = str(stopped.value)
    assert sentence.startswith("error: org/broken on the Hub was not changed: ") and "\n" not in sentence
    assert "Server disconnected" in sentence
    assert sentence.endswith(f"python -m uc2.hub {run_folder} org/broken")
    assert hub.repositories["org/broken"].messages == ["initial commit"]
    publishing.main([str(run_folder), "org/broken"])
    assert set(hub.repositories["org/broken"].files()) >= MODEL_FILES
    assert f"{hub.endpoint}/org/broken/commit/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("token", "repository", "words"),
    [
        ("hf_wrong", "org/uc2", "the Hub does not accept the token"),
        (READ_TOKEN, "org/uc2", "the token is one for reading only"),
        (TOKEN, "others/uc2", "the token may not write there"),
        (None, "org/uc2", "there is no token"),
    ],
)
def test_a_wrong_token_stops_a_script_before_its_work(
    hub, tiny_corpus, tmp_path, monkeypatch, token, repository, words
):
    monkeypatch.delenv("HF_TOKEN")
    flags = ["--do_train", "True", "--output_dir", str(tmp_path / "run"), "--push_to_hub", "True"]
    flags += ["--hub_model_id", repository, *(["--hub_token", token] if token else [])]
    with pytest.raises(SystemExit) as stopped:
        run_pretraining.main([*tiny_corpus.flags(), *flags])
    sentence = str(stopped.value)
    assert sentence.startswith(f"error: {repository} on the Hub cannot be written: {words}") and "\n" not in sentence
    assert not list((tmp_path / "run").glob("*"))
    assert not hub.repositories


def test_a_token_that_ends_meanwhile_costs_no_results(hub, tiny_corpus, tmp_path, monkeypatch):
    """The run ends with its folder complete; what is left to do is one command."""
    train = run_pretraining.UC2Trainer.train

    def train_and_revoke(*args, **kwargs):
        train(*args, **kwargs)
        del hub.accounts[TOKEN]

    monkeypatch.setattr(hub, "accounts", dict(ACCOUNTS))
    monkeypatch.setattr(run_pretraining.UC2Trainer, "train", train_and_revoke)
    output = tmp_path / "run"
    flags = ["--do_train", "True", "--output_dir", str(output), "--push_to_hub", "True", "--max_steps", "2"]
    with pytest.raises(SystemExit) as stopped:
        run_pretraining.main([*tiny_corpus.flags(), *flags, "--hub_model_id", "org/late", "--save_strategy", "no"])
    assert str(stopped.value) == (
        "error: org/late on the Hub was not changed: the Hub does not accept the token; log in with `hf auth login`, "
        f"or set HF_TOKEN to a token with write access; everything is saved in {output}; to upload it: "
        f"python -m uc2.hub {output} org/late"
    )
    assert MODEL_FILES <= {path.name for path in output.iterdir()}
    hub.accounts[TOKEN] = ACCOUNTS[TOKEN]
    publishing.main([str(output), "org/late"])
    assert set(hub.repositories["org/late"].files()) >= MODEL_FILES


def test_strategies_that_upload_checkpoints_are_refused(hub, tiny_corpus, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--push_to_hub", "True", "--hub_strategy", "all_checkpoints"]
    with pytest.raises(SystemExit, match="field 'hub_strategy': found 'all_checkpoints', expected end"):
        run_pretraining.main([*tiny_corpus.flags(), *flags])


@pytest.mark.parametrize("missing", ["model.safetensors", "README.md"])
def test_a_folder_without_model_or_card_is_refused(hub, run_folder, tmp_path, missing):
    for name in ("model.safetensors", "README.md"):
        if name != missing:
            (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    with pytest.raises(HubError, match=rf"has no .*{missing.partition('.')[2]}"):
        publish(tmp_path, "org/nothing")
    assert not hub.requests


def test_invalid_metadata_is_told(hub, run_folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((run_folder / "model.safetensors").read_bytes())
    (tmp_path / "README.md").write_text("---\nlicense: mine\n---\n# A model\n")
    with pytest.raises(HubError, match="Invalid metadata in README.md.*license"):
        publish(tmp_path, "org/invalid")
    assert hub.repositories["org/invalid"].messages == ["initial commit"]


# The double itself


def test_the_double_behaves_as_the_client_expects(hub, run_folder, tmp_path):
    """Through parts of the client that publishing does not use."""
    api = HfApi()
    assert api.whoami()["name"] == "ann"
    publish(run_folder, "org/whole", private=True)
    listed = {entry.path for entry in api.list_repo_tree("org/whole", recursive=True) if hasattr(entry, "size")}
    assert listed == set(api.list_repo_files("org/whole")) == set(hub.repositories["org/whole"].files())
    local = Path(snapshot_download("org/whole"))
    for path, file in hub.repositories["org/whole"].files().items():
        assert (local / path).read_bytes() == file.content
    assert api.file_exists("org/whole", "README.md") and not api.file_exists("org/whole", "nothing.md")
    with pytest.raises(HfHubHTTPError):
        HfApi(token=False).model_info("org/whole")  # it is private


def test_the_documentation_publishes_a_detector(hub, monkeypatch, tmp_path):
    """Its code runs as it stands, with a small detector in place of the public checkpoint."""
    text = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text.partition("## A detector")[2], re.DOTALL)
    sizes = {"depths": [1, 1, 1, 1], "widths": [4, 4, 8, 8], "num_classes": 7, "num_attributes": 5}
    small = UC2RegionDetector(UC2RegionDetectorConfig(**sizes, proposal_hidden_size=8)).eval()
    monkeypatch.setattr(UC2RegionDetector, "from_frcnn_checkpoint", lambda source: small)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "hub.md", "exec"), {})
    card = ModelCard(hub.repositories["org/uc2-detector"].files()["README.md"].content.decode())
    assert card.data.base_model == "unc-nlp/frcnn-vg-finetuned" and 'name = "org/uc2-detector"' in card.text
    loaded = AutoModel.from_pretrained("org/uc2-detector")
    assert torch.equal(loaded.predictor.cls_score.weight, small.predictor.cls_score.weight)
