"""ULD, hybrid and token rows in plain torch: the CPU and MPS backend, exact by a sort.

C rows of a chunk, V vocabulary (V_s, V_t), K matched entries. Same signatures and outputs as
uld/triton_rows.py and triton_token_rows.py, whose gradient is this one up to its bins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT, SMALLEST_REST, kl_entries
from gold_kernels.engine.torch_rows import store_gradient_

# Temporaries are up to 24 times this many float32 values (or one row, if a row is longer).
BLOCK_ELEMENTS = 1 << 15


def row_bytes(v_student: int, v_teacher: int, num_matched: int, dtype: torch.dtype) -> int:
    """Memory that grows with the rows of a chunk: none, temporaries have BLOCK_ELEMENTS."""
    return 0


class _Options(NamedTuple):
    beta: float
    matched_weight: float
    unmatched_weight: float


def sorted_difference(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:  # (c, V_s), (c, V_t)
    """(c,) sum_k |s_(k) - t_(k)|, and its (c, V_s) gradient: signs, averaged over exact ties."""
    size = max(s.shape[1], t.shape[1])
    s_up, t_up = (
        torch.nn.functional.pad(side.sort(-1).values, (size - side.shape[1], 0)) for side in (s, t)
    )
    loss = (s_up - t_up).abs().sum(-1)
    s, s_up, t_up = s.contiguous(), s_up.contiguous(), t_up.contiguous()

    def count(up: Tensor, is_strict: bool) -> Tensor:  # entries above (or not below) each s_i
        return size - torch.searchsorted(up, s, right=is_strict)

    above, not_below = count(s_up, True), count(s_up, False)
    teacher_above, teacher_not_below = count(t_up, True), count(t_up, False)
    # Tied entries hold the ranks from above to not_below: plus where the rank is past the teacher
    # entries of at least this value, minus where it is among those above it.
    tied = not_below - above
    num_plus = (not_below - teacher_not_below).clamp_min(0).minimum(tied)
    num_minus = (teacher_above - above).clamp_min(0).minimum(tied)
    return loss, (num_plus - num_minus).to(s.dtype) / tied


def matched_jsd(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(c,) generalized JSD of sub-distributions and (c, K) s dloss / ds."""
    s, t = log_s.exp(), log_t.exp()
    ratio = (log_t - log_s).clamp(LOG_ZERO, -LOG_ZERO)
    if beta == 0:
        return kl_entries(t, s, ratio).sum(-1), torch.where(log_s <= LOG_ZERO, 0, s - t)
    if beta == 1:
        return kl_entries(s, t, -ratio).sum(-1), -s * ratio
    # log_m - log_s, and log_m - log_t: each from the smaller exponent
    s_excess = torch.where(ratio < 0, (beta * torch.expm1(ratio.clamp_max(0))).log1p(), 0)
    t_excess = torch.where(ratio >= 0, ((1 - beta) * torch.expm1(-ratio.clamp_min(0))).log1p(), 0)
    to_m = torch.where(ratio < 0, s_excess, ratio + t_excess)
    # not to_m - ratio: a ratio of 1e6, of a masked entry, takes t_excess with it
    from_t = torch.where(ratio < 0, s_excess - ratio, t_excess)
    loss = -(beta * t * from_t + (1 - beta) * s * to_m).sum(-1)
    return loss, (beta - 1) * s * to_m


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).clamp_min(LOWEST_LOGIT).log_softmax(-1)


def _scaled(log_probs: Tensor, log_scale: Tensor | None) -> Tensor:  # (c, any), (c,)
    return log_probs if log_scale is None else log_probs + log_scale.unsqueeze(-1)


def of_token(log_probs: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:  # (c, V), (c, 1)
    """(c, 1) log q of one entry a row and 1 - q, from the other entries: a q that rounds to 1 keeps
    both.
    """
    rest = log_probs.exp().scatter_(-1, index, 0).sum(-1, keepdim=True)
    return torch.where(rest < 0.5, (-rest).log1p(), log_probs.gather(-1, index)), rest


def _spans(log_spans: Sequence[Tensor], beta: float) -> tuple[Tensor, Tensor]:  # (c, 1) s, t
    """(c,) loss of the two outcomes span and no span, and its slope in log s."""
    rests = [(-torch.expm1(side)).clamp_min(SMALLEST_REST).log() for side in log_spans]
    log_s, log_t = (torch.cat(pair, 1) for pair in zip(log_spans, rests, strict=True))
    loss, pull = matched_jsd(log_s, log_t, beta)
    return loss, pull[:, 0] - pull[:, 1] * (log_spans[0] - rests[0]).squeeze(1).exp()


def _pull(
    log_s: Tensor, log_t: Tensor, tables: Sequence[Tensor] | None, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:  # (c,) matched, (c,) unmatched loss, (c, V_s) s dloss / ds
    s, t = log_s.exp(), log_t.exp()
    if tables is None:
        unmatched, sign = sorted_difference(s, t)
        return torch.zeros_like(unmatched), unmatched, options.unmatched_weight * sign * s
    is_unmatched, is_teacher_unmatched = (~is_matched for is_matched in tables[2:])
    s_matched, t_matched = (ids.long() for ids in tables[:2])
    pull = torch.zeros_like(s)
    unmatched, sign = sorted_difference(s[:, is_unmatched], t[:, is_teacher_unmatched])
    pull[:, is_unmatched] = options.unmatched_weight * sign * s[:, is_unmatched]
    matched, matched_pull = matched_jsd(log_s[:, s_matched], log_t[:, t_matched], options.beta)
    pull[:, s_matched] = options.matched_weight * matched_pull
    return matched, unmatched, pull


def cross_entropy(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(c,) -log q(id) and (c, V) gradient with respect to the logits; 0 without a token."""
    log_q = _log_probs(logits, temperature)
    is_token = (ids >= 0) & (ids < logits.shape[1])
    index = torch.where(is_token, ids, 0).unsqueeze(-1)
    log_q_token, rest = of_token(log_q, index)
    grad = log_q.exp().scatter_(-1, index, -rest).div_(temperature)
    value = -log_q_token.squeeze(-1).clamp_min(LOG_ZERO)
    has_slope = is_token & (value < -LOG_ZERO)  # a masked token has the floor
    return torch.where(is_token, value, 0), torch.where(has_slope.unsqueeze(-1), grad, 0)


def uld_rows_(
    student_logits: Tensor,  # (C, V_s)
    teacher_logits: Tensor,  # (C, V_t)
    grad_logits: Tensor | None,  # (C, V_s), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, 2): of the loss, of the cross-entropy
    log_scales: tuple[Tensor, Tensor] | None,  # (C,) student, (C,) teacher
    labels: Tensor | None,  # (C,) int64
    tables: Sequence[Tensor] | None,  # of matched entries, see plan.matched_tables
    spans: Sequence[Tensor] | None,  # (C,), (C,) int64, see uld/triton_rows.py
    values: Tensor,  # (7, C), overwritten: see uld/triton_rows.py
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    matched_weight: float,
    unmatched_weight: float,
    softcap: float | None,
    scratch_bytes: int = 0,  # of the kernel
) -> None:
    """Loss and gradient of every row of a chunk, a few rows at a time."""
    num_rows, options = student_logits.shape[0], _Options(beta, matched_weight, unmatched_weight)
    step = max(1, BLOCK_ELEMENTS // max(student_logits.shape[1], teacher_logits.shape[1]))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        scales: Sequence[Tensor | None]
        scales = (None, None) if log_scales is None else [side[rows] for side in log_scales]
        student = student_logits[rows].to(values.dtype)
        log_q = _log_probs(student, temperatures[0])
        log_p = _log_probs(teacher_logits[rows].to(values.dtype), temperatures[1])
        log_s, log_t = map(_scaled, (log_q, log_p), scales)
        matched, unmatched, pull = _pull(log_s, log_t, tables, options)
        matched_entries: Sequence[Tensor | None] = (None, None) if tables is None else tables[2:]
        masses = [*map(_mass, (log_q, log_p), matched_entries)]
        slope = pull.sum(-1)
        pull.addcmul_(log_q.exp(), slope.unsqueeze(-1), value=-1)
        if spans is not None:
            is_span = spans[0][rows] >= 0
            index = [ids[rows].clamp_min(0).unsqueeze(1) for ids in spans]
            (log_q_span, rest), (log_p_span, _) = map(of_token, (log_q, log_p), index)
            log_spans = [*map(_scaled, (log_q_span, log_p_span), scales)]
            loss, span_slope = _spans(log_spans, beta)
            span_slope *= matched_weight
            matched = torch.where(is_span, loss, matched)
            unmatched = torch.where(is_span, 0, unmatched)
            slope = torch.where(is_span, span_slope, slope)
            span_slope = span_slope.unsqueeze(1)
            at_span = (log_q.exp() * -span_slope).scatter_(1, index[0], rest * span_slope)
            pull = torch.where(is_span.unsqueeze(1), at_span, pull)
            masses = [
                torch.where(is_span, span.squeeze(1).exp(), mass)
                for span, mass in zip(log_spans, masses, strict=True)
            ]
        loss = matched_weight * matched + unmatched_weight * unmatched
        grad = None if grad_logits is None else grad_logits[rows]
        own_labels = None if labels is None else labels[rows]
        numbers = [loss, None, matched, unmatched, *masses, slope]
        settings = weights[rows], temperatures[0], softcap
        _store_rows_(grad, values[:, rows], numbers, pull, student, own_labels, *settings)


def _store_rows_(
    grad_logits: Tensor | None,  # (c, V_s), overwritten
    values: Tensor,  # (7, c), overwritten
    numbers: Sequence[Tensor | None],  # (c,) of each value; None: the cross-entropy
    pull: Tensor,  # (c, V_s) gradient of the loss, before weight and temperature
    student: Tensor,  # (c, V_s) logits
    labels: Tensor | None,  # (c,) int64
    weights: Tensor,  # (c, 2)
    temperature: float,
    softcap: float | None,
) -> None:
    """Values and gradient of a few rows, and what their labels add to them."""
    weight, hard_weight = weights.unbind(1)
    is_live, is_hard = weight != 0, hard_weight != 0  # weight 0: may hold anything
    for place, number in enumerate(numbers):
        if number is not None:
            values[place] = torch.where(is_live, number, 0)
    grad = pull * (weight / temperature).unsqueeze(-1)
    grad = torch.where(is_live.unsqueeze(-1), grad, 0)
    if labels is not None:
        hard, hard_grad = cross_entropy(student, labels, 1.0)
        values[1] = torch.where(is_hard, hard, 0)
        hard_grad *= hard_weight.unsqueeze(-1)
        grad += torch.where(is_hard.unsqueeze(-1), hard_grad, 0)
    if grad_logits is not None:
        store_gradient_(grad_logits, grad, student, is_live | is_hard, softcap)


def _mass(log_probs: Tensor, is_matched: Tensor | None) -> Tensor:  # (c,) of matched entries
    if is_matched is None:
        return torch.zeros_like(log_probs[:, 0])
    return log_probs[:, is_matched].exp().sum(-1)


def token_rows_(
    logits: Tensor,  # (C, V)
    grad_logits: Tensor | None,  # (C, V), overwritten; may be logits; None: no gradient
    ids: Tensor,  # (C,) int64; outside the vocabulary: no token
    labels: Tensor,  # (C,) int64, likewise
    weights: Tensor,  # (C, 2): of the token, of the label
    values: Tensor,  # (2, C), overwritten: -log q_T(id), -log q_1(label); 0 for weight 0
    *,
    temperature: float,
    softcap: float | None,
) -> None:
    """Log-probability of one token a row and its gradient, a few rows at a time."""
    step = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        block = logits[rows].to(values.dtype)
        total = torch.zeros_like(block)
        for index, (tokens, at) in enumerate(((ids, temperature), (labels, 1.0))):
            value, grad = cross_entropy(block, tokens[rows], at)
            weight = weights[rows, index]
            values[index, rows] = torch.where(weight != 0, value, 0)
            grad *= weight.unsqueeze(-1)
            total += torch.where(weight.unsqueeze(-1) != 0, grad, 0)
        if grad_logits is not None:
            is_live = (weights[rows] != 0).any(-1)
            store_gradient_(grad_logits[rows], total, block, is_live, softcap)
