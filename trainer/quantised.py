"""Models in 8 and 4 bits, by the libraries that transformers knows: their heads stay whole.

The loss multiplies by the head's matrix itself, and rounding it would move every logit.
"""

import copy
import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from gold_trainer.models import base_model
from gold_trainer.nearest import did_you_mean

logger = logging.getLogger(__name__)

NAME = "quantization_config"
# Fields of a quantization_config that name the modules which are left as they are.
LEFT = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
EXAMPLE = '{"load_in_4bit": true}'


def is_quantised_by(init_kwargs: dict[str, Any], config: PretrainedConfig) -> bool:
    """Whether from_pretrained gives a model in 8 or 4 bits, or in which else its files are."""
    return NAME in init_kwargs or getattr(config, NAME, None) is not None


def read_quantization(field: str, given: Any) -> Any:  # an object of transformers
    """What a dict says, as a command line has it; ValueError for a name or a value that is none."""
    if not isinstance(given, dict):
        return given
    method = given.get("quant_method")
    for bits in ("4bit", "8bit"):
        if given.get(f"load_in_{bits}"):
            method = f"bitsandbytes_{bits}"
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(method))
    if kind is None:
        raise _refusal(field, f"load_in_4bit, load_in_8bit or a quant_method, got {given}")
    known = [name for name in inspect.signature(kind).parameters if name != "kwargs"]
    for name in given:
        if name not in (*known, "quant_method"):
            meant = did_you_mean(name, known)
            raise _refusal(field, f"{', '.join(known)}, got {name!r}{meant}")
    if method == "torchao" and isinstance(given.get("quant_type"), str):
        given = given | {"quant_type": _torchao_kind(field, given["quant_type"])}
        return kind(**{name: value for name, value in given.items() if name != "quant_method"})
    try:
        return AutoQuantizationConfig.from_dict(dict(given))
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _refusal(field, f"values of its library, got {given} ({error})") from error


def _torchao_kind(field: str, name: str) -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ValueError(
            f"GOLDTrainer: {field}[{NAME!r}] needs the package torchao, which is not installed; "
            "pip install 'gold-kernels[quantized]'."
        ) from error
    kind = getattr(torchao.quantization, name, None)
    if kind is None:
        known = [other for other in dir(torchao.quantization) if other.endswith("Config")]
        meant = did_you_mean(name, known) or "; for instance Int8WeightOnlyConfig"
        raise _refusal(field, f"a quant_type of torchao, got {name!r}{meant}")
    return kind()


def _refusal(field: str, text: str) -> ValueError:
    return ValueError(f"GOLDTrainer: {field}[{NAME!r}] must hold {text}; as {EXAMPLE}.")


def without_head(quantization: Any, head: str) -> Any:
    """The same quantisation without the head. Where the user gives no list, transformers leaves the
    head out itself.
    """
    for name in LEFT:
        left = getattr(quantization, name, None)
        if left is not None and head not in left:
            quantization = copy.copy(quantization)
            setattr(quantization, name, [*left, head])
    return quantization


def name_of_head(model: nn.Module) -> str:
    head = base_model(model).get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "lm_head")


def restore_head(model: nn.Module, side: str) -> None:
    """A head that is quantised all the same becomes a plain one, once."""
    base = base_model(model)
    head: Any = base.get_output_embeddings()
    weight = dequantised(head)
    if weight is None:
        return
    num_entries, width = weight.shape
    plain = nn.Linear(width, num_entries, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.to(base.dtype), requires_grad=False)
    if head.bias is not None:
        plain.bias = nn.Parameter(head.bias.detach().to(base.dtype), requires_grad=False)
    base.set_output_embeddings(plain)
    logger.warning(
        "GOLDTrainer: the %s's lm_head is quantised; the loss takes it as %s, %d MiB.",
        side,
        str(plain.weight.dtype).removeprefix("torch."),
        plain.weight.nbytes >> 20,
    )


@torch.no_grad()
def dequantised(head: Any) -> torch.Tensor | None:  # (V, D)
    """None for a head that is not quantised, or by a library of which we know no way back."""
    weight: Any = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear):
        return None
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, getattr(head, "state", None))
    return weight.dequantize() if type(weight).__module__.startswith("torchao.") else None
