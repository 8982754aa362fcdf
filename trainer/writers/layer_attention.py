"""Attention of one new token a row, from its projections on: norms of heads, rotary positions, the
new key and value into the cache, and softmax(q k^T) v over what the row sees.

B rows, H heads of keys, G queries that share a head's keys, L tokens that the cache has room for,
D width of a head, S programs of each head. Parts are joined as in attention_kernel.py, here by the
program that is the last to end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers.attention_kernel import MAX_PARTS


class Dealt(NamedTuple):
    """How tokens of the cache are dealt out to programs."""

    tokens: int  # BLOCK_L, for heads of 128 in 16 bits
    stages: int
    warps: int
    programs: int  # altogether, where there are tokens enough


# Of those tried on an H200 near the fastest for 4, 16 and 64 rows of 8 heads.
DEALT = Dealt(32, 3, 2, 512)


class Rotary(NamedTuple):
    """Norms and positions of queries and keys."""

    query_norm: Tensor | None  # (D,)
    key_norm: Tensor | None
    query_eps: float
    key_eps: float
    cos: Tensor  # (B, D)
    sin: Tensor  # (B, D)


@triton.jit
def _turned(
    ptrs,
    partners,
    is_read,
    norm,
    partner_norm,
    cos,
    sin,
    eps,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Rows at a position: x cos + y sin, y the other half of x."""
    x = tl.load(ptrs, is_read, 0.0).to(tl.float32)
    y = tl.load(partners, is_read, 0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
        x, y = x * scale * norm, y * scale * partner_norm
    return x * cos + y * sin


@triton.jit
def attend_new_kernel(
    states_ptr,  # (B, (H * G + 2 * H) * D): queries, keys, values
    states_row_stride,
    query_norm_ptr,  # (D,)
    key_norm_ptr,
    query_eps,
    key_eps,
    cos_ptr,  # (B, D)
    cos_row_stride,
    sin_ptr,
    sin_row_stride,
    key_ptr,  # (B, H, L, D), changed at the position
    key_row_stride,
    key_head_stride,
    key_token_stride,
    value_ptr,  # (B, H, L, D), changed at the position
    value_row_stride,
    value_head_stride,
    value_token_stride,
    position_ptr,  # (1,)
    first_ptr,  # (B,): the first token that a row sees
    mask_ptr,  # (B, L): 0 is hidden
    mask_row_stride,
    parts_ptr,  # (B * H, S, G, D) float32, overwritten
    sums_ptr,  # (B * H, S, 2, G) float32, overwritten
    counts_ptr,  # (B * H,) int32, 0 before and after
    out_ptr,  # (B, H * G * D), contiguous, overwritten
    num_heads,
    num_tokens,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    pair, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = (pair // num_heads).to(tl.int64), pair % num_heads
    queries, columns, places = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_L)
    half: tl.constexpr = WIDTH // 2
    is_column = (columns < WIDTH)[None, :]
    partners = tl.where(columns < half, columns + half, columns - half)[None, :]
    cos = tl.load(cos_ptr + row * cos_row_stride + columns[None, :], is_column, 0.0)
    sin = tl.load(sin_ptr + row * sin_row_stride + columns[None, :], is_column, 0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    sin = tl.where(columns[None, :] < half, -sin, sin)
    norm, partner_norm = cos, cos  # not read
    if HAS_NORM:
        norm = tl.load(query_norm_ptr + columns[None, :], is_column, 0.0).to(tl.float32)
        partner_norm = tl.load(query_norm_ptr + partners, is_column, 0.0).to(tl.float32)
    states_ptr += row * states_row_stride
    is_query = (queries < GROUP)[:, None] & is_column
    ptrs = states_ptr + (head * GROUP + queries)[:, None] * WIDTH
    query = _turned(
        ptrs + columns[None, :],
        ptrs + partners,
        is_query,
        norm,
        partner_norm,
        cos,
        sin,
        query_eps,
        WIDTH,
        HAS_NORM,
    )
    if HAS_NORM:
        norm = tl.load(key_norm_ptr + columns[None, :], is_column, 0.0).to(tl.float32)
        partner_norm = tl.load(key_norm_ptr + partners, is_column, 0.0).to(tl.float32)
    ptrs = states_ptr + (num_heads * GROUP + head) * WIDTH
    new_key = _turned(
        ptrs + columns[None, :],
        ptrs + partners,
        is_column,
        norm,
        partner_norm,
        cos,
        sin,
        key_eps,
        WIDTH,
        HAS_NORM,
    ).to(key_ptr.dtype.element_ty)
    ptrs += num_heads * WIDTH + columns[None, :]
    new_value = tl.load(ptrs, is_column, 0.0).to(value_ptr.dtype.element_ty)
    query = query.to(key_ptr.dtype.element_ty)
    key_ptr += row * key_row_stride + head * key_head_stride
    value_ptr += row * value_row_stride + head * value_head_stride
    position, first = tl.load(position_ptr), 0
    if HAS_MASK:
        first = tl.load(first_ptr + row)
    is_whole = part == 0  # this one has the new token too
    highest = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), 1) * scale
    highest = tl.where(is_whole, highest, -1e30)
    total = tl.where(is_whole, tl.full((BLOCK_G,), 1.0, tl.float32), 0.0)
    states = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    states += tl.where(is_whole, new_value.to(tl.float32), 0.0)
    for start in range(first + part * BLOCK_L, position, num_parts * BLOCK_L):
        tokens = start + places
        is_seen = tokens < position
        is_read = is_seen[:, None] & is_column
        key = tl.load(key_ptr + tokens[:, None] * key_token_stride + columns[None, :], is_read, 0.0)
        value_ptrs = value_ptr + tokens[:, None] * value_token_stride + columns[None, :]
        value = tl.load(value_ptrs, is_read, 0.0)
        if HAS_MASK:
            is_seen = tl.load(mask_ptr + row * mask_row_stride + tokens, is_seen, 0) != 0
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        probs, fade = tl.exp(scores - now[:, None]), tl.exp(highest - now)
        total = total * fade + tl.sum(probs, 1)
        products = tl.dot(probs.to(value.dtype), value, input_precision="ieee")
        states = states * fade[:, None] + products
        highest = now
    if is_whole:
        tl.store(key_ptr + position * key_token_stride + columns[None, :], new_key, is_column)
        tl.store(value_ptr + position * value_token_stride + columns[None, :], new_value, is_column)
    out_ptr += pair.to(tl.int64) * GROUP * WIDTH
    if not IS_SPLIT:
        out_ptrs = out_ptr + queries[:, None] * WIDTH + columns[None, :]
        tl.store(out_ptrs, (states / total[:, None]).to(out_ptr.dtype.element_ty), is_query)
    else:
        place = pair.to(tl.int64) * num_parts + part
        ptrs = parts_ptr + place * GROUP * WIDTH + queries[:, None] * WIDTH + columns[None, :]
        tl.store(ptrs, states, is_query)
        tl.store(sums_ptr + place * 2 * GROUP + queries, highest, queries < GROUP)
        tl.store(sums_ptr + (place * 2 + 1) * GROUP + queries, total, queries < GROUP)
        tl.debug_barrier()  # all of them, before this program counts as arrived
        if tl.atomic_add(counts_ptr + pair, 1) == num_parts - 1:
            tl.store(counts_ptr + pair, 0)
            place = pair.to(tl.int64) * num_parts
            _join(parts_ptr, sums_ptr, out_ptr, place, num_parts, GROUP, WIDTH, BLOCK_S, BLOCK_D)


@triton.jit
def _join(
    parts_ptr,
    sums_ptr,
    out_ptr,
    first,
    num_parts,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    parts, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    is_part, place = parts < num_parts, first + parts
    is_state = is_part[:, None] & (columns < WIDTH)[None, :]
    for query in tl.static_range(GROUP):
        sums_ptrs = sums_ptr + place * 2 * GROUP + query
        highest = tl.load(sums_ptrs, is_part, -1e30, cache_modifier=".cg")
        total = tl.load(sums_ptrs + GROUP, is_part, 0.0, cache_modifier=".cg")
        share = tl.exp(highest - tl.max(highest))
        ptrs = parts_ptr + (place * GROUP + query)[:, None] * WIDTH + columns[None, :]
        states = tl.load(ptrs, is_state, 0.0, cache_modifier=".cg")
        states = tl.sum(states * share[:, None], 0) / tl.sum(total * share)
        out_ptrs = out_ptr + query * WIDTH + columns
        tl.store(out_ptrs, states.to(out_ptr.dtype.element_ty), columns < WIDTH)


def num_parts_of(num_pairs: int, num_tokens: int, dealt: Dealt) -> int:
    """S: one where rows and heads alone keep a device busy."""
    blocks = triton.cdiv(num_tokens, dealt.tokens)
    most = 2 if is_interpreted() else min(MAX_PARTS, dealt.programs // num_pairs)
    return max(1, min(most, blocks))


def attend_new(
    states: Tensor,  # (B, (H * G + 2 * H) * D), contiguous
    rotary: Rotary,
    key: Tensor,  # (B, H, L, D), changed at the position
    value: Tensor,  # (B, H, L, D), changed at the position
    position: Tensor,  # (1,)
    mask: Tensor | None,  # (B, L) bool; of the tokens behind the new one it shows none
    first: Tensor | None,  # (B,) the first token that the mask shows
    scale: float,
    counts: Tensor,  # (B * H,) int32 of 0
    dealt: Dealt = DEALT,
) -> Tensor:  # (B, H * G * D)
    """softmax(scale q k^T) v of the new token and those before it that the mask shows."""
    num_rows, num_heads, num_tokens, width = key.shape
    group, num_pairs = states.shape[1] // (num_heads * width) - 2, num_rows * num_heads
    num_parts = num_parts_of(num_pairs, num_tokens, dealt)
    parts = states.new_empty(num_pairs, num_parts, group, width, dtype=torch.float32)
    sums = states.new_empty(num_pairs, num_parts, 2, group, dtype=torch.float32)
    out = states.new_empty(num_rows, num_heads * group * width)
    has_norm = rotary.query_norm is not None
    block_d = max(16, triton.next_power_of_2(width))
    is_wide = block_d * key.element_size() > 256
    attend_new_kernel[(num_pairs, num_parts)](
        *(states, states.stride(0)),
        *((rotary.query_norm, rotary.key_norm) if has_norm else (states, states)),
        *(rotary.query_eps, rotary.key_eps),
        *(rotary.cos, rotary.cos.stride(0), rotary.sin, rotary.sin.stride(0)),
        *(key, *key.stride()[:3], value, *value.stride()[:3], position),
        *((position, position, 0) if mask is None else (first, mask, mask.stride(0))),
        *(parts, sums, counts, out, num_heads, num_tokens, scale),
        GROUP=group,
        WIDTH=width,
        HAS_NORM=has_norm,
        HAS_MASK=mask is not None,
        IS_SPLIT=num_parts > 1,
        BLOCK_S=MAX_PARTS,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_L=dealt.tokens // (1 + is_wide),
        num_warps=dealt.warps,
        num_stages=dealt.stages,
    )
    return out
