"""Logits that in_place=True has overwritten are no logits: no later loss takes them for some."""

import pytest
import torch

from gold_kernels import jsd_loss, uld_loss
from support.backends import on_every_backend

TEACHER = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
LOSSES = [jsd_loss, uld_loss]
REFUSED = r"student_logits must be logits, got memory .* in_place=True .*; pass in_place=False to"


def leaf_of(device="cpu"):
    logits = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    return logits.to(device).requires_grad_()


@on_every_backend
@pytest.mark.parametrize("when", ["before", "between", "no_grad"])
@pytest.mark.parametrize(("first", "second"), [(a, b) for a in LOSSES for b in LOSSES])
def test_a_second_loss_of_overwritten_logits_is_refused(first, second, when, device, backend):
    logits, teacher = leaf_of(device) * 1, TEACHER.to(device)
    loss = first(logits, teacher, in_place=True, backend=backend)
    if when == "between":
        loss.backward(retain_graph=True)
    for in_place in (True, False):
        with pytest.raises(ValueError, match=REFUSED), torch.set_grad_enabled(when != "no_grad"):
            second(logits, teacher, in_place=in_place, backend=backend)
    with pytest.raises(ValueError, match="teacher_logits must be logits, got memory"):
        second(teacher, logits, backend=backend)


VIEWS = {
    "rows": lambda x: x[2:4],
    "columns": lambda x: x[:, 3:],
    "vocab_size": lambda x: x[:, :20],
    "of three dimensions": lambda x: x.view(3, 2, 32)[:, 1],
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "new leaf": lambda x: x.detach().requires_grad_(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("part", [slice(0, 6), slice(2, 3)], ids=["whole", "row"])
def test_every_view_of_overwritten_memory_is_refused(view, part):
    logits = leaf_of() * 1
    jsd_loss(logits[part], TEACHER[part], in_place=True)
    with pytest.raises(ValueError, match=REFUSED):
        uld_loss(view(logits), view(TEACHER))
    with torch.inference_mode(), pytest.raises(ValueError, match=REFUSED):
        uld_loss(view(logits.detach()), view(TEACHER))


def halves(logits, in_place):
    first = jsd_loss(logits[:3], TEACHER[:3], in_place=in_place)
    return first + uld_loss(logits[3:], TEACHER[3:], in_place=in_place)


def halves_at_once(logits, in_place):
    loss = jsd_loss(logits[:3], TEACHER[:3], in_place=in_place)
    loss.backward(retain_graph=True)
    return loss.detach() + uld_loss(logits[3:], TEACHER[3:], in_place=in_place)


def last_of_two(logits, in_place):
    return jsd_loss(logits, TEACHER) + 3 * uld_loss(logits, TEACHER, in_place=in_place)


def refilled(logits, in_place):
    """Memory that is kept for the logits of all steps."""
    memory = torch.empty(6, 32)
    losses = []
    for factor in (1, 2):
        memory = memory.detach().copy_(factor * logits)
        loss = jsd_loss(memory, TEACHER, in_place=in_place)
        loss.backward(retain_graph=True)
        losses.append(loss.detach())
    memory = memory.detach().copy_(3 * logits)
    return sum(losses) + uld_loss(memory, TEACHER, in_place=in_place)


@pytest.mark.parametrize("losses", [halves, halves_at_once, last_of_two, refilled])
def test_losses_of_other_memory_or_of_new_logits_are_right(losses):
    results = []
    for in_place in (False, True):
        leaf = leaf_of()
        value = losses(leaf * 1, in_place)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rows", [slice(0, 6), slice(3, 6)], ids=["whole", "half"])
def test_a_gradient_that_was_written_to_is_an_error_in_backward(rows):
    logits = leaf_of() * 1
    loss = jsd_loss(logits, TEACHER, in_place=True)
    logits.detach()[rows].copy_(TEACHER[rows])
    jsd_loss(logits[rows], TEACHER[rows])  # these are logits again
    with pytest.raises(RuntimeError, match="were written to before it; pass in_place=False"):
        loss.backward()


def test_torch_compile_overwrites_nothing_and_reads_nothing_overwritten():
    def both(logits, teacher):
        loss = jsd_loss(logits, teacher, in_place=True)
        return loss + uld_loss(logits, teacher, in_place=True)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    leaf = leaf_of()
    logits = leaf * 1
    grads = [torch.autograd.grad(compiled(logits, TEACHER), leaf)[0]]
    assert torch.equal(logits, leaf), "the logits stay"
    grads.append(torch.autograd.grad(jsd_loss(leaf, TEACHER) + uld_loss(leaf, TEACHER), leaf)[0])
    assert torch.equal(*grads)
    logits = leaf * 1
    jsd_loss(logits, TEACHER, in_place=True)
    with pytest.raises(ValueError, match=REFUSED):
        compiled(logits, TEACHER)
