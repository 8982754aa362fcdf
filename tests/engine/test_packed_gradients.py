"""Gradients of a frozen head over the logits of their rows, as on a GPU.

N scored rows, V vocabulary.
"""

from functools import partial

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_loss
from gold_kernels.engine import chunk_plan, chunking
from gold_kernels.jsd import triton_rows
from gold_kernels.losses import make_loss
from gold_kernels.triton import formula_rows
from support.backends import on_every_backend
from support.jsd_cases import random_case

V = 1088  # of 64 numbers: a CPU reads what is behind a row


def run(loss_of, case, **options):
    loss = loss_of(*case, **options)
    return loss.detach(), *torch.autograd.grad(loss, case.student_hidden)


def formula(name):
    return partial(fused_linear_loss, make_loss(name))


LOSSES = {f"beta {beta}": partial(fused_linear_jsd, beta=beta) for beta in (0.0, 0.5, 0.7, 1.0)}
LOSSES |= {name: formula(name) for name in ("skew_kl", "total_variation")}


@on_every_backend
@pytest.mark.parametrize("name", LOSSES)
def test_packed_gradients_have_the_same_bits(name, device, backend, monkeypatch):
    if device == "cpu":  # blocks far smaller than a row
        for module in (triton_rows, formula_rows):
            monkeypatch.setattr(module, "row_block", lambda *_: (128, 4, 4))
    packed, is_packed = [], chunking.is_packed
    monkeypatch.setattr(
        chunking, "is_packed", lambda *args: packed.append(is_packed(*args)) or packed[-1]
    )
    case = random_case(n=5, v=V if device == "cpu" else 151_936).to(torch.bfloat16, device)
    case.student_weight.requires_grad_(False)
    results = []
    for packed_on in ((), (device,)):
        monkeypatch.setattr(chunk_plan, "PACKED_ON", packed_on)
        results.append(run(LOSSES[name], case, backend=backend, chunk_size=3))
    assert packed == [False, backend == "triton" or name.startswith("beta")], "the precondition"
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
        assert chunk_plan.plan_chunks(head, head, needs, limits).chunk == 55
