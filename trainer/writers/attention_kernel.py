"""Attention of one token a row over a cache whose tail is not filled yet.

B rows, H heads of keys, G queries that share a head's keys, L tokens that the cache has room for,
D width of a head. Between the first token that a row sees and its last, blocks of tokens are dealt
out in turn to S programs of each head. A second kernel joins the S parts:

    o = sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) l_s,    m = max_s m_s
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import is_interpreted

BLOCK_L = 64
PROGRAMS = 1024  # a few for each multiprocessor
MAX_PARTS = 16


@triton.jit
def _seen_range(mask_ptr, num_tokens):
    """The first token that a row sees, and the one behind its last."""
    first, end = num_tokens, 0
    for start in range(0, num_tokens, 1024):
        tokens = start + tl.arange(0, 1024)
        is_seen = tl.load(mask_ptr + tokens, tokens < num_tokens, 0) != 0
        first = tl.minimum(first, tl.min(tl.where(is_seen, tokens, num_tokens)))
        end = tl.maximum(end, tl.max(tl.where(is_seen, tokens + 1, 0)))
    return first, end


@triton.jit
def attend_part_kernel(
    query_ptr,  # (B, H * G, D)
    query_row_stride,
    query_head_stride,
    key_ptr,  # (B, H, L, D)
    key_row_stride,
    key_head_stride,
    key_token_stride,
    value_ptr,  # (B, H, L, D)
    value_row_stride,
    value_head_stride,
    value_token_stride,
    mask_ptr,  # (B, L): 0 is hidden
    mask_row_stride,
    states_ptr,  # (B * H, S, G, D) float32, overwritten
    sums_ptr,  # (B * H, S, 2, G) float32, overwritten: m_s and l_s
    num_heads,
    num_tokens,
    scale,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    pair, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, head = (pair // num_heads).to(tl.int64), pair % num_heads
    queries, columns, places = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_L)
    query_ptr += row * query_row_stride + (head * GROUP + queries)[:, None] * query_head_stride
    is_query = (queries < GROUP)[:, None] & (columns < WIDTH)[None, :]
    query = tl.load(query_ptr + columns[None, :], is_query, 0.0)
    key_ptr += row * key_row_stride + head * key_head_stride
    value_ptr += row * value_row_stride + head * value_head_stride
    highest = tl.full((BLOCK_G,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    states = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    first, end = 0, num_tokens
    if HAS_MASK:
        first, end = _seen_range(mask_ptr + row * mask_row_stride, num_tokens)
        first = first // BLOCK_L * BLOCK_L
    for start in range(first + part * BLOCK_L, end, num_parts * BLOCK_L):
        tokens = start + places
        is_read = (tokens < end)[:, None] & (columns < WIDTH)[None, :]
        offsets = tokens[:, None] * key_token_stride + columns[None, :]
        key = tl.load(key_ptr + offsets, is_read, 0.0)
        offsets = tokens[:, None] * value_token_stride + columns[None, :]
        value = tl.load(value_ptr + offsets, is_read, 0.0)
        is_seen = tokens < end
        if HAS_MASK:
            is_seen = tl.load(mask_ptr + row * mask_row_stride + tokens, is_seen, 0) != 0
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        probs = tl.exp(scores - now[:, None])
        fade = tl.exp(highest - now)
        total = total * fade + tl.sum(probs, 1)
        products = tl.dot(probs.to(value.dtype), value, input_precision="ieee")
        states = states * fade[:, None] + products
        highest = now
    place = pair.to(tl.int64) * num_parts + part
    states_ptr += place * GROUP * WIDTH + queries[:, None] * WIDTH + columns[None, :]
    tl.store(states_ptr, states, is_query)
    sums_ptr += place * 2 * GROUP + queries
    tl.store(sums_ptr, highest, queries < GROUP)
    tl.store(sums_ptr + GROUP, total, queries < GROUP)


@triton.jit
def join_parts_kernel(
    states_ptr,  # (B * H, S, G, D) float32
    sums_ptr,  # (B * H, S, 2, G) float32
    out_ptr,  # (B * H, G, D), overwritten
    NUM_PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    is_part, place = parts < NUM_PARTS, pair * NUM_PARTS + parts
    highest = tl.load(sums_ptr + place * 2 * GROUP + query, is_part, -1e30)
    total = tl.load(sums_ptr + place * 2 * GROUP + GROUP + query, is_part, 0.0)
    share = tl.exp(highest - tl.max(highest))
    is_state = is_part[:, None] & (columns < WIDTH)[None, :]
    offsets = (place * GROUP + query)[:, None] * WIDTH + columns[None, :]
    states = tl.load(states_ptr + offsets, is_state, 0.0)
    states = tl.sum(states * share[:, None], 0) / tl.sum(total * share)
    out_ptr += (pair * GROUP + query) * WIDTH + columns
    tl.store(out_ptr, states.to(out_ptr.dtype.element_ty), columns < WIDTH)


def num_parts_of(num_pairs: int, num_tokens: int) -> int:
    """S: one where rows and heads alone keep a device busy."""
    if is_interpreted():
        return min(2, triton.cdiv(num_tokens, BLOCK_L))
    return max(1, min(MAX_PARTS, triton.cdiv(num_tokens, BLOCK_L), PROGRAMS // num_pairs))


def block_of(width: int, element_size: int) -> tuple[int, int]:
    """BLOCK_L, and how many blocks are in shared memory at a time, of which no device has much."""
    return (BLOCK_L, 3) if width * element_size <= 256 else (BLOCK_L // 2, 2)


def attend_rows(
    query: Tensor,  # (B, H * G, D)
    key: Tensor,  # (B, H, L, D)
    value: Tensor,  # (B, H, L, D)
    mask: Tensor | None,  # (B, L) bool
    scale: float,
) -> Tensor:  # (B, H * G, D)
    """softmax(scale q k^T) v where the mask is set; a row has to see one token at least."""
    num_rows, num_heads, num_tokens, width = key.shape
    group, num_pairs = query.shape[1] // num_heads, num_rows * num_heads
    num_parts = num_parts_of(num_pairs, num_tokens)
    states = query.new_empty(num_pairs, num_parts, group, width, dtype=torch.float32)
    sums = query.new_empty(num_pairs, num_parts, 2, group, dtype=torch.float32)
    out = query.new_empty(num_rows, query.shape[1], width)
    block_d = max(16, triton.next_power_of_2(width))
    block_l, num_stages = block_of(block_d, key.element_size())
    attend_part_kernel[(num_pairs, num_parts)](
        *(query, query.stride(0), query.stride(1)),
        *(key, *key.stride()[:3]),
        *(value, *value.stride()[:3]),
        *((query, 0) if mask is None else (mask, mask.stride(0))),
        *(states, sums, num_heads, num_tokens, scale),
        GROUP=group,
        WIDTH=width,
        HAS_MASK=mask is not None,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_L=block_l,
        num_warps=4,
        num_stages=num_stages,
    )
    join_parts_kernel[(num_pairs, group)](
        *(states, sums, out),
        NUM_PARTS=num_parts,
        GROUP=group,
        WIDTH=width,
        BLOCK_S=triton.next_power_of_2(num_parts),
        BLOCK_D=block_d,
        num_warps=1 if block_d <= 128 else 4,
    )
    return out
