"""Completions of two tokenizers -> groups of tokens -> index tensors for the fused ULD loss.

N_s, N_t scored rows, one for each completion token; G aligned groups; S_s, S_t scalar rows. Row n
of a side is the hidden state that predicts completion token n: the causal shift was done before.

Both sides spell the same bytes, so bytes say where they meet. A group is a minimal run of student
tokens and a minimal run of teacher tokens that end at a common byte.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gold_kernels.tokens.arguments import check_flags, check_index, check_tables
from gold_kernels.tokens.ranges import SIDES, TextPair, TokenRange, check_texts
from gold_kernels.tokens.spans import SpanGroups, align_byte_spans, without_first
from gold_kernels.tokens.token_bytes import TokenBytes, as_id_tensor

MERGES = ("bayesian", "observed")


class TokenAlignment(NamedTuple):
    """Which rows of both sides make the groups of a batch of completions.

    On each side a group has one base row and any number of scalar rows. The base row brings a
    whole distribution, a scalar row the probability of one token, its own:

        log p_g(v) = log p(v | base row) + sum over scalar rows r of group g of log p(id_r | r)

    merge "bayesian" (the chain rule): the last token of the run is the base, the earlier ones are
    scalars. merge "observed" (as in TRL): the first token is the base, the later ones are scalars.
    """

    student_base_rows: Tensor  # (G,) int64 in [0, N_s)
    student_base_ids: Tensor  # (G,) int64, the actual tokens
    student_scalar_rows: Tensor  # (S_s,) int64 in [0, N_s)
    student_scalar_ids: Tensor  # (S_s,) int64, the actual tokens
    student_scalar_groups: Tensor  # (S_s,) int64 in [0, G)
    teacher_base_rows: Tensor  # (G,) int64 in [0, N_t)
    teacher_base_ids: Tensor  # (G,) int64
    teacher_scalar_rows: Tensor  # (S_t,) int64 in [0, N_t)
    teacher_scalar_ids: Tensor  # (S_t,) int64
    teacher_scalar_groups: Tensor  # (S_t,) int64 in [0, G)
    merge: str
    num_student_rows: int  # N_s, with the rows that are in no group
    num_teacher_rows: int  # N_t
    scored_bytes: int  # bytes of the completions that belong to groups
    completion_bytes: int  # bytes that the student's tokens spell

    @property
    def num_groups(self) -> int:  # G
        return self.student_base_rows.shape[0]

    @property
    def sides(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Base rows and ids, scalar rows, ids and groups of the student and of the teacher."""
        return self[0:5], self[5:10]

    def span_ids(self) -> tuple[Tensor, Tensor]:  # (G,) int64 of the student, of the teacher
        """Tokens of the base rows of groups with several tokens on some side; -1 for all others."""
        is_merged = torch.zeros_like(self.student_base_rows, dtype=torch.bool)
        for groups in (self.student_scalar_groups, self.teacher_scalar_groups):
            is_merged.index_fill_(0, groups, True)
        student, teacher = (
            torch.where(is_merged, ids, -1)
            for ids in (self.student_base_ids, self.teacher_base_ids)
        )
        return student, teacher

    def first_rows(self) -> tuple[Tensor, Tensor]:  # (G,) int64 of the student, of the teacher
        """The row of each group's first token, of merge "bayesian": both predict what follows the
        same bytes.
        """
        sides = self.with_first_base().sides
        return sides[0][0], sides[1][0]

    def with_first_base(self) -> "TokenAlignment":
        """The same groups, of merge "bayesian", with the first token of each as the base and the
        later ones as scalars.
        """
        assert self.merge == "bayesian", "the base of a group is its last token"
        changed = []
        for base_rows, base_ids, rows, ids, groups in self.sides:
            if not rows.shape[0]:
                changed += [base_rows, base_ids, rows, ids, groups]
                continue
            first = torch.searchsorted(groups, torch.arange(len(base_rows), device=groups.device))
            first = first.clamp_max(len(groups) - 1)
            has_scalars = groups[first] == torch.arange(len(base_rows), device=groups.device)
            is_last = groups != torch.cat([groups[1:], groups.new_full((1,), -1)])
            changed += [
                torch.where(has_scalars, rows[first], base_rows),
                torch.where(has_scalars, ids[first], base_ids),
                torch.where(is_last, base_rows[groups], rows.roll(-1)),
                torch.where(is_last, base_ids[groups], ids.roll(-1)),
                groups,
            ]
        return TokenAlignment._make((*changed, *self[10:]))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenAlignment":
        return TokenAlignment._make(
            field.to(device, non_blocking=non_blocking) if isinstance(field, Tensor) else field
            for field in self
        )

    @classmethod
    def from_groups(
        cls,
        groups: SpanGroups,
        student_ids: Tensor,  # (N_s,) int64, the tokens of the completion
        teacher_ids: Tensor,  # (N_t,) int64
        completion_bytes: int,
        *,
        merge: str = "bayesian",
        is_late: bool = False,
    ) -> "TokenAlignment":
        """The rows of one completion's groups.

        is_late repeats what TRL does with "observed": in place of each token's own row it reads
        the row after it, which predicts the next token. A last group without such a row is left
        out.
        """
        _check_merge("TokenAlignment", merge, is_late)
        for side, ids, own in zip(SIDES, (student_ids, teacher_ids), groups[:2], strict=True):
            check_index(f"TokenAlignment.from_groups: {side}_ids", ids, "the completion's tokens")
            if ids.shape != own.shape:
                raise ValueError(
                    f"TokenAlignment.from_groups: each token of the {side} has a group, got "
                    f"{ids.shape[0]} tokens and {own.shape[0]} groups; pass those of one text."
                )
        student_groups, teacher_groups = groups.student_groups, groups.teacher_groups
        scored_bytes = groups.num_bytes
        if is_late and groups.num_groups:
            last = groups.num_groups - 1
            if last in (int(student_groups[-1]), int(teacher_groups[-1])):
                student_groups, teacher_groups = (
                    side.masked_fill(side == last, -1) for side in (student_groups, teacher_groups)
                )
                scored_bytes -= groups.last_bytes
        return cls._make(
            (
                *_side_rows(student_groups, student_ids, merge, is_late),
                *_side_rows(teacher_groups, teacher_ids, merge, is_late),
                merge,
                student_ids.shape[0],
                teacher_ids.shape[0],
                scored_bytes,
                completion_bytes,
            )
        )

    @classmethod
    def concatenate(cls, alignments: Sequence["TokenAlignment"]) -> "TokenAlignment":
        """One alignment of several completions whose rows follow one another on both sides."""
        alignments = list(alignments)
        merges = {getattr(alignment, "merge", None) for alignment in alignments}
        if len(merges) != 1 or None in merges:
            raise ValueError(
                "TokenAlignment.concatenate: at least one alignment and one merge for all are "
                f"expected, got {len(alignments)} with {sorted(map(str, merges))}; align all "
                "completions of a batch alike."
            )
        student_rows = [a.num_student_rows for a in alignments]
        teacher_rows = [a.num_teacher_rows for a in alignments]
        return cls._make(
            (
                *_concatenate_side([a.sides[0] for a in alignments], student_rows),
                *_concatenate_side([a.sides[1] for a in alignments], teacher_rows),
                merges.pop(),
                sum(student_rows),
                sum(teacher_rows),
                sum(a.scored_bytes for a in alignments),
                sum(a.completion_bytes for a in alignments),
            )
        )


def _check_merge(function: str, merge: str, is_late: bool) -> None:
    if merge not in MERGES:
        raise ValueError(
            f"{function}: merge must be 'bayesian' or 'observed', got {merge!r}; 'bayesian' is the "
            "chain rule."
        )
    if is_late and merge != "observed":
        raise ValueError(
            f"{function}: is_late repeats a quirk of merge='observed', got merge={merge!r}; leave "
            "is_late out."
        )


def _side_rows(groups: Tensor, ids: Tensor, merge: str, is_late: bool) -> tuple[Tensor, ...]:
    """Base rows and ids (G,), then rows, ids and groups of the scalars (S,)."""
    scored = (groups >= 0).nonzero().squeeze(1)
    groups = groups[scored]
    is_base = torch.ones_like(groups, dtype=torch.bool)
    is_change = groups[1:] != groups[:-1]
    if merge == "bayesian":
        is_base[:-1] = is_change
    else:
        is_base[1:] = is_change
    bases, scalars = scored[is_base], scored[~is_base]
    return bases + is_late, ids[bases], scalars + is_late, ids[scalars], groups[~is_base]


def _concatenate_side(sides: list[tuple[Tensor, ...]], num_rows: list[int]) -> tuple[Tensor, ...]:
    first_row = first_group = 0
    shifted = []
    for side, rows in zip(sides, num_rows, strict=True):
        base_rows, base_ids, scalar_rows, scalar_ids, scalar_groups = side
        shifted.append(
            (
                base_rows + first_row,
                base_ids,
                scalar_rows + first_row,
                scalar_ids,
                scalar_groups + first_group,
            )
        )
        first_row += rows
        first_group += base_rows.shape[0]
    return tuple(torch.cat(column) for column in zip(*shifted, strict=True))


class CompletionAligner:
    """Aligns the completions of a student with a teacher's tokens, in data loader workers or after
    a rollout.

    The student's tokens are taken as they were sampled, never decoded and tokenised again: the
    table of TokenBytes says at which byte each ends. Special tokens inside a completion spell
    nothing and are in no group. The end of turn is a group of its own if both sides end after the
    same text.
    """

    def __init__(
        self,
        student: TokenBytes,
        teacher: TokenBytes,
        *,
        merge: str = "bayesian",
        is_late: bool = False,  # TRL's reading of "observed", see TokenAlignment.from_groups
        has_end_of_turn: bool = True,  # False: the stop decision is not distilled
    ) -> None:
        check_tables("CompletionAligner", student=student, teacher=teacher)
        check_flags("CompletionAligner", is_late=is_late, has_end_of_turn=has_end_of_turn)
        _check_merge("CompletionAligner", merge, is_late)
        self.student, self.teacher = student, teacher
        self.merge, self.is_late, self.has_end_of_turn = merge, is_late, has_end_of_turn

    @classmethod
    def from_tokenizers(
        cls,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        student_end_ids: Collection[int] | None = None,  # None: end of turn and eos
        teacher_end_ids: Collection[int] | None = None,
        merge: str = "bayesian",
        is_late: bool = False,
        has_end_of_turn: bool = True,
    ) -> "CompletionAligner":
        """Make it of two fast tokenizers. merge is that of TokenAlignment. Ends that are not given
        are end of turn and eos; has_end_of_turn=False leaves ends unscored.
        """
        return cls(
            TokenBytes(student_tokenizer, end_ids=student_end_ids),
            TokenBytes(teacher_tokenizer, end_ids=teacher_end_ids),
            merge=merge,
            is_late=is_late,
            has_end_of_turn=has_end_of_turn,
        )

    def teacher_ids(self, student_ids: Sequence[int] | Tensor) -> list[int]:
        """The teacher's tokens of a completion of the student, with the teacher's end of turn if
        the student ended its turn.

        Bytes that are not valid UTF-8 are kept up to the first fault, and the result then has no
        end. align() leaves the rest unscored and counts it.
        """
        student_ids = as_id_tensor(student_ids)
        num_text, is_ended = _split_end(student_ids, self.student)
        spelled = self.student.texts(student_ids[:num_text])[0]
        try:
            text = spelled.decode()
        except UnicodeDecodeError as error:
            text, is_ended = spelled[: error.start].decode(), False
        ids = self.teacher.encode(text)
        end = self.teacher.end_of_turn_id
        return [*ids, end] if is_ended and end is not None else ids

    def align(
        self,
        student_ids: Sequence[int] | Tensor,
        teacher_ids: Sequence[int] | Tensor,
        texts: Sequence[TextPair] | None = None,  # in order; None: all tokens but the end are one
        *,
        is_end_common: bool = True,  # both turns end behind the last of the texts
    ) -> TokenAlignment:
        """Rows of the groups of one completion; either side may have been cut.

        Tokens outside the texts, marks of a chat template, are in no group. Raises ValueError if
        the tokens of the two sides spell different texts.
        """
        student_ids, teacher_ids = as_id_tensor(student_ids), as_id_tensor(teacher_ids)
        num_student, student_ended = _split_end(student_ids, self.student)
        num_teacher, teacher_ended = _split_end(teacher_ids, self.teacher)
        if texts is None:
            texts = [TextPair(TokenRange(0, num_student), TokenRange(0, num_teacher))]
        check_texts(texts, len(student_ids), len(teacher_ids))
        student_groups = torch.full_like(student_ids, -1)
        teacher_groups = torch.full_like(teacher_ids, -1)
        total = SpanGroups(student_groups, teacher_groups, 0, 0)
        student_bytes, is_complete = 0, student_ended and teacher_ended and is_end_common
        for text in texts:
            ends = self._byte_ends(student_ids, teacher_ids, text)
            rows = (
                text.student.text_rows(self.student, student_ids),
                text.teacher.text_rows(self.teacher, teacher_ids),
            )
            own, other = (e[r - t.first] for e, r, t in zip(ends, rows, text[:2], strict=True))
            groups = align_byte_spans(own, other)
            if text.student.lead or text.teacher.lead:
                groups = without_first(groups, own, is_merged=self.merge == "bayesian")
            for side, side_rows, found in zip(total[:2], rows, groups[:2], strict=True):
                side[side_rows] = torch.where(found >= 0, found + total.num_groups, -1)
            total = total._replace(
                num_groups=total.num_groups + groups.num_groups,
                num_bytes=total.num_bytes + groups.num_bytes,
                last_bytes=groups.last_bytes if groups.num_groups else total.last_bytes,
            )
            student_bytes += _last(ends[0])
            is_last_whole = text.text is not None or _last(ends[0]) == _last(ends[1])
        if texts and is_complete and is_last_whole and self.has_end_of_turn:
            student_groups[-1] = teacher_groups[-1] = total.num_groups
            total = total._replace(num_groups=total.num_groups + 1, last_bytes=0)
        return TokenAlignment.from_groups(
            total, student_ids, teacher_ids, student_bytes, merge=self.merge, is_late=self.is_late
        )

    def _byte_ends(
        self, student_ids: Tensor, teacher_ids: Tensor, text_pair: TextPair
    ) -> tuple[Tensor, Tensor]:  # (N_s,), (N_t,)
        """At which byte of the common text each token ends.

        Where the text is not told, the student's tokens say what it is. If they do not tell where
        whitespace stood (a WordPiece tokenizer) and the teacher's do, the teacher's tokens say it.
        """
        leads = text_pair.student.lead, text_pair.teacher.lead
        student_ids, teacher_ids = (
            text_pair.student.of(student_ids),
            text_pair.teacher.of(teacher_ids),
        )
        if text_pair.text is not None:
            return self.student.ends(student_ids, leads[0]), self.teacher.ends(
                teacher_ids, leads[1]
            )
        says_text = (self.student, student_ids, leads[0])
        if self.student.is_spaced and not self.teacher.is_spaced:
            says_text = (self.teacher, teacher_ids, leads[1])
        texts = says_text[0].texts(*says_text[1:])
        for text in texts:
            student_ends = self.student.byte_ends(student_ids, text, leads[0])
            teacher_ends = self.teacher.byte_ends(teacher_ids, text, leads[1])
            if student_ends is not None and teacher_ends is not None:
                return student_ends, teacher_ends
        raise ValueError(
            "CompletionAligner.align: student and teacher tokens must spell one text, got "
            f"{self.student.texts(student_ids)[0][:80]!r} from {self.student.name} and "
            f"{self.teacher.texts(teacher_ids)[0][:80]!r} from {self.teacher.name}; take the "
            "teacher's tokens from teacher_ids()."
        )


def _split_end(ids: Tensor, table: TokenBytes) -> tuple[int, bool]:
    """How many tokens stand before an end token at the end, and whether there is one."""
    is_ended = ids.shape[0] > 0 and int(ids[-1]) in table.end_ids
    return ids.shape[0] - is_ended, is_ended


def _last(ends: Tensor) -> int:  # (N,)
    return int(ends[-1]) if ends.shape[0] else 0
