"""fused_linear_top_k against the float64 oracle.

N rows, k entries a row, V vocabulary.
"""

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_top_k, peak_extra_bytes, reference
from support.backends import on_every_backend
from support.error_budget import relative_error
from support.jsd_cases import near_converged_case, random_case

N, V, K = 9, 60, 5


def targets_of(case, k=K):
    """The teacher's k likeliest entries; of the second row two alone."""
    logits = case.teacher_hidden.double() @ case.teacher_weight.double().T
    log_probs, ids = logits.log_softmax(-1).topk(k, -1)
    if k == K:
        ids[1, 2:], log_probs[1, 2:] = -1, float("nan")
    return ids, log_probs


def run(function, case, dtype, device="cpu", **options):
    ids, log_probs = targets_of(case)
    hidden, weight = (t.detach().to(device, dtype).requires_grad_() for t in case[:2])
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.linspace(0, 1, N).to(device, wide)
    targets = ids.to(device), log_probs.to(device, wide)
    loss = function(hidden, weight, *targets, weights, **options)
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def eager(hidden, weight, ids, log_probs, weights, *, labels=None, **options):
    logits = hidden @ weight.T
    loss = (weights * reference.top_k_rows(logits, ids, log_probs, **options)).sum()
    if labels is None:
        return loss
    return loss - reference.log_probs(logits, 1.0).gather(1, labels.unsqueeze(1)).mean()


@on_every_backend
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_the_oracles(beta, has_labels, device, backend):
    case, options = random_case(n=N, v=V), {"beta": beta, "temperature": 1.5}
    labels = torch.arange(N) if has_labels else None
    truth = run(eager, case, torch.float64, labels=labels, **options)
    if labels is not None:
        options["labels"] = labels.to(device)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        if backend == "triton" and dtype == torch.float64:
            continue
        chosen = {"backend": backend, "chunk_size": 4, **options}
        actual = run(fused_linear_top_k, case, dtype, device, **chosen)
        for ours, expected in zip(actual, truth, strict=True):
            assert relative_error(ours.cpu(), expected) < limit


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_entries_but_one_are_the_generalized_jsd(beta):
    case = random_case(n=N, v=V).to(torch.float64)
    targets = targets_of(case, V - 1)
    ours = fused_linear_top_k(*case[:2], *targets, beta=beta)
    plain = fused_linear_jsd(*case, beta=beta)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(*(torch.autograd.grad(x, case[:2]) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_the_teacher_loses_nothing(beta):
    case = random_case(n=N, v=V)
    same = case._replace(teacher_hidden=case.student_hidden, teacher_weight=case.student_weight)
    same = same.to(torch.float32)
    ids, log_probs = (t.detach() for t in targets_of(same))
    loss = fused_linear_top_k(*same[:2], ids, log_probs.float(), beta=beta)
    assert abs(float(loss.detach())) < 1e-9
    grads = torch.autograd.grad(loss, same[:2])
    assert all(float(grad.abs().max()) < 1e-6 for grad in grads)


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_near_convergence_the_loss_keeps_its_digits(beta, device, backend):
    case = near_converged_case()
    ids, log_probs = targets_of(case, 16)
    wide = case.to(torch.float64)
    logits = wide.student_hidden @ wide.student_weight.T
    truth = reference.top_k_rows(logits, ids, log_probs.detach(), beta=beta).mean()
    hidden, weight = case.to(torch.float32, device)[:2]
    targets = ids.to(device), log_probs.detach().float().to(device)
    ours = fused_linear_top_k(hidden, weight, *targets, beta=beta, backend=backend)
    assert relative_error(ours.cpu(), truth) < 1e-5
    grads = torch.autograd.grad(ours, (hidden, weight))
    for one, other in zip(grads, torch.autograd.grad(truth, wide[:2]), strict=True):
        assert relative_error(one.cpu(), other) < 5e-5


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("gap", [20.0, 12.0])
def test_near_certainty_the_rest_is_summed_and_not_subtracted(gap, beta):
    """The student's other entries have 1e-8 together, or 1e-5; 1 - q of float32 is 0, or next."""
    weight = torch.eye(4)
    hidden = torch.tensor([[gap, 1.0, 0.5, 0.0]])
    ids, log_probs = torch.tensor([[0]]), torch.tensor([[-1e-6]])
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = hidden.to(dtype).requires_grad_()
        loss = fused_linear_top_k(leaf, weight.to(dtype), ids, log_probs.to(dtype), beta=beta)
        found.append([loss, torch.autograd.grad(loss, leaf)[0]])
    for ours, truth in zip(*found, strict=True):
        assert relative_error(ours, truth) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("others", "log_probs"),
    [(-60.0, [-2.0, -1.5, -1.8]), (0.5, [-1.0, -1.0, -1.3297])],
    ids=["of the student", "of the teacher"],
)
def test_a_rest_below_its_floor_is_that_of_the_oracle(others, log_probs, beta):
    """The student's has no slope; the teacher's is nothing where rounding takes its sum above 1."""
    logits = torch.full((1, 9), others, dtype=torch.float64)
    logits[0, :3] = torch.arange(3)
    ids, log_probs = torch.tensor([[0, 1, 2]]), torch.tensor([log_probs], dtype=torch.float64)
    assert others < 0 or 1 < float(log_probs.exp().sum()) < 1.001
    results = []
    for function in (fused_linear_top_k, eager):
        leaf = logits.clone().requires_grad_()
        weights = torch.ones(1, dtype=torch.float64)
        loss = function(leaf, torch.eye(9).double(), ids, log_probs, weights, beta=beta)
        results.append([loss, torch.autograd.grad(loss, leaf)[0]])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


def test_gradcheck_in_float64():
    case = random_case(n=4, v=9, d_s=3, d_t=5).to(torch.float64)
    targets = [t.detach() for t in targets_of(case, 3)]
    assert torch.autograd.gradcheck(
        lambda *leaves: fused_linear_top_k(*leaves, *targets, beta=0.3, reduction="none"),
        case[:2],
    )


def test_rows_of_weight_zero_may_hold_anything_and_any_chunk_gives_the_same():
    case = random_case(n=N, v=V).to(torch.float32)
    ids, log_probs = targets_of(case)
    weights = torch.ones(N)
    weights[3] = 0
    results = []
    for is_poisoned, chunk_size in ((False, 1), (False, N), (True, 4)):
        hidden = case.student_hidden.detach().clone()
        if is_poisoned:
            hidden[3] = float("nan")
            ids[3] = 10**9  # no token
        leaves = hidden.requires_grad_(), case.student_weight.detach().requires_grad_()
        given = ids, log_probs.float(), weights
        loss = fused_linear_top_k(*leaves, *given, chunk_size=chunk_size)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for clean, *others in zip(*results, strict=True):
        for ours in others:
            torch.testing.assert_close(ours, clean, rtol=2e-5, atol=2e-6)


def test_masses_are_in_the_metrics_and_memory_is_in_the_budget():
    case = random_case(n=64, v=6000).to(torch.float32)
    ids, log_probs = (t.detach() for t in targets_of(case, 7))
    case.student_weight.requires_grad_(False)
    given, budget = (case.student_hidden, case.student_weight, ids, log_probs.float()), 400_000
    _, metrics = fused_linear_top_k(*given, return_metrics=True)
    q = (case.student_hidden @ case.student_weight.T).softmax(-1)
    torch.testing.assert_close(metrics["student_top_mass"], q.gather(1, ids).sum(1))
    torch.testing.assert_close(metrics["teacher_top_mass"], log_probs.float().exp().sum(1))
    room = 10 * 4 * 2**15  # temporaries of a block of rows

    def step():
        fused_linear_top_k(*given, budget_bytes=budget).backward()

    step()
    assert peak_extra_bytes(step) < budget + room < 4 * 2 * 64 * 6000


@pytest.mark.parametrize(
    ("ids", "log_probs", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), r"N=4 and k .* got \(3, 2\)"),
        (torch.zeros(4, 2), torch.zeros(4, 2), "float32 and .*; pad rows with fewer"),
        (torch.zeros(4, 0, dtype=torch.int64), torch.zeros(4, 0), r"got \(4, 0\)"),
        (torch.full((4, 1), 20), torch.zeros(4, 1), "teacher_ids must be below 20, .* got 20;"),
        (torch.zeros(4, 1).long().to("meta"), torch.zeros(4, 1), "teacher_ids must be on cpu like"),
    ],
)
def test_targets_that_do_not_fit_say_so(ids, log_probs, message):
    with pytest.raises(ValueError, match=f"^fused_linear_top_k: .*{message}"):
        fused_linear_top_k(torch.randn(4, 8), torch.randn(20, 8), ids, log_probs)


def test_logits_and_ids_that_come_twice_are_refused_where_a_row_counts():
    """Either gave another loss in silence."""
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    ids, log_probs = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 6, 5]]), torch.full((3, 3), -2.0)
    with pytest.raises(ValueError, match=r"must differ in a row, got 5 twice in row 2; pad rows"):
        fused_linear_top_k(hidden, weight, ids, log_probs)
    weights = torch.tensor([1.0, 1.0, 0.0])
    log_probs[2] = 200.0
    assert fused_linear_top_k(hidden, weight, ids, log_probs, weights).isfinite()
    ids[2, 2] = -1
    with pytest.raises(ValueError, match=r"at most, got inf from teacher_log_probs in row 2; take"):
        fused_linear_top_k(hidden, weight, ids, log_probs)
    logits = torch.tensor([[0.1, 0.2, 0.3]]).expand(3, 3)
    with pytest.raises(ValueError, match=r"at most, got 3\.676 .*take log_softmax over all"):
        fused_linear_top_k(hidden, weight, ids, logits)
    nearly = torch.tensor([[0.5, 0.5, -1.0]]).log().nan_to_num(nan=7.0) + 0.004  # as in bf16
    none = torch.tensor([[0, 1, -1]] * 3)
    assert fused_linear_top_k(hidden, weight, none, nearly.expand(3, 3)).isfinite()
