"""Gradients of a frozen head over the logits of their rows, as on a GPU.

N scored rows, V vocabulary.
"""

import pytest
import torch

from gold_kernels import fused_linear_jsd
from gold_kernels.engine import chunk_plan
from gold_kernels.jsd import triton_rows
from support.backends import on_every_backend
from support.jsd_cases import random_case

V = 1088  # of 64 numbers: a CPU reads what is behind a row


def run(case, **options):
    loss = fused_linear_jsd(*case, **options)
    return loss.detach(), *torch.autograd.grad(loss, case.student_hidden)


@on_every_backend
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.7, 1.0])
def test_packed_gradients_have_the_same_bits(beta, device, backend, monkeypatch):
    if device == "cpu":  # blocks far smaller than a row
        monkeypatch.setattr(triton_rows, "row_block", lambda *_: (128, 4, 4))
    case = random_case(n=5, v=V if device == "cpu" else 151_936).to(torch.bfloat16, device)
    case.student_weight.requires_grad_(False)
    results = []
    for packed_on in ((), (device,)):
        monkeypatch.setattr(chunk_plan, "PACKED_ON", packed_on)
        results.append(run(case, beta=beta, backend=backend, chunk_size=3))
    for ours, truth in zip(*results, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize(
    ("dtype", "needs", "may_pack", "is_packed"),
    [
        (torch.bfloat16, (True, False, False), True, True),
        (torch.float16, (True, False, False), True, True),
        (torch.bfloat16, (True, False, False), False, False),
        (torch.bfloat16, (True, True, False), True, False),
        (torch.bfloat16, (False, False, False), True, False),
        (torch.float32, (True, False, False), True, False),
    ],
)
def test_gradients_of_16_bits_of_frozen_heads_are_packed(dtype, needs, may_pack, is_packed):
    shapes = (4096, 2048), (151936, 2048)
    tensors = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    head, needs = chunk_plan.LinearHead(*tensors), chunk_plan.Needs(*needs)
    limits = chunk_plan.Limits(budget_bytes=64 << 20, may_pack=may_pack)
    assert chunk_plan.is_packed(head, needs, limits, None) is is_packed
    if is_packed:
        assert chunk_plan.plan_chunks(head, head, needs, limits).chunk == 52
