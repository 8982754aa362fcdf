"""The chunk loop: how many rows at a time the budget allows, and what row functions are given."""

import pytest
import torch

from gold_kernels.engine.chunk_plan import DEFAULT_BUDGET_BYTES, Limits, Needs, plan_chunks
from gold_kernels.engine.chunking import run_chunks
from gold_kernels.engine.linear_head import LinearHead


def planned(num_rows, v, d, dtype, needs, **limits):
    """Plan of a head pair of equal sizes, on tensors without storage."""
    hidden = torch.empty(num_rows, d, dtype=dtype, device="meta")
    head = LinearHead(hidden, torch.empty(v, d, dtype=dtype, device="meta"))
    return plan_chunks(head, head, needs, Limits(**limits))


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
