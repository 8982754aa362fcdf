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

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from gold_kernels.engine.chunk_plan import (
    ChunkPlan,
    Limits,
    Needs,
    float_dtype,
    is_packed,
    plan_chunks,
)
from gold_kernels.engine.exchange import SliceRows, WholeRows
from gold_kernels.engine.lent import LentMemory, rows_in
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.products import Projection, pull_back_, pull_back_weight_
from gold_kernels.triton.launch import aligned_width

# float16 ends at 6e-8, far above row_weight * probability: gradients travel as 2**14 / max
# |row_weight| / grad_bound times themselves (no entry is beyond 3 row weights times grad_bound, see
# run_chunks, but where log 0 is in it: docs/accuracy.md) and are kept in float32 until backward.
FLOAT16_GRAD_LIMIT = 2.0**14
LARGEST_GRAD_SCALE = 2.0**126  # row weights of 1e-36 would have one of inf, and those of 0 NaN


Inputs = ParamSpec("Inputs")


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


# (student_logits, teacher_logits or None, grad_logits or None, rows, row_weights) -> None; see
# run_chunks. Any: where every row is paired, a function takes teacher_logits as a Tensor.
RowFunction = Callable[[Tensor, Any, Tensor | None, slice, Tensor], None]


def _without_autocast(
    run: Callable[Concatenate[LinearHead, Inputs], ChunkedGradients],
) -> Callable[Concatenate[LinearHead, Inputs], ChunkedGradients]:
    """Heads have been cast; what a row function multiplies in float32 is not."""

    @functools.wraps(run)
    def guarded(
        student: LinearHead, *args: Inputs.args, **kwargs: Inputs.kwargs
    ) -> ChunkedGradients:
        device_type = student.hidden.device.type
        is_meta = device_type == "meta"  # shapes alone: nothing to cast
        with nullcontext() if is_meta else torch.autocast(device_type, enabled=False):
            return run(student, *args, **kwargs)

    return guarded


@_without_autocast
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
    values: Tensor | None = None,
    takes_slices: bool = False,
) -> ChunkedGradients:
    """Call row_function on every chunk and return the gradients of the weighted sum of its losses.

    row_function overwrites grad_logits (C, V) with row_weight * gradient; it is student_logits
    itself where the dtypes are the same. A row of weight 0 contributes exactly 0, whatever it
    holds. A teacher of fewer rows is paired with the first ones; chunks of the others come after
    and have teacher_logits None. grad_bound, at least 1, is what scales a gradient beside its row
    weight: float16 must not overflow. Gradients of weight and bias end with num_padded more
    entries, zeros: autograd would copy the gradient of a slice into such a tensor.

    Heads in slices: with takes_slices row_function sees the columns of this process and sums with
    the others itself, and a SliceRows may leave chunks to its function of whole rows. Else whole
    rows, whose values (any, N), zeros so far, are given, are what it takes. grad_hidden is the sum
    over the processes.
    """
    hidden, weight = student.hidden, student.weight
    panel_dtype = hidden.dtype if projection is None else float_dtype(hidden)
    exchange, retried, own_bytes, again_bytes = None, None, 1, 1
    if values is not None and student.slices is not None:
        dtype = limits.dtype_of_logits(hidden)
        if not takes_slices:
            exchange = WholeRows(row_function, student, teacher, values, dtype)
            limits = limits._replace(row_bytes=limits.row_bytes + exchange.row_bytes(panel_dtype))
        elif isinstance(row_function, SliceRows):
            retried = WholeRows(row_function.whole, student, teacher, values, dtype)
            widest = [head.slices.widest for head in (student, teacher) if head and head.slices]
            logits_bytes = dtype.itemsize * sum(widest)
            own_bytes = logits_bytes + limits.row_bytes
            again_bytes = logits_bytes + row_function.whole_bytes + retried.row_bytes(panel_dtype)
    num_rows, has_grad = student.num_rows, any(needs)
    num_paired = 0 if teacher is None else teacher.num_rows
    plan = plan_chunks(student, teacher, needs, limits, projection)
    padded = _empty_gradients(student, needs, plan, projection, num_padded)
    grads = padded.of_entries(weight.shape[0])
    row_weights, grad_scale = _scaled_weights(row_weights, student, has_grad, grad_bound)
    returned = padded.weight
    if returned is not None and "panel" in plan.lent:  # panels are summed into padded.weight
        returned = torch.empty_like(returned, dtype=weight.dtype)
    lent = None if returned is None else LentMemory(returned[: weight.shape[0]])
    has = exchange is None, is_packed(student, needs, limits, projection)
    buffers = _buffers(student, teacher, has_grad, limits, plan, panel_dtype, lent, *has)
    sums: list[dist.Work] = []
    for first in range(0, num_rows, plan.panel):
        last = min(first + plan.panel, num_rows)
        for rows in _chunks(first, last, num_paired, plan.chunk):
            in_panel = slice(rows.start - first, rows.stop - first)
            grad_logits = None if buffers.panel is None else buffers.panel[in_panel]
            is_paired = rows.start < num_paired
            if exchange is not None:
                exchange.run(rows, grad_logits, row_weights[rows], is_paired=is_paired)
            elif isinstance(row_function, SliceRows) and row_function.is_over:
                row_function.leave(rows)
            else:
                logits = buffers.logits(student, teacher if is_paired else None, grad_logits, rows)
                row_function(*logits, grad_logits, rows, row_weights[rows])
        if exchange is not None:
            exchange.finish(last)
        panel = None if buffers.panel is None else buffers.panel[: last - first]
        if panel is not None:
            _add_hidden(grads, student, panel, first, row_weights, projection)
        if retried is not None and isinstance(row_function, SliceRows):
            # asked here, the device has gradients of hidden states to multiply meanwhile
            refused = row_function.refused()
            if refused:
                buffers = buffers._replace(student=None, teacher=None)  # memory for what follows
                part = max(1, plan.chunk * own_bytes // again_bytes)
                retried.run_again(refused, panel, first, row_weights, part)
                if panel is not None:
                    _add_hidden(grads, student, panel, first, row_weights, projection)
        if panel is not None and projection is None:
            _add_panel(grads, student, panel, first, row_weights, sums)
    return _finish(padded, student, grad_scale, returned, sums)


def _scaled_weights(
    row_weights: Tensor, student: LinearHead, has_grad: bool, grad_bound: float
) -> tuple[Tensor, Tensor | None]:
    """Row weights of the row function, and by what gradients of float16 are too large so far."""
    row_weights = row_weights * student.logit_scale
    if student.hidden.dtype != torch.float16 or not has_grad or student.num_rows == 0:
        return row_weights, None
    peak = row_weights.abs().amax()
    grad_scale = (FLOAT16_GRAD_LIMIT / grad_bound / peak).clamp_max(LARGEST_GRAD_SCALE)
    return row_weights * grad_scale, grad_scale


class _Buffers(NamedTuple):
    """What rows are made in; None where nobody needs them."""

    student: Tensor | None  # (C, V_s); None: logits are made in the panel
    teacher: Tensor | None  # (C, V_t)
    panel: Tensor | None  # (P, V_s)

    def logits(
        self,
        student: LinearHead,
        teacher: LinearHead | None,
        grad_logits: Tensor | None,  # (C, V_s) of the panel
        rows: slice,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of a chunk."""
        size = rows.stop - rows.start
        own = grad_logits if self.student is None else self.student[:size]
        assert own is not None, "without a buffer of its own a chunk is made in the panel"
        student_logits = student.project_(own, rows)
        if teacher is None or self.teacher is None:
            return student_logits, None
        return student_logits, teacher.project_(self.teacher[:size], rows)


def _buffers(
    student: LinearHead,
    teacher: LinearHead | None,
    has_grad: bool,
    limits: Limits,
    plan: ChunkPlan,
    panel_dtype: torch.dtype,
    lent: LentMemory | None,  # until the last panel is done
    has_own: bool,  # logits; else whoever exchanges rows makes them
    has_packed: bool,  # gradients, over the logits of their rows
) -> _Buffers:
    hidden, vocab_size = student.hidden, student.weight.shape[0]
    logits_dtype = limits.dtype_of_logits(hidden)
    panel = student_rows = teacher_rows = None
    if has_packed:
        rows = rows_in(None, hidden, plan.chunk, aligned_width(vocab_size), logits_dtype)
        student_rows, panel = (memory[:, :vocab_size] for memory in (rows, rows.view(panel_dtype)))
    elif has_grad:
        memory = lent if "panel" in plan.lent else None
        panel = _empty_panel(hidden, plan.panel, vocab_size, panel_dtype, memory)
    if has_own and student_rows is None and not (has_grad and logits_dtype == panel_dtype):
        memory = lent if "student" in plan.lent else None
        student_rows = rows_in(memory, hidden, plan.chunk, vocab_size, logits_dtype)
    if has_own and teacher is not None and teacher.num_rows:
        memory = lent if "teacher" in plan.lent else None
        size = teacher.weight.shape[0]
        teacher_rows = rows_in(memory, hidden, plan.chunk, size, logits_dtype)
    return _Buffers(student_rows, teacher_rows, panel)


def _empty_panel(
    hidden: Tensor,
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    memory: LentMemory | None,
) -> Tensor:  # (P, V)
    """Rows for gradients, the operand of a GEMM: on a CPU without anything beside them, since the
    bfloat16 GEMM of CPUs with AMX (torch 2.14) multiplies what lies behind a row by 0.
    """
    panel = rows_in(memory, hidden, num_rows, aligned_width(vocab_size), dtype)
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
    is_wide = is_float16 or student.slices is not None  # a part of a sum, rounded once it is whole
    num_entries = weight.shape[0] + num_padded
    grads = ChunkedGradients(
        empty_hidden(hidden, dtype=wide if is_wide else None) if needs.hidden else None,
        weight.new_empty(num_entries, weight.shape[1], dtype=weight_dtype)
        if needs.weight
        else None,
        weight.new_zeros(num_entries, dtype=wide) if needs.bias else None,
    )
    if grads.weight is not None:
        grads.weight[0 if num_rows == 0 else weight.shape[0] :].zero_()
    return grads


def _add_hidden(
    grads: ChunkedGradients,
    student: LinearHead,
    grad_logits: Tensor,  # (P, V_s)
    first: int,
    row_weights: Tensor,  # (N,) or (N, W)
    projection: Projection | None,
) -> None:
    """The gradient of the hidden states of the rows first to first + P."""
    if grads.hidden is None:
        return
    rows = slice(first, first + grad_logits.shape[0])
    if projection is not None:
        grads.hidden[rows] = projection.rows(grad_logits, student.weight, rows, row_weights)
    elif student.row_index is None:
        pull_back_(grads.hidden[rows], grad_logits, student.weight)
    else:
        grad_hidden = grads.hidden.new_empty(grad_logits.shape[0], grads.hidden.shape[1])
        pull_back_(grad_hidden, grad_logits, student.weight)
        grads.hidden.index_copy_(0, student.row_index[rows], grad_hidden)


def _add_panel(
    grads: ChunkedGradients,
    student: LinearHead,
    grad_logits: Tensor,  # (P, V_s)
    first: int,
    row_weights: Tensor,  # (N,) or (N, W)
    sums: list["dist.Work"],  # quoted: a build without distributed has no such class
) -> None:
    """Gradients of weight and bias. Of heads in slices the sum of grad_hidden over the processes
    begins, which the next GEMM hides; sums has what to wait for.
    """
    rows = slice(first, first + grad_logits.shape[0])
    hidden = None if student.row_index is not None else grads.hidden
    if student.slices is not None and hidden is not None and hidden.is_contiguous():
        sums.append(student.slices.start_sum_(hidden[rows]))
    if grads.weight is not None:
        # 0 * NaN is NaN: a row of weight 0 must not reach the sum over rows
        is_live = row_weights[rows].reshape(grad_logits.shape[0], -1) != 0
        live = torch.where(is_live.any(-1, keepdim=True), student.rows_of(rows), 0)
        pull_back_weight_(grads.weight, grad_logits, live, accumulate=first > 0)
    if grads.bias is not None:
        grads.bias.add_(grad_logits.sum(0, dtype=grads.bias.dtype))


def _finish(
    grads: ChunkedGradients,
    student: LinearHead,
    grad_scale: Tensor | None,
    returned: Tensor | None,  # (V_s + padded, D_s) what becomes of grads.weight, or the same
    sums: Sequence["dist.Work"],  # of grad_hidden; none: its sum has not begun
) -> ChunkedGradients:
    """Sum grad_hidden over slices; undo the float16 scale; cast accumulators to the dtypes of their
    tensors (float16: at backward).
    """
    if returned is not None and grads.weight is not None and returned is not grads.weight:
        grads = grads._replace(weight=returned.copy_(grads.weight))
    if student.slices is not None and grads.hidden is not None:
        for work in sums:
            work.wait()
        total = grads.hidden if sums else student.slices.sum_(grads.hidden.contiguous())
        dtype = total.dtype if student.hidden.dtype == torch.float16 else student.hidden.dtype
        grads = grads._replace(hidden=torch.empty_like(student.hidden, dtype=dtype).copy_(total))
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
