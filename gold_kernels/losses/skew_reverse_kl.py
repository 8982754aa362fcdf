"""Skew reverse KL: the reverse KL against a mixture with the student, whose loss is bounded.

P teacher, Q student, M = alpha Q + (1 - alpha) P, r = log p - log q.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gold_kernels.engine.kinds import check_number
from gold_kernels.losses.formula import FormulaLoss
from gold_kernels.triton.launch import has_triton

MAX_LOG_RATIO = 80.0  # either p or q is then below 1e-34


@dataclass(frozen=True)
class SkewReverseKL(FormulaLoss):
    """KL(Q || alpha Q + (1 - alpha) P), the skew reverse KL of DistiLLM (Ko et al. 2024, arXiv
    2402.03898, section 3.1). alpha in (0, 1); towards 0 it is the reverse KL, JSD(beta=1).
    """

    alpha: float = 0.1

    name: ClassVar[str] = "skew_reverse_kl"

    def check(self, function: str) -> None:
        super().check(function)
        check_number(function, "alpha", self.alpha)
        if not 0 < self.alpha < 1:
            raise ValueError(
                f"{function}: alpha must be in (0, 1), got {self.alpha}; 0.1 is DistiLLM's, and "
                "0 the reverse KL: JSD(beta=1)."
            )

    def grad_bound(self) -> float:
        """log(q / m) is at most -log(alpha)."""
        return super().grad_bound() * (1.0 - math.log(self.alpha))

    def entries(self, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """f = q log(q / m) + (m - q), s = q log(q / m) + alpha q (1 - q / m).

        The sum of m - q is 0. With it no f is negative, and the rounding of both log-sum-exps has
        no effect of first order. Where p is near q it is taken from the ratio, not the difference.
        """
        q, p = log_q.exp(), log_p.exp()
        excess = (1 - self.alpha) * torch.expm1(log_ratio.clamp_max(MAX_LOG_RATIO))  # m / q - 1
        gap = torch.where(excess.abs() < 0.5, q * excess, (1 - self.alpha) * (p - q))  # m - q
        pull = -q * excess.log1p()
        return gap + pull, pull + self.alpha * q * excess / (1 + excess)


if has_triton():
    import triton
    import triton.language as tl

    from gold_kernels.triton.lines import expm1_of, log1p_of

    @triton.jit
    def _skew_reverse_kl_entries(log_q, log_p, log_ratio, alpha, _):
        q, p = tl.exp(log_q), tl.exp(log_p)
        excess = (1.0 - alpha) * expm1_of(tl.minimum(log_ratio, 80.0))
        gap = tl.where(tl.abs(excess) < 0.5, q * excess, (1.0 - alpha) * (p - q))
        pull = -q * log1p_of(excess)
        return gap + pull, pull + alpha * q * excess / (1.0 + excess)

    SkewReverseKL.kernel_entries = _skew_reverse_kl_entries
