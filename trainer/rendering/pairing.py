"""Rows -> both sides of a batch for distillation across tokenizers: each rendered by its own
processor and chat template, joined by the bytes of their completions.

N_s, N_t completion tokens of a side, G groups. The same functions serve data loader workers, where
the completion is known, and the main process after a rollout. Both sides write the same texts
(content, thoughts), each with the marks of its own template around them. Marks are in no group.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from transformers.utils import logging

from gold_kernels import CompletionAligner, TokenAlignment
from gold_kernels.tokens.token_bytes import TokenBytes
from gold_trainer.batches import BatchAlignment, Example, WindowBatch
from gold_trainer.data.row_errors import renamed
from gold_trainer.data.rows import Row
from gold_trainer.fields.uld import ULDFields
from gold_trainer.rendering.answer_texts import AnswerTexts, common_texts, of_pieces, of_sample
from gold_trainer.rendering.collator import GOLDCollator, tokenizer_with_template

logger = logging.get_logger(__name__)

# Why nothing of a sample is distilled: the other tokenizer cannot spell its text; no token of one
# side ends where one of the other does.
SKIP_REASONS = ("unspelled", "no_common_end")


class Pair(NamedTuple):
    """One completion in the tokens of both sides."""

    student: Example  # of N_s completion tokens
    teacher: Example  # of N_t completion tokens
    alignment: TokenAlignment
    skip_reason: str | None


class CompletionPairs:
    """A completion of one side -> that of the other, and the groups of both."""

    def __init__(self, args: ULDFields, student: GOLDCollator, teacher: GOLDCollator):
        merge = args.uld_token_merge_strategy
        self.args = args
        self.aligner = CompletionAligner.from_tokenizers(
            tokenizer_with_template(student.processor),
            tokenizer_with_template(teacher.processor),
            student_end_ids=student.end_ids,
            teacher_end_ids=teacher.end_ids,
            merge=merge,
            is_late=merge == "observed",  # TRL's strategy with TRL's reading of it
            has_end_of_turn=args.has_end_of_turn,
        )
        self.is_warned: set[str] = set()

    def from_student(self, student: Example, teacher: Example, collator: GOLDCollator) -> Pair:
        """The student's tokens stay as they are. A known answer of a conversation is on the
        teacher's side what its own template makes of it; else the student's texts become the
        teacher's answer, which is cut to its room.
        """
        is_known = student.pieces is not None and teacher.pieces is not None
        try:
            written = self._texts(self.aligner.student, student)
            for text in written.texts.values():
                self.aligner.teacher.encode(text)  # what it cannot spell is named
            if not is_known:
                teacher = collator.answered(teacher, written.texts, is_ended=written.is_ended)
            read = self._texts(self.aligner.teacher, teacher)
            return self._pair(student, teacher, written, read)
        except ValueError as error:
            return self._unspelled(student, teacher, error)

    def from_teacher(self, student: Example, teacher: Example, collator: GOLDCollator) -> Pair:
        """The teacher's tokens stay as they are; its texts become the student's answer, which is
        cut to its room.
        """
        try:
            written = self._texts(self.aligner.teacher, teacher)
            for text in written.texts.values():
                self.aligner.student.encode(text)
            student = collator.answered(student, written.texts, is_ended=written.is_ended)
            read = self._texts(self.aligner.student, student)
            return self._pair(student, teacher, read, written)
        except ValueError as error:
            return self._unspelled(student.with_completion([]), teacher, error)

    def _texts(self, table: TokenBytes, example: Example) -> AnswerTexts:
        if example.pieces is None:
            return of_sample(table, example.written_ids, example.frames)
        return of_pieces(table, example.written_ids, example.pieces)

    def _pair(
        self, student: Example, teacher: Example, written: AnswerTexts, read: AnswerTexts
    ) -> Pair:
        """written is the student's side, read the teacher's."""
        texts, is_end_common = common_texts(written, read)
        alignment = self.aligner.align(
            written.ids,
            read.ids,
            texts,
            is_end_common=is_end_common,
        )
        num_bytes = alignment.completion_bytes + written.broken_bytes
        alignment = alignment._replace(completion_bytes=num_bytes)
        if not self.args.use_extended_uld:
            ids = student.written_ids, teacher.written_ids
            alignment = self._by_position(alignment, *ids)
        if alignment.num_groups:
            return Pair(student, teacher, alignment, None)
        where = student.where
        self._warn("no_common_end", where, "no token ends where one of the other side does")
        return Pair(student, teacher, alignment, "no_common_end")

    def _unspelled(self, student: Example, teacher: Example, error: ValueError) -> Pair:
        self._warn("unspelled", student.where, str(error))
        alignment = self.aligner.align(student.written_ids, [])
        return Pair(student, teacher.with_completion([]), alignment, "unspelled")

    def _warn(self, reason: str, where: str, detail: str) -> None:
        """The first sample of each reason; the log counts all."""
        if reason not in self.is_warned:
            self.is_warned.add(reason)
            text = "%s is not distilled (skipped_%s): %s; the log counts such rows"
            logger.warning(text, where, reason, detail)

    def _by_position(
        self, alignment: TokenAlignment, student_ids: list[int], teacher_ids: list[int]
    ) -> TokenAlignment:
        """Token i with token i, as ULD has it; end tokens only where they are not skipped."""
        skips = self.args.uld_skip_student_eos, self.args.uld_skip_teacher_eos
        tables = self.aligner.student, self.aligner.teacher
        num_pairs = min(
            len(ids) - (skip and ids[-1:] != [] and ids[-1] in table.end_ids)
            for ids, skip, table in zip((student_ids, teacher_ids), skips, tables, strict=True)
        )
        rows, none = torch.arange(num_pairs), torch.empty(0, dtype=torch.int64)
        ids = torch.tensor(student_ids[:num_pairs], dtype=torch.int64)
        # A padded head has rows of no token: a student may sample them, they spell nothing.
        lengths = tables[0].lengths[ids.clamp_max(tables[0].vocab_size)]
        return alignment._replace(
            student_base_rows=rows,
            student_base_ids=ids,
            student_scalar_rows=none,
            student_scalar_ids=none,
            student_scalar_groups=none,
            teacher_base_rows=rows,
            teacher_base_ids=torch.tensor(teacher_ids[:num_pairs], dtype=torch.int64),
            teacher_scalar_rows=none,
            teacher_scalar_ids=none,
            teacher_scalar_groups=none,
            scored_bytes=min(int(lengths.sum()), alignment.completion_bytes),
        )


class PairCollator:
    """Rows -> examples of both sides and, once completions are known, their alignment.

    Pictures are the row's own objects on both sides, unless the teacher sees others.
    """

    def __init__(self, student: GOLDCollator, teacher: GOLDCollator, pairs: CompletionPairs):
        self.student, self.teacher, self.pairs = student, teacher, pairs

    def __call__(self, rows: list[Row]) -> WindowBatch:
        examples = [self.student.with_frames(row, self.student.example(row)) for row in rows]
        teacher_examples = [self._teacher_example(row) for row in rows]
        batch = WindowBatch(examples, teacher_examples)
        if any(example.completion_ids is None for example in examples):
            return batch
        return self.with_student_completions(batch, examples)

    def blank(self, index: int) -> WindowBatch:
        """See GOLDCollator.blank."""
        sides = self.student.blank_example(index), self.teacher.blank_example(index)
        alignment = BatchAlignment(self.pairs.aligner.align([], []), [None])
        return WindowBatch([sides[0]], [sides[1]], alignment)

    def _teacher_example(self, row: Row) -> Example:
        # Plain text may end with the student's end of turn: the teacher gets what stands before.
        row = row.seen_by_teacher()
        is_text = isinstance(row.prompt, str)
        try:
            example = self.teacher.example(replace(row, completion=None) if is_text else row)
            return self.teacher.with_frames(row, example)
        except ValueError as error:
            raise renamed(error, f"on the teacher's side, {error}") from error

    def with_student_completions(self, batch: WindowBatch, examples: list[Example]) -> WindowBatch:
        """The batch with these examples of the student, sampled or known."""
        sides = zip(examples, batch.teacher_examples, strict=True)
        return _joined(batch, [self.pairs.from_student(*pair, self.teacher) for pair in sides])

    def with_teacher_completions(self, batch: WindowBatch, examples: list[Example]) -> WindowBatch:
        """The batch with these examples of the teacher, which it has completed."""
        sides = zip(batch.examples, examples, strict=True)
        return _joined(batch, [self.pairs.from_teacher(*pair, self.student) for pair in sides])


def _joined(batch: WindowBatch, pairs: list[Pair]) -> WindowBatch:
    has_several = any(pair.student.teacher_id is not None for pair in pairs)
    return replace(
        batch,
        examples=[pair.student for pair in pairs],
        teacher_examples=[pair.teacher for pair in pairs],
        alignment=BatchAlignment(
            TokenAlignment.concatenate([pair.alignment for pair in pairs]),
            [pair.skip_reason for pair in pairs],
            [pair.alignment for pair in pairs] if has_several else None,
        ),
    )
