"""Random heads and hidden states for the JSD tests, and the oracle's answer to them."""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels import fused_linear_jsd
from gold_kernels.jsd import reference

BETAS = (0.0, 1e-6, 0.1, 0.5, 0.9, 1.0)


class Case(NamedTuple):
    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V, D_s)
    teacher_hidden: Tensor  # (N, D_t)
    teacher_weight: Tensor  # (V, D_t)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        """Fresh leaves; the student's tensors require gradients."""
        tensors = [tensor.detach().to(device, dtype, copy=True) for tensor in self]
        return Case(tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:])


def random_case(n: int = 37, v: int = 201, d_s: int = 16, d_t: int = 24, seed: int = 0) -> Case:
    """Logits of standard deviation 1.5 on both sides, float32 values that bfloat16 holds
    exactly.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).bfloat16().float()

    return Case(
        normal(n, d_s, 1.0),
        normal(v, d_s, 1.5 * d_s**-0.5),
        normal(n, d_t, 1.0),
        normal(v, d_t, 1.5 * d_t**-0.5),
    )


def near_converged_case(n: int = 24, v: int = 501, d: int = 32, noise: float = 0.01) -> Case:
    """Teacher = student with 1 % noise on the weight: where a good distillation run ends up."""
    case = random_case(n, v, d, d)
    generator = torch.Generator().manual_seed(1)
    jitter = 1 + noise * torch.randn(v, d, generator=generator)
    return Case(
        case.student_hidden, case.student_weight, case.student_hidden, case.student_weight * jitter
    )


def run(function, case: Case, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, grad_hidden and grad_weight of a loss function on a case."""
    loss = function(*case, **options)
    return loss, *torch.autograd.grad(loss, case[:2])


def run_oracle(case: Case, **options) -> tuple[Tensor, Tensor, Tensor]:
    weights = options.pop("row_weights", None)
    weights = None if weights is None else weights.double()
    return run(reference.linear_jsd, case.to(torch.float64), row_weights=weights, **options)


def run_fused(case: Case, **options) -> tuple[Tensor, Tensor, Tensor]:
    return run(fused_linear_jsd, case, **options)
