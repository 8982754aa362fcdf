"""Heads as models have them (soft-capped, scaled, 16-bit logits), the byte budget, torch.compile.

N scored rows, V vocabulary, D_s and D_t hidden sizes.
"""

import math

import pytest
import torch

from gold_kernels import fused_linear_jsd, peak_extra_bytes
from gold_kernels.jsd import reference
from support.backends import on_every_backend
from support.error_budget import relative_error
from support.jsd_cases import Case, random_case, run_fused, run_oracle


def capped_oracle(case, caps, scales, **options):
    """Loss and gradients in float64 from logits capped by plain torch."""
    case = case.to(torch.float64)
    logits = [scales[i] * case[2 * i] @ case[2 * i + 1].T for i in (0, 1)]
    logits = [
        x if cap is None else cap * torch.tanh(x / cap) for x, cap in zip(logits, caps, strict=True)
    ]
    loss = reference.jsd_rows(*logits, **options).mean()
    return loss, *torch.autograd.grad(loss, case[:2])


def test_autocast_leaves_float64_alone_as_a_linear_layer_does():
    case = random_case().to(torch.float64)
    expected = run_fused(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(*case[:2]).dtype == torch.float64
        actual = run_fused(case)
    for ours, truth in zip(actual, expected, strict=True):
        assert torch.equal(ours, truth)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_teacher_may_have_another_dtype(dtype, device, backend):
    case = random_case(n=20)
    students = case.to(torch.bfloat16, device)
    mixed = Case(*students[:2], *case.to(dtype, device)[2:])
    actual = run_fused(mixed, chunk_size=6, backend=backend)
    oracle = run_oracle(case)  # values that all three dtypes hold exactly
    for ours, truth, limit in zip(actual, oracle, (2e-5, 4e-3, 4e-3), strict=True):
        assert relative_error(ours.cpu(), truth) < limit


@on_every_backend
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),  # what peft's modules_to_save makes of a 16-bit model
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_hidden_states_and_head_of_two_dtypes_are_computed_in_the_wider(
    hidden_dtype, weight_dtype, device, backend
):
    case = random_case(n=20)
    dtypes = [hidden_dtype, weight_dtype] * 2
    double = case.to(torch.float64)
    mixed = Case(*[t.detach().to(device, d) for t, d in zip(double, dtypes, strict=True)])
    for tensor in mixed[:2]:
        tensor.requires_grad_()
    oracle = run_oracle(Case(*[t.detach().float().cpu() for t in mixed]))
    bias = torch.linspace(-1, 1, case.student_weight.shape[0], device=device)
    for options in ({}, {"chunk_size": 6}):
        actual = run_fused(mixed, backend=backend, **options)
        assert [t.dtype for t in actual] == [torch.float32, hidden_dtype, weight_dtype]
        for ours, truth, dtype in zip(actual, oracle, (torch.float32, *dtypes[:2]), strict=True):
            assert relative_error(ours.cpu(), truth) < max(1e-5, torch.finfo(dtype).eps)
    assert run_fused(mixed, backend=backend, student_bias=bias)[0].isfinite()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_gradient_of_a_float32_bias_is_float32(reduction, dtype, device, backend):
    """It was rounded to the dtype of the head on its way: to 0 where float16 has none so small."""
    case = random_case(n=20).to(dtype, device)
    bias = torch.linspace(-1, 1, case.student_weight.shape[0], device=device, requires_grad=True)
    weights = torch.full((20,), 1e-9, device=device)
    exact = [t.detach().cpu().double() for t in (*case, weights)]
    own = bias.detach().cpu().double().requires_grad_()
    truth = reference.linear_jsd(*exact, beta=0.0, student_bias=own)
    (expected,) = torch.autograd.grad(truth, own)
    options = {"student_bias": bias, "reduction": reduction, "backend": backend, "chunk_size": 6}
    loss = fused_linear_jsd(*case, weights, beta=0.0, **options)
    (grad,) = torch.autograd.grad(loss.sum(), bias)
    assert relative_error(grad.cpu(), expected) < 4e-3
    assert not torch.equal(grad, grad.to(dtype).float())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_soft_capped_and_scaled_heads(beta, dtype, device, backend):
    case = random_case(n=20)
    caps, scales = (2.0, 3.0), (0.7, 1.3)
    oracle = capped_oracle(case, caps, scales, beta=beta, temperature=0.8)
    plain = capped_oracle(case, (None, None), (1.0, 1.0), beta=beta, temperature=0.8)
    assert abs(float(oracle[0] / plain[0]) - 1) > 0.1, "the cap must matter"
    actual = run_fused(
        case.to(dtype, device),
        beta=beta,
        temperature=0.8,
        chunk_size=6,
        backend=backend,
        final_logit_softcapping=caps,
        logit_scale=scales,
    )
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    for ours, truth in zip(actual, oracle, strict=True):
        assert relative_error(ours.cpu(), truth) < limit


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize(("cap", "scale"), [(2.0, 1.0), (None, -0.7)])
def test_a_masked_column_has_probability_0_through_cap_and_scale(cap, scale, beta, device, backend):
    case = random_case(n=20)
    bias = torch.linspace(-2, 2, case.student_weight.shape[0])
    bias[7] = -torch.inf
    double = case.to(torch.float64)
    logits = [scale * (double[i] @ double[i + 1].T + bias) for i in (0, 2)]
    if cap is not None:
        logits = [cap * torch.tanh(side / cap) for side in logits]
    masked = [side.index_fill(1, torch.tensor(7), -torch.inf) for side in logits]
    truth = reference.jsd_rows(*masked, beta=beta).mean()
    expected = truth, *torch.autograd.grad(truth, double[:2])
    biases = {"student_bias": bias.to(device), "teacher_bias": bias.to(device)}
    actual = run_fused(
        case.to(torch.float32, device),
        beta=beta,
        final_logit_softcapping=cap,
        logit_scale=scale,
        chunk_size=6,
        backend=backend,
        **biases,
    )
    for ours, double_part in zip(actual, expected, strict=True):
        assert relative_error(ours.cpu(), double_part) < 1e-5


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [(0.7, 2.0), (1.5, 1.0)])
def test_each_side_may_have_its_temperature(temperature, beta, device, backend):
    case = random_case(n=20)
    double = case.to(torch.float64)
    logits = [double[2 * i] @ double[2 * i + 1].T / side for i, side in enumerate(temperature)]
    truth = reference.jsd_rows(*logits, beta=beta).mean()
    expected = truth, *torch.autograd.grad(truth, double[:2])
    options = {"beta": beta, "temperature": temperature, "chunk_size": 6, "backend": backend}
    actual = run_fused(case.to(torch.float32, device), **options)
    for ours, double_part in zip(actual, expected, strict=True):
        assert relative_error(ours.cpu(), double_part) < 1e-5


def test_one_cap_and_one_scale_hold_for_both_sides():
    case = random_case(n=5).to(torch.float64)
    options = {"final_logit_softcapping": 2.0, "logit_scale": 0.7}
    pairs = {"final_logit_softcapping": (2.0, 2.0), "logit_scale": (0.7, 0.7)}
    for once, twice in zip(run_fused(case, **options), run_fused(case, **pairs), strict=True):
        assert torch.equal(once, twice)


def test_the_cross_entropy_of_a_capped_head_has_the_slope_of_the_cap():
    case = random_case(n=6, v=20).to(torch.float64)
    labels, no_weights = torch.arange(6), torch.zeros(6, dtype=torch.float64)
    options = {"labels": labels, "final_logit_softcapping": (1.5, None)}
    loss = fused_linear_jsd(*case, no_weights, **options)
    logits = 1.5 * torch.tanh(case[0] @ case[1].T / 1.5)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, expected)
    grads, truths = (torch.autograd.grad(x, case[:2]) for x in (loss, expected))
    for ours, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(ours, truth)


@on_every_backend
def test_bf16_logits_are_within_what_rounding_them_costs(device, backend):
    case = random_case(n=64, v=1031, d_s=32, d_t=64)
    oracle = run_oracle(case)
    options = {"backend": backend, "chunk_size": 20}
    precise = run_fused(case.to(torch.bfloat16, device), **options)
    fast = run_fused(case.to(torch.bfloat16, device), logits_dtype=torch.bfloat16, **options)
    for i, limit in ((0, 1e-3), (1, 3e-2), (2, 3e-2)):
        error = relative_error(fast[i].cpu(), oracle[i])
        assert relative_error(precise[i].cpu(), oracle[i]) < error < limit


def test_float32_logits_are_the_default():
    case = random_case(n=9).to(torch.bfloat16)
    for ours, named in zip(
        run_fused(case), run_fused(case, logits_dtype=torch.float32), strict=True
    ):
        assert torch.equal(ours, named)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_logit_softcapping": 0.0}, "None or positive and finite, got 0.0"),
        ({"final_logit_softcapping": (None, math.inf)}, "None or positive and finite, got inf"),
        ({"logit_scale": 0.0}, "finite and not 0, got 0.0; pass model.config.logit_scale"),
        ({"budget_bytes": 0}, "at least 1, got 0; 1 << 30 is the default"),
        ({"logits_dtype": torch.float16}, "torch.bfloat16, got torch.float16"),
        ({"logit_scale": (1.0, 1.0, 1.0)}, "a pair (student, teacher), got 3 values; pass two"),
        ({"temperature": (1.0, 2.0, 3.0)}, "one number or (student, teacher), got 3 numbers"),
        ({"reduction": "mean"}, "reduction must be 'sum' (weighted by row_weights) or 'none'"),
        ({"chunk_sise": 4}, "an option is expected, got chunk_sise=; did you mean chunk_size?"),
        ({"vocab_size": True}, "vocab_size must be a whole number in [1, 20]"),
    ],
)
def test_bad_head_options_say_what_to_pass(options, message):
    with pytest.raises(ValueError, match="fused_linear_jsd: ") as error:
        fused_linear_jsd(*random_case(4, 20, 8, 8), **options)
    assert message in str(error.value)


def test_options_of_both_sides_may_come_as_a_list():
    """As JSON and YAML have them."""
    case = random_case(n=9)
    options = {"logit_scale": (0.7, 1.3), "final_logit_softcapping": (2.0, 3.0)}
    expected = fused_linear_jsd(*case, **options)
    assert torch.equal(
        fused_linear_jsd(*case, **{k: list(v) for k, v in options.items()}), expected
    )


@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("has_frozen_head", [False, True])
@pytest.mark.parametrize(("n", "budget"), [(200, 1 << 20), (800, 4 << 20), (2400, 24 << 20)])
def test_the_byte_budget_holds_at_any_number_of_rows(n, budget, has_frozen_head, logits_dtype):
    v, d = 4096, 32
    case = random_case(n, v, d, d).to(torch.float32)
    case.student_weight.requires_grad_(not has_frozen_head)

    def step() -> None:
        fused_linear_jsd(*case, budget_bytes=budget, logits_dtype=logits_dtype).backward()
        case.student_hidden.grad = case.student_weight.grad = None

    returned = 4 * n * d + (0 if has_frozen_head else 4 * v * d)
    kept_until_backward = returned  # float32 gradients, where 16-bit ones would be half of it
    row_function = 18 * 4 * (1 << 15) + 64 * n
    assert peak_extra_bytes(step) <= budget + returned + kept_until_backward + row_function
    assert 2 * 4 * n * v > budget, "full logits must not fit the budget"


def test_any_budget_gives_the_same_answer():
    case = random_case(n=50, v=300).to(torch.bfloat16)
    expected = run_fused(case)
    for budget in (1, 10_000, 50_000, 200_000):
        actual = run_fused(case, budget_bytes=budget)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
        for ours, truth in zip(actual[1:], expected[1:], strict=True):
            assert relative_error(ours, truth) < 4e-3


@pytest.mark.parametrize("compiler", ["aot_eager"])
def test_torch_compile_keeps_one_graph_for_any_number_of_rows(compiler):
    layer = torch.nn.Linear(16, 16)
    weight, teacher_weight = torch.randn(50, 16, requires_grad=True), torch.randn(50, 24)

    def loss_of(inputs, teacher_hidden):
        hidden = layer(inputs)
        return fused_linear_jsd(hidden, weight, teacher_hidden, teacher_weight, beta=0.3)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss_of, backend=compiler, fullgraph=True)
    leaves = (layer.weight, weight)
    for n in (5, 7, 9, 13):
        inputs, teacher_hidden = torch.randn(n, 16), torch.randn(n, 24)
        actual, expected = compiled(inputs, teacher_hidden), loss_of(inputs, teacher_hidden)
        torch.testing.assert_close(actual, expected)
        for ours, truth in zip(
            torch.autograd.grad(actual, leaves),
            torch.autograd.grad(expected, leaves),
            strict=True,
        ):
            torch.testing.assert_close(ours, truth)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2, "one for the first size, one for all others"


@pytest.mark.parametrize("chunk_size", [16, 200])
def test_measured_memory_holds_the_buffers_of_the_operator(chunk_size):
    """On a CPU tensors are watched one by one, those made inside our own operators too."""
    case = random_case(200, 4096, 32, 32).to(torch.float32)
    peak = peak_extra_bytes(lambda: fused_linear_jsd(*case, chunk_size=chunk_size))
    buffers = 2 * 4 * chunk_size * 4096
    assert peak >= buffers + 4 * case.student_weight.numel()
