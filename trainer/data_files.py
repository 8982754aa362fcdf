"""From a dataset's name to rows with the columns that the trainer knows.

A hub id, or a local path: json or jsonl (contents of mixed shape welcome: Arrow never sees them),
parquet, csv, a folder of such files, a folder of pictures with metadata.jsonl (imagefolder), or a
folder written by save_to_disk. Columns are renamed and pictures opened when a row is read: nothing
is copied or decoded ahead.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from PIL import Image, ImageOps

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
JSON_SUFFIXES = (".json", ".jsonl")


@dataclass
class DataArguments:
    """Where rows come from and which columns hold what."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, or path of a json, jsonl, parquet or csv file, of a folder of such "
            "files or of pictures (imagefolder), or of a save_to_disk folder."
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
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column to read as `prompt`; a string becomes a user's message. "
            "Default: prompt or messages."
        },
    )
    completion_column: str | None = field(
        default=None,
        metadata={
            "help": "Column to read as `completion`; a string becomes the assistant's message."
        },
    )
    image_column: str | None = field(
        default=None,
        metadata={"help": "Column with one picture or a list of them. Default: image or images."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before every conversation."}
    )


class MappedRows(torch.utils.data.Dataset):
    """Rows under the names that the trainer knows, paths of pictures opened as pictures."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], folder: Path | None, data_args: DataArguments
    ):
        self.rows = rows
        self.folder = folder  # that relative paths of pictures start from
        self.data_args = data_args

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = dict(self.rows[index])
        except OSError as error:  # datasets decodes a picture column here
            raise ValueError(f"row {index}: cannot read its picture: {error}") from error
        args = self.data_args
        for new_name, column in (
            ("prompt", args.prompt_column),
            ("completion", args.completion_column),
        ):
            if column is not None:
                row[new_name] = _as_messages(_take(row, column, index), new_name)
        if args.prompt_column is not None:
            row.pop("messages", None)  # which would win over the column that was asked for
        if args.image_column is not None:
            pictures = _take(row, args.image_column, index)
            row["images" if isinstance(pictures, list) else "image"] = pictures
        for name in ("image", "images"):
            if row.get(name) is not None:
                row[name] = self._open(row[name], index)
        if args.system_prompt is not None:
            _prepend_system(row, args.system_prompt, index)
        return row

    def _open(self, value: Any, index: int) -> Any:
        """Paths, and lists of paths, as PIL pictures; anything else as it is."""
        if isinstance(value, list):
            return [self._open(item, index) for item in value]
        if not isinstance(value, str):
            return value
        path = (self.folder or Path()) / value
        try:
            with Image.open(path) as picture:
                # upright, as datasets decodes pictures: phones write them turned, with a note
                return ImageOps.exif_transpose(picture)
        except OSError as error:  # missing, cut off, or not a picture
            raise ValueError(f"row {index}: cannot read the picture {path}: {error}") from error


def _take(row: dict[str, Any], column: str, index: int) -> Any:
    if column not in row:
        raise ValueError(
            f"row {index}: no column {column!r}; the columns are {', '.join(sorted(row))}"
        )
    return row.pop(column)


def _as_messages(value: Any, name: str) -> Any:
    role = "user" if name == "prompt" else "assistant"
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _prepend_system(row: dict[str, Any], text: str, index: int) -> None:
    name = "messages" if "messages" in row else "prompt"
    if not isinstance(row.get(name), list):
        raise ValueError(
            f"row {index}: system_prompt needs conversations, and {name!r} is plain text; "
            f"set prompt_column to {name} to turn it into a user's message"
        )
    row[name] = [{"role": "system", "content": text}, *row[name]]


def load_rows(data_args: DataArguments, purpose: Literal["train", "eval"]) -> MappedRows:
    """Rows of the dataset and split that data_args name for this purpose."""
    name, split = data_args.dataset_name, data_args.dataset_train_split
    if purpose == "eval":
        name, split = data_args.eval_dataset_name or name, data_args.dataset_test_split
    if name is None:
        raise ValueError(
            "load_rows: dataset_name must be a hub id or a path, got None; set dataset_name."
        )
    path = Path(name).expanduser()
    if path.is_dir():
        rows, folder = _load_folder(path, split), path
    elif path.is_file():
        if purpose == "eval" and data_args.eval_dataset_name is None:
            raise ValueError(
                f"dataset {name}: a single file has no {split!r} split to evaluate on; set "
                'eval_dataset_name, or eval_strategy to "no"'
            )
        rows, folder = _load_file(path, split), path.parent
    elif path.suffix in (*JSON_SUFFIXES, *BUILDERS) or name.startswith((".", "/", "~")):
        raise ValueError(f"dataset {name}: no such file or folder")
    else:
        rows, folder = _load_split(name, split, name=data_args.dataset_config), None
    if len(rows) == 0:
        raise ValueError(f"dataset {name}: split {split!r} has no rows")
    return MappedRows(rows, folder, data_args)


def _load_file(path: Path, split: str) -> Sequence[dict[str, Any]]:
    if path.suffix in JSON_SUFFIXES:
        return _read_json(path)
    if path.suffix not in BUILDERS:
        raise ValueError(
            f"dataset {path}: unknown format {path.suffix!r}; expected a folder or a file "
            f"ending in {', '.join((*JSON_SUFFIXES, *BUILDERS))}"
        )
    files = {split.partition("[")[0]: str(path)}  # the split may be a slice, as in train[:5%]
    return _load_split(BUILDERS[path.suffix], split, data_files=files)


def _load_folder(path: Path, split: str) -> Sequence[dict[str, Any]]:
    """A save_to_disk folder, SPLIT.jsonl or SPLIT.json in it, pictures with metadata, or files."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise ValueError(f"dataset {path}: no split {split!r}; it has {', '.join(saved)}")
        return saved[split]
    for suffix in JSON_SUFFIXES:
        if (path / f"{split}{suffix}").exists():
            return _read_json(path / f"{split}{suffix}")
    if any((path / f"metadata{suffix}").exists() for suffix in (".jsonl", ".csv", ".parquet")):
        return _load_split("imagefolder", split, data_dir=str(path))
    return _load_split(str(path), split)


def _load_split(builder: str, split: str, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"dataset {builder}: {error}") from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    """A list of rows, or one row a line; in memory, pictures by path."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            # not splitlines: JSON strings may hold U+2028 and other separators as they are
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"dataset {path}: not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"dataset {path}: expected a list of objects, one for each row")
    return rows
