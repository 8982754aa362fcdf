"""ULD and hybrid rows without a sort: counts on a grid of bins say which side is above.

C rows of a chunk, V vocabulary (V_s, V_t), K matched entries. s and t are the probabilities of
student and teacher times exp(log_scale) of their row. Over the unmatched entries

    loss = sum_k |s_(k) - t_(k)| = integral of |D(x)| dx,  D(x) = #{s_i > x} - #{t_j > x}
    dloss / ds_i = sign of D just around s_i

both vectors sorted, the shorter padded with 0 (Boizard et al. 2024, arXiv 2402.12030, eq. 3; the
integral is the Wasserstein-1 distance of the two value distributions). Matched entries get the
generalized JSD of the pair (s_i, t_partner), its KL terms with + sum q - sum p, so never negative.

Bins are uniform in log2 of the value, from the largest one down to TAIL_BITS below 1 / V, where one
last bin holds the rest. Where D keeps its sign across a bin, the bin's part of the loss is exact
from the values; where D changes sign inside, D is taken as linear, and the gradient is the average
sign. Exact ties fall into one bin and so get the average of the subdifferential.

Passes over a row: both log-sum-exps; counts; a scan of the bins; loss and sum of s h; gradient
s h - q sum(s h), with h = dloss / ds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.kernels.bin_table import (
    SHARED_BINS,
    add_to_table,
    load_table,
    shared_table,
    store_table,
)
from gold_kernels.kernels.jsd_rows import FORWARD_KL, JSD, LOG_ZERO, REVERSE_KL, mixture_entries
from gold_kernels.kernels.launch import is_interpreted, row_block
from gold_kernels.kernels.lines import (
    BITS,
    LOWEST_LOGIT,
    NATS,
    block_columns,
    load_logits,
    row_log_sum,
)

_FORWARD_KL = tl.constexpr(FORWARD_KL)
_REVERSE_KL = tl.constexpr(REVERSE_KL)
TAIL_BITS = tl.constexpr(6.0)  # entries below 2**-6 / V share a bin: together below 1/64 of a side
MIN_RANGE_BITS = tl.constexpr(1.0)
MAX_SCALE_GAP = tl.constexpr(24.0)  # bits; a side further below the other falls into the last bin
NUM_BINS = 1 << 14  # where they are in global memory
SCAN_BINS = 1 << 11
GLOBAL_PROGRAMS = 256  # at most as many tables there

# loss, cross_entropy, matched and unmatched loss, matched mass of student and teacher, and
# dloss / dlog_scale of the student
NUM_ROW_VALUES = 7


@triton.jit
def _bins(log2_values, top, per_bit, NUM_BINS: tl.constexpr):
    """Bin of each value, 0 at the top; NaN of a poisoned row stays inside the table."""
    offsets = tl.minimum((top - log2_values) * per_bit, NUM_BINS - 1.0)
    return tl.minimum(tl.maximum(offsets.to(tl.int32), 0), NUM_BINS - 1)


@triton.jit
def _count_side(
    row_ptr,
    partners_ptr,
    table,
    vocab_size,
    side,
    grid,
    step,
    HAS_OVERLAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Add step to the bin of every unmatched entry of one side."""
    row_max, shift, bits = side
    top, per_bit = grid
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_counted = columns < vocab_size
        logits = load_logits(row_ptr, columns, is_counted)
        if HAS_OVERLAP:
            is_counted &= tl.load(partners_ptr + columns, mask=is_counted, other=0) < 0
        bins = _bins((logits - row_max) * bits + shift, top, per_bit, NUM_BINS)
        add_to_table(table, bins, step, is_counted, IS_SHARED)


@triton.jit
def _clear_bins(table, IS_SHARED: tl.constexpr, NUM_BINS: tl.constexpr, SCAN_BINS: tl.constexpr):
    for first in range(0, NUM_BINS, SCAN_BINS):
        bins = first + tl.arange(0, SCAN_BINS)
        store_table(table, bins, tl.zeros([SCAN_BINS], dtype=tl.int32), IS_SHARED)


@triton.jit
def _scan_bins(
    table, grid, IS_SHARED: tl.constexpr, NUM_BINS: tl.constexpr, SCAN_BINS: tl.constexpr
):  # -> () part of the loss that hangs on bins alone
    """Counts -> signs, in place. A sign of exactly -1, 0 or 1: D does not change its sign in the
    bin; between: the average over a bin in which it does.
    """
    top, per_bit = grid
    width = 1.0 - tl.exp2(-1.0 / per_bit)  # of a bin, relative to its upper edge
    carry = 0
    edges = tl.zeros([SCAN_BINS], dtype=tl.float32)
    for first in range(0, NUM_BINS, SCAN_BINS):
        bins = first + tl.arange(0, SCAN_BINS)
        net = load_table(table, bins, IS_SHARED)
        after = carry + tl.cumsum(net, 0)
        before = after - net
        carry += tl.sum(net, 0)
        is_same = ((before >= 0) & (after >= 0)) | ((before <= 0) & (after <= 0))
        d_before, d_after, d_net = before.to(tl.float32), after.to(tl.float32), net.to(tl.float32)
        middle = d_before + d_after
        same = tl.where(middle > 0, 1.0, tl.where(middle < 0, -1.0, 0.0))
        safe_net = tl.where(is_same, 1.0, d_net)
        mixed = (tl.abs(d_after) - tl.abs(d_before)) / safe_net
        upper = tl.exp2(top - bins.to(tl.float32) / per_bit)
        is_tail = bins == NUM_BINS - 1
        height = upper * tl.where(is_tail, 1.0, width)
        lower = tl.where(is_tail, 0.0, upper - height)
        edges += tl.where(
            is_same,
            same * (d_before * height - d_net * lower),
            (d_before * d_before + d_after * d_after) / (2.0 * tl.abs(safe_net)) * height,
        )
        sign = tl.where(is_same, same, mixed)
        store_table(table, bins, sign.to(tl.int32, bitcast=True), IS_SHARED)
    return tl.sum(edges, 0)


@triton.jit
def _whole(sign):
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
def _student_entries(
    logits,
    columns,
    is_column,
    side,
    scale,
    teacher_side,
    grid,
    table,
    partners_ptr,
    teacher_ptr,
    weights,
    beta,
    MODE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """q, s h, and of the loss: its matched part, and whole sign times s, of student entries."""
    row_max, shift, bits = side
    top, per_bit = grid
    matched_weight, unmatched_weight = weights
    log2_s = (logits - row_max) * bits + shift
    s = tl.exp2(log2_s)
    q = s
    if HAS_SCALES:  # not s / scale, which may be 0 / 0
        q = tl.exp2(log2_s - scale)
    bins = _bins(log2_s, top, per_bit, NUM_BINS)
    sign = load_table(table, bins, IS_SHARED).to(tl.float32, bitcast=True)
    unmatched = _whole(sign) * s
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


@triton.jit
def uld_rows_kernel(
    student_ptr,  # (C, V_s) logits
    teacher_ptr,  # (C, V_t) logits
    grad_ptr,  # (C, V_s) overwritten with the gradient; may be student_ptr
    weights_ptr,  # (C, 2) float32: of the loss, of the cross-entropy
    student_scales_ptr,  # (C,) float32 log-scales, read if HAS_SCALES
    teacher_scales_ptr,  # (C,)
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    student_partners_ptr,  # (V_s,) int32 matched teacher entry or -1, read if HAS_OVERLAP
    teacher_partners_ptr,  # (V_t,) int32
    values_ptr,  # (7, C) float32, overwritten with the unweighted values of each row
    table_ptr,  # (programs, NUM_BINS) int32, overwritten; not read if IS_SHARED
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    values_stride,
    num_rows,
    student_vocab_size,
    teacher_vocab_size,
    beta,
    student_bits,  # what a logit of 1 is worth, at the temperature of the side
    teacher_bits,
    matched_weight,
    unmatched_weight,
    softcap,
    MODE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    own_table = tl.program_id(0).to(tl.int64) * NUM_BINS
    table = shared_table() if IS_SHARED else table_ptr + own_table
    loss_weights = (matched_weight, unmatched_weight)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_offset = tl.cast(row, tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
        student_row = student_ptr + row_offset * student_row_stride
        teacher_row = teacher_ptr + row_offset * teacher_row_stride
        weight = tl.load(weights_ptr + 2 * row)
        hard_weight = tl.load(weights_ptr + 2 * row + 1)
        # a row of weight 0 may hold anything, NaN included
        is_live, is_hard_live = weight != 0.0, hard_weight != 0.0
        student_max, student_sum = row_log_sum(
            student_row, student_vocab_size, student_bits, BLOCK_V, LINE
        )
        teacher_max, teacher_sum = row_log_sum(
            teacher_row, teacher_vocab_size, teacher_bits, BLOCK_V, LINE
        )
        student_scale, teacher_scale = 0.0, 0.0
        if HAS_SCALES:
            student_scale = tl.load(student_scales_ptr + row) * BITS
            teacher_scale = tl.load(teacher_scales_ptr + row) * BITS
        student_side = (student_max, student_scale - student_sum, student_bits)
        teacher_side = (teacher_max, teacher_scale - teacher_sum, teacher_bits)
        top = tl.maximum(student_scale - student_sum, teacher_scale - teacher_sum)
        vocab_size = tl.maximum(student_vocab_size, teacher_vocab_size).to(tl.float32)
        bottom = tl.maximum(student_scale, teacher_scale) - tl.log2(vocab_size) - TAIL_BITS
        if HAS_SCALES:
            gap = tl.abs(student_scale - teacher_scale)
            bottom -= tl.minimum(gap, MAX_SCALE_GAP)
        grid = (top, (NUM_BINS - 1.0) / tl.maximum(top - bottom, MIN_RANGE_BITS))

        tl.debug_barrier()  # of the row before, signs may still be read
        _clear_bins(table, IS_SHARED, NUM_BINS, SCAN_BINS)
        tl.debug_barrier()
        _count_side(
            student_row, student_partners_ptr, table, student_vocab_size, student_side, grid,
            1, HAS_OVERLAP, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
        )  # fmt: skip
        _count_side(
            teacher_row, teacher_partners_ptr, table, teacher_vocab_size, teacher_side, grid,
            -1, HAS_OVERLAP, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
        )  # fmt: skip
        tl.debug_barrier()
        edges = _scan_bins(table, grid, IS_SHARED, NUM_BINS, SCAN_BINS)
        tl.debug_barrier()

        lines = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
        matched, unmatched, mean_pull, student_mass, teacher_mass = (
            lines,
            lines,
            lines,
            lines,
            lines,
        )
        for start in range(0, student_vocab_size, BLOCK_V):
            columns = block_columns(start, BLOCK_V, LINE)
            is_column = columns < student_vocab_size
            logits = load_logits(student_row, columns, is_column)
            q, pull, matched_loss, unmatched_loss = _student_entries(
                logits, columns, is_column, student_side, student_scale, teacher_side, grid,
                table, student_partners_ptr, teacher_row, loss_weights, beta, MODE, HAS_SCALES,
                HAS_OVERLAP, IS_SHARED, NUM_BINS,
            )  # fmt: skip
            mean_pull += tl.sum(pull, axis=1)
            matched += tl.sum(matched_loss, axis=1)
            unmatched += tl.sum(unmatched_loss, axis=1)
            if HAS_OVERLAP:
                partners = tl.load(student_partners_ptr + columns, mask=is_column, other=-1)
                student_mass += tl.sum(tl.where(partners >= 0, q, 0.0), axis=1)
        for start in range(0, teacher_vocab_size, BLOCK_V):
            columns = block_columns(start, BLOCK_V, LINE)
            is_column = columns < teacher_vocab_size
            logits = load_logits(teacher_row, columns, is_column)
            log2_t = (logits - teacher_max) * teacher_bits + (teacher_scale - teacher_sum)
            t = tl.exp2(log2_t)
            bins = _bins(log2_t, top, grid[1], NUM_BINS)
            sign = load_table(table, bins, IS_SHARED).to(tl.float32, bitcast=True)
            lost = _whole(sign) * t
            if HAS_OVERLAP:
                partners = tl.load(teacher_partners_ptr + columns, mask=is_column, other=-1)
                lost = tl.where(partners >= 0, 0.0, lost)
                p = tl.exp2(log2_t - teacher_scale)
                teacher_mass += tl.sum(tl.where(partners >= 0, p, 0.0), axis=1)
            unmatched -= tl.sum(lost, axis=1)

        matched_sum = tl.sum(matched, 0)
        unmatched_sum = tl.sum(unmatched, 0) + edges
        pull_sum = tl.sum(mean_pull, 0)
        loss = matched_weight * matched_sum + unmatched_weight * unmatched_sum
        out_ptr = values_ptr + row
        tl.store(out_ptr, tl.where(is_live, loss, 0.0))
        tl.store(out_ptr + 2 * values_stride, tl.where(is_live, matched_sum, 0.0))
        tl.store(out_ptr + 3 * values_stride, tl.where(is_live, unmatched_sum, 0.0))
        tl.store(out_ptr + 4 * values_stride, tl.where(is_live, tl.sum(student_mass, 0), 0.0))
        tl.store(out_ptr + 5 * values_stride, tl.where(is_live, tl.sum(teacher_mass, 0), 0.0))
        tl.store(out_ptr + 6 * values_stride, tl.where(is_live, pull_sum, 0.0))
        label, hard_sum = -1, 0.0
        if HAS_LABELS:  # cross-entropy at temperature 1
            label = tl.load(labels_ptr + row)
            is_hard_live &= (label >= 0) & (label < student_vocab_size)
            hard_sum = row_log_sum(student_row, student_vocab_size, BITS, BLOCK_V, LINE)[1]
            label_logit = tl.load(student_row + label, mask=is_hard_live, other=0.0).to(tl.float32)
            label_logit = tl.maximum(label_logit, LOWEST_LOGIT)
            cross_entropy = hard_sum * NATS - (label_logit - student_max)
            tl.store(out_ptr + values_stride, tl.where(is_hard_live, cross_entropy, 0.0))

        if NEEDS_GRAD:
            grad_row = grad_ptr + row_offset * grad_row_stride
            soft_weight = weight * student_bits * NATS  # 1 / temperature
            for start in range(0, student_vocab_size, BLOCK_V):
                columns = block_columns(start, BLOCK_V, LINE)
                is_column = columns < student_vocab_size
                logits = load_logits(student_row, columns, is_column)
                q, pull, matched_loss, unmatched_loss = _student_entries(
                    logits, columns, is_column, student_side, student_scale, teacher_side, grid,
                    table, student_partners_ptr, teacher_row, loss_weights, beta, MODE,
                    HAS_SCALES, HAS_OVERLAP, IS_SHARED, NUM_BINS,
                )  # fmt: skip
                grad = tl.where(is_live, soft_weight * (pull - q * pull_sum), 0.0)
                if HAS_LABELS:
                    hard_grad = tl.exp2((logits - student_max) * BITS - hard_sum)
                    hard_grad -= (columns == label).to(tl.float32)
                    grad += tl.where(is_hard_live, hard_weight * hard_grad, 0.0)
                if HAS_SOFTCAP:  # logits are softcap tanh(x / softcap)
                    capped = logits / softcap
                    slope = tl.where(logits > LOWEST_LOGIT, 1.0 - capped * capped, 0.0)
                    grad *= tl.where(is_live | is_hard_live, slope, 0.0)
                tl.store(grad_row + columns, grad.to(grad_ptr.dtype.element_ty), mask=is_column)


def _bin_table(num_rows: int, like: Tensor) -> tuple[int, int, bool, Tensor]:
    """Programs, bins, whether they are in shared memory, and the table, which is empty if so."""
    if like.device.type == "cuda" and torch.version.hip is None:
        return num_rows, SHARED_BINS, True, like.new_empty(1, dtype=torch.int32)
    num_programs = 1 if is_interpreted() else min(num_rows, GLOBAL_PROGRAMS)
    return num_programs, NUM_BINS, False, like.new_empty(num_programs, NUM_BINS, dtype=torch.int32)


def uld_rows_(
    student_logits: Tensor,  # (C, V_s), unit column stride
    teacher_logits: Tensor,  # (C, V_t), unit column stride
    grad_logits: Tensor | None,  # (C, V_s), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, 2) float32, contiguous: of the loss, of the cross-entropy
    log_scales: tuple[Tensor, Tensor] | None,  # (C,) student, (C,) teacher, float32
    labels: Tensor | None,  # (C,) int64
    partners: tuple[Tensor, Tensor] | None,  # (V_s,), (V_t,) int32, see VocabOverlap.partners
    values: Tensor,  # (7, C) float32, overwritten: see NUM_ROW_VALUES
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    matched_weight: float,
    unmatched_weight: float,
    softcap: float | None,
) -> None:
    """Launch uld_rows_kernel on the rows of a chunk. softcap: the student's logits went through
    softcap tanh(x / softcap), the gradient is that of x.
    """
    num_rows, student_vocab_size = student_logits.shape
    teacher_vocab_size = teacher_logits.shape[1]
    num_programs, num_bins, is_shared, table = _bin_table(num_rows, weights)
    block_v, line, num_warps = row_block(student_vocab_size, student_logits.dtype, 8192)
    # two programs of 16 warps on a multiprocessor: 0.76 us a row instead of 0.81 on an H200
    limits = {"maxnreg": 64} if is_shared else {}
    grad = student_logits if grad_logits is None else grad_logits
    student_scales, teacher_scales = (weights, weights) if log_scales is None else log_scales
    student_partners, teacher_partners = (table, table) if partners is None else partners
    uld_rows_kernel[(num_programs,)](
        student_logits,
        teacher_logits,
        grad,
        weights,
        student_scales,
        teacher_scales,
        weights if labels is None else labels,
        student_partners,
        teacher_partners,
        values,
        table,
        student_logits.stride(0),
        teacher_logits.stride(0),
        grad.stride(0),
        values.stride(0),
        num_rows,
        student_vocab_size,
        teacher_vocab_size,
        beta,
        BITS.value / temperatures[0],
        BITS.value / temperatures[1],
        matched_weight,
        unmatched_weight,
        1.0 if softcap is None else softcap,
        MODE={0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(beta), JSD),
        HAS_SCALES=log_scales is not None,
        HAS_LABELS=labels is not None,
        HAS_OVERLAP=partners is not None,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=grad_logits is not None,
        IS_SHARED=is_shared,
        NUM_BINS=num_bins,
        SCAN_BINS=num_bins if is_interpreted() else SCAN_BINS,
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
        **limits,
    )
