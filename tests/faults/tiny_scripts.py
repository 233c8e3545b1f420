"""The three training scripts on the tiny corpus, each a run of a second."""

import json
from pathlib import Path

import torch
from forked_script import ForkedScript
from transformers import AutoTokenizer

import run_pretraining
import run_retrieval
import run_vqa
from modeling_uc2 import UC2Config, UC2ForPreTraining
from processing_uc2 import UC2Processor
from uc2.rows import write_jsonl

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
COMMON = {"save_steps": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}


def pretraining(corpus, folder: Path) -> ForkedScript:
    flags = {
        "do_train": True,
        "train_file": corpus.captions,
        "eval_file": corpus.captions,
        "region_store": corpus.regions,
        "object_labels": corpus.object_labels,
        "tokenizer": corpus.tokenizer,
        "config_overrides": json.dumps(SIZES),
        "languages": ["en", "de", "ja"],
        "ea_steps": 3,
        "ea_batch_size": 4,
        "max_steps": 5,
        "save_total_limit": 2,
        "retrieval_images": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }
    return ForkedScript(run_pretraining.main, {**COMMON, **flags}, folder)


def _save_model(corpus, folder: Path) -> Path:
    """A "pre-trained" model of random weights."""
    processor = UC2Processor(AutoTokenizer.from_pretrained(corpus.tokenizer), feature_size=12)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(processor.tokenizer), "region_feature_size": 12, "num_region_classes": 4}
    UC2ForPreTraining(UC2Config(**SIZES, **sizes)).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def retrieval(corpus, folder: Path) -> ForkedScript:
    """With negatives mined at a step that is also saved."""
    parallel = [json.loads(line) for line in corpus.captions.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"image_id": row["image_id"], "language": code, "caption": row["captions"][code]}
        for row in parallel
        for code in ("en", "de")
    ]
    file = write_jsonl(rows, folder / "captions.jsonl")
    flags = {
        "model_name_or_path": _save_model(corpus, folder),
        "region_stores": corpus.regions,
        "train_files": file,
        "eval_files": f"toy={file}",
        "hard_negatives": True,
        "hard_negative_steps": 4,  # used from four updates later on
        "hard_negative_pool": 12,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
    }
    return ForkedScript(run_retrieval.main, {**COMMON, **flags}, folder)


def vqa(corpus, folder: Path) -> ForkedScript:
    rows = [
        {
            "question_id": number,
            "image_id": f"image{number}",
            "language": "en",
            "question": ["a ball near a tree", "a house near a fish"][number % 2],
            "answers": [["red"], ["blue"]][number % 2],
        }
        for number in range(24)
    ]
    file = write_jsonl(rows, folder / "questions.jsonl")
    flags = {
        "model_name_or_path": _save_model(corpus, folder),
        "region_stores": corpus.regions,
        "train_files": file,
        "eval_files": f"toy={file}",
        "num_answers": 2,
        "max_steps": 6,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "learning_rate": 1e-2,
        "tokens_per_batch": 100,
    }
    return ForkedScript(run_vqa.main, {**COMMON, **flags}, folder)
