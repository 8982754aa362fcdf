"""Rows of a loss that is a formula, of which this process has a slice of the columns: the passes of
formula_rows.py, each a kernel, with sums over the processes between them.

C rows of a chunk, V_r columns of this process, T terms of the loss.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.formula_rows import formula_sums, write_gradient
from gold_kernels.triton.lines import BITS
from gold_kernels.triton.slice_rows import Slices, open_slice_row, slice_passes

NUM_SUMS = 2  # of a row


@triton.jit
def formula_slice_sums_kernel(
    student_ptr,  # (C, V_r) logits
    teacher_ptr,  # (C, V_r) logits
    row_sums_ptr,  # (6, C) float32, see slice_rows.RowSums
    sums_ptr,  # (2, C) float32, overwritten: the loss, and the sum of s
    student_row_stride,
    teacher_row_stride,
    sums_stride,  # of both
    vocab_size,
    first_number,
    second_number,
    inverse_temperature,
    teacher_scale,
    ENTRIES: tl.constexpr,  # (log_q, log_p, log_ratio, first_number, second_number) -> f, s
    HAS_PAIR: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Pass 2."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    row_sums_ptr += row
    sums_ptr += row
    sides = (
        tl.load(row_sums_ptr),
        tl.log2(tl.load(row_sums_ptr + sums_stride)),
        tl.load(row_sums_ptr + 2 * sums_stride),
        tl.log2(tl.load(row_sums_ptr + 3 * sums_stride)),
    )
    loss, slope_sum = formula_sums(
        student_ptr + row * student_row_stride, teacher_ptr + row * teacher_row_stride, vocab_size,
        teacher_scale, sides, inverse_temperature * BITS, (first_number, second_number), ENTRIES,
        HAS_PAIR, BLOCK_V, LINE,
    )  # fmt: skip
    tl.store(sums_ptr, loss)
    tl.store(sums_ptr + sums_stride, slope_sum)


@triton.jit
def formula_slice_gradient_kernel(
    student_ptr,  # (C, V_r) logits
    teacher_ptr,  # (C, V_r) logits
    grad_ptr,  # (C, V_r) overwritten with the gradient; may be student_ptr
    weights_ptr,  # (C, T) float32: of the loss and, if HAS_LABELS, of the cross-entropy
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    row_sums_ptr,  # (6, C) float32, see slice_rows.RowSums
    sums_ptr,  # (2, C) float32, of all processes
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    sums_stride,  # of both
    vocab_size,
    first_label,
    total_size,
    first_number,
    second_number,
    inverse_temperature,
    teacher_scale,
    softcap,
    ENTRIES: tl.constexpr,  # see formula_slice_sums_kernel
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Pass 3."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    row_weight, max_student, sum_student, max_teacher, sum_teacher, row_terms = open_slice_row(
        row_sums_ptr + row, sums_stride, weights_ptr, labels_ptr, row, first_label, total_size,
        HAS_LABELS,
    )  # fmt: skip
    sides = (max_student, tl.log2(sum_student), max_teacher, tl.log2(sum_teacher))
    write_gradient(
        student_ptr + row * student_row_stride, teacher_ptr + row * teacher_row_stride,
        grad_ptr + row * grad_row_stride, vocab_size, teacher_scale, sides,
        inverse_temperature * BITS, (first_number, second_number),
        tl.load(sums_ptr + row + sums_stride), row_weight * inverse_temperature, row_terms, softcap,
        ENTRIES, HAS_PAIR, HAS_LABELS, HAS_SOFTCAP, False, BLOCK_V, LINE,
    )  # fmt: skip


def formula_slice_rows_(
    entries: Any,  # a triton.jit function, see ENTRIES
    student_logits: Tensor,  # (C, V_r), unit column stride
    teacher_logits: Tensor,  # (C, V_r), unit column stride
    grad_logits: Tensor | None,  # (C, V_r), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, T) float32, contiguous
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (2, C) float32, overwritten: loss and, with labels, cross-entropy
    *,
    slices: Slices,
    numbers: tuple[float, float],
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
) -> None:
    """Loss and gradient of every row of a chunk."""
    rows, sums = slice_passes(
        (formula_slice_sums_kernel, formula_slice_gradient_kernel),
        NUM_SUMS,
        *(student_logits, teacher_logits, grad_logits, weights, labels),
        slices=slices,
        numbers=numbers,
        temperatures=temperatures,
        softcap=softcap,
        ENTRIES=entries,
    )
    values[0] = torch.where(weights[:, 0] != 0, sums[0], 0)
    if labels is not None:
        values[1] = rows.cross_entropy(labels, weights)
