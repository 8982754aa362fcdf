"""The row kernel that counts instead of sorting: its errors against the float64 oracle, where rows
are peaked, tied, of equal size and nearly equal, and that it launches.
"""

import pytest
import torch
import triton
import triton.language as tl

from gold_kernels import fused_linear_uld, uld_loss
from gold_kernels.engine import linear
from gold_kernels.triton.lines import block_columns, load_logits
from gold_kernels.uld import reference as reference_uld
from gold_kernels.uld import row_memory
from gold_kernels.uld import triton_sums as uld_sums
from gold_kernels.uld.bin_table import NUM_BINS
from gold_kernels.uld.bins import LIST_SIZES, MAX_LISTED, bins_of, count_side
from gold_kernels.uld.row_memory import MAX_PROGRAMS, working_memory
from support.backends import on_every_backend
from support.error_budget import assert_within_error_budget, relative_error
from support.uld_cases import COUNTING_GRAD_ERROR, COUNTING_LOSS_ERROR, KINDS, uld_case


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_overlap", [False, True])
def test_the_counting_kernel_is_near_the_oracle(kind, has_overlap):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = uld_case(kind, has_overlap=has_overlap, has_labels=has_overlap)
    actual = case.run(fused_linear_uld, torch.float32, device, chunk_size=4, backend="triton")
    oracle = case.oracle()
    assert relative_error(actual[0].cpu(), oracle[0]) < COUNTING_LOSS_ERROR
    for ours, truth in zip(actual[1:], oracle[1:], strict=True):
        assert relative_error(ours.cpu(), truth) < COUNTING_GRAD_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_many_slices_are_rows_of_one(kind, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = uld_case(kind, has_overlap=True)
    whole = case.run(fused_linear_uld, torch.float32, device, backend="triton")
    monkeypatch.setattr(uld_sums, "row_block", lambda v, dtype: (16, 16 // dtype.itemsize, 4))
    monkeypatch.setattr(uld_sums, "SLICE_BLOCKS", 1)
    monkeypatch.setattr(uld_sums, "PAIR_BLOCK", 4)
    monkeypatch.setattr(uld_sums, "is_interpreted", lambda: False)
    v_student, v_teacher = case.tensors[1].shape[0], case.tensors[3].shape[0]
    slices = uld_sums.Slices.of(v_student, v_teacher, torch.float32)
    assert min(slices.student, slices.teacher) > 1 and case.options["overlap"][0].shape[0] > 4
    parts = case.run(fused_linear_uld, torch.float32, device, backend="triton")
    for one, many in zip(whole, parts, strict=True):
        assert relative_error(many.cpu(), one.cpu()) < 1e-5


def test_the_budget_counts_what_the_kernels_need_a_row(monkeypatch):
    limits, run_chunks = [], linear.run_chunks

    def recorded(*args, **options):
        limits.append(args[5])
        return run_chunks(*args, **options)

    monkeypatch.setattr(linear, "run_chunks", recorded)
    case = uld_case(has_overlap=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case.run(fused_linear_uld, torch.float32, device, backend="triton")
    assert limits[-1].row_bytes >= 4 * case.options["overlap"][0].shape[0] > 0


@on_every_backend
def test_logits_far_from_zero_keep_their_place_on_the_grid(device, backend):
    """Places from 2**24 on are no float32 numbers. Two sure sides: the loss is 0."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (1e5 * torch.randn(4, size, generator=generator) for size in (320, 411))
    assert reference_uld.uld_loss(student.double(), teacher.double()) < 1e-9
    loss = uld_loss(student.to(device), teacher.to(device), backend=backend)
    assert float(loss) < 1e-6


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.5, 1.0])
def test_matched_entries_alone_are_within_the_budget_of_eager(beta):
    """No bins are involved: the kernel has no excuse."""
    case = uld_case("bayesian", has_overlap=True, beta=beta)
    case.options.update(matched_weight=1.0, unmatched_weight=0.0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    actual = case.run(fused_linear_uld, torch.float32, device, backend="triton")
    eager = case.run(reference_uld.linear_uld, torch.float32)
    for name, ours, baseline, truth in zip(
        ("loss", "grad_hidden", "grad_weight", "grad_bias"),
        actual,
        eager,
        case.oracle(),
        strict=True,
    ):
        assert_within_error_budget(name, ours.cpu(), baseline=baseline, oracle=truth, factor=4.0)


@on_every_backend
@pytest.mark.parametrize("sizes", [(4096, 6000), (6000, 6000)])
def test_peaked_rows_are_as_precise_as_flat_ones(sizes, device, backend):
    """Most entries of a trained model's row are far below 1 / V."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4.0 * torch.randn(4, size, generator=generator) for size in sizes)
    student[:, 0], teacher[:, 0] = 19.0, 20.0
    assert 0.5 < float(student.softmax(-1)[:, 0].mean()) < 0.99
    results = []
    for dtype, function in ((torch.float64, reference_uld.uld_loss), (torch.float32, uld_loss)):
        where = "cpu" if dtype == torch.float64 else device
        leaf = student.to(where, dtype).requires_grad_()
        options = {} if dtype == torch.float64 else {"backend": backend}
        loss = function(leaf, teacher.to(where, dtype), **options)
        results.append([loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()])
    for truth, ours in zip(*results, strict=True):
        assert relative_error(ours, truth) < 5e-5


def tied_logits(*size, offset):
    """Rounded to bfloat16, which spaces values near 20 by 1/8 and values near 200 by 1."""
    return (torch.randn(*size, generator=torch.Generator().manual_seed(0)) + offset).bfloat16()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "size"), [(20.0, 1_500), (200.0, 3_000)])
def test_identical_rows_of_tied_logits_lose_nothing(dtype, offset, size, device, backend):
    """The largest bin of the first is ordered, that of the second is not."""
    logits = tied_logits(1, size, offset=offset).to(device, dtype)
    largest = int(logits.unique(return_counts=True)[1].max())
    assert (largest <= MAX_LISTED) == (offset == 20.0)
    leaf = logits.clone().requires_grad_()
    loss = uld_loss(leaf, logits, backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert float(loss.detach()) == 0 and not bool(grad.any())


@on_every_backend
@pytest.mark.parametrize(("offset", "size"), [(20.0, 1_500), (200.0, 20_000)])
def test_tied_logits_are_near_the_oracle(offset, size, device, backend):
    student, teacher = tied_logits(2, 1, size, offset=offset).float()
    truth = student.double().requires_grad_()
    oracle = reference_uld.uld_loss(truth, teacher.double())
    (oracle_grad,) = torch.autograd.grad(oracle, truth)
    leaf = student.to(device).requires_grad_()
    loss = uld_loss(leaf, teacher.to(device), backend=backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert relative_error(loss.detach().cpu(), oracle.detach()) < 1e-3
    assert relative_error(grad.cpu(), oracle_grad) < COUNTING_GRAD_ERROR


@on_every_backend
@pytest.mark.parametrize("sizes", [(4_000, 6_000), (70_000, 140_000), (140_000, 70_000)])
def test_rows_with_all_entries_in_one_bin(sizes, device, backend):
    """A bin's count of a side ends at 65535: more are counted again."""
    num_student, num_teacher = sizes
    student = torch.zeros(1, num_student, device=device, requires_grad=True)
    loss = uld_loss(student, torch.zeros(1, num_teacher, device=device), backend=backend)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(
        float(loss.detach()), 2.0 * (1.0 - min(sizes) / max(sizes)), rtol=1e-3, atol=0
    )
    # the subgradient is the same of all entries, and a softmax passes none of that on
    assert float(grad.abs().max()) < 1e-6 / num_student


def logits_errors(student, teacher):
    """Errors of loss and gradient of the counting kernel, and signs of the top 64 entries."""
    student.requires_grad_()
    loss = uld_loss(student, teacher, backend="triton")
    (grad,) = torch.autograd.grad(loss, student)
    truth = student.detach().double().requires_grad_()
    oracle = reference_uld.uld_loss(truth, teacher.double())
    (oracle_grad,) = torch.autograd.grad(oracle, truth)
    top = student.detach().topk(64).indices
    signs = [g.gather(1, top).sign().double() for g in (grad, oracle_grad)]
    return relative_error(loss, oracle), relative_error(grad, oracle_grad), torch.equal(*signs)


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_the_order_in_bins_is_that_of_the_oracle(noise):
    """Vocabularies of equal size, where D changes its sign everywhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = torch.randn(1, 10_000)
    teacher = student + noise * torch.randn(1, 10_000)
    loss_error, grad_error, _ = logits_errors(student.to(device), teacher.to(device))
    assert loss_error < 1e-3 and grad_error < 2e-2


@triton.jit
def counted_and_placed_kernel(logits_ptr, out_ptr, table_ptr, size, NUM_BINS: tl.constexpr):
    """How many values are counted, and how many are in a bin above the last."""
    origin = (1.0, 0.0, 0.5)  # a logit is its place in bins, negative
    counted = count_side(
        logits_ptr, logits_ptr, table_ptr, size, origin, 1, False, False, NUM_BINS, 512, 4
    )
    columns = block_columns(0, 512, 4)
    logits = load_logits(logits_ptr, columns, columns < size)
    is_placed = (columns < size) & (bins_of(logits, origin, NUM_BINS) < NUM_BINS - 1)
    tl.store(out_ptr, counted)
    tl.store(out_ptr + 1, tl.sum(tl.sum(is_placed.to(tl.int32), axis=1), 0))


def test_what_is_counted_has_a_bin_above_the_last():
    """A list has the size that was counted, whatever is rounded at the last edge."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    last = NUM_BINS - 1
    places = torch.tensor([0.0, last - 1, last - 0.5, last, last + 3]) + torch.tensor(
        [[-(2.0**-10)], [0.0], [2.0**-10]]
    )
    logits = -places.flatten().to(device)
    out, table = (torch.zeros(size, dtype=torch.int32, device=device) for size in (2, NUM_BINS))
    counted_and_placed_kernel[(1,)](logits, out, table, logits.numel(), NUM_BINS=NUM_BINS)
    assert out[0] == out[1] == table[: NUM_BINS - 1].sum() == 8


def test_lists_ordered_in_parts_give_the_same_bits(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = torch.randn(1, 20_000, device=device)
    teacher = student + 0.01 * torch.randn(1, 20_000, device=device)
    results = []
    for list_sizes in (LIST_SIZES, LIST_SIZES[-1:]):
        monkeypatch.setattr(row_memory, "LIST_SIZES", list_sizes)
        leaf = student.clone().requires_grad_()
        loss = uld_loss(leaf, teacher, backend="triton")
        results.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    for whole, parts in zip(*results, strict=True):
        assert torch.equal(whole, parts)


@pytest.mark.parametrize("rows", [5, 1024])
@pytest.mark.parametrize("mib", [2, 8, 32, 128])
def test_lists_are_shorter_where_they_leave_memory_to_few_programs(mib, rows, monkeypatch):
    monkeypatch.setattr(row_memory, "is_interpreted", lambda: False)
    student, grad, teacher = (torch.empty(rows, size, device="meta") for size in (64, 64, 96))
    memory = working_memory(student, teacher, grad, mib << 20, has_overlap=False)
    assert memory.lists.nbytes + memory.table.nbytes <= mib << 20
    enough = min(rows, MAX_PROGRAMS // 2)
    assert memory.num_programs >= enough or memory.list_size == LIST_SIZES[-1]
    assert memory.num_programs <= 2 * enough or memory.list_size == LIST_SIZES[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "noise"),
    [
        ((65536, 151936), None),
        ((151936, 65536), None),
        ((151936, 151936), None),
        ((151936, 151936), 0.01),
    ],
)
def test_real_vocabularies_on_the_gpu(sizes, noise):
    student, teacher = (torch.randn(8, size, device="cuda") for size in sizes)
    if noise is not None:
        teacher = student + noise * teacher
    loss_error, grad_error, has_same_signs = logits_errors(student, teacher)
    assert loss_error < 3e-5
    assert grad_error < 2e-2 and has_same_signs


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1003, 2051), (50257, 32001), (4096, 4097)])
@pytest.mark.parametrize("has_overlap", [False, True])
def test_vocabularies_of_any_size_launch(sizes, has_overlap):
    """Unaligned rows took more shared memory than a launch may ask for."""
    case = uld_case("bayesian", has_overlap=has_overlap, sizes=sizes)
    expected = case.oracle()
    actual = case.run(fused_linear_uld, torch.float32, "cuda", backend="triton")
    for ours, truth in zip(actual, expected, strict=True):
        assert relative_error(ours.cpu(), truth) < COUNTING_GRAD_ERROR
    logits = [torch.randn(9, size, device="cuda") for size in sizes]
    leaf = logits[0].clone().requires_grad_()
    loss = uld_loss(leaf, logits[1])
    truth = reference_uld.uld_loss(logits[0].double(), logits[1].double())
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert bool(grad.isfinite().all()) and float(grad.abs().sum()) > 0
