"""Rows of aligned groups in the chunk loop: base rows, where student and teacher meet, then the
student's scalar rows, whose gradient is that of their group's log-scale.

N scored rows of a side, G groups, S scalar rows, R rows of the student that are projected, C rows
of a chunk, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import Needs, float_dtype
from gold_kernels.engine.chunking import RowFunction, run_chunks
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.probabilities import LOG_ZERO
from gold_kernels.engine.row_loss import Rows
from gold_kernels.engine.torch_rows import without_scratch
from gold_kernels.uld import torch_rows

NO_TOKEN = -1
Scalars = Sequence[Tensor] | None  # rows, token ids, groups, (S,) int64 each; groups ascend


def token_rows_of(backend: str) -> Callable[..., None]:
    """token_rows_ of a backend."""
    if backend == "triton":
        from gold_kernels.uld.triton_token_rows import token_rows_  # triton may be missing

        return token_rows_
    return torch_rows.token_rows_


def group_rows(
    rows: Rows,
    paired: Callable[..., None],  # of base rows: what a row function takes
    student_scalars: Scalars,
    slopes: Tensor,  # (R,) of base rows once they have run: dloss / dlog_scale of the student
    temperature: float,
) -> RowFunction:
    """The row function of base rows and, behind them, of scalar rows and of rows in no group that
    have labels.
    """
    after = None
    if rows.student is not None:
        after = _scalar_rows(rows, student_scalars, slopes, temperature)

    def row_function(
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        grad_logits: Tensor | None,
        chunk: slice,
        weights: Tensor,  # (C, 2)
    ) -> None:
        if teacher_logits is not None:
            paired(student_logits, teacher_logits, grad_logits, chunk, weights)
        else:
            assert after is not None, "logits that the caller holds are all paired"
            after(student_logits, grad_logits, chunk, weights)

    return row_function


def _scalar_rows(
    rows: Rows, scalars: Scalars, slopes: Tensor, temperature: float
) -> Callable[..., None]:
    token_rows_ = token_rows_of(rows.backend)
    assert rows.student is not None and rows.teacher is not None, "rows of heads"
    num_groups = rows.teacher.num_rows
    ids, groups = _tokens_after_groups(rows.student, num_groups, scalars)

    def row_function(
        logits: Tensor, grad_logits: Tensor | None, chunk: slice, weights: Tensor
    ) -> None:
        tokens = slice(chunk.start - num_groups, chunk.stop - num_groups)
        slope = -slopes[groups[tokens]]  # dloss / d(-log q(id))
        token_rows_(
            logits,
            grad_logits,
            ids[tokens],
            ids[tokens] if rows.labels is None else rows.labels[chunk],
            torch.stack([weights[:, 0] * slope, weights[:, 1]], dim=1),
            rows.values[:2, chunk],
            temperature=temperature,
            softcap=rows.softcap,
        )

    return row_function


def log_scales(
    rows: Rows, scalars: tuple[Scalars, Scalars], temperatures: tuple[float, float]
) -> list[Tensor] | None:  # (G,) of student and of teacher
    """Sums of the scalar rows' log-probabilities, by group; None where no side has any."""
    if scalars == (None, None):
        return None
    assert rows.student is not None and rows.teacher is not None, "scalar rows come from heads"
    sides = zip((rows.student, rows.teacher), scalars, temperatures, strict=True)
    num_groups = rows.teacher.num_rows
    return [
        rows.values.new_zeros(num_groups)
        if side is None
        else _log_scale(head, side, num_groups, temperature, rows)
        for head, side, temperature in sides
    ]


def _log_scale(
    head: LinearHead,
    scalars: Sequence[Tensor],  # rows, ids, groups, (S,) each
    num_groups: int,
    temperature: float,
    rows: Rows,
) -> Tensor:  # (G,) sum of log q(id) over the scalar rows of each group
    index, ids, groups = scalars
    values = head.hidden.new_zeros(2, index.shape[0], dtype=float_dtype(head.hidden))
    weights = values.new_ones(index.shape[0], 2)
    token_rows_ = token_rows_of(rows.backend)

    def row_function(
        logits: Tensor, _: None, __: Tensor | None, chunk: slice, weights: Tensor
    ) -> None:
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

    needs, limits = Needs(False, False, False), without_scratch(rows.limits)
    head = head._replace(row_index=index)
    run_chunks(head, None, weights, row_function, needs, limits, values=values)
    # groups ascend: a segmented sum gives the same bits in every run, index_add would not
    offsets = torch.searchsorted(groups, torch.arange(num_groups + 1, device=groups.device))
    sums = torch.segment_reduce(-values[0], "sum", offsets=offsets, initial=0, unsafe=True)
    return sums.clamp_min(LOG_ZERO)  # of a masked token: beside 1e30 float32 loses the logits


def _tokens_after_groups(
    student: LinearHead, num_groups: int, scalars: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:  # (R - G,) int64 each
    """Token and group of the rows after the base rows; rows in no group have no token."""
    num_others = student.num_rows - num_groups
    index = torch.zeros(num_others, dtype=torch.int64, device=student.hidden.device)
    ids, groups = index + NO_TOKEN, index
    if scalars is not None:
        num_scalars = scalars[0].shape[0]
        ids[:num_scalars] = scalars[1]
        groups = torch.cat([scalars[2], index[num_scalars:]])
    return ids, groups
