"""Checkpoints that go on under any strategy and any number of processes.

DDP, FSDP2 and DeepSpeed each save an optimizer in a form of their own, DeepSpeed's even for one number of processes
only. Adam's state is two tensors per parameter, so it is saved whole and by name, beside the whole weights.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from .checkpoints import ResumableTrainer
from .data_error import DataError, Found

FILE = "adam.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
# float32 weights of parameters that are in half precision otherwise
MASTER = "master"


class PortableTrainer(ResumableTrainer):
    """A Trainer with Adam whose checkpoints are portable. Models must start whole (`not_sharded`)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.load_best_model_at_end and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "load_best_model_at_end works with plain data parallelism only; under FSDP or DeepSpeed evaluate"
                " the best checkpoint afterwards, with --model_name_or_path"
            )

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            if not Path(resume_from_checkpoint, FILE).is_file():
                expected = f"{FILE}, as in every checkpoint of this script; --model_name_or_path takes weights alone"
                raise DataError(file=resume_from_checkpoint, found=Found("none"), expected=expected)
            self._load_whole_weights(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_whole_weights(self, checkpoint: str) -> None:
        missing, unexpected = self.model.load_state_dict(_whole_weights(checkpoint), strict=False)
        missing = set(missing) - set(self.model.all_tied_weights_keys)
        if missing or unexpected:
            found = Found(f"missing {sorted(missing)}, unexpected {unexpected}")
            raise DataError(file=Path(checkpoint, SAFE_WEIGHTS_NAME), found=found, expected="this run's model")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            # Put together from pieces, a tied tensor is there twice, and its two copies would both be saved.
            twice = {target for target, source in self.model.all_tied_weights_keys.items() if source in state_dict}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in twice}
        super()._save(output_dir, state_dict)

    # The Trainer would look for the strategy's own files here.
    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        tensors = {}
        if self.is_deepspeed_enabled:
            _link_zero_states(self.model_wrapped.optimizer)
        for name, parameter in self._trained_parameters():
            for kind in (MASTER, *MOMENTS):
                # Every process takes part in putting a tensor together.
                whole = self._read(parameter, kind)
                if whole is not None and self.args.should_save:
                    tensors[f"{kind}/{name}"] = whole.detach().cpu().contiguous()
        if self.args.should_save:
            step = max((int(state["step"]) for state in self._adam().state.values() if "step" in state), default=0)
            save_file(tensors, Path(output_dir, FILE), metadata={"step": str(step)})
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
        for group, rate in zip(self._adam().param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        with safe_open(Path(checkpoint, FILE), framework="pt") as file:
            step, names = int(file.metadata()["step"]), set(file.keys())
            if self.is_deepspeed_enabled:
                self._make_zero_states(step)
                weights = _whole_weights(checkpoint)
            for name, parameter in self._trained_parameters():
                if f"{MOMENTS[0]}/{name}" not in names:
                    continue  # no update was made yet
                moments = {kind: file.get_tensor(f"{kind}/{name}") for kind in MOMENTS}
                if self.is_deepspeed_enabled:
                    _write_zero(parameter, {None: weights[name].float(), **moments})
                else:
                    _write_adam(self._adam(), parameter, step, moments)

    def _trained_parameters(self):
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def _adam(self) -> torch.optim.Optimizer:
        adam = self.optimizer
        while not isinstance(adam, torch.optim.Adam):  # AdamW is one
            if not hasattr(adam, "optimizer"):
                raise ValueError(f"checkpoints are made for Adam and AdamW, not for {type(adam).__name__}")
            adam = adam.optimizer
        return adam

    def _read(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor | None:
        """A whole tensor; None where there is no such one."""
        if self.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            if kind == MASTER:
                return None if parameter.dtype == torch.float32 else safe_get_full_fp32_param(parameter)
            return safe_get_full_optimizer_state(parameter, kind)
        tensor = self._adam().state.get(parameter, {}).get(kind)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _make_zero_states(self, step: int) -> None:
        """DeepSpeed's pieces of Adam's state, which otherwise come into being with the first update."""
        zero = self.model_wrapped.optimizer
        stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        pieces = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
        for piece in pieces:
            moments = {kind: torch.zeros_like(piece, requires_grad=False) for kind in MOMENTS}
            device = piece.device if zero.optimizer.defaults.get("fused") else "cpu"
            zero.optimizer.state[piece] = {"step": torch.tensor(float(step), device=device), **moments}
        _link_zero_states(zero)


def _link_zero_states(zero) -> None:
    """Lets ZeRO-1 and 2 find the moments of each parameter. DeepSpeed does so after the first group of parameters has
    been updated, and misses those of the second."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _whole_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """A checkpoint's weights by name, in float32 where it has them so."""
    weights = load_file(Path(checkpoint, SAFE_WEIGHTS_NAME))
    with safe_open(Path(checkpoint, FILE), framework="pt") as file:
        for key in file.keys():
            kind, name = key.split("/", 1)
            if kind == MASTER:
                weights[name] = file.get_tensor(key)
    return weights


def _write_adam(adam, parameter, step: int, moments: dict[str, torch.Tensor]) -> None:
    group = next(group for group in adam.param_groups if any(one is parameter for one in group["params"]))
    on_device = group["fused"] or group["capturable"]
    moments = {kind: tensor.to(parameter.device) for kind, tensor in moments.items()}
    if isinstance(parameter, DTensor):
        moments = {
            kind: distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
            for kind, tensor in moments.items()
        }
    adam.state[parameter] = {
        "step": torch.tensor(float(step), device=parameter.device if on_device else "cpu"),
        **moments,
    }


def _write_zero(parameter, values: dict[str | None, torch.Tensor]) -> None:
    """Moments by their name, and under None the float32 weight, into the pieces that DeepSpeed holds."""
    from deepspeed import utils

    sharded = hasattr(parameter, "ds_id")  # ZeRO-3
    for kind, value in values.items():
        if kind is None and parameter.dtype == torch.float32:
            continue  # the weight itself
        value = value.to(parameter.device)
        if sharded:
            # DeepSpeed's own way of cutting fails where the number of processes does not divide the size.
            value = _piece(value, dist.get_rank(), dist.get_world_size())
        scope = "local" if sharded else "full"
        if kind is None:
            getattr(utils, f"safe_set_{scope}_fp32_param")(parameter, value)
        else:
            getattr(utils, f"safe_set_{scope}_optimizer_state")(parameter, value, kind)


def _piece(whole: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """One of `count` equal pieces of a tensor's values, the last one padded with zeros."""
    size = -(-whole.numel() // count)
    padded = torch.nn.functional.pad(whole.flatten(), (0, size * count - whole.numel()))
    return padded[index * size : (index + 1) * size]
