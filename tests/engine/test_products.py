"""Products of vocabularies that are no multiple of 16 entries: cut where cuBLAS is slow otherwise.

N rows, V vocabulary, D hidden size.
"""

import re
from pathlib import Path

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_uld, peak_extra_bytes
from gold_kernels.engine import products
from support.error_budget import relative_error
from support.jsd_cases import random_case, run


def run_and_watch(monkeypatch, fused, case, **options):
    """Loss and gradients of products that are cut, and the vocabulary's share of each product."""
    matmul_, shares = products.matmul_, []
    entries = {case.student_weight.shape[0], case.teacher_weight.shape[0]}

    def watched(out, left, right, *, accumulate=False):
        along = [size for size in (out.shape[1], right.shape[0]) if size not in (16, 24)]
        shares.extend(along or [out.shape[0]])
        matmul_(out, left, right, accumulate=accumulate)

    monkeypatch.setattr(products, "CUT_ON", ("cpu",))
    monkeypatch.setattr(products, "matmul_", watched)
    results = run(fused, case, backend="torch", **options)
    monkeypatch.undo()
    assert shares and entries.isdisjoint(shares)
    return results, shares


@pytest.mark.parametrize("fused", [fused_linear_jsd, fused_linear_uld])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_products_are_cut_at_a_multiple_of_16_entries(chunk_size, dtype, fused, monkeypatch):
    case = random_case(n=11).to(dtype)  # V = 201
    plain = run(fused, case, backend="torch", chunk_size=chunk_size)
    cut, shares = run_and_watch(monkeypatch, fused, case, chunk_size=chunk_size)
    assert {192, 9} <= set(shares)
    for ours, truth in zip(cut, plain, strict=True):
        assert relative_error(ours, truth) < torch.finfo(dtype).eps


def test_other_vocabularies_and_float32_are_not_cut(monkeypatch):
    monkeypatch.setattr(products, "CUT_ON", ("cpu",))
    half, single = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    assert products.cut_of(151936, half) == 151936
    assert products.cut_of(7, half) == 7
    assert products.cut_of(50257, single) == 50257
    assert products.cut_of(50257, half) == 50256


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sizes", [(9000, 64, 30), (30, 9000, 64), (30, 64, 9000)])
def test_a_product_that_has_to_cast_its_operands_casts_a_small_part_at_a_time(sizes, accumulate):
    """On a CPU a head of 16 bits was cast whole, which no budget had counted."""
    rows, inner, columns = sizes
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16().T
    out = torch.ones(rows, columns)
    expected = left.double() @ right.double() + accumulate
    peak = peak_extra_bytes(lambda: products.matmul_(out, left, right, accumulate=accumulate))
    assert peak <= 2 * 4 * products.CAST_ENTRIES  # a part of each operand
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fused", [fused_linear_jsd, fused_linear_uld])
def test_a_loss_of_frozen_16_bit_heads_stays_within_its_budget_on_a_cpu(fused):
    hidden, head = torch.randn(32, 700).bfloat16().requires_grad_(), torch.randn(5000, 700)
    heads = head.bfloat16(), torch.randn(32, 600).bfloat16(), torch.randn(5000, 600).bfloat16()
    budget = 4 << 20
    assert budget < 4 * heads[0].numel(), "a head in float32 is beyond the budget"

    def step():
        loss = fused(hidden, *heads, budget_bytes=budget, backend="torch")
        torch.autograd.grad(loss, hidden)

    blocks = 5 << 19  # of the row function; rows of logits leave a part of the budget
    assert peak_extra_bytes(step) <= budget + hidden.nbytes + blocks


def block_bytes(vocab_size):
    """What docs/memory.md says that a block of rows takes on a CPU."""
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    said = re.search(
        r"up to (\d+) float32 numbers for each logit. A block\nhas at most ([\d,]+)", page
    )
    numbers, logits = (int(number.replace(",", "")) for number in said.groups())
    small, large = (round(4 * numbers * size / 2**20) for size in (logits, 151_936))
    assert f"That is {small} MiB, or {large} MiB with V = 151,936" in page
    return 4 * numbers * max(logits, vocab_size)


@pytest.mark.parametrize("vocab_size", [4096, 65_536])  # a block is eight rows, or one
@pytest.mark.parametrize("fused", [fused_linear_jsd, fused_linear_uld])
def test_beside_its_budget_a_loss_takes_what_docs_say_of_a_cpu(fused, vocab_size):
    hidden, teacher = torch.randn(48, 8, requires_grad=True), torch.randn(48, 8)
    head, teacher_head = torch.randn(vocab_size, 8), torch.randn(vocab_size, 8)

    def step():
        loss = fused(hidden, head, teacher, teacher_head, chunk_size=16)
        torch.autograd.grad(loss, hidden)

    step()
    chunk = 2 * 4 * 16 * vocab_size  # logits of both sides
    beside = peak_extra_bytes(step) - chunk
    room = 2**14  # hidden states and row values
    assert block_bytes(vocab_size) / 2 < beside <= block_bytes(vocab_size) + room
