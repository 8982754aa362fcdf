"""Products of vocabularies that are no multiple of 16 entries: cut where cuBLAS is slow otherwise.

N rows, V vocabulary, D hidden size.
"""

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_uld
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
