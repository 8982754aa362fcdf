"""Ids, tables and texts of another kind than expected are a ValueError with a remedy. Ids of floats
were cut off in silence, and the letters of "<eos>" taken for ids.
"""

import numpy as np
import pytest
import torch

from gold_kernels import CompletionAligner, TokenAlignment, VocabOverlap, VocabProjection
from gold_kernels.tokens.ranges import TextPair, TokenRange
from gold_kernels.tokens.spans import align_byte_spans
from gold_kernels.tokens.token_bytes import TokenBytes, as_id_tensor
from support.tokenizers_cases import TOKENIZERS, table

IDS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([1.7, 2.0]),
        torch.tensor([True, False]),
        [1.0, 2.0],
        [True, False],
        [None, 3],
        [[1, 2]],
        [1 << 70],
        "ab",
        b"abc",
        {"input_ids": [1]},
        None,
        7,
    ],
)
def test_what_are_no_ids_is_refused(ids):
    aligner = CompletionAligner(table("byte level"), table("gemma"))
    for function in (as_id_tensor, aligner.teacher_ids, lambda x: aligner.align(x, [1])):
        with pytest.raises(ValueError, match=r"whole numbers are expected .* pass a list of ids"):
            function(ids)


def test_ids_of_arrays_and_scalars_are_taken():
    for ids in (np.array([3, 4]), (3, 4), list(torch.tensor([3, 4])), torch.tensor([3, 4]).int()):
        assert as_id_tensor(ids).tolist() == [3, 4]


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", b"abc", None])
def test_what_has_no_form_in_utf_8_is_refused_by_every_tokenizer(text):
    for name in ("byte level", "gemma", "word piece"):
        with pytest.raises(ValueError, match=r"has a form in UTF-8 .*leave out lone surrogates"):
            table(name).encode(text)


def test_end_tokens_are_ids_one_or_several():
    tokenizer = TOKENIZERS["byte level"]()
    assert TokenBytes(tokenizer, end_ids=5).end_ids >= {5}
    for options in ({"end_ids": "<eos>"}, {"end_of_turn_id": "<eos>"}, {"end_ids": [True]}):
        with pytest.raises(ValueError, match=r"must be ids of tokens, got .*convert_tokens_to_ids"):
            TokenBytes(tokenizer, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([0, 1], IDS, 5, 5), "student's ids must be a tensor .* got list"),
        ((IDS, IDS.float(), 5, 5), "teacher's ids must be .* got torch.float32"),
        ((IDS[None], IDS[None], 5, 5), r"student's ids must be a tensor \(K,\)"),
        ((IDS, IDS, "5", 5), "whole number, got torch.int64 and '5'; pass"),
    ],
)
def test_overlaps_of_other_kinds_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        VocabOverlap(*given)


def test_projections_of_other_kinds_are_refused():
    ones = torch.ones(5, 1)
    for columns, weights in ((ones, ones), ([[0]], [[1.0]])):
        with pytest.raises(ValueError, match="must be tensors, columns of int64, got"):
            VocabProjection.from_entries(columns, weights, 5)
    for options, got in (
        ({"num_pieces": 2.5}, r"2\.5 and 0\.1"),
        ({"num_pieces": True}, r"True and 0\.1"),
        ({"decay": "0.1"}, r"4 and 0\.1"),
        ({"decay": True}, "4 and True"),
    ):
        with pytest.raises(ValueError, match=rf"num_pieces must be at least 1 .* got {got}"):
            VocabProjection.from_token_bytes(table("gemma"), table("gemma"), **options)
    for size in ("5", True, 5.0, None):
        with pytest.raises(ValueError, match="teacher_vocab_size must be a whole number, got"):
            VocabProjection.from_entries(ones.long(), ones, size)
    for weight in (1e-300, 1e300):
        with pytest.raises(ValueError, match=r"weights must be positive and finite, got (0|inf)"):
            VocabProjection.from_entries(ones.long(), weight * ones.double(), 5)
    with pytest.raises(ValueError, match=r"got .*torch.complex64\); .* weights of float32"):
        VocabProjection.from_entries(ones.long(), ones.to(torch.complex64), 5)
    projection = VocabProjection.from_entries(ones.long(), ones, 5)
    exact = VocabOverlap(IDS[:0], IDS[:0], 5, 5)
    for weight in (0.0, float("nan"), "0.6", True):
        with pytest.raises(ValueError, match="least_weight must be positive"):
            projection.relaxed_overlap(exact, weight)
    for other in (None, tuple(exact), exact._replace(teacher_vocab_size=6)):
        with pytest.raises(ValueError, match=r"must be a VocabOverlap of \(5, 5\) entries, got"):
            projection.relaxed_overlap(other)


@pytest.mark.parametrize("name", ["is_late", "has_end_of_turn"])
def test_flags_of_an_aligner_are_true_or_false(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'; pass one"):
        CompletionAligner(table("gemma"), table("gemma"), **{name: "no"})


def test_a_decay_of_which_float32_makes_nothing_leaves_later_pieces_out():
    """Their weight would be 0, which is refused in entries that a caller makes."""
    sides = table("byte level"), table("gemma")
    first = VocabProjection.from_token_bytes(*sides, decay=0.0)
    for decay in (1e-300, 1e-39):
        other = VocabProjection.from_token_bytes(*sides, decay=decay)
        assert torch.equal(other.columns, first.columns)
        assert torch.equal(other.weights, first.weights)


@pytest.mark.parametrize("kind", [CompletionAligner, VocabOverlap, VocabProjection])
def test_a_tokenizer_in_place_of_its_table_is_refused_where_it_is_given(kind):
    make = kind if kind is CompletionAligner else kind.from_token_bytes
    tokenizer = table("gemma").tokenizer
    for sides, side in (
        ((tokenizer, table("gemma")), "student"),
        ((table("gemma"), None), "teach"),
    ):
        message = rf"the {side}.* must be TokenBytes, got .*{kind.__name__}\.from_tokenizers"
        with pytest.raises(ValueError, match=message):
            make(*sides)


def test_ends_and_groups_that_fit_no_tokens_are_refused():
    """Ends that decrease made groups of other bytes."""
    with pytest.raises(ValueError, match=r"student_ends must not decrease, got \[3, 2, 5\]"):
        align_byte_spans(torch.tensor([3, 2, 5]), torch.tensor([5]))
    with pytest.raises(ValueError, match=r"teacher_ends must be \(N,\) int64, got list"):
        align_byte_spans(torch.tensor([5]), [5])
    groups = align_byte_spans(torch.tensor([1, 2]), torch.tensor([2]))
    for ids, message in (
        (torch.arange(5), "each token of the student has a group, got 5 tokens and 2 groups"),
        ([1, 2], r"student_ids must be \(N,\) int64, got list; pass the completion's tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenAlignment.from_groups(groups, ids, torch.arange(1), 2)
    with pytest.raises(ValueError, match=r"got 1 with \['None'\]; align all completions"):
        TokenAlignment.concatenate(iter([None]))


def test_texts_are_ranges_of_the_tokens_one_behind_the_other():
    aligner = CompletionAligner(table("gemma"), table("gemma"))
    ids = table("gemma").encode("The digit is 7.")
    size = len(ids)

    def pair(first, stop):
        return TextPair(TokenRange(first, stop), TokenRange(first, stop))

    for texts in ([pair(0, size + 1)], [pair(2, 1)], [pair(0, 2), pair(1, 3)], [pair(-1, 1)]):
        with pytest.raises(ValueError, match=r"texts must be ranges of the student's .* tokens"):
            aligner.align(ids, ids, texts)
    with pytest.raises(ValueError, match="texts must be TextPairs, got tuple; pass"):
        aligner.align(ids, ids, [((0, 1), (0, 1))])
    assert aligner.align(ids, ids, [pair(0, 2), pair(2, size)]).num_groups == size


def test_masses_are_of_all_entries_and_0_where_there_are_none():
    overlap = VocabOverlap(IDS, IDS, 20, 20)
    for weights, got in ((torch.rand(5), r"\(5,\)"), ([1.0] * 20, "list"), (IDS.sum(), r"\(\)")):
        with pytest.raises(ValueError, match=rf"V at least 20, .* got {got}; pass probabilities"):
            overlap.student_mass(weights)
    assert overlap.student_mass(torch.zeros(2, 20)).tolist() == [0, 0]
    assert overlap.teacher_mass(torch.ones(20).to(torch.float8_e4m3fn)) == pytest.approx(0.1)
