"""The one chunk loop: logits of both heads a few rows at a time, and the gradient GEMMs.

N scored rows, C rows of a chunk, P rows of a panel, D hidden size (D_s, D_t), V vocabulary (V_s,
V_t). For each chunk: student and teacher logits by one GEMM each, and a row function that turns
them into row values and the gradient of the student logits, in the rows of a panel. For each panel,
which is one or more chunks: grad_hidden = G W, grad_weight += G^T h and grad_bias += sum G.

Why two sizes: logits are float32 and their GEMMs are as fast at 384 rows as at 4096; the gradient
is 16-bit, and every accumulation into grad_weight (V, D_s) reads and writes all of it, which at 384
rows costs more than the arithmetic (benchmarks/NOTES.md has the measurement).

Precision: GEMMs in the dtype of the inputs with float32 accumulation and float32 logits unless
asked otherwise, row functions in float32, grad_weight accumulated in float32 over panels and
rounded once. float64 inputs are computed in float64 throughout.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.products import (
    Projection,
    cut_of,
    project_,
    pull_back_,
    pull_back_weight_,
)
from gold_kernels.triton.launch import aligned_width, empty_rows

DEFAULT_BUDGET_BYTES = 1 << 30  # of the buffers of a chunk and a panel
# float16 ends at 6e-8, far above row_weight * probability: gradients travel as 2**14 / max
# |row_weight| / grad_bound times themselves (no entry is beyond 3 row weights times grad_bound, see
# run_chunks) and are kept in float32 until backward.
FLOAT16_GRAD_LIMIT = 2.0**14
# Rows of a chunk are a multiple of one of these where the budget allows it: 256 rows are two
# programs of a row kernel on each multiprocessor of a Hopper GPU, 128 and 16 fill tiles of GEMMs.
ROW_MULTIPLES = (256, 128, 16)


class LinearHead(NamedTuple):
    """Hidden states and the language-model head that projects them; row_index says which rows of
    hidden, each at most once, and in which order.
    """

    hidden: Tensor  # (N, D), with a row_index any number of rows
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    row_index: Tensor | None = None  # (N,) int64

    @property
    def num_rows(self) -> int:  # N
        return (self.hidden if self.row_index is None else self.row_index).shape[0]

    def rows_of(self, rows: slice) -> Tensor:  # (C, D)
        return self.hidden[rows if self.row_index is None else self.row_index[rows]]

    def project_(self, logits: Tensor, rows: slice) -> Tensor:
        """Overwrite logits (C, V) with softcap(logit_scale (hidden W^T + bias)) of some rows."""
        project_(logits, self.rows_of(rows), self.weight)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
            if self.bias is not None:  # a column masked with -inf is now -softcap
                logits.add_(torch.where(self.bias == -torch.inf, self.bias, 0))
        return logits


def first_entries(head: LinearHead, vocab_size: int) -> LinearHead:
    """The head of the first vocab_size entries; the others have probability 0."""
    if vocab_size == head.weight.shape[0]:
        return head
    bias = None if head.bias is None else head.bias[:vocab_size]
    return head._replace(weight=head.weight[:vocab_size], bias=bias)


class Needs(NamedTuple):
    """Which gradients the caller will ask for."""

    hidden: bool
    weight: bool
    bias: bool


class ChunkedGradients(NamedTuple):
    """Gradients of sum_i row_weights[i] * loss_i; None where not needed."""

    hidden: Tensor | None  # (N, D_s)
    weight: Tensor | None  # (V_s, D_s)
    bias: Tensor | None  # (V_s,)

    def of_entries(self, num_entries: int) -> "ChunkedGradients":
        """Views, without the entries behind."""
        return self._replace(
            weight=None if self.weight is None else self.weight[:num_entries],
            bias=None if self.bias is None else self.bias[:num_entries],
        )


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


# (student_logits, teacher_logits or None, grad_logits or None, rows, row_weights) -> None; see
# run_chunks. Any: where every row is paired, a function takes teacher_logits as a Tensor.
RowFunction = Callable[[Tensor, Any, Tensor | None, slice, Tensor], None]


def float_dtype(hidden: Tensor) -> torch.dtype:
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


def run_chunks(
    student: LinearHead,
    teacher: LinearHead | None,
    row_weights: Tensor,  # (N,) or, for several terms of the loss, (N, W); float32 or float64
    row_function: RowFunction,
    needs: Needs,
    limits: Limits,
    *,
    grad_bound: float = 1.0,
    projection: Projection | None = None,
    num_padded: int = 0,
) -> ChunkedGradients:
    """Call row_function on every chunk and return the gradients of the weighted sum of its losses.

    row_function overwrites grad_logits (C, V) with row_weight * gradient; it is student_logits
    itself where the dtypes are the same. A row of weight 0 contributes exactly 0, whatever it
    holds. A teacher of fewer rows is paired with the first ones; chunks of the others come after
    and have teacher_logits None. grad_bound, at least 1, is what scales a gradient beside its row
    weight: float16 must not overflow. Gradients of weight and bias end with num_padded more
    entries, zeros: autograd would copy the gradient of a slice into such a tensor.
    """
    hidden, weight = student.hidden, student.weight
    num_rows, has_grad = student.num_rows, any(needs)
    num_paired = 0 if teacher is None else teacher.num_rows
    plan = plan_chunks(student, teacher, needs, limits, projection)
    wide = float_dtype(hidden)
    panel_dtype = hidden.dtype if projection is None else wide
    padded = _empty_gradients(student, needs, plan, projection, num_padded)
    grads = padded.of_entries(weight.shape[0])
    row_weights = row_weights * student.logit_scale
    grad_scale = None
    if hidden.dtype == torch.float16 and has_grad and num_rows > 0:
        peak = row_weights.abs().amax()
        grad_scale = torch.where(peak > 0, FLOAT16_GRAD_LIMIT / grad_bound / peak, 1.0)
        row_weights = row_weights * grad_scale

    logits_dtype = limits.logits_dtype or wide
    teacher_buffer = None
    if teacher is not None and num_paired:
        teacher_buffer = empty_rows(hidden, plan.chunk, teacher.weight.shape[0], logits_dtype)
    grad_panel = None
    if has_grad:
        grad_panel = _empty_panel(hidden, plan.panel, weight.shape[0], panel_dtype)
    student_buffer = None
    if not (has_grad and logits_dtype == panel_dtype):
        student_buffer = empty_rows(hidden, plan.chunk, weight.shape[0], logits_dtype)
    for first in range(0, num_rows, plan.panel):
        last = min(first + plan.panel, num_rows)
        for rows in _chunks(first, last, num_paired, plan.chunk):
            size = rows.stop - rows.start
            in_panel = slice(rows.start - first, rows.stop - first)
            grad_logits = None if grad_panel is None else grad_panel[in_panel]
            buffer = grad_logits if student_buffer is None else student_buffer[:size]
            assert buffer is not None, "without a buffer of its own a chunk is made in the panel"
            student_logits = student.project_(buffer, rows)
            teacher_logits = None
            if teacher is not None and teacher_buffer is not None and rows.start < num_paired:
                teacher_logits = teacher.project_(teacher_buffer[:size], rows)
            row_function(student_logits, teacher_logits, grad_logits, rows, row_weights[rows])
        if grad_panel is not None:
            panel = grad_panel[: last - first]
            _add_panel(grads, student, panel, first, row_weights, projection)
    return _finish(padded, student, grad_scale)


def _empty_panel(
    hidden: Tensor, num_rows: int, vocab_size: int, dtype: torch.dtype
) -> Tensor:  # (P, V)
    """Rows for gradients, the operand of a GEMM: on a CPU without anything beside them, since the
    bfloat16 GEMM of CPUs with AMX (torch 2.14) multiplies what lies behind a row by 0.
    """
    panel = empty_rows(hidden, num_rows, aligned_width(vocab_size), dtype)
    if hidden.device.type == "cpu":
        panel[:, vocab_size:].zero_()
    return panel[:, :vocab_size]


def _chunks(first: int, last: int, num_paired: int, chunk: int) -> Iterator[slice]:
    """Rows first to last in chunks, none of which holds paired and unpaired rows."""
    while first < last:
        stop = min(first + chunk, num_paired if first < num_paired else last, last)
        yield slice(first, stop)
        first = stop


def _empty_gradients(
    student: LinearHead,
    needs: Needs,
    plan: ChunkPlan,
    projection: Projection | None,
    num_padded: int,
) -> ChunkedGradients:
    hidden, weight, num_rows = student.hidden, student.weight, student.num_rows
    wide, is_float16 = float_dtype(hidden), hidden.dtype == torch.float16
    if projection is not None and projection.weight is not None:  # no gradient of the hidden states
        shape = num_rows, projection.weight.shape[1]
        return ChunkedGradients(hidden.new_empty(shape, dtype=wide), None, None)
    # A single panel needs no accumulator: its GEMM rounds the float32 sum once, into the returned
    # tensor.
    weight_dtype = weight.dtype if num_rows <= plan.panel and not is_float16 else wide
    empty_hidden = torch.empty_like if student.row_index is None else torch.zeros_like
    num_entries = weight.shape[0] + num_padded
    grads = ChunkedGradients(
        empty_hidden(hidden, dtype=wide if is_float16 else None) if needs.hidden else None,
        weight.new_empty(num_entries, weight.shape[1], dtype=weight_dtype)
        if needs.weight
        else None,
        weight.new_zeros(num_entries, dtype=wide) if needs.bias else None,
    )
    if grads.weight is not None:
        grads.weight[0 if num_rows == 0 else weight.shape[0] :].zero_()
    return grads


def _add_panel(
    grads: ChunkedGradients,
    student: LinearHead,
    grad_logits: Tensor,  # (P, V_s)
    first: int,
    row_weights: Tensor,  # (N,) or (N, W)
    projection: Projection | None = None,
) -> None:
    """The gradient GEMMs of the rows first to first + P."""
    rows = slice(first, first + grad_logits.shape[0])
    if projection is not None:
        assert grads.hidden is not None, "a projection is of gradients of hidden states"
        grads.hidden[rows] = projection.rows(grad_logits, student.weight, rows, row_weights)
        return
    if grads.hidden is not None and student.row_index is None:
        pull_back_(grads.hidden[rows], grad_logits, student.weight)
    elif grads.hidden is not None and student.row_index is not None:
        grad_hidden = grads.hidden.new_empty(grad_logits.shape[0], grads.hidden.shape[1])
        pull_back_(grad_hidden, grad_logits, student.weight)
        grads.hidden.index_copy_(0, student.row_index[rows], grad_hidden)
    if grads.weight is not None:
        # 0 * NaN is NaN: a row of weight 0 must not reach the sum over rows
        is_live = row_weights[rows].reshape(grad_logits.shape[0], -1) != 0
        live = torch.where(is_live.any(-1, keepdim=True), student.rows_of(rows), 0)
        pull_back_weight_(grads.weight, grad_logits, live, accumulate=first > 0)
    if grads.bias is not None:
        grads.bias.add_(grad_logits.sum(0, dtype=grads.bias.dtype))


def _finish(
    grads: ChunkedGradients, student: LinearHead, grad_scale: Tensor | None
) -> ChunkedGradients:
    """Undo the float16 scale; cast accumulators to the dtypes of their tensors (float16: at
    backward).
    """
    if grad_scale is not None:
        return ChunkedGradients(
            *(None if grad is None else grad.div_(grad_scale) for grad in grads)
        )
    bias_dtype = None if student.bias is None else student.bias.dtype
    return ChunkedGradients(
        grads.hidden,
        None if grads.weight is None else grads.weight.to(student.weight.dtype),
        None if grads.bias is None else grads.bias.to(bias_dtype),
    )
