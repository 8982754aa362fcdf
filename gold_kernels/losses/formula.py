"""A row loss from a formula of two log-probabilities.

C rows of a chunk, c rows of a block, V vocabulary. P teacher, Q student, T temperature of the
student.

    loss = sum_v f(log q_v, log p_v)
    grad = (s - q sum_v s_v) / T,   s_v = df / dlog q_v

A loss gives f and s. This file makes the probabilities, the gradient, blocks of rows that stay
within the memory budget, and, where the loss has its formula for Triton too, the kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunk_plan import Limits
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.options import PerSide, per_side
from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT
from gold_kernels.engine.row_loss import RowLoss, Rows
from gold_kernels.engine.slices import Slices, log_sum_exps_, row_sum
from gold_kernels.engine.torch_rows import (
    BLOCK_ELEMENTS,
    Divergence,
    divergence_rows_,
    large_block,
    without_scratch,
)


@dataclass(frozen=True)
class FormulaLoss(RowLoss):
    """Base of losses that are a formula. A subclass has numbers as fields, a name, and entries.

    temperature divides the logits of both sides, or is a pair (student, teacher).
    """

    temperature: PerSide = field(default=1.0, kw_only=True)

    number_sizes: ClassVar[dict[str, int]] = {"temperature": 2}
    takes_slices: ClassVar[bool] = True
    # entries as a function for Triton, of (log_q, log_p, log_ratio, first number, second number);
    # None: torch on every device. Numbers are those of the subclass, at most two.
    kernel_entries: ClassVar[Any] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "entries" in cls.__dict__ and "kernel_entries" not in cls.__dict__:
            cls.kernel_entries = None  # a parent's kernel has the parent's formula

    def entries(
        self,
        log_q: Tensor,  # (c, V)
        log_p: Tensor,  # (c, V)
        log_ratio: Tensor,  # (c, V) log p - log q
    ) -> tuple[Tensor, Tensor]:  # (c, V) f, (c, V) s
        """f and s of every entry.

        log_ratio comes from the difference of both logits: near convergence, where log p and
        log q agree in all digits that float32 has, it is still exact. Masked entries have log q or
        log p of -1e6, and a ratio in [-1e6, 1e6].
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define entries; see docs/add_a_loss.md."
        )

    def _checked_entries(self, *given: Tensor) -> tuple[Tensor, Tensor]:  # (c, V) each
        """Entries, whose gradient is made from log q afterwards."""
        versions = [None if part.is_inference() else part._version for part in given]
        found: Any = self.entries(*given)
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        parts = found if is_pair else [found]
        if not is_pair or any(getattr(part, "shape", None) != given[0].shape for part in parts):
            got = [tuple(getattr(part, "shape", ())) for part in parts]
            raise ValueError(
                f"{type(self).__name__}.entries: f and s of every entry are expected, two tensors "
                f"{tuple(given[0].shape)}, got {got}; return both before they are summed."
            )
        if versions != [None if part.is_inference() else part._version for part in given]:
            raise ValueError(
                f"{type(self).__name__}.entries: log q, log p and their difference must stay as "
                "they are, got one that was overwritten; write log_q.exp() in place of exp_()."
            )
        return parts[0], parts[1]

    def check(self, function: str) -> None:
        checks.check_temperature(function, self.temperature)

    def grad_bound(self) -> float:
        return max(1.0, 1.0 / per_side(self.temperature)[0])

    @property
    def backends(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the subclass
        return ("torch",) if self.kernel_entries is None else ("torch", "triton")

    def limits(self, limits: Limits, v_student: int, v_teacher: int, rows: Rows) -> Limits:
        if self._has_kernel(rows):
            return limits._replace(may_pack=True)
        return without_scratch(limits)

    def start(self, rows: Rows) -> RowFunction:
        run = self._kernel_rows(rows) if self._has_kernel(rows) else self._torch_rows(rows)

        def row_function(
            student_logits: Tensor,
            teacher_logits: Tensor,
            grad_logits: Tensor | None,
            chunk: slice,
            weights: Tensor,
        ) -> None:
            labels = None if rows.labels is None else rows.labels[chunk]
            values = rows.values[:, chunk]
            run(student_logits, teacher_logits, grad_logits, weights, labels, values)

        return row_function

    def _has_kernel(self, rows: Rows) -> bool:
        return rows.backend == "triton" and self.kernel_entries is not None

    def _kernel_rows(self, rows: Rows) -> Callable[..., None]:
        rows_: Callable[..., None]
        if rows.slices is None:
            from gold_kernels.triton.formula_rows import formula_rows_ as rows_  # may be missing
        else:
            from gold_kernels.triton.formula_slices import formula_slice_rows_

            rows_ = partial(formula_slice_rows_, slices=rows.slices)
        numbers = self.numbers()[2:]  # behind both temperatures
        assert len(numbers) <= 2, "formula_rows_kernel takes two numbers"
        first, second = (*numbers, 0.0, 0.0)[:2]

        def run(*tensors: Any) -> None:
            rows_(
                type(self).kernel_entries,
                *tensors,
                numbers=(first, second),
                temperatures=per_side(self.temperature),
                softcap=rows.softcap,
            )

        return run

    def _torch_rows(self, rows: Rows) -> Callable[..., None]:
        temperatures, slices = per_side(self.temperature), rows.slices
        block = large_block(rows.limits, rows.values.dtype)
        if rows.values.device.type == "cpu" and slices is None:  # small blocks stay in its caches
            block = min(block, BLOCK_ELEMENTS)

        def divergence(student: Tensor, teacher: Tensor) -> Divergence:
            log_q, log_p, log_ratio = _log_probs(student, teacher, temperatures, slices)
            per_entry, slope = self._checked_entries(log_q, log_p, log_ratio)
            loss, total = row_sum(per_entry, slices), row_sum(slope, slices)
            return Divergence(loss.squeeze(-1), slope - log_q.exp_().mul_(total))

        def run(*tensors: Any) -> None:
            divergence_rows_(
                divergence,
                *tensors,
                temperature=temperatures[0],
                softcap=rows.softcap,
                block_elements=block,
                slices=slices,
            )

        return run


def _log_probs(
    student: Tensor, teacher: Tensor, temperatures: tuple[float, float], slices: Slices | None
) -> tuple[Tensor, Tensor, Tensor]:  # (c, V) each
    """log q, log p and log p - log q."""
    student = (student / temperatures[0]).clamp_min_(LOWEST_LOGIT)
    teacher = (teacher / temperatures[1]).clamp_min_(LOWEST_LOGIT)
    student_lse, teacher_lse = log_sum_exps_([student, teacher], slices)
    log_ratio = (teacher - student).sub_(teacher_lse - student_lse).clamp_(LOG_ZERO, -LOG_ZERO)
    log_q, log_p = student.sub_(student_lse), teacher.sub_(teacher_lse)
    return log_q.clamp_min_(LOG_ZERO), log_p.clamp_min_(LOG_ZERO), log_ratio
