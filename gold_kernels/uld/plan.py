"""Which rows of a call of ULD are projected, and the tables of matched entries.

N_s scored rows of the student, G groups or pairs of rows, S scalar rows, R projected rows, K
matched entries, V vocabulary (V_s, V_t).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.heads import term_weights
from gold_kernels.engine.linear import RowPlan
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.tokens.vocabulary import VocabOverlap
from gold_kernels.uld import checks
from gold_kernels.uld.row_loss import ULD


def overlap_weights(
    function: str,
    overlap: VocabOverlap | None,
    matched_weight: float | None,
    unmatched_weight: float | None,
) -> tuple[float, float]:
    """Weights of the two parts; without any, the share of the student's vocabulary that matches."""
    checks.check_weights(function, overlap, matched_weight, unmatched_weight)
    if matched_weight is not None and unmatched_weight is not None:
        return float(matched_weight), float(unmatched_weight)
    if overlap is None:
        return 1.0, 1.0
    return overlap.student_share, 1.0 - overlap.student_share


def matched_tables(
    overlap: VocabOverlap | None, v_student: int, v_teacher: int, device: torch.device
) -> list[Tensor] | None:
    """[(K,), (K,) int32 matched entries of student and teacher; (V_s,), (V_t,) bool, which entries
    are matched]; None without an overlap.
    """
    if overlap is None:
        return None
    ids = [side.to(device) for side in overlap[:2]]
    flags = [
        torch.zeros(size, dtype=torch.bool, device=device).index_fill_(0, own, True)
        for size, own in zip((v_student, v_teacher), ids, strict=True)
    ]
    return [*(own.int() for own in ids), *flags]


class GroupPlan(NamedTuple):
    """Rows of a call with groups; scalars are rows, token ids and groups, (S,) int64 each, None
    where a side has none.
    """

    rows: RowPlan
    student_scalars: Sequence[Tensor] | None
    teacher_scalars: Sequence[Tensor] | None


def plan_groups(
    alignment: TokenAlignment,  # on the device
    row_weights: Tensor,  # (G,)
    labels: Tensor | None,  # (N_s,)
    label_weights: Tensor | None,  # (N_s,)
    num_rows: int,  # N_s
) -> GroupPlan:
    """Base rows, then scalar rows, then, for the cross-entropy alone, rows in no group."""
    student, teacher = alignment.sides
    base_rows, _, *student_scalars = student
    teacher_scalars = teacher[2:]
    groups = torch.arange(base_rows.shape[0], device=base_rows.device)
    owners = torch.cat([groups, student_scalars[2]])
    index = torch.cat([base_rows, student_scalars[0]])
    weights = row_weights[owners]
    if labels is not None and label_weights is not None:
        is_used = torch.zeros(num_rows, dtype=torch.bool, device=index.device).index_fill_(
            0, index, True
        )
        others = is_used.to(torch.int8).argsort(stable=True)[: num_rows - index.shape[0]]
        index = torch.cat([index, others])
        weights = torch.cat([weights, weights.new_zeros(others.shape[0])])
        labels, label_weights = labels[index], label_weights[index]
    plan = RowPlan(two_terms(weights, label_weights), labels, index, teacher[0], owners)
    has_scalars = [side[0].shape[0] > 0 for side in (student_scalars, teacher_scalars)]
    return GroupPlan(
        plan,
        student_scalars if has_scalars[0] else None,
        teacher_scalars if has_scalars[1] else None,
    )


def plan_rows(
    row_loss: ULD,
    alignment: TokenAlignment | None,  # on the device; None: row i with row i
    row_weights: Tensor,  # (G,)
    labels: Tensor | None,  # (N_s,)
    label_weights: Tensor | None,  # (N_s,)
    num_rows: int,  # N_s
    tables: list[Tensor] | None,
) -> tuple[RowPlan, ULD]:
    """Rows of groups or pairs, and the loss with its tensors."""
    row_loss = dataclasses.replace(row_loss, tables=tables)
    if alignment is None:
        labels = None if labels is None else labels.contiguous()
        return RowPlan(two_terms(row_weights, label_weights), labels), row_loss
    plan, *scalars = plan_groups(alignment, row_weights, labels, label_weights, num_rows)
    is_merged = any(side is not None for side in scalars)
    has_spans = is_merged and tables is not None and alignment.merge == "bayesian"
    row_loss = dataclasses.replace(
        row_loss,
        student_scalars=scalars[0],
        teacher_scalars=scalars[1],
        spans=alignment.span_ids() if has_spans else None,
    )
    return plan, row_loss


def two_terms(weights: Tensor, label_weights: Tensor | None) -> Tensor:  # (R, 2)
    """Kernels of groups read both weights of a row, with labels or without."""
    return term_weights(
        weights, torch.zeros_like(weights) if label_weights is None else label_weights
    )
