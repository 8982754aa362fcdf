"""Fused linear generalized JSD: both heads, the divergence and its gradient, without full logits.

N scored rows, C rows of a chunk, D_s and D_t hidden sizes, V vocabulary. P teacher, Q student.
Ladder: jsd/triton_rows.py or torch_rows.py -> chunking.run_chunks -> the operator
gold_kernels::linear_jsd -> FusedLinearJSDFunction -> fused_linear_jsd -> FusedLinearJSDLoss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import (
    DEFAULT_BUDGET_BYTES,
    Limits,
    LinearHead,
    Needs,
    divergence_bound,
    float_dtype,
    run_chunks,
)
from gold_kernels.engine.gradients import empty_gradients, save_gradients, scaled_gradients
from gold_kernels.engine.heads import check_heads, mean_weights, per_side
from gold_kernels.jsd import torch_rows

NUM_ROW_VALUES = 7


class JSDMetrics(NamedTuple):
    """Unweighted values of every scored row, detached, (N,) float32 each; entropies and divergences
    in nats.
    """

    loss: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor  # KL(P || Q)
    reverse_kl: Tensor  # KL(Q || P)
    top1_agreement: Tensor  # 1 where some token is the most likely one on both sides, else 0


class _Options(NamedTuple):
    """What the loss needs besides tensors and heads; the operator takes them one by one."""

    beta: float = 0.5
    temperature: float = 1.0
    weight_soft: float = 1.0
    weight_hard: float = 0.0
    has_metrics: bool = False
    backend: str | None = None
    chunk_size: int | None = None
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    logits_dtype: torch.dtype | None = None
    logit_scales: Sequence[float] = (1.0, 1.0)  # student, teacher
    softcaps: Sequence[float] = (0.0, 0.0)  # 0: none


@torch.library.custom_op("gold_kernels::linear_jsd", mutates_args=())
def _linear_jsd_operator(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    student_bias: Tensor | None,  # (V,)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    teacher_bias: Tensor | None,  # (V,)
    row_weights: Tensor,  # (N,)
    labels: Tensor | None,  # (N,) int64
    needs: Sequence[bool],  # gradients of student_hidden, student_weight, student_bias
    beta: float,
    temperature: float,
    weight_soft: float,
    weight_hard: float,
    has_metrics: bool,
    backend: str,
    chunk_size: int | None,
    budget_bytes: int,
    logits_dtype: torch.dtype | None,
    logit_scales: Sequence[float],
    softcaps: Sequence[float],
) -> list[Tensor]:  # (7, N) row values, then a gradient for each true need
    """An operator, so that torch.compile takes it as it is, for any N, instead of tracing it."""
    if backend == "triton":
        from gold_kernels.jsd.triton_rows import jsd_rows_  # triton may be missing
    else:
        jsd_rows_ = torch_rows.jsd_rows_
    num_rows = student_hidden.shape[0]
    values = student_hidden.new_zeros(NUM_ROW_VALUES, num_rows, dtype=float_dtype(student_hidden))
    caps = [cap or None for cap in softcaps]

    def row_function(
        student_logits: Tensor,
        teacher_logits: Tensor,
        grad_logits: Tensor | None,
        rows: slice,
        chunk_weights: Tensor,
    ) -> None:
        jsd_rows_(
            student_logits,
            teacher_logits,
            grad_logits,
            chunk_weights,
            None if labels is None else labels[rows],
            values[:, rows],
            beta=beta,
            temperature=temperature,
            weight_soft=weight_soft,
            weight_hard=weight_hard,
            softcap=caps[0],
            has_metrics=has_metrics,
        )

    soft_bound = abs(weight_soft) * divergence_bound(beta) / temperature
    grads = run_chunks(
        LinearHead(student_hidden, student_weight, student_bias, logit_scales[0], caps[0]),
        LinearHead(teacher_hidden, teacher_weight, teacher_bias, logit_scales[1], caps[1]),
        row_weights,
        row_function,
        Needs(*needs),
        Limits(chunk_size, budget_bytes, logits_dtype),
        grad_bound=max(1.0, soft_bound + abs(weight_hard)),
    )
    return [values, *(grad for grad in grads if grad is not None)]


@_linear_jsd_operator.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    *args: Any,
    **options: Any,
) -> list[Tensor]:
    needs = args[5]
    num_rows = student_hidden.shape[0]
    values = student_hidden.new_empty(NUM_ROW_VALUES, num_rows, dtype=float_dtype(student_hidden))
    return [values, *empty_gradients((student_hidden, student_weight, student_bias), needs)]


class FusedLinearJSDFunction(torch.autograd.Function):
    """Gradients are computed in the forward pass; backward only multiplies them by grad_loss."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (N, D_s)
        student_weight: Tensor,  # (V, D_s)
        student_bias: Tensor | None,  # (V,)
        teacher_hidden: Tensor,  # (N, D_t)
        teacher_weight: Tensor,  # (V, D_t)
        teacher_bias: Tensor | None,  # (V,)
        row_weights: Tensor,  # (N,)
        labels: Tensor | None,  # (N,) int64
        options: _Options,
    ) -> tuple[Tensor, Tensor]:  # () loss, (7, N) values
        needs = list(ctx.needs_input_grad[:3])
        tensors = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight)
        values, *grads = _linear_jsd_operator(
            *tensors, teacher_bias, row_weights, labels, needs, *options
        )
        save_gradients(ctx, grads, student_hidden.dtype, options.backend)
        ctx.mark_non_differentiable(values)
        row_loss = options.weight_soft * values[0] + options.weight_hard * values[1]
        # where, not a product: a row of weight 0 may hold anything
        loss = torch.where(row_weights != 0, row_loss * row_weights, 0).sum()
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_values: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_loss), *[None] * 6)


def _linear_jsd(
    function: str,
    student: LinearHead,
    teacher: LinearHead,
    row_weights: Tensor | None,
    labels: Tensor | None,
    vocab_size: int | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:  # () loss, (7, N) values
    """Validate, slice the vocabulary, run; shared by the function and the module."""
    student, teacher = check_heads(function, student, teacher)
    checks.check_pair(function, student.hidden, teacher.hidden)
    checks.check_row_weights(function, row_weights, student.hidden)
    checks.check_labels(function, labels, student.hidden)
    checks.check_scalars(function, options.beta, options.temperature, options.chunk_size)
    checks.check_limits(function, options.budget_bytes, options.logits_dtype, student.hidden)
    backend = checks.resolve_backend(function, options.backend, student.hidden)
    v_student, v_teacher = student.weight.shape[0], teacher.weight.shape[0]
    vocab_size = checks.check_vocabulary(function, v_student, v_teacher, vocab_size)
    if row_weights is None:
        row_weights = mean_weights(student.hidden, student.num_rows)
    with torch.autocast(student.hidden.device.type, enabled=False):
        return FusedLinearJSDFunction.apply(
            student.hidden,
            student.weight[:vocab_size],
            None if student.bias is None else student.bias[:vocab_size],
            teacher.hidden,
            teacher.weight[:vocab_size],
            None if teacher.bias is None else teacher.bias[:vocab_size],
            row_weights.to(
                float_dtype(student.hidden)
            ).contiguous(),  # kernels step through it by one element
            None if labels is None else labels.contiguous(),
            options._replace(
                backend=backend,
                logit_scales=[student.logit_scale, teacher.logit_scale],
                softcaps=[student.softcap or 0.0, teacher.softcap or 0.0],
            ),
        )


def fused_linear_jsd(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    vocab_size: int
    | None = None,  # shared entries, where heads of one tokenizer are padded differently
    chunk_size: int | None = None,  # rows; None takes them from the memory budget
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    logits_dtype: torch.dtype | None = None,  # None: float32; torch.bfloat16 is the fast mode
    final_logit_softcapping: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    backend: str | None = None,  # "triton", "torch" or None: by device
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, JSDMetrics]:  # (), float32
    """Generalized JSD of teacher P and student Q, summed over rows with row_weights, without full
    logits.

        loss = sum_i row_weights[i] * (beta KL(P_i || M_i) + (1 - beta) KL(Q_i || M_i))
        M = beta P + (1 - beta) Q,  Q = softmax(student_hidden student_weight^T / temperature),  P
        likewise

    as in GKD (Agarwal et al. 2023, arXiv 2306.13649, section 2); beta = 0 means KL(P || Q), beta =
    1 KL(Q || P). The normaliser is the caller's: pass 1 / num_items of the global batch for a mean
    that any split into micro-batches and ranks leaves alone. Gradients go to student_hidden,
    student_weight and student_bias, never to the teacher.

    Extra memory is at most budget_bytes, plus one float32 student_weight if a 16-bit one needs a
    gradient. chunk_size caps the rows of logits at a time instead. logits_dtype=torch.bfloat16 is
    faster and wrong near convergence: with a teacher that is the student with 1 % of noise the loss
    is a tenth off and the gradient half. Logits are softcap(logit_scale * (hidden weight^T +
    bias)) with softcap(x) = c tanh(x / c), c = final_logit_softcapping; a pair is (student,
    teacher).

    Rows of weight 0 contribute exactly 0 and may hold anything. A column masked with -inf on both
    sides is left out; masked on one side it has probability 0 there, which costs at most 1e6 nats
    for beta 0 or 1 (log 0 is taken as -1e6) and log 2 or so between.

    return_metrics=True returns (loss, JSDMetrics). Not supported: a second derivative, torch.func
    transforms. Raises ValueError for shapes, dtypes, devices and scalars that do not fit, with the
    remedy.
    """
    options = _Options(
        beta=beta,
        temperature=temperature,
        has_metrics=return_metrics,
        backend=backend,
        chunk_size=chunk_size,
        budget_bytes=budget_bytes,
        logits_dtype=logits_dtype,
    )
    scales, caps = per_side(logit_scale), per_side(final_logit_softcapping)
    loss, values = _linear_jsd(
        "fused_linear_jsd",
        LinearHead(student_hidden, student_weight, student_bias, scales[0], caps[0]),
        LinearHead(teacher_hidden, teacher_weight, teacher_bias, scales[1], caps[1]),
        row_weights,
        None,
        vocab_size,
        options,
    )
    if not return_metrics:
        return loss
    return loss, JSDMetrics(values[0], *values[2:])


class FusedLinearJSDLoss(nn.Module):
    """Generalized JSD plus cross-entropy as a module, a drop-in for LigerFusedLinearJSDLoss.

        loss = weight_soft_loss * mean_i JSD_i + weight_hard_loss * mean_i CE_i

    The mean is over the rows whose label is not ignore_index; only they are projected, which costs
    one host sync to count them (gather rows yourself and call fused_linear_jsd to avoid it). Labels
    are already shifted. The cross-entropy is taken at temperature 1 from the same logits. With
    weight_hard_loss = 0, labels only select rows; a label outside the vocabulary has cross-entropy
    0, and its row still counts. `compiled` keeps the position it has in Liger;
    the loss never calls torch.compile, so it changes nothing.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        checks.check_scalars("FusedLinearJSDLoss", beta, temperature, chunk_size)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # (N, D_s) or (B, L, D_s)
        student_weight: Tensor,  # (V, D_s)
        teacher_input: Tensor,  # (N, D_t) or (B, L, D_t)
        teacher_weight: Tensor,  # (V, D_t)
        true_labels: Tensor,  # (N,) or (B, L), int64
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # (), or loss, soft loss and hard loss, each ()
        labels = true_labels.flatten()
        student_hidden = student_input.reshape(-1, student_input.shape[-1])
        teacher_hidden = teacher_input.reshape(-1, teacher_input.shape[-1])
        checks.check_pair("FusedLinearJSDLoss", student_hidden, teacher_hidden)
        checks.check_labels("FusedLinearJSDLoss", labels, student_hidden)
        scored = (labels != self.ignore_index).nonzero().squeeze(-1)
        labels = labels[scored]
        loss, values = _linear_jsd(
            "FusedLinearJSDLoss",
            LinearHead(student_hidden[scored], student_weight, student_bias),
            LinearHead(teacher_hidden[scored], teacher_weight, teacher_bias),
            None,
            labels if self.weight_hard_loss else None,
            None,
            _Options(
                beta=self.beta,
                temperature=self.temperature,
                weight_soft=self.weight_soft_loss,
                weight_hard=self.weight_hard_loss,
                chunk_size=self.chunk_size,
            ),
        )
        if not self.return_soft_hard_loss:
            return loss
        num_scored = max(1, labels.shape[0])
        return loss, values[0].sum() / num_scored, values[1].sum() / num_scored
