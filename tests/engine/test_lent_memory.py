"""Small budgets: rows of logits in the memory of the gradient that a call returns.

N scored rows, V vocabulary, D hidden size.
"""

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_uld
from gold_kernels.engine import chunking
from gold_kernels.engine.chunk_plan import Limits, Needs, plan_chunks
from gold_kernels.engine.lent import LentMemory
from gold_kernels.engine.linear_head import LinearHead
from support.jsd_cases import random_case, run

MIB = 1 << 20


def planned(num_rows, budget, v=151936, d_s=2048, d_t=4096, **limits):
    """Plan of a trained bfloat16 head, on tensors without storage."""

    def head(d):
        shapes = (num_rows, d), (v, d)
        return LinearHead(*(torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes))

    limits = Limits(budget_bytes=budget, **limits)
    return plan_chunks(head(d_s), head(d_t), Needs(True, True, False), limits)


@pytest.mark.parametrize("budget", [4, 16, 32, 64, 256, 1024])
@pytest.mark.parametrize("num_rows", [600, 4096, 5000, 16384, 65536])
def test_a_small_budget_makes_as_many_rows_at_a_time_as_products_need(num_rows, budget):
    plan = planned(num_rows, budget * MIB)
    assert plan.chunk >= 256 and plan.panel >= min(num_rows, 1024)


def test_the_larger_the_budget_the_less_is_lent():
    assert planned(4096, 64 * MIB) == (512, 4096, ("student", "teacher"))
    assert planned(4096, 256 * MIB) == (512, 4096, ("student", "teacher"))
    assert planned(4096, 1024 * MIB) == (1024, 4096, ("student",))
    assert planned(4096, 8192 * MIB) == (4096, 4096, ())


def test_copies_of_hidden_states_stay_within_the_budget():
    """4096 rows of 2048 numbers are 16 MiB, the panel's own rows of which are copied."""
    assert planned(4096, 16 * MIB) == (512, 4096, ("student", "teacher"))
    plan = planned(4096, 8 * MIB)
    assert plan == (256, 1024, ("panel", "student", "teacher"))
    assert plan.panel * 2048 * 2 <= 8 * MIB


def test_heads_in_other_dtypes_and_frozen_ones_lend_nothing():
    shapes = (4096, 2048), (151936, 2048)
    for dtype in (torch.float16, torch.float32):
        head = LinearHead(*(torch.empty(s, dtype=dtype, device="meta") for s in shapes))
        limits = Limits(budget_bytes=64 * MIB)
        assert plan_chunks(head, head, Needs(True, True, False), limits).lent == ()
    half = head._replace(hidden=head.hidden.bfloat16(), weight=head.weight.bfloat16())
    assert plan_chunks(half, half, Needs(True, False, False), limits).lent == ()


# by name: loss, rows, bytes, what is lent of 12.9 kB; gradients of 61 rows take no more than a sum
LENT = {
    "logits": (fused_linear_jsd, 11, 1000, ("student", "teacher")),
    "one side": (fused_linear_jsd, 16, 9000, ("student",)),
    "panel": (fused_linear_jsd, 62, 25_000, ("panel",)),
    "panel and logits": (fused_linear_jsd, 62, 1000, ("panel", "student", "teacher")),
    "logits of two vocabularies": (fused_linear_uld, 11, 3000, ("student", "teacher")),
}


@pytest.mark.parametrize("kind", LENT)
def test_losses_and_gradients_are_those_of_memory_of_their_own(kind, monkeypatch):
    fused, num_rows, budget, lent = LENT[kind]
    case = random_case(n=num_rows, d_s=32).to(torch.bfloat16)
    plans, plan_of = [], chunking.plan_chunks
    monkeypatch.setattr(
        chunking, "plan_chunks", lambda *args: plans.append(plan_of(*args)) or plans[-1]
    )
    actual = run(fused, case, budget_bytes=budget, backend="torch")
    assert plans[-1].lent == lent, "the precondition"
    monkeypatch.setattr(chunking, "plan_chunks", lambda *args: plans[-1]._replace(lent=()))
    for ours, truth in zip(actual, run(fused, case, backend="torch"), strict=True):
        assert torch.equal(ours, truth)


def test_a_padded_head_has_zeros_behind_what_was_lent():
    case = random_case(n=62, d_s=32).to(torch.bfloat16)
    for num_rows in (11, 62):
        rows = case._replace(
            student_hidden=case.student_hidden[:num_rows],
            teacher_hidden=case.teacher_hidden[:num_rows],
        )
        loss = fused_linear_jsd(*rows, vocab_size=190, budget_bytes=1000, backend="torch")
        (grad,) = torch.autograd.grad(loss, case.student_weight)
        assert grad[:190].any(1).all() and not grad[190:].any()


def test_what_was_lent_is_the_gradient_that_is_returned():
    seen, head = [], LinearHead(torch.randn(11, 32).bfloat16(), torch.randn(201, 32).bfloat16())

    def row_function(student, teacher, grad, rows, row_weights):
        seen.extend((student.data_ptr(), teacher.data_ptr()))
        grad.zero_()

    limits, needs = Limits(budget_bytes=1000), Needs(True, True, False)
    grads = chunking.run_chunks(head, head, torch.ones(11), row_function, needs, limits)
    first = grads.weight.data_ptr()
    assert all(first <= pointer < first + grads.weight.nbytes for pointer in seen)


def test_more_than_there_is_is_not_lent():
    memory = LentMemory(torch.empty(32))
    assert memory.rows(1, 9, torch.bfloat16).shape == (1, 9)
    with pytest.raises(AssertionError, match="more is lent than there is"):
        memory.rows(4, 9, torch.bfloat16)


def requested_bytes(call):
    """Peak of what is asked of a GPU's allocator; blocks that it has kept may be 1 MiB larger."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    call()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1500, 4000])
def test_extra_memory_on_a_gpu_is_what_docs_say(num_rows):
    v, d, budget = 32_000, 1024, 64 * MIB
    case = random_case(num_rows, v, d, d).to(torch.bfloat16, "cuda")
    run(fused_linear_jsd, case, budget_bytes=budget)  # compiles
    peak = requested_bytes(lambda: run(fused_linear_jsd, case, budget_bytes=budget))
    returned = sum(tensor.nbytes for tensor in case[:2])
    assert peak - returned <= budget + 4 * v * d + MIB, "docs/memory.md, and a few row values"
