"""Losses that are a formula: every one in gold_kernels.losses against autograd of its definition.

N rows, V vocabulary. P teacher, Q student.
"""

import dataclasses
from typing import ClassVar

import pytest
import torch

from gold_kernels import FusedLinearLoss, fused_linear_jsd, fused_linear_loss, peak_extra_bytes
from gold_kernels.losses import LOSSES, FormulaLoss, make_loss
from support.backends import on_every_backend
from support.error_budget import assert_within_error_budget, relative_error
from support.jsd_cases import near_converged_case, random_case, run

FORMULAS = [name for name, loss in LOSSES.items() if issubclass(loss, FormulaLoss)]
every_formula = pytest.mark.parametrize("name", FORMULAS)


def definition(name, log_q, log_p):
    """(N,) from probabilities, as the papers write it."""
    q, p = log_q.exp(), log_p.exp()
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if name == "skew_reverse_kl":
        return (q * (log_q - (0.1 * q + 0.9 * p).log())).sum(-1)
    assert name == "skew_kl", "a new loss needs its definition here"
    return (p * (log_p - (0.1 * p + 0.9 * q).log())).sum(-1)


def eager(name, temperature=(1.0, 1.0)):
    def loss_of(student_hidden, student_weight, teacher_hidden, teacher_weight, **_):
        log_q = torch.log_softmax(student_hidden @ student_weight.T / temperature[0], -1)
        log_p = torch.log_softmax(teacher_hidden @ teacher_weight.T / temperature[1], -1)
        return definition(name, log_q, log_p).mean()

    return loss_of


def fused(name, temperature=1.0, **options):
    loss = make_loss(name, temperature=temperature)
    return lambda *case: fused_linear_loss(loss, *case, **options)


@every_formula
@on_every_backend
@pytest.mark.parametrize("temperature", [(1.0, 1.0), (0.7, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_within_the_budget_of_eager(
    dtype, temperature, device, backend, name
):
    case = random_case()
    oracle = run(eager(name, temperature), case.to(torch.float64))
    baseline = run(eager(name, temperature), case.to(dtype, device))
    options = {"chunk_size": 16, "backend": backend}
    actual = run(fused(name, temperature, **options), case.to(dtype, device))
    assert_within_error_budget(
        "loss", actual[0].cpu(), baseline=baseline[0].float().cpu(), oracle=oracle[0], factor=4.0
    )
    for i, part in ((1, "grad_hidden"), (2, "grad_weight")):
        assert_within_error_budget(
            part, actual[i].cpu(), baseline=baseline[i].cpu(), oracle=oracle[i]
        )


@every_formula
def test_gradcheck_in_float64(name):
    """torch's own check by finite differences: hidden states, head and bias."""
    case = random_case(n=3, v=7, d_s=4, d_t=5).to(torch.float64)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    loss = make_loss(name)

    def loss_of(hidden, weight, bias):
        return fused_linear_loss(loss, hidden, weight, *case[2:], student_bias=bias, chunk_size=2)

    assert torch.autograd.gradcheck(loss_of, (*case[:2], bias))

    def rows(hidden, weight):
        return fused_linear_loss(loss, hidden, weight, *case[2:], chunk_size=2, reduction="none")

    assert torch.autograd.gradcheck(rows, case[:2])


@every_formula
@on_every_backend
def test_near_convergence_the_gradient_is_right(device, backend, name):
    case = near_converged_case()
    oracle = run(eager(name), case.to(torch.float64))
    actual = run(fused(name, backend=backend), case.to(torch.float32, device))
    assert relative_error(actual[0].cpu(), oracle[0]) < 5e-3
    for ours, truth in zip(actual[1:], oracle[1:], strict=True):
        assert relative_error(ours.cpu(), truth) < 1e-2


@every_formula
@on_every_backend
def test_identical_models_have_no_loss(device, backend, name):
    case = random_case().to(torch.float32, device)
    same = type(case)(*case[:2], *(t.detach() for t in case[:2]))
    loss, *grads = run(fused(name, backend=backend), same)
    assert abs(float(loss.detach())) < 1e-7
    assert all(grad.abs().max() < 1e-7 for grad in grads)


@every_formula
@on_every_backend
def test_masked_columns_and_rows_of_weight_zero(device, backend, name):
    case = random_case(n=6, v=30).to(torch.float32, device)
    mask = torch.zeros(30, device=device)
    mask[4] = -torch.inf
    weights = torch.ones(6, device=device)
    weights[2] = 0
    with torch.no_grad():
        case.student_hidden[2] = torch.nan
    for student_bias, teacher_bias in ((mask, mask), (mask, None), (None, mask)):
        loss = fused_linear_loss(
            make_loss(name),
            *case,
            weights,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            backend=backend,
        )
        grads = torch.autograd.grad(loss, case[:2])
        assert torch.isfinite(loss) and all(torch.isfinite(grad).all() for grad in grads)
        assert not grads[0][2].any()


@every_formula
@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_takes_it_whole(name, dynamic):
    torch._dynamo.reset()
    case = random_case(n=6, v=30).to(torch.float32)
    compiled = torch.compile(fused(name), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for ours, truth in zip(run(compiled, case), run(fused(name), case), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("name", LOSSES)
def test_torch_compile_takes_a_loss_that_is_made_in_the_graph(name):
    """make_loss looked at the fields of a class, which a graph cannot."""
    torch._dynamo.reset()
    case = random_case(n=6, v=30).to(torch.float32)

    def made(*sides):
        return fused_linear_loss(make_loss(name, temperature=2.0), *sides)

    compiled = torch.compile(made, backend="eager", fullgraph=True)
    for ours, truth in zip(run(compiled, case), run(made, case), strict=True):
        torch.testing.assert_close(ours, truth)


@every_formula
@pytest.mark.parametrize("n", [200, 1000])
def test_memory_stays_within_the_budget(n, name):
    budget, v, d = 4 << 20, 4096, 32
    case = random_case(n, v, d, d).to(torch.float32)
    options = {"budget_bytes": budget, "backend": "torch"}
    returned = 4 * (n * d + v * d)

    def step():
        fused(name, **options)(*case).backward()
        case.student_hidden.grad = case.student_weight.grad = None

    assert peak_extra_bytes(step) <= budget + 2 * returned + 64 * n
    assert 2 * 4 * n * v > budget, "full logits must not fit the budget"


@every_formula
def test_labels_add_their_cross_entropy(name):
    case = random_case(n=6, v=30).to(torch.float64)
    labels = torch.tensor([3, -100, 29, 0, 7, 30])
    loss, rows = fused_linear_loss(make_loss(name), *case, labels=labels, return_metrics=True)
    scored = labels.where(labels < 30, -100)
    hard = torch.nn.functional.cross_entropy(case[0] @ case[1].T, scored, ignore_index=-100)
    torch.testing.assert_close(loss, eager(name)(*case) + hard)
    assert set(rows) == {"loss", "cross_entropy"} and rows["cross_entropy"].shape == (6,)


def test_every_field_of_a_loss_is_checked_and_unknown_ones_are_refused():
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got 1.5; 0.1 is DistiLLM's"):
        make_loss("skew_kl", alpha=1.5)
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0.0"):
        make_loss("total_variation", temperature=0.0)
    with pytest.raises(ValueError, match=r"skew_kl are temperature, alpha, got beta="):
        make_loss("skew_kl", beta=0.5)
    with pytest.raises(ValueError, match=r"name must be one of jsd, skew_kl, .*got 'kl'"):
        make_loss("kl")
    with pytest.raises(ValueError, match=r"got 'skewkl'; did you mean skew_kl\?$"):
        make_loss("skewkl")
    case = random_case(n=2, v=5)
    message = r"must be a loss over one vocabulary, got 'jsd'; .* or make_loss\('skew_kl'\)"
    with pytest.raises(ValueError, match=message):
        fused_linear_loss("jsd", *case)


def test_a_loss_without_a_kernel_runs_on_the_torch_backend_alone():
    @dataclasses.dataclass(frozen=True)
    class SquaredDifference(FormulaLoss):
        name: ClassVar[str] = "squared_difference"

        def entries(self, log_q, log_p, log_ratio):
            q, p = log_q.exp(), log_p.exp()
            return (q - p) ** 2, 2 * (q - p) * q

    case = random_case(n=4, v=11).to(torch.float64)
    loss = fused_linear_loss(SquaredDifference(), *case)
    q, p = (torch.softmax(case[i] @ case[i + 1].T, -1) for i in (0, 2))
    truth = ((q - p) ** 2).sum(-1).mean()
    torch.testing.assert_close(loss, truth)
    for ours, expected in zip(
        torch.autograd.grad(loss, case[:2]), torch.autograd.grad(truth, case[:2]), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="backend 'triton' is not among those of squared_differ"):
        fused_linear_loss(SquaredDifference(), *case, backend="triton")


def test_the_module_is_the_function():
    case = random_case(n=6, v=30).to(torch.float32)
    module = FusedLinearLoss(make_loss("jsd", beta=0.3), chunk_size=2)
    torch.testing.assert_close(module(*case), fused_linear_jsd(*case, beta=0.3, chunk_size=2))


def test_a_subclass_leaves_its_parent_alone():
    class Doubled(type(make_loss("skew_kl"))):
        def entries(self, log_q, log_p, log_ratio):
            f, s = super().entries(log_q, log_p, log_ratio)
            return 2 * f, 2 * s

    assert Doubled.kernel_entries is None, "a parent's kernel has the parent's formula"
    case = random_case(n=3, v=9).to(torch.float64)
    before = fused_linear_loss(make_loss("skew_kl"), *case)
    with pytest.raises(ValueError, match="must have a name of its own, got Doubled with the name"):
        fused_linear_loss(Doubled(), *case)
    assert torch.equal(fused_linear_loss(make_loss("skew_kl"), *case), before)
    with pytest.raises(ValueError, match="name must be new, got 'skew_kl', the name of gold_kern"):

        class Taken(FormulaLoss):
            name: ClassVar[str] = "skew_kl"


def test_the_first_number_of_a_loss_is_its_own():
    assert type(make_loss("skew_kl"))(0.3) == make_loss("skew_kl", alpha=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_scale": 0}, "logit_scale must be finite and not 0"),
        ({"final_logit_softcapping": -1.0}, "None or positive and finite, got -1.0"),
        ({"vocab_size": -3}, "vocab_size must be a whole number, 1 at least, got -3"),
        ({"budget_bytes": None}, "budget_bytes must be at least 1, got None"),
        ({"chunk_size": "4"}, "chunk_size must be a whole number of rows"),
    ],
)
def test_a_module_checks_its_options_when_it_is_built(options, message):
    with pytest.raises(ValueError, match=f"FusedLinearLoss: .*{message}"):
        FusedLinearLoss(make_loss("jsd"), **options)
    with pytest.raises(ValueError, match="row_loss must be a loss over one vocabulary"):
        FusedLinearLoss("jsd")
