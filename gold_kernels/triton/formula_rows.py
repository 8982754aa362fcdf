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

from gold_kernels.triton.launch import ANY_ROWS, is_over, row_block
from gold_kernels.triton.lines import BITS, NATS, at_least
from gold_kernels.triton.shared_rows import load_pair, open_row, store_gradient

LOG_ZERO = tl.constexpr(-1e6)  # nats


@triton.jit
def log_probs(student, teacher, row_sums, bits):
    """log q, log p and log p - log q in nats, the last from the difference of the logits."""
    max_student, log_sum_student, max_teacher, log_sum_teacher = row_sums
    log_q = ((student - max_student) * bits - log_sum_student) * NATS
    log_p = ((teacher - max_teacher) * bits - log_sum_teacher) * NATS
    lse_gap = (max_teacher - max_student) * bits + (log_sum_teacher - log_sum_student)
    log_ratio = ((teacher - student) * bits - lse_gap) * NATS
    log_ratio = tl.minimum(tl.maximum(log_ratio, LOG_ZERO), -LOG_ZERO)
    return at_least(log_q, LOG_ZERO), at_least(log_p, LOG_ZERO), log_ratio


@triton.jit
def formula_sums(
    student_ptr,  # of this row, like teacher_ptr
    teacher_ptr,
    vocab_size,
    teacher_scale,
    row_sums,
    bits,
    numbers,
    ENTRIES: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> sums of f and of s
    """Pass 2."""
    loss = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    slope_sum = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        _, is_column, student, teacher = load_pair(
            student_ptr, teacher_ptr, start, vocab_size, teacher_scale, HAS_PAIR, BLOCK_V, LINE
        )
        log_q, log_p, log_ratio = log_probs(student, teacher, row_sums, bits)
        entry_loss, slope = ENTRIES(log_q, log_p, log_ratio, numbers[0], numbers[1])
        loss += tl.sum(tl.where(is_column, entry_loss, 0.0), axis=1)
        slope_sum += tl.sum(tl.where(is_column, slope, 0.0), axis=1)
    return tl.sum(loss, 0), tl.sum(slope_sum, 0)


@triton.jit
def write_gradient(
    student_ptr,  # of this row, like teacher_ptr and grad_ptr
    teacher_ptr,
    grad_ptr,
    vocab_size,
    teacher_scale,
    row_sums,
    bits,
    numbers,
    total,  # sum of s
    scale,  # weight of the loss over the temperature
    row_terms,
    softcap,
    ENTRIES: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Pass 3."""
    for start in range(0, vocab_size, BLOCK_V):
        columns, is_column, student, teacher = load_pair(
            student_ptr, teacher_ptr, start, vocab_size, teacher_scale, HAS_PAIR, BLOCK_V, LINE
        )
        if IS_PACKED:  # what is stored below lies over what was read here and before
            tl.debug_barrier()
        log_q, log_p, log_ratio = log_probs(student, teacher, row_sums, bits)
        _, slope = ENTRIES(log_q, log_p, log_ratio, numbers[0], numbers[1])
        grad = (slope - tl.exp(log_q) * total) * scale
        store_gradient(
            grad_ptr, grad, student, columns, is_column, row_terms, softcap, HAS_LABELS,
            HAS_SOFTCAP,
        )  # fmt: skip


@triton.jit(**ANY_ROWS)
def formula_rows_kernel(
    student_ptr,  # (C, V) logits
    teacher_ptr,  # (C, V) logits
    grad_ptr,  # (C, V) overwritten with the gradient; may be student_ptr, and IS_PACKED over it
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
    IS_PACKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    values_ptr += row
    bits = inverse_temperature * BITS
    row_weight, max_student, sum_student, max_teacher, sum_teacher, _, row_terms = open_row(
        student_ptr, teacher_ptr, weights_ptr, labels_ptr, values_ptr, values_stride, row,
        vocab_size, bits, teacher_scale, 0.0, HAS_PAIR, HAS_LABELS, False, BLOCK_V, LINE,
    )  # fmt: skip
    is_live = row_terms[0]
    row_sums = (max_student, tl.log2(sum_student), max_teacher, tl.log2(sum_teacher))
    numbers = (first_number, second_number)
    loss, total = formula_sums(
        student_ptr, teacher_ptr, vocab_size, teacher_scale, row_sums, bits, numbers, ENTRIES,
        HAS_PAIR, BLOCK_V, LINE,
    )  # fmt: skip
    tl.store(values_ptr, tl.where(is_live, loss, 0.0))
    if NEEDS_GRAD:
        write_gradient(
            student_ptr, teacher_ptr, grad_ptr + row * grad_row_stride, vocab_size, teacher_scale,
            row_sums, bits, numbers, total, row_weight * inverse_temperature, row_terms, softcap,
            ENTRIES, HAS_PAIR, HAS_LABELS, HAS_SOFTCAP, IS_PACKED, BLOCK_V, LINE,
        )  # fmt: skip


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
        IS_PACKED=is_over(grad, student_logits),
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
    )
