"""Attention within each picture of a vision tower, in one call.

A tower takes the patches of all pictures as one sequence; a patch sees those of its own picture.
Without flash attention transformers' towers read the pictures' lengths back from the device in each
layer, and call attention once a picture, which neither a device that is never waited for nor a
compiler can have. torch has a kernel for segments of different lengths, in 16 bits.

T patches, D entries of a head.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gold_trainer.speed.replacing import replaced

varlen_attn: Any = None  # before torch 2.10
if find_spec("torch.nn.attention.varlen"):
    from torch.nn.attention.varlen import varlen_attn

STOCK = "sdpa"
OF_SEGMENTS = (
    "gold_trainer_flash_segments"  # transformers gives lengths to what has flash in its name
)
HALF = (torch.bfloat16, torch.float16)


def attend_segments(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,  # (segments + 1,) where each begins, and where the last one ends
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, heads, D)
    if attention_mask is not None or dropout:  # the layer then runs as it is, without this
        raise NotImplementedError("attention within pictures has neither a mask nor dropout")
    if query.device.type == "cuda":
        parts = [states[0].transpose(0, 1) for states in (query, key, value)]
        bounds = cu_seq_lens_q.to(torch.int32)
        longest = max_length_q, max_length_q
        states = varlen_attn(*parts, bounds, bounds, *longest, scale=scaling)
        return states[None], None
    places = torch.arange(query.shape[2], device=query.device)
    segments = torch.searchsorted(cu_seq_lens_q.to(places.dtype), places, right=True)
    mask = segments[:, None] == segments
    states = scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    return states.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(OF_SEGMENTS, attend_segments)


def configs_of(layers: list[nn.Module]) -> list[Any]:
    """Configs of layers whose attention is one of segments, of which torch has the kernel; empty
    for others, and where attention drops out.
    """
    if "cu_seqlens" not in inspect.signature(type(layers[0]).forward).parameters:
        return []
    parts = [module for layer in layers for module in layer.modules()]
    owners = [part for part in parts if _implementation(part) == STOCK]
    numbers = [item for part in owners for item in vars(part).items() if isinstance(item[1], float)]
    if any("dropout" in name and number for name, number in numbers):
        return []
    return list({id(part.config): part.config for part in owners}.values())


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def can_attend(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attend_segments runs there, in the dtype that the layers compute in."""
    if device.type != "cuda":
        return device.type == "cpu"
    has_scale = varlen_attn is not None and "scale" in inspect.signature(varlen_attn).parameters
    return has_scale and dtype in HALF and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def attention_is(name: str, configs: list[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(replaced(config, "_attn_implementation", name))
        yield
