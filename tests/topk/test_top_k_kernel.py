"""fused_linear_top_k on kernels against the rows in torch, in float64, where the two differ most.

N rows, k entries a row, V vocabulary.
"""

import pytest
import torch

from gold_kernels import fused_linear_top_k
from gold_kernels.topk import row_loss
from support.backends import IMPLEMENTATIONS
from support.error_budget import relative_error
from support.jsd_cases import random_case

N, V, K = 12, 60, 5
FLOAT64 = 1e-14  # what -log q of a token with all but 1e-17 is off by in the rows in torch
DEVICES = [device for device, backend in IMPLEMENTATIONS if backend == "triton"]
pytestmark = pytest.mark.skipif(not DEVICES, reason="needs triton")


@pytest.fixture
def case():
    return random_case(n=N, v=V)


@pytest.fixture
def calls(monkeypatch):
    """Of the kernel's rows."""
    made, rows = [], row_loss.top_k_rows_
    monkeypatch.setattr(row_loss, "top_k_rows_", lambda *a, **kw: made.append(a) or rows(*a, **kw))
    return made


def targets_of(case):
    logits = case.teacher_hidden.double() @ case.teacher_weight.double().T
    log_probs, ids = logits.log_softmax(-1).topk(K, -1)
    return ids, log_probs


def padded(ids, log_probs):
    """Some rows have no entry at the end, at the beginning, one in the middle, or none at all."""
    ids = ids.clone()
    ids[1, 3:], ids[2, :2], ids[4, :2], ids[4, 3:], ids[5], ids[8] = -1, -1, -1, -1, -1, -1
    return ids, torch.where(ids >= 0, log_probs, torch.nan)


def run(case, targets, device, dtype, backend, **options):
    hidden, weight = (t.detach().to(device, dtype).requires_grad_() for t in case[:2])
    leaves = [hidden, weight]
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.linspace(0, 1, N).to(device, wide)
    if "student_bias" in options:
        options["student_bias"] = options["student_bias"].to(device, dtype)
    for name in ("labels", "label_weights"):
        if name in options:
            options[name] = options[name].to(device)
    if "label_weights" in options:
        options["label_weights"] = options["label_weights"].to(wide)
    given = targets[0].to(device), targets[1].to(device, wide), weights
    loss, metrics = fused_linear_top_k(
        hidden, weight, *given, backend=backend, chunk_size=5, return_metrics=True, **options
    )
    rows = [v for v in metrics.values() if v is not None]
    return [loss, *torch.autograd.grad(loss, leaves), *rows]


def assert_equal(case, targets, limit=3e-6, dtype=torch.float32, **options):
    truth = run(case, targets, "cpu", torch.float64, "torch", **options)
    for device in DEVICES:
        ours = run(case, targets, device, dtype, "triton", **options)
        for one, other in zip(ours, truth, strict=True):
            if float((one.detach().cpu() - other).abs().max()) > FLOAT64:
                assert relative_error(one.cpu(), other) < limit


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_entries_padding_and_labels(beta, has_labels, is_padded, case, calls):
    targets = targets_of(case)
    targets = padded(*targets) if is_padded else targets
    options = {"beta": beta}
    if has_labels:  # some of them entries, one no token, one of weight 0
        labels = torch.arange(N)
        labels[::2] = targets_of(case)[0][::2, 1]
        labels[3], labels[5] = -100, 0
        weights = torch.full((N,), 0.3)
        weights[6] = 0
        options |= {"labels": labels, "label_weights": weights}
    assert_equal(case, targets, **options)
    assert calls, "precondition: the kernel's rows ran"


def test_a_temperature_a_softcap_and_a_scale(case, calls):
    assert_equal(case, targets_of(case), temperature=1.7, beta=0.3)
    options = {"final_logit_softcapping": 1.5, "logit_scale": 0.8}
    labels = {"labels": torch.arange(N), "label_weights": torch.full((N,), 0.2)}
    assert_equal(case, targets_of(case), **options, **labels)
    before = len(calls)
    assert_equal(case, targets_of(case), temperature=1.7, **labels)
    assert len(calls) == before, "two temperatures of one row of logits"


def test_entries_that_the_students_bias_masks(case, calls):
    ids, log_probs = targets_of(case)
    bias = torch.zeros(V)
    bias[ids[3]], bias[ids[7, 0]] = -torch.inf, -torch.inf
    assert_equal(case, (ids, log_probs), student_bias=bias, beta=1.0, limit=1e-5)
    assert calls


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_rest_that_the_student_masks_has_no_slope(beta, has_labels, case, calls):
    """The teacher has some of it, which moved the entries at beta = 0."""
    ids = torch.arange(K).repeat(N, 1)
    log_probs = torch.linspace(-4, -1.8, N * K).view(N, K)
    assert float(log_probs.exp().sum(1).max()) < 0.9
    bias = torch.full((V,), -torch.inf)
    bias[:K] = 0
    options = {"labels": torch.arange(N) % K} if has_labels else {}
    assert_equal(case, (ids, log_probs), student_bias=bias, beta=beta, limit=1e-5, **options)
    assert calls


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("gap", [18.0, 40.0])
def test_near_certainty_entries_and_rest_keep_their_digits(gap, has_labels, calls):
    """The likeliest token has all but exp(-gap), and is an entry, a label, or another."""
    weight = torch.eye(V)[:, :8].contiguous()
    hidden = torch.zeros(N, 8)
    hidden[:, 0] = gap
    hidden[:, 1:] = torch.linspace(0, 2, N * 7).view(N, 7)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]]).repeat(N // 3, 1)
    log_probs = torch.tensor([[-1e-6, -15.0], [-14.0, -2e-6], [-1.0, -2.0]]).repeat(N // 3, 1)
    case = random_case(n=N, v=V)._replace(student_hidden=hidden, student_weight=weight)
    options = {"labels": torch.zeros(N, dtype=torch.int64)} if has_labels else {}
    assert_equal(case, (ids, log_probs.double()), limit=1e-5, **options)
    assert calls


def test_rows_of_weight_zero_may_hold_anything_and_16_bits_are_near(case, calls):
    ids, log_probs = targets_of(case)
    clean = run(case, (ids, log_probs), DEVICES[0], torch.float32, "triton")
    hidden, log_probs = case.student_hidden.clone(), log_probs.clone()
    hidden[0], log_probs[0] = torch.nan, torch.nan  # whose weight is 0
    spoilt = case._replace(student_hidden=hidden)
    for one, other in zip(
        run(spoilt, (ids, log_probs), DEVICES[0], torch.float32, "triton"), clean, strict=True
    ):
        torch.testing.assert_close(one, other)
    targets = targets_of(case)
    assert_equal(case, targets, limit=2e-2, dtype=torch.bfloat16)
    fast = run(case, targets, DEVICES[0], torch.bfloat16, "triton", logits_dtype=torch.bfloat16)
    assert relative_error(fast[0].cpu(), clean[0].cpu()) < 2e-2
    assert calls
