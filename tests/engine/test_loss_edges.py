"""Where losses used to be wrong: near convergence, at the ends of beta, on masked columns, in other
default dtypes, on the meta device, and with inputs that do not fit.
"""

import pytest
import torch

from gold_kernels import (
    FusedLinearULDLoss,
    TokenAlignment,
    VocabOverlap,
    VocabProjection,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
    jsd_loss,
    reference,
    uld_loss,
)
from support.backends import on_every_backend
from support.error_budget import relative_error
from support.jsd_cases import near_converged_case, random_case, run, run_fused, run_oracle
from support.uld_cases import uld_case


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.3])
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 3e-4, 1e-4])
def test_the_value_near_convergence_is_right(noise, beta, device, backend):
    """p and q differ by less than float32 keeps of either."""
    case = near_converged_case(noise=noise).to(torch.float32, device)
    exact = [t.detach().cpu().double() for t in case]
    truth = float(reference.linear_jsd(*exact, beta=beta))
    loss, metrics = fused_linear_jsd(*case, beta=beta, backend=backend, return_metrics=True)
    if beta in (0.0, 1.0):  # in between, weights of order 1 leave a rounding of 1e-10
        assert abs(float(loss.detach()) / truth - 1) < 1e-3
    for name, side in (("forward_kl", 0.0), ("reverse_kl", 1.0)):
        expected = float(reference.linear_jsd(*exact, beta=side))
        assert abs(float(getattr(metrics, name).mean()) / expected - 1) < 1e-3


@on_every_backend
@pytest.mark.parametrize("gap", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("is_near_one", [False, True])
def test_both_ends_of_beta_are_exact(gap, is_near_one, device, backend):
    beta = 1 - gap if is_near_one else gap
    case = random_case(n=12, v=101)
    truth = run_oracle(case, beta=beta)
    actual = run_fused(case.to(torch.float32, device), beta=beta, backend=backend)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < 2e-5


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_a_column_masked_on_one_side_has_the_gradient_of_the_reference(side, beta, device, backend):
    """No gradient goes through the floor of a masked column."""
    case = random_case(n=8, v=33)
    bias = torch.zeros(33)
    bias[5] = -torch.inf
    biases = {f"{name}_bias": bias for name in ("student", "teacher") if side in (name, "both")}
    double = case.to(torch.float64)
    truth = run(
        reference.linear_jsd, double, beta=beta, **{k: b.double() for k, b in biases.items()}
    )
    options = {name: value.to(device) for name, value in biases.items()}
    actual = run_fused(case.to(torch.float32, device), beta=beta, backend=backend, **options)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < 2e-5


@on_every_backend
@pytest.mark.parametrize("offset", [-20.0, 0.0, 10.0, 30.0])
def test_reverse_kl_keeps_what_is_left_beside_a_column_that_the_teacher_masks(
    offset, device, backend
):
    """The masked column pulls with 1e6: in one sum with it, float32 lost all other entries."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 33, generator=generator) for _ in range(2))
    student[:, 5] = offset  # from 1e-9 of the student's mass to all but 1e-12
    teacher[:, 5] = -torch.inf
    leaf = student.double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.jsd_rows(leaf, teacher.double(), beta=1.0).sum(), leaf)
    # The gradient of a row sums to 0. Of a probability of 1 - 1e-12 float64 has too few digits.
    truth[:, 5] -= truth.sum(1)
    leaf = student.to(device).requires_grad_()
    ones = torch.ones(6, device=device)
    loss = jsd_loss(leaf, teacher.to(device), ones, beta=1.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    for column in (slice(5), slice(5, 6), slice(6, 33)):
        assert relative_error(grad[:, column].cpu(), truth[:, column]) < 4e-5


@on_every_backend
@pytest.mark.parametrize("is_uld", [False, True])
def test_a_label_on_a_masked_column_has_the_floor_and_no_gradient(is_uld, device, backend):
    case = random_case(n=4, v=20).to(torch.float32, device)
    bias = torch.zeros(20, device=device)
    bias[3] = -torch.inf
    labels = torch.tensor([3, 3, 7, 3], device=device)
    function = fused_linear_uld if is_uld else fused_linear_jsd
    loss, metrics = function(
        *case,
        torch.zeros(4, device=device),
        labels=labels,
        label_weights=torch.ones(4, device=device),
        student_bias=bias,
        backend=backend,
        return_metrics=True,
    )
    expected = torch.tensor([1e6, 1e6, 0, 1e6])
    assert relative_error(metrics.cross_entropy.cpu().where(expected > 0, 0), expected) < 1e-6
    grad = torch.autograd.grad(loss, case.student_hidden)[0]
    assert not grad[[0, 1, 3]].any() and grad[2].any()


def test_one_floor_of_the_rest_of_a_span_everywhere():
    """A span over a vocabulary of one entry has probability 1 on both sides."""
    from gold_kernels.engine.probabilities import SMALLEST_REST
    from gold_kernels.uld import entries, torch_rows
    from gold_kernels.uld import reference as uld_reference

    assert entries.SMALLEST_REST.value == SMALLEST_REST
    assert torch_rows.SMALLEST_REST is uld_reference.SMALLEST_REST is SMALLEST_REST
    assert torch.tensor(SMALLEST_REST).double() == pytest.approx(SMALLEST_REST), "in float32 too"


@pytest.mark.parametrize("function", [fused_linear_jsd, fused_linear_uld])
def test_a_teacher_that_requires_a_gradient_gets_none(function):
    student, head = torch.randn(4, 8), torch.randn(20, 8)
    teacher, teacher_head = (t.requires_grad_() for t in (torch.randn(4, 6), torch.randn(20, 6)))
    assert not function(student, head, teacher, teacher_head).requires_grad
    loss = function(student.requires_grad_(), head, teacher, teacher_head)
    loss.backward()
    assert student.grad is not None and teacher.grad is None and teacher_head.grad is None


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("function", [fused_linear_jsd, fused_linear_uld])
def test_the_meta_device_has_shapes(function, reduction):
    shapes = ((5, 8), (20, 8), (5, 12), (20, 12))
    hidden, weight, *teacher = (torch.empty(*shape, device="meta") for shape in shapes)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = function(*leaves, *teacher, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), leaves)
    assert loss.shape == (() if reduction == "sum" else (5,))
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    for loss in (jsd_loss, uld_loss):
        assert loss(*(torch.empty(5, 20, device="meta") for _ in range(2))).shape == ()


@on_every_backend
@pytest.mark.parametrize("function", [fused_linear_jsd, fused_linear_uld])
def test_another_default_dtype_changes_no_bit(function, device, backend):
    case = random_case(n=9, v=40).to(torch.float32, device)
    labels = torch.arange(9, device=device)
    options = {"labels": labels, "backend": backend, "chunk_size": 4}
    expected = run(function, case, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = run(function, case, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("loss", ["jsd", "uld"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_takes_every_entry_point_whole(loss, dynamic):
    """With dynamic=True numbers are symbols too."""
    torch._dynamo.reset()
    fused = fused_linear_jsd if loss == "jsd" else fused_linear_uld
    of_logits = jsd_loss if loss == "jsd" else uld_loss

    def step(hidden, weight, teacher, teacher_weight):
        both = fused(hidden, weight, teacher, teacher_weight, temperature=1.3)
        rows = fused(hidden, weight, teacher, teacher_weight, reduction="none", beta=0.3)
        return both + rows.square().sum() + of_logits(hidden @ weight.T, teacher @ teacher_weight.T)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (4, 6):
        case = random_case(n=n, v=30).to(torch.float32)
        for ours, truth in zip(run(compiled, case), run(step, case), strict=True):
            torch.testing.assert_close(ours, truth)


def losses_of_groups(device="cpu"):
    """Functions of student hidden states and head; the last has no teacher."""
    case = uld_case("bayesian")
    *_, teacher, teacher_weight, _ = (t.float().to(device) for t in case.tensors)
    alignment, ids = case.options["alignment"], torch.arange(20, device=device).reshape(10, 2)
    columns = torch.arange(300).unsqueeze(1)
    projection = VocabProjection.from_entries(columns, torch.ones(300, 1), 400)
    pair, groups = (teacher, teacher_weight), {"alignment": alignment, "reduction": "none"}
    return case, {
        "likelihood": lambda *side: fused_linear_chunk_likelihood(*side, *pair, alignment),
        "projected": lambda *side: fused_linear_projected_jsd(*side, *pair, projection, **groups),
        "top_k": lambda *side: fused_linear_top_k(*side, ids, -3.0 * torch.ones_like(ids).float()),
    }


@pytest.mark.parametrize("name", ["likelihood", "projected", "top_k"])
def test_torch_compile_and_the_meta_device_take_losses_of_groups(name):
    torch._dynamo.reset()
    case, functions = losses_of_groups()
    grads = []
    for function in (
        functions[name],
        torch.compile(functions[name], backend="aot_eager", fullgraph=True),
    ):
        leaves = [leaf.float().requires_grad_() for leaf in case.tensors[:2]]
        grads.append(torch.autograd.grad(function(*leaves).square().sum(), leaves))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    case, functions = losses_of_groups("meta")
    shape = functions[name](*(leaf.float().to("meta") for leaf in case.tensors[:2])).shape
    assert shape == ((5,) if name == "projected" else ())


def broken(**changes):
    alignment = uld_case("bayesian").options["alignment"]
    return alignment._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_base_rows": torch.arange(3)}, "the same groups on both sides"),
        ({"student_scalar_ids": torch.arange(1)}, "one row, id and group for each token"),
        ({"student_base_ids": torch.full((5,), 999)}, r"the student's tokens .* in \[0, 301\)"),
        ({"teacher_scalar_ids": torch.full((1,), -5)}, r"the teacher's tokens .* in \[0, 411\)"),
    ],
)
def test_alignments_that_do_not_fit_say_so(changes, message):
    case = uld_case("bayesian")
    size = case.options["alignment"].teacher_scalar_ids.shape
    if "teacher_scalar_ids" in changes:
        changes = {"teacher_scalar_ids": torch.full(size, -5)}
    wrong = broken(**changes)
    assert isinstance(wrong, TokenAlignment)
    with pytest.raises(ValueError, match=message):
        case.run(fused_linear_uld, torch.float32, alignment=wrong)


def test_overlaps_with_repeated_or_foreign_ids_say_so():
    with pytest.raises(ValueError, match="one partner at most, got 3 ids of which 2 differ"):
        VocabOverlap(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 2]), 5, 5)
    with pytest.raises(ValueError, match=r"teacher's ids must be in \[0, 5\), got 0 to 7"):
        VocabOverlap(torch.tensor([0, 1]), torch.tensor([0, 7]), 5, 5)
    with pytest.raises(ValueError, match="must be pairs, got 2 and 1"):
        VocabOverlap(torch.tensor([0, 1]), torch.tensor([0]), 5, 5)


def test_a_float_budget_is_taken_and_a_misspelt_option_is_not():
    case = random_case(n=4, v=20).to(torch.float32)
    assert torch.equal(fused_linear_jsd(*case, budget_bytes=1e9), fused_linear_jsd(*case))
    with pytest.raises(ValueError, match="got chunk_sise=; did you mean chunk_size"):
        FusedLinearULDLoss(chunk_sise=4)
    with pytest.raises(ValueError, match="got labls=; did you mean labels"):
        FusedLinearULDLoss()(*case, labls=torch.arange(4))
