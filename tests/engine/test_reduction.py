"""reduction="none": a loss a row, which takes any upstream gradient, for every loss.

N rows, G groups. The truth is a scalar loss whose row weights are the upstream gradient.
"""

import math

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_uld, jsd_loss, peak_extra_bytes, uld_loss
from support.backends import on_every_backend
from support.error_budget import (
    assert_same_up_to_contraction,
    assert_within_error_budget,
    relative_error,
)
from support.jsd_cases import random_case
from support.uld_cases import KINDS, uld_case

UPSTREAM = torch.tensor([0.5, -2.0, 0.0, 3.0, 1e-3, 1.0, -0.25, 0.0, 7.0])  # (N,)
N = UPSTREAM.shape[0]


def leaves_of(case, has_frozen_head):
    case.student_weight.requires_grad_(not has_frozen_head)
    return [t for t in case if t.requires_grad]


@on_every_backend
@pytest.mark.parametrize("has_frozen_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_jsd_rows_take_any_upstream_gradient(dtype, has_frozen_head, device, backend):
    case = random_case(n=N, v=150)
    options = {"chunk_size": 4, "backend": backend, "beta": 0.3}
    single, whole = case.to(dtype, device), case.to(dtype, device)
    leaves, truths = leaves_of(single, has_frozen_head), leaves_of(whole, has_frozen_head)
    upstream = UPSTREAM.to(device)
    rows = fused_linear_jsd(*single, reduction="none", **options)
    _, metrics = fused_linear_jsd(*single, return_metrics=True, **options)
    assert rows.shape == (N,)
    assert_same_up_to_contraction(rows, metrics.loss)
    grads = torch.autograd.grad(rows, leaves, upstream)
    expected = torch.autograd.grad(fused_linear_jsd(*whole, upstream, **options), truths)
    double = case.to(torch.float64)
    oracle = torch.autograd.grad(
        fused_linear_jsd(*double, UPSTREAM.double(), beta=0.3), leaves_of(double, has_frozen_head)
    )
    for ours, scalar, truth in zip(grads, expected, oracle, strict=True):
        assert ours.dtype == dtype
        assert_within_error_budget(
            "grad", ours.cpu(), baseline=scalar.cpu(), oracle=truth, factor=1.5
        )


@pytest.mark.parametrize("has_frozen_head", [False, True])
def test_users_mask_clamp_weigh_and_average_rows(has_frozen_head):
    """As reinforcement-learning loops do; in float64 against full logits."""
    case = random_case(n=N, v=40).to(torch.float64)
    leaves = leaves_of(case, has_frozen_head)
    mask, weights = UPSTREAM.double() != 0, torch.rand(N, dtype=torch.float64)

    def reduced(rows):
        return (rows.clamp_max(0.5) * weights)[mask].mean()

    ours = reduced(fused_linear_jsd(*case, reduction="none", chunk_size=2))
    student = torch.log_softmax(case[0] @ case[1].T, -1)
    teacher = torch.log_softmax(case[2] @ case[3].T, -1)
    mixture = torch.log((student.exp() + teacher.exp()) / 2)
    rows = 0.5 * (teacher.exp() * (teacher - mixture) + student.exp() * (student - mixture)).sum(-1)
    truth = reduced(rows)
    torch.testing.assert_close(ours, truth)
    for actual, expected in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@on_every_backend
@pytest.mark.parametrize("has_frozen_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_uld_take_any_upstream_gradient(kind, has_frozen_head, device, backend):
    """Scalar rows move with the group that they are part of."""
    case = uld_case(kind, has_overlap=True)
    num_groups = case.tensors[4].shape[0]
    upstream = torch.linspace(-1.5, 2.0, num_groups).to(device)

    def gradients(is_per_row):
        tensors = [t.to(device, torch.float32) for t in case.tensors]
        weights = tensors.pop()
        for leaf in tensors[: 1 if has_frozen_head else 2]:
            leaf.requires_grad_()
        leaves = [t for t in tensors if t.requires_grad]
        options = {**case.options, "backend": backend, "chunk_size": 3}
        if is_per_row:
            rows = fused_linear_uld(*tensors, weights, reduction="none", **options)
            assert rows.shape == (num_groups,)
            return torch.autograd.grad(rows, leaves, upstream)
        return torch.autograd.grad(
            fused_linear_uld(*tensors, weights * upstream, **options), leaves
        )

    for ours, truth in zip(gradients(True), gradients(False), strict=True):
        assert relative_error(ours, truth) < 1e-5


def test_row_weights_and_labels_count_in_the_rows():
    case = random_case(n=N, v=40).to(torch.float64)
    weights = torch.rand(N, dtype=torch.float64)
    weights[3] = 0
    labels = torch.arange(N) * 4
    labels[5] = -1
    options = {"labels": labels, "label_weights": torch.rand(N, dtype=torch.float64)}
    rows = fused_linear_jsd(*case, weights, reduction="none", **options)
    whole, metrics = fused_linear_jsd(*case, weights, return_metrics=True, **options)
    torch.testing.assert_close(rows.sum(), whole)
    hard = torch.where(labels >= 0, options["label_weights"], 0) * metrics.cross_entropy
    torch.testing.assert_close(rows[3], hard[3])
    upstream = UPSTREAM.double()
    grads = torch.autograd.grad(rows, case[:2], upstream)
    options["label_weights"] = options["label_weights"] * upstream
    expected = torch.autograd.grad(fused_linear_jsd(*case, weights * upstream, **options), case[:2])
    for ours, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, truth)


@on_every_backend
@pytest.mark.parametrize("is_uld", [False, True])
def test_rows_of_logits_take_any_upstream_gradient(is_uld, device, backend):
    loss = uld_loss if is_uld else jsd_loss
    student, teacher = torch.randn(N, 60).to(device), torch.randn(N, 60).to(device)
    student.requires_grad_()
    upstream = UPSTREAM.to(device)
    rows = loss(student, teacher, reduction="none", backend=backend)
    (ours,) = torch.autograd.grad(rows, student, upstream)
    (truth,) = torch.autograd.grad(loss(student, teacher, upstream, backend=backend), student)
    assert rows.shape == (N,) and relative_error(ours, truth) < 1e-6
    in_place = (student * 1).contiguous()
    rows = loss(in_place, teacher, reduction="none", backend=backend, in_place=True)
    (again,) = torch.autograd.grad(rows, student, upstream)
    assert relative_error(again, truth) < 1e-6


@pytest.mark.parametrize("kind", ["frozen", "trained", "logits"])
def test_a_row_of_weight_zero_has_no_gradient_whatever_comes_from_above(kind):
    case = random_case(n=N, v=40).to(torch.float32)
    weights = torch.ones(N)
    weights[1] = 0
    if kind == "logits":
        student = torch.randn(N, 40, requires_grad=True)
        rows, leaf = jsd_loss(student, torch.randn(N, 40), weights, reduction="none"), student
    else:
        leaf = leaves_of(case, kind == "frozen")[0]
        rows = fused_linear_jsd(*case, weights, reduction="none")
    (grad,) = torch.autograd.grad(rows.sqrt().sum(), leaf)  # the slope of the root at 0 is inf
    assert torch.isfinite(grad).all() and not grad[1].any() and grad[0].any()


@pytest.mark.parametrize("has_frozen_head", [False, True])
def test_a_second_backward_gives_the_same_gradients(has_frozen_head):
    case = random_case(n=N, v=40).to(torch.float32)
    leaves = leaves_of(case, has_frozen_head)
    rows = fused_linear_jsd(*case, reduction="none", chunk_size=4)
    first = torch.autograd.grad(rows, leaves, UPSTREAM, retain_graph=True)
    second = torch.autograd.grad(rows, leaves, UPSTREAM)
    assert all(map(torch.equal, first, second))


def test_a_head_changed_between_forward_and_backward_is_an_error():
    case = random_case(n=N, v=40).to(torch.float32)
    rows = fused_linear_jsd(*case, reduction="none")
    with torch.no_grad():
        case.student_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


@pytest.mark.parametrize("has_frozen_head", [False, True])
def test_a_row_with_the_weight_of_its_label_alone_has_a_gradient(has_frozen_head):
    case = random_case(n=N, v=40).to(torch.float32)
    leaves, weights = leaves_of(case, has_frozen_head), torch.ones(N)
    weights[2] = 0
    options = {"labels": torch.arange(N), "label_weights": torch.ones(N)}
    rows = fused_linear_jsd(*case, weights, reduction="none", **options)
    total = fused_linear_jsd(*case, weights, **options)
    ours = torch.autograd.grad(rows.sum(), leaves)
    assert ours[0][2].any()
    for grad, expected in zip(ours, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("has_frozen_head", [False, True])
def test_the_peak_stays_within_the_budget(has_frozen_head):
    budget, n, v, d = 2 << 20, 600, 4096, 32
    case = random_case(n, v, d, d).to(torch.float32)
    leaves = leaves_of(case, has_frozen_head)
    upstream = torch.rand(n)

    def step():
        rows = fused_linear_jsd(*case, reduction="none", budget_bytes=budget)
        torch.autograd.grad(rows, leaves, upstream)

    returned = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    row_function = 18 * 4 * (1 << 15) + 64 * n
    assert peak_extra_bytes(step) <= budget + 2 * returned + row_function
    assert 2 * 4 * n * v > budget, "full logits must not fit the budget"


@pytest.mark.parametrize("from_logits", [False, True])
def test_backward_of_16_bit_inputs_makes_one_copy_in_float32(from_logits):
    n, v, d = 256, 1024, 32
    case = random_case(n, v, d, d).to(torch.bfloat16)
    if from_logits:
        (leaf, teacher), width = torch.randn(2, n, v, dtype=torch.bfloat16).unbind(), v
        rows = jsd_loss(leaf.requires_grad_(), teacher, reduction="none")
    else:
        (leaf,), width = leaves_of(case, has_frozen_head=True), d
        rows = fused_linear_jsd(*case, reduction="none")
    upstream = torch.rand(n)
    peak = peak_extra_bytes(lambda: torch.autograd.grad(rows, leaf, upstream))
    returned = 2 * n * width
    assert 4 * n * width <= peak <= 4 * n * width + returned + 64 * n, "as docs/memory.md has it"


def test_a_trained_head_costs_one_more_pass_of_the_logits_and_a_frozen_one_nothing(monkeypatch):
    from gold_kernels.engine.linear_head import LinearHead

    projected = []
    project = LinearHead.project_
    monkeypatch.setattr(
        LinearHead,
        "project_",
        lambda head, logits, rows: projected.append(rows) or project(head, logits, rows),
    )

    def num_projections(has_frozen_head, reduction):
        projected.clear()
        case = random_case(n=N, v=40).to(torch.float32)
        leaves = leaves_of(case, has_frozen_head)
        loss = fused_linear_jsd(*case, reduction=reduction, chunk_size=3)
        torch.autograd.grad(loss.sum(), leaves)
        return len(projected)

    assert num_projections(True, "none") == num_projections(True, "sum") == 6
    assert num_projections(False, "none") == 2 * num_projections(False, "sum") == 12


def test_labels_of_tokens_do_not_mix_with_losses_of_groups():
    case = uld_case("bayesian", has_labels=True)
    with pytest.raises(ValueError, match=r"a loss for each group, got labels too.*own with"):
        case.run(fused_linear_uld, torch.float32, reduction="none")


@on_every_backend
@pytest.mark.parametrize("weight", [math.inf, math.nan])
def test_the_weight_of_a_label_that_is_no_entry_may_be_anything(weight, device, backend):
    """inf times its cross-entropy of 0 made NaN of the loss."""
    heads = [tensor.to(device) for tensor in random_case(n=4, v=20).to(torch.float32)]
    labels = torch.tensor([3, -100, 20, 7], device=device)
    weights = torch.tensor([0.5, weight, weight, 0.25], device=device)
    usual = torch.where(weights.isfinite(), weights, 0)
    for reduction in ("sum", "none"):
        options = {"labels": labels, "backend": backend, "reduction": reduction}
        actual = fused_linear_jsd(*heads, label_weights=weights, **options)
        assert torch.equal(actual, fused_linear_jsd(*heads, label_weights=usual, **options))
