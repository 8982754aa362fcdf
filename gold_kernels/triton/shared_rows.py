"""What row kernels over one vocabulary share: both log-sum-exps, the cross-entropy, the softcap.

A program works on one row of V columns, in blocks of lines (see lines.py). Logits of the teacher
are multiplied by teacher_scale where the temperatures differ (HAS_PAIR).
"""

import triton
import triton.language as tl

from gold_kernels.triton.lines import (
    BITS,
    LOWEST_LOGIT,
    block_columns,
    join_lines,
    line_sums,
    load_logits,
)


@triton.jit
def load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR: tl.constexpr):
    teacher = load_logits(teacher_ptr, columns, is_column)
    if HAS_PAIR:
        # Not a plain product: a compiler fuses it with a later difference, and what is left of
        # two equal masked logits is then their rounding, 1e22.
        teacher = tl.where(teacher > LOWEST_LOGIT, teacher * teacher_scale, LOWEST_LOGIT)
    return teacher


@triton.jit
def pair_sums(
    student_ptr,
    teacher_ptr,
    vocab_size,
    bits,
    teacher_scale,
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> largest logit and sum of exp2((logit - largest) bits) of both sides, and at temperature 1
    lines = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    max_student, max_teacher = lines - 1e30, lines - 1e30
    sum_student, sum_teacher, sum_hard = lines, lines, lines
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        student = load_logits(student_ptr, columns, is_column)
        new_max = tl.maximum(max_student, tl.max(student, axis=1))
        sum_student *= tl.exp2((max_student - new_max) * bits)
        sum_student += line_sums(student, new_max, bits)
        if HAS_LABELS:  # cross-entropy at temperature 1
            sum_hard *= tl.exp2((max_student - new_max) * BITS)
            sum_hard += line_sums(student, new_max, BITS)
        max_student = new_max
        teacher = load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR)
        new_max = tl.maximum(max_teacher, tl.max(teacher, axis=1))
        sum_teacher *= tl.exp2((max_teacher - new_max) * bits)
        sum_teacher += line_sums(teacher, new_max, bits)
        max_teacher = new_max
    hard_total = 0.0
    if HAS_LABELS:
        hard_total = join_lines(max_student, sum_hard, BITS)[1]
    max_student, sum_student = join_lines(max_student, sum_student, bits)
    max_teacher, sum_teacher = join_lines(max_teacher, sum_teacher, bits)
    return max_student, sum_student, max_teacher, sum_teacher, hard_total


@triton.jit
def label_of_row(labels_ptr, hard_weight_ptr, row, vocab_size):
    """The label, its weight, and whether it counts."""
    label = tl.load(labels_ptr + row)
    hard_weight = tl.load(hard_weight_ptr)
    is_label = (label >= 0) & (label < vocab_size)
    return label, hard_weight, is_label & (hard_weight != 0.0)


@triton.jit
def store_cross_entropy(out_ptr, student_ptr, label, is_hard, max_student, hard_total):
    """-log q(label), 0 where the label does not count."""
    logit = tl.load(student_ptr + label, mask=is_hard, other=0.0).to(tl.float32)
    logit = tl.maximum(logit, LOWEST_LOGIT)
    cross_entropy = tl.log(hard_total) - (logit - max_student)
    tl.store(out_ptr, tl.where(is_hard, cross_entropy, 0.0))


@triton.jit
def add_label_gradient(
    grad, student, columns, label, is_live, is_hard, hard_weight, max_student, hard_total
):
    """Plus hard_weight times the gradient of the cross-entropy."""
    hard_grad = tl.exp2((student - max_student) * BITS) / hard_total
    hard_grad -= (columns == label).to(tl.float32)
    # where, not a product: the row of the other term may hold anything
    return tl.where(is_live, grad, 0.0) + tl.where(is_hard, hard_weight * hard_grad, 0.0)


@triton.jit
def softcap_slope(student, softcap):
    """d softcap tanh(x / softcap) / dx, from the capped logit."""
    capped = student / softcap
    return tl.where(student > LOWEST_LOGIT, 1.0 - capped * capped, 0.0)
