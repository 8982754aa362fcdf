"""ULD, extended ULD and the hybrid loss as one row loss.

G aligned groups or pairs of rows, S scalar rows, C rows of a chunk, V vocabulary (V_s, V_t), K
matched entries. P teacher, Q student.

Order of the work: log-probabilities of the scalar rows of both sides, summed over each group to its
log-scale; then one chunk loop over the student's base rows, paired with the teacher's, and after
them over its scalar rows, whose gradient is that of the log-scale (group_rows.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunk_plan import Limits
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS, RowLoss, Rows
from gold_kernels.engine.slices import Slices
from gold_kernels.engine.torch_rows import SCRATCH_PART, without_scratch
from gold_kernels.jsd.row_loss import divergence_bound
from gold_kernels.uld import torch_counts, torch_rows
from gold_kernels.uld.counted_rows import CountedRows, Counts
from gold_kernels.uld.group_rows import group_rows, log_scales

VALUE_NAMES = (
    *(LOSS, CROSS_ENTROPY, "matched_loss", "unmatched_loss"),
    *("student_matched_mass", "teacher_matched_mass"),
    "scale_slope",  # dloss / dlog_scale of the student
)
SCALE_SLOPE = VALUE_NAMES.index("scale_slope")


def row_functions(backend: str) -> tuple[Callable, Callable]:
    """uld_rows_, and how many bytes a row it takes."""
    if backend == "triton":
        from gold_kernels.uld.triton_rows import uld_rows_  # triton may be missing
        from gold_kernels.uld.triton_sums import row_bytes

        return uld_rows_, row_bytes
    return torch_rows.uld_rows_, torch_rows.row_bytes


def counts_of(backend: str) -> tuple[Callable[..., Counts], Callable]:
    """Counts of slices, and how many bytes a row they take."""
    if backend == "triton":
        from gold_kernels.uld import triton_counts  # triton may be missing

        return triton_counts.TritonCounts, triton_counts.row_bytes
    return torch_counts.TorchCounts, torch_counts.row_bytes


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
    tables: Sequence[Tensor] | None = None  # of matched entries, see plan.matched_tables
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
    takes_slices: ClassVar[bool] = True  # where no entry has a partner

    def check(self, function: str) -> None:
        checks.check_beta(function, self.beta)
        checks.check_temperature(function, self.temperature)

    def grad_bound(self) -> float:
        bound = self.unmatched_weight
        if self.tables is not None:
            bound += self.matched_weight * divergence_bound(self.beta)
        return max(1.0, bound / self.temperature[0])

    def limits(self, limits: Limits, v_student: int, v_teacher: int, rows: Rows) -> Limits:
        row_bytes = row_functions(rows.backend)[1]
        num_matched = 0 if self.tables is None else self.tables[0].shape[0]
        logits_dtype = limits.dtype_of_logits(rows.values)
        own_bytes = row_bytes(v_student, v_teacher, num_matched, logits_dtype)
        if rows.slices is not None:
            heads = [head for head in (rows.student, rows.teacher) if head is not None]
            slices = [head.slices for head in heads if head.slices is not None]
            is_in_place = heads[0].hidden.dtype == logits_dtype
            own_bytes = counts_of(rows.backend)[1](slices, logits_dtype, is_in_place)
        return without_scratch(limits)._replace(row_bytes=own_bytes)

    def slices(
        self,
        student: LinearHead,
        teacher: LinearHead | None,
        labels: Tensor | None,
        logits_dtype: torch.dtype,
    ) -> Slices | None:
        """Sides may be cut at other entries. 16-bit logits are ties, whose bins no pool holds."""
        tensors = (self.student_scalars, self.teacher_scalars, self.tables, self.spans, labels)
        is_plain = self.takes_slices and logits_dtype.itemsize > 2
        is_plain &= all(part is None for part in tensors)
        if not is_plain or teacher is None or teacher.num_rows != student.num_rows:
            return None
        return student.slices

    def start(self, rows: Rows) -> RowFunction:
        whole = self._whole_rows(rows)
        if rows.slices is None:
            return whole
        counts = partial(
            counts_of(rows.backend)[0],
            temperatures=self.temperature,
            unmatched_weight=self.unmatched_weight,
            softcap=rows.softcap,
            scratch_bytes=rows.limits.budget_bytes // SCRATCH_PART,
        )
        student, teacher = rows.student, rows.teacher
        assert student is not None and teacher is not None, "slices are of heads"
        dtype = rows.limits.dtype_of_logits(rows.values)
        whole_bytes = row_functions(rows.backend)[1](
            student.vocab_size, teacher.vocab_size, 0, dtype
        )
        values = rows.values, self.unmatched_weight
        return CountedRows(whole, whole_bytes, counts, student, teacher, *values)

    def _whole_rows(self, rows: Rows) -> RowFunction:
        scalars = self.student_scalars, self.teacher_scalars
        scales = log_scales(rows, scalars, self.temperature)
        slopes = rows.values[SCALE_SLOPE]
        return group_rows(
            rows, self._paired_rows(rows, scales), scalars[0], slopes, self.temperature[0]
        )

    def _paired_rows(self, rows: Rows, scales: list[Tensor] | None) -> Callable[..., None]:
        """The function of base rows, where student and teacher meet."""
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
                None if scales is None else [side[chunk] for side in scales],
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
