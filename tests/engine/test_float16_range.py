"""Gradients of float16 inputs do not overflow, whatever scales them beside row weights."""

import pytest
import torch

from gold_kernels import VocabOverlap, fused_linear_jsd, fused_linear_uld
from gold_kernels.jsd import reference
from gold_kernels.uld import reference as reference_uld
from support.backends import on_every_backend
from support.error_budget import relative_error

OVERLAP = VocabOverlap(torch.arange(150), torch.arange(150), 200, 200)


def heads() -> list[torch.Tensor]:
    """Hidden states and weights of both sides, logits of standard deviation 4."""
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 16), (200, 16), (8, 16), (200, 16)
    return [torch.randn(*shape, generator=generator).half() for shape in shapes]


def gradients(function, dtype: torch.dtype, device: str = "cpu", **options) -> list[torch.Tensor]:
    tensors = [tensor.to(device, dtype) for tensor in heads()]
    leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
    return list(torch.autograd.grad(function(*tensors, **options), leaves))


@on_every_backend
@pytest.mark.parametrize(
    "options",
    [
        {"student_temperature": 0.05},
        {"beta": 0.0, "overlap": OVERLAP, "matched_weight": 20.0, "unmatched_weight": 1.0},
        {"beta": 1.0, "overlap": OVERLAP, "matched_weight": 5.0, "unmatched_weight": 1.0},
    ],
    ids=["temperature", "forward", "reverse"],
)
def test_uld_gradients_of_float16_are_finite_and_right(options, device, backend):
    truth = gradients(reference_uld.linear_uld, torch.float64, **options)
    actual = gradients(fused_linear_uld, torch.float16, device, backend=backend, **options)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < (1e-2 if backend == "torch" else 2e-2)


@on_every_backend
@pytest.mark.parametrize("options", [{"beta": 1.0}, {"beta": 0.0, "temperature": 0.1}])
def test_jsd_gradients_of_float16_are_finite_and_right(options, device, backend):
    def peaked(hidden, weight, teacher, teacher_weight, **rest):
        return function(hidden, weight, 3 * teacher, teacher_weight, **rest)

    function = reference.linear_jsd
    truth = gradients(peaked, torch.float64, **options)
    function = fused_linear_jsd
    actual = gradients(peaked, torch.float16, device, backend=backend, **options)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < 1e-2


@on_every_backend
@pytest.mark.parametrize("size", [1e-36, 1e-40, 0.0])
def test_tiny_row_weights_of_float16_make_no_nan_of_rows_of_weight_0(size, device, backend):
    """What scales them up would be inf, and 0 times it NaN."""
    weights = torch.full((8,), size, device=device)
    weights[3] = 0
    hidden, *_ = tensors = [tensor.to(device) for tensor in heads()]
    hidden.requires_grad_()
    loss = fused_linear_jsd(*tensors, weights, backend=backend)
    (grad,) = torch.autograd.grad(loss * 2.0**100, hidden)
    assert grad.isfinite().all()
    assert (size == 1e-36) == bool(grad.any())
