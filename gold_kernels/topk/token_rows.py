"""The rows of a teacher's top k by the kernel of ULD's tokens: it walks a row of logits twice, and
what is left is as wide as the k entries.

C rows of a chunk, k entries a row, V vocabulary. With s_j = q(id_j) and t_j of the entries, s_0 and
t_0 of all others, u_j = s_j dloss / ds_j, U = sum u, T the temperature, y a label:

    grad_v = w (u_j - s_j U) / T + w_1 (s_j - [v is y])          for an entry
           = (w (u_0 / s_0 - U) / T + w_1) q_v - w_1 [v is y]    for another

So all others are one multiple of q. The kernel gives that, and their mass, with the entries' logits
out of the way and a number c in the place of one of them, its token:

    nll = log(exp(c / T) + sum of exp(z_v / T) over the others) - c / T

which it knows also where one of the two is next to nothing. Where the label is another, it is the
token, with its own logit. Columns of entries and labels are written over the kernel's gradient,
from float64: near certainty one of them has all but 1e-6.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT, SMALLEST_REST
from gold_kernels.uld.torch_rows import matched_jsd

ENTRY_BYTES = 16 * 8  # of an entry: float64 tensors of this width that are alive at once


class Terms(NamedTuple):
    """What the rows of a chunk are compared with, and what their terms weigh."""

    ids: Tensor  # (C, k) int64; negative for none
    log_probs: Tensor  # (C, k)
    weights: Tensor  # (C, T): of the loss and, with labels, of the cross-entropy
    labels: Tensor | None  # (C,) int64


def top_k_rows_(
    token_rows_: Callable[..., None],
    logits: Tensor,  # (C, V), those of the entries are overwritten
    grad_logits: Tensor | None,  # (C, V), overwritten; may be logits; None: no gradient
    terms: Terms,
    values: Tensor,  # (4, C), overwritten
    *,
    beta: float,
    temperature: float,  # 1 with labels
    softcap: float | None,
) -> None:
    is_live = (terms.weights != 0).any(1)  # other rows may hold anything
    labels = None if terms.labels is None else _labels_of(logits, terms.ids, terms.labels)
    entries = _entries_of(logits, terms.ids, labels)
    c = entries.token_logits.to(logits.dtype)
    logits.scatter_(1, entries.columns, LOWEST_LOGIT).scatter_(1, entries.token, c)
    token, options = entries.token.flatten(), {"temperature": temperature, "softcap": softcap}
    weights = torch.zeros(len(token), 2, dtype=values.dtype, device=values.device)
    weights[:, 0] = 1
    token_rows_(logits, None, token, token, weights, values[:2], **options)
    sums = _sums_of(entries, values[0].to(torch.float64).unsqueeze(1), temperature)
    slopes = _divergence_(values, terms, entries, sums, beta, temperature)
    if labels is not None:
        slopes = _add_labels_(values, slopes, terms, entries, sums, labels)
    if grad_logits is None:
        return
    weights[:, :1] = torch.where(
        is_live.unsqueeze(1), slopes.others * temperature * (sums.log_mix - sums.lse).exp(), 0
    )
    scratch = torch.empty_like(values[:2])
    token_rows_(logits, grad_logits, token, token, weights, scratch, **options)
    if labels is not None and slopes.label is not None:  # before entries, which it may be one of
        _write(grad_logits, labels.column, slopes.label, labels.logits, is_live, softcap)
    grads = torch.where(entries.is_entry, slopes.entries, slopes.entries.gather(1, entries.place))
    _write(grad_logits, entries.columns, grads, entries.logits, is_live, softcap)


class _Labels(NamedTuple):
    column: Tensor  # (C, 1), 0 for none
    is_label: Tensor  # (C, 1)
    is_token: Tensor  # (C, 1): a label that is none of the entries, and may come
    logits: Tensor  # (C, 1) float64


def _labels_of(logits: Tensor, ids: Tensor, labels: Tensor) -> _Labels:
    is_label = ((labels >= 0) & (labels < logits.shape[1])).unsqueeze(1)
    column = torch.where(is_label, labels.unsqueeze(1), 0)
    own = logits.gather(1, column).to(torch.float64).clamp_min_(LOWEST_LOGIT)
    is_entry = ((ids == column) & (ids >= 0)).any(1, keepdim=True)
    return _Labels(column, is_label, is_label & ~is_entry & (own > LOWEST_LOGIT), own)


class _Entries(NamedTuple):
    """The entries, and the token of the kernel."""

    columns: Tensor  # (C, k); of padding that of the first entry, without entries the token
    is_entry: Tensor  # (C, k), not padding
    place: Tensor  # (C, 1) of the first entry among the k, whose numbers padding has
    logits: Tensor  # (C, k) float64
    token: Tensor  # (C, 1): the label, the first entry, or column 0
    token_logits: Tensor  # (C, 1) float64, c
    is_other: Tensor  # (C, 1): the token is one of all others


def _entries_of(logits: Tensor, ids: Tensor, labels: _Labels | None) -> _Entries:
    is_entry = ids >= 0
    is_other = ~is_entry.any(1, keepdim=True)
    place = is_entry.byte().argmax(1, keepdim=True)
    first = ids.gather(1, place).clamp_min(0)
    if labels is not None:
        first = torch.where(is_other & labels.is_token, labels.column, first)
    columns = torch.where(is_entry, ids, first)
    own = logits.gather(1, columns).to(torch.float64).clamp_min_(LOWEST_LOGIT)
    c, token = own.gather(1, place), first
    if labels is not None:
        c = torch.where(labels.is_token, labels.logits, c)
        token = torch.where(labels.is_token, labels.column, token)
        is_other = is_other | labels.is_token
    c = torch.where(c > LOWEST_LOGIT, c, 0)
    return _Entries(columns, is_entry, place, own, token, c, is_other)


class _Sums(NamedTuple):
    """Log-sum-exps of logits divided by the temperature, (C, 1) float64 each."""

    nll: Tensor  # of the token, from the kernel
    log_mix: Tensor  # of the token and of others, what the kernel sees
    log_rest: Tensor  # of all others
    lse: Tensor  # of the row


def _sums_of(entries: _Entries, nll: Tensor, temperature: float) -> _Sums:
    log_mix = entries.token_logits / temperature + nll
    without = log_mix + (-torch.expm1(-nll)).clamp_min(SMALLEST_REST).log()
    log_rest = torch.where(entries.is_other, log_mix, without)
    own = torch.where(entries.is_entry, entries.logits / temperature, LOWEST_LOGIT)
    lse = torch.cat([own, log_rest], 1).logsumexp(1, keepdim=True)
    return _Sums(nll, log_mix, log_rest, lse)


class _Slopes(NamedTuple):
    """What gradients of logits are made of, float64."""

    entries: Tensor  # (C, k) gradients
    others: Tensor  # (C, 1), by which q of another is multiplied
    label: Tensor | None = None  # (C, 1) gradient, where the label is no entry


def compare_outcomes(
    log_s: Tensor,  # (C, k) float64, on mps float32; LOG_ZERO for padding
    s_0: Tensor,  # (C, 1)
    log_probs: Tensor,  # (C, k) of the teacher
    is_entry: Tensor,  # (C, k)
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (C,) loss, (C, k + 1) u, (C, k) t
    """Compare k + 1 outcomes, the last of which is any other."""
    log_t = torch.where(is_entry, log_probs.to(log_s.dtype), LOG_ZERO).clamp_min(LOG_ZERO)
    t = log_t.exp()
    t_0 = (1 - t.sum(1, keepdim=True)).clamp_min(SMALLEST_REST)
    student = torch.cat([log_s, s_0.to(log_s.dtype).log()], 1)
    loss, pull = matched_jsd(student, torch.cat([log_t, t_0.log()], 1), beta)
    pull[:, -1:].masked_fill_(s_0 <= SMALLEST_REST, 0)  # the floor has no slope
    return loss, pull, t


def _divergence_(
    values: Tensor,  # (4, C), overwritten
    terms: Terms,
    entries: _Entries,
    sums: _Sums,
    beta: float,
    temperature: float,
) -> _Slopes:
    is_entry = entries.is_entry
    log_q = (entries.logits / temperature - sums.lse).clamp_min(LOG_ZERO)
    log_s = torch.where(is_entry, log_q, LOG_ZERO)
    s, s_0 = log_s.exp(), (sums.log_rest - sums.lse).exp().clamp_min(SMALLEST_REST)
    loss, pull, t = compare_outcomes(log_s, s_0, terms.log_probs, is_entry, beta)
    weight = terms.weights[:, :1].to(torch.float64)
    is_soft = weight != 0
    numbers = torch.stack([loss, torch.zeros_like(loss), s.sum(1), t.sum(1)])
    values.copy_(torch.where(is_soft[:, 0], numbers, 0))
    total = pull.sum(1, keepdim=True)
    return _Slopes(
        torch.where(is_soft, weight * (pull[:, :-1] - s * total) / temperature, 0),
        torch.where(is_soft, weight * (pull[:, -1:] / s_0 - total) / temperature, 0),
    )


def _add_labels_(
    values: Tensor,  # (4, C), of which the cross-entropy is overwritten
    slopes: _Slopes,
    terms: Terms,
    entries: _Entries,
    sums: _Sums,
    labels: _Labels,
) -> _Slopes:
    """The cross-entropy, at temperature 1."""
    q = (entries.logits - sums.lse).exp()  # of what is written for padding too
    hard = terms.weights[:, 1:].to(torch.float64)
    of_token = sums.log_rest - sums.lse - sums.nll
    log_q = torch.where(labels.is_token, of_token, labels.logits - sums.lse).clamp_min(LOG_ZERO)
    value = torch.where(labels.is_label, -log_q, 0)
    values[1] = torch.where(hard != 0, value, 0)[:, 0]
    hard = torch.where((hard != 0) & labels.is_label & (value < -LOG_ZERO), hard, 0)
    is_own = entries.columns == labels.column
    return _Slopes(
        slopes.entries + hard * torch.where(is_own, q.clamp_max(1) - 1, q),
        slopes.others + hard,
        slopes.others * log_q.exp() + hard * torch.expm1(log_q),
    )


def _write(
    grad_logits: Tensor,  # (C, V)
    index: Tensor,  # (C, any)
    grads: Tensor,  # (C, any) float64
    logits: Tensor,  # (C, any) float64, of the columns
    is_live: Tensor,  # (C,)
    softcap: float | None,
) -> None:
    if softcap is not None:  # logits are softcap tanh(x / softcap)
        slope = 1 - (logits / softcap).square()
        grads = torch.where(logits > LOWEST_LOGIT, grads * slope, 0)
    grads = torch.where(is_live.unsqueeze(1), grads, 0)
    grad_logits.scatter_(1, index, grads.to(grad_logits.dtype))
