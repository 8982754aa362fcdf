"""Products of a decoder layer with what stands before and behind them: norms, gates, sums.

An RMS norm in front of a product is a number of its row and one of its column:

    y = W (w * x / rms(x)) = (W (w * x)) / rms(x)

Whoever makes x also writes w * x, in the weights' dtype, and sums of squares of parts of x. So a
product reads one input, and divides by rms(x) what comes out.

M rows, K inputs, N outputs, T parts of the sums of squares, S parts of a sum over the inputs.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS = 3


class Blocks(NamedTuple):
    """How a product is dealt out to programs."""

    outputs: int
    inputs: int
    stages: int
    warps: int
    parts: int = 1  # S


class Normed(NamedTuple):
    """An input x of a product behind a norm."""

    scaled: Tensor  # (M, K): w * x
    squares: Tensor  # (T, M) float32
    eps: float


@triton.jit(do_not_specialize=["num_rows"])
def scale_rows_kernel(
    hidden_ptr,  # (M, K), contiguous rows
    hidden_row_stride,
    norm_ptr,  # (K,)
    scaled_ptr,  # (M, K), overwritten
    squares_ptr,  # (T, M) float32, overwritten
    num_rows,
    num_inputs,
    num_squares,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row, inputs, parts = tl.program_id(0), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    is_input = inputs < num_inputs
    x = tl.load(hidden_ptr + row * hidden_row_stride + inputs, is_input, 0.0).to(tl.float32)
    norm = tl.load(norm_ptr + inputs, is_input, 0.0).to(tl.float32)
    scaled = (x * norm).to(scaled_ptr.dtype.element_ty)
    tl.store(scaled_ptr + row * num_inputs + inputs, scaled, is_input)
    squares = tl.where(parts == 0, tl.sum(x * x), 0.0)
    tl.store(squares_ptr + parts * num_rows + row, squares, parts < num_squares)


@triton.jit(do_not_specialize=["num_rows"])
def normed_product_kernel(
    input_ptr,  # (M, K), contiguous
    squares_ptr,  # (T, M) float32
    weight_0_ptr,  # (N_0, K), contiguous
    weight_1_ptr,
    weight_2_ptr,
    bias_0_ptr,  # (N_0,)
    bias_1_ptr,
    bias_2_ptr,
    out_ptr,  # (M, N_0 + N_1 + N_2), or gated (M, N_0); overwritten
    out_row_stride,
    parts_ptr,  # (tiles, S, 1 or 2, BLOCK_N, BLOCK_M) float32, overwritten
    counts_ptr,  # (tiles,) int32, 0 before and after
    num_rows,
    num_outputs_0,
    num_outputs_1,
    num_outputs_2,
    num_squares,
    eps,
    NUM_INPUTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,  # silu of the first product times the second
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    slot = tile
    weight_ptr, bias_ptr, num_outputs, before = weight_0_ptr, bias_0_ptr, num_outputs_0, 0
    if not IS_GATED:
        tiles = tl.cdiv(num_outputs_0, BLOCK_N)
        if tile >= tiles:
            weight_ptr, bias_ptr, num_outputs = weight_1_ptr, bias_1_ptr, num_outputs_1
            before = num_outputs_0
            tile -= tiles
            tiles = tl.cdiv(num_outputs_1, BLOCK_N)
            if tile >= tiles:
                weight_ptr, bias_ptr, num_outputs = weight_2_ptr, bias_2_ptr, num_outputs_2
                before = num_outputs_0 + num_outputs_1
                tile -= tiles
    outputs, rows = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    size: tl.constexpr = (NUM_INPUTS + NUM_PARTS - 1) // NUM_PARTS
    inputs, parts = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    # what lies beyond is read as the last one, and not written
    read_rows = tl.minimum(rows, num_rows - 1)
    places = tl.minimum(outputs, num_outputs - 1).to(tl.int64)[:, None] * NUM_INPUTS
    places += part * size + inputs[None, :]
    input_ptrs = input_ptr + read_rows[None, :] * NUM_INPUTS + part * size + inputs[:, None]
    squares = tl.load(
        squares_ptr + parts[:, None] * num_rows + read_rows[None, :],
        (parts < num_squares)[:, None],
        0.0,
    )
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    others = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, size, BLOCK_K):
        is_input = (start + inputs < size) & (part * size + start + inputs < NUM_INPUTS)
        if NUM_INPUTS % NUM_PARTS == 0 and size % BLOCK_K == 0:
            x = tl.load(input_ptrs + start)
            weight = tl.load(weight_ptr + places + start, eviction_policy="evict_first")
        else:
            x = tl.load(input_ptrs + start, is_input[:, None], 0.0)
            weight = tl.load(weight_ptr + places + start, is_input[None, :], 0.0)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
        if IS_GATED:
            if NUM_INPUTS % NUM_PARTS == 0 and size % BLOCK_K == 0:
                weight = tl.load(weight_1_ptr + places + start, eviction_policy="evict_first")
            else:
                weight = tl.load(weight_1_ptr + places + start, is_input[None, :], 0.0)
            others = tl.dot(weight, x, others, input_precision="ieee")
    arrived = NUM_PARTS - 1
    if NUM_PARTS > 1:
        block: tl.constexpr = BLOCK_N * BLOCK_M
        own = parts_ptr + (slot * NUM_PARTS * (1 + IS_GATED)) * block
        own += tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + rows[None, :]
        tl.store(own + part * block, sums)
        if IS_GATED:
            tl.store(own + (NUM_PARTS + part) * block, others)
        tl.debug_barrier()  # all of them, before this program counts as arrived
        arrived = tl.atomic_add(counts_ptr + slot, 1)
    if arrived == NUM_PARTS - 1:  # the last one sums, in an order that is always the same
        if NUM_PARTS > 1:
            tl.store(counts_ptr + slot, 0)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            others = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.static_range(NUM_PARTS):
                sums += tl.load(own + i * block, cache_modifier=".cg")
                if IS_GATED:
                    others += tl.load(own + (NUM_PARTS + i) * block, cache_modifier=".cg")
        scale = tl.rsqrt(tl.sum(squares, 0) / NUM_INPUTS + eps)[None, :]
        sums *= scale
        if HAS_BIAS:
            bias = tl.load(bias_ptr + outputs, outputs < num_outputs, 0.0)
            sums += bias.to(tl.float32)[:, None]
        if IS_GATED:
            sums = sums * tl.sigmoid(sums) * (others * scale)
        out_ptrs = out_ptr + rows[None, :] * out_row_stride + (before + outputs)[:, None]
        is_out = (outputs < num_outputs)[:, None] & (rows < num_rows)[None, :]
        tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), is_out)


@triton.jit(do_not_specialize=["num_rows"])
def added_product_kernel(
    input_ptr,  # (M, K), contiguous
    weight_ptr,  # (N, K), contiguous
    residual_ptr,  # (M, N), contiguous rows
    residual_row_stride,
    norm_ptr,  # (N,)
    out_ptr,  # (M, N), overwritten: what was there and the product
    scaled_ptr,  # (M, N), overwritten
    squares_ptr,  # (T, M) float32, overwritten
    parts_ptr,  # (T, S, BLOCK_N, BLOCK_M) float32, overwritten
    counts_ptr,  # (T,) int32, 0 before and after
    num_rows,
    num_outputs,
    NUM_INPUTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    outputs, rows = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    inputs = tl.arange(0, BLOCK_K)
    read_rows, read_outputs = tl.minimum(rows, num_rows - 1), tl.minimum(outputs, num_outputs - 1)
    weight_ptrs = weight_ptr + read_outputs.to(tl.int64)[:, None] * NUM_INPUTS + inputs[None, :]
    input_ptrs = input_ptr + read_rows[None, :] * NUM_INPUTS + inputs[:, None]
    size: tl.constexpr = (NUM_INPUTS + NUM_PARTS - 1) // NUM_PARTS
    first = part * size
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, size, BLOCK_K):
        if NUM_INPUTS % NUM_PARTS == 0 and size % BLOCK_K == 0:
            weight = tl.load(weight_ptrs + first + start, eviction_policy="evict_first")
            x = tl.load(input_ptrs + first + start)
        else:
            is_input = (start + inputs < size) & (first + start + inputs < NUM_INPUTS)
            weight = tl.load(weight_ptrs + first + start, is_input[None, :], 0.0)
            x = tl.load(input_ptrs + first + start, is_input[:, None], 0.0)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    arrived = NUM_PARTS - 1
    if NUM_PARTS > 1:
        own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + rows[None, :]
        own += tile * NUM_PARTS * BLOCK_N * BLOCK_M
        tl.store(parts_ptr + own + part * BLOCK_N * BLOCK_M, sums)
        tl.debug_barrier()  # all of them, before this program counts as arrived
        arrived = tl.atomic_add(counts_ptr + tile, 1)
    if arrived == NUM_PARTS - 1:  # the last one sums, in an order that is always the same
        if NUM_PARTS > 1:
            tl.store(counts_ptr + tile, 0)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.static_range(NUM_PARTS):
                sums += tl.load(parts_ptr + own + i * BLOCK_N * BLOCK_M, cache_modifier=".cg")
        is_out = (outputs < num_outputs)[:, None] & (rows < num_rows)[None, :]
        places = rows[None, :] * residual_row_stride + outputs[:, None]
        sums += tl.load(residual_ptr + places, is_out, 0.0).to(tl.float32)
        states = sums.to(out_ptr.dtype.element_ty)
        norm = tl.load(norm_ptr + outputs, outputs < num_outputs, 0.0).to(tl.float32)
        places = rows[None, :] * num_outputs + outputs[:, None]
        tl.store(out_ptr + places, states, is_out)
        sums = tl.where(is_out, states.to(tl.float32), 0.0)
        scaled = (sums * norm[:, None]).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + places, scaled, is_out)
        squares = tl.sum(sums * sums, 0)
        tl.store(squares_ptr + tile * num_rows + rows, squares, rows < num_rows)


@functools.cache
def shared_bytes(device: int) -> int:
    """That a program may have at most."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def stages_of(blocks: Blocks, block_bytes: int, most: int) -> int:
    """How many blocks of all inputs there is shared memory for, at most as many as are wanted."""
    return max(1, min(blocks.stages, most // block_bytes))


def block_bytes(blocks: Blocks, num_rows: int, num_matrices: int, element_size: int) -> int:
    """Bytes of a block of rows and of a block of each matrix."""
    numbers = blocks.inputs * (blocks.outputs * num_matrices + block_of_rows(num_rows))
    return numbers * element_size


def _stages(x: Tensor, blocks: Blocks, num_matrices: int) -> int:
    if not x.is_cuda:
        return blocks.stages
    size = block_bytes(blocks, len(x), num_matrices, x.element_size())
    return stages_of(blocks, size, shared_bytes(x.device.index))


def block_of_rows(num_rows: int) -> int:
    return max(16, triton.next_power_of_2(num_rows))


def scale_rows(hidden: Tensor, norm: Tensor, scaled: Tensor, squares: Tensor) -> None:
    """Writes scaled and squares of hidden (M, K), whose norm has the weight."""
    num_rows, num_inputs = hidden.shape
    scale_rows_kernel[(num_rows,)](
        *(hidden, hidden.stride(0), norm, scaled, squares),
        *(num_rows, num_inputs, len(squares)),
        BLOCK_K=triton.next_power_of_2(num_inputs),
        BLOCK_T=triton.next_power_of_2(len(squares)),
        num_warps=8,
    )


def normed_product(
    x: Normed,
    weights: Sequence[Tensor],  # (N, K) each, contiguous: at most SLOTS, or gate and up
    biases: Sequence[Tensor] | None,  # (N,) each
    out: Tensor,  # (M, sum of N) or gated (M, N), contiguous rows
    parts: Tensor,  # float32, of parts_size()
    counts: Tensor,  # (tiles,) int32 of 0
    blocks: Blocks,
    *,
    is_gated: bool = False,
) -> None:
    num_rows, num_inputs = x.scaled.shape
    sizes = [len(weight) for weight in weights]
    own = sizes[:1] if is_gated else sizes
    missing = SLOTS - len(weights)
    given = biases or weights
    normed_product_kernel[(sum(num_tiles(size, blocks) for size in own), blocks.parts)](
        *(x.scaled, x.squares, *weights, *[weights[0]] * missing, *given, *[given[0]] * missing),
        *(out, out.stride(0), parts, counts, num_rows),
        *(*sizes, *[0] * missing, len(x.squares), x.eps),
        NUM_INPUTS=num_inputs,
        NUM_PARTS=blocks.parts,
        HAS_BIAS=biases is not None,
        IS_GATED=is_gated,
        BLOCK_T=triton.next_power_of_2(len(x.squares)),
        BLOCK_M=block_of_rows(num_rows),
        BLOCK_N=blocks.outputs,
        BLOCK_K=blocks.inputs,
        num_stages=_stages(x.scaled, blocks, 1 + is_gated),
        num_warps=blocks.warps,
    )


def added_product(
    x: Tensor,  # (M, K), contiguous
    weight: Tensor,  # (N, K), contiguous
    residual: Tensor,  # (M, N), contiguous rows
    norm: Tensor,  # (N,) weight of the norm behind
    out: Tensor,  # (M, N), overwritten
    scaled: Tensor,  # (M, N), overwritten
    squares: Tensor,  # (T, M), overwritten
    parts: Tensor,  # float32, of parts_size()
    counts: Tensor,  # (T,) int32 of 0
    blocks: Blocks,
) -> None:
    added_product_kernel[(num_tiles(len(weight), blocks), blocks.parts)](
        *(x, weight, residual, residual.stride(0), norm, out, scaled, squares, parts, counts),
        *(len(x), len(weight)),
        NUM_INPUTS=x.shape[1],
        NUM_PARTS=blocks.parts,
        BLOCK_M=block_of_rows(len(x)),
        BLOCK_N=blocks.outputs,
        BLOCK_K=blocks.inputs,
        num_stages=_stages(x, blocks, 1),
        num_warps=blocks.warps,
    )


def num_tiles(num_outputs: int, blocks: Blocks) -> int:
    """T of what a product writes."""
    return triton.cdiv(num_outputs, blocks.outputs)


def parts_size(num_rows: int, num_outputs: Sequence[int], blocks: Blocks) -> int:
    """Numbers of the sums of parts, for matrices with these outputs."""
    if blocks.parts == 1:
        return 0
    tiles = sum(num_tiles(size, blocks) for size in num_outputs)
    return tiles * blocks.parts * blocks.outputs * block_of_rows(num_rows)
