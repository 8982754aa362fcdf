"""What is asked of a gradient beyond its value: its own gradient, several at once, a tangent.

Gradients of create_graph=True were constants: a penalty on them had none, and a Hessian was 0.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian

from gold_kernels import (
    FusedLinearJSDLoss,
    fused_linear_chunk_likelihood,
    fused_linear_jsd,
    fused_linear_mean_kl,
    fused_linear_projected_jsd,
    fused_linear_top_k,
    fused_linear_uld,
    head_means,
    jsd_loss,
    reference,
    uld_loss,
)
from support.backends import on_every_backend
from support.same_tokens import same_projection, same_tokens

N, V = 5, 20
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, TEACHER, HEAD = (
    torch.randn(*shape, generator=GENERATOR) for shape in ((N, 8), (V, 8), (N, 6), (V, 6))
)
ROWS = torch.arange(N)
MEANS = head_means(TEACHER, HEAD, WEIGHT)
PROJECTION, TOKENS = same_projection(V), same_tokens(ROWS)
LIGER = FusedLinearJSDLoss()
LOSSES = {
    "jsd": lambda h, w, **options: fused_linear_jsd(h, w, TEACHER, HEAD, **options),
    "uld": lambda h, w, **options: fused_linear_uld(h, w, TEACHER, HEAD, **options),
    "likelihood": lambda h, w, **options: fused_linear_chunk_likelihood(
        h, w, TEACHER, HEAD, TOKENS, **options
    ),
    "projected": lambda h, w, **options: fused_linear_projected_jsd(
        h, w, TEACHER, HEAD, PROJECTION, **options
    ),
    "top_k": lambda h, w, **options: fused_linear_top_k(
        h, w, ROWS.unsqueeze(1), -torch.ones(N, 1), **options
    ),
    "mean_kl": lambda h, w, **options: fused_linear_mean_kl(h, w.detach(), MEANS, **options),
    "jsd_loss": lambda h, w, **options: jsd_loss(h @ w.T, TEACHER @ HEAD.T, **options),
    "uld_loss": lambda h, w, **options: uld_loss(h @ w.T, TEACHER @ HEAD.T, **options),
    "liger": lambda h, w: LIGER(h, w, TEACHER, HEAD, ROWS),
}
NO_SECOND = "a loss has no second derivative, got .* create_graph=True; leave the loss out"


def leaves():
    return HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
def test_a_penalty_on_a_gradient_is_an_error_and_no_constant(name):
    hidden, weight = leaves()
    # of a state that is no leaf, as a model's are, beside a term that can be differentiated twice
    total = LOSSES[name](hidden * 2, weight) + hidden.square().sum()
    (grad,) = torch.autograd.grad(total, hidden, create_graph=True)
    penalty = grad.square().sum()
    with pytest.raises(RuntimeError, match=NO_SECOND):
        torch.autograd.grad(penalty, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        (penalty + total).backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_hessian_is_an_error_and_not_zero(reduction):
    def loss(hidden):
        return fused_linear_jsd(hidden, WEIGHT, TEACHER, HEAD, reduction=reduction).sum()

    with pytest.raises(RuntimeError, match=NO_SECOND):
        hessian(loss, HIDDEN)
    rows = hessian(lambda h: reference.linear_jsd(h, WEIGHT, TEACHER, HEAD), HIDDEN)
    assert rows.any(), "the remedy that the error names"


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_that_nobody_differentiates_twice_costs_nothing():
    """Optimizers ask for one of all losses, to differentiate some."""
    hidden, weight = leaves()
    loss = fused_linear_jsd(hidden, weight, TEACHER, HEAD)
    expected = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    loss.backward(create_graph=True)
    assert torch.equal(hidden.grad, expected[0]) and torch.equal(weight.grad, expected[1])
    with torch.no_grad():
        weight -= 0.1 * weight.grad
    curved = hidden.pow(3).sum()
    (grad,) = torch.autograd.grad(curved, hidden, create_graph=True)
    assert torch.autograd.grad(grad.sum(), hidden)[0].any()


@on_every_backend
@pytest.mark.parametrize("name", ["jsd", "uld", "top_k", "mean_kl", "jsd_loss", "uld_loss"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_from_above_may_come_in_a_batch(name, reduction, device, backend):
    if device != "cpu":
        pytest.skip("tensors of this file are on the CPU")
    hidden, weight = leaves()
    loss = LOSSES[name](hidden, weight.detach(), reduction=reduction, backend=backend)
    above = torch.randn(3, *loss.shape, generator=GENERATOR)
    each = [torch.autograd.grad(loss, hidden, one, retain_graph=True)[0] for one in above]
    (batch,) = torch.autograd.grad(loss, hidden, above, is_grads_batched=True)
    assert torch.allclose(batch, torch.stack(each), rtol=1e-6, atol=1e-9)


def test_a_batch_is_refused_where_each_needs_a_pass_of_its_own():
    hidden, weight = leaves()
    rows = fused_linear_jsd(hidden, weight, TEACHER, HEAD, reduction="none")
    with pytest.raises(RuntimeError, match=r"reduction='none' with a trained head .* one by one"):
        torch.autograd.grad(rows, hidden, torch.eye(N), is_grads_batched=True)
    loss = jsd_loss(hidden @ WEIGHT.T, TEACHER @ HEAD.T, in_place=True)
    with pytest.raises(RuntimeError, match=r"with in_place=True, got a batch .* one by one"):
        torch.autograd.grad(loss, hidden, torch.ones(2), is_grads_batched=True)


def test_tangents_of_forward_mode_are_refused_by_name():
    """Those of a teacher, or of weights of rows, were left out in silence."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(TEACHER, torch.ones_like(TEACHER))
        weights = forward_ad.make_dual(torch.ones(N), torch.ones(N))
        for message, call in (
            ("teacher_hidden", lambda: fused_linear_jsd(HIDDEN, WEIGHT, dual, HEAD)),
            ("row_weights", lambda: fused_linear_jsd(HIDDEN, WEIGHT, TEACHER, HEAD, weights)),
        ):
            with pytest.raises(ValueError, match=f"{message} must be .* or with a tangent"):
                call()
        assert fused_linear_jsd(HIDDEN, WEIGHT, TEACHER, HEAD).isfinite()
