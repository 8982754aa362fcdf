"""ULD and hybrid loss for callers that already hold the logits of both sides.

N pairs of rows, V vocabulary (V_s, V_t). The same row functions as linear_uld, without heads,
chunks and groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import DEFAULT_BUDGET_BYTES, float_dtype
from gold_kernels.engine.gradients import empty_logits_gradient, empty_logits_results
from gold_kernels.engine.heads import logit_rows
from gold_kernels.tokens.vocabulary import VocabOverlap
from gold_kernels.uld import checks as uld_checks
from gold_kernels.uld.linear import ULDMetrics, matched_tables, overlap_weights
from gold_kernels.uld.operator import NUM_ROW_VALUES, SCRATCH_PART, row_functions


@torch.library.custom_op("gold_kernels::uld_logits", mutates_args=())
def _uld_logits_operator(
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    row_weights: Tensor,  # (N,)
    tables: Sequence[Tensor],
    needs_grad: bool,
    beta: float,
    temperatures: Sequence[float],
    matched_weight: float,
    unmatched_weight: float,
    backend: str,
) -> list[Tensor]:  # (7, N) row values, then the gradient (N, V_s) if needed
    """An operator, so that torch.compile takes it as it is."""
    num_rows = student_logits.shape[0]
    values = student_logits.new_zeros(NUM_ROW_VALUES, num_rows, dtype=float_dtype(student_logits))
    grad = empty_logits_gradient(student_logits) if needs_grad else None
    if num_rows:
        row_functions(backend)[0](
            student_logits,
            teacher_logits,
            grad,
            torch.stack([row_weights, torch.zeros_like(row_weights)], dim=1),
            None,
            None,
            tables or None,
            None,
            values,
            beta=beta,
            temperatures=temperatures,
            matched_weight=matched_weight,
            unmatched_weight=unmatched_weight,
            softcap=None,
            scratch_bytes=DEFAULT_BUDGET_BYTES // SCRATCH_PART,
        )
    return [values] if grad is None else [values, grad]


@_uld_logits_operator.register_fake
def _(student_logits: Tensor, teacher_logits: Tensor, *args: Any) -> list[Tensor]:
    return empty_logits_results(student_logits, NUM_ROW_VALUES, needs_grad=args[2])


class ULDLogitsFunction(torch.autograd.Function):
    """The gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,  # (N, V_s)
        teacher_logits: Tensor,  # (N, V_t)
        row_weights: Tensor,  # (N,)
        tables: Sequence[Tensor],
        options: Sequence[Any],  # beta, temperatures, both weights, backend
    ) -> tuple[Tensor, Tensor]:  # () loss, (7, N) values
        values, *grads = _uld_logits_operator(
            student_logits, teacher_logits, row_weights, tables, ctx.needs_input_grad[0], *options
        )
        ctx.save_for_backward(*grads)
        ctx.logits_dtype = student_logits.dtype
        ctx.mark_non_differentiable(values)
        return torch.where(row_weights != 0, values[0] * row_weights, 0).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_values: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_loss).to(ctx.logits_dtype), None, None, None, None


def uld_loss(
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    overlap: VocabOverlap | None = None,  # matched entries, for the hybrid loss
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    backend: str | None = None,  # "triton", "torch" or None: by device
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ULDMetrics]:  # (), float32
    """Universal logit distillation from logits, the meaning of fused_linear_uld without groups.

        loss = sum_i row_weights[i] * sum_k |s_i(k) - t_i(k)|

    over probabilities in descending order, the shorter side padded with 0 (Boizard et al. 2024,
    arXiv 2402.12030, eq. 3); with an overlap the hybrid loss. Gradients go to student_logits only.
    Softmax and loss are float32. Prefer fused_linear_uld, which needs no logits: both lines that
    make them go, and the loss gets hidden states and heads. On a GPU logits whose row stride is no
    multiple of 16 are slower, and an overlap takes (N, K) of the teacher's dtype for a copy of its
    matched logits. Not supported: a second derivative. Raises ValueError for shapes, dtypes,
    devices and scalars that do not fit.
    """
    function = "uld_loss"
    checks.check_logits(function, student_logits, teacher_logits, row_weights)
    for temperature in (student_temperature, teacher_temperature):
        checks.check_scalars(function, beta, temperature, None)
    v_student, v_teacher = student_logits.shape[1], teacher_logits.shape[1]
    uld_checks.check_columns(function, v_student, v_teacher)
    uld_checks.check_overlap(function, overlap, v_student, v_teacher)
    weights = overlap_weights(function, overlap, matched_weight, unmatched_weight)
    backend = checks.resolve_backend(function, backend, student_logits)
    loss, values = ULDLogitsFunction.apply(
        *logit_rows(student_logits, teacher_logits, row_weights),
        matched_tables(overlap, v_student, v_teacher, student_logits.device),
        (beta, [student_temperature, teacher_temperature], *weights, backend),
    )
    return (loss, ULDMetrics(values[0], *values[2:6])) if return_metrics else loss
