"""Rows of a window dealt to its micro-batches by their length: little of a micro-batch is padding.

The loss is a mean over all tokens of the window, whichever rows share a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import replace

from gold_trainer.batches import Example, WindowBatch


def by_length(batches: Sequence[WindowBatch], sources: Sequence[str]) -> list[WindowBatch]:
    """Of one tokenizer: among the micro-batches that learn from the dataset, whose lengths are
    known before anything is written, the longest rows come first. Sizes stay.
    """
    own = [i for i, source in enumerate(sources) if source == "dataset" and _is_free(batches[i])]
    order = sorted((e for i in own for e in batches[i].examples), key=_length, reverse=True)
    result, start = list(batches), 0
    for i in own:
        stop = start + len(batches[i].examples)
        examples = order[start:stop]
        result[i] = replace(batches[i], examples=examples, teacher_examples=examples)
        start = stop
    return result


def _is_free(batch: WindowBatch) -> bool:
    is_whole = all(example.completion_ids is not None for example in batch.examples)
    return is_whole and not batch.is_blank


def _length(example: Example) -> int:
    return example.prompt_length + len(example.written_ids)
