"""Calls on a process group are compared while they begin."""

import pytest
import torch
import torch.distributed as dist

from gold_kernels import fused_linear_jsd, fused_linear_uld
from gold_kernels.engine import comparison
from gold_kernels.engine.linear_head import LinearHead
from support.jsd_cases import random_case


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    comparison._LAST_SIZES.clear()
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def steps(monkeypatch):
    """What happens, in order: messages, reading of the comparison's, products of a chunk."""
    found = []

    def watch(owner, name, step):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            found.append(step)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "all_gather_single"):
        if hasattr(dist, name):
            watch(dist, name, "message")
    watch(comparison.Comparison, "sizes", "read")
    watch(LinearHead, "project_", "product")
    return found


@pytest.mark.parametrize("loss", [fused_linear_jsd, fused_linear_uld])
def test_the_first_products_are_queued_before_the_comparison_is_read_and_no_message(
    loss, group, steps
):
    """But in a first call, whose slices nobody knows yet."""
    case = random_case(n=5, v=24)
    loss(*case, process_group=group)
    assert steps[:4] == ["message", "read", "product", "product"]
    steps.clear()
    loss(*case, process_group=group)
    assert steps[:5] == ["message", "product", "product", "read", "message"]
    assert steps.count("read") == 1


def test_a_call_that_sends_nothing_is_compared_all_the_same(group, steps):
    hidden, weight, teacher, teacher_weight = random_case(n=5, v=24)
    for _ in range(2):
        steps.clear()
        fused_linear_jsd(
            hidden[:0].detach(), weight, teacher[:0], teacher_weight, process_group=group
        )
        assert steps.count("read") == 1


@pytest.mark.parametrize("wrong", [(30,), (24, 6), ()])
def test_sizes_that_are_not_those_of_the_last_call_begin_the_call_anew(wrong, group, steps):
    """However the call fares with the wrong ones: here it has other entries, or none."""
    case = random_case(n=5, v=24)
    expected = fused_linear_jsd(*case, vocab_size=24)
    fused_linear_jsd(*case, process_group=group)
    (key,) = comparison._LAST_SIZES
    comparison._LAST_SIZES[key] = (wrong, wrong)
    steps.clear()
    loss = fused_linear_jsd(*case, vocab_size=24, process_group=group)
    torch.testing.assert_close(loss, expected)
    assert steps.count("read") == 1
    assert comparison._LAST_SIZES[key] == ((24,), (24,))


def test_an_error_of_the_call_itself_leaves_nothing_behind(group, monkeypatch):
    """The next call is compared as usual."""
    case = random_case(n=5, v=24)
    expected = fused_linear_jsd(*case, process_group=group)

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LinearHead, "project_", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fused_linear_jsd(*case, process_group=group)
    torch.testing.assert_close(fused_linear_jsd(*case, process_group=group), expected)


def test_many_ids_are_compared_whatever_the_order_in_which_a_device_adds_them():
    """Their sum by places is beyond the whole numbers that float64 has."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(150_000, (4096 * 256,), generator=generator).double()
    blocks = (ids * torch.arange(1, len(ids) + 1)).view(-1, 256).sum(1)

    def facts(order, more=0):
        total = 0.0
        for part in blocks[order].tolist():
            total += part
        return [0.0] * 5 + [float(ids.sum()) + more, total + more, 0.0]

    first = facts(torch.arange(len(blocks)))
    others = [facts(torch.randperm(len(blocks), generator=generator)) for _ in range(3)]
    assert any(other != first for other in others) and first[6] > 2**53
    assert not any(comparison._has_other_rows(other, first) for other in others)
    assert comparison._has_other_rows(facts(torch.arange(len(blocks)), more=1), first)
