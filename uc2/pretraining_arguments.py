"""Options of run_pretraining.py; the defaults are the paper's."""

import json
from dataclasses import dataclass, field

from modeling_uc2.configuration_uc2 import OBJECTIVES

from .pretraining_data import PAPER_MIX
from .rows import LANGUAGES
from .training_arguments import UC2TrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A UC2 checkpoint (folder or Hub id) to go on from."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "An XLM-R checkpoint to start from, e.g. xlm-roberta-base."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer folder or Hub id; that of the checkpoint if left out."}
    )
    config_overrides: str = field(
        default="{}", metadata={"help": "JSON of UC2Config fields; with no checkpoint at all, the model's sizes."}
    )


@dataclass
class DataArguments:
    train_file: list[str] = field(metadata={"help": "Parallel captions for training."})
    region_store: list[str] = field(metadata={"help": "Region stores holding every image of all caption files."})
    object_labels: str = field(metadata={"help": "object_labels.json, or a folder of img_label_objects*.txt."})
    eval_file: list[str] = field(default_factory=list, metadata={"help": "Parallel captions held out."})
    languages: list[str] = field(default_factory=lambda: list(LANGUAGES), metadata={"help": "Caption languages."})
    pivot_language: str = field(default="en", metadata={"help": "Language the others are aligned with."})
    objective_mix: str = field(
        default=json.dumps(PAPER_MIX),
        metadata={"help": f"JSON: how often each objective is drawn. Out of {', '.join(OBJECTIVES)}."},
    )
    objective_weights: str = field(
        default="{}",
        metadata={"help": "JSON: factor of an objective's mean loss; its share of the mix if not named."},
    )
    eval_objective_mix: str | None = field(
        default=None,
        metadata={"help": "JSON: the mix of the held-out examples, e.g. to test objectives that were left out."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens masked by MLM, VTLM and TLM."})
    mrtm_probability: float = field(default=0.15, metadata={"help": "Share of regions masked by MRTM, MRC, MRFR."})
    co_masking: str = field(
        default="mix", metadata={"help": "VTLM: random | full | mix.", "choices": ["random", "full", "mix"]}
    )
    itm_negative_share: float = field(default=0.5, metadata={"help": "Share of ITM pairs that do not match."})
    max_text_length: int = field(default=60, metadata={"help": "Longest caption in tokens, with <s> and </s>."})
    max_regions: int = field(default=100, metadata={"help": "Most regions of an image."})
    min_regions: int = field(default=10, metadata={"help": "Fewest regions, whatever their confidence."})
    region_threshold: float = field(default=0.2, metadata={"help": "Confidence from which a region is kept."})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Padded tokens + regions of a micro-batch, instead of per_device_train_batch_size."},
    )


@dataclass
class EarlyAdaptationArguments:
    ea_steps: int = field(default=0, metadata={"help": "Early Adaptation updates; 0 leaves the stage out."})
    ea_batch_size: int = field(default=64, metadata={"help": "Images of a process in an Early Adaptation update."})
    ea_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of Early Adaptation."})
    ea_temperature: float = field(default=1.0, metadata={"help": "Divides the cosine similarities."})
    ea_languages: list[str] = field(
        default_factory=lambda: ["en"], metadata={"help": "Languages of the labels to adapt to."}
    )


@dataclass
class ReportArguments:
    eval_passes: int = field(
        default=1, metadata={"help": "Draws of objective, language and masks per held-out row."}
    )
    retrieval_images: int = field(
        default=0, metadata={"help": "Held-out images for zero-shot retrieval with the ITM head; 0: none."}
    )
    retrieval_precision: str = field(default="fp32", metadata={"help": "fp32 | bf16 | int8 scoring."})


@dataclass
class PretrainingArguments(UC2TrainingArguments):
    output_dir: str = field(default="runs/uc2", metadata={"help": "Checkpoints, model, card, curves."})
    # The Trainer would hide a NaN; UC2Trainer stops at it instead.
    logging_nan_inf_filter: bool = field(default=False)
    # Paper A.1.
    adam_beta2: float = field(default=0.98)
    warmup_steps: float = field(default=0.05, metadata={"help": "Below 1: share of all steps."})
    report_to: str | None = field(default="tensorboard")
    # Every head takes part in every step, so that no parameter is ever without a gradient.
    ddp_find_unused_parameters: bool | None = field(default=False)

    def __post_init__(self):
        if self.resume_from_checkpoint and not self.do_train:
            raise ValueError("resume_from_checkpoint goes on training; to evaluate, use model_name_or_path")
        super().__post_init__()
