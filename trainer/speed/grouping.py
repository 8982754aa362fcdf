"""Rows of a window dealt to its micro-batches by their length: little of a micro-batch is padding.

The loss is a mean over all tokens of the window, whichever rows share a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import replace

from gold_trainer.batches import Example, WindowBatch


def by_length(batches: Sequence[WindowBatch], sources: Sequence[str]) -> list[WindowBatch]:
    """Of one tokenizer: among the micro-batches that learn from the dataset, whose lengths are
    known before anything is written, the rows that are longest for the student come first. Sizes
    stay.
    """
    own = [i for i, source in enumerate(sources) if source == "dataset" and _is_free(batches[i])]
    pairs = [
        pair
        for i in own
        for pair in zip(batches[i].examples, batches[i].teacher_examples, strict=True)
    ]
    pairs.sort(key=lambda pair: length_of(pair[0]), reverse=True)
    result, start = list(batches), 0
    for i in own:
        stop = start + len(batches[i].examples)
        examples = teachers = [student for student, _ in pairs[start:stop]]
        if any(teacher is not student for student, teacher in pairs[start:stop]):
            teachers = [teacher for _, teacher in pairs[start:stop]]
        result[i] = replace(batches[i], examples=examples, teacher_examples=teachers)
        start = stop
    return result


def _is_free(batch: WindowBatch) -> bool:
    is_whole = all(example.completion_ids is not None for example in batch.examples)
    return is_whole and not batch.is_blank


def length_of(example: Example) -> int:
    return example.prompt_length + len(example.written_ids)
