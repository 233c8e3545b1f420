"""What makes a UC2 smaller or faster, and what it costs: one table for inference, one for training.

    python benchmarks/small_models.py --texts /data/multi30k/train.{en,de,fr,cs}.gz      # base size, random weights
    python benchmarks/small_models.py --demo demo                                        # trained by `make demo`

Base size: 12 layers of 768, a Unigram tokenizer trained on the texts (a caption a line) and filled up to XLM-R's
250,002 tokens with made-up ones of other scripts, which the vocabulary trimmed to the texts drops; random weights,
36 random regions an image. So parameters, bytes and speed are those of a real model, the number of kept tokens is
the trained tokenizer's, and agreement means little. The demo's models are trained, so there agreement counts, and
their speed, at 96 wide, means little.

Ratios are of examples per CPU second on one thread, the ways taking turns, against PyTorch in float32; what the
processor does is not counted, except for `score_matrix`, which tokenises by itself.
"""

import argparse
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import XLMRobertaTokenizer

from modeling_uc2 import UC2Config, UC2ForRetrieval, UC2ForVQA
from processing_uc2 import UC2Processor
from uc2.onnx_export import export_onnx, onnx_session, quantize_onnx, run_onnx
from uc2.region_store import RegionStore
from uc2.rows import load_captions, load_questions
from uc2.scoring import score_matrix
from uc2.vocabulary_trimming import tokens_to_keep, trim_model, trim_tokenizer

XLMR_SIZE = 250_002
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


# --- models and data ---


def synthetic_tokenizer(texts: list[str], trained: int) -> XLMRobertaTokenizer:
    """`trained` sub-words of the texts, and made-up ones in Greek letters up to XLM-R's number of tokens."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"special_tokens": list(SPECIAL), "unk_token": "<unk>", "show_progress": False}
    unigram.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=trained, **options))
    pieces = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    lowest = min(score for _, score in pieces)
    letters = "αβγδεζηθικλμνξοπρστυφχψω"
    made_up = ("".join(word) for word in itertools.product("▁" + letters, *[letters] * 3))
    pieces += [(word, lowest) for word in itertools.islice(made_up, XLMR_SIZE - 1 - len(pieces))]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)])


def random_regions(count: int, number: int, width: int) -> list[dict]:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((count, number, 2, 2), np.float32), axis=2).reshape(count, number, 4)
    features = np.maximum(rng.normal(0, 1, (count, number, width)), 0).astype(np.float32)
    return [{"features": f, "boxes": b} for f, b in zip(features, corners, strict=True)]


def read_lines(files: list[str]) -> list[str]:
    lines = []
    for file in files:
        with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as stream:
            lines += stream.read().splitlines()
    return lines


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


# --- inference ---


class Case:
    """A model with texts and images to run it on; `pairs` of retrieval are all texts x all images."""

    def __init__(self, name: str, model, processor, texts: list[str], regions: list, *, pairs: bool):
        self.name, self.model, self.processor, self.pairs = name, model.eval(), processor, pairs
        self.texts, self.regions = texts, regions
        self.count = len(texts) * len(regions) if pairs else len(texts)

    def batches(self, processor) -> list[dict]:
        """The same examples for every way: a text with all images, or 16 questions with their images."""
        if self.pairs:
            groups = [([text] * len(self.regions), self.regions) for text in self.texts]
        else:
            groups = [
                (self.texts[i : i + 16], self.regions[i : i + 16]) for i in range(0, len(self.texts), 16)
            ]
        return [dict(processor(text=t, regions=r, return_tensors="pt")) for t, r in groups]

    def torch_way(self, model, processor) -> Callable[[], np.ndarray]:
        batches = self.batches(processor)

        @torch.inference_mode()
        def run():
            return np.concatenate([model(**batch).logits.numpy() for batch in batches])

        return run

    def onnx_way(self, file: Path, processor) -> Callable[[], np.ndarray]:
        session, batches = onnx_session(file, threads=1), self.batches(processor)
        return lambda: np.concatenate([run_onnx(session, batch)["logits"] for batch in batches])

    def scoring_way(self, precision: str) -> Callable[[], np.ndarray]:
        def run():
            scores = score_matrix(self.model, self.texts, self.regions, self.processor, precision=precision)
            return scores.reshape(-1, 1)

        return run


def trimmed_copy(case: Case, texts: list[str], folder: Path):
    """(model, processor) of the case without the tokens that the texts do not use."""
    case.model.save_pretrained(folder)
    model = type(case.model).from_pretrained(folder).eval()
    kept = tokens_to_keep(case.processor.tokenizer, texts).ids
    trim_model(model, kept)
    tokenizer = trim_tokenizer(case.processor.tokenizer, kept)
    return model, UC2Processor(tokenizer, feature_size=case.processor.feature_size)


def inference_rows(case: Case, corpus: list[str], rounds: int, folder: Path):
    """Yields the table's rows; the first is the one the others are compared with."""
    trimmed, trimmed_processor = trimmed_copy(case, corpus, folder / "copy")
    files = {name: folder / f"{name}.onnx" for name in ("fp32", "int8", "trimmed-int8")}
    export_onnx(case.model, files["fp32"])
    quantize_onnx(files["fp32"], files["int8"])
    export_onnx(trimmed, folder / "trimmed.onnx")
    quantize_onnx(folder / "trimmed.onnx", files["trimmed-int8"])
    full, small = num_parameters(case.model), num_parameters(trimmed)
    ways = {  # name: (parameters, bytes or None, run)
        "PyTorch fp32": (full, weight_bytes(case.model), case.torch_way(case.model, case.processor)),
        "vocabulary trimmed": (small, weight_bytes(trimmed), case.torch_way(trimmed, trimmed_processor)),
        "ONNX fp32": (full, file_bytes(files["fp32"]), case.onnx_way(files["fp32"], case.processor)),
        "ONNX int8": (full, file_bytes(files["int8"]), case.onnx_way(files["int8"], case.processor)),
        "trimmed, ONNX int8": (
            small,
            file_bytes(files["trimmed-int8"]),
            case.onnx_way(files["trimmed-int8"], trimmed_processor),
        ),
    }
    if case.pairs:
        ways["score_matrix fp32"] = (full, None, case.scoring_way("fp32"))
        ways["score_matrix int8"] = (full, None, case.scoring_way("int8"))
    seconds, outputs = alternate({name: way[2] for name, way in ways.items()}, rounds)
    first = next(iter(ways))
    for name, (parameters, size, _) in ways.items():
        megabytes = "" if size is None else f"{size / 1e6:,.1f}"
        agreement = "" if name == first else agreement_of(outputs[name], outputs[first], case.pairs)
        ratio = seconds[first] / seconds[name]
        yield f"| {case.name} | {name} | {parameters / 1e6:,.2f} M | {megabytes} | {ratio:.2f} | {agreement} |"


def file_bytes(file: Path) -> int:
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def alternate(ways: dict[str, Callable], rounds: int) -> tuple[dict[str, float], dict]:
    """All ways in turns: the best CPU seconds of each, and what it computed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        start = time.process_time()
        results[name] = way()
        seconds[name].append(time.process_time() - start)
    return {name: min(times) for name, times in seconds.items()}, results


def agreement_of(found: np.ndarray, exact: np.ndarray, pairs: bool) -> str:
    difference = f"largest difference {np.abs(found - exact).max():.1e}"
    if pairs:
        ranks = [scores.ravel().argsort().argsort() for scores in (found, exact)]
        return f"Spearman {np.corrcoef(ranks)[0, 1]:.4f}, {difference}"
    return f"same answer {(found.argmax(1) == exact.argmax(1)).mean():.1%}, {difference}"


# --- training ---


def training_rows(case: Case, corpus: list[str], rank: int, rounds: int, folder: Path):
    """A triplet step on 12 pairs: all parameters, or adapters on query and value."""
    texts = list(itertools.islice(itertools.cycle(case.texts), 12))
    regions = list(itertools.islice(itertools.cycle(case.regions), 12))
    reference = None
    for vocabulary, adapted in itertools.product(("full", "trimmed"), (False, True)):
        case.model.save_pretrained(folder / "copy")
        model, processor = type(case.model).from_pretrained(folder / "copy"), case.processor
        if vocabulary == "trimmed":
            model, processor = trimmed_copy(case, corpus, folder / "copy")
        if adapted:
            targets = {"target_modules": ["query", "value"], "modules_to_save": ["score_head"]}
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, **targets))
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        batch = dict(processor(text=texts, regions=regions, return_tensors="pt"))

        def step(model=model, optimizer=optimizer, batch=batch):
            model(**batch, group_size=3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # the first step makes the optimiser's state
        seconds = alternate({"step": step}, rounds)[0]["step"]
        reference = reference or seconds
        weights = sum(parameter.nbytes for parameter in (trained if adapted else model.parameters()))
        state = sum(tensor.nbytes for values in optimizer.state.values() for tensor in values.values())
        count = sum(parameter.numel() for parameter in trained)
        label = f"LoRA rank {rank}" if adapted else "every parameter"
        yield (
            f"| {vocabulary} vocabulary, {label} | {count / 1e6:,.2f} M | {(weights + state) / 1e6:,.1f} "
            f"| {reference / seconds:.2f} |"
        )


# --- the two kinds of cases ---


def base_cases(files: list[str], trained: int, num_texts: int, num_images: int):
    """(how to make each case, corpus): retrieval and VQA of base size over XLM-R's number of tokens."""
    corpus = read_lines(files)
    processor = UC2Processor(synthetic_tokenizer(corpus, trained))
    regions = random_regions(num_images, 36, processor.feature_size)
    texts = corpus[:: len(corpus) // num_texts][:num_texts]

    def random_model(model_class, **changes):
        torch.manual_seed(0)
        return model_class(UC2Config(vocab_size=len(processor.tokenizer), **changes))

    def retrieval() -> Case:
        return Case("retrieval, base, random", random_model(UC2ForRetrieval), processor, texts, regions, pairs=True)

    def vqa() -> Case:
        model = random_model(UC2ForVQA, num_labels=3129)
        cycled = [list(itertools.islice(itertools.cycle(x), num_texts * num_images)) for x in (texts, regions)]
        return Case("VQA, base, random", model, processor, *cycled, pairs=False)

    return {"retrieval": retrieval, "vqa": vqa}, corpus


def demo_cases(demo: Path, num_texts: int, num_images: int):
    """(how to make each case, corpus): the demo's trained models on its test split."""
    store = RegionStore(demo / "corpus" / "regions" / "test")
    captions = load_captions(str(demo / "corpus" / "captions_test.jsonl"))
    questions = load_questions(str(demo / "corpus" / "questions_test.jsonl"))
    questions = questions.filter(lambda row: row["language"] == "en")

    def retrieval() -> Case:
        folder = demo / "retrieval"
        model, processor = UC2ForRetrieval.from_pretrained(folder), UC2Processor.from_pretrained(folder)
        images = [store[name] for name in itertools.islice(store, num_images)]
        texts = captions["caption"][:: len(captions) // num_texts][:num_texts]
        return Case("retrieval, demo, trained", model, processor, texts, images, pairs=True)

    def vqa() -> Case:
        folder = demo / "vqa-en"
        model, processor = UC2ForVQA.from_pretrained(folder), UC2Processor.from_pretrained(folder)
        asked = questions.select(range(min(len(questions), num_texts * num_images)))
        images = [store[name] for name in asked["image_id"]]
        return Case("VQA, demo, trained", model, processor, list(asked["question"]), images, pairs=False)

    return {"retrieval": retrieval, "vqa": vqa}, list(captions["caption"]) + list(questions["question"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--texts", nargs="+", help="text files, a caption a line, for the model of base size")
    source.add_argument("--demo", type=Path, help="the folder of `make demo`")
    parts = ["retrieval", "vqa", "training"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="one at a time takes less memory")
    parser.add_argument("--trained_tokens", type=int, default=16_000, help="sub-words learnt from the texts")
    parser.add_argument("--num_texts", type=int, default=4)
    parser.add_argument("--num_images", type=int, default=8)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.demo:
        cases, corpus = demo_cases(options.demo, options.num_texts, options.num_images)
    else:
        cases, corpus = base_cases(options.texts, options.trained_tokens, options.num_texts, options.num_images)
    inferred = [name for name in cases if name in options.parts]
    if inferred:
        print("| model | variant | parameters | MB | examples/s | agreement with PyTorch fp32 |")
        print("|---|---|---:|---:|---:|---|")
    for name in inferred:
        with tempfile.TemporaryDirectory() as folder:
            for row in inference_rows(cases[name](), corpus, options.rounds, Path(folder)):
                print(row, flush=True)
    if "training" in options.parts:
        print("\n| a retrieval step | trained | checkpoint MB | steps/s |")
        print("|---|---:|---:|---:|")
        with tempfile.TemporaryDirectory() as folder:
            for row in training_rows(cases["retrieval"](), corpus, options.lora_rank, options.rounds, Path(folder)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
