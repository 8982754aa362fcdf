"""Parts of the patch of trl: a model's head left out, and when trl's own loss is kept."""

import pytest
import torch
from torch import nn

from gold_kernels import jsd_loss
from gold_kernels.engine.logit_form import LogitForm
from gold_kernels.integrations.trl.jsd import is_taken
from gold_kernels.integrations.trl.pending import (
    HiddenModel,
    NotTakenError,
    PendingLogits,
    head_options,
    head_weight,
)
from gold_kernels.integrations.trl.stable import divergence_of
from gold_kernels.integrations.trl.uld import hybrid_options
from support.tiny_models import tiny

IDS = {"input_ids": torch.arange(6).reshape(2, 3)}


def pending(num_entries=None, bias=True):
    head = nn.Linear(8, 12, bias=bias)
    return PendingLogits(torch.randn(2, 3, 8), head, LogitForm(num_entries=num_entries), None)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
        (RuntimeError("a shape"), NotTakenError),
    ],
)
def test_only_what_a_model_makes_of_a_missing_head_is_a_reason_to_keep_trls_loss(error, seen):
    model = tiny("llama")[0]

    def call(**inputs):
        model(**inputs)
        raise error

    with pytest.raises(seen, match=str(error)):
        HiddenModel(model, call)(**IDS)


def test_a_model_that_calls_its_head_twice_is_not_taken():
    model = tiny("llama")[0]

    def call(**inputs):
        model(**inputs)
        return model(**inputs)

    with pytest.raises(NotTakenError, match="a forward that calls its head 2 times"):
        HiddenModel(model, call)(**IDS)


def test_of_a_padded_head_the_entries_that_make_logits_are_given():
    sides = pending(num_entries=10), pending(bias=False)
    assert head_weight(sides[0]).shape == (10, 8) and head_weight(sides[1]).shape == (12, 8)
    options = head_options(*sides)
    assert options["student_bias"].shape == (10,) and options["teacher_bias"] is None


@pytest.mark.parametrize(
    ("reduction", "num_items", "expected"),
    [("batchmean", None, True), ("sum", 5, True), ("sum", None, False), ("none", None, False)],
)
def test_a_loss_that_is_no_mean_of_rows_is_trls_own(reduction, num_items, expected):
    sides, labels = (pending(), pending()), torch.zeros(2, 3, dtype=torch.int64)
    assert is_taken(sides, labels, reduction, num_items) == expected
    assert not is_taken(sides, None, reduction, num_items)
    assert not is_taken((sides[0], torch.zeros(2, 3, 12)), labels, reduction, num_items)


@pytest.mark.parametrize(("v_student", "unmatched"), [(3, 0.0), (9, 0.4)])
def test_where_all_entries_of_a_side_are_matched_no_others_are_compared(v_student, unmatched):
    class Loss:  # a weak reference is kept of it
        _vocab_mapping = {5: 0, 6: 1, 7: 2}  # noqa: RUF012  # of the teacher to the student
        mapping_tensor = torch.zeros(1)
        beta, hybrid_matched_weight, hybrid_unmatched_weight = 0.5, 0.6, 0.4

    options = hybrid_options(Loss(), v_student, 12)
    assert options["overlap"].student_ids.tolist() == [0, 1, 2]
    assert (options["matched_weight"], options["unmatched_weight"]) == (0.6, unmatched)


def test_under_mixed_precision_heads_are_in_the_dtype_of_their_hidden_states():
    """As trl computes them: its gathered weights are the float32 originals."""
    weights = torch.randn(12, 8), torch.randn(12, 6)
    hidden = [torch.randn(1, 3, weight.shape[1]).bfloat16() for weight in weights]
    loss = divergence_of({})(None)(*hidden, *weights, torch.ones(1, 3), 0.5)[0]
    logits = [
        (states[0].float() @ weight.bfloat16().float().T)
        for states, weight in zip(hidden, weights, strict=True)
    ]
    torch.testing.assert_close(loss, jsd_loss(*logits))
