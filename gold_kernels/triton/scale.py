"""A tensor times a scalar of the device: into another dtype, or where it lies."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import is_interpreted, num_blocks

MOST_PROGRAMS = 1 << 12  # each takes many blocks: a program that finds nothing to do costs time too


@triton.jit
def scale_kernel(
    out_ptr,  # (size,), overwritten; tensor_ptr itself if IS_IN_PLACE
    tensor_ptr,  # (size,)
    scale_ptr,  # ()
    size,
    IS_IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    # 1 is what comes from above a loss that is not divided: nothing is read or written then
    last = tl.where(IS_IN_PLACE & (scale == 1.0), 0, size)
    for start in range(first, last, step):
        offsets = start + tl.arange(0, BLOCK)
        is_inside = offsets < size
        values = tl.load(tensor_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, (values * scale).to(out_ptr.dtype.element_ty), mask=is_inside)


def _scale(out: Tensor, tensor: Tensor, scale: Tensor) -> None:
    """Launch scale_kernel on tensors that are blocks of memory."""
    size, block = tensor.numel(), 1 << 16 if is_interpreted() else 4096
    if size:
        grid = (min(num_blocks(size, block), MOST_PROGRAMS),)
        is_in_place = out is tensor
        scale_kernel[grid](
            out, tensor, scale, size, IS_IN_PLACE=is_in_place, BLOCK=block, num_warps=8
        )


def scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(tensor * scale).to(dtype); scale is a () tensor. Torch is slow where the dtypes differ."""
    tensor = tensor.contiguous()
    out = torch.empty_like(tensor, dtype=dtype)
    _scale(out, tensor, scale)
    return out


def scale_(tensor: Tensor, scale: Tensor) -> None:
    """tensor *= scale, of a contiguous tensor; free where scale is 1."""
    _scale(tensor, tensor, scale)
