"""Heads in slices of the vocabulary: three processes in one launch."""

import pytest
import torch

from gold_kernels import (
    FusedLinearJSDLoss,
    FusedLinearULDLoss,
    fused_linear_jsd,
    head_means,
    jsd_loss,
    uld_loss,
)
from support.jsd_cases import random_case
from support.processes import start_ranks


def test_slices_over_one_two_and_three_processes_give_the_loss_of_whole_heads():
    """Every loss, its metrics and gradients: to 1e-12 in float64. Calls that cannot be are refused
    on all processes, and memory stays within the budget.
    """
    done = start_ranks("parallel_step", 3)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("loss", [jsd_loss, uld_loss, head_means])
def test_losses_without_slices_refuse_a_process_group_by_name(loss):
    tensors = [torch.randn(3, 5) for _ in range(3)]
    number = 3 if loss is head_means else 2
    with pytest.raises(ValueError, match=f"{loss.__name__}: an option is .* got process_group="):
        loss(*tensors[:number], process_group=None)


@pytest.mark.parametrize("module", [FusedLinearJSDLoss, FusedLinearULDLoss])
def test_a_module_looks_at_its_group_when_it_is_built(module):
    with pytest.raises(ValueError, match="process_group must be a process group of this process"):
        module(process_group="world")


def test_slices_that_are_short_of_the_tokenizer_are_refused():
    """Without a group a slice looks like a head: vocab_size says that it is not whole."""
    hidden, weight, teacher, teacher_weight = random_case(v=40)
    with pytest.raises(ValueError, match="vocab_size must be a whole number in"):
        fused_linear_jsd(hidden, weight[:20], teacher, teacher_weight[:20], vocab_size=40)
