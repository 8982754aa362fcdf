"""Rows of a loss that is a formula of log-probabilities, one program a row, three passes over it.

C rows of a chunk, T terms of the loss, V vocabulary. P teacher, Q student, r = log p - log q.

    loss = sum_v f(log q, log p, r)
    grad = (s - q sum_v s) / temperature,   s = df / dlog q

f and s are a function of the loss, compiled into the kernel; see losses/formula.py. Pass 1 takes
both log-sum-exps, pass 2 the loss and the sum of s, pass 3 writes the gradient.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import row_block
from gold_kernels.triton.lines import BITS, NATS, block_columns, load_logits
from gold_kernels.triton.shared_rows import (
    add_label_gradient,
    label_of_row,
    load_teacher,
    pair_sums,
    softcap_slope,
    store_cross_entropy,
)

LOG_ZERO = tl.constexpr(-1e6)  # nats


@triton.jit
def _log_probs(student, teacher, row_sums, bits):
    """log q, log p and log p - log q in nats, the last from the difference of the logits."""
    max_student, log_sum_student, max_teacher, log_sum_teacher = row_sums
    log_q = ((student - max_student) * bits - log_sum_student) * NATS
    log_p = ((teacher - max_teacher) * bits - log_sum_teacher) * NATS
    lse_gap = (max_teacher - max_student) * bits + (log_sum_teacher - log_sum_student)
    log_ratio = ((teacher - student) * bits - lse_gap) * NATS
    log_ratio = tl.minimum(tl.maximum(log_ratio, LOG_ZERO), -LOG_ZERO)
    return tl.maximum(log_q, LOG_ZERO), tl.maximum(log_p, LOG_ZERO), log_ratio


@triton.jit
def formula_rows_kernel(
    student_ptr,  # (C, V) logits
    teacher_ptr,  # (C, V) logits
    grad_ptr,  # (C, V) overwritten with the gradient; may be student_ptr
    weights_ptr,  # (C, T) float32: of the loss and, if HAS_LABELS, of the cross-entropy
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    values_ptr,  # (2, C) float32, overwritten: loss and cross-entropy of each row
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    values_stride,
    vocab_size,
    inverse_temperature,
    teacher_scale,
    softcap,
    first_number,
    second_number,
    ENTRIES: tl.constexpr,  # (log_q, log_p, log_ratio, first_number, second_number) -> f, s
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    values_ptr += row
    weights_ptr += row * (2 if HAS_LABELS else 1)
    row_weight = tl.load(weights_ptr)
    is_live = row_weight != 0.0  # a row of weight 0 may hold anything, NaN included

    bits = inverse_temperature * BITS
    max_student, sum_student, max_teacher, sum_teacher, hard_total = pair_sums(
        student_ptr,
        teacher_ptr,
        vocab_size,
        bits,
        teacher_scale,
        HAS_PAIR,
        HAS_LABELS,
        BLOCK_V,
        LINE,
    )
    row_sums = (max_student, tl.log2(sum_student), max_teacher, tl.log2(sum_teacher))
    is_any = is_live
    if HAS_LABELS:
        label, hard_weight, is_hard = label_of_row(labels_ptr, weights_ptr + 1, row, vocab_size)
        is_any = is_live | is_hard
        hard_ptr = values_ptr + values_stride
        store_cross_entropy(hard_ptr, student_ptr, label, is_hard, max_student, hard_total)

    loss = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    slope_sum = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        student = load_logits(student_ptr, columns, is_column)
        teacher = load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR)
        log_q, log_p, log_ratio = _log_probs(student, teacher, row_sums, bits)
        entry_loss, slope = ENTRIES(log_q, log_p, log_ratio, first_number, second_number)
        loss += tl.sum(tl.where(is_column, entry_loss, 0.0), axis=1)
        slope_sum += tl.sum(tl.where(is_column, slope, 0.0), axis=1)
    tl.store(values_ptr, tl.where(is_live, tl.sum(loss, 0), 0.0))

    if NEEDS_GRAD:
        grad_ptr += row * grad_row_stride
        total = tl.sum(slope_sum, 0)
        for start in range(0, vocab_size, BLOCK_V):
            columns = block_columns(start, BLOCK_V, LINE)
            is_column = columns < vocab_size
            student = load_logits(student_ptr, columns, is_column)
            teacher = load_teacher(teacher_ptr, columns, is_column, teacher_scale, HAS_PAIR)
            log_q, log_p, log_ratio = _log_probs(student, teacher, row_sums, bits)
            entry_loss, slope = ENTRIES(log_q, log_p, log_ratio, first_number, second_number)
            grad = (slope - tl.exp(log_q) * total) * (row_weight * inverse_temperature)
            if HAS_LABELS:
                grad = add_label_gradient(
                    grad,
                    student,
                    columns,
                    label,
                    is_live,
                    is_hard,
                    hard_weight,
                    max_student,
                    hard_total,
                )
            if HAS_SOFTCAP:  # logits are softcap tanh(x / softcap)
                grad *= softcap_slope(student, softcap)
            grad = tl.where(is_any, grad, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + columns, grad, mask=is_column)


def formula_rows_(
    entries: Any,  # a triton.jit function, see ENTRIES
    student_logits: Tensor,  # (C, V), unit column stride
    teacher_logits: Tensor,  # (C, V), unit column stride
    grad_logits: Tensor | None,  # (C, V), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, T) float32, contiguous
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (2, C) float32, overwritten: loss and, with labels, cross-entropy
    *,
    numbers: tuple[float, float],
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
) -> None:
    """Launch formula_rows_kernel on every row of a chunk."""
    num_rows, vocab_size = student_logits.shape
    block_v, line, num_warps = row_block(vocab_size, student_logits.dtype)
    grad = student_logits if grad_logits is None else grad_logits
    formula_rows_kernel[(num_rows,)](
        student_logits,
        teacher_logits,
        grad,
        weights,
        weights if labels is None else labels,
        values,
        student_logits.stride(0),
        teacher_logits.stride(0),
        grad.stride(0),
        values.stride(0),
        vocab_size,
        1.0 / temperatures[0],
        temperatures[0] / temperatures[1],
        1.0 if softcap is None else softcap,
        *numbers,
        ENTRIES=entries,
        HAS_PAIR=temperatures[0] != temperatures[1],
        HAS_LABELS=labels is not None,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=grad_logits is not None,
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
    )
