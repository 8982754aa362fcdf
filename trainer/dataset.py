"""Dataset row -> prompt, completion and raw pictures, with errors that name the row."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

Messages = list[dict[str, Any]]
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what PIL raises


@dataclass
class Row:
    """One example; pictures stay as they came until a micro-batch needs them."""

    index: int
    prompt: Messages | str  # a conversation, or plain text
    completion: str | None  # what the assistant says; None where it has to be generated
    images: list[Image.Image]


class RowDataset(torch.utils.data.Dataset):
    """A map-style dataset read as Rows."""

    def __init__(self, rows: Sequence[dict[str, Any]], *, needs_completion: bool, is_text: bool):
        if not isinstance(rows, Sized) or isinstance(rows, str):
            raise ValueError(
                "RowDataset: a map-style dataset with a length is expected, got "
                f"{type(rows).__name__}; load it without streaming, or pass a list of rows."
            )
        if len(rows) == 0:
            raise ValueError(
                "RowDataset: at least one row is expected, got none; check split and filters."
            )
        self.rows = rows
        self.needs_completion = needs_completion
        self.is_text = is_text  # the student takes no pictures

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        try:
            columns = self.rows[index]
        except UNREADABLE as error:  # datasets decodes pictures here
            raise _unreadable(index, error) from error
        if not isinstance(columns, Mapping):
            raise ValueError(
                f"row {index}: a row must be a dict of columns, got {type(columns).__name__}; pass "
                "a datasets.Dataset or a list of dicts."
            )
        row = parse_row(columns, index, self.is_text)
        if self.needs_completion and row.completion is None:
            raise ValueError(
                f"row {index}: an assistant's answer is expected as `completion` or as the last of "
                "`messages`, got none; add it, or set seq_kd=True with lmbda below 1, so that the "
                "teacher writes it (with lmbda=1.0 rows of training need none, of evaluation do)."
            )
        if self.is_text and row.images:
            raise ValueError(
                f"row {index}: a text-only student takes no pictures, got {len(row.images)}; drop "
                "the picture column or choose a vision-language student."
            )
        return row


def as_rows(dataset: Any, *, needs_completion: bool, is_text: bool) -> Any:
    """The dataset, or each dataset of a dict, read as Rows."""
    options = {"needs_completion": needs_completion, "is_text": is_text}
    if isinstance(dataset, dict):
        return {name: as_rows(part, **options) for name, part in dataset.items()}
    if dataset is None or isinstance(dataset, RowDataset):
        return dataset
    rows = RowDataset(dataset, **options)
    _ = rows[0]  # columns that do not fit show before weights are read and folders made
    return rows


def parse_row(columns: dict[str, Any], index: int, is_text: bool) -> Row:
    """Read messages, or prompt and completion, with image or images.

    For a vision-language student a plain prompt becomes a user's turn, with or without pictures:
    all rows of a dataset are prompted alike.
    """
    images = _images(columns, index)
    if columns.get("messages") is not None:
        prompt, completion = _split_messages(columns["messages"], index)
    elif columns.get("prompt") is not None:
        prompt, completion = columns["prompt"], columns.get("completion")
        if not isinstance(prompt, str) and not isinstance(completion, str | None):
            completion = _assistant_text(completion, index)
    else:
        raise ValueError(
            f"row {index}: `messages`, or `prompt` and `completion`, are expected, got "
            f"{sorted(columns)}; rename the columns."
        )
    if isinstance(prompt, str):
        if not isinstance(completion, str | None):
            raise ValueError(
                f"row {index}: prompt is plain text, so completion must be too, got "
                f"{type(completion).__name__}; make both conversations or both text."
            )
        if not is_text:
            prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        _check_messages(prompt, index)
        if completion is None and prompt[-1]["role"] == "assistant":
            raise ValueError(
                f"row {index}: a prompt must end before the assistant's turn, got an answer as its "
                "last message; make it the completion, or name the column messages."
            )
        prompt = _place_images([_without_none(m) for m in prompt], len(images), index)
    return Row(index, prompt, completion, images)


def _check_messages(messages: Messages, index: int) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            f"row {index}: a conversation must be a list of messages, got {messages!r}; drop the "
            "row or mend the column."
        )
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"row {index}: a message must have a role and a content, got {message!r}; write "
                '{"role": "user", "content": "..."}.'
            )
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else ()
        is_parts = parts is content and all(isinstance(part, Mapping) for part in parts)
        if not isinstance(content, str) and not is_parts:
            raise ValueError(
                f"row {index}: the content of a message must be text or a list of parts, got "
                f"{content!r}; write it as text, or as "
                '[{"type": "image"}, {"type": "text", "text": "..."}].'
            )
        for part in parts:
            is_text = part.get("type") == "text" and isinstance(part.get("text"), str)
            if not is_text and part.get("type") != "image":
                raise ValueError(
                    f"row {index}: a part of a message must be text or the place of a picture, got "
                    f'{part!r}; write {{"type": "text", "text": "..."}} or {{"type": "image"}}.'
                )


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that hold None: Arrow gives every part the keys of all parts, and
    templates take a part with the key "image" for a picture.
    """
    content = message["content"]
    if not isinstance(content, str):
        content = [{k: v for k, v in part.items() if v is not None} for part in content]
    return {k: v for k, v in message.items() if v is not None} | {"content": content}


def _split_messages(messages: Messages, index: int) -> tuple[Messages, str | None]:
    """The last assistant message is the completion; earlier turns belong to the prompt."""
    _check_messages(messages, index)
    if messages[-1]["role"] != "assistant":
        return messages, None
    return messages[:-1], _assistant_text(messages[-1:], index)


def _assistant_text(completion: Messages, index: int) -> str:
    _check_messages(completion, index)
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError(
            f"row {index}: completion must be one assistant message, got "
            f"{[message.get('role') for message in completion]}; put earlier turns into the prompt."
        )
    content = completion[0]["content"]
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise ValueError(f"row {index}: an answer must be text, got {content}; drop other parts.")
    return "".join(part["text"] for part in content)


def _images(columns: dict[str, Any], index: int) -> list[Image.Image]:
    image, images = (_as_list(columns.get(name)) for name in ("image", "images"))
    if image and images:
        raise ValueError(
            f"row {index}: pictures must be in one column, got image and images; drop one of them."
        )
    images = image or images
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"row {index}: pictures must be PIL images, got {type(image).__name__}; cast the "
                "column with datasets.Image() or open the files first."
            )
        try:
            image.load()  # PIL reads lazily: a broken file shows here, where the row is known
        except UNREADABLE as error:
            raise _unreadable(index, error) from error
    return [_as_rgb(image) for image in images]


def _as_rgb(image: Image.Image) -> Image.Image:
    """Not every processor takes grey, palette or transparent pictures."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # convert() would clip its 65536 levels at 255
        image = image.convert("I").point(lambda level: level * (1 / 256)).convert("L")
    elif image.has_transparency_data:  # on white: what is see-through is mostly stored as black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _as_list(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else [] if value is None else [value]


def _unreadable(index: int, error: Exception) -> ValueError:
    return ValueError(f"row {index}: its picture cannot be read ({error}); mend or drop the row.")


def _place_images(prompt: Messages, num_images: int, index: int) -> Messages:
    """The prompt with as many image parts as pictures: those it has, else in the first user
    turn.
    """
    placed = sum(
        part.get("type") == "image"
        for message in prompt
        if not isinstance(message["content"], str)
        for part in message["content"]
    )
    if placed == num_images:
        return prompt
    if placed:
        raise ValueError(
            f"row {index}: the prompt has {placed} image parts but the row has {num_images} "
            "pictures; make them equal, or leave all image parts out."
        )
    first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"row {index}: pictures need a user turn to belong to; add one.")
    content = prompt[first]["content"]
    text = [{"type": "text", "text": content}] if isinstance(content, str) else content
    user = {**prompt[first], "content": [{"type": "image"} for _ in range(num_images)] + list(text)}
    return [*prompt[:first], user, *prompt[first + 1 :]]
