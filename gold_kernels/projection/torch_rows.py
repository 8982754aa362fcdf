"""Rows of the projected JSD in plain torch: the CPU and MPS backend.

C rows of a chunk, c rows of a block, V vocabulary (V_s, V_t), K entries of the teacher that are
reached. Same signature and outputs as projection/triton_rows.py.
"""

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT
from gold_kernels.engine.torch_rows import store_gradient_
from gold_kernels.likelihood.torch_rows import two_outcomes
from gold_kernels.tokens.projection import Folds
from gold_kernels.uld.torch_rows import cross_entropy, matched_jsd, of_token

BLOCK_ELEMENTS = 1 << 15  # temporaries are up to 20 times this many float32 values


def row_bytes(v_student: int, v_teacher: int, dtype: torch.dtype) -> int:
    """Memory that grows with the rows of a chunk: none, temporaries have BLOCK_ELEMENTS."""
    return 0


def rows_at_a_time(folds: Folds, scratch_bytes: int) -> tuple[int, int]:
    """The kernels' function of this name; in torch no memory is set apart for rows."""
    return 1, 0


def fold_rows(probs: Tensor, folds: Folds) -> Tensor:  # (c, V_s) -> (c, F)
    """Sums of every fold; those of folds.places are the columns of probs W."""
    out = probs.new_zeros(probs.shape[0], folds.num_folds)
    weights = folds.weights.to(probs.dtype)
    for level, first in enumerate(folds.starts[:-1]):
        part = slice(first, folds.starts[level + 1])
        read = out if level else probs
        for lane, ids in enumerate(folds.ids[:, part]):
            out[:, part] += read[:, ids] * weights[lane, part]
    return out


def projected_rows_(
    student_logits: Tensor,  # (C, V_s)
    teacher_logits: Tensor,  # (C, V_t)
    grad_logits: Tensor | None,  # (C, V_s), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, 2): of the loss, of the label
    folds: Folds,
    spans: list[Tensor] | None,  # (C,), (C,) int64 first tokens of merged groups, -1 for others
    log_scales: list[Tensor] | None,  # (C,), (C,) of the later tokens of groups
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (6, C), overwritten, in the order of ProjectedJSD.value_names
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
    scratch_bytes: int = 0,  # of the kernels
) -> None:
    """Loss and gradient of every row of a chunk, a few rows at a time."""
    size = max(student_logits.shape[1], teacher_logits.shape[1])
    step = max(1, BLOCK_ELEMENTS // size)
    for start in range(0, student_logits.shape[0], step):
        rows = slice(start, start + step)
        student = student_logits[rows].to(values.dtype)
        log_q = (student / temperatures[0]).clamp_min(LOWEST_LOGIT).log_softmax(-1)
        teacher = teacher_logits[rows].to(values.dtype)
        log_p = (teacher / temperatures[1]).clamp_min(LOWEST_LOGIT).log_softmax(-1)
        loss, grad, masses = _projected(log_q, log_p, folds, beta)
        slope = torch.zeros_like(loss)
        if spans is not None:
            of_block = [side[rows] for side in spans]
            scales = None if log_scales is None else [side[rows] for side in log_scales]
            span_loss, slope, span_grad = _merged(log_q, log_p, of_block, scales, beta)
            loss, grad = loss + span_loss, grad + span_grad
        weight, hard_weight = weights[rows].unbind(1)
        is_live, is_hard = weight != 0, hard_weight != 0  # weight 0: may hold anything
        for place, value in ((0, loss), (2, masses[0]), (3, masses[1]), (4, slope)):
            values[place, rows] = torch.where(is_live, value, 0)
        grad = grad * (weight / temperatures[0]).unsqueeze(1)
        grad = torch.where(is_live.unsqueeze(1), grad, 0)
        if labels is not None:
            hard, hard_grad = cross_entropy(student, labels[rows], 1.0)
            values[1, rows] = torch.where(is_hard, hard, 0)
            hard_grad = hard_grad * hard_weight.unsqueeze(1)
            grad += torch.where(is_hard.unsqueeze(1), hard_grad, 0)
        if grad_logits is not None:
            store_gradient_(grad_logits[rows], grad, student, is_live | is_hard, softcap)


def _projected(
    log_q: Tensor, log_p: Tensor, folds: Folds, beta: float
) -> tuple[Tensor, Tensor, list[Tensor]]:  # (c,), (c, V_s) of logits / temperature, masses (c,)
    q = log_q.exp()
    sums, places = fold_rows(q, folds), folds.places.long()
    projected = sums[:, places]
    tiny = torch.finfo(q.dtype).tiny
    log_s = torch.where(projected <= tiny, LOG_ZERO, projected.clamp_min(tiny).log())
    log_t = log_p[:, folds.teacher_ids.long()].clamp_min(LOG_ZERO)
    loss, pull = matched_jsd(log_s, log_t, beta)
    sums[:, places] = pull / projected.clamp_min(tiny)  # without any mass there is no pull
    num_entries = folds.row_places.shape[1]
    mean = torch.zeros_like(q)
    for row_places, row_weights in zip(folds.row_places, folds.row_weights, strict=True):
        mean[:, :num_entries] += sums[:, row_places.long()] * row_weights.to(q.dtype)
    grad = q * (mean - pull.sum(-1, keepdim=True))
    return loss, grad, [projected.sum(-1), log_t.exp().sum(-1)]


def _merged(
    log_q: Tensor,
    log_p: Tensor,
    spans: list[Tensor],  # (c,), (c,)
    log_scales: list[Tensor] | None,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:  # (c,) loss, (c,) slope, (c, V_s) gradient
    """Two outcomes of groups of several tokens: their bytes follow, or others do."""
    is_span = spans[0] >= 0
    index = [side.clamp_min(0).unsqueeze(1) for side in spans]
    (log_s, rest), (log_t, _) = map(of_token, (log_q, log_p), index)
    sides = [log_s.squeeze(1), log_t.squeeze(1)]
    if log_scales is not None:
        sides = [side + scale for side, scale in zip(sides, log_scales, strict=True)]
    wide = torch.float32 if log_q.device.type == "mps" else torch.float64
    log_s, log_t = (side.to(wide).clamp(LOG_ZERO, 0) for side in sides)
    loss, slope = two_outcomes(log_s, log_t, beta)
    slope = torch.where(log_s > LOG_ZERO, slope, 0)  # a group of a masked token has the floor
    loss, slope = (torch.where(is_span, part, 0).to(log_q.dtype) for part in (loss, slope))
    onehot_minus_q = (-log_q.exp()).scatter(1, index[0], rest)
    return loss, slope, slope.unsqueeze(1) * onehot_minus_q
