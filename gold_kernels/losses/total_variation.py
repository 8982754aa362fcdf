"""Total variation distance: half the sum of absolute differences.

P teacher, Q student, r = log p - log q.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gold_kernels.losses.formula import FormulaLoss
from gold_kernels.triton.launch import has_triton


@dataclass(frozen=True)
class TotalVariation(FormulaLoss):
    """sum_v |p_v - q_v| / 2, in [0, 1], the distance of f-DISTILL (Wen et al. 2023, arXiv
    2307.15190). Its gradient at p = q is taken as 0.
    """

    name: ClassVar[str] = "total_variation"

    def entries(self, log_q: Tensor, log_p: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """f = |q - p| / 2 from the larger of both, s = q sign(q - p) / 2."""
        q, p = log_q.exp(), log_p.exp()
        difference = q.maximum(p) * -(-log_ratio.abs()).expm1()
        return 0.5 * difference, -0.5 * q * log_ratio.sign()


if has_triton():
    import triton
    import triton.language as tl

    from gold_kernels.triton.lines import at_least, expm1_of

    @triton.jit
    def _total_variation_entries(log_q, log_p, log_ratio, _, __):
        q, p = tl.exp(log_q), tl.exp(log_p)
        sign = tl.where(log_ratio > 0.0, 1.0, tl.where(log_ratio < 0.0, -1.0, 0.0))
        return -0.5 * at_least(q, p) * expm1_of(-tl.abs(log_ratio)), -0.5 * q * sign

    TotalVariation.kernel_entries = _total_variation_entries
