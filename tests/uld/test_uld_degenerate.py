"""fused_linear_uld where there is nothing, or all, of something: entries, groups, matches."""

import pytest
import torch

from gold_kernels import TokenAlignment, VocabOverlap, fused_linear_uld, uld_loss
from gold_kernels.tokens.alignment import SpanGroups
from gold_kernels.uld import reference as reference_uld
from support.backends import on_every_backend
from support.error_budget import relative_error


def overlap(num_matched: int, v_student: int, v_teacher: int) -> dict:
    ids = torch.arange(num_matched)
    shared = VocabOverlap(ids, ids, v_student, v_teacher)
    return {"overlap": shared, "matched_weight": 0.75, "unmatched_weight": 0.5}


def alignment(student: list[int], teacher: list[int], num_groups: int) -> TokenAlignment:
    sides = torch.tensor(student), torch.tensor(teacher)
    ids = torch.zeros(4, dtype=torch.int64)
    return TokenAlignment.from_groups(SpanGroups(*sides, num_groups, 4), ids, ids, 4)


CASES = {
    "no entry matched": ((10, 12), overlap(0, 10, 12)),
    "all of the student matched": ((10, 12), overlap(10, 10, 12)),
    "all of the teacher matched": ((12, 10), overlap(10, 12, 10)),
    "all matched": ((10, 10), overlap(10, 10, 10)),
    "one entry": ((1, 1), overlap(1, 1, 1)),
    "one entry of the student": ((1, 5), {}),
    "one entry of the teacher": ((5, 1), {}),
    "no group": ((10, 12), {"alignment": alignment([-1] * 4, [-1] * 4, 0)}),
    "no group, matched": (
        (10, 12),
        {"alignment": alignment([-1] * 4, [-1] * 4, 0), **overlap(3, 10, 12)},
    ),
    "merged by the student alone": (
        (10, 12),
        {"alignment": alignment([0, 0, 0, 1], [-1, 0, 1, -1], 2), **overlap(3, 10, 12)},
    ),
    "merged by the teacher alone": (
        (10, 12),
        {"alignment": alignment([0, -1, -1, 1], [0, 0, 0, 1], 2), **overlap(3, 10, 12)},
    ),
}


@on_every_backend
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_oracle(name, has_labels, device, backend):
    (v_student, v_teacher), options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 8), (v_student, 8), (4, 6), (v_teacher, 6)
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    weights = torch.tensor([1.0, -100.0, 0.5, 2.0])
    labels = torch.tensor([0, -100, 0, v_student])

    def run(function, dtype, device="cpu", **rest):
        hidden, weight, *teacher = (tensor.to(device, dtype) for tensor in tensors)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        if has_labels:
            rest |= {"labels": labels.to(device), "label_weights": weights.to(device, dtype)}
        loss = function(*leaves, *teacher, **options, **rest)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    hard = {"weight_hard": 1.0} if has_labels else {}
    truth = run(reference_uld.linear_uld, torch.float64, **hard)
    actual = run(fused_linear_uld, torch.float32, device, backend=backend)
    for ours, expected in zip([tensor.cpu() for tensor in actual], truth, strict=True):
        assert ours.isfinite().all() and ours.shape == expected.shape
        if bool(expected.any()):
            assert relative_error(ours, expected) < 1e-4
        else:
            assert not bool(ours.any())


@on_every_backend
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (3, 2), (23, 17), (130, 1)])
def test_few_entries_have_the_loss_of_a_sort(sizes, device, backend):
    """Their grid is fine: its bins, 7e-5 wide, were summed with an error of 4e-4 each."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (0.3 * torch.randn(5, size, generator=generator) for size in sizes)
    truth = reference_uld.uld_loss(student.double(), teacher.double())
    loss = uld_loss(student.to(device), teacher.to(device), backend=backend)
    assert relative_error(loss.cpu(), truth) < 2e-6


@on_every_backend
@pytest.mark.parametrize("sizes", [(1, 130), (2, 17), (130, 400), (320, 320)])
def test_a_row_of_nan_and_weight_zero_leaves_the_other_rows_alone(sizes, device, backend):
    """Rows whose stride is no multiple of 16 have their tables side by side in memory."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, size, generator=generator) for size in sizes)
    weights = torch.tensor([0.0, 1.0, 0.5, 2.0])

    def call(rows):
        leaf = student[rows].to(device).requires_grad_()
        loss = uld_loss(leaf, teacher[rows].to(device), weights[rows].to(device), backend=backend)
        return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()

    loss, grad = call(slice(1, None))
    student[0] = teacher[0] = torch.nan
    with_nan, grad_with_nan = call(slice(None))
    torch.testing.assert_close(with_nan, loss)
    torch.testing.assert_close(grad_with_nan[1:], grad)
    assert not grad_with_nan[0].any()


@on_every_backend
@pytest.mark.parametrize("size", [1e4, 1e5])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (50, 40)])
def test_the_loss_of_single_large_logits_is_within_the_documented_bound(
    sizes, size, device, backend
):
    generator = torch.Generator().manual_seed(int(size))
    student, teacher = (torch.randn(2, v, generator=generator) for v in sizes)
    student[0, 0], student[1, -1] = size, -size
    sides = [t.double().softmax(-1).sort(-1, descending=True)[0] for t in (student, teacher)]
    p, q = (torch.nn.functional.pad(s, (0, max(sizes) - s.shape[1])) for s in sides)
    given = student.to(device), teacher.to(device)
    actual = uld_loss(*given, backend=backend, reduction="none").cpu().double()
    torch.testing.assert_close(actual, (p - q).abs().sum(-1), rtol=0, atol=1e-4)
