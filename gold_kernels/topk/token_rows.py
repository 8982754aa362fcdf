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
    """Of a chunk."""

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
    is_entry = terms.ids >= 0
    is_other = ~is_entry.any(1, keepdim=True)
    # padding is written where the first entry is, and with its numbers; without entries where the
    # token is: the label, or column 0
    place = is_entry.byte().argmax(1, keepdim=True)
    first = terms.ids.gather(1, place).clamp_min(0)
    labels = None if terms.labels is None else _labels(logits, terms.labels)
    if labels is not None:
        is_entry_too = ((terms.ids == labels.column) & is_entry).any(1, keepdim=True)
        is_token = labels.is_label & ~is_entry_too & (labels.logits > LOWEST_LOGIT)
        first = torch.where(is_other & is_token, labels.column, first)
    index = torch.where(is_entry, terms.ids, first)
    z = logits.gather(1, index).to(torch.float64).clamp_min_(LOWEST_LOGIT)
    c, slot = z.gather(1, place), first
    if labels is not None:
        c, slot = (
            torch.where(is_token, labels.logits, c),
            torch.where(is_token, labels.column, slot),
        )
        is_other = is_other | is_token  # the token is one of all others
    c = torch.where(c > LOWEST_LOGIT, c, 0)
    logits.scatter_(1, index, LOWEST_LOGIT).scatter_(1, slot, c.to(logits.dtype))
    token, options = slot.flatten(), {"temperature": temperature, "softcap": softcap}
    weights = torch.zeros(len(token), 2, dtype=values.dtype, device=values.device)
    weights[:, 0] = 1
    token_rows_(logits, None, token, token, weights, values[:2], **options)
    nll = values[0].to(torch.float64).unsqueeze(1)
    log_mix = c / temperature + nll
    without = log_mix + (-torch.expm1(-nll)).clamp_min(SMALLEST_REST).log()
    log_rest = torch.where(is_other, log_mix, without)
    own = torch.where(is_entry, z / temperature, LOWEST_LOGIT)
    lse = torch.cat([own, log_rest], 1).logsumexp(1, keepdim=True)
    log_s = torch.where(is_entry, (own - lse).clamp_min(LOG_ZERO), LOG_ZERO)
    log_t = torch.where(is_entry, terms.log_probs.to(torch.float64), LOG_ZERO).clamp_min(LOG_ZERO)
    s, t = log_s.exp(), log_t.exp()
    s_0 = (log_rest - lse).exp().clamp_min(SMALLEST_REST)
    t_0 = (1 - t.sum(1, keepdim=True)).clamp_min(SMALLEST_REST)
    loss, pull = matched_jsd(
        torch.cat([log_s, s_0.log()], 1), torch.cat([log_t, t_0.log()], 1), beta
    )
    weight = terms.weights[:, :1].to(torch.float64)
    is_soft = weight != 0
    numbers = torch.stack([loss, torch.zeros_like(loss), s.sum(1), t.sum(1)])
    values.copy_(torch.where(is_soft[:, 0], numbers, 0))
    total = pull.sum(1, keepdim=True)
    # what weighs q of another, and gradients of entries
    factor = torch.where(is_soft, weight * (pull[:, -1:] / s_0 - total) / temperature, 0)
    grads = torch.where(is_soft, weight * (pull[:, :-1] - s * total) / temperature, 0)
    q = (z / temperature - lse).exp()  # of entries, and of what is written for padding
    if labels is not None:
        hard = terms.weights[:, 1:].to(torch.float64)
        log_q = torch.where(is_token, log_rest - lse - nll, labels.logits - lse)
        log_q = log_q.clamp_min(LOG_ZERO)
        value = torch.where(labels.is_label, -log_q, 0)
        values[1] = torch.where(hard != 0, value, 0)[:, 0]
        hard = torch.where((hard != 0) & labels.is_label & (value < -LOG_ZERO), hard, 0)
        is_own = index == labels.column
        grads = grads + hard * torch.where(is_own, q.clamp_max(1) - 1, q)
        of_label = factor * log_q.exp() + hard * torch.expm1(log_q)
        factor = factor + hard
    if grad_logits is None:
        return
    weights[:, :1] = torch.where(
        is_live.unsqueeze(1), factor * temperature * (log_mix - lse).exp(), 0
    )
    scratch = torch.empty_like(values[:2])
    token_rows_(logits, grad_logits, token, token, weights, scratch, **options)
    if labels is not None:  # entries come after: a label may be one of them
        _write(grad_logits, labels.column, of_label, labels.logits, is_live, softcap)
    grads = torch.where(is_entry, grads, grads.gather(1, place))
    _write(grad_logits, index, grads, z, is_live, softcap)


class _Labels(NamedTuple):
    column: Tensor  # (C, 1), 0 for none
    is_label: Tensor  # (C, 1)
    logits: Tensor  # (C, 1) float64


def _labels(logits: Tensor, labels: Tensor) -> _Labels:
    is_label = ((labels >= 0) & (labels < logits.shape[1])).unsqueeze(1)
    index = torch.where(is_label, labels.unsqueeze(1), 0)
    own = logits.gather(1, index).to(torch.float64).clamp_min_(LOWEST_LOGIT)
    return _Labels(index, is_label, own)


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
