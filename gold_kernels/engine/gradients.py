"""Gradients that the forward pass computed: their shapes, and their product with what comes from
above.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import float_dtype
from gold_kernels.engine.kinds import is_transformed

Gradients = tuple[Tensor | None, ...]  # of the inputs of an autograd Function


class _NoSecondFunction(torch.autograd.Function):
    """Gradients whose own derivative is an error."""

    @staticmethod
    def forward(ctx: Any, num_anchors: int, *tensors: Tensor | None) -> Gradients:
        return tensors[num_anchors:]

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Gradients:
        raise RuntimeError(
            "gold_kernels: a loss has no second derivative, got a backward pass through gradients "
            "that were taken with create_graph=True; leave the loss out of that pass, or take it "
            "from the functions of gold_kernels.reference, which autograd differentiates twice."
        )


def graph_anchors(*leaves: Tensor | None) -> tuple[Tensor, ...]:
    """Empty tensors in the graphs of those that require a gradient: see once_differentiable."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(t[:0].clone() for t in leaves if t is not None and t.requires_grad)


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """torch's decorator of this name refuses a second derivative with respect to what comes from
    above alone: gradients of create_graph=True were constants, and a penalty on them had none.

    Here they depend on ctx.anchors too, which keep no memory of the tensors they are made of.
    """

    @wraps(backward)
    def once(ctx: Any, *from_above: Tensor) -> Gradients:
        with torch.no_grad():
            grads = backward(ctx, *from_above)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return grads
        anchors = *ctx.anchors, *(g for g in from_above if g is not None and g.requires_grad)
        found: Gradients = _NoSecondFunction.apply(len(anchors), *anchors, *grads)
        return found

    return once


def refuse_batch(from_above: Tensor, what: str) -> None:
    """Several gradients from above in one pass, where each needs a pass of its own."""
    if is_transformed(from_above):
        raise RuntimeError(
            f"gold_kernels: one gradient from above is expected of a loss with {what}, got a batch "
            "of them (is_grads_batched=True, or jacobian(vectorize=True)); take them one by one."
        )


@torch.library.custom_op("gold_kernels::scaled", mutates_args=())
def scaled_tensor(tensor: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The tensor times scale (), in dtype."""
    if backend == "triton":
        from gold_kernels.triton.scale import scaled  # triton may be missing

        return scaled(tensor, scale, dtype)
    return (tensor * scale).to(dtype)


@scaled_tensor.register_fake
def _(tensor: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty_like(tensor, dtype=dtype)


def finished_gradients(
    tensors: Sequence[Tensor], scale: Tensor, dtypes: Sequence[torch.dtype], backend: str
) -> list[Tensor]:
    """What a backward pass returns of the tensors that it saved: each times scale (), in its dtype.

    If the graph is freed after this pass, nobody sees the saved tensors again: they are scaled
    where they lie and handed over, which saves a second gradient of the head, and, where the scale
    is 1, reading and writing the first.
    """
    pairs = list(zip(tensors, dtypes, strict=True))
    if is_transformed(scale):  # is_grads_batched: an operator has no rule for that
        return [(tensor * scale).to(dtype) for tensor, dtype in pairs]
    # A traced pass is not asked; dtypes differ for float16, whose gradients are float32 so far.
    is_kept = torch.compiler.is_compiling() or _keeps_graph()
    if is_kept or any(t.dtype != dtype or not t.is_contiguous() for t, dtype in pairs):
        return [scaled_tensor(tensor, scale, dtype, backend) for tensor, dtype in pairs]
    for tensor in tensors:
        if backend == "triton":
            from gold_kernels.triton.scale import scale_  # triton may be missing

            scale_(tensor, scale)
        else:
            tensor.mul_(scale)
    return list(tensors)


def _keeps_graph() -> bool:
    """True in a backward pass with retain_graph=True; torch itself asks so before it reuses the
    buffers of compiled graphs.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()


def empty_gradients(
    leaves: tuple[Tensor, Tensor, Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """What chunking.run_chunks returns for these leaves, without values: for fake operators."""
    hidden, weight, bias = leaves
    # gradients of float16 stay float32 until backward
    dtype = torch.float32 if hidden.dtype == torch.float16 else None
    like_hidden = torch.empty_like(hidden, dtype=dtype)  # strides too; weight and bias contiguous
    others = (None if t is None else t.new_empty(t.shape, dtype=dtype) for t in (weight, bias))
    grads = (like_hidden, *others)
    return [g for g, need in zip(grads, needs, strict=True) if need and g is not None]


def empty_logits_gradient(logits: Tensor) -> Tensor:
    """float32 for float16, which cannot hold row_weight * probability: cast at backward."""
    return torch.empty_like(logits, dtype=torch.float32 if logits.dtype == torch.float16 else None)


def empty_values(num_values: int, num_rows: int, like: Tensor) -> Tensor:
    """(num_values, num_rows) for row values, without values: for fake operators."""
    return like.new_empty(num_values, num_rows, dtype=float_dtype(like))
