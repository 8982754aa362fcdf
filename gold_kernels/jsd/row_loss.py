"""The generalized JSD as a row loss.

C rows of a chunk, V vocabulary. P teacher, Q student, M = beta P + (1 - beta) Q.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunk_plan import Limits
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.options import PerSide, per_side
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS, RowLoss, Rows
from gold_kernels.engine.torch_rows import large_block, without_scratch
from gold_kernels.jsd import torch_rows

# An entry of the reverse KL's gradient has no bound, but a log-ratio of 64 takes a teacher's
# probability of 1e-28 where the student is sure.
REVERSE_KL_BOUND = 64.0


def divergence_bound(beta: float) -> float:
    """What an entry of the gradient is held to, beside its row weight."""
    return REVERSE_KL_BOUND if beta == 1 else 1.0


@dataclass(frozen=True)
class JSD(RowLoss):
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, as in GKD (Agarwal et al.
    2023, arXiv 2306.13649, section 2); beta = 0 means KL(P || Q), beta = 1 means KL(Q || P).

    temperature divides the logits of both sides, or is a pair (student, teacher).
    """

    beta: float = 0.5
    temperature: PerSide = 1.0

    name: ClassVar[str] = "jsd"
    value_names: ClassVar[tuple[str, ...]] = (
        *(LOSS, CROSS_ENTROPY, "student_entropy", "teacher_entropy"),
        *("forward_kl", "reverse_kl", "top1_agreement"),
    )
    number_sizes: ClassVar[dict[str, int]] = {"temperature": 2}
    takes_slices: ClassVar[bool] = True

    def check(self, function: str) -> None:
        checks.check_beta(function, self.beta)
        checks.check_temperature(function, self.temperature)

    def grad_bound(self) -> float:
        return max(1.0, divergence_bound(self.beta) / per_side(self.temperature)[0])

    def limits(self, limits: Limits, v_student: int, v_teacher: int, rows: Rows) -> Limits:
        if rows.slices is not None:
            return without_scratch(limits) if rows.backend == "torch" else limits
        return limits._replace(may_pack=True)

    def start(self, rows: Rows) -> RowFunction:
        jsd_rows_: Callable[..., None]
        if rows.slices is not None and rows.backend == "triton":
            from gold_kernels.jsd.triton_slices import jsd_slice_rows_  # triton may be missing

            jsd_rows_ = partial(jsd_slice_rows_, slices=rows.slices)
        elif rows.slices is not None:
            block = large_block(rows.limits, rows.values.dtype)
            jsd_rows_ = partial(torch_rows.jsd_rows_, slices=rows.slices, block_elements=block)
        elif rows.backend == "triton":
            from gold_kernels.jsd.triton_rows import jsd_rows_  # triton may be missing
        else:
            jsd_rows_ = torch_rows.jsd_rows_
        temperatures = per_side(self.temperature)

        def row_function(
            student_logits: Tensor,
            teacher_logits: Tensor,
            grad_logits: Tensor | None,
            chunk: slice,
            weights: Tensor,
        ) -> None:
            jsd_rows_(
                student_logits,
                teacher_logits,
                grad_logits,
                weights,
                None if rows.labels is None else rows.labels[chunk],
                rows.values[:, chunk],
                beta=self.beta,
                temperatures=temperatures,
                softcap=rows.softcap,
                has_metrics=rows.has_metrics,
                has_masks=rows.has_masks,
            )

        return row_function
