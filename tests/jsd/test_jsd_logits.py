"""jsd_loss, the generalized JSD of logits: the oracle's values, in place or not.

N scored rows, V vocabulary.
"""

import pytest
import torch

from gold_kernels import jsd_loss, peak_extra_bytes
from gold_kernels.jsd import reference
from support.backends import on_every_backend
from support.error_budget import relative_error
from support.jsd_cases import BETAS


def logit_pair(n=9, v=300):
    return 1.5 * torch.randn(n, v), 1.5 * torch.randn(n, v)


def oracle_of(student, teacher, weights=None, **options):
    student = student.double().requires_grad_()
    rows = reference.jsd_rows(student, teacher.double(), **options)
    loss = rows.mean() if weights is None else (rows * weights).sum()
    return loss, torch.autograd.grad(loss, student)[0]


@on_every_backend
@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradient_are_those_of_the_oracle(beta, is_in_place, device, backend):
    student, teacher = logit_pair()
    weights = torch.rand(9)
    weights[2] = 0
    expected = oracle_of(student, teacher, weights, beta=beta, temperature=2.0)
    leaf = student.to(device).requires_grad_()
    logits = leaf * 1.0
    options = {"beta": beta, "temperature": 2.0, "in_place": is_in_place, "backend": backend}
    loss = jsd_loss(logits, teacher.to(device), weights.to(device), **options)
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss.cpu(), expected[0]) < 1e-5
    assert relative_error(leaf.grad.cpu(), expected[1]) < 1e-5
    assert not leaf.grad[2].any()
    assert torch.equal(logits, leaf) != is_in_place, "in place, the gradient lies in the logits"


def test_metrics_match_the_oracle_and_carry_no_graph():
    student, teacher = logit_pair()
    loss, metrics = jsd_loss(student.requires_grad_(), teacher, return_metrics=True)
    expected = reference.row_metrics(student.detach().double(), teacher.double())
    for name, truth in expected.items():
        value = getattr(metrics, name)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.detach(), metrics.loss.mean())


def test_padded_columns_have_no_part_and_no_gradient():
    student, teacher = logit_pair()
    expected = oracle_of(student[:, :290], teacher[:, :290])
    leaf = student.requires_grad_()
    loss = jsd_loss(leaf, teacher[:, :295], vocab_size=290)
    loss.backward()
    assert relative_error(loss, expected[0]) < 1e-5
    assert relative_error(leaf.grad[:, :290], expected[1]) < 1e-5
    assert not leaf.grad[:, 290:].any()


@on_every_backend
def test_logits_and_weights_of_any_stride_and_dtype_give_the_same_loss(device, backend):
    """Kernels read neighbours of a row, and row weights of float32, one behind the other."""
    student, teacher = (logits.to(device) for logits in logit_pair())
    weights = torch.rand(9, 2, device=device).bfloat16().float()
    found = []
    for is_plain in (True, False):
        leaf = student.clone().requires_grad_()
        given = leaf, teacher, weights[:, 1].contiguous()
        if not is_plain:
            given = leaf.T.contiguous().T, teacher.T.contiguous().T, weights[:, 1]
        loss = jsd_loss(*given, backend=backend)
        found.append([loss, torch.autograd.grad(loss, leaf)[0]])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    for dtype in (torch.bfloat16, torch.float64):
        loss = jsd_loss(student, teacher, weights[:, 1].to(dtype), backend=backend)
        assert torch.equal(loss, found[0][0])


def test_float16_gradients_survive_small_weights():
    student, teacher = logit_pair()
    weights = torch.full((9,), 1e-6)
    expected = oracle_of(student.half(), teacher.half(), weights)
    leaf = student.half().requires_grad_()
    (grad,) = torch.autograd.grad(jsd_loss(leaf, teacher.half(), weights) * 65536.0, leaf)
    assert grad.dtype == torch.float16
    assert relative_error(grad, expected[1] * 65536.0) < 2e-3


def test_backward_twice_is_exact_and_refused_in_place():
    student, teacher = logit_pair()
    leaf = student.requires_grad_()
    loss = jsd_loss(leaf, teacher)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    loss = jsd_loss(leaf * 1.0, teacher, in_place=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward needs in_place=False"):
        torch.autograd.grad(loss, leaf)


def test_in_place_allocates_nothing_of_the_size_of_the_logits():
    n, v = 512, 4096
    student, teacher = logit_pair(n, v)
    size = 4 * n * v

    def step(in_place):
        logits = student.clone().requires_grad_() + 0
        jsd_loss(logits, teacher, in_place=in_place).backward()

    extra = {flag: peak_extra_bytes(lambda flag=flag: step(flag)) for flag in (False, True)}
    assert extra[False] > 3 * size, "logits, gradient and its product with grad_loss"
    assert extra[True] < 2 * size + 18 * 4 * (1 << 15), "the clone and the sum only"


def test_without_grad_mode_no_gradient_is_computed_and_logits_stay():
    student, teacher = logit_pair(512, 4096)
    logits = student.clone().requires_grad_() + 0
    assert peak_extra_bytes(lambda: jsd_loss(logits, teacher)) > 4 * logits.numel()
    with torch.no_grad():
        assert peak_extra_bytes(lambda: jsd_loss(logits, teacher)) < 2 * logits.numel()
        jsd_loss(logits, teacher, in_place=True)
    assert logits.equal(student)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: jsd_loss(s[0], t), "student_logits must be (N, V), got shape (300,)"),
        (lambda s, t: jsd_loss(s, t[:, :200]), "must have one vocabulary, got V=300 and V=200"),
        (lambda s, t: jsd_loss(s[:, :0], t[:, :0]), "at least one entry, got V=0 on both sides"),
        (lambda s, t: jsd_loss(s, t[:5]), "must hold the same N rows, got N=9 and N=5"),
        (lambda s, t: jsd_loss(s, t, torch.ones(3)), "shape (N,) = (9,), got (3,)"),
        (lambda s, t: jsd_loss(s, t, beta=2.0), "beta must be in [0, 1]"),
        (lambda s, t: jsd_loss(s.requires_grad_(), t, in_place=True), "got a leaf tensor"),
        (lambda s, t: jsd_loss(s[:, ::2], t[:, ::2], in_place=True), "contiguous student_logits"),
        (lambda s, t: jsd_loss(s, t, in_place=True, vocab_size=20), "and vocab_size 20"),
        (lambda s, t: jsd_loss(s.half(), t, in_place=True), "got torch.float16"),
    ],
)
def test_bad_input_says_what_to_pass(make, message):
    with pytest.raises(ValueError, match="jsd_loss: ") as error:
        make(*logit_pair())
    assert message in str(error.value)


def test_no_rows_give_a_zero_loss_with_a_graph():
    student = torch.randn(0, 30, requires_grad=True)
    loss = jsd_loss(student, torch.randn(0, 30))
    loss.backward()
    assert loss.shape == () and loss.detach() == 0.0 and student.grad.shape == (0, 30)


def test_torch_compile_keeps_one_graph_for_any_number_of_rows():
    def loss_of(student, teacher):
        return jsd_loss(student * 1.0, teacher)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for n in (4, 6, 7, 11):
        student, teacher = logit_pair(n, 40)
        leaf = student.requires_grad_()
        actual, expected = compiled(leaf, teacher), loss_of(leaf, teacher)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(loss, leaf)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*grads)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
