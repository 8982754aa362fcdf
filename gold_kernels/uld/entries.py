"""What a vocabulary entry of a ULD or hybrid row adds to the loss and to the gradient.

s and t are the probabilities of student and teacher, times exp(log_scale) of their row. An entry is
one of three kinds:

- matched: it has a partner in the other vocabulary. The pair has a generalized JSD (sum_pairs).
- span: it stands for all bytes of a group of several tokens. The group has a generalized JSD of two
  outcomes, these bytes or others (span_entries), and none of its other entries counts.
- unmatched: the sign of its bin, or its own sign if it was listed, is its gradient (student_signs).
"""

import triton
import triton.language as tl

from gold_kernels.jsd.triton_rows import FORWARD_KL, LOG_ZERO, REVERSE_KL, mixture_entries
from gold_kernels.triton.lines import (
    LOG2_ZERO,
    NATS,
    block_columns,
    kl_entries,
    load_logits,
    log_of,
)
from gold_kernels.uld.bin_table import is_ordered, scatter

_FORWARD_KL = tl.constexpr(FORWARD_KL)
_REVERSE_KL = tl.constexpr(REVERSE_KL)
SMALLEST_REST = tl.constexpr(1e-18)  # as in engine/probabilities.py


@triton.jit
def pair_entries(log2_s, log2_t, betas, MODE: tl.constexpr):
    """Loss and s dloss/ds of pairs of entries, in nats."""
    s, t = tl.exp2(log2_s), tl.exp2(log2_t)
    ratio = tl.minimum(tl.maximum(log2_t - log2_s, LOG_ZERO), -LOG_ZERO)
    if MODE == _FORWARD_KL:
        # t log s has no slope where log s is the floor of a masked entry
        return kl_entries(t, s, ratio) * NATS, tl.where(log2_s > LOG2_ZERO, s - t, 0.0)
    if MODE == _REVERSE_KL:
        return kl_entries(s, t, -ratio) * NATS, -s * ratio * NATS
    loss, pull = mixture_entries(s, t, ratio, betas)
    return loss * NATS, s * pull * (betas[1] * NATS)


@triton.jit
def one_minus(log2_x):
    """1 - x for x in [0, 1], without the rounding of x near 1."""
    nats = -tl.minimum(log2_x, 0.0) * NATS
    series = nats * (1.0 - nats * (0.5 - nats * (1.0 / 6.0 - nats * (1.0 / 24.0 - nats / 120.0))))
    return tl.where(nats < 0.125, series, 1.0 - tl.exp2(log2_x))


@triton.jit
def _excess_of(x, log_sum):
    """x - log(1 + x), never negative; log_sum is log(1 + x) away from 0."""
    series = 0.25 - x * (0.2 - x * (1.0 / 6.0 - x / 7.0))
    series = x * x * (0.5 - x * (1.0 / 3.0 - x * series))
    return tl.where(tl.abs(x) < 0.0625, series, x - log_sum)


@triton.jit
def _rest_entries(log2_s, log2_t, betas, MODE: tl.constexpr):
    """Loss of the pair r = 1 - s, o = 1 - t, and r dloss / dr, in nats.

    r and o are mostly near 1, where log terms cancel. The loss is a sum of x - log(1 + x), which
    holds only what is left.
    """
    r = tl.maximum(one_minus(log2_s), SMALLEST_REST)
    o = tl.maximum(one_minus(log2_t), SMALLEST_REST)
    gap = tl.exp2(log2_t) - tl.exp2(log2_s)  # r - o
    if MODE == _FORWARD_KL:
        return o * _excess_of(gap / o, tl.log2(r / o) * NATS), gap
    if MODE == _REVERSE_KL:
        log_ratio = tl.log2(o / r) * NATS
        return r * _excess_of(-gap / r, log_ratio), -r * log_of(-gap / r, log_ratio)
    beta, one_minus_beta = betas
    mixture = beta * o + one_minus_beta * r
    up, down = one_minus_beta * gap / o, -beta * gap / r
    log_down = tl.log2(mixture / r) * NATS
    loss = beta * o * _excess_of(up, tl.log2(mixture / o) * NATS)
    loss += one_minus_beta * r * _excess_of(down, log_down)
    return loss, -one_minus_beta * r * log_of(down, log_down)


@triton.jit
def span_entries(log2_s, log2_t, betas, MODE: tl.constexpr):
    """Loss of two outcomes, s and 1 - s against t and 1 - t, and dloss / dlog s, in nats."""
    loss, pull = pair_entries(log2_s, log2_t, betas, MODE)
    rest_loss, rest_pull = _rest_entries(log2_s, log2_t, betas, MODE)
    odds = tl.exp2(log2_s) / tl.maximum(one_minus(log2_s), SMALLEST_REST)
    return loss + rest_loss, pull - rest_pull * odds


@triton.jit
def sum_pairs(
    student_row,
    student_ids_ptr,
    partners_row,
    kept_ptr,
    num_pairs,
    student_side,
    teacher_side,
    log2_scales,
    betas,
    pull_weight,
    MODE: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () loss, () s dloss / ds, in nats, () and () probability of the matched entries of a side
    """Pass over matched entries. NEEDS_GRAD: store each weighted s dloss / ds at its column."""
    student_max, student_shift, student_bits = student_side
    teacher_max, teacher_shift, teacher_bits = teacher_side
    lines = tl.zeros([PAIR_BLOCK // LINE], dtype=tl.float32)
    losses, pulls, student_mass, teacher_mass = lines, lines, lines, lines
    for start in range(0, num_pairs, PAIR_BLOCK):
        index = block_columns(start, PAIR_BLOCK, LINE)
        is_pair = index < num_pairs
        student_ids = tl.load(student_ids_ptr + index, mask=is_pair, other=0)
        student = load_logits(student_row, student_ids, is_pair)
        teacher = load_logits(partners_row, index, is_pair)
        log2_s = (student - student_max) * student_bits + student_shift
        log2_t = (teacher - teacher_max) * teacher_bits + teacher_shift
        loss, pull = pair_entries(log2_s, log2_t, betas, MODE)
        losses += tl.sum(tl.where(is_pair, loss, 0.0), axis=1)
        pulls += tl.sum(tl.where(is_pair, pull, 0.0), axis=1)
        student_mass += tl.sum(tl.exp2(log2_s - log2_scales[0]), axis=1)
        teacher_mass += tl.sum(tl.exp2(log2_t - log2_scales[1]), axis=1)
        if NEEDS_GRAD:
            kept = (pull_weight * pull).to(kept_ptr.dtype.element_ty)
            scatter(kept_ptr + student_ids, kept, is_pair, IS_SHARED)
    return tl.sum(losses, 0), tl.sum(pulls, 0), tl.sum(student_mass, 0), tl.sum(teacher_mass, 0)


@triton.jit
def student_signs(
    words,
    columns,
    is_column,
    is_matched,
    signs_ptr,
    HAS_LISTS: tl.constexpr,
    HAS_KEPT: tl.constexpr,
):
    """dloss / ds of student entries, before the weight of the loss: the sign of their bin, or their
    own sign if they were listed. HAS_KEPT: for matched entries, what sum_pairs stored.
    """
    sign = words.to(tl.float32, bitcast=True)
    if HAS_LISTS or HAS_KEPT:
        is_own = is_matched
        if HAS_LISTS:
            is_own = is_column & is_ordered(words)
            if HAS_KEPT:
                is_own |= is_matched
        # a line at once: one load in place of four
        has_own = tl.max(is_own.to(tl.int32), axis=1)[:, None] != 0
        own = tl.load(signs_ptr + columns, mask=has_own & is_column, other=0.0).to(tl.float32)
        sign = tl.where(is_own, own, sign)
    return sign
