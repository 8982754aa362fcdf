"""How many rows at a time the chunk loop takes, from what the caller says about memory.

N scored rows, C rows of a chunk, P rows of a panel, D hidden size (D_s, D_t), V vocabulary (V_s,
V_t).
"""

from typing import NamedTuple

import torch

from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.products import Projection, cut_of
from gold_kernels.triton.launch import aligned_width

DEFAULT_BUDGET_BYTES = 1 << 30  # of the buffers of a chunk and a panel
# Rows of a chunk are a multiple of one of these where the budget allows it: 256 rows are two
# programs of a row kernel on each multiprocessor of a Hopper GPU, 128 and 16 fill tiles of GEMMs.
ROW_MULTIPLES = (256, 128, 16)


class Needs(NamedTuple):
    """Which gradients the caller will ask for."""

    hidden: bool
    weight: bool
    bias: bool


class Limits(NamedTuple):
    """What the caller says about memory."""

    chunk_size: int | None = None  # rows of logits at a time; None takes them from the budget
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    logits_dtype: torch.dtype | None = None  # None: float32, or float64 for float64 inputs
    row_bytes: int = 0  # that the row function needs beside a row of logits


class ChunkPlan(NamedTuple):
    """How many rows at a time; panel is at least chunk."""

    chunk: int
    panel: int


def float_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype of row values, accumulators and, unless asked otherwise, logits."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def plan_chunks(
    student: LinearHead,
    teacher: LinearHead | None,
    needs: Needs,
    limits: Limits,
    projection: Projection | None = None,
) -> ChunkPlan:
    """Rows per chunk and per panel: their buffers stay within the budget, but for a panel of all
    rows in place of the float32 accumulator of grad_weight, where it is no larger.
    """
    hidden, has_grad = student.hidden, any(needs)
    panel_dtype = hidden.dtype if projection is None else float_dtype(hidden)
    num_rows = max(1, student.num_rows)
    v_student = aligned_width(student.weight.shape[0])
    v_teacher = 0 if teacher is None else aligned_width(teacher.weight.shape[0])
    logits_dtype = limits.logits_dtype or float_dtype(hidden)
    is_in_place = has_grad and logits_dtype == panel_dtype
    chunk_row = logits_dtype.itemsize * (v_teacher + (0 if is_in_place else v_student))
    if logits_dtype.itemsize < hidden.dtype.itemsize:  # rounded after the GEMM, one side at a time
        chunk_row += hidden.dtype.itemsize * max(v_student, v_teacher)
    chunk_row += limits.row_bytes
    chunk_row += sum(_gathered_row(side) for side in (student, teacher) if side is not None)
    grad_row = panel_dtype.itemsize * v_student if has_grad else 0
    if projection is not None:
        grad_row += projection.row_bytes(student.weight)
    # beside a panel: the copy of its hidden states without rows of weight 0
    panel_row = grad_row + (hidden.dtype.itemsize * hidden.shape[1] if needs.weight else 0)
    panel_row += _gathered_row(student)
    is_cut = cut_of(student.weight.shape[0], hidden) < student.weight.shape[0]
    cut_row = 4 * hidden.shape[1] if needs.hidden and is_cut else 0  # the sum of two products
    panel_row += cut_row
    budget = limits.budget_bytes
    if not needs.weight:
        row = chunk_row + grad_row + cut_row
        chunk = _rows_within(num_rows, budget, row, limits.chunk_size)
        return ChunkPlan(chunk, chunk)
    accumulator = 4 * student.weight.numel()
    if hidden.dtype == torch.bfloat16 and num_rows * grad_row <= accumulator:
        room = budget - num_rows * (panel_row - grad_row)
        return ChunkPlan(_rows_within(num_rows, room, chunk_row, limits.chunk_size), num_rows)
    if limits.chunk_size is not None:
        return ChunkPlan(*[min(limits.chunk_size, num_rows)] * 2)
    if num_rows * (chunk_row + panel_row) <= budget:
        return ChunkPlan(num_rows, num_rows)
    panel = _rows_within(num_rows, budget // 2, panel_row, None)
    chunk = _rows_within(panel, budget - panel * panel_row, chunk_row, None)
    return ChunkPlan(chunk, panel // chunk * chunk)


def _gathered_row(side: LinearHead) -> int:
    """Bytes of a row of hidden states that an index copies."""
    return 0 if side.row_index is None else side.hidden.dtype.itemsize * side.hidden.shape[1]


def _rows_within(num_rows: int, num_bytes: int, row_bytes: int, chunk_size: int | None) -> int:
    """At most chunk_size rows, else what the bytes hold, in parts of about equal size."""
    if chunk_size is not None:
        return min(chunk_size, num_rows)
    limit = max(1, num_bytes // row_bytes)
    if num_rows <= limit:
        return num_rows
    multiple = next((m for m in ROW_MULTIPLES if m <= limit), 1)
    limit -= limit % multiple
    even = -(-num_rows // -(-num_rows // limit))
    return -(-even // multiple) * multiple
