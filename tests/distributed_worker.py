"""run_pretraining.py as the tests launch it: it takes the ways of a GPU on a CPU, and dies when it is told to.

`TEST_FSDP=1`: accelerate shards on a CPU, too; it counts only accelerators among the devices that can, although gloo
does what FSDP2 asks for. `TEST_LOGIT_ROWS=2`: so few targets fill a chunk of the vocabulary loss, that processes have
different numbers of chunks. `TEST_HELD=<folder>`: each process leaves there how much of the model and of Adam's
moments it holds. `TEST_DIE=<process>:<step>`: this process kills itself at the start of that step.
DeepSpeed uses gloo instead of a shared-memory library that it would compile first.
"""

import importlib.util
import json
import os
import signal
from pathlib import Path

import accelerate.state
from accelerate.utils import DistributedType

import run_pretraining
from modeling_uc2 import modeling_uc2
from uc2.trainer import UC2Trainer

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and importlib.util.find_spec("deepspeed"):
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def shard_on_cpu() -> None:
    """What AcceleratorState does on a GPU."""
    plain = accelerate.state.AcceleratorState.__init__

    def with_fsdp(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = with_fsdp


def report_what_is_held(folder: str) -> None:
    plain = UC2Trainer._save_optimizer_and_scheduler

    def local(tensor):
        tensor = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def save(self, output_dir):
        plain(self, output_dir)
        held = {
            "weights": sum(local(parameter).numel() for parameter in self.model.parameters()),
            "moments": sum(local(state["exp_avg"]).numel() for state in self._adam().state.values()),
        }
        Path(folder, f"held_{self.args.process_index}.json").write_text(json.dumps(held))

    UC2Trainer._save_optimizer_and_scheduler = save


def die_at(process: str, step: str) -> None:
    plain = UC2Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.args.process_index == int(process) and self.state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    UC2Trainer.training_step = training_step


if __name__ == "__main__":
    if "TEST_FSDP" in os.environ:
        shard_on_cpu()
    if "TEST_LOGIT_ROWS" in os.environ:
        modeling_uc2.LOGIT_ROWS = int(os.environ["TEST_LOGIT_ROWS"])
    if "TEST_HELD" in os.environ:
        report_what_is_held(os.environ["TEST_HELD"])
    if "TEST_DIE" in os.environ:
        die_at(*os.environ["TEST_DIE"].split(":"))
    run_pretraining.main()
