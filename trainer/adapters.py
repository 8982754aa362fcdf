"""Adapters that a run makes: which a training step alone can train, and what of a config nothing
reads.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils import is_peft_available

from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import told

# Adapters, by their peft_type, that a training step alone does not train.
OF_OWN_LOOPS = {
    "ADALORA": "update_and_allocate() after every step, and a loss of its own",
    "XLORA": "adapters that are trained already",
    "POLY": "the task of every row",
}
# Options of LoraConfig that do not, and what they need.
OPTIONS_OF_OWN_LOOPS = {
    "layer_replication": "layers that are made several times, as neither the student's config nor "
    "the teacher has them",
    "alora_invocation_tokens": "the place of those tokens in every forward pass",
    "monteclora_config": "a loss of its own",
    "kasa_config": "a loss of its own",
    "arrow_config": "adapters that are trained already",
    "megatron_config": "a model of Megatron",
}
# Values of init_lora_weights that need a pass over data, which GOLDTrainer does not make.
INITS_OF_DATA = ("eva", "corda", "lora_ga")
TASKS = (None, "CAUSAL_LM")

logger = logging.getLogger(__name__)


def check_adapter(peft_config: Any, args: GOLDConfig) -> None:
    """Refuse an adapter that is to be made and cannot train, before models are loaded."""
    if peft_config is None or not is_peft_available():
        return  # without peft that is said where it is made
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise ValueError(
            "GOLDTrainer: peft_config must be a config of peft, got "
            f"{type(peft_config).__name__}; pass LoraConfig(r=16, target_modules=[...])."
        )
    if peft_config.inference_mode:
        raise ValueError(
            "GOLDTrainer: peft_config must have inference_mode=False, got True, with which nothing "
            "of it is trained; leave it out."
        )
    kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    if kind in OF_OWN_LOOPS:
        raise ValueError(
            f"GOLDTrainer: peft_config must be of an adapter that any loop can train, got "
            f"{type(peft_config).__name__}, which needs {OF_OWN_LOOPS[kind]}; use LoraConfig."
        )
    _check_options(peft_config)
    rates = {n: v for n, v in vars(peft_config).items() if n.endswith("dropout") and v}
    if rates and args.disable_dropout:
        logger.warning(
            "GOLDTrainer: %s of the adapter has no effect with disable_dropout=True, the default; "
            "set disable_dropout=False to use it.",
            ", ".join(f"{name}={rate}" for name, rate in rates.items()),
        )


def _check_options(peft_config: Any) -> None:
    for name, need in OPTIONS_OF_OWN_LOOPS.items():
        value = getattr(peft_config, name, None)
        if value is not None:
            raise ValueError(
                f"GOLDTrainer: peft_config must be without {name}, which needs {need}, got "
                f"{value!r}; leave it out."
            )
    init = getattr(peft_config, "init_lora_weights", None)
    if init in INITS_OF_DATA:
        raise ValueError(
            "GOLDTrainer: peft_config must have an init_lora_weights without a pass over data, got "
            f"{init!r}; make that adapter yourself, and pass the model that has it as model=."
        )
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    if task not in TASKS:
        raise ValueError(
            f"GOLDTrainer: task_type of peft_config must be CAUSAL_LM, got {task}; set it so, or "
            "leave it out."
        )
    scales = [("lora_alpha", getattr(peft_config, "lora_alpha", None))]
    scales += list((getattr(peft_config, "alpha_pattern", None) or {}).items())
    for name, scale in scales:
        if scale == 0:
            raise ValueError(
                f"GOLDTrainer: peft_config must have a scale above 0, got {name}=0, with which the "
                "adapter changes nothing and nothing is trained; set lora_alpha to r, or twice it."
            )


@contextmanager
def telling_what_fits(model: nn.Module) -> Iterator[None]:
    """Errors of peft's own making of an adapter, which are of many kinds, as one ValueError."""
    try:
        yield
    except (ValueError, LookupError, AttributeError, TypeError, ImportError) as error:
        raise ValueError(
            f"GOLDTrainer: peft_config must fit the student, a {type(model).__name__}, got what "
            f"peft refuses ({told(error)}); change it."
        ) from error


def warn_of_unmatched(peft_config: Any, model: nn.Module, modules: Collection[str]) -> None:
    """modules: the names of the student's, before it had an adapter."""
    idle = list(_unmatched(peft_config, modules))
    if idle:
        logger.warning(
            "GOLDTrainer: no module of the student, a %s, is what peft_config names in %s: "
            "it has no effect; check its spelling.",
            type(model).__name__,
            ", ".join(f"{field} {name!r}" for field, name in idle),
        )


def _unmatched(peft_config: Any, modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names that peft looks for in these ways, and of which it does not say that there is none."""
    given = getattr(peft_config, "target_modules", None)
    for name in sorted(given) if isinstance(given, set | list | tuple) else ():
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            yield "target_modules", name
    for name in getattr(peft_config, "modules_to_save", None) or ():
        if not any(module.endswith(name) for module in modules):
            yield "modules_to_save", name
