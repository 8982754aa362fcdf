"""The one chunk loop: logits of both heads a few rows at a time, and the gradient GEMMs.

N scored rows, C rows of a chunk, D hidden size (D_s, D_t), V vocabulary (V_s, V_t).
For each chunk: student and teacher logits by one GEMM each, a row function that turns them into row
values and the gradient of the student logits, then grad_hidden = G W, grad_weight += G^T h and
grad_bias += sum G.

Precision: GEMMs in the dtype of the inputs with float32 accumulation and float32 logits, row
functions in float32, grad_weight accumulated in float32 over chunks and rounded once. float64
inputs are computed in float64 throughout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of the (C, V) buffers of one chunk where the caller gives no chunk_size.
DEFAULT_BUDGET_BYTES = 1 << 30
# float16 ends at 6e-8, far above row_weight * probability: gradients travel as 2**14 / max
# |row_weight| times themselves (their absolute row sum is at most 2 row weights) and are kept in
# float32 until backward.
FLOAT16_GRAD_LIMIT = 2.0**14
GEMM_ROW_MULTIPLE = 128  # rows of a chunk are a multiple of this where the budget allows it


class LinearHead(NamedTuple):
    """Hidden states and the language-model head that projects them."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)

    def project_(self, logits: Tensor, rows: slice) -> Tensor:
        """Overwrite logits (C, V) with those of some rows."""
        matmul_(logits, self.hidden[rows], self.weight.T)
        return logits if self.bias is None else logits.add_(self.bias)


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


# (student_logits, teacher_logits, grad_logits or None, rows, row_weights) -> None; see run_chunks
RowFunction = Callable[[Tensor, Tensor, Tensor | None, slice, Tensor], None]


def matmul_(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = False) -> None:
    """out = left right, or out += left right; float32 accumulation and no rounding before out's
    dtype.
    """
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if accumulate else torch.mm(left, right, out=out)
    elif left.device.type == "cuda":
        if accumulate:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:  # no other device has a GEMM with a wider output
        matmul_(out, left.to(out.dtype), right.to(out.dtype), accumulate=accumulate)


def float_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of logits, row values and accumulators."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def bytes_per_row(student: LinearHead, teacher: LinearHead, *, has_grad: bool) -> int:
    """Bytes that one row adds to the buffers of a chunk: both logits, and the gradient unless it
    fits in place.
    """
    logits_size = float_dtype(student.hidden).itemsize
    student_v, teacher_v = student.weight.shape[0], teacher.weight.shape[0]
    grad_size = student.hidden.dtype.itemsize
    grad_bytes = grad_size * student_v if has_grad and grad_size != logits_size else 0
    return logits_size * (student_v + teacher_v) + grad_bytes


def chunk_rows(num_rows: int, row_bytes: int, chunk_size: int | None) -> int:
    """Rows per chunk: at most chunk_size, else what the budget holds, in chunks of about equal
    size.
    """
    if chunk_size is not None:
        return min(chunk_size, max(num_rows, 1))
    limit = max(1, DEFAULT_BUDGET_BYTES // row_bytes)
    if num_rows <= limit:
        return max(num_rows, 1)
    num_chunks = -(-num_rows // limit)
    even = -(-num_rows // num_chunks)
    rounded = -(-even // GEMM_ROW_MULTIPLE) * GEMM_ROW_MULTIPLE
    return rounded if rounded <= limit else even


def run_chunks(
    student: LinearHead,
    teacher: LinearHead,
    row_weights: Tensor,  # (N,) float32 or float64
    row_function: RowFunction,
    needs: Needs,
    chunk_size: int | None,
) -> ChunkedGradients:
    """Call row_function on every chunk and return the gradients of the weighted sum of its losses.

    row_function overwrites grad_logits (C, V) with row_weight * gradient; it is student_logits
    itself where the dtypes are the same. A row of weight 0 contributes exactly 0, whatever it
    holds.
    """
    hidden, weight = student.hidden, student.weight
    num_rows, has_grad = hidden.shape[0], any(needs)
    row_bytes = bytes_per_row(student, teacher, has_grad=has_grad)
    chunk = chunk_rows(num_rows, row_bytes, chunk_size)
    wide = float_dtype(hidden)
    is_float16 = hidden.dtype == torch.float16
    # A single chunk needs no accumulator: its GEMM rounds the float32 sum once, into the returned
    # tensor.
    weight_dtype = weight.dtype if num_rows <= chunk and not is_float16 else wide
    grads = ChunkedGradients(
        torch.empty_like(hidden, dtype=wide if is_float16 else None) if needs.hidden else None,
        torch.zeros_like(weight, dtype=weight_dtype) if needs.weight else None,
        torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needs.bias else None,
    )
    grad_scale = None
    if is_float16 and has_grad and num_rows > 0:
        peak = row_weights.abs().amax()
        grad_scale = torch.where(peak > 0, FLOAT16_GRAD_LIMIT / peak, 1.0)
        row_weights = row_weights * grad_scale

    student_buffer = hidden.new_empty(chunk, weight.shape[0], dtype=wide)
    teacher_buffer = hidden.new_empty(chunk, teacher.weight.shape[0], dtype=wide)
    grad_buffer = student_buffer
    if has_grad and hidden.dtype != wide:
        grad_buffer = hidden.new_empty(chunk, weight.shape[0])
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        size = rows.stop - rows.start
        student_logits = student.project_(student_buffer[:size], rows)
        teacher_logits = teacher.project_(teacher_buffer[:size], rows)
        grad_logits = grad_buffer[:size] if has_grad else None
        row_function(student_logits, teacher_logits, grad_logits, rows, row_weights[rows])
        if grads.hidden is not None:
            matmul_(grads.hidden[rows], grad_logits, weight)
        if grads.weight is not None:
            # 0 * NaN is NaN: a row of weight 0 must not reach the sum over rows
            live = torch.where(row_weights[rows, None] != 0, hidden[rows], 0)
            matmul_(grads.weight, grad_logits.T, live, accumulate=start > 0)
        if grads.bias is not None:
            grads.bias.add_(grad_logits.sum(0, dtype=wide))
    return _finish(grads, student, grad_scale)


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
