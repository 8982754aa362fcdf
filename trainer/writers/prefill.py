"""Prompts through the model once: what its cache holds of them, and the logits behind them.

Everything that a model does with its inputs before the first token (positions, masks, pictures) is
what transformers' generate() makes it do; only the loop behind it is another.

P prompts, w their width with padding on the left, V entries of the head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

# Inputs that go on behind the prompt, with the value that text has.
TYPE_IDS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class CannotDecode(Exception):
    """Why a model's completions have to come from generate()."""


@dataclass
class Prefilled:
    input_ids: Tensor  # (P, w)
    logits: Tensor  # (P, V) of the next token
    layers: list[tuple[Tensor, Tensor]]  # keys and values (P, heads, up to w, D)
    mask: Tensor  # (P, w)
    positions: Tensor  # (..., P, 1) of the next token
    cache_name: str  # of the argument
    options: dict[str, Any] = field(default_factory=dict)  # more arguments of every step
    type_ids: dict[str, Tensor] = field(default_factory=dict)  # (P, 1)
    next_logits: Tensor | None = None  # (P, V) behind the likeliest token, where they are asked for

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the cache for a token of one row."""
        parts = [part for layer in self.layers for part in layer]
        return sum(part.shape[1] * part.shape[3] * part.element_size() for part in parts)


def prefill(
    base: Any,  # a transformers model
    inputs: dict[str, Tensor],
    pad_token_id: int,
    *,
    goes_on: bool = False,  # one token further, with the model's own cache
) -> Prefilled:
    """CannotDecode where the cache of the model is more than keys and values."""
    made: list[Prefilled] = []

    def run(  # takes the place of the loop in generate()
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **given: Any,
    ) -> Tensor:
        given.pop("synced_gpus", None)
        prepared = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **given)
        outputs = model(**prepared, return_dict=True)
        logits = outputs.logits[:, -1].clone()
        given = model._update_model_kwargs_for_generation(outputs, given, is_encoder_decoder=False)
        made.append(_kept(input_ids, logits, given))
        if goes_on:
            longer = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=1)
            prepared = model.prepare_inputs_for_generation(longer, next_sequence_length=1, **given)
            made[0].next_logits = model(**prepared, return_dict=True).logits[:, -1]
        return input_ids

    config = GenerationConfig(max_new_tokens=2, use_cache=True, pad_token_id=pad_token_id)
    with _without_processors(base):
        base.generate(**inputs, generation_config=config, custom_generate=run)
    return made[0]


@contextmanager
def _without_processors(base: Any) -> Iterator[None]:
    """Of logits, which nobody asks for: to make them generate() looks at the ids, which waits until
    the device has done all pictures, 12 ms for 16.
    """
    vars(base)["_get_logits_processor"] = lambda *args, **kwargs: LogitsProcessorList()
    try:
        yield
    finally:
        del vars(base)["_get_logits_processor"]


def in_dtype_of_attention(states: Tensor) -> Tensor:
    """States as autocast casts them whenever attention reads them: rotary positions and norms with
    weights of 32 bits leave keys in 32.
    """
    kind = states.device.type
    is_cast = torch.is_autocast_enabled(kind) and states.dtype == torch.float32
    return states.to(torch.get_autocast_dtype(kind)) if is_cast else states


def _kept(input_ids: Tensor, logits: Tensor, given: dict[str, Any]) -> Prefilled:
    caches = {name: value for name, value in given.items() if isinstance(value, Cache)}
    width = input_ids.shape[1]
    if len(caches) != 1 or given.get("position_ids") is None:
        raise CannotDecode("it keeps no cache of keys and values")
    ((cache_name, cache),) = caches.items()
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise CannotDecode(f"its cache has a {type(layer).__name__}")
        states: Any = layer
        keys, values = states.keys, states.values
        if (
            keys is None
            or keys.ndim != 4
            or (type(layer) is DynamicLayer and keys.shape[2] != width)
        ):
            raise CannotDecode("its cache holds something else than each token's keys")
        layers.append((in_dtype_of_attention(keys), in_dtype_of_attention(values)))
    mask = given.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask[:, :width]
    kept = ("use_cache", "logits_to_keep")
    options: dict[str, Any] = {name: given[name] for name in kept if name in given}
    type_ids = {name: given[name][:, -1:] for name in TYPE_IDS if given.get(name) is not None}
    positions = given["position_ids"][..., -1:]
    return Prefilled(input_ids, logits, layers, mask, positions, cache_name, options, type_ids)
