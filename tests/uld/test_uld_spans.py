"""Merged groups whose tokens a model is all but sure of, or finds impossible, in float32."""

import pytest
import torch

from gold_kernels import TokenAlignment, VocabOverlap, fused_linear_uld
from gold_kernels.tokens.alignment import align_byte_spans
from gold_kernels.uld import reference as reference_uld
from support.backends import on_every_backend
from support.error_budget import relative_error

SIZE = 100
IDENTITY = torch.eye(SIZE, dtype=torch.float64)  # a head whose hidden states are the logits
HYBRID = {
    "overlap": VocabOverlap(torch.arange(50), torch.arange(50), SIZE, SIZE),
    "matched_weight": 1.0,
    "unmatched_weight": 1.0,
}


def loss_and_gradient(function, dtype: torch.dtype, gap: float, device: str = "cpu", **options):
    """Student a|b of entries gap above all others, beside a teacher's ab of 7 above all others."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(num_rows, SIZE, generator=generator, dtype=torch.float64) for num_rows in (2, 1)
    )
    student[[0, 1], [3, 5]] += gap
    teacher[0, 7] += 7.0
    groups = align_byte_spans(torch.tensor([1, 2]), torch.tensor([2]))
    alignment = TokenAlignment.from_groups(groups, torch.tensor([3, 5]), torch.tensor([7]), 2)
    hidden, head = student.to(device, dtype).requires_grad_(), IDENTITY.to(device, dtype)
    tensors = hidden, head, teacher.to(device, dtype), head
    loss = function(*tensors, alignment=alignment, **options)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gap", [5.0, 15.0, 20.0, 25.0])  # at 30 float64 has 5e-5 of 1 - s
def test_a_span_that_rounds_to_probability_1_keeps_its_loss_and_its_gradient(
    beta, gap, device, backend
):
    """1 - s taken from a rounded s is 0, and dloss / dlog s divides by it: gradients of 1e8."""
    options = {**HYBRID, "beta": beta}
    truth = loss_and_gradient(reference_uld.linear_uld, torch.float64, gap, **options)
    options |= {"device": device, "backend": backend}
    actual = loss_and_gradient(fused_linear_uld, torch.float32, gap, **options)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < 1e-5


@on_every_backend
def test_a_group_that_the_student_finds_impossible_keeps_its_gradient(device, backend):
    """A clamp of the merged probability at 1e-8 would cut it off."""
    options = {**HYBRID, "beta": 0.0}
    truth = loss_and_gradient(reference_uld.linear_uld, torch.float64, -30.0, **options)
    options |= {"device": device, "backend": backend}
    actual = loss_and_gradient(fused_linear_uld, torch.float32, -30.0, **options)
    assert truth[1].norm() > 0.5, "forward KL must pull the group up"
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < 1e-4


@on_every_backend
@pytest.mark.parametrize("options", [{}, {**HYBRID, "beta": 0.5}])
def test_a_group_of_a_masked_token_has_probability_zero(options, device, backend):
    gap = -1e30  # as a mask of -inf, which a matrix product cannot hold
    truth, _ = loss_and_gradient(reference_uld.linear_uld, torch.float64, gap, **options)
    where = {"device": device, "backend": backend}
    loss, grad = loss_and_gradient(fused_linear_uld, torch.float32, gap, **where, **options)
    assert relative_error(loss.cpu(), truth) < 1e-3 and bool(grad.isfinite().all())
