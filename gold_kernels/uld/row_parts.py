"""Steps of uld_rows_kernel: scales and grid of a row before its entries are counted, its values and
its gradient after that.

V vocabulary (V_s, V_t). A side is (largest logit, what log2 of a value has beside logits, bits that
a logit of 1 is worth). Pairs are of student and teacher.
"""

import triton
import triton.language as tl

from gold_kernels.triton.lines import (
    BITS,
    LOG2_ZERO,
    LOWEST_LOGIT,
    NATS,
    at_most,
    block_columns,
    entry_parts,
    load_logits,
    log_of,
    row_sum,
)
from gold_kernels.uld.bin_table import load_table
from gold_kernels.uld.bins import bins_of, matched_entries, origin_of, range_of
from gold_kernels.uld.entries import span_entries, student_signs
from gold_kernels.uld.lists import order_row, sum_both
from gold_kernels.uld.triton_sums import join_slices


@triton.jit
def row_sides(
    sums_ptr,
    student_scales_ptr,
    teacher_scales_ptr,
    row,
    vocab_sizes,
    bits,
    HAS_SCALES: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    rank_stride=0,
    NUM_RANKS: tl.constexpr = 1,
    RANK_BLOCK: tl.constexpr = 1,
):  # -> sides, lowest logits, log2-scales, sums of exp2, log2 of the teacher's over the other
    student_max, student_total, student_lowest = join_slices(
        sums_ptr, row, vocab_sizes[0], bits[0], False, SLICE, NUM_SLICES, rank_stride,
        NUM_RANKS, RANK_BLOCK,
    )  # fmt: skip
    teacher_max, teacher_total, teacher_lowest = join_slices(
        sums_ptr, row, vocab_sizes[1], bits[1], True, SLICE, NUM_SLICES, rank_stride,
        NUM_RANKS, RANK_BLOCK,
    )  # fmt: skip
    # not the difference of two logarithms: both are about 17 bits, and near convergence their
    # rounding would be all that is left
    excess = ((teacher_total - student_total) / student_total).to(tl.float32)
    student_total, teacher_total = student_total.to(tl.float32), teacher_total.to(tl.float32)
    gap = log_of(excess, tl.log2(teacher_total / student_total) * NATS) * BITS
    student_sum, teacher_sum = tl.log2(student_total), tl.log2(teacher_total)
    student_scale, teacher_scale = 0.0, 0.0
    if HAS_SCALES:
        student_scale = tl.load(student_scales_ptr + row) * BITS
        teacher_scale = tl.load(teacher_scales_ptr + row) * BITS
    student_side = (student_max, student_scale - student_sum, bits[0])
    teacher_side = (teacher_max, teacher_scale - teacher_sum, bits[1])
    scales, totals = (student_scale, teacher_scale), (student_total, teacher_total)
    return (student_side, teacher_side), (student_lowest, teacher_lowest), scales, totals, gap


@triton.jit
def grid_of(
    sides, lowest, scales, gap, vocab_sizes, HAS_SCALES: tl.constexpr, NUM_BINS: tl.constexpr
):
    """-> grid (log2 of its top, bits of a bin), origins of both sides (bins.origin_of)."""
    student_side, teacher_side = sides
    top, range_bits = range_of(
        student_side, teacher_side, lowest[0], lowest[1], scales,
        tl.maximum(vocab_sizes[0], vocab_sizes[1]), HAS_SCALES,
    )  # fmt: skip
    per_bit = (NUM_BINS - 1.0) / range_bits
    base = (top - student_side[1]) * per_bit
    gap = (gap + scales[0] - scales[1]) * per_bit
    student_origin = origin_of(student_side[0], student_side[2], per_bit, base, 0.0)
    teacher_origin = origin_of(teacher_side[0], teacher_side[2], per_bit, base, gap)
    return (top, range_bits / (NUM_BINS - 1.0)), (student_origin, teacher_origin)


@triton.jit
def entries_of_row(
    student_row,
    teacher_row,
    student_span_ptr,
    teacher_span_ptr,
    is_live,
    vocab_sizes,
    num_matched,
    sides,
    scales,
    totals,
    HAS_SPANS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> how many entries and pairs count, span (see write_gradient), log2 of the spans' values
    """A row of weight 0 counts nothing: it may hold NaN, whose place is another program's. A row
    with a span has no unmatched and no matched entries.
    """
    num_student = tl.where(is_live, vocab_sizes[0], 0)
    num_teacher = tl.where(is_live, vocab_sizes[1], 0)
    num_pairs = tl.where(is_live, num_matched, 0)
    is_span, span, rest, student_span, teacher_span = False, -1, 0.0, 0.0, 0.0
    if HAS_SPANS:
        span = tl.load(student_span_ptr)
        is_span = span >= 0
        num_student = tl.where(is_span, 0, num_student)
        num_teacher = tl.where(is_span, 0, num_teacher)
        num_pairs = tl.where(is_span, 0, num_pairs)
        partner = tl.load(teacher_span_ptr)
        student_span, rest = entry_parts(
            student_row, span, is_span, vocab_sizes[0], sides[0][0], totals[0], sides[0][2],
            BLOCK_V, LINE,
        )  # fmt: skip
        teacher_span, _ = entry_parts(
            teacher_row, partner, is_span, vocab_sizes[1], sides[1][0], totals[1], sides[1][2],
            BLOCK_V, LINE,
        )  # fmt: skip
        student_span = at_most(student_span + scales[0], 0.0)
        teacher_span = at_most(teacher_span + scales[1], 0.0)
    span_parts = (is_span, span, rest, tl.log2(totals[0]))
    return (num_student, num_teacher, num_pairs), span_parts, (student_span, teacher_span)


@triton.jit
def sum_unmatched(
    student_row,
    teacher_row,
    student_matched_ptr,
    teacher_matched_ptr,
    table,
    counter,
    lists,
    signs_ptr,
    vocab_sizes,
    sides,
    origins,
    grid,
    edges,
    num_listed,
    NEEDS_GRAD: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () loss of the unmatched entries, () sum of s times its sign; edges: what bins add to it
    student_sum, teacher_sum = sum_both(
        student_row, teacher_row, student_matched_ptr, teacher_matched_ptr, table, counter,
        lists[2], vocab_sizes, sides, origins, HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, BLOCK_V,
        LINE,
    )  # fmt: skip
    listed_loss, listed_sum = 0.0, 0.0
    if HAS_LISTS:
        listed_loss, listed_sum = order_row(
            student_row, teacher_row, student_matched_ptr, teacher_matched_ptr, table, counter,
            lists, signs_ptr, vocab_sizes, sides, origins, grid, num_listed, NEEDS_GRAD,
            HAS_OVERLAP, IS_SHARED, NUM_BINS, SCAN_BINS, LIST_SIZE, BLOCK_V, LINE,
        )  # fmt: skip
    return student_sum - teacher_sum + (edges + listed_loss), student_sum + listed_sum


@triton.jit
def store_values(
    out_ptr,
    stride,
    matched,  # loss, s dloss / ds, and the probability of the matched entries of both sides
    unmatched,  # loss, sum of s times its sign
    matched_weight,
    unmatched_weight,
    span,
    log2_spans,
    betas,
    is_live,
    MODE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
):  # -> () sum of s dloss / ds
    """Store all values of a row but its cross-entropy, in the order of ULD.value_names."""
    matched_loss, matched_pull, student_mass, teacher_mass = matched
    pull_sum = matched_weight * matched_pull + unmatched_weight * unmatched[1]
    if HAS_SPANS:
        is_span = span[0]
        span_loss, span_slope = span_entries(log2_spans[0], log2_spans[1], betas, MODE)
        matched_loss = tl.where(is_span, span_loss, matched_loss)
        pull_sum = tl.where(is_span, matched_weight * span_slope, pull_sum)
        student_mass = tl.where(is_span, tl.exp2(log2_spans[0]), student_mass)
        teacher_mass = tl.where(is_span, tl.exp2(log2_spans[1]), teacher_mass)
    loss = matched_weight * matched_loss + unmatched_weight * unmatched[0]
    tl.store(out_ptr, tl.where(is_live, loss, 0.0))
    tl.store(out_ptr + 2 * stride, tl.where(is_live, matched_loss, 0.0))
    tl.store(out_ptr + 3 * stride, tl.where(is_live, unmatched[0], 0.0))
    tl.store(out_ptr + 4 * stride, tl.where(is_live, student_mass, 0.0))
    tl.store(out_ptr + 5 * stride, tl.where(is_live, teacher_mass, 0.0))
    tl.store(out_ptr + 6 * stride, tl.where(is_live, pull_sum, 0.0))
    return pull_sum


@triton.jit
def hard_label(
    student_row,
    label_ptr,
    out_ptr,
    row_max,
    vocab_size,
    hard_weight,
    HAS_LABELS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> label, log2 of the sum, 1 - q of the label, weight, whether the label has a slope
    """Store the cross-entropy, at temperature 1."""
    label, hard_sum, rest, is_live = -1, 0.0, 0.0, hard_weight != 0.0
    if HAS_LABELS:
        label = tl.load(label_ptr)
        is_live &= (label >= 0) & (label < vocab_size)
        total = row_sum(student_row, 0, vocab_size, BITS, BLOCK_V, LINE)[1].to(tl.float32)
        log2_q, rest = entry_parts(
            student_row, label, is_live, vocab_size, row_max, total, BITS, BLOCK_V, LINE
        )
        hard_sum = tl.log2(total)
        tl.store(out_ptr, tl.where(is_live, -log2_q * NATS, 0.0))
        is_live &= log2_q > LOG2_ZERO  # a masked label has no slope
    return label, hard_sum, rest, hard_weight, is_live


@triton.jit
def write_gradient(
    grad_row,
    student_row,
    matched_ptr,
    table,
    signs_ptr,
    vocab_size,
    side,
    scale,
    origin,
    soft,  # weight of the loss, of its unmatched part, sum of s dloss / ds, whether the row counts
    span,  # whether there is one, its entry, 1 - q of it, log2 of the student's sum
    hard,  # see hard_label
    softcap,
    HAS_SCALES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row_max, shift, bits = side
    soft_weight, unmatched_weight, pull_sum, is_live = soft
    is_span, span_entry, span_rest, student_sum = span
    label, hard_sum, hard_rest, hard_weight, is_hard_live = hard
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        logits = load_logits(student_row, columns, is_column)
        is_matched = matched_entries(matched_ptr, columns, is_column, HAS_OVERLAP)
        log2_s = (logits - row_max) * bits + shift
        s = tl.exp2(log2_s)
        q = s
        if HAS_SCALES:  # not s / scale, which may be 0 / 0
            q = tl.exp2(log2_s - scale)
        words = load_table(table, bins_of(logits, origin, NUM_BINS), IS_SHARED)
        sign = student_signs(
            words, columns, is_column, is_matched, signs_ptr, HAS_LISTS, HAS_OVERLAP
        )
        pull = soft_weight * unmatched_weight * sign * s
        if HAS_OVERLAP:
            pull = tl.where(is_matched, sign, pull)
        grad = pull - soft_weight * pull_sum * q
        if HAS_SPANS:
            q = tl.exp2((logits - row_max) * bits - student_sum)
            span_grad = tl.where(columns == span_entry, span_rest, -q)
            grad = tl.where(is_span, soft_weight * pull_sum * span_grad, grad)
        grad = tl.where(is_live, grad, 0.0)
        if HAS_LABELS:
            hard_grad = tl.exp2((logits - row_max) * BITS - hard_sum)
            hard_grad = tl.where(columns == label, -hard_rest, hard_grad)
            grad += tl.where(is_hard_live, hard_weight * hard_grad, 0.0)
        if HAS_SOFTCAP:  # logits are softcap tanh(x / softcap)
            capped = logits / softcap
            slope = tl.where(logits > LOWEST_LOGIT, 1.0 - capped * capped, 0.0)
            grad *= tl.where(is_live | is_hard_live, slope, 0.0)
        tl.store(grad_row + columns, grad.to(grad_row.dtype.element_ty), mask=is_column)
