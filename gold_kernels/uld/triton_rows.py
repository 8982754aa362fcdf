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
from gold_kernels.triton.launch import ANY_ROWS, row_block
from gold_kernels.triton.lines import BITS, NATS
from gold_kernels.uld.bin_table import APPEND_BLOCK, NUM_BINS, TABLE_WORDS, shared_table
from gold_kernels.uld.bins import MAX_LISTED, count_row
from gold_kernels.uld.entries import sum_pairs
from gold_kernels.uld.lists import list_words, parts_of_lists
from gold_kernels.uld.row_memory import working_memory
from gold_kernels.uld.row_parts import (
    entries_of_row,
    grid_of,
    hard_label,
    row_sides,
    store_values,
    sum_unmatched,
    write_gradient,
)
from gold_kernels.uld.triton_sums import uld_sums

SCAN_BINS = 1 << 11
PAIR_BLOCK = 1 << 11
PAIR_LINE = tl.constexpr(4)  # pairs that a thread loads at once


@triton.jit(**ANY_ROWS)
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
    next_ptr,  # () int32, 0: rows taken beyond the first one of each program
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
    program = tl.program_id(0).to(tl.int64)
    table = shared_table() if IS_SHARED else table_ptr + program * TABLE_WORDS
    counter = table + (4 * NUM_BINS if IS_SHARED else NUM_BINS)
    lists = parts_of_lists(lists_ptr + program * LIST_WORDS, NUM_BINS, LIST_SIZE + MAX_LISTED)
    row = tl.program_id(0)
    while row < num_rows:
        # who is done takes the next row: some have a hundred times as many entries to order
        next_row = tl.num_programs(0) + tl.atomic_add(next_ptr, 1, sem="relaxed")
        row_offset = tl.cast(row, tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
        student_row = student_ptr + row_offset * student_row_stride
        teacher_row = teacher_ptr + row_offset * teacher_row_stride
        weight, hard_weight = tl.load(weights_ptr + 2 * row), tl.load(weights_ptr + 2 * row + 1)
        is_live = weight != 0.0
        betas = (beta, one_minus_beta)
        vocab_sizes = (student_vocab_size, teacher_vocab_size)
        sides, lowest, scales, totals, gap = row_sides(
            sums_ptr, student_scales_ptr, teacher_scales_ptr, row_offset, vocab_sizes,
            (student_bits, teacher_bits), HAS_SCALES, SLICE, NUM_SLICES,
        )  # fmt: skip
        grid, origins = grid_of(sides, lowest, scales, gap, vocab_sizes, HAS_SCALES, NUM_BINS)
        nums, span, log2_spans = entries_of_row(
            student_row, teacher_row, student_spans_ptr + row, teacher_spans_ptr + row, is_live,
            vocab_sizes, num_matched, sides, scales, totals, HAS_SPANS, BLOCK_V, LINE,
        )  # fmt: skip
        edges, num_listed = count_row(
            student_row, teacher_row, student_matched_ptr, teacher_matched_ptr, table, lists[0],
            lists[1], nums, origins, grid, HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, SCAN_BINS,
            MAX_LISTED, LIST_SIZE, BLOCK_V, LINE,
        )  # fmt: skip
        own_signs = signs_ptr + (row_offset if ARE_SIGNS_GRAD else program) * signs_row_stride
        unmatched = sum_unmatched(
            student_row, teacher_row, student_matched_ptr, teacher_matched_ptr, table, counter,
            lists, own_signs, nums, sides, origins, grid, edges, num_listed, NEEDS_GRAD,
            HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, SCAN_BINS, LIST_SIZE, BLOCK_V, LINE,
        )  # fmt: skip
        soft_weight = weight * student_bits * NATS  # 1 / temperature
        matched = (0.0, 0.0, 0.0, 0.0)
        if HAS_OVERLAP:
            matched = sum_pairs(
                student_row, student_ids_ptr, partners_ptr + row_offset * partners_row_stride,
                own_signs, nums[2], sides[0], sides[1], scales, betas,
                soft_weight * matched_weight, MODE, NEEDS_GRAD, IS_SHARED, PAIR_BLOCK, PAIR_LINE,
            )  # fmt: skip
            tl.debug_barrier()  # what was kept is read by other threads
        pull_sum = store_values(
            values_ptr + row, values_stride, matched, unmatched, matched_weight, unmatched_weight,
            span, log2_spans, betas, is_live, MODE, HAS_SPANS,
        )  # fmt: skip
        hard = hard_label(
            student_row, labels_ptr + row, values_ptr + row + values_stride, sides[0][0],
            student_vocab_size, hard_weight, HAS_LABELS, BLOCK_V, LINE,
        )  # fmt: skip
        if NEEDS_GRAD:
            write_gradient(
                grad_ptr + row_offset * grad_row_stride, student_row, student_matched_ptr, table,
                own_signs, student_vocab_size, sides[0], scales[0], origins[0],
                (soft_weight, unmatched_weight, pull_sum, is_live), span, hard, softcap, HAS_SCALES,
                HAS_LABELS, HAS_OVERLAP, HAS_SPANS, HAS_SOFTCAP, HAS_LISTS, IS_SHARED, NUM_BINS,
                BLOCK_V, LINE,
            )  # fmt: skip
        row = next_row


def uld_rows_(
    student_logits: Tensor,  # (C, V_s), unit column stride
    teacher_logits: Tensor,  # (C, V_t), unit column stride
    grad_logits: Tensor | None,  # (C, V_s), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, 2) float32, contiguous: of the loss, of the cross-entropy
    log_scales: tuple[Tensor, Tensor] | None,  # (C,) student, (C,) teacher, float32
    labels: Tensor | None,  # (C,) int64
    tables: Sequence[Tensor] | None,  # of matched entries, see plan.matched_tables
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
    memory = working_memory(
        student_logits, teacher_logits, grad_logits, scratch_bytes, has_overlap=tables is not None
    )
    vocab_sizes = student_logits.shape[1], teacher_logits.shape[1]
    block_v, line, num_warps = row_block(
        vocab_sizes[0], student_logits.dtype, 4096 if memory.has_lists else 8192
    )
    if memory.is_shared:
        block_v = max(block_v, APPEND_BLOCK)
    # so many registers a thread that two programs of 16 warps fit a multiprocessor
    limits = {"maxnreg": 64} if memory.is_shared else {}
    bits = [BITS.value / temperature for temperature in temperatures]
    teacher_ids = None if tables is None else tables[1]
    sums = uld_sums(student_logits, teacher_logits, teacher_ids, *bits)
    # what is not there is not read
    nothing = memory.table
    grad = student_logits if grad_logits is None else grad_logits
    scales = (weights, weights) if log_scales is None else log_scales
    labels_or_any = weights if labels is None else labels
    partners = nothing if sums.partners is None else sums.partners
    num_matched = 0 if sums.partners is None else partners.shape[1]
    student_ids, _, *is_matched = [nothing] * 4 if tables is None else tables
    spans_or_any = (nothing, nothing) if spans is None else spans
    uld_rows_kernel[(memory.num_programs,)](
        student_logits, teacher_logits, grad, weights, *scales, labels_or_any, student_ids,
        partners, sums.sums, sums.next_row, *is_matched, *spans_or_any, values, memory.table,
        memory.lists, memory.signs, student_logits.stride(0), teacher_logits.stride(0),
        grad.stride(0), partners.stride(0), values.stride(0), memory.signs.stride(0),
        student_logits.shape[0], *vocab_sizes, num_matched, beta, 1.0 - beta, *bits,
        matched_weight, unmatched_weight, 1.0 if softcap is None else softcap,
        MODE={0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(beta), JSD),
        HAS_SCALES=log_scales is not None, HAS_LABELS=labels is not None,
        HAS_OVERLAP=tables is not None, HAS_SPANS=spans is not None,
        HAS_SOFTCAP=softcap is not None, NEEDS_GRAD=grad_logits is not None,
        HAS_LISTS=memory.has_lists, ARE_SIGNS_GRAD=memory.signs is grad_logits,
        IS_SHARED=memory.is_shared, NUM_BINS=NUM_BINS, TABLE_WORDS=TABLE_WORDS,
        SCAN_BINS=SCAN_BINS, LIST_SIZE=memory.list_size, MAX_LISTED=MAX_LISTED,
        LIST_WORDS=list_words(memory.list_size),
        BLOCK_V=block_v, LINE=line, PAIR_BLOCK=PAIR_BLOCK, SLICE=sums.slice_size,
        NUM_SLICES=sums.sums.shape[2], num_warps=num_warps, **limits,
    )  # fmt: skip
