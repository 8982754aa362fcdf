"""ULD and hybrid rows without a sort: counts on a grid of bins say which side is above.

C rows of a chunk, V vocabulary (V_s, V_t), K matched entries. s and t are the probabilities of
student and teacher times exp(log_scale) of their row. Over the unmatched entries

    loss = sum_k |s_(k) - t_(k)| = integral of |D(x)| dx,  D(x) = #{s_i > x} - #{t_j > x}
    dloss / ds_i = sign of D just around s_i

both vectors sorted, the shorter padded with 0 (Boizard et al. 2024, arXiv 2402.12030, eq. 3; the
integral is the Wasserstein-1 distance of the two value distributions). Matched entries get the
generalized JSD of the pair (s_i, t_partner), its KL terms with + sum q - sum p, so never negative.
A row with a span, one entry of each side, has the generalized JSD of two outcomes, s_span and
1 - s_span, and nothing else.

Counts on a grid of bins give D (uld_bins.py), from the largest value down to TAIL_BITS below 1 / V,
where one last bin holds the rest. Where D keeps its sign across a bin, the bin's part of the loss
is exact from the values; where it may not, entries are listed and ordered. Without lists (16-bit
logits, whose ties fill bins) D is taken as linear there, and the gradient is the average sign.

Passes over a row: both log-sum-exps; counts; a scan of the bins; for every LIST_SIZE entries to be
ordered one more; loss and sum of s h; gradient s h - q sum(s h), with h = dloss / ds.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.kernels.bin_table import load_table, shared_table
from gold_kernels.kernels.jsd_rows import FORWARD_KL, JSD, REVERSE_KL
from gold_kernels.kernels.launch import row_block
from gold_kernels.kernels.lines import (
    BITS,
    LOWEST_LOGIT,
    NATS,
    block_columns,
    load_logits,
    row_sum,
)
from gold_kernels.kernels.uld_bins import (
    HIGH_STEP,
    LIST_SIZE,
    LIST_WORDS,
    MAX_LISTED,
    NUM_BINS,
    bins_of,
    clear_bins,
    clear_lists,
    count_side,
    list_side,
    matched_entries,
    order_lists,
    origin_of,
    scan_bins,
)
from gold_kernels.kernels.uld_entries import (
    counted_sign,
    entry_bits,
    one_minus,
    span_entries,
    student_entries,
)
from gold_kernels.kernels.uld_memory import working_memory

# Entries below 2**-12 / V share a bin: together below 1/4096 of a side. Peaked rows, as trained
# models have, keep most entries there: a bound of 2**-6 / V cost up to 2e-2 of their loss.
TAIL_BITS = tl.constexpr(12.0)
LOWEST_MARGIN = tl.constexpr(1 / 4096)  # two or three bins above the last: the lowest entry counts
MIN_RANGE_BITS = tl.constexpr(1.0)
MAX_SCALE_GAP = tl.constexpr(24.0)  # bits; a side further below the other falls into the last bin
SCAN_BINS = 1 << 10

# loss, cross_entropy, matched and unmatched loss, matched mass of student and teacher, and
# dloss / dlog_scale of the student
NUM_ROW_VALUES = 7


@triton.jit
def uld_rows_kernel(
    student_ptr,  # (C, V_s) logits
    teacher_ptr,  # (C, V_t) logits
    grad_ptr,  # (C, V_s) overwritten with the gradient; may be student_ptr
    weights_ptr,  # (C, 2) float32: of the loss, of the cross-entropy
    student_scales_ptr,  # (C,) float32 log-scales, read if HAS_SCALES
    teacher_scales_ptr,  # (C,)
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    partners_ptr,  # (V_s,) int32 matched teacher entry, read if HAS_OVERLAP
    student_matched_ptr,  # (V_s,) bool, is matched
    teacher_matched_ptr,  # (V_t,) bool
    student_spans_ptr,  # (C,) int64 entry or -1, read if HAS_SPANS
    teacher_spans_ptr,  # (C,) int64
    values_ptr,  # (7, C) float32, overwritten with the unweighted values of each row
    table_ptr,  # (programs, NUM_BINS) int32, overwritten; not read if IS_SHARED
    lists_ptr,  # (programs, LIST_WORDS) int32, overwritten; not read without HAS_LISTS
    signs_ptr,  # (C or programs, V_s) overwritten; may be grad_ptr
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    values_stride,
    signs_row_stride,
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
    HAS_SPANS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
    ARE_SIGNS_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    LIST_WORDS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    own_table = tl.program_id(0).to(tl.int64) * NUM_BINS
    table = shared_table() if IS_SHARED else table_ptr + own_table
    offsets_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * LIST_WORDS
    befores_ptr = offsets_ptr + NUM_BINS
    keys_ptr = befores_ptr + NUM_BINS
    owners_ptr = keys_ptr + (LIST_SIZE + MAX_LISTED)
    lists = (offsets_ptr, befores_ptr, keys_ptr, owners_ptr)
    loss_weights = (matched_weight, unmatched_weight)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_offset = tl.cast(row, tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
        student_row = student_ptr + row_offset * student_row_stride
        teacher_row = teacher_ptr + row_offset * teacher_row_stride
        weight = tl.load(weights_ptr + 2 * row)
        hard_weight = tl.load(weights_ptr + 2 * row + 1)
        # a row of weight 0 may hold anything, NaN included
        is_live, is_hard_live = weight != 0.0, hard_weight != 0.0
        student_max, student_sum, student_lowest = row_sum(
            student_row, student_vocab_size, student_bits, BLOCK_V, LINE, True
        )
        teacher_max, teacher_sum, teacher_lowest = row_sum(
            teacher_row, teacher_vocab_size, teacher_bits, BLOCK_V, LINE, True
        )
        # not the difference of the logarithms, which are rounded at 17 near convergence
        gap = tl.log2(teacher_sum / student_sum)
        student_sum, teacher_sum = tl.log2(student_sum), tl.log2(teacher_sum)
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
            bottom -= tl.minimum(tl.abs(student_scale - teacher_scale), MAX_SCALE_GAP)
        # nothing is below the lowest entry of both sides: finer bins, fewer entries to order
        student_lowest = (student_lowest - student_max) * student_bits + student_side[1]
        teacher_lowest = (teacher_lowest - teacher_max) * teacher_bits + teacher_side[1]
        lowest = tl.minimum(student_lowest, teacher_lowest)
        lowest -= (top - lowest) * LOWEST_MARGIN
        bottom = tl.maximum(bottom, lowest)
        grid = (top, (NUM_BINS - 1.0) / tl.maximum(top - bottom, MIN_RANGE_BITS))

        # a row with a span counts and sums nothing
        is_span, span, num_student, num_teacher = False, -1, student_vocab_size, teacher_vocab_size
        span_loss, span_slope, student_span, teacher_span = 0.0, 0.0, 0.0, 0.0
        if HAS_SPANS:
            span = tl.load(student_spans_ptr + row)
            is_span = span >= 0
            num_student = tl.where(is_span, 0, student_vocab_size)
            num_teacher = tl.where(is_span, 0, teacher_vocab_size)
            partner = tl.load(teacher_spans_ptr + row)
            student_span = entry_bits(student_row, span, is_span, student_side)
            teacher_span = entry_bits(teacher_row, partner, is_span, teacher_side)
            span_loss, span_slope = span_entries(student_span, teacher_span, beta, MODE)

        per_bit = grid[1]
        base = (top - student_side[1]) * per_bit
        gap = (gap + student_scale - teacher_scale) * per_bit
        student_origin = origin_of(student_max, student_bits, per_bit, base, 0.0)
        teacher_origin = origin_of(teacher_max, teacher_bits, per_bit, base, gap)
        has_halves, is_counted, edges, num_listed = HAS_LISTS, False, 0.0, 0
        while not is_counted:
            tl.debug_barrier()  # signs may still be read
            clear_bins(table, IS_SHARED, NUM_BINS, SCAN_BINS)
            tl.debug_barrier()
            step = tl.where(has_halves, HIGH_STEP, -1)
            counted = count_side(
                student_row, student_matched_ptr, table, num_student, student_origin, 1,
                HAS_OVERLAP, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
            )  # fmt: skip
            counted -= count_side(
                teacher_row, teacher_matched_ptr, table, num_teacher, teacher_origin, step,
                HAS_OVERLAP, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
            )  # fmt: skip
            tl.debug_barrier()
            edges, num_listed, found = scan_bins(
                table, offsets_ptr, befores_ptr, grid, num_student - num_teacher, has_halves,
                HAS_LISTS, IS_SHARED, NUM_BINS, SCAN_BINS, MAX_LISTED,
            )  # fmt: skip
            # a half that ran over changes the difference of all halves
            is_counted, has_halves = found == counted, False
        sign_row = tl.cast(row if ARE_SIGNS_GRAD else tl.program_id(0), tl.int64)
        own_signs = signs_ptr + sign_row * signs_row_stride
        if HAS_LISTS:
            for first_listed in range(0, num_listed, LIST_SIZE):
                clear_lists(owners_ptr, LIST_SIZE, MAX_LISTED)
                tl.debug_barrier()
                list_side(
                    student_row, student_matched_ptr, table, lists, student_vocab_size,
                    student_origin, first_listed, 0, HAS_OVERLAP, IS_SHARED, NUM_BINS,
                    LIST_SIZE, MAX_LISTED, BLOCK_V, LINE,
                )  # fmt: skip
                list_side(
                    teacher_row, teacher_matched_ptr, table, lists, teacher_vocab_size,
                    teacher_origin, first_listed, 1, HAS_OVERLAP, IS_SHARED, NUM_BINS,
                    LIST_SIZE, MAX_LISTED, BLOCK_V, LINE,
                )  # fmt: skip
                tl.debug_barrier()
                edges += order_lists(
                    table, lists, own_signs, grid, first_listed, NEEDS_GRAD, IS_SHARED, LIST_SIZE,
                    MAX_LISTED,
                )  # fmt: skip
                tl.debug_barrier()
        tl.debug_barrier()

        lines = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
        matched, unmatched, mean_pull = lines, lines, lines
        student_mass, teacher_mass = lines, lines
        soft_weight = weight * student_bits * NATS  # 1 / temperature
        for start in range(0, num_student, BLOCK_V):
            columns = block_columns(start, BLOCK_V, LINE)
            is_column = columns < student_vocab_size
            logits = load_logits(student_row, columns, is_column)
            is_matched = matched_entries(student_matched_ptr, columns, is_column, HAS_OVERLAP)
            q, pull, matched_loss, unmatched_loss = student_entries(
                logits, columns, is_column, is_matched, student_side, student_scale, teacher_side,
                student_origin, table, own_signs, partners_ptr, teacher_row, loss_weights,
                beta, 1.0, MODE,
                HAS_SCALES, HAS_OVERLAP, HAS_LISTS and NEEDS_GRAD, False, IS_SHARED, NUM_BINS,
            )  # fmt: skip
            mean_pull += tl.sum(pull, axis=1)
            matched += tl.sum(matched_loss, axis=1)
            unmatched += tl.sum(unmatched_loss, axis=1)
            if HAS_OVERLAP:
                student_mass += tl.sum(tl.where(is_matched, q, 0.0), axis=1)
                if HAS_SIGNS:  # so that partners, far apart in memory, are read once
                    kept = (soft_weight * pull).to(signs_ptr.dtype.element_ty)
                    tl.store(own_signs + columns, kept, mask=is_matched)
        for start in range(0, num_teacher, BLOCK_V):
            columns = block_columns(start, BLOCK_V, LINE)
            is_column = columns < teacher_vocab_size
            logits = load_logits(teacher_row, columns, is_column)
            log2_t = (logits - teacher_max) * teacher_bits + (teacher_scale - teacher_sum)
            t = tl.exp2(log2_t)
            bins = bins_of(logits, teacher_origin, NUM_BINS)
            sign = load_table(table, bins, IS_SHARED).to(tl.float32, bitcast=True)
            lost = counted_sign(sign) * t
            if HAS_OVERLAP:
                is_matched = matched_entries(teacher_matched_ptr, columns, is_column, True)
                lost = tl.where(is_matched, 0.0, lost)
                p = tl.exp2(log2_t - teacher_scale) if HAS_SCALES else t
                teacher_mass += tl.sum(tl.where(is_matched, p, 0.0), axis=1)
            unmatched -= tl.sum(lost, axis=1)

        matched_sum = tl.sum(matched, 0)
        unmatched_sum = tl.sum(unmatched, 0) + edges
        pull_sum = tl.sum(mean_pull, 0)
        student_mass_sum, teacher_mass_sum = tl.sum(student_mass, 0), tl.sum(teacher_mass, 0)
        if HAS_SPANS:
            matched_sum = tl.where(is_span, span_loss, matched_sum)
            pull_sum = tl.where(is_span, matched_weight * span_slope, pull_sum)
            student_mass_sum = tl.where(is_span, tl.exp2(student_span), student_mass_sum)
            teacher_mass_sum = tl.where(is_span, tl.exp2(teacher_span), teacher_mass_sum)
        loss = matched_weight * matched_sum + unmatched_weight * unmatched_sum
        out_ptr = values_ptr + row
        tl.store(out_ptr, tl.where(is_live, loss, 0.0))
        tl.store(out_ptr + 2 * values_stride, tl.where(is_live, matched_sum, 0.0))
        tl.store(out_ptr + 3 * values_stride, tl.where(is_live, unmatched_sum, 0.0))
        tl.store(out_ptr + 4 * values_stride, tl.where(is_live, student_mass_sum, 0.0))
        tl.store(out_ptr + 5 * values_stride, tl.where(is_live, teacher_mass_sum, 0.0))
        tl.store(out_ptr + 6 * values_stride, tl.where(is_live, pull_sum, 0.0))
        label, hard_sum = -1, 0.0
        if HAS_LABELS:  # cross-entropy at temperature 1
            label = tl.load(labels_ptr + row)
            is_hard_live &= (label >= 0) & (label < student_vocab_size)
            hard_sum = tl.log2(row_sum(student_row, student_vocab_size, BITS, BLOCK_V, LINE)[1])
            label_logit = tl.load(student_row + label, mask=is_hard_live, other=0.0).to(tl.float32)
            label_logit = tl.maximum(label_logit, LOWEST_LOGIT)
            cross_entropy = hard_sum * NATS - (label_logit - student_max)
            tl.store(out_ptr + values_stride, tl.where(is_hard_live, cross_entropy, 0.0))

        if NEEDS_GRAD:
            grad_row = grad_ptr + row_offset * grad_row_stride
            for start in range(0, student_vocab_size, BLOCK_V):
                columns = block_columns(start, BLOCK_V, LINE)
                is_column = columns < student_vocab_size
                logits = load_logits(student_row, columns, is_column)
                is_matched = matched_entries(student_matched_ptr, columns, is_column, HAS_OVERLAP)
                q, pull, matched_loss, unmatched_loss = student_entries(
                    logits, columns, is_column, is_matched, student_side, student_scale,
                    teacher_side, student_origin, table, own_signs, partners_ptr, teacher_row,
                    loss_weights, beta, soft_weight, MODE,
                    HAS_SCALES, HAS_OVERLAP, HAS_LISTS, HAS_SIGNS, IS_SHARED, NUM_BINS,
                )  # fmt: skip
                grad = pull - q * pull_sum
                if HAS_SPANS:  # 1 - q where q is near 1: rounding would meet a large slope
                    log2_q = (logits - student_max) * student_bits - student_sum
                    span_grad = pull_sum * tl.where(columns == span, one_minus(log2_q), -q)
                    grad = tl.where(is_span, span_grad, grad)
                grad = tl.where(is_live, soft_weight * grad, 0.0)
                if HAS_LABELS:
                    hard_grad = tl.exp2((logits - student_max) * BITS - hard_sum)
                    hard_grad -= (columns == label).to(tl.float32)
                    grad += tl.where(is_hard_live, hard_weight * hard_grad, 0.0)
                if HAS_SOFTCAP:  # logits are softcap tanh(x / softcap)
                    capped = logits / softcap
                    slope = tl.where(logits > LOWEST_LOGIT, 1.0 - capped * capped, 0.0)
                    grad *= tl.where(is_live | is_hard_live, slope, 0.0)
                tl.store(grad_row + columns, grad.to(grad_ptr.dtype.element_ty), mask=is_column)


def uld_rows_(
    student_logits: Tensor,  # (C, V_s), unit column stride
    teacher_logits: Tensor,  # (C, V_t), unit column stride
    grad_logits: Tensor | None,  # (C, V_s), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, 2) float32, contiguous: of the loss, of the cross-entropy
    log_scales: tuple[Tensor, Tensor] | None,  # (C,) student, (C,) teacher, float32
    labels: Tensor | None,  # (C,) int64
    partners: Sequence[Tensor] | None,  # (V_s,), (V_s,), (V_t,): see linear_uld.partner_tables
    spans: Sequence[Tensor] | None,  # (C,), (C,) int64, see TokenAlignment.span_ids
    values: Tensor,  # (7, C) float32, overwritten: see NUM_ROW_VALUES
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    matched_weight: float,
    unmatched_weight: float,
    softcap: float | None,
    scratch_bytes: int,
) -> None:
    """Launch uld_rows_kernel on the rows of a chunk. softcap: the student's logits went through
    softcap tanh(x / softcap), the gradient is that of x. scratch_bytes: of working memory.
    """
    num_rows, student_vocab_size = student_logits.shape
    teacher_vocab_size = teacher_logits.shape[1]
    memory = working_memory(student_logits, teacher_logits, grad_logits, scratch_bytes)
    block_v, line, num_warps = row_block(
        student_vocab_size, student_logits.dtype, 4096 if memory.has_lists else 8192
    )
    # two programs of 16 warps on a multiprocessor
    limits = {"maxnreg": 64} if memory.is_shared else {}
    grad = student_logits if grad_logits is None else grad_logits
    student_scales, teacher_scales = (weights, weights) if log_scales is None else log_scales
    tables = [memory.table] * 3 if partners is None else partners
    student_spans, teacher_spans = (memory.table, memory.table) if spans is None else spans
    uld_rows_kernel[(memory.num_programs,)](
        student_logits,
        teacher_logits,
        grad,
        weights,
        student_scales,
        teacher_scales,
        weights if labels is None else labels,
        *tables,
        student_spans,
        teacher_spans,
        values,
        memory.table,
        memory.lists,
        memory.signs,
        student_logits.stride(0),
        teacher_logits.stride(0),
        grad.stride(0),
        values.stride(0),
        memory.signs.stride(0),
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
        HAS_SPANS=spans is not None,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=grad_logits is not None,
        HAS_LISTS=memory.has_lists,
        HAS_SIGNS=memory.has_signs,
        ARE_SIGNS_GRAD=memory.signs is grad_logits,
        IS_SHARED=memory.is_shared,
        NUM_BINS=NUM_BINS,
        SCAN_BINS=SCAN_BINS,
        LIST_SIZE=LIST_SIZE,
        MAX_LISTED=MAX_LISTED,
        LIST_WORDS=LIST_WORDS,
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
        **limits,
    )
