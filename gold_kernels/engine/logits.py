"""Every loss from logits that the caller holds: one operator, one autograd Function.

N rows, T terms of the loss, V vocabulary (V_s, V_t). The same row functions as for heads, called
once on all rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import Limits, float_dtype
from gold_kernels.engine.gradients import (
    empty_logits_gradient,
    empty_values,
    finished_gradients,
    graph_anchors,
    once_differentiable,
    refuse_batch,
)
from gold_kernels.engine.linear import reduce_rows
from gold_kernels.engine.options import Options
from gold_kernels.engine.overwriting import is_intact, overwriting, refuse_overwritten
from gold_kernels.engine.row_loss import ROW_LOSSES, RowLoss, Rows


def _run_rows(
    row_loss: RowLoss,
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    grad_logits: Tensor | None,  # (N, V_s), overwritten; may be student_logits
    weights: Tensor,  # (N, T)
    labels: Tensor | None,  # (N,) int64
    backend: str,
    has_metrics: bool,
) -> Tensor:  # (number of value names, N)
    num_rows = student_logits.shape[0]
    values = student_logits.new_zeros(
        len(row_loss.value_names), num_rows, dtype=float_dtype(student_logits)
    )
    if num_rows:
        row_function = row_loss.start(Rows(values, labels, Limits(), backend, has_metrics))
        row_function(student_logits, teacher_logits, grad_logits, slice(0, num_rows), weights)
    return values


@torch.library.custom_op("gold_kernels::logits_loss", mutates_args=())
def _logits_loss_operator(
    student_logits: Tensor,  # (N, V_s)
    needs_grad: bool,
    loss: str,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    teacher_logits: Tensor,  # (N, V_t)
    weights: Tensor,  # (N, T)
    labels: Tensor | None,  # (N,) int64
    backend: str,
    has_metrics: bool,
) -> list[Tensor]:  # (number of value names, N) row values, then the gradient (N, V_s) if needed
    """An operator, so that torch.compile takes it as it is."""
    sides = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    refuse_overwritten(f"{loss}_loss", **sides)
    row_loss = ROW_LOSSES[loss].from_flat(numbers, tensors)
    grad = empty_logits_gradient(student_logits) if needs_grad else None
    values = _run_rows(
        *(row_loss, student_logits, teacher_logits, grad, weights, labels, backend, has_metrics)
    )
    return [values] if grad is None else [values, grad]


@_logits_loss_operator.register_fake
def _(
    student_logits: Tensor, needs_grad: bool, loss: str, *_others: Any, **_named: Any
) -> list[Tensor]:
    num_values = len(ROW_LOSSES[loss].value_names)
    values = empty_values(num_values, student_logits.shape[0], student_logits)
    return [values, empty_logits_gradient(student_logits)] if needs_grad else [values]


class LogitsLossFunction(torch.autograd.Function):
    """The gradient is computed in the forward pass; in place it lives in student_logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,  # (N, V_s)
        teacher_logits: Tensor,  # (N, V_t)
        weights: Tensor,  # (N, T)
        labels: Tensor | None,  # (N,) int64
        row_loss: RowLoss,
        backend: str,
        has_metrics: bool,
        is_per_row: bool,
        is_in_place: bool,
        anchors: tuple[Tensor, ...],  # gradients.graph_anchors of student_logits
    ) -> tuple[Tensor, Tensor]:  # () or (N,) loss, (number of value names, N) values
        needs_grad = ctx.needs_input_grad[0]
        ctx.anchors = anchors
        ctx.backend = backend
        ctx.grad_in_place = None
        # a traced pass cannot tell what an earlier one has overwritten: memory of its own
        if is_in_place and needs_grad and not torch.compiler.is_compiling():
            ctx.grad_in_place = grad = student_logits.detach()
            with overwriting(grad):
                values = _run_rows(
                    *(row_loss, grad, teacher_logits, grad, weights, labels, backend, has_metrics)
                )
                if backend == "triton":
                    # else autograd would not know, whose functions may have saved these logits
                    torch.autograd.graph.increment_version(grad)
        else:
            values, *grads = _logits_loss_operator(
                student_logits,
                needs_grad,
                row_loss.name,
                row_loss.numbers(),
                row_loss.tensors(),
                *(teacher_logits, weights, labels, backend, has_metrics),
            )
            ctx.save_for_backward(*grads)
            ctx.logits_dtype = student_logits.dtype
        ctx.is_live = (weights != 0).any(1, keepdim=True) if is_per_row else None
        ctx.mark_non_differentiable(values)
        terms = weights[:, : 1 if labels is None else 2]
        return reduce_rows(values, terms, student_logits.shape[0], is_per_row), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_values: Tensor) -> tuple[Tensor | None, ...]:
        others = [None] * 9
        if ctx.grad_in_place is None and ctx.is_live is None:
            dtypes = [ctx.logits_dtype]
            grads = finished_gradients(ctx.saved_tensors, grad_loss, dtypes, ctx.backend)
            return grads[0], *others
        factor = grad_loss
        if ctx.is_live is not None:  # what comes from above may be anything for a row of weight 0
            factor = torch.where(ctx.is_live, grad_loss.unsqueeze(1), 0)
        if ctx.grad_in_place is None:
            (grad,) = ctx.saved_tensors
            return (grad * factor).to(ctx.logits_dtype), *others
        refuse_batch(grad_loss, "in_place=True")
        grad, ctx.grad_in_place = ctx.grad_in_place, False
        if grad is False:
            raise RuntimeError(
                "in_place: a second backward needs in_place=False; the first one scaled the "
                "gradient where it lies."
            )
        if not is_intact(grad):
            raise RuntimeError(
                "in_place: student_logits hold the gradient until backward, and were written to "
                "before it; pass in_place=False."
            )
        with overwriting(grad):
            return grad.mul_(factor), *others


def run_logits_loss(
    row_loss: RowLoss,
    student_logits: Tensor,  # (N, V_s), unit column stride
    teacher_logits: Tensor,  # (N, V_t), unit column stride
    weights: Tensor,  # (N, T)
    options: Options,  # checked
    has_metrics: bool,
    is_in_place: bool,
) -> tuple[Tensor, Tensor]:  # () or (N,) loss, (number of value names, N) values
    """Run a row loss on logits."""
    if not torch.is_grad_enabled():  # an autograd Function is told of requires_grad, not of no_grad
        student_logits = student_logits.detach()
    labels = None if options.labels is None else options.labels.contiguous()
    return LogitsLossFunction.apply(
        student_logits,
        teacher_logits.detach(),
        weights,
        labels,
        row_loss,
        options.backend,
        has_metrics,
        options.reduction == "none",
        is_in_place,
        graph_anchors(student_logits),
    )
