"""The chunk loop: how many rows at a time the budget allows, and what row functions are given."""

import pytest
import torch

from gold_kernels import fused_linear_jsd
from gold_kernels.engine import products
from gold_kernels.engine.chunk_plan import DEFAULT_BUDGET_BYTES, Limits, Needs, plan_chunks
from gold_kernels.engine.chunking import run_chunks
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.products import Projection
from support.error_budget import relative_error
from support.jsd_cases import random_case

FROZEN = Needs(True, False, False)


def planned(num_rows, v, d, dtype, needs, *, is_gathered=False, projection=None, **limits):
    """Plan of a head pair of equal sizes, on tensors without storage."""
    hidden = torch.empty(num_rows, d, dtype=dtype, device="meta")
    head = LinearHead(hidden, torch.empty(v, d, dtype=dtype, device="meta"))
    if is_gathered:
        head = head._replace(row_index=torch.empty(num_rows, dtype=torch.int64, device="meta"))
    return plan_chunks(head, head, needs, Limits(**limits), projection)


@pytest.mark.parametrize("needs", [Needs(True, False, False), Needs(True, True, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 1023, 1024, 1025, 2047, 4096, 16384])
def test_a_chunk_is_never_larger_than_asked_nor_than_the_budget(num_rows, dtype, needs):
    v, d = 151936, 2048
    assert planned(num_rows, v, d, dtype, needs, chunk_size=1024).chunk <= 1024
    for budget in (1 << 26, 1 << 28, DEFAULT_BUDGET_BYTES):
        plan = planned(num_rows, v, d, dtype, needs, budget_bytes=budget)
        assert 1 <= plan.chunk <= plan.panel <= num_rows
        sizes = {"student": 4 * v * plan.chunk, "teacher": 4 * v * plan.chunk}
        sizes["panel"] = dtype.itemsize * v * plan.panel
        if dtype == torch.float32:  # made in the panel
            sizes["student"] = 0
        lent = sum(sizes.pop(name) for name in plan.lent)
        assert lent <= (2 * v * d if needs.weight and dtype == torch.bfloat16 else 0)
        replaces_accumulator = needs.weight and dtype == torch.bfloat16 and plan.panel == num_rows
        if replaces_accumulator and sizes.get("panel", 0) <= 4 * v * d:
            sizes.pop("panel", None)
        assert sum(sizes.values()) <= budget


@pytest.mark.parametrize("needs", [Needs(True, False, False), Needs(True, True, False)])
def test_what_a_row_function_needs_is_in_the_budget(needs):
    v, budget = 151936, DEFAULT_BUDGET_BYTES
    plan = planned(4096, v, 2048, torch.float32, needs, budget_bytes=budget, row_bytes=4 * v)
    assert 4 * v * (2 * plan.chunk + plan.panel) <= budget
    without = planned(4096, v, 2048, torch.float32, needs, budget_bytes=budget)
    assert plan.chunk < without.chunk


def test_rows_of_hidden_states_that_an_index_copies_are_in_the_budget():
    v, d, budget = 1024, 65536, 1 << 26
    plan = planned(4096, v, d, torch.bfloat16, FROZEN, is_gathered=True, budget_bytes=budget)
    assert plan.chunk * (2 * 4 * v + 2 * v + 2 * 2 * d) <= budget


def test_logits_that_are_rounded_after_their_product_are_in_the_budget():
    v, budget = 151936, 1 << 28
    options = {"logits_dtype": torch.bfloat16, "budget_bytes": budget}
    plan = planned(4096, v, 2048, torch.float32, FROZEN, **options)
    assert plan.chunk * (2 * 2 * v + 4 * v + 4 * v) <= budget  # of both sides, one wide, gradient


def test_what_a_projection_needs_is_in_the_budget():
    v, d, budget, projection = 4096, 16384, 1 << 26, Projection()
    options = {"projection": projection, "budget_bytes": budget}
    plan = planned(4096, v, d, torch.bfloat16, FROZEN, **options)
    beside = 2 * v + 4 * d  # a part of the gradient in 16 bits, and the product
    assert plan.chunk * (2 * 4 * v + 4 * v + beside) <= budget


def test_sums_of_two_products_are_in_the_budget(monkeypatch):
    v, d, budget = 1025, 65536, 1 << 26
    monkeypatch.setattr(products, "CUT_ON", ("meta",))
    plan = planned(4096, v, d, torch.bfloat16, FROZEN, budget_bytes=budget)
    assert plan.chunk * (2 * 4 * v + 2 * v + 4 * d) <= budget


@pytest.mark.parametrize(("num_rows", "most", "chunk"), [(101, 100, 51), (1300, 1200, 768)])
def test_chunks_are_of_about_one_size(num_rows, most, chunk):
    """The last one would be a few rows, for which both heads are read."""
    v = 1 << 15
    budget = most * (2 * 4 * v + 2 * v)
    assert planned(num_rows, v, 64, torch.bfloat16, FROZEN, budget_bytes=budget).chunk == chunk


def test_what_enough_rows_of_logits_leave_is_for_a_large_panel():
    """Twice the rows of logits gain little, twice those of a panel half of the sums."""
    options = {"budget_bytes": 1 << 32}
    plan = planned(32768, 151936, 2048, torch.bfloat16, Needs(True, True, False), **options)
    assert plan.chunk >= 1024 and plan.panel > 3 * plan.chunk


def test_what_lies_behind_the_rows_of_a_panel_is_zero_on_a_cpu():
    """CPUs with AMX multiply it by 0 in products of bfloat16, and 0 * NaN is NaN."""
    head = LinearHead(torch.randn(5, 8).bfloat16(), torch.randn(41, 8).bfloat16())
    behind = []

    def row_function(student, teacher, grad, rows, row_weights):
        width = grad.stride(0)
        behind.append(grad.as_strided((len(grad), width), (width, 1))[:, 41:].clone())
        grad.zero_()

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        run_chunks(head, head, torch.ones(5), row_function, Needs(True, True, False), Limits(3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [part.shape for part in behind] == [(3, 23), (2, 23)]
    assert not torch.cat(behind).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_kernels_see_aligned_rows_at_any_vocabulary(dtype):
    """Else a GPU loads 2 or 4 bytes at a time, and kernels need shared memory to gather them."""
    head = LinearHead(torch.randn(7, 8, dtype=dtype), torch.randn(50257, 8, dtype=dtype))
    seen = []

    def row_function(student, teacher, grad, rows, row_weights):
        seen.extend((student, teacher, grad))
        grad.zero_()

    run_chunks(head, head, torch.ones(7), row_function, Needs(True, True, False), Limits(3))
    assert len(seen) == 9
    for rows in seen:
        assert rows.shape[1] == 50257
        assert rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0


@pytest.mark.parametrize("is_frozen", [False, True])
def test_sums_over_many_chunks_are_kept_in_float32(is_frozen):
    """In bfloat16 a sum of equal numbers stops at 256 of them."""
    case = random_case(n=1, v=40)
    bias = torch.zeros(40)
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        heads = [tensor.detach().to(dtype) for tensor in case]
        hidden, teacher = (heads[side].expand(600, -1) for side in (0, 2))
        weight, own_bias = heads[1], bias.to(dtype).requires_grad_()
        leaves = [own_bias] if is_frozen else [own_bias, weight.requires_grad_()]
        loss = fused_linear_jsd(
            hidden, weight, teacher, heads[3], chunk_size=1, student_bias=own_bias, backend="torch"
        )
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, truth in zip(grads[1], grads[0], strict=True):
        assert ours.dtype == torch.bfloat16 and relative_error(ours, truth) < 5e-3
