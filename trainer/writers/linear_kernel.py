"""Products of a few rows with up to three matrices in one launch: what counts is to read the
matrices as fast as memory can.

M rows, K inputs, N outputs of a matrix.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS = 3


@triton.jit
def linear_rows_kernel(
    input_ptr,  # (M, K)
    input_row_stride,
    weight_0_ptr,  # (N_0, K), contiguous
    weight_1_ptr,
    weight_2_ptr,
    out_ptr,  # (M, N_0 + N_1 + N_2), overwritten
    num_rows,
    num_inputs,
    num_outputs_0,
    num_outputs_1,
    num_outputs_2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    tile = tl.program_id(0)
    weight_ptr, num_outputs, before = weight_0_ptr, num_outputs_0, 0
    if SLOTS > 1:
        tiles = tl.cdiv(num_outputs_0, BLOCK_N)
        if tile >= tiles:
            weight_ptr, num_outputs, before = weight_1_ptr, num_outputs_1, num_outputs_0
            tile -= tiles
            if SLOTS > 2:
                tiles = tl.cdiv(num_outputs_1, BLOCK_N)
                if tile >= tiles:
                    weight_ptr, num_outputs = weight_2_ptr, num_outputs_2
                    before = num_outputs_0 + num_outputs_1
                    tile -= tiles
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, inputs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :]
    input_ptrs = input_ptr + rows[None, :] * input_row_stride + inputs[:, None]
    is_output, is_row = (outputs < num_outputs)[:, None], (rows < num_rows)[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        is_input = inputs < num_inputs - start
        weight = tl.load(
            weight_ptrs + start, is_output & is_input[None, :], 0.0, eviction_policy="evict_first"
        )
        x = tl.load(input_ptrs + start, is_row & is_input[:, None], 0.0)
        sums = tl.dot(weight, x, sums)
    num_columns = num_outputs_0 + num_outputs_1 + num_outputs_2
    out_ptrs = out_ptr + rows[None, :] * num_columns + (before + outputs)[:, None]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), is_output & is_row)


def linear_rows(
    rows: Tensor,  # (M, K), contiguous rows
    weights: Sequence[Tensor],  # (N, K) each
    block_n: int = 16,
    block_k: int = 256,
    num_stages: int = 5,
    num_warps: int = 4,
) -> Tensor:  # (M, sum of N)
    sizes = [len(weight) for weight in weights]
    out = torch.empty(len(rows), sum(sizes), dtype=rows.dtype, device=rows.device)
    num_missing = SLOTS - len(weights)
    grid = (sum(triton.cdiv(size, block_n) for size in sizes),)
    linear_rows_kernel[grid](
        *(rows, rows.stride(0), *weights, *weights[:1] * num_missing, out),
        *(*rows.shape, *sizes, *[0] * num_missing),
        BLOCK_M=max(16, triton.next_power_of_2(len(rows))),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        SLOTS=len(weights),
        num_stages=num_stages,
        num_warps=num_warps,
    )
    return out
