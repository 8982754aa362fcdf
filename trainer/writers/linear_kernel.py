"""Products of a few rows with up to three matrices in one launch: what counts is to read the
matrices as fast as memory can.

M rows, K inputs, N outputs of a matrix.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

SLOTS = 3
BLOCK_N, BLOCK_K = 64, 128  # of those tried on an H200 the fastest for 4 to 64 rows


@triton.jit
def linear_rows_kernel(
    input_ptr,  # (M, K)
    input_row_stride,
    weight_0_ptr,  # (N_0, K), contiguous
    weight_1_ptr,
    weight_2_ptr,
    out_ptr,  # (M, N_0 + N_1 + N_2), overwritten
    out_row_stride,
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
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    out_ptrs = out_ptr + rows[None, :] * out_row_stride + (before + outputs)[:, None]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), is_output & is_row)


def num_stages_of(block_m: int) -> int:
    """Blocks of inputs in shared memory, of which a multiprocessor has enough for two programs."""
    return 4 if block_m < 64 else 3


def linear_rows(
    rows: Tensor,  # (M, K), contiguous rows
    weights: Sequence[Tensor],  # (N, K) each, contiguous, at most SLOTS
    out: Tensor,  # (M, sum of N), a slice of contiguous rows
) -> None:
    sizes = [len(weight) for weight in weights]
    missing = SLOTS - len(weights)
    grid = (sum(triton.cdiv(size, BLOCK_N) for size in sizes),)
    block_m = max(16, triton.next_power_of_2(len(rows)))
    linear_rows_kernel[grid](
        *(rows, rows.stride(0), *weights, *[weights[0]] * missing, out, out.stride(0)),
        *(*rows.shape, *sizes, *[0] * missing),
        BLOCK_M=block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        SLOTS=len(weights),
        num_stages=num_stages_of(block_m),
    )
