"""Fine-tuning a small share of the parameters: low-rank adapters (LoRA, Hu et al., 2022) through PEFT.

The base model stays as it is; low-rank additions to the chosen linear layers train, and the task head in full.
Checkpoints hold only what trains. At the end the additions are added into the weights, so that the output folder
is an ordinary UC2 model, and the adapter alone is kept in its sub-folder `adapter/`:

    base = UC2ForRetrieval.from_pretrained("runs/uc2")
    model = PeftModel.from_pretrained(base, "runs/retrieval/adapter")
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_peft_available, logging

from modeling_uc2 import UC2ForRetrieval, UC2ForVQA
from uc2.data_error import DataError, Found

logger = logging.get_logger(__name__)

ADAPTER_FOLDER = "adapter"
# Trained and saved in full: a head starts at random, and an addition of low rank to noise is still noise.
HEADS = {UC2ForRetrieval: "score_head", UC2ForVQA: "classifier"}


@dataclass
class LoraArguments:
    lora_rank: int = field(
        default=0, metadata={"help": "Rank of the adapters; 0 trains every parameter. Typical: 8 to 64."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapters' output is scaled by alpha / rank. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["query", "value"],
        metadata={
            "help": "Linear layers to adapt, by the end of their names: query key value dense; or all-linear."
        },
    )


def add_adapters(model: PreTrainedModel, lora: LoraArguments, args: TrainingArguments):
    """The model with trainable adapters, as a `PeftModel`; the model itself for rank 0.

    Raises:
        DataError: an option out of range or a module the model does not have; a base model that is in no folder
            and on no Hub (its frozen random parts could not be restored); PEFT is not installed; parameters are
            sharded over processes.
    """
    if lora.lora_rank == 0:
        return model
    _check(model, lora, args)
    from peft import LoraConfig, get_peft_model

    head = HEADS[type(model)]
    names = lora.lora_target_modules
    config = LoraConfig(
        r=lora.lora_rank,
        lora_alpha=2 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        modules_to_save=[head],
        exclude_modules=rf"{head}(\..*)?",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise DataError(
            field="lora_target_modules",
            found=Found(" ".join(names)),
            expected=f"the ends of names of linear layers, such as {', '.join(_linear_names(model))}",
        ) from error
    if args.push_to_hub:
        # A checkpoint's adapter in the root of a repository would be loaded on top of the merged weights.
        args.hub_strategy = HubStrategy.END
    logger.warning(f"LoRA trains {_trained_share(adapted)}.")
    return adapted


def describe_adapters(model, lora: LoraArguments) -> dict:
    """What a model card says of a model's adapters; nothing for one without."""
    if isinstance(model, PreTrainedModel):
        return {}
    (config,) = model.peft_config.values()
    return {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": " ".join(lora.lora_target_modules),
        "trained": _trained_share(model),
    }


def _trained_share(model) -> str:
    trained, total = model.get_nb_trainable_parameters()
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%})"


def _check(model, lora: LoraArguments, args: TrainingArguments) -> None:
    if not is_peft_available():
        raise DataError(field="lora_rank", found=lora.lora_rank, expected="0, or the package peft: pip install peft")
    sound = {
        "lora_rank": (lora.lora_rank > 0, "at least 0"),
        "lora_alpha": (lora.lora_alpha is None or lora.lora_alpha > 0, "a number above 0"),
        "lora_dropout": (0 <= lora.lora_dropout < 1, "a share in [0, 1)"),
        "lora_target_modules": (lora.lora_target_modules, "at least one layer"),
    }
    for name, (is_sound, expected) in sound.items():
        if not is_sound:
            raise DataError(field=name, found=getattr(lora, name), expected=expected)
    if not model.config.name_or_path:
        raise DataError(
            field="lora_rank",
            found=Found("a base model whose region encoder is freshly initialised"),
            expected="a pre-trained UC2: what an adapter does not train must be saved somewhere",
        )
    if args.fsdp or is_deepspeed_zero3_enabled():
        raise DataError(
            field="lora_rank",
            found=Found("parameters sharded over processes (FSDP or ZeRO-3)"),
            expected="one process, DDP or ZeRO-2: adapters are merged into whole weights",
        )


def _linear_names(model: nn.Module) -> list[str]:
    """The last part of every linear layer's name, without the numbers of a `Sequential`."""
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted({name for name in names if not re.fullmatch(r"\d+", name)})


def merge_adapters(trainer: Trainer) -> None:
    """Saves the adapter beside the output and puts the model with merged weights in its place in the trainer.

    Nothing happens to a model without adapters.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PreTrainedModel):
        return
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir, ADAPTER_FOLDER)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()  # PEFT's form to fill in; the output folder has its own card
    trainer.model = trainer.model_wrapped = model.merge_and_unload(safe_merge=True)

