"""Optimizers, before models are loaded: the package that one needs, and the options it reads."""

from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from transformers import Trainer
from transformers.training_args import OptimizerNames

from gold_trainer.config import GOLDConfig
from gold_trainer.nearest import did_you_mean

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

# Names of optim, and what transformers reads of optim_args for them; of others nothing is read.
LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type")
READ = (
    ("sgd", ("momentum", "dampening", "weight_decay", "nesterov")),
    ("adagrad", ("lr_decay", "weight_decay", "eps")),
    ("rmsprop", ("momentum", "alpha", "eps", "weight_decay", "centered")),
    ("rmsprop_bnb*", ("alpha", "eps", "momentum", "centered", "min_8bit_size")),
    ("*ademamix*", ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")),
    (
        "adamw_anyprecision",
        ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
    ),
    ("galore_*", LOW_RANK),
    ("apollo_*", (*LOW_RANK, "proj", "scale_type")),
    (
        "grokadamw",
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    ),
    ("adamw_torch_[48]bit", ("block_size", "bf16_stochastic_round")),
    ("schedule_free_*", ("weight_lr_power", "r")),
    ("stable_adamw", ("max_lr", "kahan_sum", "decouple_lr")),
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
    check_optimizer_args(args)


def check_optimizer_args(args: GOLDConfig) -> None:
    """ValueError for optim_args and optim_target_modules that the optimizer would not read."""
    name = OptimizerNames(args.optim).value
    if args.optim_target_modules and not name.startswith(("galore_", "apollo_")):
        raise ValueError(
            f"GOLDTrainer: optim_target_modules must be left out with optim={name!r}, got "
            f"{args.optim_target_modules}; galore_ and apollo_ optimizers read it."
        )
    if not args.optim_args:
        return
    known = next((read for names, read in READ if fnmatchcase(name, names)), ())
    for part in args.optim_args.replace(" ", "").split(","):
        key, is_given, value = part.partition("=")
        if not is_given or not value or "=" in value:
            raise ValueError(
                "GOLDTrainer: optim_args must be name=value, separated by commas, got "
                f"{args.optim_args!r}; write momentum=0.9,nesterov=true."
            )
        if key not in known:
            raise ValueError(
                f"GOLDTrainer: optim_args must be what optim={name!r} reads, which is "
                f"{', '.join(known) or 'nothing'}, got {key!r}"
                f"{did_you_mean(key, known) or '; Adam has adam_beta1, adam_beta2, adam_epsilon.'}"
            )
    if name in ("sgd", "adagrad", "rmsprop"):  # torch's: made here once, to see the values
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            kind([torch.zeros((), requires_grad=True)], **options)
        except ValueError as error:
            raise ValueError(
                f"GOLDTrainer: optim_args must have values that {name!r} takes, got "
                f"{args.optim_args!r} ({error}); mend them."
            ) from error


def refuse_in_parts(optim: str, accelerator: Accelerator) -> None:
    """Under FSDP2 parameters are DTensors, which operators of bitsandbytes do not take."""
    package = package_of(optim)
    if package is not None and package[0] == "bitsandbytes" and accelerator.is_fsdp2:
        raise ValueError(
            "GOLDTrainer: under FSDP2 optim must not be one of bitsandbytes, got "
            f"{OptimizerNames(optim).value!r}, which cannot update weights in parts; set "
            "optim='adamw_torch', or train with DDP or DeepSpeed."
        )
