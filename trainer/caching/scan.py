"""Which rows a teacher cache must hold: every example that a run can score, with its length.

Rows go the way that they go in training, from the reader to the collator, in data loader workers;
nothing of a model is needed.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Subset

from gold_trainer.batches import Example, ModelInputs, WindowBatch
from gold_trainer.caching.keys import Key, key_of
from gold_trainer.caching.store import Place
from gold_trainer.config import GOLDConfig
from gold_trainer.data.bad_rows import tolerant, tolerant_collator
from gold_trainer.objectives import Objective
from gold_trainer.rendering.collator import Processor, build_inputs

SCAN_SIZE = 16  # rows that a worker hands over at a time


class Found(NamedTuple):
    """An example of a split."""

    position: int  # in the dataset as it is read, where every turn may be an example
    key: Key
    num_scored: int
    length: int  # tokens of prompt and completion


def _examples(
    collate: Callable[[list[Any]], WindowBatch], rows: Iterable[Any]
) -> Iterator[Example | None]:
    """Each row as the teacher sees it; None where nothing of it is scored."""
    for row in rows:
        batch = collate([row])
        example = batch.teacher_examples[0]
        is_scored = not batch.is_blank and example.completion_ids
        yield example if is_scored else None


class Scanner:
    """A collator: positions and rows -> what is found of them."""

    def __init__(self, collate: Callable[[list[Any]], WindowBatch]) -> None:
        self.collate = collate

    def __call__(self, rows: list[tuple[int, Any]]) -> tuple[int, list[Found]]:
        positions = [position for position, _ in rows]
        examples = _examples(self.collate, (row for _, row in rows))
        found = [
            Found(
                position,
                key_of(example),
                len(example.written_ids),
                example.prompt_length + len(example.written_ids),
            )
            for position, example in zip(positions, examples, strict=True)
            if example is not None
        ]
        return len(rows), found


class Scored(NamedTuple):
    """A batch for the teacher."""

    places: list[tuple[Place, Key]]
    lengths: list[int]  # how many positions of each are scored
    inputs: ModelInputs | list[Example]  # these for a teacher that is elsewhere


class Builder:
    """A collator: rows of a split -> inputs of the teacher."""

    def __init__(
        self,
        split: str,
        collate: Callable[[list[Any]], WindowBatch],
        processor: Processor | None,  # None: no tensors are made
    ) -> None:
        self.split, self.collate, self.processor = split, collate, processor

    def __call__(self, rows: list[tuple[int, Any]]) -> Scored:
        examples = [
            example
            for example in _examples(self.collate, (row for _, row in rows))
            if example is not None
        ]
        places = [
            (Place(self.split, example.index, example.turn), key_of(example))
            for example in examples
        ]
        lengths = [len(example.written_ids) for example in examples]
        if self.processor is None:
            return Scored(places, lengths, examples)
        return Scored(places, lengths, build_inputs(self.processor, examples))


class _Numbered:
    """Rows with their positions."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        return position, self.rows[position]


def collator_of(
    args: GOLDConfig, objective: Objective, teacher_id: str | None = None
) -> Callable[[list[Any]], WindowBatch]:
    """A run's own, which leaves out the bad rows that the run leaves out, and those of others than
    this teacher.
    """
    collator = objective.collator
    collate = tolerant_collator(collator, collator.blank, args.skipped_reasons)
    return collate if teacher_id is None else OfTeacher(collate, collator.blank, teacher_id)


class OfTeacher:
    """A collator of single rows: those of other teachers are blank."""

    def __init__(
        self,
        collate: Callable[[list[Any]], WindowBatch],
        blank: Callable[[int], WindowBatch],
        teacher_id: str,
    ) -> None:
        self.collate, self.blank, self.teacher_id = collate, blank, teacher_id

    def __call__(self, rows: list[Any]) -> WindowBatch:
        batch = self.collate(rows)
        (example,) = batch.teacher_examples
        return batch if example.teacher_id == self.teacher_id else self.blank(example.index)


def as_in_training(rows: Any, args: GOLDConfig) -> Any:
    """The rows, where one that cannot be read ends the run or does not."""
    return tolerant(rows) if args.on_bad_row == "skip" else rows


def scan(
    rows: Any,  # a RowDataset
    collate: Callable[[list[Any]], WindowBatch],
    num_workers: int,
    *,
    part: slice = slice(None),  # of the positions: another rank has the others
    advance: Callable[[int], None],
) -> list[Found]:
    positions = range(len(rows))[part]
    loader: DataLoader = DataLoader(
        Subset(_Numbered(rows), positions),  # type: ignore[arg-type]  # a dataset by its methods
        batch_size=SCAN_SIZE,
        num_workers=num_workers,
        collate_fn=Scanner(collate),
    )
    found: list[Found] = []
    for count, some in loader:
        advance(count)
        found += some
    return found


def batches_of(found: Collection[Found], batch_size: int) -> list[list[int]]:
    """Positions of rows of similar lengths, the longest first: what does not fit shows at once."""
    ordered = sorted(found, key=lambda one: (-one.length, one.position))
    positions = [one.position for one in ordered]
    return [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]


def load(
    rows: Any, batches: list[list[int]], builder: Builder, num_workers: int
) -> Iterator[Scored]:
    loader: DataLoader = DataLoader(
        _Numbered(rows),  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=builder,
    )
    yield from loader
