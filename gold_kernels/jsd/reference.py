"""The oracle: plain torch, any float dtype up to float64, full logits, gradients by autograd.

Everything fast in this package is tested against these functions, in float64. They are written from
the papers' formulas, not from the kernels: log-probabilities and a log-add-exp, where the kernels
work on the log ratio.

N scored rows, V vocabulary, D_s and D_t hidden sizes. P teacher, Q student, M = beta P + (1 - beta)
Q.
"""

import math

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import log_probs


def _sum_product(probs: Tensor, log_ratio: Tensor) -> Tensor:
    return (probs * log_ratio).sum(-1)


def jsd_rows(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:  # (N,), dtype of the logits
    """Generalized Jensen-Shannon divergence of every row (Agarwal et al. 2023, arXiv 2306.13649,
    section 2).

        JSD_beta(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M),    M = beta P + (1 - beta) Q

    beta = 0 is KL(P || Q) and beta = 1 is KL(Q || P), the limits of JSD_beta / beta and JSD_beta /
    (1 - beta).
    """
    log_q = log_probs(student_logits, temperature)
    log_p = log_probs(teacher_logits, temperature)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return _sum_product(p, log_p - log_q)
    if beta == 1:
        return _sum_product(q, log_q - log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _sum_product(p, log_p - log_m) + (1 - beta) * _sum_product(q, log_q - log_m)


def head_logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    vocab_size: int | None,
) -> Tensor:  # (N, V or vocab_size)
    """hidden W^T + bias, without the columns from vocab_size on: they have probability 0."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    return logits[:, :vocab_size]


def linear_jsd(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    row_weights: Tensor | None = None,  # (N,); None means 1 / N each
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    vocab_size: int | None = None,
) -> Tensor:  # ()
    """sum_i row_weights[i] JSD_i from full logits, in the dtype of the inputs; the meaning of
    fused_linear_jsd.
    """
    student_logits = head_logits(student_hidden, student_weight, student_bias, vocab_size)
    with torch.no_grad():
        teacher_logits = head_logits(teacher_hidden, teacher_weight, teacher_bias, vocab_size)
    rows = jsd_rows(student_logits, teacher_logits, beta=beta, temperature=temperature)
    if row_weights is None:
        return rows.sum() / max(1, rows.shape[0])
    return (rows * row_weights.to(rows.dtype)).sum()


def row_metrics(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    *,
    temperature: float = 1.0,
) -> dict[str, Tensor]:  # name -> (N,)
    """Entropies, both KL divergences and top-1 agreement of every row, in nats."""
    log_q = log_probs(student_logits, temperature)
    log_p = log_probs(teacher_logits, temperature)
    p, q = log_p.exp(), log_q.exp()
    is_student_top = student_logits == student_logits.amax(-1, keepdim=True)
    is_teacher_top = teacher_logits == teacher_logits.amax(-1, keepdim=True)
    return {
        "student_entropy": -_sum_product(q, log_q),
        "teacher_entropy": -_sum_product(p, log_p),
        "forward_kl": _sum_product(p, log_p - log_q),
        "reverse_kl": _sum_product(q, log_q - log_p),
        "top1_agreement": (is_student_top & is_teacher_top).any(-1).to(log_q.dtype),
    }
