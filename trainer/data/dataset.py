"""Datasets with a length, read as Rows."""

import zlib
from collections.abc import Mapping, Sequence, Sized
from functools import cached_property
from typing import Any

import datasets
import torch
from transformers.utils import logging

from gold_trainer.data.columns import (
    SHAPE_COLUMNS,
    TEACHER_ID,
    has_shape,
    names_of,
    read_teacher_id,
    refuse_unused_columns,
)
from gold_trainer.data.data_files import MappedRows
from gold_trainer.data.features import AsWritten, undecoded
from gold_trainer.data.row_errors import ColumnsError, reading, shown
from gold_trainer.data.rows import Row, RowReader
from gold_trainer.data.samples import are_samples
from gold_trainer.data.tables import refuse_tables

logger = logging.get_logger(__name__)


class RowDataset(torch.utils.data.Dataset):
    """A map-style dataset read as Rows, with the options of RowReader."""

    def __init__(self, rows: Sequence[dict[str, Any]], **options: Any):
        refuse_tables(rows)
        if isinstance(rows, Mapping):
            raise ValueError(
                f"RowDataset: one dataset is expected, got {type(rows).__name__} with "
                f"{shown(list(rows))}; pass one of its splits."
            )
        if not isinstance(rows, Sized) or isinstance(rows, str):
            raise ValueError(
                "RowDataset: a map-style dataset with a length is expected, got "
                f"{type(rows).__name__}; load it without streaming, or pass a list of rows."
            )
        if len(rows) == 0:
            raise ValueError(
                "RowDataset: at least one row is expected, got none; check split and filters."
            )
        self.reader = RowReader.of(rows, **options)
        self.rows = undecoded(rows)
        self.as_written = AsWritten.of(self.rows)
        self.first_index = 0  # of those that can be read
        if has_shape(self.reader.columns(self._columns(0))):
            names = rows.column_names() if isinstance(rows, MappedRows) else names_of(rows)
            refuse_unused_columns(n for n in names if str(n) not in self.reader.ignore_columns)
        self.turns = self._turns() if self.reader.train_on == "all" else None

    def first(self, *, skips_bad: bool) -> Row:
        """The first row, or the first that can be read; ValueError where there is none."""
        refused: ValueError | None = None
        for index in range(len(self)):
            try:
                row = self[index]
            except ValueError as error:
                refused = refused or error
                if not skips_bad or isinstance(error, ColumnsError):
                    raise
            else:
                self.first_index = index
                return row
        raise ValueError(f"no row can be used; the first: {refused}") from refused

    def check_teacher_ids(self) -> None:
        """ValueError for the first row of no teacher, where the column can be read alone."""
        rows, known = self.rows, self.reader.teacher_ids
        if not known:  # the row that has one is refused when it is read
            return
        if isinstance(rows, datasets.Dataset) and TEACHER_ID in rows.column_names:
            rows = rows.with_format(None).select_columns(TEACHER_ID)
        elif not isinstance(rows, list | tuple):
            return
        for index, columns in enumerate(rows):
            if isinstance(columns, Mapping):
                read_teacher_id(columns, index, known)

    @property
    def description(self) -> str:
        """What the first row is, and so how it reaches the model."""
        if isinstance(self[self.first_index].prompt, str):
            return "plain text, as it stands: no chat template is applied"
        if self.turns is not None:
            return (
                f"{len(self.rows)} conversations, of which every assistant's turn is an example: "
                "the chat template is applied"
            )
        return "conversations: the chat template is applied"

    @cached_property
    def beginning(self) -> str:
        """A checksum of the first row's text: each checkpoint has it, and reads no row for it."""
        row = self[self.first_index]
        return f"{zlib.crc32(ascii((row.prompt, row.completion)).encode()):08x}"

    def __len__(self) -> int:
        return len(self.rows) if self.turns is None else len(self.turns)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # which ends an iteration
        turn = 0
        if self.turns is not None:
            index, turn = self.turns[index].tolist()
        return self.reader.row(self.reader.columns(self._columns(index)), index, turn)

    def _columns(self, index: int) -> Any:
        with reading(index, "dataset"):
            return self.as_written(self.rows[index])

    def row_of(self, index: int) -> int:
        """The dataset's row that an example is of."""
        return index if self.turns is None else int(self.turns[index, 0])

    def _turns(self) -> torch.Tensor:  # (examples, 2): row, turn
        """Counted from the conversations alone: a table's pictures are not read."""
        rows = conversations(self.rows)
        counts = []
        for index in range(len(rows)):
            try:
                columns = self.reader.columns(self.as_written(rows[index]))
            except Exception:  # of the dataset's own code; the row says so when it is read
                columns = None
            counts.append(self.reader.num_turns(columns, index))
        num_turns = torch.tensor(counts)
        of_row = torch.arange(len(counts)).repeat_interleave(num_turns)
        first = (num_turns.cumsum(0) - num_turns)[of_row]
        return torch.stack([of_row, torch.arange(len(of_row)) - first], 1)


def conversations(rows: Any) -> Any:
    """The rows, without a table's other columns where they can be left out."""
    if isinstance(rows, MappedRows):
        return rows.conversations()
    if isinstance(rows, datasets.Dataset) and rows.format["type"] is None:
        if are_samples(rows.column_names):
            return rows
        return rows.select_columns([n for n in rows.format["columns"] if n in SHAPE_COLUMNS])
    return rows


def as_rows(
    dataset: Any, *, has_chat_template: bool = False, skips_bad: bool = False, **options: Any
) -> Any:
    """The dataset read as Rows with these options of RowReader; None stays None."""
    if dataset is None or isinstance(dataset, RowDataset):
        return dataset
    rows = RowDataset(dataset, **options)
    if not skips_bad:
        rows.check_teacher_ids()
    # columns that do not fit show before weights are read and folders made
    first = rows.first(skips_bad=skips_bad)
    if not isinstance(first.prompt, str):
        logger.info(f"rows are {rows.description}")
    elif has_chat_template:
        logger.warning(
            "rows are plain text: they are taken as they stand, without the tokenizer's chat "
            "template; to have it applied, write conversations (a command line: text_as_messages)"
        )
    return rows
