"""Attention within each segment of one sequence, in one call.

A tower takes the patches of all pictures as one sequence; a patch sees those of its own picture.
Without flash attention transformers' towers read the pictures' lengths back from the device in each
layer, and call attention once a picture, which neither a device that is never waited for nor a
compiler can have. torch has a kernel for segments of different lengths, in 16 bits. It also serves
rows of text that share a sequence (packing.py).

T patches or tokens, H heads of queries, H_k of keys, D entries of a head.
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

from gold_trainer.config import GOLDConfig
from gold_trainer.speed.replacing import replaced
from gold_trainer.speed.shared_prompts import Keys

varlen_attn: Any = None  # before torch 2.10
if find_spec("torch.nn.attention.varlen"):
    from torch.nn.attention.varlen import varlen_attn

PARAMETERS = () if varlen_attn is None else inspect.signature(varlen_attn).parameters
# Fewer heads of keys than of queries: in torch 2.11 the kernel takes them without being told.
IS_TOLD_OF_GROUPS = "enable_gqa" in PARAMETERS
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
    longest = max_length_q
    return within(query, key, value, cu_seq_lens_q, longest, scaling, is_causal=False), None


def within(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, H_k, T, D), each head for H / H_k of queries
    value: Tensor,
    bounds: Tensor,  # (segments + 1,) where each begins, and where the last one ends
    longest: int,  # segment
    scaling: float | None,
    *,
    is_causal: bool,  # the last query of a segment stands where its last key does
    window: int | None = None,  # tokens that one sees of its segment, itself with them
    keys: Keys | None = None,  # None: those of the segment
) -> Tensor:  # (1, T, H, D)
    """In 16 bits where a device has a kernel (can_attend); elsewhere by a mask of T x T_k."""
    of_keys = keys or Keys(bounds, bounds, longest)
    if keys is not None:
        key, value = (_taken(part, keys.places) for part in (key, value))
    if query.device.type == "cuda":
        parts = [states[0].transpose(0, 1) for states in (query, key, value)]
        before = -1 if window is None else window - 1
        options: dict[str, Any] = {"window_size": (before, 0)} if is_causal else {}
        if IS_TOLD_OF_GROUPS and parts[1].shape[1] < parts[0].shape[1]:
            options["enable_gqa"] = True
        both = [own.to(torch.int32) for own in (bounds, of_keys.bounds)]
        sizes = longest, of_keys.longest
        return varlen_attn(*parts, *both, *sizes, scale=scaling, **options)[None]
    segments, to_end = _in_segments(query.shape[2], bounds)
    key_segments, keys_to_end = _in_segments(key.shape[2], of_keys.bounds)
    mask = segments[:, None] == key_segments
    if is_causal:
        distances = keys_to_end - to_end[:, None]
        mask = mask & (distances >= 0)
        if window is not None:
            mask = mask & (distances < window)
    is_grouped = key.shape[1] < query.shape[1]
    states = scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, enable_gqa=is_grouped
    )
    return states.transpose(1, 2)


def _taken(states: Tensor, places: Tensor) -> Tensor:  # (1, H, T, D) -> (1, H, T_k, D)
    """Gradients of a token that is taken often are added up in 32 bits."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    return states.to(dtype).index_select(2, places).to(states.dtype)


def _in_segments(size: int, bounds: Tensor) -> tuple[Tensor, Tensor]:  # (size,) each
    """Of each place the number of its segment, and how far that goes on behind it."""
    places = torch.arange(size, device=bounds.device)
    bounds = bounds.to(places.dtype)
    segments = torch.searchsorted(bounds, places, right=True)
    return segments, bounds[segments] - places


ALL_ATTENTION_FUNCTIONS.register(OF_SEGMENTS, attend_segments)


def configs_of(layers: list[nn.Module]) -> list[Any]:
    """Configs of layers whose attention is one of segments, of which torch has the kernel; empty
    for others, and where attention drops out.
    """
    if "cu_seqlens" not in inspect.signature(type(layers[0]).forward).parameters:
        return []
    parts = [module for layer in layers for module in layer.modules()]
    owners = [part for part in parts if _implementation(part) == STOCK]
    if any(map(drops_out, owners)):
        return []
    return list({id(part.config): part.config for part in owners}.values())


def drops_out(module: nn.Module) -> bool:
    """Whether it drops out, by a rate that the module keeps as a number."""
    rates = (value for name, value in vars(module).items() if "dropout" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def can_attend(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attend_segments runs there, in the dtype that the layers compute in."""
    if device.type != "cuda":
        return device.type == "cpu"
    has_options = "scale" in PARAMETERS and "window_size" in PARAMETERS
    return has_options and dtype in HALF and torch.cuda.get_device_capability(device) >= (8, 0)


def dtype_of_products(weight: Tensor, args: GOLDConfig) -> torch.dtype:
    """The dtype in which a layer with this weight computes its products."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return weight.dtype


@contextmanager
def attention_is(name: str, configs: list[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(replaced(config, "_attn_implementation", name))
        yield
