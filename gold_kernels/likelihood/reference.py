"""The oracle of the chunk likelihood: plain torch, any float dtype, gradients by autograd.

N scored rows of a side (N_s, N_t), G groups, V vocabulary (V_s, V_t). P teacher, Q student.
"""

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, log_probs
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.uld.reference import merged_log_scale, span_rows


def group_log_likelihoods(
    logits: Tensor,  # (N, V)
    side: tuple[Tensor, ...],  # one of TokenAlignment.sides
    *,
    temperature: float = 1.0,
) -> Tensor:  # (G,)
    """Sum over all tokens of every group of log p(token | its row), floored at LOG_ZERO."""
    base_rows, base_ids, rows, ids, groups = side
    last = log_probs(logits[base_rows], temperature).gather(1, base_ids.unsqueeze(1)).squeeze(1)
    num_groups = base_rows.shape[0]
    others = merged_log_scale(logits[rows], ids, groups, num_groups, temperature=temperature)
    return (last + others).clamp_min(LOG_ZERO)


def chunk_likelihood(
    student_logits: Tensor,  # (N_s, V_s)
    teacher_logits: Tensor,  # (N_t, V_t)
    alignment: TokenAlignment,
    row_weights: Tensor | None = None,  # (G,); None: 1 / G each
    *,
    beta: float = 0.0,
    group_temperature: float = 100.0,
    temperature: tuple[float, float] = (1.0, 1.0),  # student, teacher
) -> Tensor:  # ()
    """sum_g row_weights[g] JSD_beta of two outcomes of probability exp(log-likelihood / tau) and
    the rest, tau the group_temperature; the meaning of fused_linear_chunk_likelihood.
    """
    log_q, log_p = (
        group_log_likelihoods(logits, side, temperature=own) / group_temperature
        for logits, side, own in zip(
            (student_logits, teacher_logits.detach()), alignment.sides, temperature, strict=True
        )
    )
    rows = span_rows(log_q, log_p, beta)
    if row_weights is None:
        return rows.sum() / max(1, rows.shape[0])
    return torch.where(row_weights != 0, rows * row_weights, 0).sum()
