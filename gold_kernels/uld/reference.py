"""The oracle of ULD, extended ULD and the hybrid loss: plain torch, full logits, a real sort.

Written from the papers (ULD: Boizard et al. 2024, arXiv 2402.12030; generalized JSD: Agarwal et al.
2023, arXiv 2306.13649), for float64. Probabilities stay logarithms until they are sorted and only
log 0 has a floor, so that a group of tokens that the student finds impossible has its gradient.

N rows (N_s, N_t where the sides differ), G groups, S scalar rows, V_s and V_t vocabularies, K
matched entries, D_s and D_t hidden sizes. P teacher, Q student, M = beta P + (1 - beta) Q. In a
group, P and Q are sub-distributions: their sum is the probability of the group's scalar tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, SMALLEST_REST, log_probs
from gold_kernels.jsd.reference import head_logits
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.tokens.vocabulary import VocabOverlap

# Log-probabilities closer than this are equal. Two sides that hold the same entries in another
# order differ by the rounding of their log-sum-exp, 1e-15 in float64.
TIE = 1e-12


class _SortedL1Function(torch.autograd.Function):
    """sum_k |s_(k) - t_(k)|, with the gradient averaged over the orders of tied student entries."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor) -> Tensor:  # (N, V_s), (N, V_t) -> (N,)
        q, p = log_q.exp(), log_p.exp()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(tie_averaged_sign(log_q, log_p) * q)
        size = max(q.shape[-1], p.shape[-1])
        q, p = (torch.nn.functional.pad(x, (0, size - x.shape[-1])) for x in (q, p))
        q, p = (x.sort(-1, descending=True).values for x in (q, p))
        return (q - p).abs().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        (grad_log_q,) = ctx.saved_tensors
        return grad_rows.unsqueeze(-1) * grad_log_q, None


def tie_averaged_sign(
    log_q: Tensor,  # (N, V_s)
    log_p: Tensor,  # (N, V_t)
) -> Tensor:  # (N, V_s), in [-1, 1]
    """sign(s_(k) - t_(k)) of every student entry, averaged over the ranks k that it may have.

    m student and e teacher entries of one value, below A and C larger ones, hold the student's
    ranks A to A + m - 1. There the sign is -1 for k < C, 0 for C <= k < C + e and 1 from C + e on,
    and each of the m entries gets the mean.
    """
    size = log_q.shape[-1]
    values, order = torch.cat([log_q, log_p], -1).sort(-1, descending=True)
    is_first = torch.zeros_like(order)  # of a block of ties, beginning with the second block
    is_first[:, 1:] = values[:, :-1] - values[:, 1:] > TIE
    block = is_first.cumsum(-1)
    is_student = (order < size).long()
    num_student, num_teacher = (
        torch.zeros_like(order).scatter_add_(-1, block, is_side)
        for is_side in (is_student, 1 - is_student)
    )
    after = (num_student - num_teacher).cumsum(-1)  # A + m - C - e
    before = after - num_student + num_teacher  # A - C
    num_above = torch.minimum(after.clamp_min(0), num_student)
    num_below = torch.minimum((-before).clamp_min(0), num_student)
    sign = (num_above - num_below).to(log_q.dtype) / num_student.clamp_min(1)
    return torch.zeros_like(values).scatter_(-1, order, sign.gather(-1, block))[:, :size]


def sorted_l1_rows(
    log_q: Tensor,  # (N, V_s), need not sum to 1
    log_p: Tensor,  # (N, V_t)
) -> Tensor:  # (N,)
    """sum_k |s_(k) - t_(k)| of both sides' probabilities in descending order, the shorter side
    padded with 0. Gradient to log_q only.
    """
    return _SortedL1Function.apply(log_q, log_p.detach())


def generalized_jsd_rows(
    log_q: Tensor,  # (N, K), need not sum to 1
    log_p: Tensor,  # (N, K)
    beta: float,
) -> Tensor:  # (N,), never negative
    """beta KL(P || M) + (1 - beta) KL(Q || M); beta = 0 is KL(P || Q), beta = 1 is KL(Q || P).

    KL(A || B) = sum a log(a / b) + b - a, the usual one where both sum to 1; without b - a it is
    negative where B has the larger sum.
    """
    if beta == 0:
        return _generalized_kl(log_p, log_q)
    if beta == 1:
        return _generalized_kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _generalized_kl(log_p, log_m) + (1 - beta) * _generalized_kl(log_q, log_m)


def _generalized_kl(log_a: Tensor, log_b: Tensor) -> Tensor:  # (N, K), (N, K) -> (N,)
    return (log_a.exp() * (log_a - log_b) + log_b.exp() - log_a.exp()).sum(-1)


def merged_log_scale(
    logits: Tensor,  # (S, V), of the scalar rows
    ids: Tensor,  # (S,) int64
    groups: Tensor,  # (S,) int64 in [0, G)
    num_groups: int,
    *,
    temperature: float = 1.0,
) -> Tensor:  # (G,)
    """Sum over the scalar rows of every group of log p(id | row); 0 for a group without any."""
    log_prob = log_probs(logits, temperature).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return log_prob.new_zeros(num_groups).index_add(0, groups, log_prob)


def scaled_log_probs(
    logits: Tensor,  # (N, V)
    log_scale: Tensor | None,  # (N,)
    temperature: float,
) -> Tensor:  # (N, V)
    log_prob = log_probs(logits, temperature)
    if log_scale is None:
        return log_prob
    return (log_prob + log_scale.unsqueeze(-1)).clamp_min(LOG_ZERO)


def uld_rows(
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    student_log_scale: Tensor | None = None,  # (N,), added to every log-probability
    teacher_log_scale: Tensor | None = None,  # (N,)
) -> Tensor:  # (N,), dtype of the logits
    """Universal logit distillation loss of every row, sum_k |s_(k) - t_(k)|; see sorted_l1_rows."""
    return sorted_l1_rows(
        scaled_log_probs(student_logits, student_log_scale, student_temperature),
        scaled_log_probs(teacher_logits, teacher_log_scale, teacher_temperature),
    )


def hybrid_rows(
    log_q: Tensor,  # (N, V_s), need not sum to 1
    log_p: Tensor,  # (N, V_t)
    overlap: VocabOverlap,
    *,
    beta: float,
    matched_weight: float,
    unmatched_weight: float,
) -> Tensor:  # (N,)
    """matched_weight times the generalized JSD of the matched entries plus unmatched_weight times
    the sorted L1 of all others, columns of a head beyond its tokenizer among them.
    """
    matched = generalized_jsd_rows(
        log_q[:, overlap.student_ids], log_p[:, overlap.teacher_ids], beta
    )
    unmatched = sorted_l1_rows(
        _without(log_q, overlap.student_ids), _without(log_p, overlap.teacher_ids)
    )
    return matched_weight * matched + unmatched_weight * unmatched


def span_rows(
    log_q: Tensor,  # (G,) of the spans
    log_p: Tensor,  # (G,)
    beta: float,
) -> Tensor:  # (G,)
    """Generalized JSD of two outcomes: the bytes of the span follow, or any others."""
    student, teacher = (
        torch.stack([log_prob, (-torch.expm1(log_prob)).clamp_min(SMALLEST_REST).log()], -1)
        for log_prob in (log_q, log_p)
    )
    return generalized_jsd_rows(student, teacher, beta)


def _without(log_prob: Tensor, ids: Tensor) -> Tensor:  # (N, V), (K,) -> (N, V - K)
    is_left = torch.ones(log_prob.shape[-1], dtype=torch.bool, device=log_prob.device)
    is_left[ids] = False
    return log_prob[:, is_left]


def _group_log_probs(
    logits: Tensor,  # (N, V)
    rows: tuple[Tensor, ...],  # one side of a TokenAlignment
    temperature: float,
) -> Tensor:  # (G, V)
    base_rows, _, scalar_rows, scalar_ids, scalar_groups = rows
    num_groups = base_rows.shape[0]
    log_scale = merged_log_scale(
        logits[scalar_rows], scalar_ids, scalar_groups, num_groups, temperature=temperature
    )
    return scaled_log_probs(logits[base_rows], log_scale, temperature)


def uld_loss(
    student_logits: Tensor,  # (N, V_s), or (N_s, V_s) with an alignment
    teacher_logits: Tensor,  # (N, V_t), or (N_t, V_t)
    row_weights: Tensor | None = None,  # (N,), or (G,) with an alignment; None: 1 / N or 1 / G
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    alignment: TokenAlignment | None = None,  # None: row n of both sides is a pair
    overlap: VocabOverlap | None = None,  # None: no entry is matched
    beta: float = 0.5,
    matched_weight: float = 1.0,
    unmatched_weight: float = 1.0,
    weight_soft: float = 1.0,
    weight_hard: float = 0.0,
    labels: Tensor | None = None,  # (N_s,) int64; outside of [0, V_s): no cross-entropy
    label_weights: Tensor | None = None,  # (N_s,); None: 1 / number of labels
) -> Tensor:  # ()
    """weight_soft sum_i row_weights[i] ULD_i + weight_hard sum_n label_weights[n] CE_n, CE at
    temperature 1.

    ULD_i is of a pair of rows, or of a group (extended ULD), or hybrid_rows of either; hybrid in a
    bayesian group of several tokens is matched_weight span_rows. There a vocabulary entry is not
    the continuation that its bytes say: it follows other tokens on each side. Gradient to
    student_logits only.
    """
    teacher_logits = teacher_logits.detach()
    if alignment is None:
        log_q = log_probs(student_logits, student_temperature)
        log_p = log_probs(teacher_logits, teacher_temperature)
    else:
        log_q = _group_log_probs(student_logits, alignment.sides[0], student_temperature)
        log_p = _group_log_probs(teacher_logits, alignment.sides[1], teacher_temperature)
    if overlap is None:
        rows = sorted_l1_rows(log_q, log_p)
    else:
        rows = hybrid_rows(
            log_q,
            log_p,
            overlap,
            beta=beta,
            matched_weight=matched_weight,
            unmatched_weight=unmatched_weight,
        )
        if alignment is not None and alignment.merge == "bayesian":
            ids = [side.unsqueeze(1) for side in alignment.span_ids()]
            student, teacher = (
                side.gather(1, tokens.clamp_min(0)).squeeze(1)
                for side, tokens in zip((log_q, log_p), ids, strict=True)
            )
            merged = matched_weight * span_rows(student, teacher, beta)
            rows = torch.where(ids[0].squeeze(1) >= 0, merged, rows)
    loss = weight_soft * _weighted_sum(rows, row_weights)
    if labels is None:
        return loss
    is_label = (labels >= 0) & (labels < student_logits.shape[-1])
    log_q = log_probs(student_logits[is_label], 1.0)
    hard_rows = -log_q.gather(-1, labels[is_label].unsqueeze(-1)).squeeze(-1)
    weights = None if label_weights is None else label_weights[is_label]
    return loss + weight_hard * _weighted_sum(hard_rows, weights)


def _weighted_sum(rows: Tensor, weights: Tensor | None) -> Tensor:  # (N,), (N,) -> ()
    if weights is None:
        return rows.sum() / max(1, rows.shape[0])
    return (rows * weights.to(rows.dtype)).sum()


def linear_uld(
    student_hidden: Tensor,  # (N, D_s), or (N_s, D_s) with an alignment
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N, D_t), or (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    row_weights: Tensor | None = None,  # (N,), or (G,) with an alignment
    *,
    student_bias: Tensor | None = None,  # (V_s,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    **options: Any,  # keywords of uld_loss
) -> Tensor:  # ()
    """uld_loss of the logits of both heads; the meaning of fused_linear_uld."""
    student_logits = head_logits(student_hidden, student_weight, student_bias, None)
    with torch.no_grad():
        teacher_logits = head_logits(teacher_hidden, teacher_weight, teacher_bias, None)
    return uld_loss(student_logits, teacher_logits, row_weights, **options)
