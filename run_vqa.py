"""Visual question answering: fine-tune, evaluate, predict (UC2, Zhou et al., CVPR 2021, section 4.1.2).

    python run_vqa.py configs/vqa_paper_en.yaml                           # VQA v2: train + val + Visual Genome
    python run_vqa.py configs/vqa_paper_ja.yaml                           # VG-VQA Japanese
    python run_vqa.py configs/vqa_multilingual.yaml --train_files en.jsonl ja.jsonl
    python run_vqa.py --model runs/vqa --region_store regions --eval_files test=test.jsonl

Without `train_files` nothing is trained: a fine-tuned model answers the `eval_files`. Files (YAML or JSON)
and flags may be mixed; flags win.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from transformers.hf_argparser import HfArg

from modeling_uc2 import UC2ForVQA
from uc2.arguments import check_minimum, parse, parse_pairs
from uc2.checkpoints import checkpoint_to_resume
from uc2.collator import UC2DataCollator
from uc2.data_error import DataError, Found
from uc2.hub import open_repository
from uc2.model_card import card_names, training_table, write_model_card
from uc2.output_folder import exclusive_output
from uc2.parameter_efficient import LoraArguments, add_adapters, describe_adapters, merge_adapters
from uc2.region_store import RegionStore
from uc2.script_errors import told_in_one_sentence
from uc2.starting_point import check_max_length, load_config, load_processor
from uc2.training_arguments import UC2TrainingArguments
from uc2.visualization import training_curves
from uc2.vqa import build_answer_vocabulary, shared_answer_vocabulary
from uc2.vqa_data import VQADataset, load_questions_of
from uc2.vqa_report import card_results, format_table, write_results, write_submission
from uc2.vqa_training import VQATrainer, evaluate_dataset


@dataclass
class DataArguments:
    model_name_or_path: str = HfArg(
        aliases=["--model"],
        help="UC2 checkpoint (folder or Hub id): pre-trained, or fine-tuned for VQA; or an XLM-R one.",
    )
    region_stores: list[str] = HfArg(
        aliases=["--region_store"], help="Region stores that together hold every image."
    )
    train_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Question rows to train on, e.g. train.jsonl val.jsonl genome.jsonl."},
    )
    languages: list[str] = field(
        default_factory=list, metadata={"help": "Languages to train on. Default: all of the files."}
    )
    eval_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Question rows to answer, as path or name=path. Without answers: only predicted."},
    )
    eval_languages: list[str] = field(
        default_factory=list, metadata={"help": "Languages to answer in. Default: all there are."}
    )
    num_answers: int = field(
        default=3129,
        metadata={"help": "Answer classes per language: 3,129 for VQA v2, 3,000 for VG-VQA (A.1)."},
    )
    answer_vocabulary: str = field(
        default="own",
        metadata={
            "help": "own: one language, its most frequent answers (the paper). shared: several languages, one"
            " head over the union of each one's most frequent answers. Or a JSON file with a list of answers."
        },
    )
    max_length: int = field(default=60, metadata={"help": "Longest question in tokens, with <s> and </s>."})
    tokens_per_batch: int = field(
        default=10_240,
        metadata={
            "help": "Padded tokens and regions per micro-batch; 0: per_device_train_batch_size questions."
        },
    )


@dataclass
class VQATrainingArguments(UC2TrainingArguments):
    """Defaults from the paper's A.1 for VQA v2; VG-VQA Japanese has lr 8e-5 and 5,000 steps."""

    output_dir: str = field(default="runs/vqa", metadata={"help": "Checkpoints, model, card, results."})
    learning_rate: float = field(default=2e-5)
    warmup_steps: float = field(default=0.1, metadata={"help": "Below 1: share of all steps."})
    max_steps: int = field(default=7_000, metadata={"help": "-1: go by num_train_epochs."})
    per_device_eval_batch_size: int = field(default=64)


def main(argv: list[str] | None = None) -> dict:
    """Train, answer, report. Returns the results."""
    arguments = parse((DataArguments, LoraArguments, VQATrainingArguments), sys.argv[1:] if argv is None else argv)
    with told_in_one_sentence(), exclusive_output(arguments[-1]):
        return run(*arguments)


def run(data: DataArguments, lora: LoraArguments, args: VQATrainingArguments) -> dict:
    check_minimum(data, num_answers=1, tokens_per_batch=0)
    eval_files = parse_pairs("eval_files", named_files(data.eval_files))
    open_repository(args)
    set_seed(args.seed)
    if not data.train_files and not eval_files:
        raise DataError(
            found=Found("neither train_files nor eval_files"), expected="questions to train on or to answer"
        )
    store = RegionStore(data.region_stores)
    questions = load_questions_of(data.train_files, store, data.languages) if data.train_files else None
    eval_questions = {
        name: load_questions_of(file, store, data.eval_languages, answers="all or none")
        for name, file in eval_files.items()
    }
    processor = load_processor(data.model_name_or_path, store)
    vocabulary = None if questions is None else choose_vocabulary(questions, data)
    model = load_model(data.model_name_or_path, store, vocabulary)
    check_max_length(data.max_length, model.config)
    if questions is not None:
        model = add_adapters(model, lora, args)
    adapters = describe_adapters(model, lora)
    train_dataset = None
    if questions is not None:
        train_dataset = VQADataset(
            questions, store, processor, model.config.label2id, max_length=data.max_length
        )
        check_trainable(train_dataset, data)
    eval_datasets = {
        name: VQADataset(rows, store, processor, max_length=data.max_length)
        for name, rows in eval_questions.items()
    }
    answered = {name: dataset for name, dataset in eval_datasets.items() if dataset.questions["answers"][0]}
    if args.eval_strategy != "no" and not answered:
        raise DataError(
            field="eval_strategy", found=args.eval_strategy.value, expected="no, or eval_files with answers"
        )
    trainer = VQATrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=answered or None,
        data_collator=UC2DataCollator(pad_token_id=processor.tokenizer.pad_token_id),
        processing_class=processor,
        tokens_per_batch=data.tokens_per_batch or None,
    )
    if train_dataset is not None:
        train(trainer, args)
    predictions = {name: trainer.predict_answers(dataset) for name, dataset in eval_datasets.items()}
    results = {
        "datasets": {
            name: evaluate_dataset(predictions[name], dataset) for name, dataset in answered.items()
        },
        "answer_classes": model.config.num_labels,
    }
    if train_dataset is not None:
        results["answer_coverage"] = train_dataset.answer_coverage()
    if trainer.is_world_process_zero():
        report(trainer, results, predictions, eval_datasets, data, adapters, args)
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub(commit_message="UC2 visual question answering")
    return results


def check_trainable(dataset: VQADataset, data: DataArguments) -> None:
    """Some question has an answer among the classes, and every question fits into a batch."""
    if not dataset.answer_coverage():
        found = Found("no answer that is among the classes")
        raise DataError(file=", ".join(data.train_files), field="answers", found=found, expected="at least one")
    longest = int(dataset.lengths(range(len(dataset))).sum(axis=1).max())
    if 0 < data.tokens_per_batch < longest:
        expected = f"at least {longest}, the tokens and regions of the longest question"
        raise DataError(field="tokens_per_batch", found=data.tokens_per_batch, expected=expected)


def named_files(words: list[str]) -> list[str]:
    """`path` or `name=path` words -> `name=path`; a path alone is named after its file."""
    return [word if "=" in word else f"{Path(word).name.partition('.')[0]}={word}" for word in words]


def choose_vocabulary(questions, data: DataArguments) -> list[str]:
    """The answer classes, in order (see the option's help)."""
    answers, languages = questions["answers"], questions["language"]
    if data.answer_vocabulary == "shared":
        return shared_answer_vocabulary(answers, languages, data.num_answers)
    if data.answer_vocabulary != "own":
        return read_vocabulary(data.answer_vocabulary)
    if len(present := sorted(set(languages))) > 1:
        raise DataError(
            field="languages",
            found=Found(", ".join(present)),
            expected="one of them (answers differ between languages), or answer_vocabulary=shared",
        )
    return build_answer_vocabulary(answers, data.num_answers)


def read_vocabulary(file: str) -> list[str]:
    if not Path(file).is_file():
        raise DataError(field="answer_vocabulary", found=file, expected="own, shared or a JSON file")
    try:
        vocabulary = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(file=file, found=Found(f"no JSON ({error})"), expected="a list of answers") from error
    sound = isinstance(vocabulary, list) and vocabulary and all(isinstance(word, str) for word in vocabulary)
    if not sound or len(set(vocabulary)) < len(vocabulary):
        raise DataError(file=file, found=vocabulary, expected="a list of different answers")
    return vocabulary


def load_model(name_or_path: str, store: RegionStore, vocabulary: list[str] | None) -> UC2ForVQA:
    """A fine-tuned model as it is (no vocabulary), or one whose head is made for the vocabulary.

    The head of a model fine-tuned on the same vocabulary is kept.
    """
    config = load_config(name_or_path)
    architecture = (config.architectures or [config.model_type])[0]
    if vocabulary is None:
        if architecture != "UC2ForVQA":
            raise DataError(
                file=name_or_path,
                field="architectures",
                found=architecture,
                expected="UC2ForVQA, or train_files to fine-tune on",
            )
        return UC2ForVQA.from_pretrained(name_or_path)
    head = {
        "num_labels": len(vocabulary),
        "id2label": dict(enumerate(vocabulary)),
        "label2id": {answer: label for label, answer in enumerate(vocabulary)},
    }
    if config.model_type == "xlm-roberta":
        return UC2ForVQA.from_text_encoder(name_or_path, region_feature_size=store.feature_size, **head)
    if architecture == "UC2ForVQA" and list(config.id2label.values()) == vocabulary:
        return UC2ForVQA.from_pretrained(name_or_path)
    return UC2ForVQA.from_pretrained(name_or_path, ignore_mismatched_sizes=True, **head)


def train(trainer: VQATrainer, args: VQATrainingArguments) -> None:
    """Train from the checkpoint named, else from the last one in the output folder, else from the start."""
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    merge_adapters(trainer)
    trainer.save_model()
    trainer.save_state()


def report(
    trainer, results: dict, predictions: dict, eval_datasets: dict, data: DataArguments, adapters: dict, args
) -> None:
    """The table on the screen; predictions, results, curves and model card in the output folder."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, answers in predictions.items():
        write_submission(
            folder / f"predictions_{name}.json", eval_datasets[name].questions["question_id"], answers
        )
    write_results(folder, results)
    if results["datasets"]:
        print(format_table(results))
    if trainer.train_dataset is None:
        return
    training_curves(trainer.state.log_history, folder / "curves.png", metrics=["eval_vqa_score"])
    languages = sorted(trainer.train_dataset.questions.unique("language"))
    write_model_card(
        folder,
        "vqa",
        **card_names(args),
        config=trainer.model.config,
        languages=languages,
        data={
            "questions": data.train_files,
            "regions": data.region_stores,
            "rows": len(trainer.train_dataset),
            "images": len(set(trainer.train_dataset.image_ids)),
            "answer_classes": results["answer_classes"],
            "questions_with_an_answer_among_the_classes": f"{results['answer_coverage']:.1%}",
        },
        hyperparameters={
            "base_model": data.model_name_or_path,
            "answer_vocabulary": data.answer_vocabulary,
            **adapters,
            "tokens_per_batch": data.tokens_per_batch or None,
            "per_device_train_batch_size": None
            if data.tokens_per_batch
            else args.per_device_train_batch_size,
            **training_table(args, trainer.state.global_step),
        },
        results=card_results(results),
    )


if __name__ == "__main__":
    main()
