"""The loss of a teacher's top k as a row loss: in plain torch, and by the kernel of ULD's tokens.

C rows of a chunk, c rows of a block, k entries a row, V vocabulary. P teacher, Q student. With
s_j = q(id_j) and t_j = p(id_j) of the entries, s_0 and t_0 of all others, u_j = s_j dloss / ds_j:

    grad_v = u_j - q_v sum u  for an entry,  q_v (u_0 / s_0 - sum u)  for another

Near certainty one entry has all but 1e-6: s_0 is summed over the others, and the k + 1 outcomes are
compared in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunk_plan import Limits
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT, SMALLEST_REST
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS, RowLoss, Rows
from gold_kernels.engine.torch_rows import (
    BLOCK_ELEMENTS,
    Divergence,
    divergence_rows_,
    large_block,
    without_scratch,
)
from gold_kernels.jsd.row_loss import divergence_bound
from gold_kernels.topk.token_rows import ENTRY_BYTES, Terms, compare_outcomes, top_k_rows_
from gold_kernels.uld.group_rows import token_rows_of


@dataclass(frozen=True)
class TopK(RowLoss):
    """JSD_beta of k + 1 outcomes: each of the teacher's k entries, and any other."""

    beta: float = 0.0
    temperature: float = 1.0  # of the student
    targets: Sequence[Tensor] | None = None  # (N, k) int64 ids, (N, k) log-probabilities

    name: ClassVar[str] = "top_k"
    value_names: ClassVar[tuple[str, ...]] = (
        *(LOSS, CROSS_ENTROPY, "student_top_mass", "teacher_top_mass"),
    )
    tensor_sizes: ClassVar[dict[str, int]] = {"targets": 2}
    is_shared: ClassVar[bool] = False

    def check(self, function: str) -> None:
        checks.check_beta(function, self.beta)
        checks.check_one_temperature(function, self.temperature)

    def grad_bound(self) -> float:
        return max(1.0, divergence_bound(self.beta) / self.temperature)

    def limits(self, limits: Limits, v_student: int, v_teacher: int, rows: Rows) -> Limits:
        if self._has_kernel(rows, v_student):
            assert self.targets is not None, "a call has its teacher's entries"
            return limits._replace(row_bytes=ENTRY_BYTES * self.targets[0].shape[1])
        return without_scratch(limits)

    def _has_kernel(self, rows: Rows, vocab_size: int) -> bool:
        """One temperature, and entries that take little beside a row of logits."""
        assert self.targets is not None, "a call has its teacher's entries"
        is_one = rows.labels is None or self.temperature == 1
        return rows.backend == "triton" and is_one and 4 * self.targets[0].shape[1] <= vocab_size

    def start(self, rows: Rows) -> RowFunction:
        assert self.targets is not None, "a call has its teacher's entries"
        assert rows.student is not None, "it is a loss of heads"
        if self._has_kernel(rows, rows.student.vocab_size):
            return self._kernel_rows(rows)
        ids, log_probs = self.targets
        block = large_block(rows.limits, rows.values.dtype)
        is_cpu = rows.values.device.type == "cpu"  # small blocks stay in its caches

        def row_function(
            logits: Tensor, _: None, grad_logits: Tensor | None, chunk: slice, weights: Tensor
        ) -> None:
            # divergence_rows_ walks rows of both sides alike: the teacher's are 2 k columns
            entries = torch.cat([ids[chunk].to(log_probs.dtype), log_probs[chunk]], 1)
            divergence_rows_(
                self._divergence,
                *(logits, entries, grad_logits, weights),
                None if rows.labels is None else rows.labels[chunk],
                rows.values[:, chunk],
                temperature=self.temperature,
                softcap=rows.softcap,
                block_elements=min(block, BLOCK_ELEMENTS) if is_cpu else block,
            )

        return row_function

    def _kernel_rows(self, rows: Rows) -> RowFunction:
        assert self.targets is not None, "a call has its teacher's entries"
        ids, log_probs = self.targets
        token_rows_ = token_rows_of(rows.backend)

        def row_function(
            logits: Tensor, _: None, grad_logits: Tensor | None, chunk: slice, weights: Tensor
        ) -> None:
            labels = None if rows.labels is None else rows.labels[chunk]
            top_k_rows_(
                *(token_rows_, logits, grad_logits),
                Terms(ids[chunk], log_probs[chunk], weights, labels),
                rows.values[:, chunk],
                beta=self.beta,
                temperature=self.temperature,
                softcap=rows.softcap,
            )

        return row_function

    def _divergence(self, student: Tensor, entries: Tensor) -> Divergence:
        numbers, log_t = entries.chunk(2, 1)
        is_entry = numbers >= 0
        index = torch.where(is_entry, numbers, 0).long()
        q = (student / self.temperature).clamp_min_(LOWEST_LOGIT).log_softmax(-1)
        log_s = torch.where(is_entry, q.gather(1, index), LOG_ZERO)
        q = q.exp_()
        s = torch.where(is_entry, q.gather(1, index), 0)
        is_other = torch.ones_like(q).scatter_reduce_(
            1, index, (~is_entry).to(q.dtype), "amin", include_self=True
        )
        rest = (q * is_other).sum(1, keepdim=True).clamp_min(SMALLEST_REST)
        wide = torch.float32 if q.device.type == "mps" else torch.float64
        loss, pull, t = compare_outcomes(log_s.to(wide), rest, log_t, is_entry, self.beta)
        loss, pull, t = (part.to(q.dtype) for part in (loss, pull, t))
        total = pull.sum(1, keepdim=True)
        grad = is_other.mul_(pull[:, -1:] / rest).sub_(total).mul_(q)
        moves = torch.where(is_entry, pull[:, :-1], 0)
        masses = torch.stack([s.sum(1), t.sum(1)])
        return Divergence(loss, grad.scatter_add_(1, index, moves), masses)
