"""Both sides of a batch with one tokenizer, where the teacher sees rows otherwise than the student:
the same completion behind two prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gold_trainer.batches import Example, WindowBatch
from gold_trainer.data.row_errors import renamed
from gold_trainer.data.rows import Row

if TYPE_CHECKING:
    from gold_trainer.rendering.collator import GOLDCollator


def batch_of(collator: "GOLDCollator", rows: Sequence[Row], examples: list[Example]) -> WindowBatch:
    """examples: of the student. Where no row has a view of the teacher's, they are its own too."""
    if all(row.view is None for row in rows):
        return WindowBatch(examples, examples)
    pairs = [
        (own, own) if row.view is None else _alike(own, seen_by_teacher(collator, row), collator)
        for row, own in zip(rows, examples, strict=True)
    ]
    return WindowBatch([own for own, _ in pairs], [other for _, other in pairs])


def seen_by_teacher(collator: "GOLDCollator", row: Row) -> Example:
    try:
        return collator.example(row.seen_by_teacher())
    except ValueError as error:
        raise renamed(error, f"on the teacher's side, {error}") from error


def completed(
    collator: "GOLDCollator", batch: WindowBatch, writer: str, examples: list[Example]
) -> WindowBatch:
    """The batch with these examples, which the writer, "student" or "teacher", has completed."""
    if batch.teacher_examples is batch.examples:
        return replace(batch, examples=examples, teacher_examples=examples)
    others = batch.teacher_examples if writer == "student" else batch.examples
    pairs = [
        _alike(own, other.unanswered(), collator)
        for own, other in zip(examples, others, strict=True)
    ]
    sides = [own for own, _ in pairs], [other for _, other in pairs]
    student, teacher = sides if writer == "student" else sides[::-1]
    return replace(batch, examples=student, teacher_examples=teacher)


def _alike(own: Example, other: Example, collator: "GOLDCollator") -> tuple[Example, Example]:
    """Both with the completion of the first, as much of it as both prompts leave room for."""
    if own.completion_ids is None:
        return own, other.unanswered()
    room = collator.room(other)
    ids = own.written_ids[:room]
    if len(ids) < len(own.written_ids):
        logprobs = None if own.logprobs is None else own.logprobs[:room]
        own = replace(own, completion_ids=ids, logprobs=logprobs)
    return own, replace(other, completion_ids=ids, pieces=None, logprobs=None)
