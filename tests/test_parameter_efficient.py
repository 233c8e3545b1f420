"""LoRA on retrieval and VQA, through the scripts: what trains, what is saved, and that it is the same model."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments, XLMRobertaConfig, XLMRobertaForMaskedLM

import run_retrieval
import run_vqa
from modeling_uc2 import UC2Config, UC2ForPreTraining, UC2ForRetrieval, UC2ForVQA
from processing_uc2 import UC2Processor
from uc2.data_error import DataError
from uc2.parameter_efficient import LoraArguments, add_adapters
from uc2.region_store import RegionStore
from uc2.rows import write_jsonl
from uc2.scoring import score_matrix

HIDDEN, WIDE, RANK, ALPHA, ANSWERS = 16, 32, 4, 6, 3
MODEL_CLASSES = {"retrieval": UC2ForRetrieval, "vqa": UC2ForVQA}
# "dense" is both halves of the feed-forward part, the attention's output and the pooler.
LORA = ["--lora_rank", RANK, "--lora_alpha", ALPHA, "--lora_target_modules", "query", "value", "dense"]
ADAPTED = re.compile(r".*\.(query|value|dense)\.weight")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_corpus) -> Path:
    """A folder with a pre-trained model of random weights, `captions.jsonl` and `questions.jsonl`."""
    folder = tmp_path_factory.mktemp("lora")
    processor = UC2Processor(AutoTokenizer.from_pretrained(tiny_corpus.tokenizer), feature_size=12)
    config = UC2Config(
        vocab_size=len(processor.tokenizer), hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=WIDE, max_position_embeddings=64, region_feature_size=12, num_region_classes=4,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    UC2ForPreTraining(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = [json.loads(line) for line in open(tiny_corpus.captions, encoding="utf-8")]
    captions = [{"image_id": row["image_id"], "language": "en", "caption": row["captions"]["en"]} for row in rows]
    write_jsonl(captions, folder / "captions.jsonl")
    answers = {"ball": "red", "tree": "blue", "house": "two", "fish": "red"}
    questions = [
        {
            "question_id": str(number),
            "image_id": row["image_id"],
            "language": "en",
            "question": row["captions"]["en"],
            "answers": [answers[row["captions"]["en"].split()[1]]],
        }
        for number, row in enumerate(rows)
    ]
    write_jsonl(questions, folder / "questions.jsonl")
    return folder


def run(task: str, base: Path, tiny_corpus, output: Path, *extra) -> dict:
    rows = base / {"retrieval": "captions.jsonl", "vqa": "questions.jsonl"}[task]
    own = {
        "retrieval": ["--per_device_train_batch_size", 8],
        "vqa": ["--num_answers", ANSWERS, "--tokens_per_batch", 100],
    }[task]
    words = [
        "--model", base / "model", "--region_store", tiny_corpus.regions, "--output_dir", output,
        "--train_files", rows, "--eval_files", f"toy={rows}", "--learning_rate", 5e-3, "--max_steps", 6,
        "--save_steps", 3, "--seed", 1, "--disable_tqdm", "true", *own, *extra,
    ]  # fmt: skip
    script = {"retrieval": run_retrieval, "vqa": run_vqa}[task]
    return script.main([str(word) for word in words])


@pytest.fixture(scope="module", params=["retrieval", "vqa"])
def adapted(request, base, tiny_corpus, tmp_path_factory) -> tuple[str, Path, list, dict]:
    """(task, output folder, options, results) of a run with dropout in the model and in the adapters."""
    output = tmp_path_factory.mktemp(request.param)
    extra = [*LORA, "--lora_dropout", 0.2]
    if request.param == "retrieval":
        extra += ["--hard_negatives", "true", "--hard_negative_steps", 2, "--hard_negative_pool", 8]
    return request.param, output, extra, run(request.param, base, tiny_corpus, output, *extra)


def load_base(task: str, base: Path):
    if task == "retrieval":
        return UC2ForRetrieval.from_pretrained(base / "model")
    return UC2ForVQA.from_pretrained(base / "model", num_labels=ANSWERS)


def inputs_of(base: Path, tiny_corpus) -> dict:
    processor = UC2Processor.from_pretrained(base / "model")
    regions = list(RegionStore(tiny_corpus.regions).values())[:3]
    return processor(text=["a ball near a tree", "ein Haus", "魚"], regions=regions, return_tensors="pt")


def test_output_is_an_ordinary_model_that_computes_the_same(adapted, base, tiny_corpus, tmp_path):
    task, output, *_ = adapted
    with torch.no_grad():
        inputs = inputs_of(base, tiny_corpus)
        merged = MODEL_CLASSES[task].from_pretrained(output)
        with_adapter = PeftModel.from_pretrained(load_base(task, base), output / "adapter").eval()
        torch.testing.assert_close(merged(**inputs).logits, with_adapter(**inputs).logits, atol=1e-5, rtol=1e-5)
        # The adapters matter: without them the head computes something else.
        with with_adapter.disable_adapter():
            assert (merged(**inputs).logits - with_adapter(**inputs).logits).abs().max() > 1e-3
    # The same files as an ordinary run's: it loads and uploads as one, and no adapter is put on top of it.
    run(task, base, tiny_corpus, tmp_path, "--max_steps", 1)
    differing = {path.name for path in output.iterdir()} ^ {path.name for path in tmp_path.iterdir()}
    assert differing == {"adapter", "checkpoint-3", "checkpoint-6", "checkpoint-1"}
    adapter_files = {path.name for path in (output / "adapter").iterdir()}
    assert adapter_files == {"adapter_config.json", "adapter_model.safetensors"}


def test_merged_weights_are_the_base_plus_the_product_of_the_adapters(adapted, base):
    """Every tensor of the output by hand: base + alpha / rank * B A, the base itself, or a trained head."""
    task, output, *_ = adapted
    before, after = load_base(task, base).state_dict(), load_file(output / "model.safetensors")
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    head = {"retrieval": "score_head.", "vqa": "classifier."}[task]
    assert set(after) == set(before)
    for name, weight in after.items():
        if name.startswith(head):
            torch.testing.assert_close(weight, adapter[f"base_model.model.{name}"], atol=0, rtol=0)
        elif ADAPTED.fullmatch(name):
            a, b = (
                adapter[f"base_model.model.{name}".replace("weight", f"lora_{part}.weight")] for part in "AB"
            )
            assert a.shape[0] == b.shape[1] == RANK and b.abs().max() > 0
            torch.testing.assert_close(weight, before[name] + ALPHA / RANK * b @ a, atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(weight, before[name]), name
    start = UC2ForPreTraining.from_pretrained(base / "model")
    if task == "retrieval":
        assert not torch.equal(after["score_head.weight"][0], start.itm_head.weight[1])


def test_checkpoints_hold_only_what_trains(adapted):
    task, output, *_ = adapted
    weights = load_file(output / "checkpoint-3" / "adapter_model.safetensors")
    assert not (output / "checkpoint-3" / "model.safetensors").exists()
    # query, value, attention output and pooler are square; two are between H and the wide layer.
    matrices = RANK * (4 * 2 * HIDDEN + 2 * (HIDDEN + WIDE))
    vqa_head = HIDDEN * 2 * HIDDEN + 2 * HIDDEN + 4 * HIDDEN + 2 * HIDDEN * ANSWERS + ANSWERS
    expected = matrices + {"retrieval": HIDDEN + 1, "vqa": vqa_head}[task]
    assert sum(tensor.numel() for tensor in weights.values()) == expected
    optimizer = torch.load(output / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == expected
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"{expected:,} of " in card and "query value dense" in card


def test_resuming_gives_the_weights_of_an_uninterrupted_run(adapted, base, tiny_corpus, tmp_path):
    task, output, extra, results = adapted
    os.symlink(output / "checkpoint-3", tmp_path / "checkpoint-3")
    assert run(task, base, tiny_corpus, tmp_path, *extra)["datasets"] == results["datasets"]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, resumed = load_file(output / file), load_file(tmp_path / file)
        assert set(whole) == set(resumed)
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize("targets", [["dense"], ["all-linear"]])
def test_fast_scoring_reads_the_adapters(base, tiny_corpus, targets):
    """Hard negatives and recalls of a run come from `score_matrix`, which rearranges the layers."""
    model = UC2ForRetrieval.from_pretrained(base / "model")
    lora = LoraArguments(lora_rank=RANK, lora_target_modules=targets)
    model = add_adapters(model, lora, TrainingArguments(use_cpu=True)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    texts = ["a ball near a tree", "ein Haus", "魚"]
    regions = list(RegionStore(tiny_corpus.regions).values())[:3]
    processor = UC2Processor.from_pretrained(base / "model")
    scores = score_matrix(model, texts, regions, processor)
    with torch.no_grad():
        for row, text in enumerate(texts):
            pairs = processor(text=[text] * 3, regions=regions, return_tensors="pt")
            np.testing.assert_allclose(scores[row], model(**pairs).logits[:, 0], atol=2e-5)


def test_all_linear_leaves_the_heads_alone(base):
    """A head trains in full; adapters on it as well would be superfluous, and could not be merged."""
    model = UC2ForVQA.from_pretrained(base / "model", num_labels=ANSWERS)
    lora = LoraArguments(lora_rank=RANK, lora_target_modules=["all-linear"])
    names = [name for name, _ in add_adapters(model, lora, TrainingArguments(use_cpu=True)).named_parameters()]
    adapted_names = [name for name in names if "lora_A" in name]
    assert len(adapted_names) == 6 + 1 + 2 and not any("classifier" in name for name in adapted_names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, "lora_rank.*at least 0"),
        ({"lora_dropout": 1}, "lora_dropout.*found 1.*share"),
        ({"lora_alpha": 0}, "lora_alpha.*above 0"),
        ({"lora_target_modules": ["q_proj"]}, "found q_proj, expected .*dense.*query"),
    ],
)
def test_bad_options_are_refused(base, options, message):
    model = UC2ForRetrieval.from_pretrained(base / "model")
    with pytest.raises(DataError, match=message):
        add_adapters(model, LoraArguments(**{"lora_rank": 2, **options}), TrainingArguments(use_cpu=True))


def test_a_text_encoder_is_no_base(base, tiny_corpus, tmp_path):
    """Its region encoder is random: frozen, it would neither learn nor be saved with the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus.tokenizer)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, type_vocab_size=1,
    )  # fmt: skip
    XLMRobertaForMaskedLM(config).save_pretrained(tmp_path / "xlmr")
    tokenizer.save_pretrained(tmp_path / "xlmr")
    for task in MODEL_CLASSES:
        with pytest.raises(SystemExit, match="freshly initialised"):
            run(task, base, tiny_corpus, tmp_path / "out", *LORA, "--model", tmp_path / "xlmr")
