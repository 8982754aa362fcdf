"""draw() of sampling.py as kernels: nucleus, min_p and the draw, S programs a row.

B rows, V entries, in S parts of C. The first kernel takes each part's maximum and sum of
exponentials. The threshold of the nucleus is found four bits of its float at a time, by the masses
of 15 candidates; the next draws in each part with Gumbel's trick, and the last joins the parts.
Every sum has one order, so that a row's token depends on nothing beside it.
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
# Bits below which four are decided: a probability is at most 1.0, whose float has 30.
SHIFTS = (26, 22, 18, 14, 10, 6, 2, 0)
CANDIDATES = 16
NUM_PARTS = 32


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
def _row_sums(parts_ptr, row, PARTS: tl.constexpr):
    """Maximum of a row and its sum of exponentials, of those of the parts."""
    parts = row * PARTS + tl.arange(0, PARTS)
    highest, sums = tl.load(parts_ptr + 2 * parts), tl.load(parts_ptr + 2 * parts + 1)
    largest = tl.max(highest)
    return largest, tl.sum(tl.where(sums > 0, sums * tl.exp(highest - largest), 0.0))


@triton.jit
def _threshold(low_ptr, masses_ptr, row, shift, top_p, PARTS: tl.constexpr, COUNT: tl.constexpr):
    """The bits found so far, with those that masses of candidates above them decide."""
    parts, candidates = tl.arange(0, PARTS)[:, None], tl.arange(0, COUNT)[None, :]
    masses = tl.load(masses_ptr + (row * PARTS + parts) * COUNT + candidates)
    is_enough = (tl.sum(masses, 0) >= top_p) & (tl.arange(0, COUNT) > 0)
    steps = tl.max(tl.where(is_enough, tl.arange(0, COUNT), 0))
    return tl.load(low_ptr + row) + (steps << shift)


@triton.jit
def sum_parts_kernel(
    logits_ptr,  # (B, V) float32
    logits_row_stride,
    parts_ptr,  # (B, S, 2), overwritten: maximum, sum of exponentials
    num_entries,
    part_size,
    PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum((part + 1) * part_size, num_entries)
    highest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for start in range(part * part_size, end, BLOCK_V):
        entries = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * logits_row_stride + entries, entries < end, float("-inf"))
        highest = tl.maximum(highest, x)
    largest = tl.max(highest)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(part * part_size, end, BLOCK_V):
        entries = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * logits_row_stride + entries, entries < end, float("-inf"))
        sums += tl.where(x > float("-inf"), tl.exp(x - largest), 0.0)
    place = parts_ptr + 2 * (row * PARTS + part)
    tl.store(place, largest)
    tl.store(place + 1, tl.sum(sums))


@triton.jit
def weigh_candidates_kernel(
    logits_ptr,  # (B, V) float32
    logits_row_stride,
    parts_ptr,  # (B, S, 2)
    last_low_ptr,  # (B,) int32: bits before those that last_masses decide
    last_masses_ptr,  # (B, S, COUNT)
    last_shift,
    low_ptr,  # (B,) int32, overwritten
    masses_ptr,  # (B, S, COUNT) float32, overwritten: of entries of at least each candidate
    shift,
    num_entries,
    part_size,
    top_p,
    IS_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest, total = _row_sums(parts_ptr, row, PARTS)
    low = tl.full((), 0, tl.int32)
    if not IS_FIRST:
        low = _threshold(last_low_ptr, last_masses_ptr, row, last_shift, top_p, PARTS, COUNT)
    tl.store(low_ptr + row, low)  # every part the same
    candidates = low + (tl.arange(0, COUNT) << shift)
    end = tl.minimum((part + 1) * part_size, num_entries)
    masses = tl.zeros((COUNT, BLOCK_V), tl.float32)
    for start in range(part * part_size, end, BLOCK_V):
        entries = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * logits_row_stride + entries, entries < end, float("-inf"))
        p = tl.exp(x - largest) / total
        is_likely = p.to(tl.int32, bitcast=True)[None, :] >= candidates[:, None]
        masses += tl.where(is_likely, p[None, :], 0.0)
    place = (row * PARTS + part) * COUNT + tl.arange(0, COUNT)
    tl.store(masses_ptr + place, tl.sum(masses, 1))


@triton.jit
def draw_parts_kernel(
    logits_ptr,  # (B, V) float32
    logits_row_stride,
    parts_ptr,  # (B, S, 2)
    low_ptr,  # (B,) int32
    masses_ptr,  # (B, S, COUNT)
    keys_ptr,  # (B, 2) int32, contiguous
    places_ptr,  # (B, S) int32, overwritten: the best entry of each part
    best_ptr,  # (B, S, 2) float32, overwritten: its score, the sum of what is kept
    num_entries,
    part_size,
    top_p,
    log_min_p,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest, total = _row_sums(parts_ptr, row, PARTS)
    low = tl.full((), 0, tl.int32)
    if HAS_TOP_P:
        low = _threshold(low_ptr, masses_ptr, row, 0, top_p, PARTS, COUNT)
    key_0, key_1 = tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1)
    end = tl.minimum((part + 1) * part_size, num_entries)
    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    places = tl.full((BLOCK_V,), 0, tl.int32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(part * part_size, end, BLOCK_V):
        entries = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * logits_row_stride + entries, entries < end, float("-inf"))
        p = tl.exp(x - largest) / total
        is_kept = (p.to(tl.int32, bitcast=True) >= low) & (x > float("-inf"))
        if HAS_MIN_P:
            is_kept = is_kept & (x >= largest + log_min_p)
        sums += tl.where(is_kept, tl.exp(x - largest), 0.0)
        score = x - _log_exponential(_mixed(_mixed(entries, key_0), key_1))
        is_better = is_kept & (score > best)
        best = tl.where(is_better, score, best)
        places = tl.where(is_better, entries, places)
    highest, place = tl.max(best), row * PARTS + part
    tl.store(places_ptr + place, tl.min(tl.where(best == highest, places, num_entries)))
    tl.store(best_ptr + 2 * place, highest)
    tl.store(best_ptr + 2 * place + 1, tl.sum(sums))


@triton.jit
def join_draws_kernel(
    logits_ptr,  # (B, V) float32
    logits_row_stride,
    parts_ptr,  # (B, S, 2)
    places_ptr,  # (B, S) int32
    best_ptr,  # (B, S, 2) float32
    ids_ptr,  # (B,) int64, overwritten
    logprobs_ptr,  # (B,) float32, overwritten
    num_entries,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest, _ = _row_sums(parts_ptr, row, PARTS)
    parts = row * PARTS + tl.arange(0, PARTS)
    best, places = tl.load(best_ptr + 2 * parts), tl.load(places_ptr + parts)
    winner = tl.min(tl.where(best == tl.max(best), places, num_entries))
    tl.store(ids_ptr + row, winner.to(tl.int64))
    chosen = tl.load(logits_ptr + row * logits_row_stride + winner)
    kept = tl.sum(tl.load(best_ptr + 2 * parts + 1))
    tl.store(logprobs_ptr + row, chosen - largest - tl.log(kept))


def draw_rows(logits: Tensor, keys: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """See draw(); logits float32, without those that top_k leaves out."""
    num_rows, num_entries = logits.shape
    num_parts, block = (4, 1 << 12) if is_interpreted() else (NUM_PARTS, 1 << 10)
    sizes = {"PARTS": num_parts}
    part_size = triton.cdiv(num_entries, num_parts)
    lengths = num_entries, part_size
    rows = logits, logits.stride(0)
    grid = num_rows, num_parts

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    parts = empty(num_parts, 2)
    sum_parts_kernel[grid](*rows, parts, *lengths, **sizes, BLOCK_V=block)
    sizes |= {"COUNT": CANDIDATES}
    low = masses = parts  # read by nobody where there is no threshold yet
    last_shift = 0
    for shift in SHIFTS if sampling.top_p < 1 else ():
        found = low, masses, last_shift
        low = empty(dtype=torch.int32)
        masses, last_shift = empty(num_parts, CANDIDATES), shift
        weigh_candidates_kernel[grid](
            *(*rows, parts, *found, low, masses, shift, *lengths, sampling.top_p),
            IS_FIRST=shift == SHIFTS[0],
            **sizes,
            BLOCK_V=block // 2,
        )
    places, best = empty(num_parts, dtype=torch.int32), empty(num_parts, 2)
    log_min_p = math.log(sampling.min_p) if sampling.min_p else 0.0
    draw_parts_kernel[grid](
        *(*rows, parts, low, masses, keys.contiguous(), places, best, *lengths),
        *(sampling.top_p, log_min_p),
        HAS_TOP_P=sampling.top_p < 1,
        HAS_MIN_P=bool(sampling.min_p),
        **sizes,
        BLOCK_V=block,
    )
    ids, logprobs = empty(dtype=torch.int64), empty()
    join_draws_kernel[(num_rows,)](
        *rows, parts, places, best, ids, logprobs, num_entries, PARTS=num_parts, num_warps=1
    )
    return ids, logprobs
