"""Precision and checkpointing of a run that sets neither: as TRL has them."""

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

if TYPE_CHECKING:
    from gold_trainer.config import GOLDConfig

logger = logging.getLogger(__name__)

NAMES = ("gradient_checkpointing", "activation_checkpointing")  # newer transformers have both

ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # of a launcher


def is_checkpointing_open(args: Any) -> bool:
    """Whether nothing says if activations are kept."""
    return all(getattr(args, name, None) is None for name in NAMES)


def choose_precision(args: "GOLDConfig") -> None:
    """bfloat16 where the device has it, unless fp16 or a launcher's precision is asked for."""
    if args.bf16 is None:
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        is_open = not args.fp16 and launcher == "no"
        args.bf16 = is_open and not args.use_cpu and is_torch_bf16_gpu_available()
    has_it = is_torch_bf16_gpu_available() or is_torch_xla_available()  # as transformers asks
    if args.bf16 and not args.use_cpu and not has_it:
        raise ValueError(
            "GOLDConfig: bf16 needs a GPU that has bfloat16, got True and none; leave bf16 out (on "
            "the command line --bf16 false wins over a file), or set use_cpu=True, which computes "
            "in bfloat16 on the CPU."
        )


def choose_checkpointing(args: "GOLDConfig") -> None:
    """On, unless FSDP has its own: both would compute activations a third time."""
    config: Any = args.fsdp_config or {}
    own = config.get("activation_checkpointing") or os.environ.get(
        "FSDP_ACTIVATION_CHECKPOINTING", ""
    )
    _set_checkpointing(args, str(own).lower() not in ("1", "true"))


def fit_to_model(args: "GOLDConfig", student: nn.Module) -> None:
    """A model that cannot compute activations again trains without, unless it was asked for."""
    can = getattr(student, "supports_gradient_checkpointing", False)
    if args.is_checkpointing_chosen and not can and getattr(args, NAMES[0]):
        _set_checkpointing(args, False)
        logger.info(
            "GOLDTrainer: %s has no gradient checkpointing: it is off.",
            type(student).__name__,
        )


def refuse_fp16(args: "GOLDConfig") -> None:
    """accelerate leaves it out on a CPU without a word."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if args.device.type == "cpu" and (args.fp16 or (launcher == "fp16" and not args.bf16)):
        raise ValueError(
            "GOLDTrainer: fp16 needs a GPU, got a run on the CPU, which would compute in float32; "
            "leave it out, or set bf16=True and use_cpu=True."
        )


def refuse_trained_float16(args: "GOLDConfig", student: nn.Module) -> None:
    """Small updates are lost there, and Adam's epsilon is 0. FSDP and DeepSpeed make float32."""
    engines = (args.fsdp, args.deepspeed, *map(os.environ.get, ENGINES))
    trained = [(n, p.dtype) for n, p in student.named_parameters() if p.requires_grad]
    name = next((name for name, dtype in trained if dtype == torch.float16), None)
    if name is not None and not any(engines):
        raise ValueError(
            f"GOLDTrainer: weights that are trained must not be in float16, got {name}; load the "
            "student in float32 (dtype), and set fp16=True or bf16=True to compute in 16 bits."
        )


def describe(args: "GOLDConfig", dtypes: str) -> str:
    """dtypes: of the student's weights."""
    mixed = next((name for name in ("bf16", "fp16") if getattr(args, name)), None)
    weights = f"weights in {dtypes}"
    precision = f"{weights}, computed in {mixed}" if mixed else weights
    checkpointing = "on" if getattr(args, NAMES[0]) else "off"
    return f"{precision}; gradient_checkpointing is {checkpointing}"


def _set_checkpointing(args: "GOLDConfig", is_on: bool) -> None:
    for name in NAMES:
        if hasattr(args, name):
            setattr(args, name, is_on)
