"""The row functions in plain torch: the CPU and MPS backend, and the kernels' second implementation
in tests.

C rows of a chunk, V vocabulary. Same signature, formulas and outputs as
jsd/triton_rows.py.
"""

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOG_ZERO, LOWEST_LOGIT, kl_entries
from gold_kernels.engine.torch_rows import Divergence, divergence_rows_

MAX_LOG_RATIO = 80.0  # either p or q is then below 1e-34: see jsd/triton_rows.py


class _Rows:
    """Scaled logits of a few rows of both sides and what follows from their log-sum-exps."""

    def __init__(
        self, student_logits: Tensor, teacher_logits: Tensor, temperatures: tuple[float, float]
    ) -> None:
        self.student = (student_logits / temperatures[0]).clamp_min_(LOWEST_LOGIT)  # (c, V)
        self.teacher = (teacher_logits / temperatures[1]).clamp_min_(LOWEST_LOGIT)
        self.log_q = self.student.log_softmax(-1).clamp_min_(LOG_ZERO)
        self.log_p = self.teacher.log_softmax(-1).clamp_min_(LOG_ZERO)
        self.q, self.p = self.log_q.exp(), self.log_p.exp()
        # Not log_p - log_q: near convergence the logits differ by less than log-probs' rounding.
        lse_gap = self.teacher.logsumexp(-1, keepdim=True)
        lse_gap -= self.student.logsumexp(-1, keepdim=True)
        self.ratio = (self.teacher - self.student).sub_(lse_gap).clamp_(LOG_ZERO, -LOG_ZERO)

    def forward_kl(self) -> Tensor:  # (c,)
        return kl_entries(self.p, self.q, self.ratio).sum(-1)

    def reverse_kl(self) -> Tensor:  # (c,)
        return kl_entries(self.q, self.p, -self.ratio).sum(-1)

    def divergence(self, beta: float) -> tuple[Tensor, Tensor]:
        """(c,) loss and its (c, V) gradient with respect to logits / temperature."""
        if beta == 0:
            # p log q has no slope where log q is the floor of a masked column
            is_floored = self.log_q <= LOG_ZERO
            masked = torch.where(is_floored, self.p, 0).sum(-1, keepdim=True)
            grad = self.q * (1 - masked) - self.p
            return self.forward_kl(), torch.where(is_floored, 0, grad)
        if beta == 1:
            return self.reverse_kl(), self._reverse_grad()
        loss, pull = self._mixture(beta)
        return loss, self.q * (pull - (self.q * pull).sum(-1, keepdim=True))

    def _reverse_grad(self) -> Tensor:  # (c, V)
        """q (pull - sum q pull) with pull = log(q / p), columns that only the teacher masks apart:
        their pull of 1e6 in one sum with the others would cost float32 all the others.
        """
        is_floored = self.ratio <= LOG_ZERO
        floored = torch.where(is_floored, self.q, 0).sum(-1, keepdim=True) * -LOG_ZERO
        rest = torch.where(is_floored, 0, self.q)
        pull = torch.where(
            is_floored, -LOG_ZERO * rest.sum(-1, keepdim=True), -self.ratio - floored
        )
        return self.q * (pull + (rest * self.ratio).sum(-1, keepdim=True))

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
        return per_entry.sum(-1), log_mixture.mul_(beta - 1)

    def metrics(self) -> Tensor:  # (5, c)
        is_student_top = self.student == self.student.amax(-1, keepdim=True)
        is_teacher_top = self.teacher == self.teacher.amax(-1, keepdim=True)
        agreement = (is_student_top & is_teacher_top).any(-1).to(self.q.dtype)
        student_entropy = -(self.q * self.log_q).sum(-1)
        teacher_entropy = -(self.p * self.log_p).sum(-1)
        return torch.stack(
            [student_entropy, teacher_entropy, self.forward_kl(), self.reverse_kl(), agreement]
        )


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
) -> None:
    """Loss, metrics and gradient of every row of a chunk; see divergence_rows_."""

    def divergence(student: Tensor, teacher: Tensor) -> Divergence:
        block = _Rows(student, teacher, temperatures)
        loss, grad = block.divergence(beta)
        return Divergence(loss, grad, block.metrics() if has_metrics else None)

    divergence_rows_(
        divergence,
        *(student_logits, teacher_logits, grad_logits, weights, labels, values),
        temperature=temperatures[0],
        softcap=softcap,
    )
