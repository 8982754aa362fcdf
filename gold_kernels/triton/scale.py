"""A tensor times a scalar of the device, into another dtype, in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import is_interpreted


@triton.jit
def scale_kernel(out_ptr, tensor_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < size
    values = tl.load(tensor_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
    scaled = values * tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=is_inside)


def scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(tensor * scale).to(dtype); scale is a () tensor. Torch is slow where the dtypes differ."""
    tensor = tensor.contiguous()
    out = torch.empty_like(tensor, dtype=dtype)
    block = 1 << 16 if is_interpreted() else 4096
    if tensor.numel():
        grid = (triton.cdiv(tensor.numel(), block),)
        scale_kernel[grid](out, tensor, scale, tensor.numel(), BLOCK=block, num_warps=8)
    return out
