"""ULD and hybrid rows without a sort: counts on a grid say which side has more values above.

C rows of a chunk, V vocabulary (V_s, V_t), K matched entries. s and t are the probabilities of
student and teacher, times exp(log_scale) of their row.

Unmatched entries: both vectors are sorted, and the shorter is padded with 0 (Boizard et al. 2024,
arXiv 2402.12030, eq. 3). The sum below is an integral, the Wasserstein-1 distance of the values:

    loss = sum_k |s_(k) - t_(k)| = integral of |D(x)| dx,  D(x) = #{s_i > x} - #{t_j > x}
    dloss / ds_i = sign of D just around s_i

Matched entries: each pair (s_i, t_partner) has a generalized JSD. Its KL terms carry
+ sum q - sum p, so they are never negative. A row with a span, one entry of each side, has the
generalized JSD of two outcomes, s_span and 1 - s_span, and nothing else.

Counts on a grid of bins give D (bins.py). The grid goes from the largest value down to 2**-12 / V;
a last bin holds the rest. Where D keeps its sign across a bin, the values alone give the bin's part
of the loss, exactly. Where it may not, the entries are listed and ordered (lists.py). 16-bit logits
have no lists, because ties fill their bins: there D is taken as linear inside a bin, and the
gradient is the average sign.

Passes over a row, after the log-sum-exps of triton_sums.py: counts and the scan of the bins; the
loss, the sum of s h with h = dloss / ds, and the list, again for every LIST_SIZE listed entries;
matched entries; with labels the log-sum-exp of the cross-entropy; the gradient s h - q sum(s h).
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.jsd.triton_rows import FORWARD_KL, JSD, REVERSE_KL
from gold_kernels.triton.launch import row_block
from gold_kernels.triton.lines import (
    BITS,
    LOG2_ZERO,
    LOWEST_LOGIT,
    NATS,
    block_columns,
    entry_parts,
    load_logits,
    log_of,
    row_sum,
)
from gold_kernels.uld.bin_table import (
    NUM_BINS,
    TABLE_WORDS,
    load_table,
    shared_table,
)
from gold_kernels.uld.bins import (
    LIST_SIZE,
    MAX_LISTED,
    bins_of,
    count_row,
    matched_entries,
    origin_of,
    range_of,
)
from gold_kernels.uld.entries import span_entries, student_signs, sum_pairs
from gold_kernels.uld.lists import LIST_WORDS, open_window, order_row, sum_signed
from gold_kernels.uld.row_memory import working_memory
from gold_kernels.uld.triton_sums import join_slices, uld_sums

SCAN_BINS = 1 << 11
PAIR_BLOCK = 1 << 11
PAIR_LINE = tl.constexpr(4)  # pairs that a thread loads at once


@triton.jit
def uld_rows_kernel(
    student_ptr,  # (C, V_s) logits
    teacher_ptr,  # (C, V_t) logits
    grad_ptr,  # (C, V_s) overwritten with the gradient; may be student_ptr
    weights_ptr,  # (C, 2) float32: of the loss, of the cross-entropy
    student_scales_ptr,  # (C,) float32 log-scales, read if HAS_SCALES
    teacher_scales_ptr,  # (C,)
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    student_ids_ptr,  # (K,) int32 matched entries, read if HAS_OVERLAP
    partners_ptr,  # (C, K) logits of their partners, see triton_sums.py
    sums_ptr,  # (C, 2, S, 3) float64, log-sum-exps in slices, see triton_sums.py
    student_matched_ptr,  # (V_s,) bool, is matched
    teacher_matched_ptr,  # (V_t,) bool
    student_spans_ptr,  # (C,) int64 entry or -1, read if HAS_SPANS
    teacher_spans_ptr,  # (C,) int64
    values_ptr,  # (7, C) float32, overwritten with the unweighted values of each row
    table_ptr,  # (programs, TABLE_WORDS) int32, overwritten; not read if IS_SHARED
    lists_ptr,  # (programs, LIST_WORDS) int32, overwritten; not read without HAS_LISTS
    signs_ptr,  # (C or programs, V_s) overwritten; may be grad_ptr
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    partners_row_stride,
    values_stride,
    signs_row_stride,
    num_rows,
    student_vocab_size,
    teacher_vocab_size,
    num_matched,
    beta,
    one_minus_beta,
    student_bits,  # bits that a logit of 1 is worth: log2(e) / temperature
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
    ARE_SIGNS_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    LIST_WORDS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
):
    own_table = tl.program_id(0).to(tl.int64) * TABLE_WORDS
    table = shared_table() if IS_SHARED else table_ptr + own_table
    counter = table + (4 * NUM_BINS if IS_SHARED else NUM_BINS)
    offsets_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * LIST_WORDS
    befores_ptr = offsets_ptr + NUM_BINS
    list_ptr = befores_ptr + NUM_BINS
    keys_ptr = list_ptr + (LIST_SIZE + MAX_LISTED)
    owners_ptr = keys_ptr + (LIST_SIZE + MAX_LISTED)
    lists = (offsets_ptr, befores_ptr, list_ptr, keys_ptr, owners_ptr)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_offset = tl.cast(row, tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
        student_row = student_ptr + row_offset * student_row_stride
        teacher_row = teacher_ptr + row_offset * teacher_row_stride
        weight, hard_weight = tl.load(weights_ptr + 2 * row), tl.load(weights_ptr + 2 * row + 1)
        is_live, is_hard_live = weight != 0.0, hard_weight != 0.0
        betas = (beta, one_minus_beta)
        student_max, student_total, student_lowest = join_slices(
            sums_ptr, row_offset, student_vocab_size, student_bits, False, SLICE, NUM_SLICES
        )
        teacher_max, teacher_total, teacher_lowest = join_slices(
            sums_ptr, row_offset, teacher_vocab_size, teacher_bits, True, SLICE, NUM_SLICES
        )
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
        student_side = (student_max, student_scale - student_sum, student_bits)
        teacher_side = (teacher_max, teacher_scale - teacher_sum, teacher_bits)
        vocab_size = tl.maximum(student_vocab_size, teacher_vocab_size)
        top, range_bits = range_of(
            student_side, teacher_side, student_lowest, teacher_lowest,
            (student_scale, teacher_scale), vocab_size, HAS_SCALES,
        )  # fmt: skip
        per_bit = (NUM_BINS - 1.0) / range_bits
        grid = (top, range_bits / (NUM_BINS - 1.0))

        # A row of weight 0 counts nothing: it may hold NaN, whose place is another program's.
        num_student = tl.where(is_live, student_vocab_size, 0)
        num_teacher = tl.where(is_live, teacher_vocab_size, 0)
        num_pairs = tl.where(is_live, num_matched, 0)
        is_span, span = False, -1  # a row with a span has no unmatched and no matched entries
        span_loss, span_slope, span_rest, student_span, teacher_span = 0.0, 0.0, 0.0, 0.0, 0.0
        if HAS_SPANS:
            span = tl.load(student_spans_ptr + row)
            is_span = span >= 0
            num_student = tl.where(is_span, 0, num_student)
            num_teacher = tl.where(is_span, 0, num_teacher)
            num_pairs = tl.where(is_span, 0, num_pairs)
            partner = tl.load(teacher_spans_ptr + row)
            student_span, span_rest = entry_parts(
                student_row, span, is_span, student_vocab_size, student_max, student_total,
                student_bits, BLOCK_V, LINE,
            )  # fmt: skip
            teacher_span, _ = entry_parts(
                teacher_row, partner, is_span, teacher_vocab_size, teacher_max, teacher_total,
                teacher_bits, BLOCK_V, LINE,
            )  # fmt: skip
            student_span = tl.minimum(student_span + student_scale, 0.0)
            teacher_span = tl.minimum(teacher_span + teacher_scale, 0.0)
            span_loss, span_slope = span_entries(student_span, teacher_span, betas, MODE)

        base = (top - student_side[1]) * per_bit
        gap = (gap + student_scale - teacher_scale) * per_bit
        student_origin = origin_of(student_max, student_bits, per_bit, base, 0.0)
        teacher_origin = origin_of(teacher_max, teacher_bits, per_bit, base, gap)
        edges, num_listed = count_row(
            student_row, teacher_row, student_matched_ptr, teacher_matched_ptr, table, offsets_ptr,
            befores_ptr, (num_student, num_teacher), (student_origin, teacher_origin), grid,
            HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, SCAN_BINS, MAX_LISTED, BLOCK_V, LINE,
        )  # fmt: skip
        sign_row = tl.cast(row if ARE_SIGNS_GRAD else tl.program_id(0), tl.int64)
        own_signs = signs_ptr + sign_row * signs_row_stride
        if HAS_LISTS and num_listed > 0:
            tl.debug_barrier()
            open_window(table, offsets_ptr, 0, IS_SHARED, NUM_BINS, SCAN_BINS, LIST_SIZE)
        tl.debug_barrier()

        soft_weight = weight * student_bits * NATS  # 1 / temperature
        signed_sum = sum_signed(
            student_row, student_matched_ptr, table, counter, list_ptr, num_student, student_side,
            student_origin, False, HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
        )  # fmt: skip
        teacher_signed_sum = sum_signed(
            teacher_row, teacher_matched_ptr, table, counter, list_ptr, num_teacher, teacher_side,
            teacher_origin, True, HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
        )  # fmt: skip
        listed_loss, listed_sign = 0.0, 0.0
        if HAS_LISTS:
            listed_loss, listed_sign = order_row(
                student_row, teacher_row, student_matched_ptr, teacher_matched_ptr, table, counter,
                lists, own_signs, (num_student, num_teacher), (student_side, teacher_side),
                (student_origin, teacher_origin), grid, num_listed,
                NEEDS_GRAD, HAS_OVERLAP, IS_SHARED, NUM_BINS, SCAN_BINS, LIST_SIZE, BLOCK_V, LINE,
            )  # fmt: skip
        matched_loss, matched_pull, student_mass, teacher_mass = 0.0, 0.0, 0.0, 0.0
        if HAS_OVERLAP:
            matched_loss, matched_pull, student_mass, teacher_mass = sum_pairs(
                student_row, student_ids_ptr, partners_ptr + row_offset * partners_row_stride,
                own_signs, num_pairs, student_side, teacher_side, (student_scale, teacher_scale),
                betas, soft_weight * matched_weight,
                MODE, NEEDS_GRAD, IS_SHARED, PAIR_BLOCK, PAIR_LINE,
            )  # fmt: skip
            tl.debug_barrier()  # what was kept is read by other threads

        unmatched_loss = signed_sum - teacher_signed_sum + (edges + listed_loss)
        pull_sum = matched_weight * matched_pull + unmatched_weight * (signed_sum + listed_sign)
        if HAS_SPANS:
            matched_loss = tl.where(is_span, span_loss, matched_loss)
            pull_sum = tl.where(is_span, matched_weight * span_slope, pull_sum)
            student_mass = tl.where(is_span, tl.exp2(student_span), student_mass)
            teacher_mass = tl.where(is_span, tl.exp2(teacher_span), teacher_mass)
        loss = matched_weight * matched_loss + unmatched_weight * unmatched_loss
        out_ptr = values_ptr + row
        tl.store(out_ptr, tl.where(is_live, loss, 0.0))
        tl.store(out_ptr + 2 * values_stride, tl.where(is_live, matched_loss, 0.0))
        tl.store(out_ptr + 3 * values_stride, tl.where(is_live, unmatched_loss, 0.0))
        tl.store(out_ptr + 4 * values_stride, tl.where(is_live, student_mass, 0.0))
        tl.store(out_ptr + 5 * values_stride, tl.where(is_live, teacher_mass, 0.0))
        tl.store(out_ptr + 6 * values_stride, tl.where(is_live, pull_sum, 0.0))
        label, hard_sum, hard_rest = -1, 0.0, 0.0
        if HAS_LABELS:  # cross-entropy at temperature 1
            label = tl.load(labels_ptr + row)
            is_hard_live &= (label >= 0) & (label < student_vocab_size)
            hard_total = row_sum(student_row, 0, student_vocab_size, BITS, BLOCK_V, LINE)[1]
            hard_total = hard_total.to(tl.float32)
            hard_log2_q, hard_rest = entry_parts(
                student_row, label, is_hard_live, student_vocab_size, student_max, hard_total,
                BITS, BLOCK_V, LINE,
            )  # fmt: skip
            hard_sum = tl.log2(hard_total)
            tl.store(out_ptr + values_stride, tl.where(is_hard_live, -hard_log2_q * NATS, 0.0))
            is_hard_live &= hard_log2_q > LOG2_ZERO  # a masked label has no slope

        if NEEDS_GRAD:
            grad_row = grad_ptr + row_offset * grad_row_stride
            for start in range(0, student_vocab_size, BLOCK_V):
                columns = block_columns(start, BLOCK_V, LINE)
                is_column = columns < student_vocab_size
                logits = load_logits(student_row, columns, is_column)
                is_matched = matched_entries(student_matched_ptr, columns, is_column, HAS_OVERLAP)
                log2_s = (logits - student_max) * student_bits + student_side[1]
                s = tl.exp2(log2_s)
                q = s
                if HAS_SCALES:  # not s / scale, which may be 0 / 0
                    q = tl.exp2(log2_s - student_scale)
                words = load_table(table, bins_of(logits, student_origin, NUM_BINS), IS_SHARED)
                sign = student_signs(
                    words, columns, is_column, is_matched, own_signs, HAS_LISTS, HAS_OVERLAP
                )
                pull = soft_weight * unmatched_weight * sign * s
                if HAS_OVERLAP:
                    pull = tl.where(is_matched, sign, pull)
                grad = pull - soft_weight * pull_sum * q
                if HAS_SPANS:
                    q = tl.exp2((logits - student_max) * student_bits - student_sum)
                    span_grad = tl.where(columns == span, span_rest, -q)
                    grad = tl.where(is_span, soft_weight * pull_sum * span_grad, grad)
                grad = tl.where(is_live, grad, 0.0)
                if HAS_LABELS:
                    hard_grad = tl.exp2((logits - student_max) * BITS - hard_sum)
                    hard_grad = tl.where(columns == label, -hard_rest, hard_grad)
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
    tables: Sequence[Tensor] | None,  # of matched entries, see matched_tables
    spans: Sequence[Tensor] | None,  # (C,), (C,) int64, see TokenAlignment.span_ids
    values: Tensor,  # (7, C) float32, overwritten, in the order of ULD.value_names
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    matched_weight: float,
    unmatched_weight: float,
    softcap: float | None,
    scratch_bytes: int,
) -> None:
    """Launch uld_rows_kernel on the rows of a chunk. scratch_bytes: of working memory, at most.
    softcap: the student's logits are softcap tanh(x / softcap), and the gradient is that of x.
    """
    num_rows, student_vocab_size = student_logits.shape
    teacher_vocab_size = teacher_logits.shape[1]
    memory = working_memory(
        student_logits, teacher_logits, grad_logits, scratch_bytes, has_overlap=tables is not None
    )
    block_v, line, num_warps = row_block(
        student_vocab_size, student_logits.dtype, 4096 if memory.has_lists else 8192
    )
    # so many registers a thread that two programs of 16 warps fit a multiprocessor
    limits = {"maxnreg": 64} if memory.is_shared else {}
    grad = student_logits if grad_logits is None else grad_logits
    student_scales, teacher_scales = (weights, weights) if log_scales is None else log_scales
    bits = [BITS.value / temperature for temperature in temperatures]
    teacher_ids = None if tables is None else tables[1]
    sums, partners, slice_size = uld_sums(student_logits, teacher_logits, teacher_ids, *bits)
    student_ids, _, *is_matched = [memory.table] * 4 if tables is None else tables
    student_spans, teacher_spans = (memory.table, memory.table) if spans is None else spans
    uld_rows_kernel[(memory.num_programs,)](
        student_logits,
        teacher_logits,
        grad,
        weights,
        student_scales,
        teacher_scales,
        weights if labels is None else labels,
        student_ids,
        memory.table if partners is None else partners,
        sums,
        *is_matched,
        student_spans,
        teacher_spans,
        values,
        memory.table,
        memory.lists,
        memory.signs,
        student_logits.stride(0),
        teacher_logits.stride(0),
        grad.stride(0),
        0 if partners is None else partners.stride(0),
        values.stride(0),
        memory.signs.stride(0),
        num_rows,
        student_vocab_size,
        teacher_vocab_size,
        0 if partners is None else partners.shape[1],
        beta,
        1.0 - beta,
        *bits,
        matched_weight,
        unmatched_weight,
        1.0 if softcap is None else softcap,
        MODE={0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(beta), JSD),
        HAS_SCALES=log_scales is not None,
        HAS_LABELS=labels is not None,
        HAS_OVERLAP=tables is not None,
        HAS_SPANS=spans is not None,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=grad_logits is not None,
        HAS_LISTS=memory.has_lists,
        ARE_SIGNS_GRAD=memory.signs is grad_logits,
        IS_SHARED=memory.is_shared,
        NUM_BINS=NUM_BINS,
        TABLE_WORDS=TABLE_WORDS,
        SCAN_BINS=SCAN_BINS,
        LIST_SIZE=LIST_SIZE,
        MAX_LISTED=MAX_LISTED,
        LIST_WORDS=LIST_WORDS,
        BLOCK_V=block_v,
        LINE=line,
        PAIR_BLOCK=PAIR_BLOCK,
        SLICE=slice_size,
        NUM_SLICES=sums.shape[2],
        num_warps=num_warps,
        **limits,
    )
