"""Two outcomes of a group, and rows that end one, in plain torch: the CPU and MPS backend.

C rows of a chunk, V vocabulary. Same signature and outputs as uld/triton_token_rows.py.
"""

from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, SMALLEST_REST
from gold_kernels.uld.torch_rows import token_rows_


def two_outcomes(
    log_s: Tensor,  # (C,), at most 0, of the student
    log_t: Tensor,  # (C,)
    beta: float,
) -> tuple[Tensor, Tensor]:  # (C,) generalized JSD of (s, 1 - s) and (t, 1 - t), (C,) its slope
    """The slope is that in log s. In float64: s is near 1, and 1 - s what the loss is about."""
    s, t = log_s.exp(), log_t.exp()
    r, o = ((-torch.expm1(side)).clamp_min(SMALLEST_REST) for side in (log_s, log_t))
    log_r, log_o = r.log(), o.log()
    if beta == 0:
        gap = torch.where(log_s > -0.5, o - r, s - t)  # s - t
        return t * (log_t - log_s) + o * (log_o - log_r), gap / r
    if beta == 1:
        pull = (log_s - log_t) - (log_r - log_o)
        return s * (log_s - log_t) + r * (log_r - log_o), s * pull
    ratio, rest_ratio = log_t - log_s, log_o - log_r
    to_m, to_n = _to_mixture(ratio, beta), _to_mixture(rest_ratio, beta)
    loss = beta * (t * (ratio - to_m) + o * (rest_ratio - to_n))
    return loss - (1 - beta) * (s * to_m + r * to_n), (1 - beta) * s * (to_n - to_m)


def _to_mixture(ratio: Tensor, beta: float) -> Tensor:
    """log m - log s of m = beta t + (1 - beta) s from log t - log s; 0 where that is 0."""
    is_less = ratio < 0
    excess = torch.expm1(-ratio.abs())
    return torch.where(is_less, (beta * excess).log1p(), ratio + ((1 - beta) * excess).log1p())


def end_rows_(
    logits: Tensor,  # (C, V) of the student
    grad_logits: Tensor | None,  # (C, V), overwritten; may be logits; None: no gradient
    ids: Tensor,  # (C,) int64, the token that ends each group
    labels: Tensor,  # (C,) int64; outside the vocabulary: no label
    weights: Tensor,  # (C, 2): of the loss, of the label
    log_scales: Tensor | None,  # (C,) of the group's other tokens
    log_p: Tensor,  # (C,) of the group, the teacher's
    values: Tensor,  # (5, C), overwritten, in the order of ChunkLikelihood.value_names
    *,
    beta: float,
    group_temperature: float,
    temperature: float,
    softcap: float | None,
) -> None:
    """Loss of the groups, and its gradient with respect to the logits of the rows that end them."""
    is_live = weights[:, 0] != 0
    options: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    token_rows_(logits, None, ids, labels, weights, values[:2], **options)
    log_q = -values[0] if log_scales is None else log_scales - values[0]
    log_q, log_p = log_q.clamp_min(LOG_ZERO), log_p.clamp_min(LOG_ZERO)
    wide = torch.float32 if log_q.device.type == "mps" else torch.float64
    log_s, log_t = (side.to(wide).clamp_max(0) / group_temperature for side in (log_q, log_p))
    loss, slope = two_outcomes(log_s, log_t, beta)
    slope = torch.where(log_q > LOG_ZERO, slope, 0)  # a group of a masked token has the floor
    values[2], values[3] = log_q, log_p
    values[0], values[4] = loss.to(values.dtype), (slope / group_temperature).to(values.dtype)
    for place in (0, 2, 3, 4):  # a row of weight 0 may hold anything
        values[place] = torch.where(is_live, values[place], 0)
    if grad_logits is not None:
        moved = torch.stack([-weights[:, 0] * values[4], weights[:, 1]], 1)
        unused = torch.empty_like(values[:2])
        token_rows_(logits, grad_logits, ids, labels, moved, unused, **options)
