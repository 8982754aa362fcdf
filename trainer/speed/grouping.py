"""Rows of a window dealt to its micro-batches by their length: little of a micro-batch is padding.

The loss is a mean over all tokens of the window, whichever rows share a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import replace

from gold_trainer.batches import Example, WindowBatch


def by_length(batches: Sequence[WindowBatch], sources: Sequence[str]) -> list[WindowBatch]:
    """Of one tokenizer: within the micro-batches of each source, whose completions are known, the
    longest rows come first. Sizes stay; micro-batches that run beside others' on several ranks do.
    """
    result = list(batches)
    for source in dict.fromkeys(sources):
        own = [i for i, other in enumerate(sources) if other == source and _is_free(batches[i])]
        rows = [example for i in own for example in batches[i].examples]
        order = sorted(rows, key=_length, reverse=True)
        if all(row is other for row, other in zip(rows, order, strict=True)):
            continue  # the very same batches: their tensors may be there already
        start = 0
        for i in own:
            stop = start + len(batches[i].examples)
            examples = order[start:stop]
            result[i] = replace(batches[i], examples=examples, teacher_examples=examples)
            start = stop
    return result


def _is_free(batch: WindowBatch) -> bool:
    return (
        not batch.is_blank
        and not batch.unscored
        and all(example.completion_ids is not None for example in batch.examples)
    )


def _length(example: Example) -> int:
    return example.prompt_length + len(example.written_ids)
