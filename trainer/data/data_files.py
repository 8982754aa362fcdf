"""From a dataset's name to rows with the columns that the trainer knows.

A hub id, or a local path: json or jsonl (contents of mixed shape welcome: Arrow never sees them),
parquet, arrow, csv or tar, a folder of such files, a folder of pictures with metadata.jsonl
(imagefolder), or a folder written by save_to_disk. Columns are renamed when a row is read: nothing
is copied or decoded ahead.
"""

import csv
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import torch

from gold_trainer.data.columns import SHAPE_COLUMNS, names_of
from gold_trainer.data.features import AsWritten, undecoded
from gold_trainer.data.json_files import JSON_SUFFIXES, json_rows, no_utf8
from gold_trainer.data.messages import ends_with_answer, is_spoilt, is_system, parsed_messages
from gold_trainer.data.samples import are_samples
from gold_trainer.data.split_files import (
    BUILDERS,
    METADATA,
    SAVED,
    files_of_one_kind,
    json_file_of,
)

METADATA_CSV, FILE_NAME = "metadata.csv", "file_name"  # of a folder of pictures


@dataclass
class DataArguments:
    """Where rows come from and which columns hold what."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or path of a json, jsonl, parquet, arrow, csv or tar (WebDataset) "
            "file, of a folder of such files or of pictures (imagefolder), or of a save_to_disk "
            "folder."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, with eval_strategy."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset to evaluate on, with eval_strategy; default: dataset_name."},
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read rows one after the other, in the order of the files, in place of loading "
            "them first. Needs max_steps."
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column to read as `prompt`: a conversation, or plain text. "
            "Default: prompt or messages."
        },
    )
    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column to read as `completion`."},
    )
    image_column: str | None = field(
        default=None,
        metadata={"help": "Column with one picture or a list of them. Default: image or images."},
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message put before every conversation without one; plain text becomes "
            "a conversation."
        },
    )
    text_as_messages: bool = field(
        default=False,
        metadata={
            "help": "Plain prompts and completions become messages, so that the chat template is "
            "applied to them."
        },
    )


class MappedRows(torch.utils.data.Dataset):
    """Rows under the names that the trainer knows; pictures as bytes or paths."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], folder: Path | None, data_args: DataArguments
    ):
        self.rows = undecoded(rows)
        self.as_written = AsWritten.of(self.rows)
        self.folder = folder  # that relative paths of pictures start from
        self.data_args = data_args

    def __len__(self) -> int:
        return len(self.rows)

    def column_names(self) -> list[str]:
        """Names of columns as rows have them, where they are known without reading files."""
        args = self.data_args
        taken = {args.prompt_column, args.completion_column, args.image_column}
        names = [name for name in names_of(self.rows) if name not in taken]
        if args.prompt_column is not None:
            names = ["prompt", *(name for name in names if name != "messages")]
        return names

    def conversations(self) -> "MappedRows":
        """The same rows without a table's other columns, pictures above all."""
        rows, args = self.rows, self.data_args
        if isinstance(rows, datasets.Dataset) and not are_samples(rows.column_names):
            kept = {*SHAPE_COLUMNS, args.prompt_column, args.completion_column}
            rows = rows.select_columns([name for name in rows.column_names if name in kept])
        return MappedRows(rows, self.folder, replace(args, image_column=None))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return named_columns(self.as_written(self.rows[index]), self.data_args, index)


def named_columns(columns: Mapping[str, Any], args: DataArguments, index: int) -> dict[str, Any]:
    """A row under the names that the trainer knows; the dataset's own stays as it is."""
    row = dict(columns)
    named = {"prompt": args.prompt_column, "completion": args.completion_column}
    if args.image_column is not None:
        named["images"] = args.image_column
    taken = {
        name: _take(row, column, index) for name, column in named.items() if column is not None
    }
    if args.prompt_column is not None:
        row.pop("messages", None)  # which would win over the column that was asked for
    row |= taken
    is_alone = args.prompt_column is not None and row.get("completion") is None
    if is_alone and ends_with_answer(row["prompt"]):  # a conversation under another name
        row["messages"] = row.pop("prompt")
    if args.text_as_messages or args.system_prompt is not None:
        _text_as_messages(row)
    if args.system_prompt is not None:
        _prepend_system(row, args.system_prompt)
    return row


def _take(row: dict[str, Any], column: str, index: int) -> Any:
    if column not in row:
        raise ValueError(
            f"row {index}: no column {column!r}; the columns are {', '.join(sorted(row))}"
        )
    return row.pop(column)


def _text_as_messages(row: dict[str, Any]) -> None:
    roles = {"prompt": "user", "completion": "assistant", "teacher_messages": "user"}
    for name, role in roles.items():
        if isinstance(parsed_messages(row.get(name)), str) and not is_spoilt(row[name]):
            row[name] = [{"role": role, "content": row[name]}]


def _prepend_system(row: dict[str, Any], text: str) -> None:
    """A conversation's own system message wins."""
    names = ("messages", "conversations", "texts", "prompt")
    shapes = [name for name in names if _is_conversation(row.get(name))]
    has_own = bool(row.get("system"))
    if shapes and not has_own:
        row[shapes[0]] = _with_system(row[shapes[0]], text)
    elif not shapes and row.get("instruction") is not None and not has_own:
        row["system"] = text
    if _is_conversation(row.get("teacher_messages")):
        row["teacher_messages"] = _with_system(row["teacher_messages"], text)


def _is_conversation(value: Any) -> bool:
    messages = parsed_messages(value)
    return isinstance(messages, list) and bool(messages)


def _with_system(value: Any, text: str) -> Any:
    messages = parsed_messages(value)
    if is_system(messages[0]):
        return value
    messages = [{"role": "system", "content": text}, *messages]
    return json.dumps(messages) if isinstance(value, str) else messages


def source_of(
    data_args: DataArguments, purpose: Literal["train", "eval"]
) -> tuple[str, str, Path | None]:
    """Name and split of the dataset for this purpose, and its path unless it is a hub id."""
    name, split = data_args.dataset_name, data_args.dataset_train_split
    if purpose == "eval":
        name, split = data_args.eval_dataset_name or name, data_args.dataset_test_split
    if name is None:
        raise ValueError(
            "load_rows: dataset_name must be a hub id or a path, got None; set dataset_name."
        )
    path = Path(name).expanduser()
    if path.exists() and data_args.dataset_config is not None:
        raise ValueError(
            f"dataset {path}: dataset_config must be left out for a path, got "
            f"{data_args.dataset_config!r}; only datasets of the hub have configurations"
        )
    if path.is_file():
        # a file of its own for evaluation may go by the default name of that split
        is_own = purpose == "eval" and data_args.eval_dataset_name is not None
        _check_file(path, split, is_own)
    elif not path.is_dir():
        if path.suffix in (*JSON_SUFFIXES, *BUILDERS) or name.startswith((".", "/", "~")):
            raise ValueError(f"dataset {name}: no such file or folder")
        return name, split, None
    return name, split, path


def load_rows(data_args: DataArguments, purpose: Literal["train", "eval"]) -> MappedRows:
    """Rows of the dataset and split that data_args name for this purpose."""
    name, split, path = source_of(data_args, purpose)
    if path is None:
        rows, folder = load_split(name, split, name=data_args.dataset_config), None
    elif path.is_dir():
        rows, folder = _load_folder(path, split), path
    else:
        rows, folder = _load_file(path, split), path.parent
    if len(rows) == 0:
        raise ValueError(f"dataset {name}: split {split!r} has no rows")
    return MappedRows(rows, folder, data_args)


def _check_file(path: Path, split: str, is_own: bool) -> None:
    """The rows of a file are the split train, and test as well where it is its own."""
    if path.suffix not in (*JSON_SUFFIXES, *BUILDERS):
        raise ValueError(
            f"dataset {path}: unknown format {path.suffix!r}; expected a folder or a file "
            f"ending in {', '.join((*JSON_SUFFIXES, *BUILDERS))}"
        )
    names = ["train", *(["test", "validation"] if is_own else []), path.stem]
    if not set(split_names(split)) <= set(names):
        raise ValueError(
            f"dataset {path}: a single file has the split 'train', got {split!r}; take a slice, as "
            "'train[:90%]', and to evaluate set eval_dataset_name or dataset_test_split to "
            "another one, or eval_strategy to 'no'"
        )


def _load_file(path: Path, split: str) -> Sequence[dict[str, Any]]:
    bases = split_names(split)
    if path.suffix in JSON_SUFFIXES:
        rows = list(json_rows(path))
        return _sliced(dict.fromkeys(bases, rows), split, path)
    files = dict.fromkeys(bases, str(path))
    options = csv_options(path) if path.suffix == ".csv" else {}
    return load_split(BUILDERS[path.suffix], split, data_files=files, **options)


def csv_options(path: Path) -> dict[str, Any]:
    """Cells as they are written: else 007 becomes the number 7, and the answer None nothing."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            header, first = next(lines, []), _next_row(lines)
    except UnicodeDecodeError as error:
        raise no_utf8(path, error) from error
    if not header or len(set(header)) < len(header):
        raise ValueError(f"dataset {path}: the first line must name the columns, got {header}")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise ValueError(
            f"dataset {path}: cells must be separated by commas, got {header[0]!a} as the first "
            "line; save the file with commas"
        )
    if first is None:
        raise ValueError(f"dataset {path}: a line for each row is expected, got none; add rows")
    if len(first) > len(header):  # else pandas takes the cells in front for names of rows
        raise ValueError(
            f"dataset {path}: a row must have at most {len(header)} cells, as the first line has, "
            f"got {len(first)} in the next; put text with commas into quotes"
        )
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def _next_row(lines: Iterator[list[str]]) -> list[str] | None:
    """None where there is none; empty if a cell is too long for csv, which pandas does not mind."""
    try:
        return next((cells for cells in lines if cells), None)
    except csv.Error:
        return []


def _load_folder(path: Path, split: str) -> Sequence[dict[str, Any]]:
    """A save_to_disk folder, SPLIT.jsonl or SPLIT.json in it, pictures with metadata, or files."""
    saved = saved_splits(path)
    if saved is not None:
        return _sliced(saved, split, path)
    files = {base: json_file_of(path, base) for base in split_names(split)}
    found = {base: file for base, file in files.items() if file is not None}
    if files and len(found) == len(files):
        return _sliced({base: list(json_rows(file)) for base, file in found.items()}, split, path)
    return load_files_of(path, split)


def saved_splits(path: Path) -> dict[str, datasets.Dataset] | None:
    """Datasets of a save_to_disk folder by split; None for another folder."""
    if not any((path / name).exists() for name in SAVED):
        return None
    saved = datasets.load_from_disk(str(path))
    return {"train": saved} if isinstance(saved, datasets.Dataset) else dict(saved)


def load_files_of(path: Path, split: str, **options: Any) -> Any:
    """Rows of a folder of pictures with metadata, or of files."""
    bases = split_names(split)
    if (path / METADATA_CSV).exists() and bases == ["train"]:
        return _load_metadata(path, split, **options)
    if any((path / name).exists() for name in METADATA):
        return load_split("imagefolder", split, data_dir=str(path), **options)
    files = files_of_one_kind(path, bases)
    if files is None:
        return load_split(str(path), split, **options)
    first = files[bases[0]][0]
    if first.suffix == ".csv":
        options = {**csv_options(first), **options}
    names = {base: list(map(str, paths)) for base, paths in files.items()}
    return load_split(BUILDERS.get(first.suffix, "json"), split, data_files=names, **options)


def _load_metadata(path: Path, split: str, **options: Any) -> Any:
    """Pictures by path, beside cells as they are written: imagefolder makes numbers of some."""
    file = path / METADATA_CSV
    rows = load_split("csv", split, data_files={"train": str(file)}, **csv_options(file), **options)
    if FILE_NAME not in rows.column_names:
        return load_split("imagefolder", split, data_dir=str(path), **options)
    if "image" in rows.column_names:
        raise ValueError(
            f"dataset {file}: pictures must be in one column, got {FILE_NAME} and image; drop one"
        )
    return rows.rename_column(FILE_NAME, "image")


def refuse_missing_split(split: str, splits: Collection[str], path: Path) -> None:
    if not set(split_names(split)) <= set(splits):
        raise ValueError(f"dataset {path}: no split {split!r}; it has {', '.join(splits)}")


def split_names(split: str) -> list[str]:
    """Names in the text of a split, as train[:5%] or train+test."""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def _sliced(splits: Mapping[str, Any], split: str, path: Path) -> Sequence[dict[str, Any]]:
    """The rows that a split's text names, as datasets reads it."""
    refuse_missing_split(split, splits, path)
    lengths = {name: len(rows) for name, rows in splits.items()}
    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"dataset {path}: a split must be a name with a slice, got {split!r} ({error}); write "
            "'train[:4]' or 'train[:10%]'"
        ) from error
    parts = [(splits[span.splitname], range(span.from_, span.to)) for span in spans]
    if all(isinstance(rows, datasets.Dataset) for rows, _ in parts):
        tables = [rows.select(span) for rows, span in parts]
        return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    return [rows[i] for rows, span in parts for i in span]


def load_split(builder: str, split: str, **options: Any) -> Any:
    """A datasets.Dataset, or with streaming=True an IterableDataset."""
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except ConnectionError as error:  # or no such name, as far as can be told without the hub
        raise ValueError(
            f"dataset {builder}: no such file or folder, and {error}; write the path of one that "
            "is here, or a hub id that can be reached"
        ) from error
    except (datasets.exceptions.DatasetsError, ValueError, AssertionError) as error:
        given = (options.get("data_files") or {}).values()
        files = [file for part in given for file in ([part] if isinstance(part, str) else part)]
        name = ", ".join(dict.fromkeys(files)) or options.get("data_dir") or builder
        reason = f" ({error.__cause__})" if error.__cause__ is not None else ""
        raise ValueError(f"dataset {name}: {error}{reason}") from error
