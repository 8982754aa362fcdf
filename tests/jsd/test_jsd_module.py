"""FusedLinearJSDLoss: Liger's positional order, labels with ignore_index, soft and hard loss."""

import pytest
import torch

from gold_kernels import FusedLinearJSDLoss
from gold_kernels.jsd import reference
from support.jsd_cases import random_case, run

LABELS = torch.tensor([3, -100, 7, 0, -100, 19])
SCORED = LABELS != -100


def _expected(case, weight_hard=0.5, weight_soft=0.5, beta=0.5, temperature=1.0):
    """Soft and hard mean over scored rows, by autograd in float64."""
    logits = case.student_hidden[SCORED] @ case.student_weight.T
    teacher = case.teacher_hidden[SCORED] @ case.teacher_weight.T
    soft = reference.jsd_rows(logits, teacher, beta=beta, temperature=temperature).mean()
    hard = torch.nn.functional.cross_entropy(logits, LABELS[SCORED])
    return weight_soft * soft + weight_hard * hard, soft, hard


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("weight_hard", "weight_soft"), [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_soft_and_hard_loss_and_their_gradients(weight_hard, weight_soft, temperature):
    case = random_case(6, 20, 8, 12).to(torch.float64)
    loss = FusedLinearJSDLoss(weight_hard, weight_soft, 0.3, temperature=temperature, chunk_size=2)
    actual = run(lambda *args: loss(*args, LABELS), case)
    truth = run(lambda *_: _expected(case, weight_hard, weight_soft, 0.3, temperature)[0], case)
    for ours, expected in zip(actual, truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_the_kernel_gives_the_same_hard_loss_as_torch():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = random_case(6, 20, 8, 12)
    labels = LABELS.clamp_min(0)
    options = {"temperature": 2.0, "chunk_size": 4, "backend": "triton"}
    module = FusedLinearJSDLoss(weight_hard_loss=0.3, weight_soft_loss=0.7, **options)
    single = case.to(torch.float32, device)

    def fused(*tensors):
        return module(*tensors, labels.to(device))

    def oracle(*tensors):
        hard = torch.nn.functional.cross_entropy(tensors[0] @ tensors[1].T, labels)
        return 0.7 * reference.linear_jsd(*tensors, temperature=2.0) + 0.3 * hard

    for ours, truth in zip(run(fused, single), run(oracle, case.to(torch.float64)), strict=True):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-4, atol=1e-7)


def test_batched_inputs_and_returned_parts():
    case = random_case(6, 20, 8, 12).to(torch.float64)
    batched = [case[0].view(2, 3, 8), case[1], case[2].view(2, 3, 12), case[3]]
    module = FusedLinearJSDLoss(return_soft_hard_loss=True)
    loss, soft, hard = module(*batched, LABELS.view(2, 3))
    for ours, truth in zip((loss, soft, hard), _expected(case), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(("hard", "soft"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_part_of_weight_zero_is_returned_as_it_is(hard, soft):
    case = random_case(6, 20, 8, 12).to(torch.float64)
    module = FusedLinearJSDLoss(hard, soft, return_soft_hard_loss=True)
    loss, *parts = module(*case, LABELS)
    _, *expected = _expected(case)
    for ours, truth in zip(parts, expected, strict=True):
        torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(loss, soft * expected[0] + hard * expected[1])


def test_all_labels_ignored_is_a_zero_loss_with_a_graph():
    case = random_case(6, 20, 8, 12).to(torch.float32)
    loss = FusedLinearJSDLoss()(*case, torch.full((6,), -100))
    loss.backward()
    assert loss.shape == () and float(loss) == 0.0
    assert not case.student_hidden.grad.any()


def test_a_label_outside_the_vocabulary_has_no_cross_entropy_but_counts():
    case = random_case(6, 20, 8, 12).to(torch.float64)
    labels = torch.where(SCORED, LABELS, 20)
    _, soft, hard = FusedLinearJSDLoss(return_soft_hard_loss=True)(*case, labels)
    assert float(hard) == pytest.approx(float(_expected(case)[2]) * int(SCORED.sum()) / 6)
    assert float(soft) == pytest.approx(float(reference.linear_jsd(*case)))


def test_ignored_rows_are_never_projected():
    case = random_case(6, 20, 8, 12).to(torch.float32)
    with torch.no_grad():
        case.student_hidden[~SCORED] = float("nan")
    loss = FusedLinearJSDLoss()(*case, LABELS)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(case.student_weight.grad).all()


def test_biases_follow_the_labels_as_in_liger():
    case = random_case(6, 20, 8, 12).to(torch.float64)
    bias = torch.randn(20, dtype=torch.float64)
    actual = FusedLinearJSDLoss(0.0, 1.0)(*case, LABELS, bias, -bias)
    student = case.student_hidden[SCORED] @ case.student_weight.T + bias
    teacher = case.teacher_hidden[SCORED] @ case.teacher_weight.T - bias
    torch.testing.assert_close(actual, reference.jsd_rows(student, teacher).mean())


def test_states_and_labels_of_other_positions_are_refused_where_they_have_as_many_rows():
    """(2, 6) and (3, 4) are both twelve rows, of other tokens."""
    heads = torch.randn(20, 8), torch.randn(20, 12)
    student, teacher = torch.randn(2, 6, 8), torch.randn(3, 4, 12)
    labels, loss_fn = torch.arange(12), FusedLinearJSDLoss()
    with pytest.raises(ValueError, match=r"\(2, 6\) of student_input, \(3, 4\) of teacher_input"):
        loss_fn(student, heads[0], teacher, heads[1], labels)
    teacher = teacher.reshape(2, 6, 12)
    with pytest.raises(ValueError, match=r"the same \(B, L\) .* \(6, 2\) of true_labels; pass"):
        loss_fn(student, heads[0], teacher, heads[1], labels.reshape(6, 2))
    flat = loss_fn(student.flatten(0, 1), heads[0], teacher, heads[1], labels)
    assert torch.equal(loss_fn(student, heads[0], teacher, heads[1], labels.reshape(2, 6)), flat)
