"""Skew KL: the forward KL against a mixture with the teacher, whose gradient is bounded.

P teacher, Q student, M = alpha P + (1 - alpha) Q, r = log p - log q.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gold_kernels.engine.kinds import check_number
from gold_kernels.losses.formula import FormulaLoss
from gold_kernels.triton.launch import has_triton

MAX_LOG_RATIO = 80.0  # either p or q is then below 1e-34


@dataclass(frozen=True)
class SkewKL(FormulaLoss):
    """KL(P || alpha P + (1 - alpha) Q), the skew KL of DistiLLM (Ko et al. 2024, arXiv 2402.03898,
    section 3.1). alpha in (0, 1); towards 0 it is the forward KL, JSD(beta=0).
    """

    alpha: float = 0.1

    name: ClassVar[str] = "skew_kl"

    def check(self, function: str) -> None:
        super().check(function)
        check_number(function, "alpha", self.alpha)
        if not 0 < self.alpha < 1:
            raise ValueError(
                f"{function}: alpha must be in (0, 1), got {self.alpha}; 0.1 is DistiLLM's, and "
                "0 the forward KL: JSD(beta=0)."
            )

    def entries(self, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """f = p log(p / m) + (m - p), s = (1 - alpha) (q - p q / m).

        The sum of m - p is 0. With it no f is negative, and the rounding of both log-sum-exps has
        no effect of first order. Where q is near p it is taken from the ratio, not the difference.
        """
        q, p = log_q.exp(), log_p.exp()
        excess = (1 - self.alpha) * torch.expm1(-log_ratio.clamp_min(-MAX_LOG_RATIO))  # m / p - 1
        gap = torch.where(excess.abs() < 0.5, p * excess, (1 - self.alpha) * (q - p))  # m - p
        return gap - p * excess.log1p(), (1 - self.alpha) * q * excess / (1 + excess)


if has_triton():
    import triton
    import triton.language as tl

    from gold_kernels.triton.lines import expm1_of, log1p_of

    @triton.jit
    def _skew_kl_entries(log_q, log_p, log_ratio, alpha, _):
        q, p = tl.exp(log_q), tl.exp(log_p)
        excess = (1.0 - alpha) * expm1_of(-tl.maximum(log_ratio, -80.0))
        gap = tl.where(tl.abs(excess) < 0.5, p * excess, (1.0 - alpha) * (q - p))
        return gap - p * log1p_of(excess), (1.0 - alpha) * q * excess / (1.0 + excess)

    SkewKL.kernel_entries = _skew_kl_entries
