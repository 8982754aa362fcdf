"""What one entry of a ULD or hybrid row adds to loss and gradient, once the table has the signs.

s and t are the probabilities of student and teacher times exp(log_scale), h = dloss / ds, q the
student's probability itself.
"""

import triton
import triton.language as tl

from gold_kernels.kernels.bin_table import load_table
from gold_kernels.kernels.jsd_rows import FORWARD_KL, LOG_ZERO, REVERSE_KL, mixture_entries
from gold_kernels.kernels.lines import NATS, load_logits
from gold_kernels.kernels.uld_bins import LISTED, bins_of

_FORWARD_KL = tl.constexpr(FORWARD_KL)
_REVERSE_KL = tl.constexpr(REVERSE_KL)


@triton.jit
def whole_sign(sign):
    """The sign where D keeps it; 0 in bins where the scan already counted the loss."""
    return tl.where(tl.abs(sign) == 1.0, sign, 0.0)


@triton.jit
def _matched_entries(log2_s, log2_t, beta, MODE: tl.constexpr):
    """Loss and s dloss/ds of pairs of entries, in nats."""
    s, t = tl.exp2(log2_s), tl.exp2(log2_t)
    ratio = tl.minimum(tl.maximum(log2_t - log2_s, LOG_ZERO), -LOG_ZERO)
    if MODE == _FORWARD_KL:
        return t * ratio * NATS + (s - t), s - t
    if MODE == _REVERSE_KL:
        return (t - s) - s * ratio * NATS, -s * ratio * NATS
    loss, pull = mixture_entries(s, t, ratio, beta)
    return loss * NATS, s * pull * ((1.0 - beta) * NATS)


@triton.jit
def student_entries(
    logits,
    columns,
    is_column,
    side,
    scale,
    teacher_side,
    origin,
    table,
    signs_ptr,
    partners_ptr,
    teacher_ptr,
    weights,
    beta,
    MODE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """q, s h, and of the loss: its matched part, and whole sign times s, of student entries."""
    row_max, shift, bits = side
    matched_weight, unmatched_weight = weights
    log2_s = (logits - row_max) * bits + shift
    s = tl.exp2(log2_s)
    q = s
    if HAS_SCALES:  # not s / scale, which may be 0 / 0
        q = tl.exp2(log2_s - scale)
    words = load_table(table, bins_of(logits, origin, NUM_BINS), IS_SHARED)
    sign = words.to(tl.float32, bitcast=True)
    unmatched = whole_sign(sign) * s
    if HAS_LISTS:
        is_listed = is_column & (words >= LISTED)
        listed_sign = tl.load(signs_ptr + columns, mask=is_listed, other=0.0).to(tl.float32)
        sign = tl.where(is_listed, listed_sign, sign)
    pull = unmatched_weight * sign * s
    matched = tl.zeros_like(s)
    if HAS_OVERLAP:
        teacher_max, teacher_shift, teacher_bits = teacher_side
        partners = tl.load(partners_ptr + columns, mask=is_column, other=-1)
        is_matched = partners >= 0
        teacher = load_logits(teacher_ptr, partners, is_matched)
        log2_t = (teacher - teacher_max) * teacher_bits + teacher_shift
        loss, matched_pull = _matched_entries(log2_s, log2_t, beta, MODE)
        matched = tl.where(is_matched, loss, 0.0)
        unmatched = tl.where(is_matched, 0.0, unmatched)
        pull = tl.where(is_matched, matched_weight * matched_pull, pull)
    return q, pull, matched, unmatched
