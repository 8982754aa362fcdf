"""Inputs of the JSD benchmark and their answer in float64.

N scored rows, R distinct ones among them, V vocabulary, D_s and D_t hidden sizes. The oracle is
computed on R rows and all V columns. These rows are then repeated until there are N: the mean over
them, and with it loss and gradients, stays what it was, so that each implementation is checked on
the chunks, panels and accumulators that are timed, at the price of R rows in float64.

Two pairs: a random one, and a near-converged one whose teacher is the student with 1 % of noise on
each weight (teacher hidden states are the student's, padded with zeros from D_s to D_t).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.jsd import reference

ORACLE_ROWS = 64
NOISE = 0.01


class Shape(NamedTuple):
    n: int
    v: int
    d_s: int
    d_t: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """A shape from NxVxD_sxD_t, such as 4096x151936x2048x4096."""
        sizes = text.split("x")
        if len(sizes) != 4 or not all(map(str.isdigit, sizes)) or int(sizes[3]) < int(sizes[2]):
            raise ValueError(
                f"Shape.parse: expected NxVxD_sxD_t with D_t >= D_s, got {text}; "
                "write for instance 4096x151936x2048x4096"
            )
        return cls(*map(int, sizes))


class Case(NamedTuple):
    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V, D_s)
    teacher_hidden: Tensor  # (N, D_t)
    teacher_weight: Tensor  # (V, D_t)

    def leaves(self) -> list[Tensor]:
        """What gradients are asked for: student_hidden, and student_weight unless it is frozen."""
        return [tensor for tensor in self if tensor.requires_grad]


class Pair(NamedTuple):
    """A case of N rows that repeat R, and the oracle's answer to the R rows."""

    case: Case
    loss: float
    grad_hidden: Tensor  # (R, D_s), of the mean over R rows
    grad_weight: Tensor | None  # (V, D_s), None where the head is frozen


class Errors(NamedTuple):
    """Relative errors ||actual - oracle|| / ||oracle||."""

    loss: float
    grad_hidden: float
    grad_weight: float | None


def random_case(
    shape: Shape, generator: torch.Generator, dtype: torch.dtype, *, is_frozen: bool
) -> Case:
    """Logits of standard deviation 1 on both sides."""

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=generator.device)
        return values.mul_(scale).to(dtype)

    n, v, d_s, d_t = shape
    return Case(
        normal(n, d_s, 1.0).requires_grad_(),
        normal(v, d_s, d_s**-0.5).requires_grad_(not is_frozen),
        normal(n, d_t, 1.0),
        normal(v, d_t, d_t**-0.5),
    )


def near_converged_case(case: Case, generator: torch.Generator) -> Case:
    """A teacher close to the student, of the same shapes; D_t must be at least D_s."""
    hidden, weight = case.student_hidden.detach(), case.student_weight.detach()
    teacher_hidden = torch.zeros_like(case.teacher_hidden)
    teacher_weight = torch.zeros_like(case.teacher_weight)
    d_s = hidden.shape[1]
    noise = torch.randn(weight.shape, generator=generator, device=weight.device)
    teacher_hidden[:, :d_s] = hidden
    teacher_weight[:, :d_s] = weight * noise.mul_(NOISE).add_(1)
    return case._replace(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)


def _with_oracle(case: Case, beta: float) -> Pair:
    """The pair whose rows repeat the first R of the case."""
    num_rows = case.student_hidden.shape[0]
    rows = math.gcd(num_rows, ORACLE_ROWS)
    exact = [tensor.detach().double() for tensor in case]
    exact[0], exact[2] = exact[0][:rows], exact[2][:rows]
    for wide, tensor in zip(exact, case, strict=True):
        wide.requires_grad_(tensor.requires_grad)
    loss = reference.linear_jsd(*exact, beta=beta)
    # float32 holds an answer to 6e-8 and half the memory
    grads = [grad.float() for grad in torch.autograd.grad(loss, Case(*exact).leaves())]
    copies = num_rows // rows
    repeated = case._replace(
        student_hidden=case.student_hidden.detach()[:rows].repeat(copies, 1).requires_grad_(),
        teacher_hidden=case.teacher_hidden[:rows].repeat(copies, 1),
    )
    return Pair(repeated, loss.item(), grads[0], grads[1] if len(grads) > 1 else None)


def random_and_near_converged(
    case: Case, beta: float, generator: torch.Generator
) -> tuple[Pair, Pair]:
    """Both pairs from the student of a case."""
    return _with_oracle(case, beta), _with_oracle(near_converged_case(case, generator), beta)


def errors(pair: Pair, loss_function: Callable[[], Tensor]) -> Errors:
    """Errors of a function that returns the mean loss over the rows of pair.case."""
    loss = loss_function()
    grads = torch.autograd.grad(loss, pair.case.leaves())
    # (copies, R, D_s): the mean over N rows gives each copy its share
    copies = pair.case.student_hidden.shape[0] // pair.grad_hidden.shape[0]
    hidden = grads[0].double().unflatten(0, (copies, -1)) * copies
    return Errors(
        abs(loss.item() - pair.loss) / abs(pair.loss),
        _relative_error(hidden, pair.grad_hidden.expand_as(hidden)),
        None if pair.grad_weight is None else _relative_error(grads[1], pair.grad_weight),
    )


def _relative_error(actual: Tensor, oracle: Tensor) -> float:
    return ((actual.double() - oracle).norm() / oracle.double().norm()).item()
