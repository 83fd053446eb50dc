"""Run hubdiff's command lines in ranks that share a model's weights by torch's FSDP, on the CPU.

    torchrun --nproc-per-node 2 tests/fsdp_on_cpu.py '[["finetune", …], …]'

accelerate gives FSDP to GPUs only. Here it takes these processes for such as have one; all the
rest, sharding, gathering and gloo between the ranks, is as it is. Fails unless they share the
weights.
"""

import json
import os
import sys
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from hubdiff.cli import run
from hubdiff.lab.training import Trainer

os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
_begin, _check = AcceleratorState.__init__, Trainer.require_numbers


def begin(self: Any, *args: Any, **more: Any) -> None:
    PartialState(cpu=True)
    shared = PartialState._shared_state
    if shared["distributed_type"] == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_XPU
    _begin(self, *args, **more)


def check(self: Trainer) -> None:
    _check(self)
    assert self.model is not None
    if not all(isinstance(weight, DTensor) for weight in self.model.parameters()):
        raise AssertionError("the weights are not shared")


with (
    patch.object(AcceleratorState, "__init__", begin),
    patch.object(Trainer, "require_numbers", check),
):
    code = max(run(line) for line in json.loads(sys.argv[1]))
sys.exit(code)
