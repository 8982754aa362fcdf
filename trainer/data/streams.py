"""Streaming datasets: rows without a length, read one after the other."""

import json
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import datasets
from torch.utils.data import IterableDataset
from transformers.utils import logging

from gold_trainer.batches import WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.data.dataset import RowDataset, as_rows
from gold_trainer.data.features import AsWritten, undecoded
from gold_trainer.data.file_streams import MappedStream, row_numbers
from gold_trainer.data.row_errors import BadRow, reading
from gold_trainer.data.rows import Row, RowReader
from gold_trainer.data.tables import refuse_tables

logger = logging.get_logger(__name__)
END: Any = object()  # of a stream


def is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset | datasets.IterableDataset)


def _is_of_torch(stream: Any) -> bool:
    """Its __iter__ alone knows of workers; ours and that of datasets share rows out."""
    return not isinstance(stream, datasets.IterableDataset | MappedStream)


class RowStream(IterableDataset):
    """An iterable dataset (datasets.IterableDataset, or torch's) read as Rows.

    It has to give the same rows whenever it is iterated over: the first row is looked at before
    models are loaded, a resumed run skips what the first one has read, and every process reads all
    rows and keeps its own. A row of several turns that are learnt is read as so many Rows, one
    after the other: processes share those. Rows are counted from 0 in each pass; of several data
    loader workers each counts its own, and row n is of worker n % workers.
    """

    def __init__(self, stream: Any, **options: Any) -> None:
        self.stream, self.reader = undecoded(stream), RowReader.of(stream, **options)
        self.as_written = AsWritten.of(self.stream)
        self.is_tolerant = False  # a BadRow in the place of one that cannot be read

    def __iter__(self) -> Iterator[Row | BadRow]:
        columns = iter(self.stream)
        for index in row_numbers():
            with reading(index, "stream"):
                row = next(columns, END)
            if row is END:
                return
            row = self.as_written(row)
            yield from self.reader.rows(row, index, is_tolerant=self.is_tolerant)

    def set_epoch(self, epoch: int) -> None:
        """Another order of datasets' shuffle buffer in every epoch."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)


def passes(loader: Any, num_skipped: int) -> Iterator[WindowBatch]:
    """Micro-batches of a stream, pass after pass: a window that one leaves open is filled by the
    next, and a resumed run, which skips what is done, finds its place in any of them.
    """

    def batches() -> Iterator[WindowBatch]:
        for number in count():
            loader.set_epoch(number)
            num_batches = 0
            for batch in loader:
                num_batches += 1
                yield batch
            if not num_batches:
                raise ValueError(
                    "GOLDTrainer: a stream must give its rows whenever it is read, got none in "
                    f"pass {number + 1}; make a new iterator in __iter__."
                )

    return islice(batches(), num_skipped, None)


def read_rows(
    dataset: Any, args: GOLDConfig, *, has_chat_template: bool | None = None, **options: Any
) -> Any:
    """The dataset, or each dataset of a dict, read as Rows, with a length or without."""
    refuse_tables(dataset)
    if isinstance(dataset, dict):
        return {
            name: read_rows(part, args, has_chat_template=has_chat_template, **options)
            for name, part in dataset.items()
        }
    if isinstance(dataset, RowStream):
        return dataset
    if is_stream(dataset):
        return read_stream(dataset, args, **options)
    skips_bad = args.on_bad_row == "skip"
    has = bool(has_chat_template)
    rows = as_rows(dataset, has_chat_template=has, skips_bad=skips_bad, **options)
    if rows is not None and has_chat_template is False:
        first = rows[rows.first_index]
        if not isinstance(first.prompt, str):
            raise ValueError(
                f"{first.where}: a conversation needs a chat template, the student's processor has "
                "none; set its chat_template, or pass prompt and completion as plain text."
            )
    return rows


def open_rows(
    dataset: Any, args: GOLDConfig, *, has_chat_template: bool = False, **options: Any
) -> RowDataset | RowStream:
    """One dataset read as Rows; no row is looked at."""
    if is_stream(dataset):
        return _open_stream(dataset, args, **options)
    return RowDataset(dataset, **options)


def _open_stream(dataset: Any, args: GOLDConfig, **options: Any) -> RowStream:
    """ValueError for what a stream cannot do."""
    if args.teacher_cache is not None:
        raise ValueError(
            "GOLDTrainer: a dataset must have a length with teacher_cache, got a stream, of which "
            "nobody knows whether all rows are cached; load it without dataset_streaming."
        )
    if args.max_steps <= 0:
        raise ValueError(
            "GOLDTrainer: max_steps must be set for a streaming dataset, whose length nobody "
            f"knows, got {args.max_steps}; set it, or load the dataset without dataset_streaming."
        )
    if args.num_generations > 1:
        raise ValueError(
            "GOLDTrainer: num_generations must be 1 with a streaming dataset, got "
            f"{args.num_generations}; rows come once: load the dataset without streaming."
        )
    if _is_of_torch(dataset) and _goes_on(dataset):
        raise ValueError(
            "GOLDTrainer: a stream must give its rows whenever it is read, got "
            f"{type(dataset).__name__}, whose __iter__ returns one iterator each time; make a new "
            "one there."
        )
    return RowStream(dataset, **options)


def _goes_on(dataset: Any) -> bool:
    """Whether its iterator is one, which goes on where it was; __iter__ may also begin it again."""
    if iter(dataset) is not iter(dataset):
        return False
    firsts = []
    for _ in range(2):
        with reading(0, "stream"):
            firsts.append(_plain(next(iter(dataset), END)))
    return firsts[0] != firsts[1]


def _plain(row: Any) -> str:
    """Text and numbers of a row; pictures may be made anew."""
    return json.dumps(row, default=lambda value: type(value).__name__, skipkeys=True)


def read_stream(dataset: Any, args: GOLDConfig, **options: Any) -> RowStream:
    """ValueError for what a stream cannot do, and for a first row that does not fit."""
    stream = _open_stream(dataset, args, **options)
    if args.dataloader_num_workers > 1 and _is_of_torch(dataset):
        logger.warning_once(
            f"GOLDTrainer: each of {args.dataloader_num_workers} data loader workers reads a "
            f"stream of torch from its beginning: {type(dataset).__name__} has to deal its rows to "
            "them (torch.utils.data.get_worker_info), or each row comes that many times; "
            "dataloader_num_workers=1 reads it once."
        )
    stream.is_tolerant = args.on_bad_row == "skip"
    if next((row for row in stream if not isinstance(row, BadRow)), None) is None:
        raise ValueError(
            "GOLDTrainer: a streaming dataset must have at least one row that can be used, got "
            "none; check split and filters."
        )
    return stream
