"""Gradients that the forward pass computed: their shapes, and their product with what comes from
above.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gold_kernels.engine.chunking import float_dtype


@torch.library.custom_op("gold_kernels::scaled", mutates_args=())
def scaled_tensors(
    tensors: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """Every tensor times scale (), in dtype."""
    if backend == "triton":
        from gold_kernels.triton.scale import scaled  # triton may be missing

        return [scaled(tensor, scale, dtype) for tensor in tensors]
    return [(tensor * scale).to(dtype) for tensor in tensors]


@scaled_tensors.register_fake
def _(tensors: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, backend: str) -> list[Tensor]:
    return [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]


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
