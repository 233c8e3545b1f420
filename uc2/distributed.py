"""Sharded training (FSDP2, DeepSpeed ZeRO) seen from outside: what happens before it, beside it and after it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedModel, Trainer
from transformers.integrations import deepspeed as hf_deepspeed

# Set by `accelerate launch`; every Trainer of the process then shards.
_STRATEGIES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


@contextmanager
def not_sharded() -> Iterator[None]:
    """Models built inside have whole weights on every process, and Trainers made inside use plain data parallelism.

    ZeRO-3 would otherwise cut the weights while they are still being copied from a text encoder, and it would cut
    those of Early Adaptation, which are few. Sharding starts when the next Trainer does; a base model is 1.1 GB.
    """
    chosen = {name: os.environ.pop(name) for name in _STRATEGIES if name in os.environ}
    zero3 = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        os.environ.update(chosen)
        hf_deepspeed._hf_deepspeed_config_weak_ref = zero3
        # The first Trainer of a process settles the strategy for all that follow, unless it is forgotten.
        AcceleratorState._reset_state()


def keep_sums_exact(trainer: Trainer) -> None:
    """Under FSDP2 in half precision, adds gradients up in float32 and leaves the losses in it.

    accelerate would round both: the losses of a long run then move in steps of half a per cent.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy) and policy.param_dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


def is_zero3(model: nn.Module) -> bool:
    return hasattr(next(model.parameters()), "ds_id")


def whole_model(trainer: Trainer) -> PreTrainedModel:
    """The trained model with all its weights on this process, for a use in which processes go separate ways.

    It is the model itself where the strategy leaves it whole (DDP, ZeRO-1 and 2), else a copy. Every process has to
    call it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, FSDPModule):
        kind = type(model).__bases__[1]  # FSDP2 makes a class (FSDPModule, UC2…)
        return _copy(kind, model, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    if is_zero3(model):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return _copy(type(model), model, model.state_dict())
    return model


def _copy(kind: type[PreTrainedModel], model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    copy = kind(model.config)
    copy.load_state_dict(weights)
    return copy.to(device=model.device, dtype=model.dtype).train(model.training)
