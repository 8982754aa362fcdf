"""Rows of a micro-batch one behind the other in one sequence, without padding.

A token sees those of its own row alone, and its position is that within its row: each row is
computed as if no other were there. What a layer does token by token, which is all but attention,
then has no padding to work on.

B rows, L positions of the longest, T tokens of all rows, N scored ones, H heads, D entries of a
head.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gold_trainer import models
from gold_trainer.batches import WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.rendering.text_tensors import PLACES
from gold_trainer.speed.kinds import KERNELS, PICTURES, TEXT, reason_against_kind
from gold_trainer.speed.masks import MASK, without_mask
from gold_trainer.speed.on_host import host_of, sent
from gold_trainer.speed.segments import (
    attention_is,
    can_attend,
    drops_out,
    dtype_of_products,
    within,
)
from gold_trainer.speed.shared_prompts import Counts, Keys, segments_of

# transformers makes no mask for attention of a name that it does not know
OF_ROWS = "gold_trainer_rows"
# Whose window is in the mask alone, which packed rows do not have, or known to attention alone,
# which leaves it to a mask where rows are padded.
WINDOW_IN_ONE = ("olmoe", "qwen2_moe")
# Of the positions of padded rows, that are left where prompts are shared: with more it costs time.
MOST = 0.8
# Arguments of attention that only other kernels know.
UNKNOWN = ("softcap", "s_aux", "position_bias")


def attend_rows(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Tensor,  # (B + 1,) where each row begins, and where the last one ends
    max_length_q: int,
    # where transformers has bounds of the keys
    cu_seq_lens_k: Keys | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (1, T, H, D)
    others = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or others:
        raise NotImplementedError(f"attention within rows has no mask, no dropout and no {others}")
    if torch.is_autocast_enabled(query.device.type):  # norms of queries and keys are in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bounds, longest = cu_seq_lens_q, max_length_q
    options: dict[str, Any] = {"window": sliding_window or None, "keys": cu_seq_lens_k}
    return within(query, key, value, bounds, longest, scaling, is_causal=True, **options), None


ALL_ATTENTION_FUNCTIONS.register(OF_ROWS, attend_rows)


class Packing:
    """Within its context attention of student and teacher is one of rows."""

    def __init__(self, args: GOLDConfig, sides: Mapping[str, nn.Module | None]) -> None:
        self.models = {side: model for side, model in sides.items() if model is not None}
        self.args, self.is_on = args, args.padding_free
        by_default = args.padding_free or args.device.type == "cuda"
        self.may_share = by_default if args.share_prompts is None else args.share_prompts
        asked = [name for name in ("padding_free", "share_prompts") if getattr(args, name)]
        for side, model in self.models.items() if asked or self.may_share else ():
            reason = _reason_against(model, args)
            if reason is not None and asked:
                raise ValueError(
                    f"GOLDTrainer: {asked[0]} must be False for models whose rows cannot share a "
                    f"sequence, got True and a {side} {reason}."
                )
            self.may_share &= reason is None
        has_routers = any(map(models.has_router_loss, self.models.values()))
        if args.share_prompts and has_routers:
            raise ValueError(
                "GOLDTrainer: share_prompts must be False where routers have a loss, which counts "
                "the prompt of each row, got True and output_router_logits=True; leave one out."
            )
        self.may_share &= not has_routers

    def shares(self, batch: WindowBatch) -> bool:
        """Whether prompts of a micro-batch of the training are computed once."""
        if not self.may_share:
            return False
        sides = [batch.examples]
        if batch.teacher_examples is not batch.examples and set(self.models) != {"student"}:
            sides.append(batch.teacher_examples)
        shared, packed, padded = map(sum, zip(*map(Counts.of, sides), strict=True))
        if self.is_on or self.args.share_prompts:
            return shared < packed
        return shared < packed and shared <= MOST * padded

    @cached_property
    def configs(self) -> list[Any]:
        """Configs of the attention that is replaced."""
        found = (config for model in self.models.values() for config in _configs(model))
        return list({id(config): config for config in found}.values())

    @contextmanager
    def running(self, batch: WindowBatch | None = None) -> Iterator[None]:
        """Around forward and backward pass, which computes again what is checkpointed."""
        is_on = self.is_on or (batch is not None and batch.shares_prompts)
        with attention_is(OF_ROWS, self.configs if is_on else []):
            yield


def packed(
    model: nn.Module,
    inputs: dict[str, Any],  # of its forward, (B, L)
    mask: Tensor,  # (B, L) of the text
    scored_rows: Tensor,  # (N,) flat positions b * L + l
    shared: Sequence[Sequence[int]] | None = None,  # of each row lengths of what it is made of
) -> tuple[dict[str, Any], Tensor]:  # (1, T), and (N,) positions within T
    """Padded rows, without their mask if that may be, where the attention is not one of rows."""
    base = models.base_model(model)
    is_known = base.config.model_type in (*TEXT, *PICTURES)
    if not is_known or base.get_decoder().config._attn_implementation != OF_ROWS:
        assert shared is None, "prompts are shared where attention is one of rows"
        return without_mask(model, inputs, mask), scored_rows
    device = mask.device
    is_text = _on_host(mask).bool()
    lengths = is_text.sum(1)
    made = {
        name: _on_host(tensor)[is_text][None]
        for name, tensor in inputs.items()
        if name in PLACES and name != MASK
    }
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        made["position_ids"] = (is_text.cumsum(1) - 1)[is_text][None]
    else:  # (3, B, L)
        made["position_ids"] = _on_host(position_ids)[:, is_text][:, None]
    made["cu_seq_lens_q"] = functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    sizes: dict[str, Any] = {"max_length_q": int(lengths.max())}
    if shared is not None:
        segments = segments_of(shared)
        made["position_ids"] = made["position_ids"] - segments.offsets
        made["cu_seq_lens_q"] = segments.bounds
        sizes["max_length_q"] = segments.longest
        places, bounds, longest = segments.keys
        sizes["cu_seq_lens_k"] = Keys(sent(places, device), sent(bounds, device), longest)
    places = (is_text.flatten().cumsum(0) - 1)[_on_host(scored_rows)]
    there = {name: sent(tensor, device) for name, tensor in made.items()}
    rest = {name: value for name, value in inputs.items() if name != MASK}
    return rest | there | sizes, sent(places, device)


def _on_host(tensor: Tensor) -> Tensor:
    known = host_of(tensor)
    return tensor.cpu() if known is None else known  # of one that was changed on the device


def _configs(model: nn.Module) -> list[Any]:
    """That attention of the text's layers reads, and the model that makes their mask."""
    parts = models.base_model(model).get_decoder().modules()
    configs = (part.config for part in parts if hasattr(part, "config"))
    return list({id(config): config for config in configs}.values())


def _has_window(text: Any) -> bool:  # a config
    kinds = getattr(text, "layer_types", None)
    is_sliding = kinds is None or "sliding_attention" in kinds
    return is_sliding and bool(getattr(text, "sliding_window", None))


def _reason_against(model: nn.Module, args: GOLDConfig) -> str | None:
    """Behind "a student" or "a teacher"."""
    base = models.base_model(model)
    text = base.config.get_text_config()
    reason = reason_against_kind(base)
    if reason is not None:
        return reason
    if text.model_type in WINDOW_IN_ONE and _has_window(text):
        return f"of the type {text.model_type} with a window; sliding_window=None is known"
    if text._attn_implementation not in (*KERNELS, OF_ROWS):
        return f"with the attention {text._attn_implementation!r}; {', '.join(KERNELS)} are known"
    if args.neftune_noise_alpha is not None:
        return "whose noise goes by the length of its rows; neftune_noise_alpha must be unset"
    is_trained = any(weight.requires_grad for weight in base.parameters())
    if is_trained and any(map(drops_out, base.get_decoder().modules())):
        return "that drops out attention; set disable_dropout=True"
    dtype = dtype_of_products(base.get_output_embeddings().weight, args)
    if not can_attend(args.device, dtype):
        return (
            f"that computes in {dtype} on {args.device}; on a GPU torch 2.11 has a kernel for "
            "16 bits, from compute capability 8.0 on"
        )
    return None
