"""Inputs of the ULD benchmark, and how far ours is from float64 on them.

N pairs of rows, R distinct ones among them, V_s and V_t vocabularies, D_s and D_t hidden sizes. As
in jsd_pairs.py the R rows are repeated until there are N, so that the chunks and accumulators that
are timed are the ones that are checked, at the price of R rows in float64.

Two checks. Of the row kernel: uld_loss on the logits that it sees, R rows rounded to its dtype,
against the oracle on these very logits. Of the call that is timed: loss and gradients of
fused_linear_uld from bfloat16 inputs, against float64 of the whole.
"""

import math
from typing import Any, NamedTuple

import torch
from jsd_pairs import Case, near_converged_case
from torch import Tensor

from gold_kernels import VocabOverlap, fused_linear_uld, uld_loss
from gold_kernels.uld import reference as reference_uld

ORACLE_ROWS = 8
NUM_TOP = 64
PEAKED_DEVIATION = 5.0
MATCHED_SHARE = 0.6
HYBRID = {"beta": 0.5, "matched_weight": 0.5, "unmatched_weight": 0.5}


class Shape(NamedTuple):
    n: int
    v_s: int
    v_t: int
    d_s: int
    d_t: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """A shape from NxV_sxV_txD_sxD_t, such as 4096x65536x151936x2048x4096."""
        sizes = text.split("x")
        is_shape = len(sizes) == 5 and all(size.isdigit() and int(size) > 0 for size in sizes)
        # the near-converged teacher of equal vocabularies is the student, padded with zeros
        if not is_shape or (sizes[1] == sizes[2] and int(sizes[4]) < int(sizes[3])):
            raise ValueError(
                "Shape.parse: expected NxV_sxV_txD_sxD_t, with D_t >= D_s where V_s = V_t, "
                f"got {text}; write for instance 4096x65536x151936x2048x4096"
            )
        return cls(*map(int, sizes))


class Pair(NamedTuple):
    """A case of N rows that repeat R, and the logits of the R rows in float64."""

    case: Case
    student_logits: Tensor  # (R, V_s)
    teacher_logits: Tensor  # (R, V_t)


class Errors(NamedTuple):
    """Relative errors ||actual - oracle|| / ||oracle||, but top64."""

    loss: float  # of uld_loss, over R loss rows
    grad: float  # to the student's logits
    top64: float  # share of rows whose 64 largest student entries all have the oracle's sign
    fused_loss: float  # of fused_linear_uld, against float64 of the whole
    fused_grad_hidden: float
    fused_grad_weight: float


def random_case(shape: Shape, generator: torch.Generator) -> Case:
    """bfloat16, a trainable student head, logits of standard deviation 1 on both sides."""

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=generator.device)
        return values.mul_(scale).bfloat16()

    n, v_s, v_t, d_s, d_t = shape
    return Case(
        normal(n, d_s, 1.0).requires_grad_(),
        normal(v_s, d_s, d_s**-0.5).requires_grad_(),
        normal(n, d_t, 1.0),
        normal(v_t, d_t, d_t**-0.5),
    )


def random_overlap(shape: Shape, generator: torch.Generator) -> VocabOverlap:
    """MATCHED_SHARE of the smaller vocabulary, each entry with a random one of the other."""
    num_matched = int(MATCHED_SHARE * min(shape.v_s, shape.v_t))
    student_ids, teacher_ids = (
        torch.randperm(size, generator=generator, device=generator.device)[:num_matched]
        for size in (shape.v_s, shape.v_t)
    )
    student_ids, order = student_ids.sort()
    return VocabOverlap(student_ids, teacher_ids[order], shape.v_s, shape.v_t)


def with_logits(case: Case) -> Pair:
    """The pair whose rows repeat the first R of the case."""
    num_rows = case.student_hidden.shape[0]
    rows = math.gcd(num_rows, ORACLE_ROWS)
    student, weight, teacher, teacher_weight = (tensor.detach() for tensor in case)
    student, teacher = student[:rows], teacher[:rows]
    copies = num_rows // rows
    repeated = case._replace(
        student_hidden=student.repeat(copies, 1).requires_grad_(),
        teacher_hidden=teacher.repeat(copies, 1),
    )
    return Pair(
        repeated,
        student.double() @ weight.double().T,
        teacher.double() @ teacher_weight.double().T,
    )


def peaked_case(case: Case) -> Case:
    """Logits of standard deviation PEAKED_DEVIATION: as in trained models, a few entries have most
    of the probability, and most entries are far below 1 / V."""
    student_hidden, teacher_hidden = (
        hidden.detach() * PEAKED_DEVIATION for hidden in (case.student_hidden, case.teacher_hidden)
    )
    return case._replace(student_hidden=student_hidden, teacher_hidden=teacher_hidden)


def make_pairs(case: Case, generator: torch.Generator) -> dict[str, Pair]:
    """Pairs by the prefix of their columns: random, peaked and, where V_s = V_t, near-converged."""
    pairs = {"": with_logits(case), "peaked_": with_logits(peaked_case(case))}
    if case.student_weight.shape[0] == case.teacher_weight.shape[0]:
        pairs["near_"] = with_logits(near_converged_case(case, generator))
    return pairs


def loss_options(overlap: VocabOverlap | None) -> dict[str, Any]:
    return {} if overlap is None else {"overlap": overlap, **HYBRID}


def oracle(
    student_logits: Tensor,  # (R, V_s), float64
    teacher_logits: Tensor,  # (R, V_t), float64
    overlap: VocabOverlap | None,
) -> tuple[Tensor, Tensor]:  # (R,) loss rows, (R, V_s) gradient of their mean
    student_logits = student_logits.detach().requires_grad_()
    if overlap is None:
        loss_rows = reference_uld.uld_rows(student_logits, teacher_logits)
    else:
        log_q, log_p = (
            reference_uld.scaled_log_probs(logits, None, 1.0)
            for logits in (student_logits, teacher_logits)
        )
        loss_rows = reference_uld.hybrid_rows(log_q, log_p, overlap, **HYBRID)
    (grad,) = torch.autograd.grad(loss_rows.mean(), student_logits)
    return loss_rows.detach(), grad


def errors(pair: Pair, logits_dtype: torch.dtype | None, overlap: VocabOverlap | None) -> Errors:
    """Errors of the row kernel, and of the fused call at all N rows."""
    return Errors(
        *_kernel_errors(pair, logits_dtype or torch.float32, overlap),
        *_fused_errors(pair, logits_dtype, overlap),
    )


def _kernel_errors(
    pair: Pair, dtype: torch.dtype, overlap: VocabOverlap | None
) -> tuple[float, float, float]:
    student = pair.student_logits.to(dtype).requires_grad_()
    teacher = pair.teacher_logits.to(dtype)
    loss, metrics = uld_loss(student, teacher, return_metrics=True, **loss_options(overlap))
    (grad,) = torch.autograd.grad(loss, student)
    exact_rows, exact_grad = oracle(student.double(), teacher.double(), overlap)
    top = student.detach().topk(min(NUM_TOP, student.shape[1])).indices
    signs, exact_signs = (side.gather(1, top).sign().double() for side in (grad, exact_grad))
    return (
        _relative_error(metrics.loss, exact_rows),
        _relative_error(grad, exact_grad),
        (signs == exact_signs).all(-1).double().mean().item(),
    )


def _fused_errors(
    pair: Pair, logits_dtype: torch.dtype | None, overlap: VocabOverlap | None
) -> tuple[float, float, float]:
    loss = fused_linear_uld(*pair.case, logits_dtype=logits_dtype, **loss_options(overlap))
    return call_errors(pair, loss, overlap)


def call_errors(
    pair: Pair, loss: Tensor, overlap: VocabOverlap | None = None
) -> tuple[float, float, float]:
    """Errors of a loss that was computed from the pair's inputs, and of its two gradients."""
    case = pair.case
    grad_hidden, grad_weight = torch.autograd.grad(loss, case.leaves())
    exact_rows, exact_grad = oracle(pair.student_logits, pair.teacher_logits, overlap)
    rows = exact_grad.shape[0]
    # (copies, R, D_s): the mean over N rows gives each copy its share
    copies = case.student_hidden.shape[0] // rows
    grad_hidden = grad_hidden.double().unflatten(0, (copies, rows)) * copies
    exact_hidden = exact_grad @ case.student_weight.detach().double()
    exact_weight = exact_grad.T @ case.student_hidden.detach()[:rows].double()
    return (
        _relative_error(loss, exact_rows.mean()),
        _relative_error(grad_hidden, exact_hidden.expand_as(grad_hidden)),
        _relative_error(grad_weight, exact_weight),
    )


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.detach().double() - exact).norm() / exact.norm()).item()
