"""The projected JSD as a row loss.

G aligned groups or pairs of rows, S scalar rows, C rows of a chunk, V vocabulary (V_s, V_t), K
entries of the teacher that are reached. P teacher, Q student.

The row that predicts the first token of a group is compared with the teacher's, whose context has
the same bytes. The later tokens of a group are scalar rows, as in the hybrid loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunk_plan import Limits
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS, RowLoss, Rows
from gold_kernels.engine.torch_rows import SCRATCH_PART
from gold_kernels.jsd.row_loss import divergence_bound
from gold_kernels.projection import torch_rows
from gold_kernels.tokens.projection import Folds
from gold_kernels.uld.group_rows import group_rows, log_scales

VALUE_NAMES = (
    *(LOSS, CROSS_ENTROPY, "student_projected_mass", "teacher_projected_mass"),
    "slope",  # dloss / dlog-likelihood of a group, the student's
    "pull",  # of the kernel
)
SLOPE = VALUE_NAMES.index("slope")


def row_functions(backend: str) -> Any:
    """The module with projected_rows_, and with how many bytes it takes: a row, and altogether."""
    if backend == "triton":
        from gold_kernels.projection import triton_rows  # triton may be missing

        return triton_rows
    return torch_rows


@dataclass(frozen=True)
class ProjectedJSD(RowLoss):
    """JSD_beta of P and Q W on the K entries that are reached, and in groups of several tokens that
    of two outcomes: the bytes of the group follow, or something else does.
    """

    beta: float = 0.0
    temperature: tuple[float, float] = (1.0, 1.0)  # student, teacher
    student_scalars: Sequence[Tensor] | None = None  # rows, token ids, groups, (S_s,) int64 each
    teacher_scalars: Sequence[Tensor] | None = None  # rows, token ids, groups, (S_t,) int64 each
    folds: Sequence[Tensor] | None = None  # Folds.tensors
    spans: Sequence[Tensor] | None = None  # (G,), (G,) int64, first tokens of merged groups, or -1

    name: ClassVar[str] = "projected_jsd"
    value_names: ClassVar[tuple[str, ...]] = VALUE_NAMES
    number_sizes: ClassVar[dict[str, int]] = {"temperature": 2}
    tensor_sizes: ClassVar[dict[str, int]] = {
        "student_scalars": 3,
        "teacher_scalars": 3,
        "folds": 7,
        "spans": 2,
    }
    is_shared: ClassVar[bool] = False

    def check(self, function: str) -> None:
        checks.check_beta(function, self.beta)
        checks.check_temperature(function, self.temperature)

    def grad_bound(self) -> float:
        return max(1.0, 2 * divergence_bound(self.beta) / self.temperature[0])

    def limits(self, limits: Limits, v_student: int, v_teacher: int, rows: Rows) -> Limits:
        logits_dtype = limits.dtype_of_logits(rows.values)
        assert self.folds is not None, "a call has its projection"
        folds, functions = Folds.from_tensors(self.folds), row_functions(rows.backend)
        scratch = functions.rows_at_a_time(folds, limits.budget_bytes // SCRATCH_PART)[1]
        return limits._replace(
            budget_bytes=max(1, limits.budget_bytes - scratch),
            row_bytes=functions.row_bytes(v_student, v_teacher, logits_dtype),
        )

    def start(self, rows: Rows) -> RowFunction:
        scalars = self.student_scalars, self.teacher_scalars
        scales = log_scales(rows, scalars, self.temperature)
        paired = self._first_rows(rows, scales)
        return group_rows(rows, paired, scalars[0], rows.values[SLOPE], self.temperature[0])

    def _first_rows(self, rows: Rows, scales: list[Tensor] | None) -> Callable[..., None]:
        """The function of rows that predict the first token of a group."""
        projected_rows_ = row_functions(rows.backend).projected_rows_
        assert self.folds is not None, "a call has its projection"
        folds = Folds.from_tensors(self.folds)

        def row_function(
            student_logits: Tensor,
            teacher_logits: Tensor,
            grad_logits: Tensor | None,
            chunk: slice,
            weights: Tensor,
        ) -> None:
            projected_rows_(
                *(student_logits, teacher_logits, grad_logits, weights, folds),
                None if self.spans is None else [side[chunk] for side in self.spans],
                None if scales is None else [side[chunk] for side in scales],
                None if rows.labels is None else rows.labels[chunk],
                rows.values[:, chunk],
                beta=self.beta,
                temperatures=self.temperature,
                softcap=rows.softcap,
                scratch_bytes=rows.limits.budget_bytes // SCRATCH_PART,
            )

        return row_function
