"""Logits far from 0: differences of both sides' logits had lost what is after their point.

A teacher that is certain (a label with a logit of 1e8), a student that is, and offsets of all
logits of a side, which a softmax does not see. N = 4 rows, V = 50.
"""

import math

import pytest
import torch

from gold_kernels import fused_linear_loss, jsd_loss, reference
from gold_kernels.engine.probabilities import log_probs
from gold_kernels.losses import JSD, SkewKL, SkewReverseKL, TotalVariation
from support.backends import IMPLEMENTATIONS
from support.error_budget import relative_error

V = 50
LOSSES = {
    **{f"jsd {beta}": JSD(beta) for beta in (0.0, 0.1, 0.5, 1.0)},
    **{loss.name: loss for loss in (SkewKL(0.5), SkewReverseKL(0.5), TotalVariation())},
}
KINDS = ("teacher", "student", "teacher below", "both")
# the total variation's gradient has a sign, which is rounding's where rounded logits are equal
CASES = [(n, k) for n in LOSSES for k in KINDS if (n, k) != ("total_variation", "both")]
DEVICES = [device for device, backend in IMPLEMENTATIONS if backend == "torch"]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def far(kind, size):
    """Student and teacher logits; of "both" all are offsets of the same size."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(4, V, generator=generator) for _ in range(2))
    if kind == "teacher":
        teacher[:, 7] = size
    elif kind == "student":
        student[:, 7] = size
    elif kind == "teacher below":
        teacher -= size
    else:
        student, teacher = student + size, teacher + size
    return student, teacher


def oracle(name, loss, student, teacher):
    if name.startswith("jsd"):
        return reference.jsd_rows(student, teacher, beta=loss.beta)
    log_q, log_p = log_probs(student, 1.0), log_probs(teacher, 1.0)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    if name == "skew_kl":
        return (log_p.exp() * (log_p - log_m)).sum(-1)
    if name == "skew_reverse_kl":
        return (log_q.exp() * (log_q - log_m)).sum(-1)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


@on_every_device
@pytest.mark.parametrize("size", [2.0**19, 1e8, 1e20])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_values_and_gradients_are_those_of_the_definition(name, kind, size, device):
    """The head is the identity, so that logits are what they are."""
    if name in ("jsd 0.0", "jsd 1.0") and kind in ("teacher", "student"):
        size = 2.0**19  # beyond 1e6 nats a divergence is that of its floor, which has no slope
    loss, (student, teacher) = LOSSES[name], far(kind, size)
    exact = student.double().requires_grad_()
    rows = oracle(name, loss, exact, teacher.double())
    truth = rows.sum().detach(), torch.autograd.grad(rows.sum(), exact)[0]
    leaf = student.to(device).requires_grad_()
    eye = torch.eye(V, device=device)
    options = {"reduction": "none", "backend": "torch"}
    value = fused_linear_loss(loss, leaf, eye, teacher.to(device), eye, **options).sum()
    (grad,) = torch.autograd.grad(value, leaf)
    assert abs(float(value.detach()) - float(truth[0])) < 1e-5 * float(truth[0]) + 1e-6
    assert (grad.cpu() - truth[1]).norm() < 1e-5 * truth[1].norm() + 1e-6


@on_every_device
def test_metrics_of_far_logits_are_those_of_the_definition(device):
    student, teacher = far("teacher below", 1e8)
    sides = student.to(device), teacher.to(device)
    _, metrics = jsd_loss(*sides, return_metrics=True, backend="torch")
    for name, truth in reference.row_metrics(student.double(), teacher.double()).items():
        assert relative_error(getattr(metrics, name).cpu(), truth) < 1e-5


@pytest.mark.parametrize("size", [1000.0, 1030.0, 1e4])
def test_near_convergence_an_offset_of_both_sides_costs_no_digit(size):
    """Around where logits begin to count as far: 2**10."""
    student = torch.randn(4, V).mul(4).half().float() + size
    teacher = student + torch.randn(4, V).sign() * 2**-9  # exact, as all of these logits are
    truth = reference.jsd_rows(student.double(), teacher.double(), beta=0.5).mean()
    assert relative_error(jsd_loss(student, teacher, backend="torch"), truth) < 1e-3
