"""Bytes at which the tokens of two tokenizers end -> groups of tokens that end together.

N_s, N_t tokens of a text on each side; G aligned groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.tokens.arguments import check_index


class SpanGroups(NamedTuple):
    """The group of every token; -1 for tokens in none."""

    student_groups: Tensor  # (N_s,) int64 in [-1, G), not decreasing where scored
    teacher_groups: Tensor  # (N_t,) int64
    num_groups: int  # G
    num_bytes: int  # bytes of the completion that belong to groups, from its first byte on
    last_bytes: int = 0  # bytes of the last group; 0 if that is the end of turn


def align_byte_spans(
    student_ends: Tensor,  # (N_s,) int64, byte at which each token ends, not decreasing
    teacher_ends: Tensor,  # (N_t,) int64
) -> SpanGroups:
    """Groups of the tokens of one text: minimal runs on both sides that end at a common byte.

    Every byte up to the last common end belongs to exactly one group on each side. Tokens after it
    are in no group: one side was cut there, or the cut goes through a token. A token that spells
    nothing belongs to the group of the byte after it. If both sides begin with such tokens, these
    are a group. Takes N log N steps for N tokens, without a Python loop.
    """
    for side, ends in (("student", student_ends), ("teacher", teacher_ends)):
        what = "TokenBytes.byte_ends of one completion"
        check_index(f"align_byte_spans: {side}_ends", ends, what)
        if bool((ends[1:] < ends[:-1]).any()):
            raise ValueError(
                f"align_byte_spans: {side}_ends must not decrease, got {ends.tolist()[:8]}; pass "
                f"{what}."
            )
    num_student, num_teacher = student_ends.shape[0], teacher_ends.shape[0]
    if num_student == 0 or num_teacher == 0:
        return SpanGroups(
            torch.full_like(student_ends, -1), torch.full_like(teacher_ends, -1), 0, 0
        )
    # A run ends with the first token that reaches its last byte. Tokens that spell nothing and
    # stand there belong to the next run.
    is_first = torch.ones_like(student_ends, dtype=torch.bool)
    is_first[1:] = student_ends[1:] > student_ends[:-1]
    match = torch.searchsorted(teacher_ends, student_ends).clamp_max(num_teacher - 1)
    student_last = (is_first & (teacher_ends[match] == student_ends)).nonzero().squeeze(1)  # (G,)
    teacher_last = match[student_last]  # (G,)
    before_last, num_bytes = [0, 0, *student_ends[student_last[-2:]].tolist()][-2:]
    return SpanGroups(
        _groups_from_last(student_last, num_student),
        _groups_from_last(teacher_last, num_teacher),
        student_last.shape[0],
        num_bytes,
        num_bytes - before_last,
    )


def _groups_from_last(last: Tensor, num_tokens: int) -> Tensor:  # (G,) -> (N,)
    groups = torch.searchsorted(last, torch.arange(num_tokens, device=last.device))
    return groups.masked_fill_(groups == last.shape[0], -1)


def without_first(
    groups: SpanGroups,
    student_ends: Tensor,  # (N_s,) int64
    *,
    is_merged: bool,
) -> SpanGroups:
    """The first group holds a token that begins with a mark before the text: its distribution is
    over other words than the other side's. It becomes part of the next group, as the probability of
    a token alone, or is left out.
    """
    if not groups.num_groups:
        return groups
    is_first = groups.student_groups == 0
    num_bytes = 0 if is_merged else int(student_ends[is_first][-1])
    if groups.num_groups == 1:
        num_bytes = groups.num_bytes
    least = 0 if is_merged and groups.num_groups > 1 else -1
    student, teacher = (
        torch.where(side >= 0, (side - 1).clamp_min(least), -1)
        for side in (groups.student_groups, groups.teacher_groups)
    )
    num_left = groups.num_bytes - num_bytes
    return SpanGroups(student, teacher, groups.num_groups - 1, num_left, groups.last_bytes)
