"""fused_linear_uld against the float64 oracle: pairs, groups, hybrid and cross-entropy, on every
backend, and everything that must not change them.

N scored rows, G groups, V vocabulary (V_s, V_t).
"""

import pytest
import torch

from gold_kernels import (
    FusedLinearULDLoss,
    VocabOverlap,
    fused_linear_uld,
    peak_extra_bytes,
    uld_loss,
)
from gold_kernels.uld import reference as reference_uld
from support.backends import IMPLEMENTATIONS, on_every_backend
from support.error_budget import relative_error
from support.uld_cases import COUNTING_GRAD_ERROR, KINDS, uld_case


def test_the_triton_kernel_is_among_the_tested_implementations():
    assert "triton" in {backend for _, backend in IMPLEMENTATIONS}


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("overlap_beta", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_backend_is_the_oracle(kind, overlap_beta, has_labels):
    case = uld_case(
        kind,
        has_overlap=overlap_beta is not None,
        has_labels=has_labels,
        beta=overlap_beta or 0.0,
    )
    actual = case.run(fused_linear_uld, torch.float64, chunk_size=3, backend="torch")
    for name, ours, truth in zip(
        ("loss", "grad_hidden", "grad_weight", "grad_bias"), actual, case.oracle(), strict=True
    ):
        assert relative_error(ours, truth) < 1e-12, name


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_lose_what_their_gemms_lose(dtype, device, backend):
    case = uld_case("bayesian", has_overlap=True, has_labels=True)
    actual = case.run(fused_linear_uld, dtype, device, chunk_size=4, backend=backend)
    assert actual[0].dtype == torch.float32
    assert {grad.dtype for grad in actual[1:]} == {dtype}
    oracle = case.oracle()
    assert relative_error(actual[0].cpu(), oracle[0]) < 1e-3
    for ours, truth in zip(actual[1:], oracle[1:], strict=True):
        assert relative_error(ours.cpu(), truth) < 4 * torch.finfo(dtype).eps + 1e-3


@on_every_backend
@pytest.mark.parametrize("chunk_size", [1, 4, 9, 10, 11, None])
def test_the_chunk_size_does_not_change_anything(chunk_size, device, backend):
    case = uld_case("bayesian", has_overlap=True, has_labels=True)
    options = {"backend": backend, "chunk_size": chunk_size}
    actual = case.run(fused_linear_uld, torch.float32, device, **options)
    whole = case.run(fused_linear_uld, torch.float32, device, backend=backend, chunk_size=3)
    for ours, truth in zip(actual, whole, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-6)


@on_every_backend
def test_identical_models_and_permuted_vocabularies_lose_nothing(device, backend):
    case = uld_case(sizes=(301, 301))
    hidden, weight = case.tensors[0].float().to(device), case.tensors[1].float().to(device)
    order = torch.randperm(301, device=device)
    for teacher_weight in (weight, weight[order]):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fused_linear_uld(*leaves, hidden, teacher_weight, backend=backend)
        grads = torch.autograd.grad(loss, leaves)
        assert float(loss.detach()) < 1e-6
        if teacher_weight is weight:  # an order sees how the sum of another order was rounded
            assert all(float(grad.abs().max()) == 0 for grad in grads)


@on_every_backend
def test_any_permutation_of_a_vocabulary_gives_the_same_loss(device, backend):
    case = uld_case()
    student, weight, teacher, teacher_weight, _ = (t.float().to(device) for t in case.tensors)
    plain = fused_linear_uld(student, weight, teacher, teacher_weight, backend=backend)
    orders = [torch.randperm(side.shape[0], device=device) for side in (weight, teacher_weight)]
    permuted = fused_linear_uld(
        student, weight[orders[0]], teacher, teacher_weight[orders[1]], backend=backend
    )
    torch.testing.assert_close(permuted, plain, rtol=1e-5, atol=0)


@on_every_backend
def test_rows_of_weight_zero_contribute_nothing_whatever_they_hold(device, backend):
    case = uld_case("bayesian", has_overlap=True)
    hidden, weight, teacher, teacher_weight, row_weights = (
        t.float().to(device) for t in case.tensors
    )
    alignment = case.options["alignment"]
    group = 2  # the group of weight 0
    assert float(row_weights[group]) == 0
    dead = [int(alignment.student_base_rows[group]), 3]  # its base row, and a row in no group
    poisoned = hidden.clone()
    poisoned[dead] = float("nan")
    results = []
    for rows in (hidden, poisoned):
        leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {**case.options, "backend": backend, "chunk_size": 2}
        loss = fused_linear_uld(*leaves, teacher, teacher_weight, row_weights, **options)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for clean, ours in zip(*results, strict=True):
        assert torch.equal(clean, ours)


@on_every_backend
def test_a_second_backward_and_a_factor_scale_the_same_gradients(device, backend):
    case = uld_case("bayesian")
    hidden, weight, teacher, teacher_weight, _ = (t.float().to(device) for t in case.tensors)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_linear_uld(
        *leaves, teacher, teacher_weight, alignment=case.options["alignment"], backend=backend
    )
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, leaves)
    for one, two, three in zip(first, again, tripled, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(3 * one, three)


@on_every_backend
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed_exist(needs, device, backend):
    case = uld_case("observed")
    hidden, weight, teacher, teacher_weight, _ = (t.float().to(device) for t in case.tensors)
    options = {"alignment": case.options["alignment"], "backend": backend}
    both = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(
        fused_linear_uld(*both, teacher, teacher_weight, **options), both
    )
    leaves = [leaf.requires_grad_(need) for leaf, need in zip((hidden, weight), needs, strict=True)]
    loss = fused_linear_uld(*leaves, teacher, teacher_weight, **options)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    for leaf, need, truth in zip(leaves, needs, expected, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, truth)


@on_every_backend
def test_a_completion_without_groups_is_a_loss_of_zero_with_a_graph(device, backend):
    case = uld_case()
    hidden, weight, teacher, teacher_weight, _ = (t.float().to(device) for t in case.tensors)
    leaves = hidden[:0].requires_grad_(), weight.requires_grad_()
    loss = fused_linear_uld(*leaves, teacher[:0], teacher_weight, backend=backend)
    assert float(loss.detach()) == 0
    assert all(float(grad.abs().sum()) == 0 for grad in torch.autograd.grad(loss, leaves))


@on_every_backend
def test_metrics_are_those_of_the_oracle(device, backend):
    case = uld_case("bayesian", has_overlap=True)
    hidden, weight, teacher, teacher_weight, _ = (t.float().to(device) for t in case.tensors)
    options = {
        key: value.to(device) if key in ("alignment", "overlap") else value
        for key, value in case.options.items()
    }
    loss, metrics = fused_linear_uld(
        hidden, weight, teacher, teacher_weight, backend=backend, return_metrics=True, **options
    )
    assert {value.shape for value in metrics[:5]} == {(5,)} and metrics.cross_entropy is None
    assert not metrics.loss.requires_grad
    torch.testing.assert_close(loss, metrics.loss.mean())
    expected = 0.75 * metrics.matched_loss + 0.5 * metrics.unmatched_loss
    torch.testing.assert_close(metrics.loss, expected)
    shared, alignment = options["overlap"], options["alignment"]
    sides = (
        (hidden, weight, alignment.sides[0], shared.student_ids, 1.25),
        (teacher, teacher_weight, alignment.sides[1], shared.teacher_ids, 0.75),
    )
    is_merged = alignment.span_ids()[0] >= 0
    assert is_merged.tolist() == [True, True, True, False, True]
    masses = metrics.student_matched_mass, metrics.teacher_matched_mass
    for mass, (rows, head, side, ids, temperature) in zip(masses, sides, strict=True):
        probs = (rows.double() @ head.double().T / temperature).softmax(-1)
        log_q = reference_uld._group_log_probs(probs.log(), side, 1.0)
        truth = probs[side[0]][:, ids].sum(-1)
        truth = torch.where(
            is_merged, log_q.gather(1, side[1].unsqueeze(1)).squeeze(1).exp(), truth
        )
        torch.testing.assert_close(mass.double(), truth, rtol=1e-5, atol=0)


@on_every_backend
def test_soft_capped_and_scaled_heads(device, backend):
    case = uld_case("bayesian", has_labels=True)
    options = {"final_logit_softcapping": (2.0, 3.0), "logit_scale": (0.5, 2.0)}

    def eager(hidden, weight, teacher, teacher_weight, row_weights, student_bias, **rest):
        sides = ((hidden, weight, 0), (teacher, teacher_weight, 1))
        logits = []
        for rows, head, side in sides:
            cap = options["final_logit_softcapping"][side]
            logits.append(cap * torch.tanh(rows @ head.T * options["logit_scale"][side] / cap))
        return reference_uld.uld_loss(*logits, row_weights, weight_hard=1.0, **rest) + 0 * (
            student_bias.sum()
        )

    def fused(*args, student_bias, **rest):
        return fused_linear_uld(*args, **rest, **options) + 0 * student_bias.sum()

    oracle = case.run(eager, torch.float64)
    dtype = torch.float64 if backend == "torch" else torch.float32
    limits = {"backend": backend, "chunk_size": 4}
    actual = case.run(lambda *a, **k: fused(*a, **k, **limits), dtype, device)
    for ours, truth in zip(actual[:3], oracle[:3], strict=True):
        limit = 1e-12 if backend == "torch" else COUNTING_GRAD_ERROR
        assert relative_error(ours.cpu(), truth) < limit


def test_gradcheck_in_float64():
    case = uld_case("bayesian", has_overlap=True, has_labels=True, sizes=(11, 13))
    hidden, weight, teacher, teacher_weight, row_weights = case.tensors
    options = {**case.options, "label_weights": case.label_weights, "chunk_size": 3}
    leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight, case.bias)]
    assert torch.autograd.gradcheck(
        lambda rows, head, bias: fused_linear_uld(
            rows, head, teacher, teacher_weight, row_weights, student_bias=bias, **options
        ),
        leaves,
    )


def test_the_module_is_the_function():
    case = uld_case("bayesian", has_overlap=True, has_labels=True)
    tensors, options = [t.float() for t in case.tensors], dict(case.options)
    of_the_call = {"alignment": options.pop("alignment"), "labels": options.pop("labels")}
    of_the_call["label_weights"] = case.label_weights.float()
    module = FusedLinearULDLoss(**options, chunk_size=3)
    expected = fused_linear_uld(*tensors, **options, **of_the_call, chunk_size=3)
    assert torch.equal(module(*tensors, **of_the_call), expected)


@on_every_backend
def test_the_cross_entropy_is_a_mean_over_labels_without_weights(device, backend):
    case = uld_case("bayesian", has_labels=True)
    tensors, labels = (
        [t.float().to(device) for t in case.tensors],
        case.options["labels"].to(device),
    )
    assert 0 < int((labels < 0).sum()) < labels.shape[0]
    options = {**case.options, "labels": None, "backend": backend}
    soft = fused_linear_uld(*tensors, **options)
    both = fused_linear_uld(*tensors, **options | {"labels": labels})
    labels = labels.where(labels >= 0, -100)
    expected = torch.nn.functional.cross_entropy(tensors[0] @ tensors[1].T, labels)
    torch.testing.assert_close(both - soft, expected, rtol=1e-5, atol=0)


def test_weights_default_to_the_share_of_the_vocabulary():
    case = uld_case(has_overlap=True)
    share = case.options["overlap"].student_share
    assert 0.6 < share < 0.7
    case.options.update(matched_weight=None, unmatched_weight=None)
    actual = case.run(fused_linear_uld, torch.float64)
    case.options.update(matched_weight=share, unmatched_weight=1 - share)
    assert relative_error(actual[1], case.run(fused_linear_uld, torch.float64)[1]) == 0


@pytest.mark.parametrize("num_rows", [256, 1024])
def test_memory_stays_within_the_budget_at_any_number_of_rows(num_rows):
    """A frozen head: the budget alone."""
    v_student, v_teacher, size, budget = 3000, 4000, 32, 1 << 20
    hidden, teacher = torch.randn(num_rows, size), torch.randn(num_rows, size)
    weight, teacher_weight = torch.randn(v_student, size), torch.randn(v_teacher, size)
    hidden.requires_grad_()

    def step() -> None:
        fused_linear_uld(hidden, weight, teacher, teacher_weight, budget_bytes=budget).backward()
        hidden.grad = None

    rows_and_gradients = 4 * num_rows * (size * 3 + 32)
    row_function = 20 * 4 * (1 << 15)  # torch's temporaries of a block, not in the budget
    peak = peak_extra_bytes(step)
    assert peak <= budget + rows_and_gradients + row_function
    assert peak < 4 * num_rows * (v_student + v_teacher), "less than the logits that eager needs"


@pytest.mark.gpu
@pytest.mark.parametrize("has_overlap", [False, True])
@pytest.mark.parametrize("logits_dtype", [None, torch.bfloat16])
def test_memory_of_the_kernels_stays_within_the_budget(logits_dtype, has_overlap):
    v_student, v_teacher, size, budget = 30_000, 40_000, 32, 1 << 25
    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, teacher = (torch.randn(8192, size, **options) for _ in range(2))
    weight, teacher_weight = (torch.randn(v, size, **options) for v in (v_student, v_teacher))
    ids = torch.arange(v_student, device="cuda")
    overlap = VocabOverlap(ids, ids, v_student, v_teacher) if has_overlap else None
    hidden.requires_grad_()

    def step() -> None:
        loss = fused_linear_uld(
            *(hidden, weight, teacher, teacher_weight),
            overlap=overlap,
            logits_dtype=logits_dtype,
            budget_bytes=budget,
        )
        loss.backward()
        hidden.grad = None

    step()  # cuBLAS keeps a workspace from its first product on
    rows_and_gradients = hidden.shape[0] * (4 * size + 64)
    tables = 9 * v_student + v_teacher if has_overlap else 0
    assert peak_extra_bytes(step, "cuda") <= budget + rows_and_gradients + tables


def test_without_grad_mode_no_gradient_is_computed_from_logits():
    student, teacher = torch.randn(512, 4096, requires_grad=True), torch.randn(512, 4096)
    with torch.no_grad():
        without = peak_extra_bytes(lambda: uld_loss(student, teacher))
    assert peak_extra_bytes(lambda: uld_loss(student, teacher)) > without + 3 * student.numel()


def test_torch_compile_takes_the_loss_as_one_operator():
    case = uld_case("bayesian", has_overlap=True)
    tensors = [t.float() for t in case.tensors]
    hidden = tensors[0].requires_grad_()

    def step(rows):
        return fused_linear_uld(rows, *tensors[1:], **case.options, backend="torch")

    (expected,) = torch.autograd.grad(step(hidden), hidden)
    compiled = torch.compile(step, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(hidden), hidden)
    torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
def test_no_host_sync_and_the_same_bits_from_run_to_run():
    case = uld_case("bayesian", has_overlap=True, has_labels=True)
    first = case.run(fused_linear_uld, torch.bfloat16, "cuda", backend="triton")
    tensors = [t.to("cuda", torch.bfloat16) for t in case.tensors[:4]]
    options = {**case.options, "labels": case.options["labels"].cuda()}
    options["alignment"] = options["alignment"].to("cuda")
    options["overlap"] = options["overlap"].to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_linear_uld(*tensors, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        again = case.run(fused_linear_uld, torch.bfloat16, "cuda", backend="triton")
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
