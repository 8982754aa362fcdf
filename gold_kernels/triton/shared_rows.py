"""What row kernels over one vocabulary share: the start of a row, its blocks, the stored gradient.

A program works on one row of V columns, in blocks of lines (see lines.py). T terms of the loss: the
loss, then, if HAS_LABELS, the cross-entropy at temperature 1. Logits of the teacher are multiplied
by teacher_scale where the temperatures differ (HAS_PAIR).
"""

import triton
import triton.language as tl

from gold_kernels.triton.lines import (
    BITS,
    LOWEST_LOGIT,
    at_least,
    at_most,
    block_columns,
    join_lines,
    line_sums,
    load_logits,
)

MAX_LOSS = tl.constexpr(1e6)  # nats, of a masked label


@triton.jit
def _load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR: tl.constexpr):
    teacher = load_logits(teacher_ptr, columns, is_column)
    if HAS_PAIR:
        # Not a plain product: a compiler fuses it with a later difference, and what is left of
        # two equal masked logits is then their rounding, 1e22.
        teacher = tl.where(teacher > LOWEST_LOGIT, teacher * teacher_scale, LOWEST_LOGIT)
    return teacher


@triton.jit
def load_pair(
    student_ptr,
    teacher_ptr,
    start,
    vocab_size,
    teacher_scale,
    HAS_PAIR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Columns of a block, which of them exist, and the logits of both sides."""
    columns = block_columns(start, BLOCK_V, LINE)
    is_column = columns < vocab_size
    student = load_logits(student_ptr, columns, is_column)
    teacher = _load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR)
    return columns, is_column, student, teacher


@triton.jit
def pair_sums(
    student_ptr,
    teacher_ptr,
    vocab_size,
    bits,
    teacher_scale,
    offset,
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_GAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> largest logit and sum of exp2((logit - largest) bits) of both sides, and at temperature 1
    lines = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    max_student, max_teacher = lines - 1e30, lines - 1e30
    sum_student, sum_teacher, sum_hard, sum_gap = lines, lines, lines, lines
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        student = load_logits(student_ptr, columns, is_column)
        new_max = tl.maximum(max_student, tl.max(student, axis=1))
        shrink = tl.exp2((max_student - new_max) * bits)
        sum_student *= shrink
        if HAS_GAP:
            teacher = _load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR)
            values = tl.exp2((student - new_max[:, None]) * bits)
            sum_student += tl.sum(values, axis=1)
            gaps = tl.where(is_column, (student - teacher) - offset, 0.0)
            sum_gap = sum_gap * shrink + tl.sum(values * gaps, axis=1)
        else:
            sum_student += line_sums(student, new_max, bits)
        if HAS_LABELS:  # cross-entropy at temperature 1
            sum_hard *= tl.exp2((max_student - new_max) * BITS)
            sum_hard += line_sums(student, new_max, BITS)
        max_student = new_max
        if not HAS_GAP:
            teacher = _load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR)
        new_max = tl.maximum(max_teacher, tl.max(teacher, axis=1))
        sum_teacher *= tl.exp2((max_teacher - new_max) * bits)
        sum_teacher += line_sums(teacher, new_max, bits)
        max_teacher = new_max
    hard_total = 0.0
    if HAS_LABELS:
        hard_total = join_lines(max_student, sum_hard, BITS)[1]
    mean_gap = 0.0
    if HAS_GAP:
        mean_gap = join_lines(max_student, sum_gap, bits)[1]
    max_student, sum_student = join_lines(max_student, sum_student, bits)
    max_teacher, sum_teacher = join_lines(max_teacher, sum_teacher, bits)
    return max_student, sum_student, max_teacher, sum_teacher, hard_total, mean_gap / sum_student


@triton.jit
def open_row(
    student_ptr,
    teacher_ptr,
    weights_ptr,  # (C, T)
    labels_ptr,  # (C,)
    values_ptr,  # of this row; the cross-entropy is stored one stride on
    values_stride,
    row,
    vocab_size,
    bits,
    teacher_scale,
    offset,  # about what the student's logits are above the teacher's, read if HAS_GAP
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_GAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Weight of the loss; largest logit and sum of exp2((logit - largest) * bits) of the student
    and of the teacher; with HAS_GAP the mean over q of student - teacher - offset, of their
    logits; and what store_gradient needs to know of the row.
    """
    weights_ptr += row * (2 if HAS_LABELS else 1)
    row_weight = tl.load(weights_ptr)
    is_live = row_weight != 0.0  # a row of weight 0 may hold anything, NaN included
    max_student, sum_student, max_teacher, sum_teacher, hard_total, mean_gap = pair_sums(
        student_ptr,
        teacher_ptr,
        vocab_size,
        bits,
        teacher_scale,
        offset,
        HAS_PAIR,
        HAS_LABELS,
        HAS_GAP,
        BLOCK_V,
        LINE,
    )
    label, hard_weight, is_hard = -1, 0.0, False
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        hard_weight = tl.load(weights_ptr + 1)
        is_hard = (label >= 0) & (label < vocab_size) & (hard_weight != 0.0)
        logit = tl.load(student_ptr + label, mask=is_hard, other=0.0).to(tl.float32)
        logit = at_least(logit, LOWEST_LOGIT)
        cross_entropy = at_most(tl.log(hard_total) - (logit - max_student), MAX_LOSS)
        tl.store(values_ptr + values_stride, tl.where(is_hard, cross_entropy, 0.0))
        is_hard &= cross_entropy < MAX_LOSS  # a masked label has no slope
    row_terms = (is_live, label, hard_weight, is_hard, max_student, hard_total)
    return row_weight, max_student, sum_student, max_teacher, sum_teacher, mean_gap, row_terms


@triton.jit
def store_gradient(
    grad_ptr,
    grad,
    student,
    columns,
    is_column,
    row_terms,
    softcap,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Store a block of the gradient: the weighted one of the loss, plus that of the cross-entropy,
    back through softcap tanh(x / softcap).
    """
    is_live, label, hard_weight, is_hard, max_student, hard_total = row_terms
    # where, not a product: a row of weight 0 may hold anything
    if HAS_LABELS:
        hard_grad = tl.exp2((student - max_student) * BITS) / hard_total
        hard_grad -= (columns == label).to(tl.float32)
        grad = tl.where(is_live, grad, 0.0) + tl.where(is_hard, hard_weight * hard_grad, 0.0)
        is_live = is_live | is_hard
    if HAS_SOFTCAP:
        capped = student / softcap
        grad *= tl.where(student > LOWEST_LOGIT, 1.0 - capped * capped, 0.0)
    grad = tl.where(is_live, grad, 0.0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + columns, grad, mask=is_column)
