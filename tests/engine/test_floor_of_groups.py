"""A group with a token that the student masks has probability 0: its log-probability is the floor,
-1e6, in every loss of groups, on every backend, as in the oracle, and no gradient goes through it.

The masked token is the first of three in a group, and an entry that both vocabularies have.
"""

import pytest
import torch

from gold_kernels import (
    fused_linear_chunk_likelihood,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
    reference,
)
from support.backends import on_every_backend
from support.error_budget import relative_error
from support.same_tokens import same_projection
from support.uld_cases import STUDENT_GROUPS, uld_case

MASKED_GROUP = 2
PROJECTION = same_projection(301, 411)


def masked_case(kind, place, beta, has_overlap):
    """The alignment's token at a place of the group, and a bias of -inf there."""
    case = uld_case(kind, has_overlap=has_overlap, beta=beta)
    alignment = case.options["alignment"]
    scalars = alignment.student_scalar_groups == MASKED_GROUP
    ids = alignment.student_scalar_ids[scalars]
    assert len(ids) == STUDENT_GROUPS.count(MASKED_GROUP) - 1 == 2
    token = int(alignment.student_base_ids[MASKED_GROUP] if place == "base" else ids[0])
    bias = case.bias.clone()
    bias[token] = -torch.inf
    weights = torch.zeros(5).double()
    weights[MASKED_GROUP] = 1.0
    return case._replace(bias=bias, tensors=(*case.tensors[:4], weights)), alignment


def losses(name, alignment, beta):
    """The fused loss and the oracle, of hidden states, heads, weights and a bias."""
    if name == "hybrid":
        return fused_linear_uld, reference.linear_uld

    def fused(*tensors, student_bias, backend=None, **_):
        options = {"beta": beta, "student_bias": student_bias, "backend": backend}
        if name == "likelihood":
            return fused_linear_chunk_likelihood(*tensors[:4], alignment, tensors[4], **options)
        own = {"alignment": alignment, **options}
        return fused_linear_projected_jsd(*tensors[:4], PROJECTION, tensors[4], **own)

    def oracle(hidden, weight, teacher, teacher_weight, row_weights, student_bias, **_):
        logits = hidden @ weight.T + student_bias, teacher @ teacher_weight.T
        if name == "likelihood":
            return reference.chunk_likelihood(*logits, alignment, row_weights, beta=beta)
        own = {"alignment": alignment, "beta": beta}
        return reference.projected_jsd(*logits, PROJECTION, row_weights, **own)

    return fused, oracle


@on_every_backend
@pytest.mark.parametrize("place", ["base", "scalar"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hybrid", "bayesian"),
        ("hybrid", "observed"),
        ("likelihood", "bayesian"),
        ("projected", "bayesian"),
    ],
)
def test_no_gradient_goes_through_the_floor_of_a_group(name, kind, beta, place, device, backend):
    case, alignment = masked_case(kind, place, beta, name == "hybrid")
    fused, oracle = losses(name, alignment, beta)
    truth = case.run(oracle, torch.float64)
    actual = case.run(fused, torch.float32, device, backend=backend)
    assert relative_error(actual[0].cpu(), truth[0]) < 1e-4
    for ours, expected in zip(actual[1:], truth[1:], strict=True):
        assert float((ours.cpu().double() - expected).norm()) < 1e-3 * float(expected.norm()) + 1e-5
    if name == "likelihood":
        assert not any(grad.any() for grad in truth[1:]), "its only term is the group's floor"


def test_two_masked_tokens_of_the_teacher_count_as_one_floor():
    case = uld_case("bayesian", has_overlap=False, beta=1.0)
    alignment = case.options["alignment"]
    bias = torch.zeros(411).double()
    ids = [alignment.teacher_base_ids, alignment.teacher_scalar_ids]
    bias[torch.cat(ids)] = -torch.inf
    hidden, weight, teacher, teacher_weight, _ = case.tensors
    heads = hidden, weight, teacher, teacher_weight
    _, metrics = fused_linear_chunk_likelihood(
        *heads, alignment, beta=1.0, teacher_bias=bias, return_metrics=True
    )
    assert float(metrics.teacher_log_likelihood.min()) == -1e6
    logits = hidden @ weight.T, teacher @ teacher_weight.T + bias
    rows = reference.chunk_likelihood(*logits, alignment, beta=1.0)
    assert relative_error(metrics.loss.mean(), rows) < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_rest_that_the_student_masks_has_no_slope_in_the_loss_of_top_k(beta):
    """All that the k entries leave is one column, masked."""
    hidden, weight = torch.randn(4, 6).double().requires_grad_(), torch.randn(5, 6).double()
    bias = torch.zeros(5).double()
    bias[3] = -torch.inf
    ids = torch.tensor([[0, 1, 2, 4]] * 4)
    log_probs = torch.randn(4, 5).double().log_softmax(-1)[:, ids[0]]
    rows = reference.top_k_rows(hidden @ weight.T + bias, ids, log_probs, beta=beta)
    loss = fused_linear_top_k(hidden, weight, ids, log_probs, student_bias=bias, beta=beta)
    torch.testing.assert_close(loss, rows.mean())
    grads = (torch.autograd.grad(one, hidden)[0] for one in (loss, rows.mean()))
    torch.testing.assert_close(*grads)
