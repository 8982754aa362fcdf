"""The row functions in plain torch: the CPU and MPS backend, and the kernels' second implementation
in tests.

C rows of a chunk, V vocabulary. Same signature, formulas and outputs as jsd/triton_rows.py.
"""

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT, kl_entries
from gold_kernels.engine.slices import Slices, log_sum_exps_, row_max, row_sum
from gold_kernels.engine.torch_rows import BLOCK_ELEMENTS, Divergence, divergence_rows_

MAX_LOG_RATIO = 80.0  # either p or q is then below 1e-34: see jsd/triton_rows.py


class _Rows:
    """Scaled logits of a few rows of both sides and what follows from their log-sum-exps."""

    def __init__(
        self,
        student_logits: Tensor,  # (c, V), with slices the columns of this process
        teacher_logits: Tensor,
        temperatures: tuple[float, float],
        slices: Slices | None,
    ) -> None:
        self.slices = slices
        self.student = (student_logits / temperatures[0]).clamp_min_(LOWEST_LOGIT)  # (c, V)
        self.teacher = (teacher_logits / temperatures[1]).clamp_min_(LOWEST_LOGIT)
        student_lse, teacher_lse = log_sum_exps_([self.student, self.teacher], slices)
        if slices is None:
            self.log_q, self.log_p = self.student.log_softmax(-1), self.teacher.log_softmax(-1)
        else:
            self.log_q, self.log_p = self.student - student_lse, self.teacher - teacher_lse
        self.log_q.clamp_min_(LOG_ZERO)
        self.log_p.clamp_min_(LOG_ZERO)
        self.q, self.p = self.log_q.exp(), self.log_p.exp()
        # Not log_p - log_q: near convergence the logits differ by less than log-probs' rounding.
        lse_gap = teacher_lse - student_lse
        self.ratio = (self.teacher - self.student).sub_(lse_gap).clamp_(LOG_ZERO, -LOG_ZERO)

    def sum(self, entries: Tensor) -> Tensor:  # (c, V) -> (c, 1), over the whole vocabulary
        return row_sum(entries, self.slices)

    def forward_kl(self) -> Tensor:  # (c,)
        return self.sum(kl_entries(self.p, self.q, self.ratio)).squeeze(-1)

    def reverse_kl(self) -> Tensor:  # (c,)
        return self.sum(kl_entries(self.q, self.p, -self.ratio)).squeeze(-1)

    def divergence(self, beta: float) -> tuple[Tensor, Tensor]:
        """(c,) loss and its (c, V) gradient with respect to logits / temperature."""
        if beta == 0:
            # p log q has no slope where log q is the floor of a masked column
            is_floored = self.log_q <= LOG_ZERO
            masked = self.sum(torch.where(is_floored, self.p, 0))
            grad = self.q * (1 - masked) - self.p
            return self.forward_kl(), torch.where(is_floored, 0, grad)
        if beta == 1:
            return self.reverse_kl(), self._reverse_grad()
        loss, pull = self._mixture(beta)
        return loss, self.q * (pull - self.sum(self.q * pull))

    def _reverse_grad(self) -> Tensor:  # (c, V)
        """q (pull - sum q pull) with pull = log(q / p), columns that only the teacher masks apart:
        their pull of 1e6 in one sum with the others would cost float32 all the others.
        """
        is_floored = self.ratio <= LOG_ZERO
        floored = self.sum(torch.where(is_floored, self.q, 0)) * -LOG_ZERO
        rest = torch.where(is_floored, 0, self.q)
        pull = torch.where(is_floored, -LOG_ZERO * self.sum(rest), -self.ratio - floored)
        return self.q * (pull + self.sum(rest * self.ratio))

    def _mixture(self, beta: float) -> tuple[Tensor, Tensor]:
        """(c,) loss and (c, V) (1 - beta) log(q / m), from the side with the larger weight in m, so
        that neither end of beta cancels.
        """
        is_student = beta <= 0.5
        weight = beta if is_student else 1 - beta
        ratio = self.ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        base, other = (self.q, self.p) if is_student else (self.p, self.q)
        ratio = ratio if is_student else ratio.neg_()  # log(other / base)
        # log1p keeps a small excess of the mixture over the base, log the small mixtures
        excess = weight * torch.expm1(ratio)
        mixture = weight * ratio.exp() + (1 - weight)
        log_mixture = torch.where(excess.abs() < 0.5, excess.log1p(), mixture.log_())
        per_entry = weight * other * (ratio - log_mixture) - (1 - weight) * base * log_mixture
        if not is_student:  # log(m / p) -> log(m / q)
            log_mixture = log_mixture.sub_(ratio)
        return self.sum(per_entry).squeeze(-1), log_mixture.mul_(beta - 1)

    def metrics(self) -> Tensor:  # (5, c)
        is_student_top, is_teacher_top = map(self._is_top, (self.student, self.teacher))
        agreement = self.sum((is_student_top & is_teacher_top).to(self.q.dtype)).squeeze(-1) > 0
        student_entropy = -self.sum(self.q * self.log_q).squeeze(-1)
        teacher_entropy = -self.sum(self.p * self.log_p).squeeze(-1)
        agreement = agreement.to(self.q.dtype)
        return torch.stack(
            [student_entropy, teacher_entropy, self.forward_kl(), self.reverse_kl(), agreement]
        )

    def _is_top(self, side: Tensor) -> Tensor:  # (c, V)
        if self.slices is None:
            return side == side.amax(-1, keepdim=True)
        return side == row_max(side, self.slices, empty=-torch.inf)


def jsd_rows_(
    student_logits: Tensor,  # (C, V)
    teacher_logits: Tensor,  # (C, V)
    grad_logits: Tensor | None,  # (C, V), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, T): of the loss and, with labels, of the cross-entropy
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (7, C), overwritten: loss, cross-entropy and the five metrics
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
    has_metrics: bool,
    has_masks: bool,  # for the kernel, which saves sums
    slices: Slices | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> None:
    """Loss, metrics and gradient of every row of a chunk; see divergence_rows_."""

    def divergence(student: Tensor, teacher: Tensor) -> Divergence:
        block = _Rows(student, teacher, temperatures, slices)
        loss, grad = block.divergence(beta)
        return Divergence(loss, grad, block.metrics() if has_metrics else None)

    divergence_rows_(
        divergence,
        *(student_logits, teacher_logits, grad_logits, weights, labels, values),
        temperature=temperatures[0],
        softcap=softcap,
        block_elements=block_elements,
        slices=slices,
    )
