"""Fused linear ULD: distillation across tokenizers, both heads and the sorted L1 distance of their
probabilities, without full logits and without a sort on the GPU.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, S scalar rows, R rows of the
student that are projected, D hidden size (D_s, D_t), V vocabulary (V_s, V_t). P teacher, Q student.
Ladder: uld/triton_sums.py, uld_rows.py and token_rows.py or torch_uld_rows.py ->
chunking.run_chunks -> uld_operator -> FusedLinearULDFunction -> fused_linear_uld ->
FusedLinearULDLoss.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import DEFAULT_BUDGET_BYTES, LinearHead, float_dtype
from gold_kernels.engine.gradients import save_gradients, scaled_gradients
from gold_kernels.engine.heads import check_heads, mean_weights, per_side
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.tokens.vocabulary import VocabOverlap
from gold_kernels.uld import checks as uld_checks
from gold_kernels.uld.operator import ULDOptions, ULDRows, linear_uld_operator


class ULDMetrics(NamedTuple):
    """Unweighted values of every group or pair of rows, detached, (G,) float32 each."""

    loss: Tensor
    matched_loss: Tensor  # generalized JSD of matched entries, without its weight
    unmatched_loss: Tensor  # sorted L1 of the others; without an overlap, of all
    student_matched_mass: Tensor  # probability of the matched entries
    teacher_matched_mass: Tensor


class FusedLinearULDFunction(torch.autograd.Function):
    """Gradients are computed in the forward pass; backward only multiplies them by grad_loss."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (N_s, D_s)
        student_weight: Tensor,  # (V_s, D_s)
        student_bias: Tensor | None,  # (V_s,)
        teacher_hidden: Tensor,  # (N_t, D_t)
        teacher_weight: Tensor,  # (V_t, D_t)
        teacher_bias: Tensor | None,  # (V_t,)
        num_groups: int,
        rows: ULDRows,
        options: ULDOptions,
    ) -> tuple[Tensor, Tensor]:  # () loss, (7, R) values
        needs = list(ctx.needs_input_grad[:3])
        tensors = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight)
        values, *grads = linear_uld_operator(*tensors, teacher_bias, needs, *rows, *options)
        save_gradients(ctx, grads, student_hidden.dtype, options.backend)
        ctx.mark_non_differentiable(values)
        # where, not a product: a row of weight 0 may hold anything
        weighted = torch.where(rows.weights != 0, rows.weights * values[:2].T, 0)
        return weighted[:num_groups, 0].sum() + weighted[:, 1].sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_values: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_loss), *[None] * 6)


def overlap_weights(
    function: str,
    overlap: VocabOverlap | None,
    matched_weight: float | None,
    unmatched_weight: float | None,
) -> tuple[float, float]:
    """Weights of the two parts; without any, the share of the student's vocabulary that matches."""
    uld_checks.check_weights(function, overlap, matched_weight, unmatched_weight)
    if matched_weight is not None:
        return float(matched_weight), float(unmatched_weight)
    if overlap is None:
        return 1.0, 1.0
    return overlap.student_share, 1.0 - overlap.student_share


def matched_tables(
    overlap: VocabOverlap | None, v_student: int, v_teacher: int, device: torch.device
) -> list[Tensor]:
    """[], or [(K,), (K,) int32 matched entries of student and teacher; (V_s,), (V_t,) bool, which
    entries are matched].
    """
    if overlap is None:
        return []
    ids = [side.to(device) for side in overlap[:2]]
    flags = [
        torch.zeros(size, dtype=torch.bool, device=device).index_fill_(0, own, True)
        for size, own in zip((v_student, v_teacher), ids, strict=True)
    ]
    return [*(own.int() for own in ids), *flags]


def _projected_rows(
    alignment: TokenAlignment | None,
    row_weights: Tensor,  # (G,)
    labels: Tensor | None,  # (N_s,)
    label_weights: Tensor | None,  # (N_s,)
    num_rows: int,
) -> ULDRows:
    """Base rows, then scalar rows, then, for the cross-entropy alone, rows in no group."""
    has_labels = labels is not None
    if alignment is None:
        weights = torch.stack([row_weights, _hard_weights(labels, label_weights, row_weights)], 1)
        return ULDRows(weights, [labels.contiguous()] if has_labels else [])
    student, teacher = alignment.sides
    base_rows, _, *student_scalars = student
    index = torch.cat([base_rows, student_scalars[0]])
    weights = torch.cat([row_weights, row_weights[student_scalars[2]]])
    if has_labels:
        is_used = torch.zeros(num_rows, dtype=torch.bool, device=index.device).index_fill_(
            0, index, True
        )
        others = is_used.to(torch.int8).argsort(stable=True)[: num_rows - index.shape[0]]
        index = torch.cat([index, others])
        weights = torch.cat([weights, weights.new_zeros(others.shape[0])])
        labels, label_weights = labels[index], label_weights[index]
    hard_weights = _hard_weights(labels, label_weights, weights)
    return ULDRows(
        torch.stack([weights, hard_weights], 1),
        [labels] if has_labels else [],
        [index, teacher[0]],
        student_scalars if student_scalars[0].shape[0] else [],
        teacher[2:] if teacher[2].shape[0] else [],
    )


def _hard_weights(labels: Tensor | None, label_weights: Tensor | None, like: Tensor) -> Tensor:
    if labels is None:
        return torch.zeros_like(like)
    return torch.where(labels >= 0, label_weights.to(like.dtype), 0)


def fused_linear_uld(
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    row_weights: Tensor | None = None,  # (G,), float32; None means 1 / G each
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    alignment: TokenAlignment | None = None,  # None: row i with row i, G = N_s = N_t
    overlap: VocabOverlap | None = None,  # matched entries, for the hybrid loss
    beta: float = 0.5,  # of the generalized JSD of matched entries
    matched_weight: float | None = None,  # None for both: the share of the vocabulary that matches
    unmatched_weight: float | None = None,
    labels: Tensor | None = None,  # (N_s,) int64 the student's tokens, negative where not scored
    label_weights: Tensor | None = None,  # (N_s,) float32; None means 1 / number of labels each
    student_bias: Tensor | None = None,  # (V_s,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    chunk_size: int | None = None,  # rows; None takes them from the memory budget
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    logits_dtype: torch.dtype | None = None,  # None: float32; torch.bfloat16 is the fast mode
    final_logit_softcapping: float | tuple[float | None, float | None] | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    backend: str | None = None,  # "triton", "torch" or None: by device
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ULDMetrics]:  # (), float32
    """Universal logit distillation between two vocabularies, without full logits.

        loss = sum_g row_weights[g] * sum_k |s_g(k) - t_g(k)| + sum_i label_weights[i] * CE_i

    s_g and t_g are the probabilities of group g, sorted in descending order, the shorter side
    padded with 0 (Boizard et al. 2024, arXiv 2402.12030, eq. 3). With an alignment they are those
    of the group's base rows times the probabilities of its scalar tokens, in log space (extended
    ULD, see TokenAlignment); gradients go to base and scalar rows alike. With an overlap the loss
    is hybrid,

        matched_weight * JSD_beta(matched entries) + unmatched_weight * sorted L1 of the others

    where JSD_beta is that of fused_linear_jsd on sub-distributions (KL with + sum q - sum p, so
    never negative). In a bayesian group of several tokens an entry is not the continuation that
    its bytes say, since other tokens of the group come before it: there the hybrid loss is
    matched_weight * JSD_beta of two outcomes, the bytes of the group follow or others do.
    merge="observed" matches entries there too, as TRL. Weights None take the share of the
    student's vocabulary that is matched, and one minus it. The cross-entropy is taken at
    temperature 1 on the student's own logits.

    backend "torch" sorts and is exact. "triton" counts on a grid and orders only the bins in which
    the sign may change: on its own float32 logits the loss is within 1e-4 and the gradient within
    1e-2, near convergence 2e-2. logits_dtype=torch.bfloat16 is faster and does not order:
    4 % off in the gradient for vocabularies of different sizes, 10 % for equal ones (40 % with the
    rounding of the GEMMs), and wrong near convergence. Between equal vocabularies near convergence
    ordering takes most of the time (benchmarks/NOTES.md); fused_linear_jsd is the loss for a shared
    tokenizer.

    Extra memory is at most budget_bytes, plus one float32 student_weight if a 16-bit one needs a
    gradient. Rows of weight 0 contribute exactly 0 and may hold anything. return_metrics=True
    returns (loss, ULDMetrics). Not supported: a second derivative, torch.func transforms. Raises
    ValueError for shapes, dtypes, devices and scalars that do not fit, with the remedy.
    """
    function = "fused_linear_uld"
    scales, caps = per_side(logit_scale), per_side(final_logit_softcapping)
    student, teacher = check_heads(
        function,
        LinearHead(student_hidden, student_weight, student_bias, scales[0], caps[0]),
        LinearHead(teacher_hidden, teacher_weight, teacher_bias, scales[1], caps[1]),
    )
    for temperature in (student_temperature, teacher_temperature):
        checks.check_scalars(function, beta, temperature, chunk_size)
    checks.check_limits(function, budget_bytes, logits_dtype, student.hidden)
    v_student, v_teacher = student.weight.shape[0], teacher.weight.shape[0]
    num_groups = uld_checks.check_alignment(function, student.hidden, teacher.hidden, alignment)
    uld_checks.check_overlap(function, overlap, v_student, v_teacher)
    uld_checks.check_group_weights(function, row_weights, num_groups, student.hidden)
    uld_checks.check_label_weights(function, labels, label_weights, student.hidden)
    weights = overlap_weights(function, overlap, matched_weight, unmatched_weight)
    dtype, device = float_dtype(student.hidden), student.hidden.device
    if row_weights is None:
        row_weights = mean_weights(student.hidden, num_groups)
    if labels is not None and label_weights is None:
        is_label = (labels >= 0) & (labels < v_student)
        label_weights = is_label.to(dtype) / is_label.sum().clamp_min(1)
    if alignment is not None:
        alignment = alignment.to(device)
    rows = _projected_rows(
        alignment, row_weights.to(dtype), labels, label_weights, student.num_rows
    )
    has_merged = bool(rows.student_scalars or rows.teacher_scalars)
    if has_merged and overlap is not None and alignment.merge == "bayesian":
        rows = rows._replace(spans=alignment.span_ids())
    with torch.autocast(device.type, enabled=False):
        loss, values = FusedLinearULDFunction.apply(
            *student[:3],
            *teacher[:3],
            num_groups,
            rows._replace(tables=matched_tables(overlap, v_student, v_teacher, device)),
            ULDOptions(
                beta,
                [student_temperature, teacher_temperature],
                *weights,
                checks.resolve_backend(function, backend, student.hidden),
                chunk_size,
                budget_bytes,
                logits_dtype,
                [student.logit_scale, teacher.logit_scale],
                [student.softcap or 0.0, teacher.softcap or 0.0],
            ),
        )
    if not return_metrics:
        return loss
    values = values[:, :num_groups]
    return loss, ULDMetrics(values[0], *values[2:6])


class FusedLinearULDLoss(nn.Module):
    """fused_linear_uld as a module: options once, heads and an alignment at every call.

    The normaliser is the caller's: row_weights, or the mean over groups.
    """

    def __init__(
        self,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        overlap: VocabOverlap | None = None,
        beta: float = 0.5,
        matched_weight: float | None = None,
        unmatched_weight: float | None = None,
        **limits: Any,  # chunk_size, budget_bytes, logits_dtype, backend of fused_linear_uld
    ) -> None:
        super().__init__()
        overlap_weights("FusedLinearULDLoss", overlap, matched_weight, unmatched_weight)
        self.options = {
            "student_temperature": student_temperature,
            "teacher_temperature": teacher_temperature,
            "overlap": overlap,
            "beta": beta,
            "matched_weight": matched_weight,
            "unmatched_weight": unmatched_weight,
            **limits,
        }

    def forward(
        self,
        student_hidden: Tensor,  # (N_s, D_s)
        student_weight: Tensor,  # (V_s, D_s)
        teacher_hidden: Tensor,  # (N_t, D_t)
        teacher_weight: Tensor,  # (V_t, D_t)
        row_weights: Tensor | None = None,  # (G,)
        alignment: TokenAlignment | None = None,
        student_bias: Tensor | None = None,  # (V_s,)
        teacher_bias: Tensor | None = None,  # (V_t,)
        labels: Tensor | None = None,  # (N_s,) int64, for the cross-entropy
        label_weights: Tensor | None = None,  # (N_s,)
    ) -> Tensor:  # ()
        return fused_linear_uld(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            row_weights,
            alignment=alignment,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            labels=labels,
            label_weights=label_weights,
            **self.options,
        )
