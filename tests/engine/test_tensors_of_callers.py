"""Tensors as callers hold them: made in inference mode, views of one another, sparse or nested."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gold_kernels import (
    FusedLinearJSDLoss,
    HeadMeans,
    VocabOverlap,
    VocabProjection,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_mean_kl,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
    head_means,
    head_top_k,
    jsd_loss,
    uld_loss,
)
from gold_kernels.engine import linear
from support.backends import on_every_backend
from support.uld_cases import uld_case

CASE = uld_case("bayesian")
HIDDEN, WEIGHT, TEACHER, TEACHER_WEIGHT, _ = (t.float() for t in CASE.tensors)
ALIGNMENT = CASE.options["alignment"]
IDS = torch.arange(20).reshape(10, 2)


def copied(alignment):
    fields = alignment._asdict().items()
    return alignment._replace(**{k: t.clone() for k, t in fields if isinstance(t, torch.Tensor)})


def loss_of(name, leaves, teacher, head, alignment, ids, labels, reduction="none"):
    options = {"reduction": reduction}
    if name == "jsd":
        pair = torch.cat([teacher, teacher[:2]]), head[:301]
        return fused_linear_jsd(*leaves, *pair, labels=labels, **options)
    if name == "top_k":
        return fused_linear_top_k(*leaves, ids, -3.0 - ids.float(), labels=labels, **options)
    if name == "uld":
        return fused_linear_uld(*leaves, teacher, head, alignment=alignment, **options)
    return fused_linear_chunk_likelihood(*leaves, teacher, head, alignment, **options)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("name", ["jsd", "top_k", "uld", "likelihood"])
def test_a_teacher_of_inference_mode_is_taken_where_backward_needs_it_again(name, is_trained):
    """Autograd saves no such tensors."""
    given = TEACHER, TEACHER_WEIGHT, ALIGNMENT, IDS, torch.arange(10)
    with torch.inference_mode():
        of_inference = [copied(t) if t is ALIGNMENT else t.clone() for t in given]
    grads = []
    for tensors in (given, of_inference):
        leaves = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(is_trained)
        loss_of(name, leaves, *tensors).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves[: 1 + is_trained]])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("loss", [jsd_loss, uld_loss])
def test_in_place_is_refused_where_the_gradient_would_overwrite_the_teacher(loss):
    """Rows of the student are overwritten before the teacher's were read: other numbers."""
    logits = torch.randn(1001, 60)
    for own, teacher in ((slice(1, 1001), slice(0, 1000)), (slice(0, 1000), slice(1, 1001))):
        student = logits.clone().requires_grad_() * 1
        with pytest.raises(
            ValueError, match=r"share no memory with teacher_logits.*in_place=False"
        ):
            loss(student[own], student.detach()[teacher], in_place=True)
    for teacher in (slice(0, 500), slice(500, 1000)):  # the very rows, and rows beside them
        grads = []
        for in_place in (True, False):
            leaf = logits.clone().requires_grad_()
            student = leaf * 1
            value = loss(student[:500], student.detach()[teacher], in_place=in_place)
            grads.append(torch.autograd.grad(value, leaf)[0])
        assert torch.equal(*grads)


def test_sparse_and_nested_tensors_are_refused_by_name():
    heads = [torch.randn(4, 8), torch.randn(20, 8), torch.randn(4, 6), torch.randn(20, 6)]
    for place, name in enumerate(("student_hidden", "student_weight")):
        given = [t.to_sparse() if i == place else t for i, t in enumerate(heads)]
        with pytest.raises(
            ValueError, match=f"{name} must be a dense tensor, got torch.sparse_coo"
        ):
            fused_linear_jsd(*given)
    nested = torch.nested.nested_tensor([torch.randn(2, 8)] * 2, layout=torch.jagged)
    with pytest.raises(ValueError, match="student_hidden must be a dense tensor, got"):
        fused_linear_jsd(nested, *heads[1:])


def strided(tensor):
    """The same numbers, every third of a wider tensor whose others are not its."""
    wide = torch.full((tensor.shape[0], 3, *tensor.shape[1:]), 7, dtype=tensor.dtype)
    wide[:, 1] = tensor.cpu()
    return wide.to(tensor.device)[:, 1]


@on_every_backend
@pytest.mark.parametrize("name", ["hybrid", "likelihood", "projected", "mean_kl", "top_k"])
def test_tables_of_any_stride_give_the_same_loss(name, device, backend):
    """Kernels read every tensor of an alignment, and of means, at stride 1: other tokens."""
    case = uld_case("bayesian", has_overlap=True, has_labels=True)
    hidden, weight, teacher, head, weights = (t.float().to(device) for t in case.tensors)
    alignment, overlap = case.options["alignment"].to(device), case.options["overlap"]
    means = head_means(hidden.detach() + 1, weight, weight, backend=backend)
    columns = torch.randint(-1, 400, (300, 2), generator=torch.Generator().manual_seed(0))
    projections = [
        VocabProjection.from_entries(side(columns), side(torch.ones(300, 2)), 400).to(device)
        for side in (torch.clone, strided)
    ]

    def run(change, projection):
        leaf = hidden.clone().requires_grad_()
        sides = leaf, weight, teacher, head
        own = alignment._replace(
            **{k: change(t) for k, t in alignment._asdict().items() if isinstance(t, torch.Tensor)}
        )
        rows, labels = change(weights), change(case.options["labels"].to(device))
        options = {"labels": labels, "backend": backend}
        if name == "hybrid":
            pairs = VocabOverlap(*map(change, overlap[:2]), *overlap[2:]).to(device)
            loss = fused_linear_uld(*sides, rows, alignment=own, overlap=pairs, **options)
        elif name == "likelihood":
            loss = fused_linear_chunk_likelihood(*sides, own, rows, **options)
        elif name == "projected":
            loss = fused_linear_projected_jsd(*sides, projection, rows, alignment=own, **options)
        elif name == "mean_kl":
            loss = fused_linear_mean_kl(leaf, weight, HeadMeans(*map(change, means)), **options)
        else:
            ids = change(IDS.to(device))
            loss = fused_linear_top_k(leaf, weight, ids, change(-3.0 - ids), **options)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    expected, actual = run(torch.clone, projections[0]), run(strided, projections[1])
    assert all(map(torch.equal, actual, expected))


@on_every_backend
@pytest.mark.parametrize("loss", [jsd_loss, uld_loss])
def test_in_place_is_an_error_where_a_function_has_saved_the_logits(loss, device, backend):
    """Its gradient would be that of other numbers; a kernel of Triton tells autograd nothing."""
    leaf = torch.randn(6, 32, device=device, requires_grad=True)
    teacher = torch.randn(6, 32, device=device)
    value = loss(leaf.tanh(), teacher, in_place=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_transforms_of_torch_func_are_refused_by_name():
    heads = [torch.randn(4, 8), torch.randn(20, 8), torch.randn(4, 6), torch.randn(20, 6)]
    message = "must be a tensor outside of torch.func, got one of grad, vmap or the like"
    with pytest.raises(ValueError, match=f"student_hidden {message}"):
        torch.func.grad(lambda hidden: fused_linear_jsd(hidden, *heads[1:]))(heads[0])
    with pytest.raises(ValueError, match=f"teacher_logits {message}"):
        torch.func.vmap(lambda teacher: jsd_loss(heads[0], teacher))(torch.randn(2, 4, 8))
    (grad,) = torch.autograd.grad(fused_linear_jsd(heads[0].requires_grad_(), *heads[1:]), heads[0])
    assert grad.any()


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_tensors_that_have_shapes_alone_give_shapes(mode):
    """No look at labels, ids, tokens or a bias, of which there are no numbers."""
    with mode():
        leaf = torch.randn(4, 8, requires_grad=True)
        heads, bias = (torch.randn(20, 8), torch.randn(4, 8), torch.randn(20, 8)), torch.randn(20)
        labels, ids = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int64)
        means = head_means(heads[1], heads[2], heads[0], student_bias=bias)
        losses = [
            FusedLinearJSDLoss()(leaf, *heads, labels),
            fused_linear_top_k(leaf, heads[0], *head_top_k(heads[1], heads[2], 2)),
            fused_linear_top_k(leaf, heads[0], ids, torch.zeros(4, 2)),
            fused_linear_mean_kl(leaf, heads[0], means, student_bias=bias),
        ]
        assert all(loss.shape == () for loss in losses)
        assert all(torch.autograd.grad(loss, leaf)[0].shape == (4, 8) for loss in losses)


def test_tables_that_have_numbers_give_shapes_within_a_fake_mode():
    """Memory is planned so: states are fake, tokens those of a batch that was read."""
    labels = CASE.options.get("labels", torch.zeros(10, dtype=torch.int64))
    projection = VocabProjection.from_entries(torch.zeros(301, 1).long(), torch.ones(301, 1), 411)
    with FakeTensorMode(allow_non_fake_inputs=True):
        leaf, weight = torch.randn(10, 16, requires_grad=True), torch.randn(301, 16)
        sides = leaf, weight, torch.randn(8, 24), torch.randn(411, 24)
        losses = [
            fused_linear_uld(*sides, alignment=ALIGNMENT),
            fused_linear_chunk_likelihood(*sides, ALIGNMENT),
            fused_linear_projected_jsd(*sides, projection, alignment=ALIGNMENT),
            fused_linear_top_k(leaf, weight, IDS, torch.randn(10, 2)),
            FusedLinearJSDLoss()(leaf, weight, torch.randn(10, 24), sides[3][:301], labels),
        ]
        assert all(loss.shape == () for loss in losses)
        assert all(torch.autograd.grad(loss, leaf)[0].shape == (10, 16) for loss in losses)


@pytest.mark.parametrize("name", ["jsd", "top_k", "uld", "likelihood", "mean_kl"])
def test_no_loss_computes_a_gradient_without_grad_mode(name, monkeypatch):
    """An evaluation would pay for a gradient of the head."""
    given = TEACHER, TEACHER_WEIGHT, ALIGNMENT, IDS, torch.arange(10)
    means = head_means(HIDDEN, WEIGHT, WEIGHT)
    leaves = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_(name != "mean_kl")
    asked, run_chunks = [], linear.run_chunks

    def watched(*args, **kwargs):
        asked.append(any(args[4]))
        return run_chunks(*args, **kwargs)

    monkeypatch.setattr(linear, "run_chunks", watched)
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            if name == "mean_kl":
                fused_linear_mean_kl(*leaves, means)
            else:
                loss_of(name, leaves, *given, reduction="sum")
    assert asked == [True, False, False]
