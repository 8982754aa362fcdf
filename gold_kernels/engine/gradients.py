"""Gradients that the forward pass computed: their shapes, and their product with what comes from
above.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import float_dtype


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


def finished_gradients(
    tensors: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """What a backward pass returns of the tensors that it saved: each times scale (), in dtype.

    If the graph is freed after this pass, nobody sees the saved tensors again: they are scaled
    where they lie and handed over, which saves a second gradient of the head, and, where the scale
    is 1, reading and writing the first.
    """
    # A traced pass is not asked; dtypes differ for float16, whose gradients are float32 so far.
    is_kept = torch.compiler.is_compiling() or _keeps_graph()
    if is_kept or any(t.dtype != dtype or not t.is_contiguous() for t in tensors):
        return scaled_tensors(tensors, scale, dtype, backend)
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
