"""Forward and reverse KL in two passes over a row: how often logits are read, and what is written.

N rows, V vocabulary.
"""

import pytest
import torch

from gold_kernels import fused_linear_jsd
from gold_kernels.jsd import reference, torch_rows
from support.backends import on_every_backend
from support.error_budget import assert_same_up_to_contraction, relative_error
from support.jsd_cases import random_case, run_fused


@pytest.mark.parametrize(("beta", "num_passes"), [(0.0, 1), (1.0, 1), (0.5, 2), (0.3, 2)])
def test_kl_divergences_are_read_once_after_the_log_sum_exps(beta, num_passes, monkeypatch):
    triton_rows = pytest.importorskip("gold_kernels.jsd.triton_rows")
    load_pair, calls = triton_rows.load_pair, []

    def counted(*arguments, **named):
        calls.append(1)
        return load_pair(*arguments, **named)

    monkeypatch.setattr(triton_rows, "load_pair", counted)
    case = random_case(n=5).to(torch.float32)  # a row is one block
    run_fused(case, beta=beta, backend="triton")
    assert len(calls) == 5 * num_passes


@on_every_backend
def test_an_offset_of_all_logits_costs_the_reverse_kl_no_digits(device, backend):
    """Its gradient hangs on a mean over differences of logits, near convergence far below them."""
    jsd_rows_ = torch_rows.jsd_rows_
    if backend == "triton":
        jsd_rows_ = pytest.importorskip("gold_kernels.jsd.triton_rows").jsd_rows_
    generator = torch.Generator().manual_seed(0)
    # multiples of 2**-10, exact in float32 above 4096 too
    teacher = (1024 * torch.randn(9, 501, generator=generator)).round() / 1024
    noise = (10 * torch.randn(9, 501, generator=generator)).round() / 1024
    student = (teacher + noise + 4096).to(device)
    grad, values = torch.empty_like(student), torch.zeros(7, 9, device=device)
    options = {"beta": 1.0, "temperatures": (1.0, 1.0), "softcap": None, "has_metrics": False}
    weights = torch.ones(9, 1, device=device)
    jsd_rows_(student, teacher.to(device), grad, weights, None, values, has_masks=False, **options)
    leaf = student.cpu().double().requires_grad_()
    reference.jsd_rows(leaf, teacher.double(), beta=1.0).sum().backward()
    assert relative_error(grad.cpu(), leaf.grad) < 1e-4


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("has_labels", [False, True])
def test_metrics_and_labels_do_not_change_the_gradient(has_labels, beta, device, backend):
    case = random_case().to(torch.float32, device)
    labels = torch.arange(37, device=device) if has_labels else None
    options = {"beta": beta, "backend": backend, "labels": labels}
    plain = run_fused(case, **options)
    loss, _ = fused_linear_jsd(*case, **options, return_metrics=True)
    with_metrics = (loss, *torch.autograd.grad(loss, case[:2]))
    for one, other in zip(plain, with_metrics, strict=True):
        assert_same_up_to_contraction(one, other)
