"""run_retrieval.py from end to end on a tiny corpus: training, resuming, two processes, search, refusals."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM, XLMRobertaTokenizer

import run_retrieval
from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval
from processing_uc2 import UC2Processor
from uc2.data_error import DataError
from uc2.hard_negatives import mine_hard_negatives
from uc2.region_store import RegionRow, RegionStore, write_region_store
from uc2.retrieval_data import RetrievalDataset, load_captions_of
from uc2.rows import write_jsonl
from uc2.scoring import score_matrix

ROOT = Path(__file__).resolve().parents[1]
FEATURES, IMAGES = 16, 8
WORDS = {
    "en": ["dog", "cat", "tree", "car", "house", "boat", "ball", "fish"],
    "de": ["hund", "katze", "baum", "auto", "haus", "boot", "ball", "fisch"],
}


def region_row(number, value=None):
    """Image `number` shows object `number` three times."""
    features = np.zeros((3, FEATURES), np.float16)
    features[:, number] = 5
    return RegionRow(
        image_id=f"i{number}",
        image_height=10,
        image_width=10,
        boxes=np.array([[0, 0, 5, 5], [2, 2, 8, 8], [1, 0, 9, 9]], np.float32),
        features=features if value is None else np.full_like(features, value),
        class_ids=np.array([number] * 3),
        class_scores=np.array([0.9, 0.8, 0.7], np.float32),
    )


def caption_rows(images=range(IMAGES), languages=("en", "de")):
    return [
        {"image_id": f"i{i}", "language": code, "caption": WORDS[code][i]}
        for i in images
        for code in languages
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A pre-training checkpoint, a region store and captions in two languages."""
    folder = tmp_path_factory.mktemp("corpus")
    words = dict.fromkeys(f"▁{word}" for group in WORDS.values() for word in group)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *words, "<mask>"]
    processor = UC2Processor(
        XLMRobertaTokenizer(vocab=[(piece, 0.0) for piece in pieces]), feature_size=FEATURES
    )
    torch.manual_seed(0)
    config = UC2Config(
        vocab_size=len(processor.tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=66, region_feature_size=FEATURES,
        initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    UC2ForPreTraining(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_region_store([region_row(number) for number in range(IMAGES)], folder / "regions")
    write_jsonl(caption_rows(), folder / "captions.jsonl")
    return folder


def arguments(corpus, output, *extra):
    base = {
        "model_name_or_path": corpus / "model",
        "region_stores": corpus / "regions",
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "save_steps": 1000,
        "seed": 1,
        "disable_tqdm": True,
    }
    words = [word for name, value in base.items() for word in (f"--{name}", str(value))]
    return words + [str(word) for word in extra]


def train_and_test(corpus):
    captions = corpus / "captions.jsonl"
    return ["--train_files", captions, "--eval_files", f"toys={captions}"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    extra = ["--max_steps", 120, "--eval_strategy", "steps", "--eval_steps", 60, "--save_steps", 60]
    return output, run_retrieval.main(arguments(corpus, output, *train_and_test(corpus), *extra))


def test_training_learns_to_retrieve_and_writes_everything(trained):
    output, results = trained
    assert results["meta_average"] > 90 > 60 > results["chance_meta_average"]
    assert json.loads((output / "results.json").read_text()) == results
    assert set(results["datasets"]["toys"]) == {"en", "de"}
    with open(output / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7 + 1 and float(rows[-1]["value"]) == results["meta_average"]
    assert "| toys | de |" in (output / "table.md").read_text()
    for name in ("recall_text_to_image", "recall_image_to_text", "curves"):
        with Image.open(output / f"{name}.png") as image:
            assert image.size[0] > 500
    card = (output / "README.md").read_text()
    assert "toys (de)" in card and "type: meta-ave" in card
    assert not (output / "scoring").exists()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_meta_average" in entry] == [60, 120]


def test_the_saved_folder_evaluates_to_the_same(trained, corpus, tmp_path):
    output, results = trained
    test_set = ["--eval_files", f"toys={corpus / 'captions.jsonl'}", "--save_scores", "true"]
    again = run_retrieval.main(arguments(corpus, tmp_path, "--model_name_or_path", output, *test_set))
    assert again["datasets"] == results["datasets"]
    saved = np.load(tmp_path / "scores" / "toys.de.0.npy")
    assert saved.shape == (IMAGES, IMAGES) and saved.dtype == np.float32


def test_zero_shot_uses_the_matching_head(corpus, tmp_path):
    options = ["--eval_files", f"toys={corpus / 'captions.jsonl'}", "--eval_languages", "de"]
    results = run_retrieval.main(arguments(corpus, tmp_path, *options, "--eval_folds", "toys=2"))
    assert list(results["datasets"]["toys"]) == ["de"]
    assert results["chance"]["toys"]["de"]["text_to_image_r1"] == pytest.approx(25)  # folds of four images
    assert not (tmp_path / "model.safetensors").exists()


def test_fine_tuning_starts_from_the_match_row(corpus):
    store = RegionStore(corpus / "regions")
    model = run_retrieval.load_model(str(corpus / "model"), store, fine_tune=True)
    source = UC2ForPreTraining.from_pretrained(corpus / "model")
    torch.testing.assert_close(model.score_head.weight[0], source.itm_head.weight[1])


def test_resuming_gives_the_weights_of_an_uninterrupted_run(corpus, tmp_path):
    extra = [*train_and_test(corpus), "--save_steps", 3, "--hard_negatives", "true"]
    extra += ["--hard_negative_steps", 2, "--hard_negative_pool", 8]
    run_retrieval.main(arguments(corpus, tmp_path / "whole", *extra, "--max_steps", 6))
    whole = UC2ForRetrieval.from_pretrained(tmp_path / "whole").state_dict()
    (tmp_path / "resumed").mkdir()
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    run_retrieval.main(arguments(corpus, tmp_path / "resumed", *extra, "--max_steps", 6))
    resumed = UC2ForRetrieval.from_pretrained(tmp_path / "resumed").state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_a_finished_run_is_evaluated_again_without_training(corpus, tmp_path, monkeypatch):
    words = arguments(corpus, tmp_path, *train_and_test(corpus))
    results = run_retrieval.main(words)
    weights = UC2ForRetrieval.from_pretrained(tmp_path).state_dict()
    monkeypatch.setattr(run_retrieval.RetrievalTrainer, "training_step", None)
    assert run_retrieval.main(words)["datasets"] == results["datasets"]
    again = UC2ForRetrieval.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_fine_tuning_from_a_text_encoder(corpus, tmp_path):
    tokenizer = UC2Processor.from_pretrained(corpus / "model").tokenizer
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=66, type_vocab_size=1,
    )  # fmt: skip
    XLMRobertaForMaskedLM(config).save_pretrained(tmp_path / "xlmr")
    tokenizer.save_pretrained(tmp_path / "xlmr")
    model = ["--model_name_or_path", tmp_path / "xlmr"]
    results = run_retrieval.main(arguments(corpus, tmp_path / "out", *train_and_test(corpus), *model))
    assert set(results["datasets"]["toys"]) == {"en", "de"}
    test_set = ["--eval_files", f"toys={corpus / 'captions.jsonl'}"]
    with pytest.raises(SystemExit, match="to fine-tune"):
        run_retrieval.main(arguments(corpus, tmp_path / "out", *test_set, *model))


def test_two_processes_equal_one(corpus, tmp_path):
    def launch(processes, accumulation):
        output = tmp_path / f"run{processes}"
        extra = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", accumulation]
        words = arguments(corpus, output, *train_and_test(corpus), *extra)
        if processes == 1:
            run_retrieval.main(words)
        else:
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(
                [*launcher, str(ROOT / "run_retrieval.py"), *words],
                check=True, env=environment, timeout=170, capture_output=True, cwd=tmp_path,
            )  # fmt: skip
        return json.loads((output / "results.json").read_text()), UC2ForRetrieval.from_pretrained(output)

    (one, model_one), (two, model_two) = launch(1, 2), launch(2, 1)
    for (name, first), second in zip(model_one.named_parameters(), model_two.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4, msg=name)
    assert one["meta_average"] == pytest.approx(two["meta_average"])


def test_bce_trains(corpus, tmp_path):
    words = arguments(corpus, tmp_path, *train_and_test(corpus), "--loss", "bce", "--train_languages", "en")
    assert run_retrieval.main(words)["meta_average"] > 0


def test_mining_takes_the_highest_scoring_wrong_pairs(corpus):
    store = RegionStore(corpus / "regions")
    captions = load_captions_of(str(corpus / "captions.jsonl"), store, None)
    processor = UC2Processor.from_pretrained(corpus / "model")
    model = UC2ForRetrieval.from_pretraining(corpus / "model")
    dataset = RetrievalDataset(captions, store, processor)
    rows = np.arange(0, len(dataset), 2)[1:]  # English, all images but the first
    mine_hard_negatives(model, dataset, rows)
    texts = captions["caption"]
    scores = score_matrix(model, list(texts), [store[f"i{i}"] for i in range(IMAGES)], processor)
    for row in rows:
        own = row // 2
        wrong_images = [i for i in range(1, IMAGES) if i != own]
        hardest = max(wrong_images, key=lambda i: scores[row, i])
        assert dataset.image_ids[dataset.hard_images[row, 0]] == f"i{hardest}"
        wrong_rows = [other for other in rows if other != row]
        assert dataset.hard_rows[row, 0] == max(wrong_rows, key=lambda other: scores[other, own])
    assert (dataset.hard_images[[0, 1, 3]] == -1).all()


def test_search_prints_and_draws_the_best(trained, corpus, tmp_path, capsys):
    output, _ = trained
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (20, 20), (number * 20, 0, 0)).save(pictures / f"i{number}.png")
    model = ["--model_name_or_path", output, "--top_k", 3]
    words = arguments(corpus, tmp_path, *model, "--search", "haus", "--search_images", pictures)
    hits = run_retrieval.main(words)
    assert hits[0].item == "i4" and len(hits) == 3
    assert capsys.readouterr().out.splitlines()[0].endswith("  i4")
    with Image.open(tmp_path / "search.png") as image:
        assert image.size[0] > image.size[1]
    captions = ["--search_image", "i4", "--eval_files", f"toys={corpus / 'captions.jsonl'}"]
    hits = run_retrieval.main(arguments(corpus, tmp_path, *model, *captions))
    assert {hits[0].item, hits[1].item} == {"house", "haus"}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([*caption_rows(), {"image_id": "lost", "language": "en", "caption": "dog"}], [], "row 17.*'lost'"),
        ([*caption_rows(), {"image_id": "i1", "language": "en", "caption": " "}], [], "row 17.*non-empty"),
        (caption_rows(), ["--train_languages", "xx"], "found de, en, expected rows in 'xx'"),
        (caption_rows(), ["--eval_languages", "fr"], "no row in 'fr'"),
        (caption_rows(), ["--eval_files", "noname"], "found 'noname', expected name=value"),
        (caption_rows(), ["--eval_files", "a/b=c"], "found 'a/b=c', expected name=value, .* without a slash"),
        (caption_rows(), ["--eval_folds", "toys=x"], "field 'eval_folds': found 'toys=x'"),
        (caption_rows(), ["--batch_tokens", 0], "field 'batch_tokens': found 0, expected at least 1"),
        (caption_rows(), ["--margin", -1], "field 'margin'"),
        (caption_rows(), ["--hard_negative_pool", 1], "field 'hard_negative_pool'"),
        (caption_rows(), ["--num_negative_images", 0, "--num_negative_captions", 0], "at least 1 of num_negative"),
        (caption_rows(), ["--max_length", 2], "field 'max_length': found 2, expected 3 to 64"),
        (caption_rows(), ["--max_length", 65], "field 'max_length': found 65, expected 3 to 64"),
        (caption_rows(), ["--model", "/no/model"], "'/no/model', expected a folder or Hub id of a UC2 or XLM-R"),
    ],
)
def test_bad_rows_and_options_stop_before_the_first_step(corpus, tmp_path, rows, options, message):
    path, output = tmp_path / "captions.jsonl", tmp_path / "output"
    write_jsonl(rows, path)
    words = arguments(corpus, output, "--train_files", path, "--eval_files", f"toys={path}", *options)
    with pytest.raises(SystemExit, match=message):
        run_retrieval.main(words)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval_strategy", "steps"], "field 'eval_strategy': found 'steps', expected no, or eval_files"),
        (["--search", " "], "field 'search': found ' ', expected a text"),
        (["--search", "dog", "--top_k", 0], "field 'top_k': found 0, expected at least 1"),
        (["--search_image", "i99"], "found no caption, expected captions to search among"),
    ],
)
def test_other_bad_options_are_refused(corpus, tmp_path, options, message):
    words = arguments(corpus, tmp_path / "output", "--train_files", corpus / "captions.jsonl", *options)
    with pytest.raises(SystemExit, match=message):
        run_retrieval.main(words)
    assert not (tmp_path / "output").exists()


def test_an_unknown_option_is_named(corpus, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_retrieval.main(arguments(corpus, tmp_path, "--train_file", "x.jsonl", "--colour", "red"))
    assert "unknown option '--colour'" in capsys.readouterr().err


def test_broken_regions_stop_before_the_first_step(corpus, tmp_path):
    output, store = tmp_path / "output", tmp_path / "regions"
    write_region_store([region_row(number) for number in range(IMAGES)], store)
    words = arguments(corpus, output, *train_and_test(corpus), "--region_stores", store)
    shard = next(store.glob("*.arrow"))
    damaged = bytearray(shard.read_bytes())
    feature = np.full(4, 5, np.float16)[:1].tobytes()
    place = damaged.index(feature)
    damaged[place : place + 2] = np.full(1, np.nan, np.float16).tobytes()
    shard.write_bytes(damaged)
    with pytest.raises(SystemExit, match="NaN or infinity in region 0"):
        run_retrieval.main(words)
    shard.write_bytes(damaged[:100])
    with pytest.raises(SystemExit, match="100 bytes"):
        run_retrieval.main(words)
    assert not output.exists()


def test_checkpoints_that_do_not_fit_are_refused(corpus, tmp_path):
    store = RegionStore(corpus / "regions")
    UC2ForPreTraining.from_pretrained(corpus / "model").uc2.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="found 'UC2Model'"):
        run_retrieval.load_model(str(tmp_path), store, fine_tune=True)
    with pytest.raises(SystemExit, match="neither train_files nor eval_files"):
        run_retrieval.main(arguments(corpus, tmp_path))
