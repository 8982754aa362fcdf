"""head_top_k: the k likeliest tokens of a head, without its logits.

N rows, k entries a row, V vocabulary.
"""

import pytest
import torch

from gold_kernels import fused_linear_jsd, fused_linear_top_k, head_top_k, peak_extra_bytes
from support.jsd_cases import random_case

N, V, K = 9, 60, 5
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def of_float64(case, k=K, **options):
    """The definition, with full logits."""
    logits = case.teacher_hidden.double() @ case.teacher_weight.double().T
    logits = options.get("scale", 1.0) * (logits + options.get("bias", torch.zeros(())).double())
    cap = options.get("cap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    log_probs = (logits / options.get("temperature", 1.0)).log_softmax(-1)
    values, ids = log_probs.topk(k, -1)
    return ids, values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ids_and_log_probabilities_are_those_of_full_logits(dtype, device):
    case, limits = random_case(n=N, v=V), {torch.float64: 1e-12}
    hidden, weight = (tensor.to(device, dtype) for tensor in case[2:])
    for chunk_size in (1, 4, N, None):
        ids, log_probs = head_top_k(hidden, weight, K, temperature=1.5, chunk_size=chunk_size)
        truth = of_float64(case, temperature=1.5)
        assert torch.equal(ids.cpu(), truth[0])
        error = (log_probs.cpu().double() - truth[1]).abs().max()
        assert float(error) < limits.get(dtype, 5e-6)
        assert log_probs.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_a_head_with_a_bias_a_scale_a_softcap_and_fewer_entries():
    case = random_case(n=N, v=V)
    bias = torch.linspace(-1, 1, V)
    options = {"teacher_bias": bias, "logit_scale": 0.7, "final_logit_softcapping": 2.0}
    ids, log_probs = head_top_k(*case[2:], K, **options)
    truth = of_float64(case, bias=bias, scale=0.7, cap=2.0)
    assert torch.equal(ids, truth[0])
    torch.testing.assert_close(log_probs.double(), truth[1], rtol=1e-5, atol=1e-5)
    ids, log_probs = head_top_k(*case[2:], K, vocab_size=V - 20)
    truth = of_float64(case._replace(teacher_weight=case.teacher_weight[:-20]))
    assert torch.equal(ids, truth[0])
    torch.testing.assert_close(log_probs.double(), truth[1], rtol=1e-5, atol=1e-5)


def test_entries_that_a_bias_masks_have_the_floor_and_no_inf():
    case = random_case(n=N, v=V)
    bias = torch.full((V,), -torch.inf)
    bias[3:5] = 0
    ids, log_probs = head_top_k(*case[2:], 3, teacher_bias=bias)
    assert set(ids[:, :2].flatten().tolist()) == {3, 4}
    assert log_probs.isfinite().all() and bool((log_probs[:, 2] == -1e6).all())
    torch.testing.assert_close(log_probs[:, :2].exp().sum(1), torch.ones(N))


def test_a_teacher_who_is_sure_keeps_what_its_token_leaves():
    """exp(-20) in all: float32 has 1 - p as 0, or as 6e-8."""
    hidden, weight = torch.tensor([[20.0, 0.0, -1.0]]), torch.eye(3)
    _, log_probs = head_top_k(hidden, weight, 1)
    left = torch.tensor([[20.0, 0.0, -1.0]]).double().softmax(-1)[:, 1:].sum()
    assert float(-torch.expm1(log_probs.double())) == pytest.approx(float(left), rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_entries_make_the_generalized_jsd_of_full_logits(beta):
    case = random_case(n=N, v=V).to(torch.float64)
    entries = head_top_k(*case[2:], V)
    ours = fused_linear_top_k(*case[:2], *entries, beta=beta)
    plain = fused_linear_jsd(*case, beta=beta)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(*(torch.autograd.grad(x, case[:2]) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other)


def test_memory_is_in_the_budget():
    case, budget = random_case(n=256, v=6000), 400_000

    def call():
        return head_top_k(*case[2:], 7, budget_bytes=budget)

    ids, _ = call()
    returned = 12 * ids.numel()
    assert peak_extra_bytes(call) < budget + returned + 2**14 < 4 * 256 * 6000


def test_many_entries_are_in_the_budget_and_have_no_graph():
    case, budget, k = random_case(n=64, v=2000), 400_000, 1500

    def call():
        return head_top_k(*case[2:], k, budget_bytes=budget)

    case.teacher_hidden.requires_grad_()
    ids, log_probs = call()
    assert not log_probs.requires_grad
    assert peak_extra_bytes(call) < budget + 12 * ids.numel() + 2**14


@pytest.mark.parametrize("temperature", [0, -1.0, (1.0, 2.0)])
def test_a_temperature_that_is_none_says_so(temperature):
    case = random_case(n=N, v=V)
    with pytest.raises(ValueError, match=r"^head_top_k: temperature must be "):
        head_top_k(*case[2:], K, temperature=temperature)


def test_no_rows_make_no_entries():
    case = random_case(n=N, v=V)
    ids, log_probs = head_top_k(case.teacher_hidden[:0], case.teacher_weight, K)
    assert ids.shape == log_probs.shape == (0, K)


@pytest.mark.parametrize("k", [0, -1, V + 1, 2.0, True])
def test_numbers_that_the_vocabulary_has_not_say_so(k):
    case = random_case(n=N, v=V)
    with pytest.raises(ValueError, match=rf"^head_top_k: k must be .* \[1, {V}\], .* got {k}; 64"):
        head_top_k(*case[2:], k)
