"""The oracle of extended ULD: groups of tokens by the chain rule, and the whole loss."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gold_kernels.tokens.alignment import TokenAlignment, align_byte_spans
from gold_kernels.uld import reference as oracle
from support.reference_cases import normal, overlap

LETTERS = "ab"


def chain_log_prob(text: str, previous: str = "") -> float:
    """log probability that a chain of letters goes on with text."""
    p_a = {"": 0.3, "a": 0.2, "b": 0.9}
    total = 0.0
    for before, letter in zip((previous, *text), text, strict=False):
        total += math.log(p_a[before[-1:]] if letter == "a" else 1 - p_a[before[-1:]])
    return total


def chain_model(lengths: list[int], text: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, size), ids (N,) and byte ends (N,) of a model that writes the chain in tokens of
    the given lengths; tokens are all strings of a length, in alphabetical order.
    """
    logits, ids, ends, at = [], [], [], 0
    for length in lengths:
        tokens = ["".join(letters) for letters in product(LETTERS, repeat=length)]
        row = [chain_log_prob(token, text[:at]) for token in tokens]
        logits.append(row + [-math.inf] * (size - len(tokens)))
        ids.append(tokens.index(text[at : at + length]))
        at += length
        ends.append(at)
    return (torch.tensor(logits, dtype=torch.float64), torch.tensor(ids), torch.tensor(ends))


def chain_groups(text: str, cuts: tuple[list[int], list[int]], merge: str = "bayesian"):
    """Logits of both sides and their alignment."""
    student, teacher = (chain_model(lengths, text, 8) for lengths in cuts)
    groups = align_byte_spans(student[2], teacher[2])
    alignment = TokenAlignment.from_groups(groups, student[1], teacher[1], len(text), merge=merge)
    return student[0], teacher[0], alignment


@st.composite
def texts_and_cuts(draw):
    lengths = st.lists(st.integers(1, 3), min_size=1, max_size=6)
    student, teacher = draw(lengths), draw(lengths)
    num_letters = max(sum(student), sum(teacher))
    text = draw(st.text(LETTERS, min_size=num_letters, max_size=num_letters))
    return text, student, teacher


@settings(deadline=None, max_examples=100)
@given(case=texts_and_cuts())
def test_a_bayesian_group_gives_every_continuation_its_probability_by_the_chain_rule(case):
    text, *cuts = case
    *logits, alignment = chain_groups(text, cuts)
    for side in (0, 1):
        rows = alignment.sides[side]
        log_prob = oracle._group_log_probs(logits[side], rows, 1.0)
        ends = torch.tensor(cuts[side]).cumsum(0)
        first = 0
        for group, base in enumerate(rows[0].tolist()):
            start = int(ends[base]) - cuts[side][base]
            for v, letters in enumerate(product(LETTERS, repeat=cuts[side][base])):
                joint = chain_log_prob(text[first:start] + "".join(letters), text[:first])
                assert float(log_prob[group, v]) == pytest.approx(joint)
            first = int(ends[base])


def test_one_chain_cut_differently_on_both_sides_has_the_loss_of_the_two_joints():
    """a|b against ab: the student's group holds p(a.), the teacher's all of two letters."""
    student, teacher, alignment = chain_groups("ab", ([1, 1], [2]))
    joint = {x + y: math.exp(chain_log_prob(x + y)) for x in LETTERS for y in LETTERS}
    q = sorted([joint["aa"], joint["ab"], 0, 0], reverse=True)
    p = sorted(joint.values(), reverse=True)
    expected = sum(abs(a - b) for a, b in zip(q, p, strict=True))
    loss = oracle.uld_loss(student, teacher, alignment=alignment)
    assert float(loss) == pytest.approx(expected)
    assert expected > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@settings(deadline=None, max_examples=30)
@given(case=texts_and_cuts())
def test_one_chain_cut_differently_on_both_sides_has_no_hybrid_loss_in_merged_groups(beta, case):
    text, *cuts = case
    student, teacher, alignment = chain_groups(text, cuts)
    student.requires_grad_()
    is_merged = (alignment.span_ids()[0] >= 0).double()
    # "a" and "b" of the student's first rows beside "aa" and "ab" of a teacher's
    options = {"alignment": alignment, "overlap": overlap([0, 1], [0, 1], 8, 8), "beta": beta}
    loss = oracle.uld_loss(student, teacher, is_merged, **options)
    (grad,) = torch.autograd.grad(loss, student)
    assert abs(float(loss)) < 1e-15 and float(grad.abs().max()) < 1e-7


def test_a_merged_group_pulls_the_student_towards_the_teachers_probability_of_its_bytes():
    """a|b against ab: matched by their bytes alone, the student's "b" would be pulled to what the
    teacher gives a "b" at the start.
    """
    student, teacher, alignment = chain_groups("ab", ([1, 1], [2]))
    teacher[0, :4] = torch.tensor([0.05, 0.9, 0.03, 0.02], dtype=torch.float64).log()  # aa ab ba bb
    student.requires_grad_()
    pairs = overlap([1], [3], 8, 8)
    loss = oracle.uld_loss(student, teacher, alignment=alignment, overlap=pairs)
    (grad,) = torch.autograd.grad(loss, student)
    q, p = math.exp(chain_log_prob("ab")), 0.9
    m, other = (p + q) / 2, (2 - p - q) / 2
    jsd = p * math.log(p / m) + q * math.log(q / m)
    jsd += (1 - p) * math.log((1 - p) / other) + (1 - q) * math.log((1 - q) / other)
    assert float(loss) == pytest.approx(jsd / 2)
    assert grad[0, 0] < 0 and grad[1, 1] < 0  # "a", and "b" after it, become likelier


def test_observed_groups_scale_the_first_row_by_the_later_tokens():
    student, teacher, alignment = chain_groups("ab", ([1, 1], [2]), "observed")
    log_prob = oracle._group_log_probs(student, alignment.sides[0], 1.0)[0]
    p_a, p_b_after_a = 0.3, 0.8
    torch.testing.assert_close(
        log_prob[:2].exp(), torch.tensor([p_a, 1 - p_a], dtype=torch.float64) * p_b_after_a
    )
    loss = oracle.uld_loss(student, teacher, alignment=alignment)
    assert abs(float(loss - oracle.uld_loss(*chain_groups("ab", ([1, 1], [2]))[:2]))) > 0.01


def test_log_scales_sum_in_their_group_with_the_gradient_of_a_log_softmax():
    logits = normal(3, 5).requires_grad_()
    ids, groups = torch.tensor([4, 0, 2]), torch.tensor([2, 0, 2])
    scale = oracle.merged_log_scale(logits, ids, groups, 4, temperature=2.0)
    log_prob = (logits / 2).log_softmax(-1)
    expected = torch.stack([log_prob[1, 0], log_prob[0, 4] + log_prob[2, 2]])
    torch.testing.assert_close(scale[[0, 2]], expected)
    assert scale[[1, 3]].tolist() == [0.0, 0.0]
    (grad,) = torch.autograd.grad(scale @ torch.tensor([1.0, 7.0, 3.0, 7.0]).double(), logits)
    onehot = torch.nn.functional.one_hot(ids, 5)
    weights = torch.tensor([[3.0], [1.0], [3.0]])
    torch.testing.assert_close(grad, weights * (onehot - log_prob.detach().exp()) / 2)


def test_a_group_that_the_student_finds_impossible_keeps_its_gradient():
    """A clamp of the merged probability at 1e-8 would cut it off."""
    student, teacher, alignment = chain_groups("ab", ([1, 1], [2]))
    student[0] = torch.tensor([-70.0, 0, *[-math.inf] * 6])
    student.requires_grad_()
    pairs = overlap([1], [1], 8, 8)
    loss = oracle.uld_loss(
        student, teacher, alignment=alignment, overlap=pairs, beta=0.0, unmatched_weight=0.0
    )
    (grad,) = torch.autograd.grad(loss, student)
    p = math.exp(chain_log_prob("ab"))
    assert float(loss) > 15
    torch.testing.assert_close(grad[0, :2], torch.tensor([-p, p], dtype=torch.float64))


# The whole loss


def hand_alignment() -> TokenAlignment:
    """Student a|bc|d|ef|(cut), teacher ab|c|def."""
    groups = align_byte_spans(torch.tensor([1, 3, 4, 6, 7]), torch.tensor([2, 3, 6]))
    return TokenAlignment.from_groups(
        groups, torch.tensor([1, 3, 4, 0, 2]), torch.tensor([6, 5, 2]), 7
    )


def assert_gradcheck(function, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs], atol=1e-7)


def test_gradients_of_the_linear_loss_with_groups_matched_entries_and_labels():
    alignment, pairs = hand_alignment(), overlap([0, 3, 5], [4, 1, 2], 7, 9)
    teacher = (normal(3, 4, seed=2), normal(9, 4, seed=3, scale=0.7), normal(9, seed=4))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return oracle.linear_uld(
            hidden,
            weight,
            *teacher[:2],
            torch.tensor([0.3, 1.7]),
            student_bias=bias,
            teacher_bias=teacher[2],
            student_temperature=1.3,
            teacher_temperature=0.8,
            alignment=alignment,
            overlap=pairs,
            beta=0.4,
            matched_weight=0.6,
            unmatched_weight=1.5,
            labels=torch.tensor([1, 3, -100, 0, 2]),
            weight_soft=0.7,
            weight_hard=0.2,
        )

    assert_gradcheck(loss, normal(5, 4), normal(7, 4, seed=5, scale=0.7), normal(7, seed=6))


def test_gradients_of_uld_rows_and_of_their_log_scale():
    teacher, teacher_scale = normal(4, 12, seed=1), -normal(4, seed=2).abs()

    def rows(student: Tensor, scale: Tensor) -> Tensor:
        return oracle.uld_rows(
            student, teacher, student_log_scale=scale, teacher_log_scale=teacher_scale
        )

    assert_gradcheck(rows, normal(4, 9), -normal(4, seed=3).abs())


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gradients_of_the_hybrid_at_both_ends_of_beta(beta):
    teacher, pairs = normal(3, 9, seed=1), overlap([0, 3, 5], [4, 1, 2], 7, 9)

    def loss(student: Tensor) -> Tensor:
        return oracle.uld_loss(student, teacher, overlap=pairs, beta=beta)

    assert_gradcheck(loss, normal(3, 7))


def test_the_loss_sums_its_terms_with_their_weights():
    student, teacher, alignment = normal(5, 7), normal(3, 9, seed=1), hand_alignment()
    labels = torch.tensor([1, -100, 4, 0, 7])  # 7 is outside of the vocabulary
    group_weights, label_weights = torch.tensor([0.3, 1.7]), torch.arange(5.0)
    log_q, log_p = (student / 1.3).log_softmax(-1), (teacher / 0.8).log_softmax(-1)
    rows = oracle.uld_rows(
        student[[1, 3]] / 1.3,
        teacher[[1, 2]] / 0.8,
        student_log_scale=log_q[[0, 2], [1, 4]],
        teacher_log_scale=torch.stack([log_p[0, 6], log_p[0, 0] * 0]),
    )
    hard = -student.log_softmax(-1)[[0, 2, 3], [1, 4, 0]]
    options = {"alignment": alignment, "labels": labels, "weight_soft": 0.4, "weight_hard": 0.6}
    options |= {"student_temperature": 1.3, "teacher_temperature": 0.8}
    torch.testing.assert_close(
        oracle.uld_loss(student, teacher, group_weights, label_weights=label_weights, **options),
        0.4 * (rows @ group_weights.double()) + 0.6 * (0 * hard[0] + 2 * hard[1] + 3 * hard[2]),
    )
    torch.testing.assert_close(
        oracle.uld_loss(student, teacher, **options), 0.4 * rows.mean() + 0.6 * hard.mean()
    )


def test_the_linear_loss_is_that_of_the_logits_of_both_heads():
    hidden, weight, bias = normal(5, 4), normal(7, 4, seed=1), normal(7, seed=2)
    teacher_hidden, teacher_weight, teacher_bias = (
        *(normal(n, 3, seed=n) for n in (3, 9)),
        normal(9, seed=4),
    )
    options = {"alignment": hand_alignment(), "overlap": overlap([1], [2], 7, 9)}
    biases = {"student_bias": bias, "teacher_bias": teacher_bias}
    heads = (hidden, weight, teacher_hidden, teacher_weight)
    torch.testing.assert_close(
        oracle.linear_uld(*heads, **biases, **options),
        oracle.uld_loss(
            hidden @ weight.T + bias, teacher_hidden @ teacher_weight.T + teacher_bias, **options
        ),
    )


def test_turns_apart_in_a_sequence_are_scored_as_each_alone():
    """Labels at 2, 3 and 7, 8: the rows between them, whatever they hold, are not read."""
    text, cuts = "ab", ([1, 1], [2])
    student, teacher, alignment = chain_groups(text, cuts)
    other_student, other_teacher, other = chain_groups("ba", cuts)
    sequence = torch.full((10, 8), math.nan, dtype=torch.float64)
    positions = torch.tensor([2, 3, 7, 8])
    sequence[positions] = torch.cat([student, other_student])
    loss = oracle.uld_loss(
        sequence[positions],
        torch.cat([teacher, other_teacher]),
        torch.ones(2),
        alignment=TokenAlignment.concatenate([alignment, other]),
    )
    alone = oracle.uld_loss(student, teacher, alignment=alignment)
    torch.testing.assert_close(
        loss, alone + oracle.uld_loss(other_student, other_teacher, alignment=other)
    )


def test_nothing_to_score_is_zero_with_a_graph():
    hidden, weight = normal(0, 4).requires_grad_(), normal(7, 4).requires_grad_()
    empty = torch.empty(0, dtype=torch.int64)
    nothing = TokenAlignment.from_groups(align_byte_spans(empty, empty), empty, empty, 0)
    for options in ({}, {"alignment": nothing}, {"overlap": overlap([1], [1], 7, 9)}):
        loss = oracle.linear_uld(
            hidden, weight, normal(0, 4), normal(9, 4), labels=empty, weight_hard=1.0, **options
        )
        assert loss.shape == () and float(loss) == 0
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert all(grad.abs().sum() == 0 for grad in grads)


def test_the_teacher_gets_no_gradient():
    student, teacher = normal(3, 7).requires_grad_(), normal(3, 9, seed=1).requires_grad_()
    oracle.uld_loss(student, teacher, overlap=overlap([1], [2], 7, 9)).backward()
    oracle.uld_rows(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
