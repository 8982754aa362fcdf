"""The oracle obeys the identities of the divergences it implements."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gold_kernels.jsd import reference

BETAS = (0.0, 1e-6, 0.1, 0.5, 0.9, 1.0)


def _logits(seed: int, rows: int = 5, columns: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("beta", BETAS)
def test_identical_distributions_have_no_divergence(beta):
    logits = _logits(0)
    assert reference.jsd_rows(logits, logits + 7.0, beta=beta).abs().max() < 1e-12


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.floats(0.01, 0.99))
def test_jsd_lies_between_zero_and_the_entropy_of_beta(seed, beta):
    rows = reference.jsd_rows(_logits(seed), _logits(seed + 1), beta=beta)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert rows.min() >= 0 and rows.max() <= bound + 1e-12


def test_disjoint_supports_reach_log_2():
    student = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], dtype=torch.float64)
    teacher = student.flip(-1)
    torch.testing.assert_close(
        reference.jsd_rows(student, teacher), torch.tensor([math.log(2)], dtype=torch.float64)
    )


def test_half_is_symmetric_and_beta_mirrors():
    student, teacher = _logits(1), _logits(2)
    half = reference.jsd_rows(student, teacher, beta=0.5)
    torch.testing.assert_close(half, reference.jsd_rows(teacher, student, beta=0.5))
    torch.testing.assert_close(
        reference.jsd_rows(student, teacher, beta=0.2),
        reference.jsd_rows(teacher, student, beta=0.8),
    )


def test_beta_zero_and_one_are_the_two_kl_divergences_of_torch():
    student, teacher = _logits(3), _logits(4)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    reverse = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(reference.jsd_rows(student, teacher, beta=0.0), forward)
    torch.testing.assert_close(reference.jsd_rows(student, teacher, beta=1.0), reverse)


@pytest.mark.parametrize("beta", [1e-5, 1 - 1e-5])
def test_small_and_large_beta_approach_the_scaled_kl(beta):
    student, teacher = _logits(5), _logits(6)
    limit = reference.jsd_rows(student, teacher, beta=round(beta))
    scaled = reference.jsd_rows(student, teacher, beta=beta) / min(beta, 1 - beta)
    torch.testing.assert_close(scaled, limit, rtol=0.05, atol=1e-3)


def test_padded_columns_have_probability_zero_not_logit_zero():
    hidden = torch.randn(3, 4, dtype=torch.float64)
    weight = torch.randn(9, 4, dtype=torch.float64)
    padded = torch.cat([weight, torch.zeros(5, 4, dtype=torch.float64)])
    loss = reference.linear_jsd(hidden, weight, hidden, padded, vocab_size=9)
    assert abs(float(loss)) < 1e-15
