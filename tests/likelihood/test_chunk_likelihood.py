"""fused_linear_chunk_likelihood against the float64 oracle, on every backend.

N scored rows, G groups, V vocabulary (V_s, V_t).
"""

import math

import pytest
import torch

from gold_kernels import (
    TokenAlignment,
    fused_linear_chunk_likelihood,
    fused_linear_uld,
    peak_extra_bytes,
    reference,
)
from gold_kernels.likelihood.torch_rows import two_outcomes
from gold_kernels.tokens.alignment import SpanGroups
from support.backends import on_every_backend
from support.error_budget import relative_error
from support.same_tokens import same_tokens
from support.uld_cases import uld_case

CASE = uld_case("bayesian", has_labels=True)
ALIGNMENT = CASE.options["alignment"]
TEMPERATURE = (1.25, 0.75)


def oracle(beta, tau, has_labels=True):
    def eager(hidden, weight, teacher, teacher_weight, row_weights, student_bias, **_):
        logits = hidden @ weight.T + student_bias
        loss = reference.chunk_likelihood(
            *(logits, teacher @ teacher_weight.T, ALIGNMENT, row_weights),
            beta=beta,
            group_temperature=tau,
            temperature=TEMPERATURE,
        )
        return loss + has_labels * CASE.hard_loss(logits)

    return CASE.run(eager, torch.float64)


def fused(dtype, device="cpu", beta=0.0, tau=100.0, has_labels=True, **options):
    def function(*tensors, student_bias, labels, label_weights, alignment, **_):
        hard = {"labels": labels, "label_weights": label_weights} if has_labels else {}
        return fused_linear_chunk_likelihood(
            *(*tensors[:4], alignment, tensors[4]),
            beta=beta,
            group_temperature=tau,
            temperature=TEMPERATURE,
            student_bias=student_bias,
            **hard,
            **options,
        )

    return CASE.run(function, dtype, device)


@on_every_backend
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("tau", [1.0, 100.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_the_oracles(beta, tau, has_labels, device, backend):
    truth = oracle(beta, tau, has_labels)
    dtype = torch.float64 if backend == "torch" else torch.float32
    actual = fused(dtype, device, beta, tau, has_labels, backend=backend, chunk_size=3)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < (1e-12 if backend == "torch" else 2e-6)


@pytest.mark.parametrize(
    ("log_s", "log_t", "expected"), [(-1e-13, -3e-13, 2.0), (-60.0, -61.0, 1 - math.exp(-1))]
)
def test_the_slope_keeps_its_digits_at_both_ends(log_s, log_t, expected):
    """(s - t) / (1 - s), in the second case relative to s."""
    sides = (torch.tensor([side], dtype=torch.float64) for side in (log_s, log_t))
    slope = float(two_outcomes(*sides, 0.0)[1]) / (math.exp(log_s) if log_s < -1 else 1)
    assert slope == pytest.approx(expected, rel=1e-9)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_lose_what_their_gemms_lose(dtype, device, backend):
    actual, truth = fused(dtype, device, backend=backend), oracle(0.0, 100.0)
    assert actual[0].dtype == torch.float32
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < 4 * torch.finfo(dtype).eps + 1e-3


@on_every_backend
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 10, 11, None])
def test_the_chunk_size_does_not_change_anything(chunk_size, device, backend):
    actual = fused(torch.float32, device, backend=backend, chunk_size=chunk_size)
    whole = fused(torch.float32, device, backend=backend, chunk_size=3)
    for ours, truth in zip(actual, whole, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-6)


def one_to_one(num_rows, v, seed=0):
    """A completion in the tokens of one tokenizer on both sides."""
    ids = torch.randint(v, (num_rows,), generator=torch.Generator().manual_seed(seed))
    return same_tokens(ids)


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_identical_models_with_one_tokenizer_lose_nothing(beta, device, backend):
    hidden = torch.randn(7, 16, device=device)
    weight = torch.randn(50, 16, device=device)
    for tau in (1.0, 100.0):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fused_linear_chunk_likelihood(
            *(*leaves, hidden, weight, one_to_one(7, 50)),
            beta=beta,
            group_temperature=tau,
            backend=backend,
        )
        assert abs(float(loss.detach())) < 1e-12
        assert all(not grad.any() for grad in torch.autograd.grad(loss, leaves))


@on_every_backend
@pytest.mark.parametrize("sharpness", [1.0, 12.0])
def test_near_convergence_and_near_certainty_the_slope_is_right(sharpness, device, backend):
    """Where both are sure, 1 - q is 1e-6: of a float32 q nothing of it would be left."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 16, generator=generator)
    alignment = one_to_one(9, 40)
    hidden = sharpness / 4 * weight[alignment.student_base_ids]
    teacher = hidden + 1e-2 * torch.randn(9, 16, generator=generator)
    truths = [t.double() for t in (hidden, weight, teacher)]
    truths[0].requires_grad_()
    loss = reference.chunk_likelihood(
        truths[0] @ truths[1].T, truths[2] @ truths[1].T, alignment, beta=0.0
    )
    (expected,) = torch.autograd.grad(loss, truths[0])
    tensors = [t.to(device) for t in (hidden, weight, teacher)]
    leaf = tensors[0].requires_grad_()
    ours = fused_linear_chunk_likelihood(leaf, *tensors[1:], tensors[1], alignment, backend=backend)
    (grad,) = torch.autograd.grad(ours, leaf)
    assert relative_error(ours.cpu(), loss) < 1e-3
    assert relative_error(grad.cpu(), expected) < 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_a_group_of_several_tokens_is_the_hybrid_losss_merged_group(beta):
    """At temperature 1 both compare the bytes of the group and anything else."""
    hidden, weight, teacher, teacher_weight, _ = CASE.tensors
    options = {"alignment": ALIGNMENT, "beta": beta, "reduction": "none"}
    merged = ALIGNMENT.span_ids()[0] >= 0
    ours = fused_linear_chunk_likelihood(
        *(hidden, weight, teacher, teacher_weight), group_temperature=1.0, **options
    )
    overlap = uld_case("bayesian", has_overlap=True).options["overlap"]
    hybrid = fused_linear_uld(
        *(hidden, weight, teacher, teacher_weight),
        overlap=overlap,
        matched_weight=1.0,
        unmatched_weight=1.0,
        **options,
    )
    assert merged.sum() == 4
    torch.testing.assert_close(ours[merged], hybrid[merged])


def test_the_limit_of_the_group_temperature():
    """tau KL tends to x - y + y log(y / x) of the log-likelihoods -x and -y, its slope to 1 - y / x
    in -x: what both sides hold of a likelihood is then how many nats it costs.
    """
    x, y = torch.tensor([0.3, 2.0, 5.0]).double(), torch.tensor([1.0, 0.1, 5.0]).double()
    tau = 1e7
    loss, slope = two_outcomes(-x / tau, -y / tau, 0.0)
    torch.testing.assert_close(tau * loss, x - y + y * (y / x).log(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(slope, y / x - 1, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_likelihoods_of_zero_have_the_floor_and_stay_finite(beta):
    log_s = torch.tensor([-1e6, -1e6, 0.0, 0.0, -1e6]).double()
    log_t = torch.tensor([-1e6, 0.0, -1e6, 0.0, -1.0]).double()
    loss, slope = two_outcomes(log_s, log_t, beta)
    assert loss.isfinite().all() and slope.isfinite().all()
    assert loss[[0, 3]].abs().max() == 0 and (loss[[1, 2, 4]] > 0).all()
    if 0 < beta < 1:
        assert loss.max() <= math.log(2)


@on_every_backend
def test_groups_of_weight_zero_and_rows_in_none_contribute_nothing(device, backend):
    hidden, weight, teacher, teacher_weight, row_weights = (
        t.float().to(device) for t in CASE.tensors
    )
    group = 2
    assert float(row_weights[group]) == 0
    in_group = ALIGNMENT.student_scalar_groups == group
    dead = [int(ALIGNMENT.student_base_rows[group]), 3]  # and a row in no group
    dead += ALIGNMENT.student_scalar_rows[in_group].tolist()
    poisoned = hidden.clone()
    poisoned[dead] = float("nan")
    results = []
    for rows in (hidden, poisoned):
        leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fused_linear_chunk_likelihood(
            *(*leaves, teacher, teacher_weight, ALIGNMENT, row_weights),
            backend=backend,
            chunk_size=2,
        )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert len(dead) == 4
    for clean, ours in zip(*results, strict=True):
        assert torch.equal(clean, ours)


@on_every_backend
def test_a_loss_for_every_group_takes_any_upstream_gradient(device, backend):
    tensors = [t.float().to(device) for t in CASE.tensors[:4]]
    upstream = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], device=device)
    grads = []
    for reduction in ("none", "sum"):
        leaves = [leaf.clone().requires_grad_() for leaf in tensors[:2]]
        weights = torch.ones_like(upstream) if reduction == "none" else upstream
        loss = fused_linear_chunk_likelihood(
            *(*leaves, *tensors[2:], ALIGNMENT, weights),
            reduction=reduction,
            backend=backend,
        )
        assert loss.shape == ((5,) if reduction == "none" else ())
        seed = upstream if reduction == "none" else None
        grads.append(torch.autograd.grad(loss, leaves, seed))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck_in_float64():
    case = uld_case("bayesian", sizes=(11, 13))
    hidden, weight, teacher, teacher_weight, row_weights = case.tensors
    leaves = [leaf[:, :6].clone().requires_grad_() for leaf in (hidden, weight)]
    assert torch.autograd.gradcheck(
        lambda rows, head: fused_linear_chunk_likelihood(
            *(rows, head, teacher, teacher_weight, case.options["alignment"], row_weights),
            beta=0.3,
            group_temperature=2.0,
            chunk_size=3,
        ),
        leaves,
    )


@on_every_backend
def test_metrics_are_those_of_the_oracle(device, backend):
    tensors = [t.float().to(device) for t in CASE.tensors[:4]]
    loss, metrics = fused_linear_chunk_likelihood(
        *(*tensors, ALIGNMENT),
        labels=CASE.options["labels"].to(device),
        label_weights=torch.zeros(10, device=device),
        return_metrics=True,
        backend=backend,
    )
    torch.testing.assert_close(loss, metrics.loss.mean())
    for name, pair, side in zip(
        ("student", "teacher"), (tensors[:2], tensors[2:]), ALIGNMENT.sides, strict=True
    ):
        truth = reference.group_log_likelihoods((pair[0] @ pair[1].T).cpu(), side)
        ours = getattr(metrics, f"{name}_log_likelihood").cpu()
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    assert metrics.cross_entropy.shape == (10,)


def test_memory_stays_within_the_budget():
    """Full logits of both sides would be twelve times the budget."""
    n, v_student, v_teacher = 256, 4000, 6000
    tensors = [torch.randn(n, 8), torch.randn(v_student, 8), torch.randn(n, 8)]
    tensors = [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]]
    teacher_weight, budget = torch.randn(v_teacher, 8), 850_000
    groups = torch.arange(n) // 2
    ids = torch.randint(v_student, (n,))
    alignment = TokenAlignment.from_groups(SpanGroups(groups, groups, n // 2, 9), ids, ids, 9)

    def step():
        fused_linear_chunk_likelihood(
            *tensors, teacher_weight, alignment, budget_bytes=budget
        ).backward()

    step()
    assert peak_extra_bytes(step) < budget + 2**20


def test_what_does_not_fit_is_named():
    hidden, weight, teacher, teacher_weight, _ = CASE.tensors
    heads = hidden, weight, teacher, teacher_weight
    observed = uld_case("observed").options["alignment"]
    function = "^fused_linear_chunk_likelihood: "
    with pytest.raises(ValueError, match=function + "alignment must be .* got 'observed'; align"):
        fused_linear_chunk_likelihood(*heads, observed)
    with pytest.raises(ValueError, match=function + "alignment must be .* got 'NoneType'"):
        fused_linear_chunk_likelihood(*heads, None)
    with pytest.raises(ValueError, match=function + "group_temperature must be positive .* got 0"):
        fused_linear_chunk_likelihood(*heads, ALIGNMENT, group_temperature=0)
    with pytest.raises(ValueError, match=function + "the alignment is of 10 student"):
        fused_linear_chunk_likelihood(hidden[:4], weight, teacher, teacher_weight, ALIGNMENT)
    with pytest.raises(ValueError, match=function + r"the student's tokens .* in \[0, 5\)"):
        fused_linear_chunk_likelihood(hidden, weight[:5], teacher, teacher_weight, ALIGNMENT)
