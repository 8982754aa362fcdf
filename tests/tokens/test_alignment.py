"""Groups of tokens that end at common bytes, against a brute-force walk over bytes; base and scalar
rows of every merge; batches.
"""

import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gold_kernels.tokens.alignment import (
    CompletionAligner,
    SpanGroups,
    TokenAlignment,
    align_byte_spans,
)
from support.alignment_cases import SIDES, aligned, rows_by_group
from support.tokenizers_cases import TEXTS, table


def brute_force_groups(student_ends: list[int], teacher_ends: list[int]) -> list[list[list[int]]]:
    """Byte by byte: a group closes where a token ends on both sides."""
    groups, firsts = [], [0, 0]
    for byte in range(max([0, *student_ends, *teacher_ends]) + 1):
        if byte in student_ends and byte in teacher_ends:
            lasts = [ends.index(byte) for ends in (student_ends, teacher_ends)]
            groups.append([list(range(f, last + 1)) for f, last in zip(firsts, lasts, strict=True)])
            firsts = [last + 1 for last in lasts]
    return groups


def groups_by_token(groups: Tensor, num_groups: int) -> list[list[int]]:
    return [(groups == g).nonzero().flatten().tolist() for g in range(num_groups)]


ENDS = st.lists(st.integers(0, 30), max_size=20).map(sorted)


@settings(deadline=None, max_examples=500)
@given(student_ends=ENDS, teacher_ends=ENDS)
@example(student_ends=[0, 0, 2, 2, 5], teacher_ends=[2, 2, 2, 4, 5, 5])  # tokens without bytes
@example(student_ends=[3], teacher_ends=[1, 2])  # cut before a common end
@example(student_ends=[0, 0], teacher_ends=[0])
def test_groups_are_the_runs_that_a_walk_over_bytes_finds(student_ends, teacher_ends):
    groups = align_byte_spans(
        torch.tensor(student_ends, dtype=torch.int64), torch.tensor(teacher_ends, dtype=torch.int64)
    )
    expected = brute_force_groups(student_ends, teacher_ends)
    assert groups.num_groups == len(expected)
    for side, tokens in enumerate((groups.student_groups, groups.teacher_groups)):
        assert groups_by_token(tokens, groups.num_groups) == [group[side] for group in expected]
    covered = [0, *sorted(set(student_ends) & set(teacher_ends))]
    assert groups.num_bytes == covered[-1]
    assert groups.last_bytes == covered[-1] - covered[-2:][0]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), num_bytes=st.integers(1, 60))
def test_every_byte_is_in_exactly_one_group_on_each_side(data, num_bytes):
    cuts = st.lists(st.integers(0, num_bytes), max_size=40).map(sorted)
    ends = [torch.tensor([*data.draw(cuts), num_bytes]) for _ in SIDES]
    groups = align_byte_spans(*ends)
    assert groups.num_bytes == num_bytes
    group_of_bytes = []
    for side_ends, tokens in zip(ends, (groups.student_groups, groups.teacher_groups), strict=True):
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), side_ends[:-1]])
        byte_groups = [[] for _ in range(num_bytes)]
        for start, end, group in zip(starts, side_ends, tokens, strict=True):
            for byte in range(start, end):
                byte_groups[byte].append(int(group))
        assert all(len(found) == 1 and found[0] >= 0 for found in byte_groups)
        group_of_bytes.append(byte_groups)
    assert group_of_bytes[0] == group_of_bytes[1]


# Student tokens a|bc|d|ef, teacher tokens ab|c|def of the text "abcdef": groups abc and def.
HAND_GROUPS = SpanGroups(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1]), 2, 6, 3)
HAND_IDS = (torch.tensor([10, 11, 12, 13]), torch.tensor([20, 21, 22]))


def test_the_groups_of_the_example_are_those_of_its_byte_ends():
    groups = align_byte_spans(torch.tensor([1, 3, 4, 6]), torch.tensor([2, 3, 6]))
    assert [side.tolist() for side in groups[:2]] == [side.tolist() for side in HAND_GROUPS[:2]]
    assert groups[2:] == HAND_GROUPS[2:]


@pytest.mark.parametrize(
    ("options", "student", "teacher"),
    [
        # rows and ids of the bases, then rows, ids and groups of the scalars
        (
            {},
            ([1, 3], [11, 13], [0, 2], [10, 12], [0, 1]),
            ([1, 2], [21, 22], [0], [20], [0]),
        ),
        (
            {"merge": "observed"},
            ([0, 2], [10, 12], [1, 3], [11, 13], [0, 1]),
            ([0, 2], [20, 22], [1], [21], [0]),
        ),
        # the last group would need a row after the last one
        (
            {"merge": "observed", "is_late": True},
            ([1], [10], [2], [11], [0]),
            ([1], [20], [2], [21], [0]),
        ),
    ],
)
def test_base_and_scalar_rows_of_every_merge(options, student, teacher):
    alignment = TokenAlignment.from_groups(HAND_GROUPS, *HAND_IDS, 6, **options)
    assert [field.tolist() for field in alignment.sides[0]] == list(student)
    assert [field.tolist() for field in alignment.sides[1]] == list(teacher)
    assert alignment.merge == options.get("merge", "bayesian")
    assert (alignment.num_student_rows, alignment.num_teacher_rows) == (4, 3)


@pytest.mark.parametrize("without_next", ["student", "teacher", "both", "neither"])
def test_a_last_group_whose_rows_have_no_next_row_is_not_read_late(without_next):
    """An end of turn that is not distilled is such a next row."""
    groups, ids = list(HAND_GROUPS[:2]), list(HAND_IDS)
    for side in (0, 1):
        if without_next not in ("both", SIDES[side]):
            groups[side] = torch.cat([groups[side], torch.tensor([-1])])
            ids[side] = torch.cat([ids[side], torch.tensor([9])])
    late = TokenAlignment.from_groups(
        SpanGroups(*groups, *HAND_GROUPS[2:]), *ids, 6, merge="observed", is_late=True
    )
    assert late.scored_bytes == 3 * late.num_groups, "those of the groups that are left"
    assert late.num_groups == late.teacher_base_rows.shape[0] == 1 + (without_next == "neither")
    assert late.student_base_rows.tolist() == [1, 3][: late.num_groups]
    assert late.teacher_base_rows.tolist() == [1, 3][: late.num_groups]


def test_late_rows_keep_the_last_text_group_where_the_end_of_turn_follows():
    options = {"merge": "observed", "has_end_of_turn": False}
    _, ids, on_time = aligned(("gpt2", "mistral"), "one two", **options)
    late = aligned(("gpt2", "mistral"), "one two", is_late=True, **options)[2]
    assert torch.equal(late.student_base_rows, on_time.student_base_rows + 1)
    assert late.student_base_rows[-1] == len(ids["student"]) - 1
    ended = aligned(("gpt2", "mistral"), "one two", merge="observed", is_late=True)[2]
    assert torch.equal(ended.student_base_rows, late.student_base_rows)
    assert on_time.scored_bytes == late.scored_bytes == ended.scored_bytes == len("one two")


@pytest.mark.parametrize(("text", "scored"), [("one two", "one"), ("one", ""), ("", "")])
def test_bytes_of_a_last_group_that_late_rows_leave_out_are_not_scored(text, scored):
    options = {"is_ended": False, "merge": "observed"}
    on_time = aligned(("gpt2", "mistral"), text, **options)[2]
    late = aligned(("gpt2", "mistral"), text, is_late=True, **options)[2]
    assert late.num_groups == max(on_time.num_groups - 1, 0)
    assert (on_time.scored_bytes, late.scored_bytes) == (len(text), len(scored))
    assert late.completion_bytes == len(text)


def test_a_batch_follows_row_after_row_on_both_sides():
    parts = [
        aligned(names, text)[2]
        for names, text in (
            (("qwen", "mistral"), TEXTS["emoji sequence"]),
            (("qwen", "mistral"), ""),
            (("mistral", "qwen"), TEXTS["emoji sequence"]),
        )
    ]
    for side in SIDES:
        assert all(getattr(parts[i], f"{side}_scalar_rows").numel() for i in (0, 2))
    batch = TokenAlignment.concatenate(parts)
    for side in SIDES:
        expected, first_row = [], 0
        for part in parts:
            rows = rows_by_group(part, side)
            expected += [[row + first_row for row in group] for group in rows]
            first_row += getattr(part, f"num_{side}_rows")
        assert rows_by_group(batch, side) == expected
        assert getattr(batch, f"num_{side}_rows") == first_row
        ids = [getattr(part, f"{side}_scalar_ids") for part in parts]
        assert torch.equal(getattr(batch, f"{side}_scalar_ids"), torch.cat(ids))
    assert batch.scored_bytes == 2 * len(TEXTS["emoji sequence"].encode())
    assert batch.num_groups == sum(part.num_groups for part in parts)


def test_a_batch_with_nothing_to_score_has_no_groups():
    nothing = aligned(("qwen", "mistral"), "", is_ended=False)[2]
    batch = TokenAlignment.concatenate([nothing, nothing])
    assert batch.num_groups == batch.completion_bytes == batch.num_student_rows == 0


def test_an_alignment_travels_from_workers_to_a_device():
    alignment = aligned(("qwen", "mistral"), TEXTS["emoji sequence"])[2]
    moved = pickle.loads(pickle.dumps(alignment)).to("meta")
    assert all(field.device.type == "meta" for field in moved[:8])
    assert moved[10:] == alignment[10:]
    aligner = CompletionAligner(table("gemma"), table("unigram"))
    ids = aligner.student.encode("one two")
    copy = pickle.loads(pickle.dumps(aligner))
    assert copy.teacher_ids(ids) == aligner.teacher_ids(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "mean"}, "merge must be 'bayesian' or 'observed', got 'mean'"),
        ({"is_late": True}, "is_late repeats a quirk of merge='observed', got merge='bayesian'"),
    ],
)
def test_unknown_merges_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CompletionAligner(table("gemma"), table("gemma"), **options)
    with pytest.raises(ValueError, match=message):
        TokenAlignment.from_groups(HAND_GROUPS, *HAND_IDS, 6, **options)


def test_alignments_of_different_merges_are_not_one_batch():
    parts = [
        TokenAlignment.from_groups(HAND_GROUPS, *HAND_IDS, 6, merge=merge)
        for merge in ("bayesian", "observed")
    ]
    with pytest.raises(ValueError, match=r"one merge for all .* got 2 with"):
        TokenAlignment.concatenate(parts)
    with pytest.raises(ValueError, match="at least one alignment"):
        TokenAlignment.concatenate([])


def test_byte_ends_of_another_shape_or_dtype_are_refused():
    ends = torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"student_ends must be \(N,\) int64, got \(1, 2\)"):
        align_byte_spans(ends[None], ends)
    with pytest.raises(ValueError, match=r"teacher_ends must be .* torch\.int32; pass"):
        align_byte_spans(ends, ends.int())


def test_span_ids_are_the_base_tokens_of_groups_of_several_tokens():
    groups = align_byte_spans(torch.tensor([1, 3, 4, 6]), torch.tensor([1, 4, 6]))  # a|bcd|ef
    alignment = TokenAlignment.from_groups(groups, *HAND_IDS, 6)
    assert [side.tolist() for side in alignment.span_ids()] == [[-1, 12, -1], [-1, 21, -1]]
