"""Optimizers that come with a package of their own: missing ones show before models are loaded."""

from fnmatch import fnmatchcase
from importlib.util import find_spec

from accelerate import Accelerator
from transformers.training_args import OptimizerNames

from gold_trainer.config import GOLDConfig

QUANTIZED = "'gold-kernels[quantized]'"
# Names of optim, the module, what pip is told; the first that fits counts.
PACKAGES = (
    ("adamw_torch_xla", "torch_xla", "torch_xla"),
    ("adamw_torch_npu_fused", "torch_npu", "torch_npu"),
    ("adamw_torch_[48]bit", "torchao", QUANTIZED),
    ("adamw_anyprecision", "torchdistx", "git+https://github.com/pytorch/torchdistx"),
    ("galore_*", "galore_torch", "galore-torch"),
    ("apollo_*", "apollo_torch", "apollo-torch"),
    ("*lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free_*", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("paged_*", "bitsandbytes", QUANTIZED),
    ("*_8bit", "bitsandbytes", QUANTIZED),
    ("lion_*", "bitsandbytes", QUANTIZED),
    ("ademamix", "bitsandbytes", QUANTIZED),
    ("rmsprop_bnb*", "bitsandbytes", QUANTIZED),
)


def package_of(optim: str) -> tuple[str, str] | None:
    """The module of an optimizer, and what pip installs it by; None: torch or transformers."""
    name = OptimizerNames(optim).value
    return next(((m, pip) for names, m, pip in PACKAGES if fnmatchcase(name, names)), None)


def check_optimizer(args: GOLDConfig) -> None:
    package = package_of(args.optim)
    if package is not None and find_spec(package[0]) is None:
        name = OptimizerNames(args.optim).value
        raise ValueError(
            f"GOLDTrainer: optim={name!r} needs the package {package[0]}, which is not installed; "
            f"pip install {package[1]}, or set optim='adamw_torch'."
        )


def refuse_in_parts(optim: str, accelerator: Accelerator) -> None:
    """Under FSDP2 parameters are DTensors, which operators of bitsandbytes do not take."""
    package = package_of(optim)
    if package is not None and package[0] == "bitsandbytes" and accelerator.is_fsdp2:
        raise ValueError(
            "GOLDTrainer: under FSDP2 optim must not be one of bitsandbytes, got "
            f"{OptimizerNames(optim).value!r}, which cannot update weights in parts; set "
            "optim='adamw_torch', or train with DDP or DeepSpeed."
        )
