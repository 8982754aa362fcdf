"""The oracle of the projected JSD: plain torch, any float dtype, gradients by autograd.

N scored rows of a side (N_s, N_t), G groups, V vocabulary (V_s, V_t). P teacher, Q student.
"""

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, log_probs
from gold_kernels.likelihood.reference import group_log_likelihoods
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.tokens.projection import VocabProjection
from gold_kernels.uld.reference import generalized_jsd_rows, span_rows


def projected_jsd_rows(
    log_q: Tensor,  # (N, V_s)
    log_p: Tensor,  # (N, V_t)
    projection: VocabProjection,
    beta: float,
) -> Tensor:  # (N,)
    """JSD_beta of P and Q W on the teacher's entries that some entry of the student begins with."""
    columns, weights = projection.columns, projection.weights.to(log_q.dtype)
    size = projection.teacher_vocab_size
    matrix = log_q.new_zeros(columns.shape[0], size)
    matrix.scatter_add_(1, columns.clamp_min(0), weights)
    is_reached = matrix.any(0)
    projected = (log_q[:, : columns.shape[0]].exp() @ matrix)[:, is_reached]
    tiny = torch.finfo(projected.dtype).tiny
    log_projected = torch.where(projected > tiny, projected.clamp_min(tiny).log(), LOG_ZERO)
    return generalized_jsd_rows(log_projected, log_p[:, :size][:, is_reached], beta)


def projected_jsd(
    student_logits: Tensor,  # (N_s, V_s)
    teacher_logits: Tensor,  # (N_t, V_t)
    projection: VocabProjection,
    row_weights: Tensor | None = None,  # (G,); None: 1 / G each
    *,
    alignment: TokenAlignment | None = None,  # None: row i with row i
    beta: float = 0.0,
    temperature: tuple[float, float] = (1.0, 1.0),  # student, teacher
) -> Tensor:  # ()
    """sum_g row_weights[g] times projected_jsd_rows of the first rows of the group plus, where it
    has several tokens, span_rows; the meaning of fused_linear_projected_jsd.
    """
    logits = student_logits, teacher_logits.detach()
    sides = zip(logits, temperature, strict=True)
    log_q, log_p = (log_probs(side, own) for side, own in sides)
    if alignment is None:
        rows = projected_jsd_rows(log_q, log_p, projection, beta)
    else:
        firsts = alignment.first_rows()
        rows = projected_jsd_rows(log_q[firsts[0]], log_p[firsts[1]], projection, beta)
        spans = [
            group_log_likelihoods(side, tokens, temperature=own)
            for side, tokens, own in zip(logits, alignment.sides, temperature, strict=True)
        ]
        is_merged = alignment.span_ids()[0] >= 0
        rows = rows + torch.where(is_merged, span_rows(spans[0], spans[1], beta), 0)
    if row_weights is None:
        return rows.sum() / max(1, rows.shape[0])
    return torch.where(row_weights != 0, rows * row_weights, 0).sum()
