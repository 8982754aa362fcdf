"""Gradients that the forward pass computed, as autograd wants them in the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine.chunking import float_dtype
from gold_kernels.jsd import torch_rows


@torch.library.custom_op("gold_kernels::scaled", mutates_args=())
def _scaled_operator(
    tensors: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """Every tensor times scale (), in dtype."""
    if backend == "triton":
        from gold_kernels.triton.scale import scaled  # triton may be missing
    else:
        scaled = torch_rows.scaled
    return [scaled(tensor, scale, dtype) for tensor in tensors]


@_scaled_operator.register_fake
def _(tensors: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, backend: str) -> list[Tensor]:
    return [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]


def empty_gradients(leaves: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """What chunking.run_chunks returns for these leaves, without values: for fake operators."""
    # gradients of float16 stay float32 until backward
    dtype = torch.float32 if leaves[0].dtype == torch.float16 else None
    hidden, *others = leaves
    like_hidden = torch.empty_like(hidden, dtype=dtype)  # strides too; weight and bias contiguous
    grads = [like_hidden, *(t if t is None else t.new_empty(t.shape, dtype=dtype) for t in others)]
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


def empty_logits_gradient(logits: Tensor) -> Tensor:
    """float32 for float16, which cannot hold row_weight * probability: cast at backward."""
    return torch.empty_like(logits, dtype=torch.float32 if logits.dtype == torch.float16 else None)


def empty_logits_results(logits: Tensor, num_values: int, needs_grad: bool) -> list[Tensor]:
    """What an operator on logits (N, V) returns, without values: for fake operators."""
    values = logits.new_empty(num_values, logits.shape[0], dtype=float_dtype(logits))
    return [values, empty_logits_gradient(logits)] if needs_grad else [values]


def save_gradients(ctx: Any, gradients: list[Tensor], dtype: torch.dtype, backend: str) -> None:
    """Gradients of the first three inputs of a Function, those it needs."""
    ctx.save_for_backward(*gradients)
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.gradient_dtype, ctx.backend = dtype, backend


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """Saved gradients times grad_loss (), out of place: a second backward gives the same."""
    scaled = iter(_scaled_operator(ctx.saved_tensors, grad_loss, ctx.gradient_dtype, ctx.backend))
    return [next(scaled) if need else None for need in ctx.needs]
