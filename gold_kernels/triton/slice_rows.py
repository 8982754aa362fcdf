"""Pass 1 over rows of which this process has a slice of the columns, and what follows from all.

C rows of a chunk, V_r columns of this process, R processes, T terms of the loss. What a row kernel
keeps in registers between its passes goes through memory here, so that processes can add it up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import row_block
from gold_kernels.triton.lines import BITS, LOWEST_LOGIT, at_least
from gold_kernels.triton.shared_rows import MAX_LOSS, pair_sums


class Slices(Protocol):
    """What a launch reads of engine/slices.py, which is above this folder: over the processes of a
    group.
    """

    @property
    def first(self) -> int: ...  # column of the vocabulary with which this process' slice begins

    @property
    def total(self) -> int: ...

    def gather(self, tensor: Tensor) -> Tensor: ...  # (any) -> (R, any)

    def sum_(self, tensor: Tensor) -> Tensor: ...


BITS_PER_NAT, LARGEST_LOSS = BITS.value, MAX_LOSS.value


@triton.jit
def slice_sums_kernel(
    student_ptr,  # (C, V_r) logits
    teacher_ptr,  # (C, V_r) logits
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    sums_ptr,  # (6, C) float32, overwritten, in the order of RowSums
    student_row_stride,
    teacher_row_stride,
    sums_stride,
    vocab_size,
    first_label,
    inverse_temperature,
    teacher_scale,
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    sums_ptr += row
    max_student, sum_student, max_teacher, sum_teacher, hard_total, _ = pair_sums(
        student_ptr, teacher_ptr, vocab_size, inverse_temperature * BITS, teacher_scale, 0.0,
        HAS_PAIR, HAS_LABELS, False, BLOCK_V, LINE,
    )  # fmt: skip
    tl.store(sums_ptr, max_student)
    tl.store(sums_ptr + sums_stride, sum_student)
    tl.store(sums_ptr + 2 * sums_stride, max_teacher)
    tl.store(sums_ptr + 3 * sums_stride, sum_teacher)
    logit = 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row) - first_label
        is_here = (label >= 0) & (label < vocab_size)
        logit = tl.load(student_ptr + label, mask=is_here, other=0.0).to(tl.float32)
        logit = at_least(logit, LOWEST_LOGIT)
    tl.store(sums_ptr + 4 * sums_stride, hard_total)
    tl.store(sums_ptr + 5 * sums_stride, logit)


@triton.jit
def open_slice_row(
    sums_ptr,  # of this row, joined
    sums_stride,
    weights_ptr,  # (C, T)
    labels_ptr,  # (C,)
    row,
    first_label,
    total_size,
    HAS_LABELS: tl.constexpr,
):
    """As shared_rows.open_row, without its pass."""
    weights_ptr += row * (2 if HAS_LABELS else 1)
    row_weight = tl.load(weights_ptr)
    max_student = tl.load(sums_ptr)
    sum_student = tl.load(sums_ptr + sums_stride)
    max_teacher = tl.load(sums_ptr + 2 * sums_stride)
    sum_teacher = tl.load(sums_ptr + 3 * sums_stride)
    label, hard_weight, is_hard, hard_total = -1, 0.0, False, 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        hard_weight = tl.load(weights_ptr + 1)
        hard_total = tl.load(sums_ptr + 4 * sums_stride)
        logit = tl.load(sums_ptr + 5 * sums_stride)
        is_hard = (label >= 0) & (label < total_size) & (hard_weight != 0.0)
        # a masked label has no slope
        is_hard &= tl.log(hard_total) - (logit - max_student) < MAX_LOSS
        label -= first_label
    row_terms = (row_weight != 0.0, label, hard_weight, is_hard, max_student, hard_total)
    return row_weight, max_student, sum_student, max_teacher, sum_teacher, row_terms


class RowSums(NamedTuple):
    """Of the whole vocabulary, (6, C): largest logit and sum of exp2((logit - largest) * bits) of
    the student and of the teacher, the student's sum at temperature 1, the logit of the label.
    """

    sums: Tensor
    slices: Slices

    def cross_entropy(self, labels: Tensor, weights: Tensor) -> Tensor:  # (C,)
        max_student, _, _, _, hard_total, logit = self.sums
        loss = (hard_total.log() - (logit - max_student)).clamp_max(LARGEST_LOSS)
        is_hard = (labels >= 0) & (labels < self.slices.total) & (weights[:, 1] != 0)
        return torch.where(is_hard, loss, 0)


def row_sums(
    student_logits: Tensor,  # (C, V_r), unit column stride
    teacher_logits: Tensor,  # (C, V_r), unit column stride
    labels: Tensor | None,  # (C,) int64
    slices: Slices,
    temperatures: tuple[float, float],  # student, teacher
) -> RowSums:
    """Launch slice_sums_kernel on every row of a chunk, and join what processes have."""
    num_rows, vocab_size = student_logits.shape
    block_v, line, num_warps = row_block(max(1, vocab_size), student_logits.dtype)
    own = torch.empty(6, num_rows, dtype=torch.float32, device=student_logits.device)
    slice_sums_kernel[(num_rows,)](
        student_logits,
        teacher_logits,
        own if labels is None else labels,
        own,
        student_logits.stride(0),
        teacher_logits.stride(0),
        own.stride(0),
        vocab_size,
        slices.first,
        1.0 / temperatures[0],
        temperatures[0] / temperatures[1],
        HAS_PAIR=temperatures[0] != temperatures[1],
        HAS_LABELS=labels is not None,
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
    )
    parts = slices.gather(own)  # (R, 6, C)
    largest = parts[:, 0:3:2].amax(0)  # (2, C)
    below = (parts[:, 0:3:2] - largest) * BITS_PER_NAT
    sums = (parts[:, 1:4:2] * torch.exp2(below / temperatures[0])).sum(0)
    hard_total = (parts[:, 4] * torch.exp2(below[:, 0])).sum(0)
    joined = [largest[0], sums[0], largest[1], sums[1], hard_total, parts[:, 5].sum(0)]
    return RowSums(torch.stack(joined), slices)


def slice_passes(
    kernels: tuple[Any, Any],  # of the second pass and of the third
    num_sums: int,  # S, that the second pass has of a row
    student_logits: Tensor,  # (C, V_r), unit column stride
    teacher_logits: Tensor,  # (C, V_r), unit column stride
    grad_logits: Tensor | None,  # (C, V_r), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, T) float32, contiguous: of the loss and, with labels, of cross-entropy
    labels: Tensor | None,  # (C,) int64
    *,
    slices: Slices,
    numbers: Sequence[float],  # of the loss
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
    in_sums: dict[str, Any] | None = None,  # constants of the second pass alone
    **constants: Any,  # of both
) -> tuple[RowSums, Tensor]:  # and (S, C), both of the whole vocabulary
    """Launch all passes on every row of a chunk, and join what processes have after each."""
    num_rows, vocab_size = student_logits.shape
    block_v, line, num_warps = row_block(max(1, vocab_size), student_logits.dtype)
    rows = row_sums(student_logits, teacher_logits, labels, slices, temperatures)
    sums = torch.empty(num_sums, num_rows, dtype=torch.float32, device=student_logits.device)
    strides = student_logits.stride(0), teacher_logits.stride(0)
    scales = *numbers, 1.0 / temperatures[0], temperatures[0] / temperatures[1]
    constants |= {"HAS_PAIR": temperatures[0] != temperatures[1]}
    constants |= {"BLOCK_V": block_v, "LINE": line, "num_warps": num_warps}
    sums_kernel, gradient_kernel = kernels
    sums_kernel[(num_rows,)](
        *(student_logits, teacher_logits, rows.sums, sums, *strides),
        *(sums.stride(0), vocab_size, *scales),
        **(in_sums or {}),
        **constants,
    )
    slices.sum_(sums)
    if grad_logits is not None:
        gradient_kernel[(num_rows,)](
            *(student_logits, teacher_logits, grad_logits, weights),
            *(weights if labels is None else labels, rows.sums, sums),
            *(*strides, grad_logits.stride(0), sums.stride(0)),
            *(vocab_size, slices.first, slices.total, *scales),
            1.0 if softcap is None else softcap,
            HAS_LABELS=labels is not None,
            HAS_SOFTCAP=softcap is not None,
            **constants,
        )
    return rows, sums
