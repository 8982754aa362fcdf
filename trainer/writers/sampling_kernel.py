"""draw() of sampling.py as one kernel: nucleus, min_p and the draw, one program a row.

B rows, V entries. Pass 1 takes the maximum, pass 2 the sum of exponentials. The threshold of the
nucleus is found bit by bit, a pass each over a row that lies in the cache of the device; the last
pass draws with Gumbel's trick.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers.writer import Sampling

HASH_0 = tl.constexpr(0x9E3779B1 - 2**32)
HASH_1 = tl.constexpr(0x85EBCA6B - 2**32)
HASH_2 = tl.constexpr(0xC2B2AE35 - 2**32)


@triton.jit
def _mixed(x, key):
    x = (x + key) * HASH_0
    x = (x ^ ((x >> 16) & 0xFFFF)) * HASH_1
    x = (x ^ ((x >> 13) & 0x7FFFF)) * HASH_2
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _log_exponential(x):
    """log E of 31 bits of a hash; a series where 1 - u would lose the bits of u."""
    u = ((x & 0x7FFFFFFF).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2**-31
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25)))
    return tl.log(tl.where(u < 0.01, series, -tl.log(tl.maximum(1.0 - u, 1e-10))))


@triton.jit
def draw_rows_kernel(
    logits_ptr,  # (B, V) float32
    logits_row_stride,
    keys_ptr,  # (B, 2) int32, contiguous
    ids_ptr,  # (B,) int64, overwritten
    logprobs_ptr,  # (B,) float32, overwritten
    num_entries,
    top_p,
    log_min_p,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    entries = tl.arange(0, BLOCK_V)
    highest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for start in range(0, num_entries, BLOCK_V):
        x = tl.load(row_ptr + start + entries, start + entries < num_entries, float("-inf"))
        highest = tl.maximum(highest, x)
    largest = tl.max(highest)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, num_entries, BLOCK_V):
        x = tl.load(row_ptr + start + entries, start + entries < num_entries, float("-inf"))
        sums += tl.exp(x - largest)
    total = tl.sum(sums)
    low = tl.full((), 0, tl.int32)
    if HAS_TOP_P:
        bit = tl.full((), 1 << 30, tl.int32)  # the highest of a float that is not negative
        for _ in range(31):
            middle = low + bit
            bit = bit >> 1
            sums = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, num_entries, BLOCK_V):
                x = tl.load(row_ptr + start + entries, start + entries < num_entries, float("-inf"))
                p = tl.exp(x - largest) / total
                sums += tl.where(p.to(tl.int32, bitcast=True) >= middle, p, 0.0)
            low = tl.where(tl.sum(sums) >= top_p, middle, low)
    key_0, key_1 = tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1)
    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    places = tl.zeros((BLOCK_V,), tl.int32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, num_entries, BLOCK_V):
        x = tl.load(row_ptr + start + entries, start + entries < num_entries, float("-inf"))
        p = tl.exp(x - largest) / total
        is_kept = (p.to(tl.int32, bitcast=True) >= low) & (x > float("-inf"))
        if HAS_MIN_P:
            is_kept = is_kept & (x >= largest + log_min_p)
        sums += tl.where(is_kept, tl.exp(x - largest), 0.0)
        noise = _log_exponential(_mixed(_mixed(start + entries, key_0), key_1))
        score = tl.where(is_kept, x - noise, float("-inf"))
        is_better = score > best
        best = tl.where(is_better, score, best)
        places = tl.where(is_better, start + entries, places)
    winner = tl.min(tl.where(best == tl.max(best), places, num_entries))
    tl.store(ids_ptr + row, winner.to(tl.int64))
    chosen = tl.load(row_ptr + winner)
    tl.store(logprobs_ptr + row, chosen - largest - tl.log(tl.sum(sums)))


def draw_rows(logits: Tensor, keys: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """See draw(); logits float32, without those that top_k leaves out."""
    num_rows, num_entries = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, device=logits.device)
    width = max(16, 1 << (num_entries - 1).bit_length())
    draw_rows_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        keys.contiguous(),
        ids,
        logprobs,
        num_entries,
        sampling.top_p,
        math.log(sampling.min_p) if sampling.min_p else 0.0,
        HAS_TOP_P=sampling.top_p < 1,
        HAS_MIN_P=bool(sampling.min_p),
        BLOCK_V=min(width, 1 << 16 if is_interpreted() else 1 << 13),
        num_warps=32,
    )
    return ids, logprobs
