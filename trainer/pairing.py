"""Rows -> both sides of a batch for distillation across tokenizers: each rendered by its own
processor and chat template, joined by the bytes of their completions.

N_s, N_t completion tokens of a side, G groups. The same functions serve data loader workers, where
the completion is known, and the main process after a rollout. A completion's bytes are the same on
both sides: whitespace that the student's template writes around an answer belongs to it.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from transformers.utils import logging

from gold_kernels import CompletionAligner, TokenAlignment
from gold_trainer.batches import BatchAlignment, Example, WindowBatch
from gold_trainer.collator import GOLDCollator, tokenizer_with_template
from gold_trainer.dataset import Row
from gold_trainer.uld_config import ULDFields

logger = logging.get_logger(__name__)

# Why nothing of a sample is distilled: the other tokenizer cannot spell its text; no token of one
# side ends where one of the other does.
SKIP_REASONS = ("unspelled", "no_common_end")


class Pair(NamedTuple):
    """One completion in the tokens of both sides."""

    student_ids: list[int]  # (N_s,)
    teacher_ids: list[int]  # (N_t,)
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
        self.reverse = CompletionAligner(self.aligner.teacher, self.aligner.student)
        self.is_warned: set[str] = set()

    def from_student(self, student_ids: list[int], teacher_room: int | None, index: int) -> Pair:
        """The student's tokens stay as they are; the teacher's are cut to its room."""
        try:
            teacher_ids = self.aligner.teacher_ids(student_ids)[:teacher_room]
            return self._pair(student_ids, teacher_ids, index)
        except ValueError as error:
            return self._unspelled(student_ids, index, error)

    def from_teacher(self, teacher_ids: list[int], student_room: int | None, index: int) -> Pair:
        """The teacher's tokens stay as they are; the student's are cut to its room."""
        try:
            student_ids = self.reverse.teacher_ids(teacher_ids)[:student_room]
            return self._pair(student_ids, teacher_ids, index)
        except ValueError as error:
            return self._unspelled([], index, error)

    def _pair(self, student_ids: list[int], teacher_ids: list[int], index: int) -> Pair:
        alignment = self.aligner.align(student_ids, teacher_ids)
        if not self.args.use_extended_uld:
            alignment = self._by_position(alignment, student_ids, teacher_ids)
        if alignment.num_groups:
            return Pair(student_ids, teacher_ids, alignment, None)
        self._warn("no_common_end", index, "no token ends where one of the other side does")
        return Pair(student_ids, teacher_ids, alignment, "no_common_end")

    def _unspelled(self, student_ids: list[int], index: int, error: ValueError) -> Pair:
        self._warn("unspelled", index, str(error))
        return Pair(student_ids, [], self.aligner.align(student_ids, []), "unspelled")

    def _warn(self, reason: str, index: int, detail: str) -> None:
        """The first sample of each reason; the log counts all."""
        if reason not in self.is_warned:
            self.is_warned.add(reason)
            logger.warning("row %d is not distilled (skipped_%s): %s", index, reason, detail)

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

    Pictures are the row's own objects on both sides.
    """

    def __init__(self, student: GOLDCollator, teacher: GOLDCollator, pairs: CompletionPairs):
        self.student, self.teacher, self.pairs = student, teacher, pairs

    def __call__(self, rows: list[Row]) -> WindowBatch:
        examples = [self.student.example(row) for row in rows]
        # The teacher's completion follows from the student's, so that their bytes are the same.
        teacher_examples = [self._teacher_example(replace(row, completion=None)) for row in rows]
        batch = WindowBatch(examples, teacher_examples)
        if any(example.completion_ids is None for example in examples):
            return batch
        return self.with_student_completions(batch, examples)

    def _teacher_example(self, row: Row) -> Example:
        try:
            return self.teacher.example(row)
        except ValueError as error:
            raise ValueError(f"on the teacher's side, {error}") from error

    def with_student_completions(self, batch: WindowBatch, examples: list[Example]) -> WindowBatch:
        """The batch with these examples of the student, sampled or known."""
        sides = zip(examples, batch.teacher_examples, strict=True)
        pairs = [
            self.pairs.from_student(e.written_ids, _room(self.teacher, t), e.index)
            for e, t in sides
        ]
        return _joined(batch, pairs)

    def with_teacher_completions(self, batch: WindowBatch, examples: list[Example]) -> WindowBatch:
        """The batch with these examples of the teacher, which it has completed."""
        sides = zip(batch.examples, examples, strict=True)
        pairs = [
            self.pairs.from_teacher(t.written_ids, _room(self.student, e), e.index)
            for e, t in sides
        ]
        return _joined(batch, pairs)


def _room(collator: GOLDCollator, example: Example) -> int | None:
    return None if collator.max_length is None else collator.max_length - example.prompt_length


def _joined(batch: WindowBatch, pairs: list[Pair]) -> WindowBatch:
    students = zip(batch.examples, pairs, strict=True)
    teachers = zip(batch.teacher_examples, pairs, strict=True)
    return replace(
        batch,
        examples=[e.with_completion(pair.student_ids) for e, pair in students],
        teacher_examples=[e.with_completion(pair.teacher_ids) for e, pair in teachers],
        alignment=BatchAlignment(
            TokenAlignment.concatenate([pair.alignment for pair in pairs]),
            [pair.skip_reason for pair in pairs],
        ),
    )
