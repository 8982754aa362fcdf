"""ULD, extended ULD and the hybrid loss as one row loss.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, S scalar rows, R rows of the
student that are projected, C rows of a chunk, D hidden size, V vocabulary (V_s, V_t), K matched
entries. P teacher, Q student.

Order of the work: log-probabilities of the scalar rows of both sides, summed over each group to its
log-scale; then one chunk loop over the student's base rows, paired with the teacher's, and after
them over its scalar rows, whose gradient is that of the log-scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import (
    Limits,
    LinearHead,
    Needs,
    RowFunction,
    float_dtype,
    run_chunks,
)
from gold_kernels.engine.probabilities import LOG_ZERO
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS, RowLoss, Rows
from gold_kernels.jsd.row_loss import divergence_bound
from gold_kernels.uld import torch_rows

VALUE_NAMES = (
    *(LOSS, CROSS_ENTROPY, "matched_loss", "unmatched_loss"),
    *("student_matched_mass", "teacher_matched_mass"),
    "scale_slope",  # dloss / dlog_scale of the student
)
SCALE_SLOPE = VALUE_NAMES.index("scale_slope")
NO_TOKEN = -1
SCRATCH_PART = 8  # of the budget, at most, is working memory of the row kernel


def row_functions(backend: str) -> tuple[Callable, Callable, Callable]:
    """uld_rows_, token_rows_, and how many bytes a row the first one takes."""
    if backend == "triton":
        from gold_kernels.uld.triton_rows import uld_rows_
        from gold_kernels.uld.triton_sums import row_bytes
        from gold_kernels.uld.triton_token_rows import token_rows_  # triton may be missing

        return uld_rows_, token_rows_, row_bytes
    return torch_rows.uld_rows_, torch_rows.token_rows_, torch_rows.row_bytes


@dataclass(frozen=True)
class ULD(RowLoss):
    """matched_weight * JSD_beta of matched entries + unmatched_weight * sorted L1 of the others.

    Without tables all entries are unmatched. Scalar rows make the log-scales of groups; spans are
    the tokens of merged groups, which have two outcomes: the span follows, or something else does.
    """

    beta: float = 0.5
    matched_weight: float = 1.0
    unmatched_weight: float = 1.0
    temperature: tuple[float, float] = (1.0, 1.0)  # student, teacher
    student_scalars: Sequence[Tensor] | None = None  # rows, token ids, groups, (S_s,) int64 each
    teacher_scalars: Sequence[Tensor] | None = None  # rows, token ids, groups, (S_t,) int64 each
    tables: Sequence[Tensor] | None = None  # of matched entries, see matched_tables
    spans: Sequence[Tensor] | None = None  # (G,), (G,) int64, see TokenAlignment.span_ids

    name: ClassVar[str] = "uld"
    value_names: ClassVar[tuple[str, ...]] = VALUE_NAMES
    number_sizes: ClassVar[dict[str, int]] = {"temperature": 2}
    tensor_sizes: ClassVar[dict[str, int]] = {
        "student_scalars": 3,
        "teacher_scalars": 3,
        "tables": 4,
        "spans": 2,
    }
    is_shared: ClassVar[bool] = False

    def check(self, function: str) -> None:
        checks.check_beta(function, self.beta)
        checks.check_temperature(function, self.temperature)

    def grad_bound(self) -> float:
        bound = self.unmatched_weight
        if self.tables is not None:
            bound += self.matched_weight * divergence_bound(self.beta)
        return max(1.0, bound / self.temperature[0])

    def limits(self, limits: Limits, v_student: int, v_teacher: int, rows: Rows) -> Limits:
        row_bytes = row_functions(rows.backend)[2]
        num_matched = 0 if self.tables is None else self.tables[0].shape[0]
        logits_dtype = limits.logits_dtype or rows.values.dtype
        own_bytes = row_bytes(v_student, v_teacher, num_matched, logits_dtype)
        return _without_scratch(limits)._replace(row_bytes=own_bytes)

    def start(self, rows: Rows) -> RowFunction:
        log_scales = self._log_scales(rows)
        paired = self._paired_rows(rows, log_scales)
        after = None if rows.student is None else self._scalar_rows(rows)

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

    def _paired_rows(self, rows: Rows, log_scales: list[Tensor] | None) -> Callable[..., None]:
        """Of base rows: student and teacher meet."""
        uld_rows_ = row_functions(rows.backend)[0]

        def row_function(
            student_logits: Tensor,
            teacher_logits: Tensor,
            grad_logits: Tensor | None,
            chunk: slice,
            weights: Tensor,
        ) -> None:
            uld_rows_(
                student_logits,
                teacher_logits,
                grad_logits,
                weights,
                None if log_scales is None else [scales[chunk] for scales in log_scales],
                None if rows.labels is None else rows.labels[chunk],
                self.tables,
                None if self.spans is None else [side[chunk] for side in self.spans],
                rows.values[:, chunk],
                beta=self.beta,
                temperatures=self.temperature,
                matched_weight=self.matched_weight,
                unmatched_weight=self.unmatched_weight,
                softcap=rows.softcap,
                scratch_bytes=rows.limits.budget_bytes // SCRATCH_PART,
            )

        return row_function

    def _scalar_rows(self, rows: Rows) -> Callable[..., None]:
        """Of rows behind the base rows: the student's scalar rows, and rows in no group that have
        labels.
        """
        token_rows_ = row_functions(rows.backend)[1]
        assert rows.student is not None and rows.teacher is not None, "rows of heads"
        num_groups = rows.teacher.num_rows
        ids, groups = _tokens_after_groups(rows.student, num_groups, self.student_scalars)

        def row_function(
            logits: Tensor, grad_logits: Tensor | None, chunk: slice, weights: Tensor
        ) -> None:
            tokens = slice(chunk.start - num_groups, chunk.stop - num_groups)
            slope = -rows.values[SCALE_SLOPE][groups[tokens]]  # dloss / d(-log q(id))
            token_rows_(
                logits,
                grad_logits,
                ids[tokens],
                ids[tokens] if rows.labels is None else rows.labels[chunk],
                torch.stack([weights[:, 0] * slope, weights[:, 1]], dim=1),
                rows.values[:2, chunk],
                temperature=self.temperature[0],
                softcap=rows.softcap,
            )

        return row_function

    def _log_scales(self, rows: Rows) -> list[Tensor] | None:  # (G,) of student and of teacher
        if self.student_scalars is None and self.teacher_scalars is None:
            return None
        assert rows.student is not None and rows.teacher is not None, "scalar rows come from heads"
        scalars = self.student_scalars, self.teacher_scalars
        sides = zip((rows.student, rows.teacher), scalars, self.temperature, strict=True)
        num_groups = rows.teacher.num_rows
        return [
            rows.values.new_zeros(num_groups)
            if side is None
            else _log_scale(head, side, num_groups, temperature, rows)
            for head, side, temperature in sides
        ]


def _without_scratch(limits: Limits) -> Limits:
    budget = limits.budget_bytes
    return limits._replace(budget_bytes=max(1, budget - budget // SCRATCH_PART))


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
    token_rows_ = row_functions(rows.backend)[1]

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

    needs, limits = Needs(False, False, False), _without_scratch(rows.limits)
    run_chunks(head._replace(row_index=index), None, weights, row_function, needs, limits)
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
