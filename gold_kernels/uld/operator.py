"""The operator behind fused_linear_uld: what is projected, when, and which row function meets it.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, S scalar rows, R rows of the
student that are projected, C rows of a chunk, D hidden size, V vocabulary (V_s, V_t), K matched
entries. P teacher, Q student.

Order of the work: log-probabilities of the scalar rows of both sides, summed over each group to its
log-scale; then one chunk loop over the student's base rows, paired with the teacher's, and after
them over its scalar rows, whose gradient is that of the log-scale.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.chunking import (
    DEFAULT_BUDGET_BYTES,
    Limits,
    LinearHead,
    Needs,
    divergence_bound,
    float_dtype,
    run_chunks,
)
from gold_kernels.engine.gradients import empty_gradients
from gold_kernels.jsd.reference import LOG_ZERO
from gold_kernels.uld import torch_rows as torch_uld_rows

NUM_ROW_VALUES = 7
SCALE_SLOPE = 6  # row of the values: dloss / dlog_scale of the student
NO_TOKEN = -1
SCRATCH_PART = 8  # of the budget, at most, is working memory of the row kernel


class ULDOptions(NamedTuple):
    """What the loss needs besides tensors and heads; the operator takes them one by one."""

    beta: float = 0.5
    temperatures: Sequence[float] = (1.0, 1.0)  # student, teacher
    matched_weight: float = 1.0
    unmatched_weight: float = 1.0
    backend: str | None = None
    chunk_size: int | None = None
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    logits_dtype: torch.dtype | None = None
    logit_scales: Sequence[float] = (1.0, 1.0)
    softcaps: Sequence[float] = (0.0, 0.0)  # 0: none


class ULDRows(NamedTuple):
    """Which rows meet; lists are empty where there is nothing of the kind."""

    weights: Tensor  # (R, 2): row weight of the group, weight of the cross-entropy
    labels: Sequence[Tensor] = ()  # [(R,) int64] for the cross-entropy
    base_rows: Sequence[Tensor] = ()  # [(R,) of the student, scalar rows after base rows; (G,)]
    student_scalars: Sequence[Tensor] = ()  # [rows, ids, groups], (S_s,) each
    teacher_scalars: Sequence[Tensor] = ()  # [rows, ids, groups], (S_t,) each
    tables: Sequence[Tensor] = ()  # of matched entries, see linear_uld.matched_tables
    spans: Sequence[Tensor] = ()  # [(G,), (G,)] int64, see TokenAlignment.span_ids


def row_functions(backend: str) -> tuple[Callable, Callable, Callable]:
    """uld_rows_, token_rows_, and how many bytes a row the first one takes."""
    if backend == "triton":
        from gold_kernels.uld.triton_rows import uld_rows_
        from gold_kernels.uld.triton_sums import row_bytes
        from gold_kernels.uld.triton_token_rows import token_rows_  # triton may be missing

        return uld_rows_, token_rows_, row_bytes
    return torch_uld_rows.uld_rows_, torch_uld_rows.token_rows_, torch_uld_rows.row_bytes


def _log_scales(
    head: LinearHead,
    scalars: Sequence[Tensor],  # rows, ids, groups, (S,) each
    num_groups: int,
    temperature: float,
    token_rows_: Callable,
    limits: Limits,
) -> Tensor:  # (G,) sum of log q(id) over the scalar rows of each group
    rows, ids, groups = scalars
    values = head.hidden.new_zeros(2, rows.shape[0], dtype=float_dtype(head.hidden))
    weights = values.new_ones(rows.shape[0], 2)

    def row_function(logits: Tensor, _: None, __: None, chunk: slice, weights: Tensor) -> None:
        token_rows_(
            logits,
            None,
            ids[chunk],
            ids[chunk],
            weights,
            values[:, chunk],
            temperature=temperature,
            softcap=head.softcap,
        )

    needs = Needs(False, False, False)
    run_chunks(head._replace(index=rows), None, weights, row_function, needs, limits)
    # groups ascend: a segmented sum gives the same bits in every run, index_add would not
    offsets = torch.searchsorted(groups, torch.arange(num_groups + 1, device=groups.device))
    sums = torch.segment_reduce(-values[0], "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.clamp_min(LOG_ZERO)  # of a masked token: beside 1e30 float32 loses the logits


@torch.library.custom_op("gold_kernels::linear_uld", mutates_args=())
def linear_uld_operator(
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    student_bias: Tensor | None,  # (V_s,)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    teacher_bias: Tensor | None,  # (V_t,)
    needs: Sequence[bool],  # gradients of student_hidden, student_weight, student_bias
    weights: Tensor,
    labels: Sequence[Tensor],
    base_rows: Sequence[Tensor],
    student_scalars: Sequence[Tensor],
    teacher_scalars: Sequence[Tensor],
    tables: Sequence[Tensor],
    spans: Sequence[Tensor],
    beta: float,
    temperatures: Sequence[float],
    matched_weight: float,
    unmatched_weight: float,
    backend: str,
    chunk_size: int | None,
    budget_bytes: int,
    logits_dtype: torch.dtype | None,
    logit_scales: Sequence[float],
    softcaps: Sequence[float],
) -> list[Tensor]:  # (7, R) row values, then a gradient for each true need
    """An operator, so that torch.compile takes it as it is instead of tracing it."""
    uld_rows_, token_rows_, row_bytes = row_functions(backend)
    caps = [cap or None for cap in softcaps]
    chunk_bytes = max(1, budget_bytes - budget_bytes // SCRATCH_PART)
    limits = Limits(chunk_size, chunk_bytes, logits_dtype)
    own_bytes = row_bytes(
        student_weight.shape[0],
        teacher_weight.shape[0],
        tables[0].shape[0] if tables else 0,
        logits_dtype or float_dtype(student_hidden),
    )
    student_index, teacher_index = base_rows if base_rows else (None, None)
    student = LinearHead(
        student_hidden, student_weight, student_bias, logit_scales[0], caps[0], student_index
    )
    teacher = LinearHead(
        teacher_hidden, teacher_weight, teacher_bias, logit_scales[1], caps[1], teacher_index
    )
    num_groups = teacher.num_rows
    sides = (student, student_scalars, temperatures[0]), (teacher, teacher_scalars, temperatures[1])
    log_scales = None
    if student_scalars or teacher_scalars:
        log_scales = [
            _log_scales(head, scalars, num_groups, temperature, token_rows_, limits)
            if scalars
            else student_hidden.new_zeros(num_groups, dtype=float_dtype(student_hidden))
            for head, scalars, temperature in sides
        ]
    values = student_hidden.new_zeros(
        NUM_ROW_VALUES, student.num_rows, dtype=float_dtype(student_hidden)
    )
    ids, groups = _tokens_after_groups(student, num_groups, student_scalars)

    def row_function(
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        grad_logits: Tensor | None,
        rows: slice,
        chunk_weights: Tensor,  # (C, 2)
    ) -> None:
        chunk_labels = labels[0][rows] if labels else None
        if teacher_logits is not None:
            uld_rows_(
                student_logits,
                teacher_logits,
                grad_logits,
                chunk_weights,
                None if log_scales is None else [scales[rows] for scales in log_scales],
                chunk_labels,
                tables or None,
                [side[rows] for side in spans] or None,
                values[:, rows],
                beta=beta,
                temperatures=temperatures,
                matched_weight=matched_weight,
                unmatched_weight=unmatched_weight,
                softcap=caps[0],
                scratch_bytes=budget_bytes // SCRATCH_PART,
            )
            return
        tokens = slice(rows.start - num_groups, rows.stop - num_groups)
        slope = -values[SCALE_SLOPE][groups[tokens]]  # dloss / d(-log q(id))
        token_rows_(
            student_logits,
            grad_logits,
            ids[tokens],
            ids[tokens] if chunk_labels is None else chunk_labels,
            torch.stack([chunk_weights[:, 0] * slope, chunk_weights[:, 1]], dim=1),
            values[:2, rows],
            temperature=temperatures[0],
            softcap=caps[0],
        )

    bound = unmatched_weight
    if tables:
        bound += matched_weight * divergence_bound(beta)
    grads = run_chunks(
        *(student, teacher, weights, row_function, Needs(*needs)),
        limits._replace(row_bytes=own_bytes),
        grad_bound=max(1.0, bound / temperatures[0]),
    )
    return [values, *(grad for grad in grads if grad is not None)]


def _tokens_after_groups(
    student: LinearHead, num_groups: int, scalars: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:  # (R - G,) int64 each
    """Token and group of the rows after the base rows; rows in no group have no token."""
    num_others = student.num_rows - num_groups
    index = torch.zeros(num_others, dtype=torch.int64, device=student.hidden.device)
    ids, groups = index + NO_TOKEN, index
    if scalars:
        num_scalars = scalars[0].shape[0]
        ids[:num_scalars] = scalars[1]
        groups = torch.cat([scalars[2], index[num_scalars:]])
    return ids, groups


@linear_uld_operator.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    *args: Any,
    **options: Any,
) -> list[Tensor]:
    needs, weights = args[3], args[4]
    values = weights.new_empty(NUM_ROW_VALUES, weights.shape[0])
    return [values, *empty_gradients((student_hidden, student_weight, student_bias), needs)]
