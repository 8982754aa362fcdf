"""fused_linear_jsd against the float64 oracle: values, gradients, and everything that must not
change them.

N scored rows, V vocabulary, D_s and D_t hidden sizes.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gold_kernels import fused_linear_jsd, peak_extra_bytes
from gold_kernels.jsd import reference
from support.backends import IMPLEMENTATIONS, on_every_backend
from support.error_budget import assert_within_error_budget, relative_error
from support.jsd_cases import (
    BETAS,
    Case,
    near_converged_case,
    random_case,
    run,
    run_fused,
    run_oracle,
)


def eager_rows(case: Case, **options) -> torch.Tensor:
    """(N,) row losses from full logits in the dtype of the case."""
    with torch.no_grad():
        student, teacher = (reference.head_logits(*case[i : i + 2], None, None) for i in (0, 2))
        return reference.jsd_rows(student, teacher, **options)


def test_the_triton_kernel_is_among_the_tested_implementations():
    assert "triton" in {backend for _, backend in IMPLEMENTATIONS}


@on_every_backend
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_within_the_budget_of_eager(
    dtype, beta, temperature, device, backend
):
    case = random_case()
    options = {"beta": beta, "temperature": temperature}
    oracle = run_oracle(case, **options)
    oracle_rows = eager_rows(case.to(torch.float64), **options)
    eager_case, fused_case = case.to(dtype, device), case.to(dtype, device)
    eager = run(reference.linear_jsd, eager_case, **options)
    options |= {"chunk_size": 16, "backend": backend}
    actual = run_fused(fused_case, **options)
    _, metrics = fused_linear_jsd(*fused_case, return_metrics=True, **options)
    eager_loss_rows = eager_rows(eager_case, beta=beta, temperature=temperature).to(torch.float32)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    # The rows, not their mean: one number that eager code happens to get right is no budget.
    assert_within_error_budget(
        "loss_rows", metrics.loss.cpu(), baseline=eager_loss_rows.cpu(), oracle=oracle_rows
    )
    torch.testing.assert_close(actual[0], metrics.loss.mean(), rtol=1e-6, atol=0)
    for i, name in ((1, "grad_hidden"), (2, "grad_weight")):
        assert_within_error_budget(name, actual[i].cpu(), baseline=eager[i].cpu(), oracle=oracle[i])


@on_every_backend
def test_bfloat16_inputs_meet_the_absolute_precision_targets(device, backend):
    case = random_case(n=64, v=1031, d_s=32, d_t=64)
    oracle = run_oracle(case)
    loss, grad_hidden, grad_weight = run_fused(case.to(torch.bfloat16, device), backend=backend)
    assert relative_error(loss.cpu(), oracle[0]) < 2e-5
    assert relative_error(grad_hidden.cpu(), oracle[1]) < 4e-3
    assert relative_error(grad_weight.cpu(), oracle[2]) < 4e-3


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_near_convergence_the_loss_and_gradient_are_still_right(beta, device, backend):
    case = near_converged_case()
    bf16 = case.to(torch.bfloat16, device)
    oracle = run_oracle(Case(*(tensor.detach().float().cpu() for tensor in bf16)), beta=beta)
    assert 0 < oracle[0] < 1e-2, "the pair must be nearly converged"
    loss, grad_hidden, grad_weight = run_fused(bf16, beta=beta, backend=backend)
    assert relative_error(loss.cpu(), oracle[0]) < 5e-3
    assert relative_error(grad_hidden.cpu(), oracle[1]) < 1e-2
    assert relative_error(grad_weight.cpu(), oracle[2]) < 1e-2


@on_every_backend
def test_float16_gradients_survive_small_row_weights(device, backend):
    case = random_case()
    weights = torch.full((37,), 1e-6)
    oracle = run_oracle(case, row_weights=weights)
    assert oracle[1].abs().median() < 6e-8, "below float16's smallest number"
    half = case.to(torch.float16, device)
    loss = fused_linear_jsd(*half, weights.to(device), chunk_size=16, backend=backend)
    grads = torch.autograd.grad(loss * 65536.0, half[:2])  # a GradScaler's factor
    for actual, truth in zip(grads, oracle[1:], strict=True):
        assert relative_error(actual.cpu(), truth * 65536.0) < 4e-3


def test_float64_passes_gradcheck():
    case = random_case(n=4, v=9, d_s=3, d_t=5).to(torch.float64)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for beta in (0.0, 0.3, 1.0):

        def loss(hidden, weight, bias, beta=beta):
            return fused_linear_jsd(
                hidden, weight, *case[2:], student_bias=bias, beta=beta, chunk_size=3
            )

        assert torch.autograd.gradcheck(loss, (*case[:2], bias))


@on_every_backend
def test_any_chunk_size_gives_the_same_answer(device, backend):
    case = random_case(n=13).to(torch.float32, device)
    expected = run_fused(case, chunk_size=13, backend=backend)
    for chunk_size in (1, 5, 12, 14, None):
        actual = run_fused(case, chunk_size=chunk_size, backend=backend)
        for ours, truth in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-8)


@on_every_backend
def test_no_scored_rows_give_a_zero_loss_with_a_graph(device, backend):
    case = random_case(n=0).to(torch.float32, device)
    loss = fused_linear_jsd(*case, backend=backend)
    loss.backward()
    assert loss.shape == () and float(loss) == 0.0
    assert case.student_hidden.grad.shape == (0, 16)
    assert not case.student_weight.grad.any()


@on_every_backend
def test_backward_twice_and_a_scaled_grad_output_are_exact(device, backend):
    case = random_case().to(torch.float32, device)
    loss = fused_linear_jsd(*case, backend=backend)
    first = torch.autograd.grad(loss, case[:2], retain_graph=True)
    second = torch.autograd.grad(loss, case[:2], retain_graph=True)
    scaled = torch.autograd.grad(loss * 4.0, case[:2])
    for once, twice, four in zip(first, second, scaled, strict=True):
        assert torch.equal(once, twice)
        assert torch.equal(once * 4.0, four)


@pytest.mark.parametrize("needs", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_every_subset_of_gradients(needs):
    case = random_case().to(torch.float32)
    bias = torch.randn(201)
    leaves = [
        tensor.detach().requires_grad_(bool(need))
        for tensor, need in zip((*case[:2], bias), needs, strict=True)
    ]
    loss = fused_linear_jsd(leaves[0], leaves[1], *case[2:], student_bias=leaves[2], chunk_size=10)
    full = [tensor.detach().clone().requires_grad_() for tensor in leaves]
    expected = torch.autograd.grad(
        reference.linear_jsd(full[0], full[1], *case[2:], student_bias=full[2]), full
    )
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for leaf, need, truth in zip(leaves, needs, expected, strict=True):
        assert (leaf.grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(leaf.grad, truth, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("is_inference", [False, True])
def test_without_grad_mode_no_gradient_is_computed(is_inference):
    """An evaluation would pay for a (V, D_s) gradient that nobody asks for."""
    case = random_case(n=8, v=4000, d_s=2048).to(torch.float32)
    gradient_bytes = 4 * case.student_weight.numel()
    expected = fused_linear_jsd(*case).detach()
    assert peak_extra_bytes(lambda: fused_linear_jsd(*case)) > gradient_bytes
    with torch.inference_mode() if is_inference else torch.no_grad():
        torch.testing.assert_close(fused_linear_jsd(*case), expected)
        assert peak_extra_bytes(lambda: fused_linear_jsd(*case)) < gradient_bytes / 8


def test_the_teacher_gets_no_gradient():
    case = random_case().to(torch.float32)
    case.teacher_weight.requires_grad_()
    fused_linear_jsd(*case).backward()
    assert case.teacher_weight.grad is None


@on_every_backend
def test_non_contiguous_inputs_with_unequal_strides(device, backend):
    case = random_case().to(torch.float32, device)
    expected = run_fused(case, backend=backend)
    strided = Case(
        case.student_hidden.detach().T.contiguous().T.requires_grad_(),
        torch.stack([case.student_weight.detach()] * 2, dim=1)[:, 0].requires_grad_(),
        torch.cat([case.teacher_hidden, case.teacher_hidden], dim=1)[:, :24],
        case.teacher_weight.T.contiguous().T,
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual = run_fused(strided, backend=backend)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-8)


@on_every_backend
def test_row_weights_carry_any_normalisation(device, backend):
    case = random_case()
    weights = torch.rand(37)
    oracle = run_oracle(case, row_weights=weights)
    loss, grad_hidden, grad_weight = run_fused(
        case.to(torch.float32, device), row_weights=weights.to(device), backend=backend
    )
    for ours, truth in zip((loss, grad_hidden, grad_weight), oracle, strict=True):
        assert relative_error(ours.cpu(), truth) < 1e-5


@on_every_backend
@pytest.mark.parametrize(
    "take", [lambda base: base[0, 0].expand(base.shape[0]), lambda base: base[:, 1]]
)
def test_row_weights_may_have_any_stride(take, device, backend):
    case = random_case().to(torch.float32, device)
    weights = take(torch.rand(37, 3, device=device))
    assert weights.stride() != (1,)
    actual = run_fused(case, row_weights=weights, chunk_size=10, backend=backend)
    expected = run_fused(case, row_weights=weights.contiguous(), chunk_size=10, backend=backend)
    for ours, truth in zip(actual, expected, strict=True):
        assert torch.equal(ours, truth)


@on_every_backend
def test_rows_of_weight_zero_contribute_nothing_whatever_they_hold(device, backend):
    case = random_case(n=6).to(torch.float32, device)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 0.0], device=device)
    live = weights != 0
    clean = Case(
        case.student_hidden.detach()[live].requires_grad_(),
        case.student_weight,
        case.teacher_hidden[live],
        case.teacher_weight,
    )
    expected = run_fused(clean, row_weights=weights[live], backend=backend)
    with torch.no_grad():
        case.student_hidden[1], case.student_hidden[3] = math.nan, math.inf
        case.teacher_hidden[5] = math.nan
    actual = run_fused(case, row_weights=weights, chunk_size=4, backend=backend)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1][live], expected[1])
    assert not actual[1][~live].any()
    torch.testing.assert_close(actual[2], expected[2])


@on_every_backend
def test_padded_heads_of_one_tokenizer_need_only_vocab_size(device, backend):
    case = random_case()
    oracle = run_oracle(case)
    padded = Case(
        case.student_hidden,
        torch.cat([case.student_weight, torch.randn(7, 16)]),
        case.teacher_hidden,
        torch.cat([case.teacher_weight, torch.randn(55, 24)]),
    ).to(torch.float32, device)
    loss, grad_hidden, grad_weight = run_fused(padded, vocab_size=201, backend=backend)
    assert relative_error(loss.cpu(), oracle[0]) < 1e-5
    assert relative_error(grad_hidden.cpu(), oracle[1]) < 1e-5
    assert relative_error(grad_weight[:201].cpu(), oracle[2]) < 1e-5
    assert not grad_weight[201:].any()


@on_every_backend
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("masked", ["student", "teacher", "both", "all but one"])
def test_columns_masked_with_minus_infinity_make_no_nan(masked, beta, device, backend):
    case = random_case(n=5, v=40)
    biases = {"student": torch.zeros(40), "teacher": torch.zeros(40)}
    for side in ("student", "teacher"):
        if masked in (side, "both"):
            biases[side][10:20] = -math.inf
        if masked == "all but one":
            biases[side][1:] = -math.inf
    actual = run_fused(
        case.to(torch.float32, device),
        beta=beta,
        backend=backend,
        student_bias=biases["student"].to(device),
        teacher_bias=biases["teacher"].to(device),
    )
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    oracle = run_oracle(
        case,
        beta=beta,
        student_bias=biases["student"].double(),
        teacher_bias=biases["teacher"].double(),
    )
    rows = 1e-12 + abs(float(oracle[0]))
    assert abs(float(actual[0].cpu()) - float(oracle[0])) < 1e-4 * rows + 1e-6


@on_every_backend
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_logits_of_ten_thousand_and_underflow_on_both_sides_make_no_nan(
    temperature, beta, device, backend
):
    case = random_case(n=8, v=65, d_s=8, d_t=8)
    scaled = Case(*(t * s for t, s in zip(case, (100.0, 50.0, 100.0, 50.0), strict=True)))
    logits = scaled.student_hidden @ scaled.student_weight.T
    assert logits.abs().max() > 1e4
    actual = run_fused(
        scaled.to(torch.float32, device), beta=beta, temperature=temperature, backend=backend
    )
    assert all(torch.isfinite(tensor).all() for tensor in actual)
    oracle = run_oracle(scaled, beta=beta, temperature=temperature)
    torch.testing.assert_close(actual[0].cpu().double(), oracle[0], rtol=1e-3, atol=1e-6)


@on_every_backend
def test_metrics_are_those_of_the_oracle_and_carry_no_graph(device, backend):
    case = random_case()
    case.teacher_weight[:, :16] = case.student_weight
    case.teacher_hidden[:, :16] = case.student_hidden  # half agree on the most likely token
    plain = run_fused(case.to(torch.float32, device), chunk_size=10, backend=backend)[0]
    loss, metrics = fused_linear_jsd(
        *case.to(torch.float32, device), chunk_size=10, backend=backend, return_metrics=True
    )
    double = case.to(torch.float64)
    student = reference.head_logits(double[0], double[1], None, None).detach()
    teacher = reference.head_logits(double[2], double[3], None, None)
    expected = reference.row_metrics(student, teacher)
    expected["loss"] = reference.jsd_rows(student, teacher)
    assert torch.equal(loss, plain)
    assert 0 < expected["top1_agreement"].sum() < 37, "both outcomes must occur"
    computed = metrics._asdict()
    assert computed.pop("cross_entropy") is None, "there are no labels"
    for name, value in computed.items():
        assert value.shape == (37,) and not value.requires_grad
        torch.testing.assert_close(value.cpu().double(), expected[name], rtol=1e-4, atol=1e-5)


def test_identical_models_have_zero_loss_and_gradient():
    case = random_case()
    same = Case(case[0], case[1], case[0], case[1]).to(torch.float32)
    loss, grad_hidden, grad_weight = run_fused(same)
    assert abs(float(loss)) < 1e-8
    assert grad_hidden.abs().max() < 1e-9 and grad_weight.abs().max() < 1e-9


def test_tied_weights_add_up_the_gradients_of_both_uses():
    case = random_case().to(torch.float32)
    ids = torch.arange(37)
    embedded = case.student_weight[ids]
    fused_linear_jsd(embedded, case.student_weight, *case[2:]).backward()
    actual, case.student_weight.grad = case.student_weight.grad, None
    embedded = case.student_weight[ids]
    reference.linear_jsd(embedded, case.student_weight, *case[2:]).backward()
    torch.testing.assert_close(actual, case.student_weight.grad, rtol=1e-4, atol=1e-7)


def test_autocast_casts_hidden_and_weight_as_a_linear_layer_does():
    case = random_case().to(torch.float32)
    expected = run_fused(case.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_fused(case)
    assert torch.equal(actual[0], expected[0])
    assert actual[1].dtype == actual[2].dtype == torch.float32
    assert torch.equal(actual[2], expected[2].float())


def test_a_second_derivative_is_refused():
    case = random_case().to(torch.float32)
    loss = fused_linear_jsd(*case)
    (grad,) = torch.autograd.grad(loss * loss, case.student_hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="a loss has no second derivative"):
        grad.sum().backward()


def test_two_runs_are_bitwise_equal():
    case = random_case().to(torch.bfloat16)
    for once, again in zip(run_fused(case), run_fused(case), strict=True):
        assert torch.equal(once, again)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(1, 300),
    d_s=st.integers(1, 20),
    d_t=st.integers(1, 20),
    chunk_size=st.integers(1, 12),
    beta=st.sampled_from(BETAS),
    seed=st.integers(0, 1000),
)
def test_any_shape_agrees_with_the_oracle(n, v, d_s, d_t, chunk_size, beta, seed):
    case = random_case(n, v, d_s, d_t, seed)
    oracle = run_oracle(case, beta=beta)
    actual = run_fused(case.to(torch.float64), beta=beta, chunk_size=chunk_size)
    for ours, truth in zip(actual, oracle, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-11)
