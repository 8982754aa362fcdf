"""The oracle of sorted L1 rows and of the hybrid obeys the definitions that it implements."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gold_kernels.jsd import reference
from gold_kernels.uld import reference as oracle
from support.reference_cases import log_of, normal, overlap

# Sorted L1 of rows


def test_uld_of_a_hand_computed_pair():
    student, teacher = log_of([0.1, 0.7, 0.2]), log_of([0.4, 0.05, 0.5, 0.05])
    student.requires_grad_()
    rows = oracle.uld_rows(student, teacher)
    # .7 .2 .1 0 against .5 .4 .05 .05
    torch.testing.assert_close(rows, torch.tensor([0.5], dtype=torch.float64))
    (grad,) = torch.autograd.grad(rows, student)
    # signs + - + at the entries .7 .2 .1, through the softmax
    q, sign = torch.tensor([0.1, 0.7, 0.2]), torch.tensor([1.0, 1.0, -1.0])
    torch.testing.assert_close(grad[0], (q * (sign - (q * sign).sum())).double(), atol=1e-7, rtol=0)


def test_temperatures_divide_the_logits_of_their_side():
    student, teacher = normal(3, 7), normal(3, 9, seed=1)
    torch.testing.assert_close(
        oracle.uld_rows(student, teacher, student_temperature=2.0, teacher_temperature=0.5),
        oracle.uld_rows(student / 2, teacher * 2),
    )


def test_log_scales_multiply_the_probabilities():
    student, teacher = log_of([0.25, 0.75]), log_of([0.5, 0.5])
    scales = [torch.tensor([x], dtype=torch.float64).log() for x in (0.4, 0.1)]
    rows = oracle.uld_rows(
        student, teacher, student_log_scale=scales[0], teacher_log_scale=scales[1]
    )
    assert float(rows) == pytest.approx(abs(0.3 - 0.05) + abs(0.1 - 0.05))


@pytest.mark.parametrize(("num_student", "num_teacher"), [(40, 40), (23, 40), (40, 23), (1, 5)])
def test_identical_rows_in_any_order_have_no_loss_and_no_gradient(num_student, num_teacher):
    """Masked columns stand for the entries that the shorter vocabulary does not have."""
    size = min(num_student, num_teacher)
    entries = normal(6, size)
    sides = []
    for seed, columns in enumerate((num_student, num_teacher)):
        masked = torch.full((6, columns - size), -math.inf, dtype=torch.float64)
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        sides.append(torch.cat([entries + 3 * seed, masked], -1)[:, order])
    student = sides[0].requires_grad_()
    rows = oracle.uld_rows(student, sides[1])
    assert rows.max() < 1e-13
    (grad,) = torch.autograd.grad(rows.sum(), student)
    assert grad.abs().max() < 1e-15


def test_a_permutation_of_either_vocabulary_changes_nothing():
    student, teacher = normal(4, 31).round().requires_grad_(), normal(4, 57, seed=1).round()
    rows = oracle.uld_rows(student, teacher)
    (grad,) = torch.autograd.grad(rows.sum(), student)
    order, other_order = torch.randperm(31), torch.randperm(57)
    permuted = oracle.uld_rows(student[:, order], teacher[:, other_order])
    torch.testing.assert_close(permuted, rows, rtol=1e-13, atol=0)
    (permuted_grad,) = torch.autograd.grad(permuted.sum(), student)
    torch.testing.assert_close(permuted_grad, grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("num_student", "num_teacher"), [(12, 30), (30, 12)])
def test_the_shorter_vocabulary_is_padded_with_probability_zero(num_student, num_teacher):
    student, teacher = normal(5, num_student), normal(5, num_teacher, seed=1)

    def padded(logits: Tensor) -> Tensor:
        return torch.nn.functional.pad(logits, (0, 40 - logits.shape[1]), value=-math.inf)

    plain = oracle.uld_rows(student, teacher)
    torch.testing.assert_close(oracle.uld_rows(padded(student), padded(teacher)), plain)
    zeros = torch.nn.functional.pad(student, (0, 40 - num_student))
    assert (oracle.uld_rows(zeros, teacher) - plain).abs().min() > 1e-3, "not logit 0"


def mean_sign_over_orderings(student: list[float], teacher: list[float]) -> list[float]:
    """Of every descending order of the student's entries, with sign(0) = 0."""
    size = max(len(student), len(teacher))
    t = sorted(teacher, reverse=True) + [0.0] * (size - len(teacher))
    totals, num_orders = [0.0] * len(student), 0
    for order in permutations(range(len(student))):
        s = [student[i] for i in order]
        if s != sorted(s, reverse=True):
            continue
        num_orders += 1
        for k, i in enumerate(order):
            totals[i] += (s[k] > t[k]) - (s[k] < t[k])
    return [total / num_orders for total in totals]


TIED = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=200)
@given(student=TIED, teacher=TIED)
def test_the_gradient_is_the_mean_over_all_orderings_of_ties(student, teacher):
    log_q = log_of(student).requires_grad_()
    rows = oracle.sorted_l1_rows(log_q, log_of(teacher))
    size = max(len(student), len(teacher))
    pairs = zip(
        *(sorted(x, reverse=True) + [0.0] * (size - len(x)) for x in (student, teacher)),
        strict=True,
    )
    assert rows.item() == pytest.approx(sum(abs(s - t) for s, t in pairs))
    (grad,) = torch.autograd.grad(rows, log_q)
    expected = torch.tensor(mean_sign_over_orderings(student, teacher)) * torch.tensor(student)
    torch.testing.assert_close(grad[0], expected.double(), rtol=1e-6, atol=1e-12)


def test_ties_are_what_rounded_logits_have():
    """The half of a tie that eager torch pushes up by one order of the sort is not pushed up."""
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    teacher = log_of([0.4, 0.3, 0.2, 0.1])
    rows = oracle.uld_rows(student, teacher)
    assert rows.item() == pytest.approx(0.15 + 0.05 + 0.05 + 0.15)
    (grad,) = torch.autograd.grad(rows, student)
    assert grad.abs().max() == 0


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_uld_is_the_integral_of_the_difference_of_counts(seed, sizes):
    q, p = (normal(1, size, seed=seed + i).softmax(-1)[0] for i, size in enumerate(sizes))
    edges = torch.cat([q, p, q.new_zeros(1)]).sort().values
    middles = (edges[1:] + edges[:-1]) / 2
    counts = (q[:, None] > middles).sum(0) - (p[:, None] > middles).sum(0)
    integral = (counts.abs() * edges.diff()).sum()
    rows = oracle.uld_rows(q.log()[None], p.log()[None])
    torch.testing.assert_close(rows[0], integral, rtol=1e-10, atol=1e-14)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_without_ties_a_sign_is_that_of_the_counts_above_the_entry(seed, sizes):
    log_q, log_p = (normal(2, size, seed=seed + i) for i, size in enumerate(sizes))
    above = [(side[:, None, :] > log_q[:, :, None]).sum(-1) for side in (log_q, log_p)]
    expected = torch.where(above[0] >= above[1], 1.0, -1.0).double()
    assert torch.equal(oracle.tie_averaged_sign(log_q, log_p), expected)


# Generalized JSD and the hybrid


def test_generalized_jsd_is_the_jsd_of_distributions():
    student, teacher = normal(5, 19), normal(5, 19, seed=1)
    for beta in (0.0, 0.1, 0.5, 1.0):
        torch.testing.assert_close(
            oracle.generalized_jsd_rows(student.log_softmax(-1), teacher.log_softmax(-1), beta),
            reference.jsd_rows(student, teacher, beta=beta),
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_generalized_jsd_of_sub_distributions_is_never_negative(beta):
    log_q = normal(200, 5).log_softmax(-1) - normal(200, 1, seed=1).abs()
    log_p = normal(200, 5, seed=2).log_softmax(-1) - normal(200, 1, seed=3).abs()
    if beta in (0.0, 1.0):
        a, b = (log_p, log_q) if beta == 0 else (log_q, log_p)
        assert (a.exp() * (a - b)).sum(-1).min() < -0.1, "the usual KL must be negative somewhere"
    assert oracle.generalized_jsd_rows(log_q, log_p, beta).min() > 0
    assert oracle.generalized_jsd_rows(log_q, log_q, beta).abs().max() < 1e-15


def test_between_zero_and_one_the_sums_cancel():
    log_q, log_p = normal(9, 5) - 4, normal(9, 5, seed=1) - 4
    beta = 0.3
    m = beta * log_p.exp() + (1 - beta) * log_q.exp()
    usual = beta * (log_p.exp() * (log_p - m.log())).sum(-1)
    usual += (1 - beta) * (log_q.exp() * (log_q - m.log())).sum(-1)
    torch.testing.assert_close(oracle.generalized_jsd_rows(log_q, log_p, beta), usual)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_hybrid_of_matched_vocabularies_is_the_jsd_of_the_reordered_teacher(beta):
    student, teacher, order = normal(6, 13), normal(6, 13, seed=1), torch.randperm(13)
    pairs = overlap(list(range(13)), order.tolist(), 13, 13)
    loss = oracle.uld_loss(student, teacher, overlap=pairs, beta=beta, unmatched_weight=5.0)
    expected = reference.jsd_rows(student, teacher[:, order], beta=beta).mean()
    torch.testing.assert_close(loss, expected)


def test_a_hybrid_without_matched_entries_is_uld():
    student, teacher = normal(6, 13), normal(6, 20, seed=1)
    loss = oracle.uld_loss(student, teacher, overlap=overlap([], [], 13, 20), matched_weight=5.0)
    torch.testing.assert_close(loss, oracle.uld_rows(student, teacher).mean())


def test_a_hybrid_of_a_hand_computed_row():
    student, teacher = log_of([0.5, 0.2, 0.3]), log_of([0.1, 0.6, 0.1, 0.2])
    loss = oracle.uld_loss(
        student,
        teacher,
        overlap=overlap([0], [1], 3, 4),
        beta=0.0,
        matched_weight=2.0,
        unmatched_weight=10.0,
    )
    matched = 0.6 * math.log(0.6 / 0.5) + 0.5 - 0.6
    unmatched = (0.3 - 0.2) + (0.2 - 0.1) + 0.1
    assert float(loss) == pytest.approx(2 * matched + 10 * unmatched)


def test_one_side_without_unmatched_entries_leaves_the_mass_of_the_other():
    student, teacher = normal(4, 5), normal(4, 8, seed=1)
    pairs = overlap(list(range(5)), [7, 1, 5, 3, 2], 5, 8)
    loss = oracle.uld_loss(student, teacher, overlap=pairs, matched_weight=0.0)
    torch.testing.assert_close(loss, teacher.softmax(-1)[:, [0, 4, 6]].sum(-1).mean())
