"""Pre-trains UC2: Early Adaptation, then MLM + ITM + MRTM + VTLM on mixed batches (paper section 3.3).

    python run_pretraining.py configs/pretrain_demo.yaml
    accelerate launch run_pretraining.py configs/pretrain_paper.yaml --output_dir runs/uc2

Files (YAML or JSON) and flags may be mixed; flags win. Every option is listed by --help.
"""

import dataclasses
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer, set_seed

from modeling_uc2 import UC2Config, UC2ForPreTraining
from processing_uc2 import UC2Processor
from uc2.arguments import parse
from uc2.atomic_files import write_json
from uc2.checkpoints import checkpoint_to_resume, saved_history
from uc2.collator import UC2DataCollator
from uc2.distributed import not_sharded, whole_model
from uc2.early_adaptation import adapt_region_encoder
from uc2.hub import open_repository
from uc2.model_card import card_names, training_table, write_model_card
from uc2.object_labels import LabelTokens, load_object_labels
from uc2.output_folder import exclusive_output
from uc2.pretraining_arguments import (
    DataArguments,
    EarlyAdaptationArguments,
    ModelArguments,
    PretrainingArguments,
    ReportArguments,
)
from uc2.pretraining_data import PretrainingDataset
from uc2.pretraining_report import card_results, chance_accuracies, evaluate_zero_shot_retrieval, report_table
from uc2.region_store import RegionStore
from uc2.rows import check_images_in_store, load_parallel_captions
from uc2.script_errors import told_in_one_sentence
from uc2.trainer import UC2Trainer
from uc2.visualization import training_curves


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Parse, build, adapt, train, evaluate, save, report. Returns the evaluation's metrics."""
    kinds = (ModelArguments, DataArguments, EarlyAdaptationArguments, ReportArguments, PretrainingArguments)
    arguments = parse(kinds, sys.argv[1:] if argv is None else argv)
    with told_in_one_sentence(), exclusive_output(arguments[-1]):
        return run(*arguments)


def run(model_args, data_args, ea_args, report_args, args: PretrainingArguments) -> dict[str, float]:
    open_repository(args)
    set_seed(args.seed)

    store = RegionStore(data_args.region_store)
    captions = {}
    for name, files in (("train", data_args.train_file), ("eval", data_args.eval_file)):
        if files:
            captions[name] = load_parallel_captions(files)
            check_images_in_store(captions[name], files, store)
    processor = build_processor(model_args, data_args, store)
    labels = LabelTokens(processor.object_labels, processor.tokenizer)
    mixes = {"train": json.loads(data_args.objective_mix)}
    mixes["eval"] = json.loads(data_args.eval_objective_mix) if data_args.eval_objective_mix else mixes["train"]
    with not_sharded():
        weights = json.loads(data_args.objective_weights)
        model = build_model(model_args, processor, store, labels, mixes["train"], weights)
    datasets = {
        name: build_dataset(rows, store, processor, labels, mixes[name], data_args, seed=args.seed + (name == "eval"))
        for name, rows in captions.items()
    }

    checkpoint = checkpoint_to_resume(args) if args.do_train else None
    history = []
    if ea_args.ea_steps and args.do_train and checkpoint is None:
        with not_sharded():
            history = run_early_adaptation(model, store, processor, labels, ea_args, args)
    elif ea_args.ea_steps and args.do_train:
        history = saved_history(early_adaptation_folder(args))
    trainer = UC2Trainer(
        model=model,
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        data_collator=UC2DataCollator(pad_token_id=processor.tokenizer.pad_token_id),
        processing_class=processor,
        tokens_per_batch=data_args.tokens_per_batch,
        eval_passes=report_args.eval_passes,
    )
    if args.do_train:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
    metrics = evaluate(trainer, captions.get("eval"), store, processor, data_args, report_args)
    if trainer.is_world_process_zero():
        report(trainer, metrics, history, model_args, data_args, ea_args, args)
    if args.push_to_hub:
        trainer.push_to_hub(commit_message="UC2 pre-training")
    return metrics


def build_processor(model_args: ModelArguments, data_args: DataArguments, store: RegionStore) -> UC2Processor:
    source = model_args.tokenizer or model_args.model_name_or_path or model_args.text_encoder
    if source is None:
        raise ValueError("Name a tokenizer, a text_encoder or a model_name_or_path: the captions need a vocabulary.")
    return UC2Processor(
        tokenizer=AutoTokenizer.from_pretrained(source),
        object_labels=load_object_labels(data_args.object_labels),
        max_regions=data_args.max_regions,
        min_regions=data_args.min_regions,
        region_threshold=data_args.region_threshold,
        feature_size=store.feature_size,
    )


def build_model(
    model_args, processor, store, labels, mix: dict[str, float], weights: dict[str, float]
) -> UC2ForPreTraining:
    """From a UC2 checkpoint, from XLM-R, or (neither given) from scratch with `config_overrides`."""
    total = sum(mix.values())
    fields = {
        "region_feature_size": store.feature_size,
        "num_region_classes": store.num_classes or labels.num_classes,
        "objectives": list(mix),
        # With per-objective means, rates and weights of n / sum keep the expected gradient of drawing one
        # objective per step, as the original does.
        "objective_weights": {name: rate / total for name, rate in mix.items()} | weights,
        **json.loads(model_args.config_overrides),
    }
    if model_args.model_name_or_path:
        model = UC2ForPreTraining.from_pretrained(model_args.model_name_or_path, **fields)
    elif model_args.text_encoder:
        model = UC2ForPreTraining.from_text_encoder(model_args.text_encoder, **fields)
    else:
        model = UC2ForPreTraining(UC2Config(vocab_size=len(processor.tokenizer), **fields))
    if len(processor.tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(processor.tokenizer)} ids but the model's vocabulary {model.config.vocab_size}."
        )
    return model


def build_dataset(rows, store, processor, labels, mix, data_args: DataArguments, seed: int) -> PretrainingDataset:
    return PretrainingDataset(
        rows,
        store,
        processor,
        labels,
        seed=seed,
        objective_mix=mix,
        languages=data_args.languages,
        pivot_language=data_args.pivot_language,
        mlm_probability=data_args.mlm_probability,
        mrtm_probability=data_args.mrtm_probability,
        co_masking=data_args.co_masking,
        itm_negative_share=data_args.itm_negative_share,
        max_text_length=data_args.max_text_length,
    )


def early_adaptation_folder(args: PretrainingArguments) -> str:
    return str(Path(args.output_dir, "early_adaptation"))


def run_early_adaptation(model, store, processor, labels, ea_args, args: PretrainingArguments) -> list[dict]:
    settings = {
        "output_dir": early_adaptation_folder(args),
        "resume_from_checkpoint": None,
        "max_steps": ea_args.ea_steps,
        "learning_rate": ea_args.ea_learning_rate,
        "per_device_train_batch_size": ea_args.ea_batch_size,
        "gradient_accumulation_steps": 1,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        # There is no evaluation that could tell a best one.
        "save_strategy": "steps" if args.save_strategy == "best" else args.save_strategy,
        "push_to_hub": False,
        "load_best_model_at_end": False,
        # The stage has a handful of small tensors: what saves memory or time elsewhere costs both here.
        "deepspeed": None,
        "fsdp": None,
        "activation_checkpointing": False,
        "torch_compile": False,
    }
    stage_args = dataclasses.replace(args, **settings)
    return adapt_region_encoder(
        model,
        store,
        processor,
        labels,
        languages=ea_args.ea_languages,
        args=stage_args,
        temperature=ea_args.ea_temperature,
    )


def evaluate(trainer, rows, store, processor, data_args, report_args: ReportArguments) -> dict[str, float]:
    """Held-out losses and accuracies, and zero-shot retrieval if asked for; every process takes part."""
    if rows is None:
        return {}
    metrics = trainer.evaluate()
    chance = chance_accuracies(trainer.eval_dataset, report_args.eval_passes)
    metrics.update({f"eval_{name}": value for name, value in chance.items()})
    if report_args.retrieval_images:
        recalls = evaluate_zero_shot_retrieval(
            whole_model(trainer),
            processor,
            rows,
            store,
            languages=data_args.languages,
            num_images=report_args.retrieval_images,
            precision=report_args.retrieval_precision,
        )
        metrics.update({f"eval_{name}": value for name, value in recalls.items()})
    return metrics


def report(trainer, metrics, ea_history, model_args, data_args, ea_args, args) -> None:
    """results.json, curves.png and the model card in the output folder, and the table on the screen."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(metrics, folder / "results.json")
    if metrics:
        print(report_table(metrics, data_args.languages))
    if not args.do_train and Path(folder, "README.md").exists():
        return  # curves and card tell of the training that was here
    training_curves(trainer.state.log_history, Path(folder, "curves.png"), early_adaptation=ea_history)
    weights = trainer.model.config.objective_weights
    write_model_card(
        folder,
        "pretraining",
        **card_names(args),
        config=trainer.model.config,
        languages=data_args.languages,
        data={"captions": data_args.train_file, "regions": data_args.region_store, "rows": len(trainer.train_dataset)},
        hyperparameters={
            "base_model": model_args.model_name_or_path or model_args.text_encoder,
            "objective_mix": json.loads(data_args.objective_mix),
            "objective_weights": {name: round(weight, 3) for name, weight in weights.items()},
            "early_adaptation_steps": ea_args.ea_steps,
            "tokens_per_batch": data_args.tokens_per_batch,
            "per_device_train_batch_size": None if data_args.tokens_per_batch else args.per_device_train_batch_size,
            **training_table(args, trainer.state.global_step),
        },
        results=card_results(metrics, data_args.languages),
    )


if __name__ == "__main__":
    main()
