"""Generalized JSD of rows of which this process has a slice of the columns: the passes of
triton_rows.py, each a kernel, with sums over the processes between them.

C rows of a chunk, V_r columns of this process, T terms of the loss.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.engine.slices import Slices
from gold_kernels.jsd.triton_rows import (
    add_metrics,
    add_pulls,
    jsd_entries,
    mode_of,
    scale_of_row,
    sums_of_row,
    write_gradient,
)
from gold_kernels.triton.lines import BITS, NATS
from gold_kernels.triton.shared_rows import load_pair
from gold_kernels.triton.slice_rows import open_slice_row, slice_passes

PULL_SUMS, NUM_SUMS = 3, 9  # of a row; those of metrics come behind the loss and its pulls
NATS_PER_BIT, BITS_PER_NAT = NATS.value, BITS.value


@triton.jit
def jsd_slice_sums_kernel(
    student_ptr,  # (C, V_r) logits
    teacher_ptr,  # (C, V_r) logits
    row_sums_ptr,  # (6, C) float32, see slice_rows.RowSums
    sums_ptr,  # (9, C) float32, overwritten: mean pull, q at the floor of log p, q of the others,
    # loss, mean logit over q, over p, both KL divergences, columns with both maxima
    student_row_stride,
    teacher_row_stride,
    sums_stride,  # of both
    vocab_size,
    beta,
    one_minus_beta,
    inverse_temperature,
    teacher_scale,
    MODE: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_METRICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Pass 2. Any column may be masked."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    row_sums_ptr += row
    sums_ptr += row
    bits = inverse_temperature * BITS
    max_student = tl.load(row_sums_ptr)
    max_teacher = tl.load(row_sums_ptr + 2 * sums_stride)
    row_sums = sums_of_row(
        max_student,
        tl.load(row_sums_ptr + sums_stride),
        max_teacher,
        tl.load(row_sums_ptr + 3 * sums_stride),
        bits,
    )
    lines = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    loss, pulls, metrics, tops = lines, (lines, lines, lines), (lines, lines, lines, lines), lines
    for start in range(0, vocab_size, BLOCK_V):
        _, is_column, student, teacher = load_pair(
            student_ptr, teacher_ptr, start, vocab_size, teacher_scale, HAS_PAIR, BLOCK_V, LINE
        )
        q, p, ratio, entry_loss, pull = jsd_entries(
            student, teacher, row_sums, bits, (beta, one_minus_beta), MODE, True
        )
        loss += tl.sum(entry_loss, axis=1)
        pulls = add_pulls(pulls, q, ratio, pull, MODE)
        if HAS_METRICS:
            student -= max_student
            teacher -= max_teacher
            metrics = add_metrics(metrics, q, p, ratio, student, teacher)
            is_top = is_column & (student == 0.0) & (teacher == 0.0)
            tops += tl.sum(is_top.to(tl.float32), axis=1)
    for place in tl.static_range(3):
        tl.store(sums_ptr + place * sums_stride, tl.sum(pulls[place], 0))
    tl.store(sums_ptr + 3 * sums_stride, tl.sum(loss, 0))
    for place in tl.static_range(4):
        tl.store(sums_ptr + (4 + place) * sums_stride, tl.sum(metrics[place], 0))
    tl.store(sums_ptr + 8 * sums_stride, tl.sum(tops, 0))


@triton.jit
def jsd_slice_gradient_kernel(
    student_ptr,  # (C, V_r) logits
    teacher_ptr,  # (C, V_r) logits
    grad_ptr,  # (C, V_r) overwritten with the gradient; may be student_ptr
    weights_ptr,  # (C, T) float32: of the loss and, if HAS_LABELS, of the cross-entropy
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    row_sums_ptr,  # (6, C) float32, see slice_rows.RowSums
    sums_ptr,  # (9, C) float32, of all processes
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    sums_stride,  # of both
    vocab_size,
    first_label,
    total_size,
    beta,
    one_minus_beta,
    inverse_temperature,
    teacher_scale,
    softcap,
    MODE: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Pass 3."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    bits = inverse_temperature * BITS
    sums_ptr += row
    row_weight, max_student, sum_student, max_teacher, sum_teacher, row_terms = open_slice_row(
        row_sums_ptr + row, sums_stride, weights_ptr, labels_ptr, row, first_label, total_size,
        HAS_LABELS,
    )  # fmt: skip
    row_sums = sums_of_row(max_student, sum_student, max_teacher, sum_teacher, bits)
    soft_scale = scale_of_row(row_weight, inverse_temperature, one_minus_beta, MODE)
    pull_sums = (
        tl.load(sums_ptr),
        tl.load(sums_ptr + sums_stride),
        tl.load(sums_ptr + 2 * sums_stride),
    )
    write_gradient(
        student_ptr + row * student_row_stride, teacher_ptr + row * teacher_row_stride,
        grad_ptr + row * grad_row_stride, vocab_size, teacher_scale, row_sums, bits,
        (beta, one_minus_beta), pull_sums, soft_scale, row_terms, softcap, MODE, HAS_PAIR, True,
        HAS_LABELS, HAS_SOFTCAP, False, BLOCK_V, LINE,
    )  # fmt: skip


def jsd_slice_rows_(
    student_logits: Tensor,  # (C, V_r), unit column stride
    teacher_logits: Tensor,  # (C, V_r), unit column stride
    grad_logits: Tensor | None,  # (C, V_r), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, T) float32, contiguous: of the loss and, with labels, of cross-entropy
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (7, C) float32, overwritten, in the order of JSD.value_names
    *,
    slices: Slices,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
    has_metrics: bool,
    has_masks: bool,  # for the kernel of whole rows, which saves a pass
) -> None:
    """Loss, metrics and gradient of every row of a chunk."""
    rows, sums = slice_passes(
        (jsd_slice_sums_kernel, jsd_slice_gradient_kernel),
        NUM_SUMS,
        *(student_logits, teacher_logits, grad_logits, weights, labels),
        slices=slices,
        numbers=(beta, 1.0 - beta),
        temperatures=temperatures,
        softcap=softcap,
        in_sums={"HAS_METRICS": has_metrics},
        MODE=mode_of(beta),
    )
    is_live = weights[:, 0] != 0
    values[0] = torch.where(is_live, sums[PULL_SUMS] * NATS_PER_BIT, 0)
    if labels is not None:
        values[1] = rows.cross_entropy(labels, weights)
    if has_metrics:
        values[2:] = torch.where(is_live, _metrics(rows.sums, sums, temperatures[0]), 0)


def _metrics(row_sums: Tensor, sums: Tensor, temperature: float) -> Tensor:  # (5, C)
    bits = BITS_PER_NAT / temperature
    entropies = [
        (row_sums[place].log2() - mean * bits) * NATS_PER_BIT
        for place, mean in ((1, sums[4]), (3, sums[5]))
    ]
    divergences = [sums[6] * NATS_PER_BIT, sums[7] * NATS_PER_BIT]
    return torch.stack([*entropies, *divergences, (sums[8] > 0).to(sums.dtype)])
