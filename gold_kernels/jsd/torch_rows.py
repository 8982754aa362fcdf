"""The row functions in plain torch: the CPU and MPS backend, and the kernels' second implementation
in tests.

C rows of a chunk, V vocabulary. Same signature, formulas and outputs as
jsd/triton_rows.py.
"""

import torch
from torch import Tensor

from gold_kernels.jsd.reference import LOG_ZERO, LOWEST_LOGIT, log_probs

MAX_LOG_RATIO = 80.0  # either p or q is then below 1e-34: see jsd/triton_rows.py
# Temporaries are about eight times this many float32 values (or one row, if a row is longer).
BLOCK_ELEMENTS = 1 << 15


def scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(tensor * scale).to(dtype), scale a () tensor; never tensor itself."""
    return (tensor * scale).to(dtype)


class _Rows:
    """Scaled logits of a few rows of both sides and what follows from their log-sum-exps."""

    def __init__(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        self.student = (student_logits / temperature).clamp_min_(LOWEST_LOGIT)  # (c, V)
        self.teacher = (teacher_logits / temperature).clamp_min_(LOWEST_LOGIT)
        self.log_q = self.student.log_softmax(-1).clamp_min_(LOG_ZERO)
        self.log_p = self.teacher.log_softmax(-1).clamp_min_(LOG_ZERO)
        self.q, self.p = self.log_q.exp(), self.log_p.exp()
        # Not log_p - log_q: near convergence the logits differ by less than log-probs' rounding.
        lse_gap = self.teacher.logsumexp(-1, keepdim=True)
        lse_gap -= self.student.logsumexp(-1, keepdim=True)
        self.ratio = (self.teacher - self.student).sub_(lse_gap).clamp_(LOG_ZERO, -LOG_ZERO)

    def forward_kl(self) -> Tensor:  # (c,)
        return (self.p * self.ratio + (self.q - self.p)).sum(-1)

    def reverse_kl(self) -> Tensor:  # (c,)
        return ((self.p - self.q) - self.q * self.ratio).sum(-1)

    def divergence(self, beta: float) -> tuple[Tensor, Tensor]:
        """(c,) loss and its (c, V) gradient with respect to logits / temperature."""
        if beta == 0:
            return self.forward_kl(), self.q - self.p
        if beta == 1:
            loss, pull = self.reverse_kl(), -self.ratio
        else:
            ratio = self.ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            # log1p keeps a small excess of the mixture over 1, log the small mixtures
            excess = beta * torch.expm1(ratio)
            mixture = beta * ratio.exp() + (1 - beta)
            log_mixture = torch.where(excess.abs() < 0.5, excess.log1p(), mixture.log_())
            per_entry = beta * self.p * (ratio - log_mixture) - (1 - beta) * self.q * log_mixture
            loss, pull = per_entry.sum(-1), log_mixture.mul_(beta - 1)
        return loss, self.q * (pull - (self.q * pull).sum(-1, keepdim=True))

    def metrics(self) -> Tensor:  # (5, c)
        is_student_top = self.student == self.student.amax(-1, keepdim=True)
        is_teacher_top = self.teacher == self.teacher.amax(-1, keepdim=True)
        agreement = (is_student_top & is_teacher_top).any(-1).to(self.q.dtype)
        student_entropy = -(self.q * self.log_q).sum(-1)
        teacher_entropy = -(self.p * self.log_p).sum(-1)
        return torch.stack(
            [student_entropy, teacher_entropy, self.forward_kl(), self.reverse_kl(), agreement]
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # (c,), (c, V)
    log_q = log_probs(logits, 1.0)
    is_label = (labels >= 0) & (labels < logits.shape[-1])
    index = torch.where(is_label, labels, 0).unsqueeze(-1)
    loss = -log_q.gather(-1, index).squeeze(-1)
    grad = log_q.exp().scatter_add_(-1, index, -torch.ones_like(log_q[:, :1]))
    return torch.where(is_label, loss, 0), torch.where(is_label.unsqueeze(-1), grad, 0)


def jsd_rows_(
    student_logits: Tensor,  # (C, V)
    teacher_logits: Tensor,  # (C, V)
    grad_logits: Tensor
    | None,  # (C, V), overwritten; may be student_logits; None computes no gradient
    row_weights: Tensor,  # (C,)
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (7, C), overwritten: loss, cross-entropy and the five metrics
    *,
    beta: float,
    temperature: float,
    weight_soft: float,
    weight_hard: float,
    softcap: float | None,
    has_metrics: bool,
) -> None:
    """Loss, metrics and gradient of every row of a chunk, a few rows at a time. softcap: the
    student's logits went through softcap tanh(x / softcap), the gradient is that of x.
    """
    num_rows, vocab_size = student_logits.shape
    step = max(1, BLOCK_ELEMENTS // vocab_size)
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        student = student_logits[rows].to(values.dtype)
        teacher = teacher_logits[rows].to(values.dtype)
        block = _Rows(student, teacher, temperature)
        is_live = row_weights[rows] != 0  # a row of weight 0 may hold anything, NaN included
        loss, grad = block.divergence(beta)
        values[0, rows] = torch.where(is_live, loss, 0)
        grad = grad.mul_(weight_soft / temperature)
        if labels is not None:
            hard_loss, hard_grad = _cross_entropy(student, labels[rows])
            values[1, rows] = torch.where(is_live, hard_loss, 0)
            grad = grad.add_(hard_grad, alpha=weight_hard)
        if has_metrics:
            values[2:, rows] = torch.where(is_live, block.metrics(), 0)
        if grad_logits is not None:
            grad = grad.mul_(row_weights[rows].unsqueeze(-1))
            if softcap is not None:
                slope = (student / softcap).square_().neg_().add_(1)
                grad = torch.where(student > LOWEST_LOGIT, grad * slope, 0)
            grad_logits[rows] = torch.where(is_live.unsqueeze(-1), grad, 0).to(grad_logits.dtype)
