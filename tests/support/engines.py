"""Processes on the CPU that accelerate takes for GPUs: it offers FSDP and DeepSpeed to those only.

accelerate reads the kind of processes in one place, transformers and gold_trainer ask for bfloat16
in others. With gloo between them, sharding, gathering and casting are what they are on a GPU.
"""

import os
from typing import Any

import accelerate.state
import torch
import transformers.training_args
from accelerate.utils import DistributedType

from gold_trainer import precision


def fsdp(version: int, state_dict: str = "FULL_STATE_DICT") -> dict[str, Any]:
    config = {
        "version": version,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True if version == 2 else "FULL_SHARD",
        "state_dict_type": state_dict,
        "use_orig_params": True,
    }
    return {"fsdp": True, "fsdp_config": config}


def zero(stage: int) -> dict[str, Any]:
    return {
        "deepspeed": {
            "zero_optimization": {
                "stage": stage,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
        }
    }


ENGINES: dict[str, dict[str, Any]] = {  # fields of TrainingArguments
    "ddp": {},
    "launched": {},  # accelerate launch says which one
    "fsdp1": fsdp(1),
    "fsdp2": fsdp(2),
    "fsdp2_sharded": fsdp(2, "SHARDED_STATE_DICT"),
    "zero2": zero(2),
    "zero3": zero(3),
}


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def needs_gpus(engine: str) -> bool:
    """DDP takes processes of the CPU for what they are."""
    return engine != "ddp" and num_processes() > 1


def take_processes_for_gpus() -> None:
    """Called before anything of accelerate is made. Where there are GPUs they are taken."""
    if torch.cuda.is_available():
        return
    for asks in (transformers.training_args, precision):
        asks.is_torch_bf16_gpu_available = lambda: True
    os.environ["ACCELERATE_TORCH_DEVICE"] = os.environ["DS_ACCELERATOR"] = "cpu"
    kind = ("gloo", DistributedType.MULTI_GPU)
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: kind


def leave_shared_memory_alone() -> None:
    """DeepSpeed compiles C++ for processes of one machine: two minutes, and a compiler."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
