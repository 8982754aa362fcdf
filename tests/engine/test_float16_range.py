"""Gradients of float16 inputs do not overflow, whatever scales them beside row weights."""

import pytest
import torch

from gold_kernels import (
    VocabOverlap,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_loss,
    fused_linear_mean_kl,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
    head_means,
)
from gold_kernels.jsd import reference
from gold_kernels.losses import SkewReverseKL, TotalVariation
from gold_kernels.uld import reference as reference_uld
from support.backends import on_every_backend
from support.error_budget import relative_error
from support.same_tokens import same_projection, same_tokens

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


def top_k(hidden, weight, *_, **options):
    """A teacher who finds unlikely what the student finds likely."""
    ids = (hidden.float() @ weight.float().T).topk(5, -1).indices
    log_probs = torch.full(ids.shape, -40.0)
    return fused_linear_top_k(hidden, weight, ids, log_probs, beta=1.0, **options)


def likelihood(*tensors, **options):
    alignment = same_tokens(torch.arange(len(tensors[0])))
    options |= {"group_temperature": 0.5, "beta": 1.0}
    return fused_linear_chunk_likelihood(*tensors, alignment, **options)


def projected(*tensors, **options):
    return fused_linear_projected_jsd(*tensors, same_projection(200), beta=1.0, **options)


def skewed(*tensors, temperature, **options):
    return fused_linear_loss(SkewReverseKL(1e-6, temperature=temperature), *tensors, **options)


def varied(hidden, *tensors, temperature, **options):
    """A student who is not sure at this temperature."""
    row_loss = TotalVariation(temperature=temperature / 8)
    return fused_linear_loss(row_loss, hidden / 256, *tensors, **options)


@pytest.mark.parametrize("loss", [top_k, likelihood, projected, skewed, varied])
def test_low_temperatures_leave_gradients_of_float16_finite_in_every_loss(loss):
    """An entry may be far above its row weight, and float16 ends at 65504."""
    options = {"temperature": 0.02, "backend": "torch"}
    truth = gradients(loss, torch.float32, **options)
    actual = gradients(loss, torch.float16, **options)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours, expected) < 1e-2


def test_a_low_temperature_leaves_gradients_of_float16_finite_where_the_head_is_frozen():
    hidden, weight, teacher, _ = heads()
    grads = []
    for dtype in (torch.float32, torch.float16):
        own, head = hidden.to(dtype).requires_grad_(), weight.to(dtype)
        means = head_means(teacher.to(dtype), head, head)
        loss = fused_linear_mean_kl(own, head, means, temperature=0.02, backend="torch")
        grads += torch.autograd.grad(loss, own)
    assert relative_error(grads[1], grads[0]) < 1e-2


@on_every_backend
def test_row_weights_of_float16_may_be_negative_and_rows_may_be_none(device, backend):
    """The largest by size says how far gradients are scaled up; of no rows there is none."""
    weights = torch.full((8,), 1e-6, device=device)
    weights[0] = -1000.0
    for rows, own in ((8, weights), (0, weights[:0])):
        hidden, weight, teacher, teacher_weight = (t.to(device) for t in heads())
        leaves = hidden[:rows].requires_grad_(), weight.requires_grad_()
        loss = fused_linear_jsd(*leaves, teacher[:rows], teacher_weight, own, backend=backend)
        grads = torch.autograd.grad(loss, leaves)
        assert all(grad.isfinite().all() and bool(grad.any()) == (rows > 0) for grad in grads)
