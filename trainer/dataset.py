"""Dataset row -> prompt, completion and raw pictures, with errors that name the row."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from transformers.utils import logging

from gold_trainer.columns import as_conversation, has_shape, names_of, refuse_unused_columns
from gold_trainer.data_files import MappedRows
from gold_trainer.messages import (
    Message,
    Messages,
    check_unicode,
    checked_messages,
    drop_none,
    parsed_json,
    place_pictures,
    take_pictures,
    text_of,
)
from gold_trainer.pictures import MAX_PIXELS, PictureReader, undecoded

logger = logging.get_logger(__name__)


@dataclass
class Row:
    """One example; pictures stay as they came until a micro-batch needs them."""

    index: int
    prompt: Messages | str  # a conversation, or plain text
    completion: str | None  # what the assistant says; None where it has to be generated
    images: list[Image.Image]
    answer: Message | None = None  # the whole message that says it; None for text and generation
    tools: list[Any] | None = None  # JSON schemas or functions, for the chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    is_prefill: bool = False  # the completion goes on where the prompt's last message stops


class RowDataset(torch.utils.data.Dataset):
    """A map-style dataset read as Rows.

    A column that nothing uses is an error unless it is one of ignore_columns. With picture_folder,
    paths of pictures start from it and stay in it.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        needs_completion: bool,
        is_text: bool,
        ignore_columns: Sequence[str] | None = None,
        max_pixels: int | None = MAX_PIXELS,
        picture_folder: str | None = None,
        is_table: bool | None = None,  # keys may be filled up with None; None: looked up
    ):
        if not isinstance(rows, Sized) or isinstance(rows, str):
            raise ValueError(
                "RowDataset: a map-style dataset with a length is expected, got "
                f"{type(rows).__name__}; load it without streaming, or pass a list of rows."
            )
        if len(rows) == 0:
            raise ValueError(
                "RowDataset: at least one row is expected, got none; check split and filters."
            )
        if isinstance(ignore_columns, str):
            raise ValueError(
                "RowDataset: ignore_columns must be a list of names, got the text "
                f"{ignore_columns!r}; write [{ignore_columns!r}]."
            )
        folder = rows.folder if isinstance(rows, MappedRows) else None
        if picture_folder is not None:
            folder = Path(picture_folder)
        self.rows = undecoded(rows)
        raw = rows.rows if isinstance(rows, MappedRows) else rows
        self.is_table = isinstance(raw, datasets.Dataset) if is_table is None else is_table
        self.ignore_columns = frozenset(ignore_columns or ())
        self.needs_completion = needs_completion
        self.is_text = is_text  # the student takes no pictures
        self.pictures = PictureReader(folder, max_pixels, picture_folder is not None)
        if has_shape(self._columns(0)):
            names = rows.column_names() if isinstance(rows, MappedRows) else names_of(rows)
            refuse_unused_columns(name for name in names if name not in self.ignore_columns)

    @property
    def description(self) -> str:
        """What the first row is, and so how it reaches the model."""
        if isinstance(self[0].prompt, str):
            return "plain text, as it stands: no chat template is applied"
        return "conversations: the chat template is applied"

    def __len__(self) -> int:
        return len(self.rows)

    def _columns(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # which ends an iteration
        try:
            columns = self.rows[index]
        except Exception as error:  # of the dataset's own code, which may decode pictures here
            if isinstance(error, ValueError) and str(error).startswith("row "):
                raise
            raise ValueError(
                f"row {index}: the dataset cannot give it ({type(error).__name__}: {error}); mend "
                "or drop the row."
            ) from error
        if not isinstance(columns, Mapping):
            return columns
        return {k: v for k, v in columns.items() if k not in self.ignore_columns}

    def __getitem__(self, index: int) -> Row:
        columns = self._columns(index)
        if not isinstance(columns, Mapping):
            raise ValueError(
                f"row {index}: a row must be a dict of columns, got {type(columns).__name__}; pass "
                "a datasets.Dataset or a list of dicts."
            )
        row = parse_row(columns, index, self.is_text, self.is_table, self.pictures)
        if self.needs_completion and row.completion is None:
            raise ValueError(
                f"row {index}: an assistant's answer is expected as `completion` or as the last of "
                "`messages`, got none; add it, or set seq_kd=True with lmbda below 1, so that the "
                "teacher writes it (with lmbda=1.0 rows of training need none, of evaluation do)."
            )
        return row


def as_rows(dataset: Any, *, has_chat_template: bool = False, **options: Any) -> Any:
    """The dataset, or each dataset of a dict, read as Rows with these options of RowDataset."""
    if isinstance(dataset, dict):
        return {
            name: as_rows(part, has_chat_template=has_chat_template, **options)
            for name, part in dataset.items()
        }
    if dataset is None or isinstance(dataset, RowDataset):
        return dataset
    rows = RowDataset(dataset, **options)
    first = rows[0]  # columns that do not fit show before weights are read and folders made
    if not isinstance(first.prompt, str):
        logger.info(f"rows are {rows.description}")
    elif has_chat_template:
        logger.warning(
            "rows are plain text: they are taken as they stand, without the tokenizer's chat "
            "template; to have it applied, write conversations (a command line: text_as_messages)"
        )
    return rows


def parse_row(
    columns: Mapping[str, Any], index: int, is_text: bool, is_table: bool, pictures: PictureReader
) -> Row:
    """Read messages, or prompt and completion, with image or images, tools and
    chat_template_kwargs.

    For a vision-language student a plain prompt becomes a user's turn, with or without pictures:
    all rows of a dataset are prompted alike.
    """
    columns = as_conversation(columns, index)
    values = _picture_values(columns, index)
    prompt: Messages | str
    if columns.get("messages") is not None:
        prompt, answer = _split_messages(columns["messages"], index, is_table)
        completion = None if answer is None else text_of(answer, index)
        is_prefill = False
    else:
        prompt, completion, answer = _prompt_and_answer(columns, index, is_text, is_table)
        is_prefill = not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
    if isinstance(prompt, str):
        _refuse_beside_text(columns, index)
    elif completion is None and prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"row {index}: a prompt must end before the assistant's turn, got an answer as its "
            "last message; make it the completion, or name the column messages."
        )
    elif not values:
        prompt, values = take_pictures(prompt, index)
    if is_text and values:
        raise ValueError(
            f"row {index}: a text-only student takes no pictures, got {len(values)}; drop the "
            "picture column or choose a vision-language student."
        )
    if not isinstance(prompt, str):
        prompt = place_pictures(prompt, len(values), index, is_text)
    row = Row(
        index,
        prompt,
        completion,
        [pictures.read(value, index, key) for value, key in values],
        answer,
        _tools(columns, index, is_table),
        _template_kwargs(columns, index, is_table),
        is_prefill,
    )
    for name in ("prompt", "completion", "answer", "tools", "chat_template_kwargs"):
        check_unicode(getattr(row, name), f"row {index}: {name}")
    return row


def _refuse_beside_text(columns: Mapping[str, Any], index: int) -> None:
    for name in ("tools", "chat_template_kwargs"):
        if columns.get(name):
            raise ValueError(
                f"row {index}: {name} must stand beside a conversation, got plain text, which has "
                "no chat template; write prompt and completion as messages."
            )


def _split_messages(messages: Any, index: int, is_table: bool) -> tuple[Messages, Message | None]:
    """The last assistant message is the answer; earlier turns belong to the prompt."""
    messages = checked_messages(messages, index, is_table)
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise ValueError(
            f"row {index}: a conversation must have a message before its answer, got the answer "
            "alone; add what it answers, or drop the row."
        )
    return messages[:-1], messages[-1]


def _prompt_and_answer(
    columns: Mapping[str, Any], index: int, is_text: bool, is_table: bool
) -> tuple[Messages | str, str | None, Message | None]:
    prompt, completion = columns["prompt"], columns.get("completion")
    if isinstance(prompt, str):
        if not isinstance(completion, str | None):
            raise ValueError(
                f"row {index}: prompt is plain text, so completion must be too, got "
                f"{type(completion).__name__}; make both conversations or both text."
            )
        if is_text:
            return prompt, completion, None
        prompt = [{"role": "user", "content": prompt}]
    prompt = checked_messages(prompt, index, is_table)
    if completion is None:
        return prompt, None, None
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = checked_messages(completion, index, is_table)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(
            f"row {index}: completion must be one assistant message, got "
            f"{[message['role'] for message in messages]}; put earlier turns into the prompt."
        )
    return prompt, text_of(messages[0], index), messages[0]


def _tools(columns: Mapping[str, Any], index: int, is_table: bool) -> list[Any] | None:
    tools = parsed_json(columns.get("tools"))
    if not isinstance(tools, list | tuple | None) or not all(
        isinstance(tool, Mapping) or callable(tool) for tool in tools or ()
    ):
        raise ValueError(
            f"row {index}: tools must be a list of JSON schemas or functions, got {tools!r}; write "
            '[{"type": "function", "function": {"name": ..., "parameters": ...}}].'
        )
    if not tools:
        return None
    # JSON text holds a null only where its author wrote one
    is_filled = is_table and not isinstance(columns["tools"], str)
    return drop_none(tools) if is_filled else list(tools)


def _template_kwargs(columns: Mapping[str, Any], index: int, is_table: bool) -> dict[str, Any]:
    kwargs = parsed_json(columns.get("chat_template_kwargs"))
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(
            f"row {index}: chat_template_kwargs must be a dict of arguments of the chat template, "
            f'got {kwargs!r}; write {{"enable_thinking": false}}.'
        )
    is_filled = is_table and not isinstance(columns.get("chat_template_kwargs"), str)
    return drop_none(kwargs or {}) if is_filled else dict(kwargs or {})


def _picture_values(columns: Mapping[str, Any], index: int) -> list[tuple[Any, str]]:
    """What the picture columns hold, with the keys it stands under."""
    image, images = (_as_list(columns.get(name)) for name in ("image", "images"))
    if image and images:
        raise ValueError(
            f"row {index}: pictures must be in one column, got image and images; drop one of them."
        )
    name = "image" if image else "images"
    is_list = isinstance(columns.get(name), list | tuple)
    values = enumerate(image or images)
    return [(value, f"{name}[{i}]" if is_list else name) for i, value in values]


def _as_list(value: Any) -> list[Any] | tuple[Any, ...]:
    """A row without a picture holds None, or an empty path, or what a table makes of them."""
    if isinstance(value, list | tuple):
        return value
    is_struct = isinstance(value, Mapping) and all(part is None for part in value.values())
    is_empty = value is None or is_struct or (isinstance(value, str) and not value)
    return [] if is_empty else [value]
