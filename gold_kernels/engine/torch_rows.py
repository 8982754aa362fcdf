"""What torch row functions over one vocabulary share: blocks of rows, weights, the cross-entropy.

C rows of a chunk, c rows of a block, T terms of the loss, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import Limits
from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT, log_probs
from gold_kernels.engine.slices import Slices, log_sum_exps_

# Temporaries are up to 17 times this many float32 values (or one row, if a row is longer).
BLOCK_ELEMENTS = 1 << 15
# Where blocks are as large as memory allows: on a GPU each takes some twenty launches, with slices
# of a vocabulary some messages.
TEMPORARIES = 12  # (c, V) tensors of a block alive at once, at most
SCRATCH_PART = 8  # of the budget, at most, is for them


def without_scratch(limits: Limits) -> Limits:
    """The limits less the memory of large blocks."""
    scratch = limits.budget_bytes // SCRATCH_PART
    return limits._replace(budget_bytes=max(1, limits.budget_bytes - scratch))


def large_block(limits: Limits, dtype: torch.dtype) -> int:
    """Elements of a block whose temporaries are within their part of the budget."""
    return limits.budget_bytes // SCRATCH_PART // (TEMPORARIES * dtype.itemsize)


class Divergence(NamedTuple):
    """What a few rows lose and how the student's logits should move."""

    loss: Tensor  # (c,)
    grad: Tensor  # (c, V), of logits / temperature; overwritten later
    metrics: Tensor | None = None  # (number of value names - 2, c)


# (student logits, teacher logits), (c, V) each in float32 or float64
DivergenceFunction = Callable[[Tensor, Tensor], Divergence]


def cross_entropy(
    logits: Tensor,  # (c, V)
    labels: Tensor,  # (c,)
    slices: Slices | None = None,  # of which the columns are this process'
) -> tuple[Tensor, Tensor]:
    """(c,) -log q(label) and its (c, V) gradient; 0 for a label outside the vocabulary."""
    first, vocab_size = (0, logits.shape[-1]) if slices is None else (slices.first, slices.total)
    is_label = (labels >= 0) & (labels < vocab_size)
    is_here, log_q = is_label, None
    if slices is None:
        log_q = log_probs(logits, 1.0)
    else:
        is_here = (labels >= first) & (labels < first + logits.shape[-1])
        logits = logits.clamp_min(LOWEST_LOGIT)
        (lse,) = log_sum_exps_([logits], slices)
        log_q = (logits - lse).clamp_min_(LOG_ZERO)
    loss, moves = torch.zeros_like(labels, dtype=log_q.dtype), log_q.exp()
    if logits.shape[-1]:  # a slice may have no entries
        index = torch.where(is_here, labels - first, 0).unsqueeze(-1)
        loss = torch.where(is_here, -log_q.gather(-1, index).squeeze(-1), 0)
        moves.scatter_add_(-1, index, -is_here.to(log_q.dtype).unsqueeze(-1))
    if slices is not None:
        loss = slices.sum_(loss)
    has_slope = is_label & (loss < -LOG_ZERO)  # a masked label has the floor
    return loss, torch.where(has_slope.unsqueeze(-1), moves, 0)


def divergence_rows_(
    divergence: DivergenceFunction,
    student_logits: Tensor,  # (C, V)
    teacher_logits: Tensor,  # (C, V)
    grad_logits: Tensor | None,  # (C, V), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, T): of the loss and, with labels, of the cross-entropy
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (number of value names, C), overwritten where the divergence has them
    *,
    temperature: float,  # of the student
    softcap: float | None,
    block_elements: int = BLOCK_ELEMENTS,
    slices: Slices | None = None,
) -> None:
    """Values and gradient of every row of a chunk, a few rows at a time. softcap: the student's
    logits went through softcap tanh(x / softcap), the gradient is that of x. slices: columns are
    this process', values those of the whole vocabulary.
    """
    num_rows = student_logits.shape[0]
    step = max(1, block_elements // (student_logits.shape[1] if slices is None else slices.widest))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        student = student_logits[rows].to(values.dtype)
        loss, grad, metrics = divergence(student, teacher_logits[rows].to(values.dtype))
        weight = weights[rows, 0]
        is_live = weight != 0  # a row of weight 0 may hold anything, NaN included
        values[0, rows] = torch.where(is_live, loss, 0)
        if metrics is not None:
            values[2:, rows] = torch.where(is_live, metrics, 0)
        grad = grad.mul_(1 / temperature).mul_(weight.unsqueeze(-1))
        if labels is not None:
            hard_loss, hard_grad = cross_entropy(student, labels[rows], slices)
            hard_weight = weights[rows, 1]
            is_hard = hard_weight != 0
            values[1, rows] = torch.where(is_hard, hard_loss, 0)
            hard_grad = hard_grad.mul_(hard_weight.unsqueeze(-1))
            # where, not a product: the other term's row may be live
            grad = torch.where(is_live.unsqueeze(-1), grad, 0)
            grad = grad.add_(torch.where(is_hard.unsqueeze(-1), hard_grad, 0))
            is_live = is_live | is_hard
        if grad_logits is not None:
            store_gradient_(grad_logits[rows], grad, student, is_live, softcap)


def store_gradient_(
    grad_logits: Tensor,  # (c, V), overwritten
    grad: Tensor,  # (c, V)
    logits: Tensor,  # (c, V)
    is_live: Tensor,  # (c,)
    softcap: float | None,
) -> None:
    """The gradient before the softcap, exactly 0 in rows of weight 0."""
    if softcap is not None:  # logits are softcap tanh(x / softcap)
        slope = (logits / softcap).square_().neg_().add_(1)
        grad = torch.where(logits > LOWEST_LOGIT, grad * slope, 0)
    grad_logits.copy_(torch.where(is_live.unsqueeze(-1), grad, 0))
