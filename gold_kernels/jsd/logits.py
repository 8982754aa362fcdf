"""Generalized JSD for callers that already hold the logits of both sides.

N scored rows, V vocabulary. The same row functions as linear_jsd, without heads and chunks: loss
and gradient in one call, one (N, V) tensor for the gradient or none (in place).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import float_dtype
from gold_kernels.engine.gradients import empty_logits_gradient, empty_logits_results
from gold_kernels.engine.heads import logit_rows
from gold_kernels.jsd import torch_rows
from gold_kernels.jsd.linear import NUM_ROW_VALUES, JSDMetrics


def _run_rows(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    grad_logits: Tensor | None,  # (N, V), overwritten; may be student_logits
    row_weights: Tensor,  # (N,)
    beta: float,
    temperature: float,
    has_metrics: bool,
    backend: str,
) -> Tensor:  # (7, N)
    if backend == "triton":
        from gold_kernels.jsd.triton_rows import jsd_rows_  # triton may be missing
    else:
        jsd_rows_ = torch_rows.jsd_rows_
    num_rows = student_logits.shape[0]
    values = student_logits.new_zeros(NUM_ROW_VALUES, num_rows, dtype=float_dtype(student_logits))
    if num_rows:
        jsd_rows_(
            student_logits,
            teacher_logits,
            grad_logits,
            row_weights,
            None,
            values,
            beta=beta,
            temperature=temperature,
            weight_soft=1.0,
            weight_hard=0.0,
            softcap=None,
            has_metrics=has_metrics,
        )
    return values


@torch.library.custom_op("gold_kernels::jsd_logits", mutates_args=())
def _jsd_logits_operator(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weights: Tensor,
    needs_grad: bool,
    beta: float,
    temperature: float,
    has_metrics: bool,
    backend: str,
) -> list[Tensor]:  # (7, N) row values, then the gradient (N, V) if needed
    """An operator, so that torch.compile takes it as it is."""
    grad = empty_logits_gradient(student_logits) if needs_grad else None
    options = (beta, temperature, has_metrics, backend)
    values = _run_rows(student_logits, teacher_logits, grad, row_weights, *options)
    return [values] if grad is None else [values, grad]


@_jsd_logits_operator.register_fake
def _(student_logits: Tensor, teacher_logits: Tensor, *args: Any) -> list[Tensor]:
    return empty_logits_results(student_logits, NUM_ROW_VALUES, needs_grad=args[1])


class JSDLogitsFunction(torch.autograd.Function):
    """The gradient is computed in the forward pass; in place it lives in student_logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,  # (N, V)
        teacher_logits: Tensor,  # (N, V)
        row_weights: Tensor,  # (N,)
        is_in_place: bool,
        options: Sequence[Any],  # beta, temperature, has_metrics, backend
    ) -> tuple[Tensor, Tensor]:  # () loss, (7, N) values
        needs_grad = ctx.needs_input_grad[0]
        ctx.grad_in_place = None
        if is_in_place and needs_grad:
            ctx.grad_in_place = student_logits.detach()
            values = _run_rows(
                ctx.grad_in_place, teacher_logits, ctx.grad_in_place, row_weights, *options
            )
        else:
            values, *grads = _jsd_logits_operator(
                student_logits, teacher_logits, row_weights, needs_grad, *options
            )
            ctx.save_for_backward(*grads)
            ctx.logits_dtype = student_logits.dtype
        ctx.mark_non_differentiable(values)
        return torch.where(row_weights != 0, values[0] * row_weights, 0).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_values: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_in_place is None:
            (grad,) = ctx.saved_tensors
            return (grad * grad_loss).to(ctx.logits_dtype), None, None, None, None
        grad, ctx.grad_in_place = ctx.grad_in_place, False
        if grad is False:
            raise RuntimeError(
                "jsd_loss: a second backward needs in_place=False; the first one scaled the "
                "gradient where it lies."
            )
        return grad.mul_(grad_loss), None, None, None, None


def jsd_loss(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,  # shared entries, where both are padded differently
    in_place: bool = False,
    backend: str | None = None,  # "triton", "torch" or None: by device
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, JSDMetrics]:  # (), float32
    """Generalized JSD of teacher P and student Q from logits, the meaning of fused_linear_jsd.

        loss = sum_i row_weights[i] * (beta KL(P_i || M_i) + (1 - beta) KL(Q_i || M_i))

    (Agarwal et al. 2023, arXiv 2306.13649, section 2.) Gradients go to student_logits only. Softmax
    and loss are float32; logits that are bf16 have already lost what matters near convergence:
    prefer fused_linear_jsd, which never rounds them.

    in_place=True overwrites student_logits with their gradient, so that nothing of size (N, V) is
    allocated; do not read them afterwards, and call backward once. Padded columns (vocab_size) get
    gradient 0. Not supported: a second derivative. Raises ValueError for shapes, dtypes, devices
    and scalars that do not fit.
    """
    function = "jsd_loss"
    checks.check_logits(function, student_logits, teacher_logits, row_weights)
    checks.check_scalars(function, beta, temperature, None)
    backend = checks.resolve_backend(function, backend, student_logits)
    v_student, v_teacher = student_logits.shape[1], teacher_logits.shape[1]
    vocab_size = checks.check_vocabulary(function, v_student, v_teacher, vocab_size)
    checks.check_in_place(function, in_place, student_logits, vocab_size)
    loss, values = JSDLogitsFunction.apply(
        *logit_rows(student_logits[:, :vocab_size], teacher_logits[:, :vocab_size], row_weights),
        in_place,
        (beta, temperature, return_metrics, backend),
    )
    return (loss, JSDMetrics(values[0], *values[2:])) if return_metrics else loss
