"""fused_linear_projected_jsd against the float64 oracle, on every backend.

N scored rows, G groups, V vocabulary (V_s, V_t).
"""

import pytest
import torch

from gold_kernels import (
    VocabProjection,
    fused_linear_jsd,
    fused_linear_projected_jsd,
    peak_extra_bytes,
    reference,
)
from support.backends import IMPLEMENTATIONS, on_every_backend
from support.error_budget import relative_error
from support.jsd_cases import near_converged_case, random_case, run_oracle
from support.same_tokens import same_projection
from support.uld_cases import uld_case

TEMPERATURE = (1.25, 0.75)
CASES = {kind: uld_case(kind, has_labels=True) for kind in ("pairs", "bayesian")}


def random_projection(v_student=301, v_teacher=411, seed=0):
    """A tokenizer of one entry less than the student's head and six less than the teacher's, with
    rows of no entry and an entry of the teacher with many rows.
    """
    generator = torch.Generator().manual_seed(seed)
    size = v_student - 1
    columns = torch.randint(v_teacher - 6, (size, 4), generator=generator)
    columns[: size // 5, 0] = 7
    sizes = torch.randint(0, 5, (size, 1), generator=generator)
    columns = torch.where(torch.arange(4) < sizes, columns, -1)
    weights = torch.rand(size, 4, generator=generator) + 0.1
    return VocabProjection.from_entries(columns, weights, v_teacher - 6)


PROJECTION = random_projection()


def oracle(kind, beta, has_labels=True):
    case = CASES[kind]

    def eager(hidden, weight, teacher, teacher_weight, row_weights, student_bias, **_):
        logits = hidden @ weight.T + student_bias
        loss = reference.projected_jsd(
            *(logits, teacher @ teacher_weight.T, PROJECTION, row_weights),
            alignment=case.options["alignment"],
            beta=beta,
            temperature=TEMPERATURE,
        )
        return loss + has_labels * case.hard_loss(logits)

    return case.run(eager, torch.float64)


def fused(kind, dtype, device="cpu", beta=0.0, has_labels=True, **options):
    def function(*tensors, student_bias, labels, label_weights, alignment, **_):
        hard = {"labels": labels, "label_weights": label_weights} if has_labels else {}
        return fused_linear_projected_jsd(
            *(*tensors[:4], PROJECTION, tensors[4]),
            alignment=alignment,
            beta=beta,
            temperature=TEMPERATURE,
            student_bias=student_bias,
            **hard,
            **options,
        )

    return CASES[kind].run(function, dtype, device)


@on_every_backend
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", CASES)
def test_loss_and_gradients_are_the_oracles(kind, beta, has_labels, device, backend):
    truth = oracle(kind, beta, has_labels)
    dtype = torch.float64 if backend == "torch" else torch.float32
    actual = fused(kind, dtype, device, beta, has_labels, backend=backend, chunk_size=3)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < (1e-12 if backend == "torch" else 2e-6)


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_near_convergence_it_is_the_jsd_and_keeps_its_digits(beta, device, backend):
    """With one tokenizer every entry is projected to itself."""
    case = near_converged_case()
    size = case.student_weight.shape[0]
    same = same_projection(size)
    truth = run_oracle(case, beta=beta)
    near = case.to(torch.float32, device)
    loss = fused_linear_projected_jsd(*near, same, beta=beta, backend=backend)
    actual = [loss, *torch.autograd.grad(loss, near[:2])]
    value_bound = 1e-4
    if device == "cuda":  # adds up logits in another order: a rounding of them moves a divergence
        # d by sqrt(d) times as much, since its gradient is about sqrt(d). 1.01e-4 on an H200.
        largest = (case.student_hidden @ case.student_weight.T).abs().max()
        rounding = torch.finfo(torch.float32).eps * largest
        value_bound = float(rounding / truth[0].sqrt())  # 1.6e-4
    for ours, expected, bound in zip(actual, truth, (value_bound, 1e-4, 1e-4), strict=True):
        assert relative_error(ours.cpu(), expected) < bound


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_lose_what_their_gemms_lose(dtype, device, backend):
    actual, truth = fused("bayesian", dtype, device, backend=backend), oracle("bayesian", 0.0)
    for ours, expected in zip(actual, truth, strict=True):
        assert relative_error(ours.cpu(), expected) < 4 * torch.finfo(dtype).eps + 1e-3


@on_every_backend
@pytest.mark.parametrize("chunk_size", [1, 5, None])
def test_the_chunk_size_does_not_change_anything(chunk_size, device, backend):
    actual = fused("bayesian", torch.float32, device, backend=backend, chunk_size=chunk_size)
    whole = fused("bayesian", torch.float32, device, backend=backend, chunk_size=3)
    for ours, truth in zip(actual, whole, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("at_a_time", [1, 2, 4, 16])
def test_rows_that_share_memory_do_not_change_anything(at_a_time, monkeypatch):
    triton_rows = pytest.importorskip("gold_kernels.projection.triton_rows")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = fused("bayesian", torch.float32, device, backend="triton")
    monkeypatch.setattr(triton_rows, "ROWS", at_a_time)
    parts = fused("bayesian", torch.float32, device, backend="triton")
    for ours, truth in zip(parts, whole, strict=True):
        assert torch.equal(ours, truth)


def test_memory_that_rows_share_is_a_part_of_the_budget():
    triton_rows = pytest.importorskip("gold_kernels.projection.triton_rows")
    one, own = triton_rows.rows_at_a_time(PROJECTION.folds, 0)
    assert one == 1 and own >= 4 * (300 + PROJECTION.folds.num_folds)
    assert triton_rows.rows_at_a_time(PROJECTION.folds, 4 * own + 1) == (4, 4 * own)
    assert triton_rows.rows_at_a_time(PROJECTION.folds, 1 << 30)[0] == triton_rows.ROWS


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_with_one_vocabulary_it_is_the_generalized_jsd(beta, device, backend):
    case = random_case(n=7, v=90).to(torch.float32, device)
    ours = fused_linear_projected_jsd(*case, same_projection(90), beta=beta, backend=backend)
    plain = fused_linear_jsd(*case, beta=beta, backend=backend)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    leaves = case.student_hidden, case.student_weight
    for one, other in zip(*(torch.autograd.grad(x, leaves) for x in (ours, plain)), strict=True):
        assert relative_error(one, other) < 1e-5


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_identical_models_with_one_tokenizer_lose_nothing(beta, device, backend):
    hidden, weight = torch.randn(7, 16, device=device), torch.randn(50, 16, device=device)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = fused_linear_projected_jsd(
        *(*leaves, hidden, weight, same_projection(50)), beta=beta, backend=backend
    )
    assert abs(float(loss.detach())) < 1e-6
    assert all(float(grad.abs().max()) < 1e-6 for grad in torch.autograd.grad(loss, leaves))


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_near_convergence_the_gradient_is_right(beta, device, backend):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(301, 16)
    logits = hidden @ weight.T
    matrix = torch.zeros(300, 405)
    matrix.scatter_add_(1, PROJECTION.columns.clamp_min(0), PROJECTION.weights)
    projected = logits[:, :300].double().softmax(-1) @ matrix.double()
    noise = 1e-2 * torch.randn(9, 405, generator=generator)
    teacher = (projected + 1e-9).log() + noise  # a teacher whose head is the identity
    head = torch.eye(405)
    leaf = hidden.double().requires_grad_()
    loss = reference.projected_jsd(leaf @ weight.double().T, teacher, PROJECTION, beta=beta)
    (expected,) = torch.autograd.grad(loss, leaf)
    leaf = hidden.to(device).requires_grad_()
    tensors = (t.float().to(device) for t in (weight, teacher, head))
    ours = fused_linear_projected_jsd(leaf, *tensors, PROJECTION, beta=beta, backend=backend)
    (grad,) = torch.autograd.grad(ours, leaf)
    assert relative_error(ours.cpu(), loss) < 2e-3
    assert relative_error(grad.cpu(), expected) < 2e-3


@on_every_backend
def test_masked_columns_have_the_floor_and_stay_finite(device, backend):
    case = CASES["bayesian"]
    hidden, weight, teacher, teacher_weight, _ = case.tensors
    bias = torch.zeros(301).double()
    bias[:60] = -torch.inf
    options = {"alignment": case.options["alignment"], "beta": 0.5}
    leaf = hidden.clone().requires_grad_()
    logits = leaf @ weight.T + bias, teacher @ teacher_weight.T
    (expected,) = torch.autograd.grad(reference.projected_jsd(*logits, PROJECTION, **options), leaf)
    leaf = hidden.float().to(device).requires_grad_()
    tensors = (t.float().to(device) for t in (weight, teacher, teacher_weight))
    loss = fused_linear_projected_jsd(
        *(leaf, *tensors, PROJECTION),
        student_bias=bias.float().to(device),
        backend=backend,
        **options,
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    assert relative_error(grad.cpu(), expected) < 1e-5


@on_every_backend
def test_groups_of_weight_zero_and_rows_in_none_contribute_nothing(device, backend):
    case = CASES["bayesian"]
    alignment = case.options["alignment"]
    tensors = [t.float().to(device) for t in case.tensors]
    dead = [
        3,
        *(row for row, group in zip(*_rows_and_groups(alignment), strict=True) if group == 2),
    ]
    assert float(tensors[4][2]) == 0 and len(dead) == 4
    poisoned = tensors[0].clone()
    poisoned[dead] = float("nan")
    results = []
    for rows in (tensors[0], poisoned):
        leaves = rows.clone().requires_grad_(), tensors[1].clone().requires_grad_()
        loss = fused_linear_projected_jsd(
            *(*leaves, *tensors[2:4], PROJECTION, tensors[4]),
            alignment=alignment,
            backend=backend,
            chunk_size=2,
        )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for clean, ours in zip(*results, strict=True):
        assert torch.equal(clean, ours)


def _rows_and_groups(alignment):
    rows = torch.cat([alignment.student_base_rows, alignment.student_scalar_rows])
    groups = torch.cat([torch.arange(alignment.num_groups), alignment.student_scalar_groups])
    return rows.tolist(), groups.tolist()


def test_first_rows_are_those_of_the_groups_first_tokens():
    alignment = CASES["bayesian"].options["alignment"]
    assert [rows.tolist() for rows in alignment.first_rows()] == [[0, 2, 4, 7, 8], [0, 1, 3, 5, 7]]
    changed = alignment.with_first_base()
    assert changed.student_scalar_rows.tolist() == [1, 5, 6, 9]
    assert changed.student_scalar_groups.tolist() == [0, 2, 2, 4]
    assert changed.teacher_scalar_rows.tolist() == [2]
    for before, after in zip(alignment.sides, changed.sides, strict=True):
        sides = [
            sorted(zip(*(torch.cat(pair).tolist() for pair in parts), strict=True))
            for parts in ([(s[0], s[2]), (s[1], s[3])] for s in (before, after))
        ]
        assert sides[0] == sides[1], "each token at its own row"


@on_every_backend
def test_a_loss_for_every_group_takes_any_upstream_gradient(device, backend):
    case = CASES["bayesian"]
    tensors = [t.float().to(device) for t in case.tensors[:4]]
    upstream = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], device=device)
    grads = []
    for reduction in ("none", "sum"):
        leaves = [leaf.clone().requires_grad_() for leaf in tensors[:2]]
        loss = fused_linear_projected_jsd(
            *(*leaves, *tensors[2:], PROJECTION),
            torch.ones_like(upstream) if reduction == "none" else upstream,
            alignment=case.options["alignment"],
            reduction=reduction,
            backend=backend,
        )
        seed = upstream if reduction == "none" else None
        grads.append(torch.autograd.grad(loss, leaves, seed))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck_in_float64():
    case = uld_case("bayesian", sizes=(11, 19))
    projection = random_projection(11, 19)
    hidden, weight, teacher, teacher_weight, row_weights = case.tensors
    leaves = [leaf[:, :6].clone().requires_grad_() for leaf in (hidden, weight)]
    assert torch.autograd.gradcheck(
        lambda rows, head: fused_linear_projected_jsd(
            *(rows, head, teacher, teacher_weight, projection, row_weights),
            alignment=case.options["alignment"],
            beta=0.3,
            chunk_size=3,
        ),
        leaves,
    )


# the interpreter of kernels copies what they are given
@pytest.mark.parametrize(
    ("device", "backend"), [one for one in IMPLEMENTATIONS if one != ("cpu", "triton")]
)
def test_memory_stays_within_the_budget(device, backend):
    """Full logits of both sides alone would be several times the bound."""
    n, v_student, v_teacher, budget = 400, 4000, 6000, 220_000
    shapes = ((n, 8), (v_student, 8), (n, 8), (v_teacher, 8))
    hidden, *others = (torch.randn(*shape, device=device) for shape in shapes)
    hidden.requires_grad_()
    projection = random_projection(v_student, v_teacher).to(device)

    def step():
        fused_linear_projected_jsd(
            *(hidden, *others, projection), budget_bytes=budget, backend=backend
        ).backward()

    step()
    room = 30 * 4 * 2**15 if backend == "torch" else 0  # temporaries of a block of rows
    bound = budget + room + 2**16
    assert 4 * n * (v_student + v_teacher) > 3 * bound
    assert peak_extra_bytes(step, device) < bound


def test_metrics_are_masses_of_what_is_compared():
    hidden, weight, teacher, teacher_weight, _ = CASES["pairs"].tensors
    _, metrics = fused_linear_projected_jsd(
        *(hidden, weight, teacher, teacher_weight, PROJECTION), return_metrics=True
    )
    q, p = (hidden @ weight.T).softmax(-1)[:, :300], (teacher @ teacher_weight.T).softmax(-1)
    masses = q @ PROJECTION.weights.double().sum(1)
    torch.testing.assert_close(metrics.student_projected_mass, masses)
    reached = PROJECTION.folds.teacher_ids.long()
    torch.testing.assert_close(metrics.teacher_projected_mass, p[:, reached].sum(-1))


def test_what_does_not_fit_is_named():
    heads = CASES["pairs"].tensors[:4]
    function = "^fused_linear_projected_jsd: "
    none = VocabProjection.from_entries(torch.full((3, 1), -1), torch.zeros(3, 1), 5)
    for wrong, message in (
        (None, "projection must be a VocabProjection, got NoneType; pass VocabProjection.from_tok"),
        (random_projection(400, 411), "the projection is of tokenizers with 399 and 405 entries, "),
        (none, "the projection must reach an entry of the teacher, got none"),
    ):
        with pytest.raises(ValueError, match=function + message):
            fused_linear_projected_jsd(*heads, wrong)
    late = uld_case("observed").options["alignment"]
    with pytest.raises(ValueError, match=function + "alignment must be .* got 'observed'"):
        fused_linear_projected_jsd(*CASES["bayesian"].tensors[:4], PROJECTION, alignment=late)
    with pytest.raises(ValueError, match=function + r"beta must be in \[0, 1\]"):
        fused_linear_projected_jsd(*heads, PROJECTION, beta=2.0)
