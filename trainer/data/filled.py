"""Rows for several processes whose last batches nothing fills: accelerate would repeat rows there,
which an evaluation would count twice. None stands in their places, so that every process runs as
many batches as the others; a batch without a row is blank.
"""

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

from torch.utils.data import Dataset, IterableDataset, Sampler, SequentialSampler

from gold_trainer.batches import WindowBatch


def filled(rows: Any, multiple: int) -> Any:
    """Rows with a length, for indices of filled_sampler, or a stream of them."""
    if isinstance(rows, IterableDataset):
        return FilledStream(rows, multiple)
    return FilledRows(rows)


def filled_sampler(
    sampler_fn: Callable[[Any], Any] | None, multiple: int
) -> Callable[[Any], Sampler]:
    def make(rows: Any) -> Sampler:
        sampler = None if sampler_fn is None else sampler_fn(rows)
        return FilledSampler(SequentialSampler(rows) if sampler is None else sampler, multiple)

    return make


class FilledRows(Dataset):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | None) -> Any:
        return None if index is None else self.rows[index]


class FilledSampler(Sampler):
    def __init__(self, sampler: Any, multiple: int) -> None:
        self.sampler, self.multiple = sampler, multiple

    def __len__(self) -> int:
        return len(self.sampler) + -len(self.sampler) % self.multiple

    def __iter__(self) -> Iterator[int | None]:
        return chain(self.sampler, repeat(None, len(self) - len(self.sampler)))


class FilledStream(IterableDataset):
    def __init__(self, rows: Any, multiple: int) -> None:
        self.rows, self.multiple = rows, multiple

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for row in self.rows:
            count += 1
            yield row
        yield from repeat(None, -count % self.multiple)

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)


class WithoutFill:
    """A collator that leaves out what fills a batch."""

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        blank: Callable[[int], WindowBatch],  # of a row's index, without scored tokens
    ) -> None:
        self.collate, self.blank = collate, blank

    def __call__(self, rows: list[Any]) -> Any:
        present = [row for row in rows if row is not None]
        return self.collate(present) if present else self.blank(0)
