"""Every loss from hidden states and heads: one operator, one autograd Function, one reduction.

N rows of hidden states of a side (N_s, N_t), R rows of the student that are projected, the first P
of them paired with the teacher's, T terms of the loss, D hidden size (D_s, D_t), V vocabulary (V_s,
V_t). A term is the loss, or the cross-entropy on labels.

The gradient is computed in the forward pass, for the row weights of the call, and backward
multiplies it by what comes from above. That works where one number comes from above
(reduction="sum"), and, where only the hidden states are trained, for one number a row
(reduction="none"). The gradient of a trained head is a sum over rows: with reduction="none" it is
computed in backward, when the factor of each row is known, at the price of the logits' GEMMs once
more.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import Limits, Needs, float_dtype
from gold_kernels.engine.chunking import run_chunks
from gold_kernels.engine.gradients import (
    empty_gradients,
    empty_values,
    finished_gradients,
    graph_anchors,
    once_differentiable,
    refuse_batch,
)
from gold_kernels.engine.linear_head import LinearHead, first_entries
from gold_kernels.engine.options import Options
from gold_kernels.engine.row_loss import ROW_LOSSES, RowLoss, Rows
from gold_kernels.engine.slices import Slices


class RowPlan(NamedTuple):
    """Which rows meet, and what each term of their loss weighs."""

    weights: Tensor  # (R, T)
    labels: Tensor | None = None  # (R,) int64
    student_index: Tensor | None = None  # (R,) int64 rows of student_hidden; None: all, in order
    teacher_index: Tensor | None = None  # (P,) int64
    owners: Tensor | None = None  # (R,) int64 in [0, P), whose loss a row is part of; None: its own


class _Inputs(NamedTuple):
    """Tensors of a call without a gradient; autograd saves them one by one."""

    weights: Tensor
    teacher_hidden: Tensor | None  # None: the row loss knows the teacher by its own tensors
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    student_index: Tensor | None
    teacher_index: Tensor | None


class _Settings(NamedTuple):
    """What a call has beside tensors; plain values that an operator takes."""

    loss: str  # key of ROW_LOSSES
    numbers: Sequence[float]  # RowLoss.numbers
    has_metrics: bool
    backend: str
    chunk_size: int | None
    budget_bytes: int
    logits_dtype: torch.dtype | None
    logit_scales: Sequence[float]  # student, teacher
    softcaps: Sequence[float]  # 0: none
    num_entries: int  # of the student's head that take part, from the first
    group: str  # name of the process group whose slices the heads are; empty: heads are whole
    student_sizes: Sequence[int]  # Slices.sizes
    teacher_sizes: Sequence[int]


@torch.library.custom_op("gold_kernels::linear_loss", mutates_args=())
def _linear_loss_operator(
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    student_bias: Tensor | None,  # (V_s,)
    needs: Sequence[bool],  # gradients of the three above
    weights: Tensor,  # (R, T)
    loss: str,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],  # RowLoss.tensors
    teacher_hidden: Tensor | None,  # (N_t, D_t)
    teacher_weight: Tensor | None,  # (V_t, D_t)
    teacher_bias: Tensor | None,  # (V_t,)
    labels: Tensor | None,  # (R,) int64
    student_index: Tensor | None,  # (R,) int64
    teacher_index: Tensor | None,  # (P,) int64
    has_metrics: bool,
    backend: str,
    chunk_size: int | None,
    budget_bytes: int,
    logits_dtype: torch.dtype | None,
    logit_scales: Sequence[float],
    softcaps: Sequence[float],
    num_entries: int,
    group: str,
    student_sizes: Sequence[int],
    teacher_sizes: Sequence[int],
) -> list[Tensor]:  # (number of value names, R) row values, then a gradient for each true need
    """An operator, so that torch.compile takes it as it is, for any R, instead of tracing it."""
    row_loss = ROW_LOSSES[loss].from_flat(numbers, tensors)
    caps = [cap or None for cap in softcaps]
    student_head = (student_hidden, student_weight, student_bias, logit_scales[0], caps[0])
    student = first_entries(LinearHead(*student_head, student_index), num_entries)
    student = _in_slices(student, group, student_sizes)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher_head = (teacher_hidden, teacher_weight, teacher_bias, logit_scales[1], caps[1])
        teacher = _in_slices(LinearHead(*teacher_head, teacher_index), group, teacher_sizes)
    values = student_hidden.new_zeros(
        len(row_loss.value_names), student.num_rows, dtype=float_dtype(student_hidden)
    )
    limits = Limits(chunk_size, budget_bytes, logits_dtype)
    slices = row_loss.slices(student, teacher, labels, limits.dtype_of_logits(values))
    rows = Rows(values, labels, limits, backend, has_metrics, student, teacher, slices)
    vocabularies = student.vocab_size, 0 if teacher is None else teacher.vocab_size
    grads = run_chunks(
        student,
        teacher,
        weights,
        row_loss.start(rows),
        Needs(*needs),
        row_loss.limits(limits, *vocabularies, rows),
        grad_bound=row_loss.grad_bound(),
        projection=row_loss.projection(),
        num_padded=student_weight.shape[0] - num_entries,
        values=values,
        takes_slices=slices is not None,
    )
    return [values, *(grad for grad in grads if grad is not None)]


def _in_slices(head: LinearHead, group: str, sizes: Sequence[int]) -> LinearHead:
    return head._replace(slices=Slices(group, tuple(sizes))) if group else head


@_linear_loss_operator.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    needs: Sequence[bool],
    weights: Tensor,
    loss: str,
    *_others: Any,
    **_named: Any,
) -> list[Tensor]:
    values = empty_values(len(ROW_LOSSES[loss].value_names), weights.shape[0], student_hidden)
    return [values, *empty_gradients((student_hidden, student_weight, student_bias), needs)]


class LinearLossFunction(torch.autograd.Function):
    """Loss and row values of a call; see the head of this file for where gradients are computed."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (N_s, D_s)
        student_weight: Tensor,  # (V_s, D_s)
        student_bias: Tensor | None,  # (V_s,)
        inputs: _Inputs,
        tensors: Sequence[Tensor | None],
        settings: _Settings,
        owners: Tensor | None,  # (R,) int64
        is_per_row: bool,
        anchors: tuple[Tensor, ...],  # gradients.graph_anchors of the first three
    ) -> tuple[Tensor, Tensor]:  # () or (P,) loss, (number of value names, R) values
        needs = list(ctx.needs_input_grad[:3])
        leaves = (student_hidden, student_weight, student_bias)
        ctx.needs, ctx.settings, ctx.is_per_row = needs, settings, is_per_row
        ctx.anchors = anchors
        ctx.is_deferred = is_per_row and (needs[1] or needs[2])
        values, *grads = _linear_loss_operator(
            *leaves,
            needs=[False] * 3 if ctx.is_deferred else needs,
            tensors=tensors,
            **inputs._asdict(),
            **settings._asdict(),
        )
        if ctx.is_deferred:
            _save(ctx, owners, *leaves, *inputs, *tensors)
        elif is_per_row:
            ctx.num_rows = student_hidden.shape[0]
            is_live = (inputs.weights != 0).any(1)
            _save(ctx, owners, inputs.student_index, is_live, *grads)
        else:
            ctx.save_for_backward(*grads)
        ctx.dtypes = [
            t.dtype for t, need in zip(leaves, needs, strict=True) if t is not None and need
        ]
        ctx.mark_non_differentiable(values)
        num_paired = _num_paired(inputs)
        return reduce_rows(values, inputs.weights, num_paired, is_per_row), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_values: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_deferred:
            refuse_batch(grad_loss, "reduction='none' with a trained head or bias")
            grads = _deferred_gradients(ctx, grad_loss)
        elif ctx.is_per_row:
            grads = _row_gradients(ctx, grad_loss)
        else:
            backend = ctx.settings.backend
            grads = finished_gradients(ctx.saved_tensors, grad_loss, ctx.dtypes, backend)
        needed = iter(grads)
        return (*(next(needed) if need else None for need in ctx.needs), *[None] * 6)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Autograd refuses to save what inference mode has made, a teacher's states for instance."""
    kept = {}
    if not torch.compiler.is_compiling():  # which knows no such tensors
        kept = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.kept = kept
    ctx.save_for_backward(*(None if i in kept else t for i, t in enumerate(tensors)))


def _saved(ctx: Any) -> list[Any]:
    kept = ctx.kept
    return [kept.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]


def _num_paired(inputs: _Inputs) -> int:
    """P."""
    if inputs.teacher_hidden is None:
        return inputs.weights.shape[0]
    index = inputs.teacher_index
    return inputs.teacher_hidden.shape[0] if index is None else index.shape[0]


def _of_rows(grad_loss: Tensor, owners: Tensor | None) -> Tensor:  # (P,) -> (R,)
    return grad_loss if owners is None else grad_loss[owners]


def _row_gradients(ctx: Any, grad_loss: Tensor) -> list[Tensor]:  # (P,) -> [(N_s, D_s)] or []
    owners, student_index, is_live, *grads = _saved(ctx)
    # where: what comes from above may be anything for a row of weight 0
    factors = torch.where(is_live, _of_rows(grad_loss, owners), 0)
    if student_index is not None:
        factors = factors.new_zeros(ctx.num_rows).index_copy(0, student_index, factors)
    return [(g * factors.unsqueeze(1)).to(d) for g, d in zip(grads, ctx.dtypes, strict=True)]


def _deferred_gradients(ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """The pass that forward left out, with weights times what comes from above."""
    owners, *leaves = _saved(ctx)
    leaves, others = leaves[:3], leaves[3:]
    num_inputs = len(_Inputs._fields)
    inputs, tensors = _Inputs(*others[:num_inputs]), others[num_inputs:]
    factors = _of_rows(grad_loss, owners).unsqueeze(1)
    # where, not a product: what comes from above may be anything for a row of weight 0
    weights = torch.where(inputs.weights != 0, inputs.weights * factors, 0)
    _, *grads = _linear_loss_operator(
        *leaves,
        needs=ctx.needs,
        tensors=tensors,
        **inputs._replace(weights=weights)._asdict(),
        **ctx.settings._asdict(),
    )
    return [grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]


def reduce_rows(
    values: Tensor,  # (number of value names, R)
    weights: Tensor,  # (R, T)
    num_paired: int,  # P
    is_per_row: bool,
) -> Tensor:  # () or (P,)
    """Weighted sum of the terms of all rows, or of each paired row.

    The first term counts on paired rows only: behind them that place holds something else.
    """
    # where, not a product: a row of weight 0 may hold anything
    terms = torch.where(weights != 0, weights * values[: weights.shape[1]].T, 0)
    if is_per_row:
        return terms[:num_paired].sum(1)
    loss = terms[:num_paired, 0].sum()
    return loss if weights.shape[1] == 1 else loss + terms[:, 1].sum()


def run_linear_loss(
    row_loss: RowLoss,
    student: LinearHead,
    teacher: LinearHead | None,  # None: the row loss knows it by its own tensors
    plan: RowPlan,
    options: Options,  # checked
    has_metrics: bool,
    num_entries: int,  # of a head in slices those of all processes
) -> tuple[Tensor, Tensor]:  # () or (P,) loss, (number of value names, R) values
    """Run a row loss on heads that heads.check_heads returned. num_entries of the student's take
    part; autograd sees the whole head, so that no gradient of a slice is copied.
    """
    side: Sequence[Any] = [None] * 3 if teacher is None else teacher[:3]
    others = plan.labels, plan.student_index, plan.teacher_index
    inputs = _Inputs(plan.weights, side[0], side[1], side[2], *others)
    assert options.backend is not None, "check_options names the backend"
    live = first_entries(student, num_entries)
    slices = [None if head is None else head.slices for head in (live, teacher)]
    settings = _Settings(
        row_loss.name,
        row_loss.numbers(),
        has_metrics,
        options.backend,
        options.chunk_size,
        options.budget_bytes,
        options.logits_dtype,
        [head.logit_scale for head in (student, teacher or student)],
        [head.softcap or 0.0 for head in (student, teacher or student)],
        live.weight.shape[0],
        "" if slices[0] is None else slices[0].group_name,
        *([] if side is None else list(side.sizes) for side in slices),
    )
    leaves: Sequence[Any] = student[:3]
    if not torch.is_grad_enabled():  # an autograd Function is told of requires_grad alone
        leaves = [None if leaf is None else leaf.detach() for leaf in leaves]
    return LinearLossFunction.apply(
        *leaves,
        inputs,
        row_loss.tensors(),
        settings,
        plan.owners,
        options.reduction == "none",
        graph_anchors(*leaves),
    )
