"""The chunk likelihood as a row loss: two outcomes of every aligned group.

G aligned groups, S scalar rows, C rows of a chunk, V vocabulary. P teacher, Q student.

A group of one token on each side takes one row of logits of each. Tokens before the last of a group
are scalar rows, as in the hybrid loss: their log-probabilities come first, and their gradients last
(uld/group_rows.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.kinds import check_factor
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS, RowLoss, Rows
from gold_kernels.jsd.row_loss import divergence_bound
from gold_kernels.likelihood import torch_rows
from gold_kernels.uld.group_rows import group_rows, log_scales, token_rows_of

VALUE_NAMES = (
    *(LOSS, CROSS_ENTROPY, "student_log_likelihood", "teacher_log_likelihood"),
    "slope",  # dloss / dlog-likelihood of the student
)
SLOPE = VALUE_NAMES.index("slope")


def end_rows_of(backend: str) -> Callable[..., None]:
    """end_rows_ of a backend."""
    if backend == "triton":
        from gold_kernels.likelihood.triton_rows import end_rows_  # triton may be missing

        return end_rows_
    return torch_rows.end_rows_


@dataclass(frozen=True)
class ChunkLikelihood(RowLoss):
    """JSD_beta of (p, 1 - p) and (q, 1 - q), p = exp(log-likelihood of a group / group_temperature)
    of the teacher and q of the student.
    """

    beta: float = 0.0
    group_temperature: float = 100.0
    temperature: tuple[float, float] = (1.0, 1.0)  # student, teacher
    student_scalars: Sequence[Tensor] | None = None  # rows, token ids, groups, (S_s,) int64 each
    teacher_scalars: Sequence[Tensor] | None = None  # rows, token ids, groups, (S_t,) int64 each
    ends: Sequence[Tensor] | None = None  # (G,), (G,) int64, the last token of a group

    name: ClassVar[str] = "chunk_likelihood"
    value_names: ClassVar[tuple[str, ...]] = VALUE_NAMES
    number_sizes: ClassVar[dict[str, int]] = {"temperature": 2}
    tensor_sizes: ClassVar[dict[str, int]] = {"student_scalars": 3, "teacher_scalars": 3, "ends": 2}
    is_shared: ClassVar[bool] = False

    def check(self, function: str) -> None:
        checks.check_beta(function, self.beta)
        checks.check_temperature(function, self.temperature)
        remedy = "1.0 compares the likelihoods themselves."
        check_factor(function, "group_temperature", self.group_temperature, remedy)

    def grad_bound(self) -> float:
        bound = divergence_bound(self.beta) / self.group_temperature
        return max(1.0, bound / self.temperature[0])

    def start(self, rows: Rows) -> RowFunction:
        scalars = self.student_scalars, self.teacher_scalars
        scales = log_scales(rows, scalars, self.temperature)
        paired = self._end_rows(rows, scales)
        return group_rows(rows, paired, scalars[0], rows.values[SLOPE], self.temperature[0])

    def _end_rows(self, rows: Rows, scales: list[Tensor] | None) -> Callable[..., None]:
        """The function of rows that predict the last token of a group, on both sides."""
        token_rows_, end_rows_ = token_rows_of(rows.backend), end_rows_of(rows.backend)
        assert self.ends is not None and rows.teacher is not None, "a call has its tokens"
        student_ids, teacher_ids = self.ends
        softcap = rows.teacher.softcap

        def row_function(
            student_logits: Tensor,
            teacher_logits: Tensor,
            grad_logits: Tensor | None,
            chunk: slice,
            weights: Tensor,
        ) -> None:
            values, ids = rows.values[:, chunk], teacher_ids[chunk]
            token_rows_(
                *(teacher_logits, None, ids, ids, weights.new_ones(weights.shape), values[2:4]),
                temperature=self.temperature[1],
                softcap=softcap,
            )
            log_p = -values[2]
            if scales is not None:
                log_p += scales[1][chunk]
            ids = student_ids[chunk]
            end_rows_(
                *(student_logits, grad_logits, ids),
                ids if rows.labels is None else rows.labels[chunk],
                weights,
                None if scales is None else scales[0][chunk],
                log_p,
                values,
                beta=self.beta,
                group_temperature=self.group_temperature,
                temperature=self.temperature[0],
                softcap=rows.softcap,
            )

        return row_function
