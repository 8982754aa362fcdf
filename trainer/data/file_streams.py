"""From a dataset's name to a stream of rows: nothing is loaded ahead, or held in memory.

The same files, folders and hub ids as data_files.py knows; whole splits, or slices that are counted
in rows from the beginning.
"""

import re
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import datasets
from torch.utils.data import IterableDataset, get_worker_info

from gold_trainer.data.data_files import (
    DataArguments,
    csv_options,
    load_files_of,
    load_split,
    named_columns,
    refuse_missing_split,
    saved_splits,
    source_of,
    split_names,
)
from gold_trainer.data.features import AsWritten, undecoded
from gold_trainer.data.json_files import JSON_SUFFIXES, json_rows
from gold_trainer.data.split_files import BUILDERS, json_file_of

SLICE = re.compile(r"(?P<name>[^\[\]+%]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?$")


def row_numbers() -> Iterator[int]:
    """Numbers of the rows that this process reads of a stream, one after the other: no two data
    loader workers have one in common, since a window takes rows of one number for one row.
    """
    worker = get_worker_info()
    return count() if worker is None else count(worker.id, worker.num_workers)


class MappedStream(IterableDataset):
    """Rows under the names that the trainer knows, as MappedRows has them."""

    def __init__(self, rows: Any, folder: Path | None, data_args: DataArguments) -> None:
        self.rows = undecoded(rows)
        self.as_written = AsWritten.of(self.rows)
        self.folder = folder  # that relative paths of pictures start from
        self.data_args = data_args

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in zip(row_numbers(), self.rows, strict=False):
            yield named_columns(self.as_written(row), self.data_args, index)

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.rows, datasets.IterableDataset):
            self.rows.set_epoch(epoch)


class JsonRows(IterableDataset):
    """Rows of a json or jsonl file. Contents may be of mixed shape: Arrow never sees them."""

    def __init__(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        self.path, self.start, self.stop = path, start, stop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return  # a file is read by one
        yield from islice(json_rows(self.path), self.start, self.stop)


def load_stream(data_args: DataArguments, purpose: Literal["train", "eval"]) -> MappedStream:
    """Rows of the dataset and split that data_args name for this purpose, one after the other."""
    name, split, path = source_of(data_args, purpose)
    match = SLICE.match(split)
    if match is None:
        raise ValueError(
            f"dataset {name}: with dataset_streaming a split must be one name, or a slice of rows "
            f"from its beginning as 'train[:1000]', got {split!r}; leave the rest out, or load the "
            "dataset without streaming"
        )
    base = match["name"].strip()
    span = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    folder = None if path is None else path if path.is_dir() else path.parent
    file = None if path is None else _json_file(path, base)
    if file is not None:
        return MappedStream(JsonRows(file, *span), folder, data_args)
    rows = _open(name, path, base, data_args)
    rows = rows.skip(span[0]) if span[0] else rows
    rows = rows if span[1] is None else rows.take(max(0, span[1] - span[0]))
    return MappedStream(rows, folder, data_args)


def _json_file(path: Path, split: str) -> Path | None:
    """The file itself, or that of the split in a folder."""
    if path.is_file():
        return path if path.suffix in JSON_SUFFIXES else None
    return json_file_of(path, split)


def _open(name: str, path: Path | None, split: str, data_args: DataArguments) -> Any:
    if path is None:
        return load_split(name, split, name=data_args.dataset_config, streaming=True)
    if path.is_file():
        options = csv_options(path) if path.suffix == ".csv" else {}
        files = {base: str(path) for base in split_names(split)}
        return load_split(BUILDERS[path.suffix], split, data_files=files, streaming=True, **options)
    saved = saved_splits(path)
    if saved is not None:
        refuse_missing_split(split, saved, path)
        return saved[split].to_iterable_dataset()
    return load_files_of(path, split, streaming=True)
