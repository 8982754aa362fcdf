"""Merged groups of the hybrid loss whose tokens a model is all but sure of: 1 - s in float32."""

import pytest
import torch
from error_budget import relative_error

from gold_kernels import TokenAlignment, VocabOverlap, fused_linear_uld, reference_uld
from gold_kernels.alignment import align_byte_spans

SIZE = 100
IDENTITY = torch.eye(SIZE, dtype=torch.float64)  # a head whose hidden states are the logits
OVERLAP = VocabOverlap(torch.arange(50), torch.arange(50), SIZE, SIZE)


def loss_and_gradient(function, dtype: torch.dtype, gap: float, **options):
    """Student a|b of entries gap above all others, beside a teacher's ab of 7 above all others."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(num_rows, SIZE, generator=generator, dtype=torch.float64) for num_rows in (2, 1)
    )
    student[[0, 1], [3, 5]] += gap
    teacher[0, 7] += 7.0
    groups = align_byte_spans(torch.tensor([1, 2]), torch.tensor([2]))
    alignment = TokenAlignment.from_groups(groups, torch.tensor([3, 5]), torch.tensor([7]), 2)
    hidden, head = student.to(dtype).requires_grad_(), IDENTITY.to(dtype)
    loss = function(
        *(hidden, head, teacher.to(dtype), head),
        alignment=alignment,
        overlap=OVERLAP,
        matched_weight=1.0,
        unmatched_weight=1.0,
        **options,
    )
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gap", [5.0, 15.0, 25.0, 30.0])
def test_a_span_that_rounds_to_probability_1_keeps_its_loss_and_its_gradient(beta, gap):
    """1 - s taken from a rounded s is 0, and dloss / dlog s divides by it: gradients of 1e8."""
    truth = loss_and_gradient(reference_uld.linear_uld, torch.float64, gap, beta=beta)
    actual = loss_and_gradient(fused_linear_uld, torch.float32, gap, beta=beta, backend="torch")
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours, expected) < 1e-5
