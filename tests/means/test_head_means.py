"""The forward KL from means of a frozen head, against the oracle and fused_linear_jsd with beta 0.

N rows, D hidden size, V vocabulary. P teacher, Q student.
"""

import pytest
import torch

from gold_kernels import (
    HeadMeans,
    fused_linear_jsd,
    fused_linear_mean_kl,
    head_means,
    head_top_k,
    peak_extra_bytes,
)
from gold_kernels.jsd import reference
from gold_kernels.means.row_loss import MeanKL
from support.backends import on_every_backend
from support.error_budget import assert_within_error_budget, relative_error
from support.jsd_cases import near_converged_case, random_case, run_oracle


def from_means(case, temperature=(1.0, 1.0), row_weights=None, means_options=None, **options):
    """Loss and gradient of the hidden states."""
    hidden, weight = case.student_hidden, case.student_weight.detach()
    shared = {k: options[k] for k in ("student_bias", "vocab_size", "backend") if k in options}
    teacher = head_means(
        *(case.teacher_hidden, case.teacher_weight, weight),
        temperature=temperature[1],
        **shared,
        **(means_options or {}),
    )
    loss = fused_linear_mean_kl(
        hidden, weight, teacher, row_weights, temperature=temperature[0], **options
    )
    return loss, torch.autograd.grad(loss.sum(), hidden)[0]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_within_the_budget_of_eager(dtype, device, backend):
    case = random_case()
    oracle = run_oracle(case, beta=0.0)
    eager = case.to(dtype, device)
    baseline = reference.linear_jsd(*eager, beta=0.0)
    baseline = baseline, torch.autograd.grad(baseline, eager.student_hidden)[0]
    options = {"backend": backend, "chunk_size": 16}
    actual = from_means(case.to(dtype, device), means_options={"chunk_size": 5}, **options)
    for name, ours, base, truth in zip(("loss", "grad"), actual, baseline, oracle, strict=False):
        assert_within_error_budget(
            name, ours.cpu(), baseline=base.float().cpu(), oracle=truth, factor=4.0
        )


@on_every_backend
def test_heads_of_every_form_give_the_loss_of_fused_linear_jsd(device, backend):
    case = random_case(n=11, v=203).to(torch.float32, device)
    biases = [0.3 * torch.randn(203, device=device) for _ in range(2)]
    weights = torch.rand(11, device=device)
    labels = torch.randint(-1, 190, (11,), device=device)
    shared = {"student_bias": biases[0], "vocab_size": 190, "backend": backend, "labels": labels}
    loss, metrics = fused_linear_jsd(
        *(case.student_hidden, case.student_weight.detach(), *case[2:], weights),
        beta=0.0,
        temperature=(0.7, 2.0),
        teacher_bias=biases[1],
        logit_scale=(1.3, 0.8),
        final_logit_softcapping=(None, 3.0),
        return_metrics=True,
        **shared,
    )
    (grad,) = torch.autograd.grad(loss, case.student_hidden)
    of_teacher = {
        "teacher_bias": biases[1],
        "logit_scale": 0.8,
        "final_logit_softcapping": 3.0,
    }
    options = {"logit_scale": 1.3, **shared}
    ours = from_means(case, (0.7, 2.0), weights, of_teacher, **options)
    torch.testing.assert_close(ours[0], loss, rtol=1e-5, atol=0)
    assert relative_error(ours[1], grad) < 1e-5
    teacher = head_means(
        *(case.teacher_hidden, case.teacher_weight, case.student_weight.detach()),
        temperature=2.0,
        student_bias=biases[0],
        vocab_size=190,
        backend=backend,
        **of_teacher,
    )
    rows = fused_linear_mean_kl(
        *(case.student_hidden, case.student_weight.detach(), teacher),
        temperature=0.7,
        return_metrics=True,
        **options,
    )[1]
    assert set(rows) == {
        *("loss", "cross_entropy", "teacher_entropy", "forward_kl", "top1_agreement"),
    }
    for name, values in rows.items():
        torch.testing.assert_close(values, getattr(metrics, name), rtol=1e-5, atol=1e-6)


def test_means_are_those_of_their_definition():
    case = random_case(n=5, v=31).to(torch.float64)
    weight, bias = case.student_weight.detach(), torch.randn(31, dtype=torch.float64)
    p = torch.softmax(case.teacher_hidden @ case.teacher_weight.T / 0.7, -1)
    top = p.argmax(-1)
    expected = HeadMeans(
        p @ weight - weight[top], torch.special.entr(p).sum(-1), p @ bias - bias[top], top
    )
    actual = head_means(*case[2:], weight, temperature=0.7, student_bias=bias, chunk_size=2)
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth)


def test_gradcheck_in_float64():
    case = random_case(n=4, v=9, d_s=3, d_t=5).to(torch.float64)
    weight, bias = case.student_weight.detach(), torch.randn(9, dtype=torch.float64)
    teacher = head_means(*case[2:], weight, student_bias=bias)
    labels = torch.tensor([1, -1, 8, 0])
    for reduction in ("sum", "none"):

        def loss_of(hidden, reduction=reduction):
            return fused_linear_mean_kl(
                *(hidden, weight, teacher),
                temperature=0.7,
                student_bias=bias,
                labels=labels,
                chunk_size=3,
                reduction=reduction,
            )

        assert torch.autograd.gradcheck(loss_of, case.student_hidden)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_near_convergence_the_gradient_is_right_and_not_with_means_of_16_bits(
    dtype, device, backend
):
    for noise in (1e-3, 1e-2):
        case = near_converged_case(noise=noise).to(dtype, device)
        oracle = run_oracle(case.to(torch.float64, "cpu"), beta=0.0)
        loss, grad = from_means(case, backend=backend)
        assert abs(loss.item() - oracle[0].item()) < 1e-6
        assert relative_error(grad.cpu(), oracle[1]) < 1e-2
    weight = case.student_weight.detach()
    teacher = head_means(*case[2:], weight, backend=backend)
    rounded = teacher._replace(means=teacher.means.bfloat16().float())
    loss = fused_linear_mean_kl(case.student_hidden, weight, rounded, backend=backend)
    (grad,) = torch.autograd.grad(loss, case.student_hidden)
    assert relative_error(grad.cpu(), oracle[1]) > 0.1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_means_of_a_large_vocabulary_do_not_have_the_rounding_of_its_sum(device):
    """152k probabilities add up to 1 within 2e-6: as much as is left near convergence."""
    case = near_converged_case(n=8, v=151_936, d=128).to(torch.bfloat16, device)
    weight = case.student_weight.detach()
    found = head_means(*case[2:], weight)
    log_p = (case.teacher_hidden.double() @ case.teacher_weight.double().T).log_softmax(-1)
    means = log_p.exp() @ weight.double() - weight[found.tokens].double()
    # tensor cores cut off what they add: 3.0e-7 on an H200
    assert relative_error(found.means.double(), means) < (1.5e-7 if device == "cpu" else 4e-7)
    entropies = torch.special.entr(log_p.exp()).sum(-1)
    torch.testing.assert_close(found.entropies.double(), entropies, rtol=0, atol=3e-6)


@on_every_backend
def test_rows_of_weight_zero_hold_anything_and_chunks_change_nothing(device, backend):
    case = random_case(n=7).to(torch.float32, device)
    weight, weights = case.student_weight.detach(), torch.rand(7, device=device)
    teacher = head_means(*case[2:], weight, backend=backend)
    expected = None
    for chunk_size in (1, 6, 7, 8, None):
        options = {"chunk_size": chunk_size, "backend": backend}
        loss = fused_linear_mean_kl(case.student_hidden, weight, teacher, weights, **options)
        (grad,) = torch.autograd.grad(loss, case.student_hidden)
        expected = expected or (loss, grad)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(grad, expected[1])
    weights[2] = 0
    hidden = case.student_hidden.detach().clone()
    hidden[2] = torch.nan
    means = teacher.means.clone()
    means[2] = torch.nan
    spoilt = teacher._replace(means=means)
    spoilt.entropies[2], spoilt.tokens[2] = torch.nan, 0  # where the largest NaN is
    hidden.requires_grad_()
    options = {"backend": backend, "return_metrics": True}
    loss, rows = fused_linear_mean_kl(hidden, weight, spoilt, weights, **options)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and not hidden.grad[2].any()
    assert [float(values[2]) for values in rows.values()] == [0] * len(rows)
    none = HeadMeans(*(tensor[:0] for tensor in teacher))
    loss = fused_linear_mean_kl(case.student_hidden[:0], weight, none, backend=backend)
    loss.backward()
    assert loss.item() == 0


def test_torch_compile_takes_it_whole_and_autocast_casts_as_a_linear_layer_does():
    torch._dynamo.reset()
    case = random_case(n=6, v=30).to(torch.float32)
    weight = case.student_weight.detach()
    teacher = head_means(*case[2:], weight)

    def loss_of(hidden):
        return fused_linear_mean_kl(hidden, weight, teacher)

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.student_hidden), loss_of(case.student_hidden))
    case = near_converged_case().to(torch.float32)
    weight = case.student_weight.detach()
    rounded = [tensor.detach().bfloat16().double() for tensor in case]
    truth = reference.linear_jsd(rounded[0].requires_grad_(), *rounded[1:], beta=0.0)
    (expected,) = torch.autograd.grad(truth, rounded[0])
    with torch.autocast("cpu", torch.bfloat16):
        teacher = head_means(*case[2:], weight)
        loss = fused_linear_mean_kl(case.student_hidden, weight, teacher)
    (grad,) = torch.autograd.grad(loss, case.student_hidden)
    assert relative_error(grad, expected) < 1e-2


@on_every_backend
def test_means_of_a_teacher_who_is_sure_are_nothing(device, backend):
    """No other entry has a probability by which its share could be divided."""
    hidden, heads = 200 * torch.eye(3, 4, device=device), torch.eye(6, 4, device=device)
    means, entropies, _, tokens = head_means(hidden, heads, heads, backend=backend)
    assert tokens.tolist() == [0, 1, 2]
    assert not means.any() and not entropies.any()


def test_a_head_of_another_precision_than_the_teachers_is_refused():
    case = random_case(n=3, v=9)
    with pytest.raises(ValueError, match=r"^head_means: float64 needs both sides in float64, got "):
        head_means(*case.to(torch.float64)[2:], case.student_weight)


def test_under_autocast_a_bias_is_summed_in_float32():
    case, bias = random_case(n=6, v=300).to(torch.bfloat16), torch.randn(300).bfloat16().float()
    given = *case[2:], case.student_weight.detach()
    expected = head_means(*given, student_bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        actual = head_means(*given, student_bias=bias)
    for ours, truth in zip(actual, expected, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("n", [200, 1000])
def test_memory_stays_within_the_budget(n):
    budget, v, d = 4 << 20, 4096, 32
    case = random_case(n, v, d, d).to(torch.float32)
    weight = case.student_weight.detach()
    teacher = head_means(*case[2:], weight)
    options = {"budget_bytes": budget, "backend": "torch"}

    def step():
        fused_linear_mean_kl(case.student_hidden, weight, teacher, **options).backward()
        case.student_hidden.grad = None

    assert peak_extra_bytes(step) <= budget + 2 * 4 * n * d + 256 * n
    returned = 4 * n * d + 32 * n
    assert (
        peak_extra_bytes(lambda: head_means(*case[2:], weight, **options)) <= budget + 2 * returned
    )
    assert 4 * n * v > budget // 2, "full logits must not fit the budget"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student_weight": torch.randn(9, 3).requires_grad_()},
            "student_weight must be frozen, g",
        ),
        ({"student_weight": torch.randn(9, 4)}, "student_hidden and student_weight must share the"),
        (
            {"means": torch.zeros(4, 3).bfloat16()},
            r"means of the teacher must be \(4, 3\) torch.fl",
        ),
        ({"tokens": torch.zeros(4)}, r"tokens of the teacher must be \(4,\) torch.int64, got"),
        ({"entropies": torch.zeros(5)}, r"entropies of the teacher must be \(4,\) torch.float32"),
        (
            {"means": torch.zeros(4, 3, device="meta")},
            "means of the teacher must be on cpu like the hidden states, got meta; move them",
        ),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"final_logit_softcapping": 3.0}, "an option is expected, got final_logit_softcapping="),
        ({"vocab_size": 10}, r"vocab_size must be a whole number in \[1, 9\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = random_case(n=4, v=9, d_s=3, d_t=5).to(torch.float32)
    weight = case.student_weight.detach()
    teacher = head_means(*case[2:], weight)
    parts = {name: change.pop(name) for name in list(change) if name in teacher._fields}
    weight = change.pop("student_weight", weight)
    with pytest.raises(ValueError, match=f"^fused_linear_mean_kl: .*{message}"):
        fused_linear_mean_kl(case.student_hidden, weight, teacher._replace(**parts), **change)


def test_what_no_means_can_be_made_of_is_refused():
    case = random_case(n=4, v=9, d_s=3, d_t=5)
    weight, bias = case.student_weight.detach(), torch.zeros(9)
    bias[3] = -torch.inf
    with pytest.raises(ValueError, match="head_means: student_bias must be finite, got -inf"):
        head_means(*case[2:], weight, student_bias=bias)
    with pytest.raises(ValueError, match="head_means: student and teacher heads must have one voc"):
        head_means(*case[2:], weight[:8])
    with pytest.raises(ValueError, match="head_means: temperature must be positive"):
        head_means(*case[2:], weight, temperature=-1.0)


def test_it_is_no_loss_of_two_heads():
    from gold_kernels.losses import LOSSES

    assert MeanKL.name not in LOSSES


@pytest.mark.parametrize("name", ["head_means", "head_top_k"])
def test_torch_compile_leaves_what_is_asked_of_a_teacher_outside_and_names_it(name):
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    call = {
        "head_means": lambda: head_means(hidden, weight, weight)[0],
        "head_top_k": lambda: head_top_k(hidden, weight, 2)[1],
    }[name]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{name} runs outside the graph"):
        torch.compile(call, backend="eager", fullgraph=True)()
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, backend="eager")(), call())
