"""Image-text retrieval in any language: fine-tune, evaluate, search (UC2, CVPR 2021, section 4.1.1).

    python run_retrieval.py configs/retrieval_flickr30k.yaml --train_languages en            # English-only
    python run_retrieval.py configs/retrieval_flickr30k.yaml --train_languages en de fr cs   # all-language
    python run_retrieval.py --model_name_or_path runs/uc2 --region_stores regions --eval_files m30k=test.jsonl
    python run_retrieval.py --model runs/retrieval --region_store regions --search "ein Hund am Strand"
    python run_retrieval.py --model runs/retrieval --region_store regions --search_image 42 --eval_files m=test.jsonl

Without `train_files` nothing is trained: the third line evaluates a pre-trained checkpoint zero-shot, with
its image-text matching head. Files (YAML or JSON) and flags may be mixed; flags win.
"""

import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import TrainerState, set_seed
from transformers.hf_argparser import HfArg

from modeling_uc2 import UC2ForPreTraining, UC2ForRetrieval
from uc2.arguments import check_minimum, parse, parse_pairs
from uc2.checkpoints import checkpoint_to_resume
from uc2.collator import UC2DataCollator
from uc2.data_error import DataError, Found
from uc2.distributed import not_sharded, whole_model
from uc2.hard_negatives import HardNegativesCallback
from uc2.hub import open_repository
from uc2.model_card import card_names, training_table, write_model_card
from uc2.output_folder import exclusive_output
from uc2.parameter_efficient import LoraArguments, add_adapters, describe_adapters, merge_adapters
from uc2.region_store import RegionStore
from uc2.retrieval_data import RetrievalCollator, RetrievalDataset, load_captions_of, load_test_sets
from uc2.retrieval_report import (
    card_results,
    evaluate_retrieval,
    flat_metrics,
    format_table,
    write_results,
)
from uc2.retrieval_search import SearchArguments, search_and_show
from uc2.retrieval_training import RetrievalTrainer
from uc2.scoring import PRECISIONS
from uc2.script_errors import told_in_one_sentence
from uc2.starting_point import check_max_length, load_config, load_processor
from uc2.training_arguments import UC2TrainingArguments
from uc2.visualization import training_curves


@dataclass
class DataArguments:
    model_name_or_path: str = HfArg(
        aliases=["--model"],
        help="UC2 checkpoint (folder or Hub id): pre-trained, or fine-tuned for retrieval; or an XLM-R one.",
    )
    region_stores: list[str] = HfArg(
        aliases=["--region_store"], help="Region stores that together hold every image."
    )
    train_files: list[str] = field(default_factory=list, metadata={"help": "Caption rows to train on."})
    train_languages: list[str] = field(
        default_factory=list, metadata={"help": "Languages to train on: en; de; en de fr cs. Default: all."}
    )
    eval_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Test sets as name=path, e.g. flickr30k=test.jsonl coco=c.jsonl."},
    )
    eval_languages: list[str] = field(
        default_factory=list,
        metadata={"help": "Languages to evaluate, in this order. Default: all there are."},
    )
    eval_folds: list[str] = field(
        default_factory=list, metadata={"help": "Folds as name=number; coco=5 is COCO 1K of 5,000 images."}
    )
    max_length: int = field(default=60, metadata={"help": "Longest text in tokens, with <s> and </s>."})


@dataclass
class LossArguments:
    loss: str = field(
        default="triplet",
        metadata={"help": "Triplet loss on sigmoid scores, or cross-entropy.", "choices": ["triplet", "bce"]},
    )
    margin: float = field(default=0.2, metadata={"help": "Margin of the triplet loss (paper A.1)."})
    num_negative_images: int = field(default=1, metadata={"help": "Wrong images per caption."})
    num_negative_captions: int = field(default=1, metadata={"help": "Wrong captions per image."})
    hard_negatives: bool = field(default=False, metadata={"help": "Mine the highest-scoring wrong pairs."})
    hard_negative_steps: int = field(default=1000, metadata={"help": "Steps between two minings."})
    hard_negative_pool: int = field(
        default=400, metadata={"help": "Captions that are mined among at a time."}
    )


@dataclass
class ScoringArguments:
    precision: str = field(
        default="fp32",
        metadata={"help": "fp32 (exact), bf16 (GPU, CPU with AMX), int8 (CPU).", "choices": list(PRECISIONS)},
    )
    batch_tokens: int = field(default=2500, metadata={"help": "Tokens and regions scored at a time."})
    save_scores: bool = field(default=False, metadata={"help": "Keep score matrices as scores/*.npy."})


@dataclass
class RetrievalTrainingArguments(UC2TrainingArguments):
    """Defaults from the paper's A.1; it trains 30,000 steps on Flickr30K captions and 50,000 on COCO's."""

    output_dir: str = field(default="runs/retrieval", metadata={"help": "Checkpoints, model, card, results."})
    per_device_train_batch_size: int = field(
        default=40, metadata={"help": "True pairs per batch and process."}
    )
    learning_rate: float = field(default=1e-4)
    warmup_steps: float = field(default=0.1, metadata={"help": "Below 1: share of all steps."})
    max_steps: int = field(default=30_000, metadata={"help": "-1: go by num_train_epochs."})
    logging_steps: float = field(default=50)


def main(argv: list[str] | None = None) -> dict:
    """Train, evaluate and report, or search. Returns the results (or the hits)."""
    kinds = (
        DataArguments,
        LossArguments,
        LoraArguments,
        ScoringArguments,
        SearchArguments,
        RetrievalTrainingArguments,
    )
    arguments = parse(kinds, sys.argv[1:] if argv is None else argv)
    *_, find, args = arguments
    searches = find.search is not None or find.search_image is not None
    with told_in_one_sentence(), nullcontext() if searches else exclusive_output(args):
        return run(*arguments)


def run(
    data: DataArguments,
    loss: LossArguments,
    lora: LoraArguments,
    scoring: ScoringArguments,
    find: SearchArguments,
    args,
) -> dict:
    check_options(data, loss, scoring, args)
    eval_files = parse_pairs("eval_files", data.eval_files)
    eval_folds = parse_folds(data.eval_folds)
    open_repository(args)
    set_seed(args.seed)
    store = RegionStore(data.region_stores)
    scoring_options = {
        "precision": scoring.precision,
        "batch_tokens": scoring.batch_tokens,
        "max_length": data.max_length,
    }
    if find.search is not None or find.search_image is not None:
        processor = load_processor(data.model_name_or_path, store)
        model = load_model(data.model_name_or_path, store, fine_tune=False).to(args.device)
        captions = [text for test_set in load_test_sets(eval_files, store, data.eval_languages)
                    for text in test_set.texts]  # fmt: skip
        return search_and_show(find, model, processor, store, captions, args.output_dir, **scoring_options)
    if not data.train_files and not eval_files:
        raise DataError(
            found=Found("neither train_files nor eval_files"), expected="something to train or evaluate"
        )

    captions = load_captions_of(data.train_files, store, data.train_languages) if data.train_files else None
    test_sets = load_test_sets(eval_files, store, data.eval_languages, eval_folds)
    processor = load_processor(data.model_name_or_path, store)
    model = load_model(data.model_name_or_path, store, fine_tune=captions is not None, margin=loss.margin)
    check_max_length(data.max_length, model.config)
    if captions is not None:
        model = add_adapters(model, lora, args)
    adapters = describe_adapters(model, lora)
    evaluate = partial(
        evaluate_retrieval, processor=processor, store=store, test_sets=test_sets, **scoring_options
    )
    trainer = build_trainer(
        model, processor, captions, store, test_sets, data, loss, evaluate, scoring_options, args
    )
    if captions is not None:
        train(trainer, args)
    results = {}
    if test_sets:
        results = evaluate(
            whole_model(trainer),
            resume_dir=Path(args.output_dir, "scoring"),
            save_dir=Path(args.output_dir, "scores") if scoring.save_scores else None,
            progress=True,
        )
    if trainer.is_world_process_zero():
        report(trainer, results, data, loss, adapters, scoring, args)
    trainer.accelerator.wait_for_everyone()
    if args.push_to_hub:
        trainer.push_to_hub(commit_message="UC2 retrieval")
    return results


def check_options(data, loss, scoring, args) -> None:
    """What could only fail late, after hours of training, is refused here."""
    check_minimum(
        loss, margin=0, num_negative_images=0, num_negative_captions=0, hard_negative_steps=1, hard_negative_pool=2
    )
    if loss.num_negative_images + loss.num_negative_captions == 0:
        expected = "at least 1 of num_negative_images and num_negative_captions"
        raise DataError(field="num_negative_images", found=0, expected=expected)
    check_minimum(scoring, batch_tokens=1)
    if scoring.precision == "int8" and args.device.type != "cpu":
        raise DataError(field="precision", found="int8", expected=f"fp32 or bf16 on {args.device.type}")
    if args.eval_strategy != "no" and not data.eval_files:
        raise DataError(field="eval_strategy", found=args.eval_strategy.value, expected="no, or eval_files")


def parse_folds(words: list[str]) -> dict[str, int]:
    folds = parse_pairs("eval_folds", words)
    for name, number in folds.items():
        if not number.isdecimal():
            raise DataError(field="eval_folds", found=f"{name}={number}", expected="name=number")
    return {name: int(number) for name, number in folds.items()}


@not_sharded()
def load_model(name_or_path: str, store: RegionStore, *, fine_tune: bool, margin: float = 0.2):
    """The network that scores pairs.

    A retrieval checkpoint as it is; a pre-training checkpoint with its matching head, whose "match" row
    becomes the score head for fine-tuning; an XLM-R checkpoint only to fine-tune, with random visual parts.
    """
    config = load_config(name_or_path)
    architecture = (config.architectures or [config.model_type])[0]
    if config.model_type == "xlm-roberta" and fine_tune:
        model = UC2ForRetrieval.from_text_encoder(name_or_path, region_feature_size=store.feature_size)
    elif architecture == "UC2ForRetrieval":
        model = UC2ForRetrieval.from_pretrained(name_or_path)
    elif architecture == "UC2ForPreTraining":
        model_class = UC2ForRetrieval.from_pretraining if fine_tune else UC2ForPreTraining.from_pretrained
        model = model_class(name_or_path)
    else:
        expected = "UC2ForRetrieval or UC2ForPreTraining (or an XLM-R checkpoint to fine-tune)"
        raise DataError(file=name_or_path, field="architectures", found=architecture, expected=expected)
    model.config.retrieval_margin = margin
    return model


def build_trainer(
    model, processor, captions, store, test_sets, data, loss, evaluate, scoring_options, args
) -> RetrievalTrainer:
    dataset, collator, callbacks = None, None, []
    if captions is not None:
        dataset = RetrievalDataset(
            captions,
            store,
            processor,
            num_negative_images=loss.num_negative_images,
            num_negative_captions=loss.num_negative_captions,
            seed=args.seed,
            max_length=data.max_length,
        )
        pad = UC2DataCollator(pad_token_id=processor.tokenizer.pad_token_id)
        collator = RetrievalCollator(pad, dataset.group_size, loss.loss)
        if loss.hard_negatives:
            callbacks = [
                HardNegativesCallback(
                    dataset,
                    every=loss.hard_negative_steps,
                    pool_size=loss.hard_negative_pool,
                    seed=args.seed,
                    **scoring_options,
                )
            ]
    return RetrievalTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=test_sets or None,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        evaluate_recall=lambda network: flat_metrics(evaluate(network)),
    )


def train(trainer: RetrievalTrainer, args) -> None:
    """Train from the checkpoint named, else from the last one in the output folder, else from the start."""
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is not None:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, HardNegativesCallback):
                callback.load(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint is None or trainer.state.global_step > step_of(checkpoint):
        # The weights are new: scores of an earlier run in this folder are not theirs.
        if trainer.is_world_process_zero():
            shutil.rmtree(Path(args.output_dir, "scoring"), ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    merge_adapters(trainer)
    trainer.save_model()
    trainer.save_state()


def step_of(checkpoint: str) -> int:
    return TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).global_step


def report(trainer, results: dict, data, loss, adapters: dict, scoring, args) -> None:
    """The table on the screen; results, curves and model card in the output folder."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if results:
        write_results(folder, results)
        shutil.rmtree(folder / "scoring")  # complete; no longer needed to resume
        print(format_table(results))
    if trainer.train_dataset is None:
        return
    training_curves(trainer.state.log_history, folder / "curves.png", metrics=["eval_meta_average"])
    write_model_card(
        folder,
        "retrieval",
        **card_names(args),
        config=trainer.model.config,
        languages=trainer.train_dataset.languages,
        data={
            "captions": data.train_files,
            "regions": data.region_stores,
            "rows": len(trainer.train_dataset),
            "images": len(trainer.train_dataset.image_ids),
        },
        hyperparameters={
            "base_model": data.model_name_or_path,
            "loss": loss.loss,
            "margin": loss.margin,
            "negative_images": loss.num_negative_images,
            "negative_captions": loss.num_negative_captions,
            "hard_negatives": loss.hard_negatives,
            **adapters,
            "pairs_per_batch": args.per_device_train_batch_size,
            **training_table(args, trainer.state.global_step),
            "scoring_precision": scoring.precision,
        },
        results=card_results(results),
    )


if __name__ == "__main__":
    main()
