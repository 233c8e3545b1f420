"""Publishing on the Hub: by hand, to branches, again, interrupted, with a wrong token, without a Hub.

huggingface_hub's real client speaks to a test double of the Hub.
"""

import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_client import ACCOUNTS, MODEL_FILES, READ_TOKEN, TOKEN, connect
from hub_double import HubDouble
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoProcessor, AutoTokenizer

import run_pretraining
from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2RegionDetector, UC2RegionDetectorConfig
from processing_uc2 import UC2DetectorImageProcessor, UC2Processor
from uc2 import hub as publishing
from uc2.hub import HubError, publish
from uc2.model_card import write_model_card

ROOT = Path(__file__).parents[1]


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
def run_folder(tmp_path_factory, tiny_corpus) -> Path:
    """What a run leaves, without the run."""
    folder = tmp_path_factory.mktemp("run")
    processor = UC2Processor(AutoTokenizer.from_pretrained(tiny_corpus.tokenizer), {"en": ["ball"]}, feature_size=12)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = UC2Config(vocab_size=len(processor.tokenizer), region_feature_size=12, **sizes)
    torch.manual_seed(0)
    UC2ForPreTraining(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ("results.json", "curves.png", "runs/events.out.tfevents.0"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    write_model_card(folder, "pretraining", model_name="uc2", config=config)
    return folder


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


def test_a_hub_that_is_not_there_is_told(hub, run_folder, monkeypatch, tmp_path):
    connect(monkeypatch, "http://127.0.0.1:9", tmp_path)  # the discard port: nobody listens
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="org/away on the Hub was not changed: .*refused.* everything is saved in"):
        publish(run_folder, "org/away")


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
