"""Dataset row -> prompt, completion and raw pictures, with errors that name the row."""

import json
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

Message = dict[str, Any]  # role, content, and every other key that its author wrote
Messages = list[Message]
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what PIL raises


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
    """Read messages, or prompt and completion, with image or images, tools and
    chat_template_kwargs.

    For a vision-language student a plain prompt becomes a user's turn, with or without pictures:
    all rows of a dataset are prompted alike.
    """
    images = _images(columns, index)
    prompt: Messages | str
    if columns.get("messages") is not None:
        prompt, answer = _split_messages(columns["messages"], index)
        completion = None if answer is None else _text(answer, index)
        is_prefill = False
    elif columns.get("prompt") is not None:
        prompt, completion, answer = _prompt_and_answer(columns, index, is_text)
        is_prefill = not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
    else:
        raise ValueError(
            f"row {index}: `messages`, or `prompt` and `completion`, are expected, got "
            f"{sorted(columns)}; rename the columns."
        )
    if not isinstance(prompt, str):
        if completion is None and prompt[-1]["role"] == "assistant":
            raise ValueError(
                f"row {index}: a prompt must end before the assistant's turn, got an answer as its "
                "last message; make it the completion, or name the column messages."
            )
        prompt = _place_images(prompt, len(images), index)
    tools, kwargs = _tools(columns, index), _template_kwargs(columns, index)
    return Row(index, prompt, completion, images, answer, tools, kwargs, is_prefill)


def _split_messages(messages: Any, index: int) -> tuple[Messages, Message | None]:
    """The last assistant message is the answer; earlier turns belong to the prompt."""
    messages = _checked_messages(messages, index)
    if messages[-1]["role"] != "assistant":
        return messages, None
    return messages[:-1], messages[-1]


def _prompt_and_answer(
    columns: dict[str, Any], index: int, is_text: bool
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
    prompt = _checked_messages(prompt, index)
    if completion is None:
        return prompt, None, None
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = _checked_messages(completion, index)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(
            f"row {index}: completion must be one assistant message, got "
            f"{[message['role'] for message in messages]}; put earlier turns into the prompt."
        )
    return prompt, _text(messages[0], index), messages[0]


def _checked_messages(messages: Any, index: int) -> Messages:
    """Copies of the messages with every key that holds something."""
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
        _check_content(message, index)
    return [_without_none(message) for message in messages]


def _check_content(message: Mapping[str, Any], index: int) -> None:
    content = message.get("content")
    carries_more = any(v for k, v in message.items() if k not in ("role", "content"))
    if content is None and carries_more:
        return  # the turn is a call of tools, or whatever else the template reads
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


def _without_none(message: Mapping[str, Any]) -> Message:
    """A message without keys that hold None: Arrow gives every message and part the keys of all,
    and templates take a part with the key "image" for a picture. Content stays.
    """
    kept = {k: _drop_none(v) for k, v in message.items() if v is not None or k == "content"}
    return kept | {"content": kept.get("content")}


def _drop_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _drop_none(v) for k, v in value.items() if v is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list | tuple) else value


def _text(answer: Message, index: int) -> str:
    content = answer["content"]
    if isinstance(content, str | None):
        return content or ""
    if any(part["type"] != "text" for part in content):
        raise ValueError(f"row {index}: an answer must be text, got {content}; drop other parts.")
    return "".join(part["text"] for part in content)


def _tools(columns: dict[str, Any], index: int) -> list[Any] | None:
    tools = _parsed(columns.get("tools"))
    if not isinstance(tools, list | tuple | None) or not all(
        isinstance(tool, Mapping) or callable(tool) for tool in tools or ()
    ):
        raise ValueError(
            f"row {index}: tools must be a list of JSON schemas or functions, got {tools!r}; write "
            '[{"type": "function", "function": {"name": ..., "parameters": ...}}].'
        )
    return [_drop_none(tool) for tool in tools] if tools else None


def _template_kwargs(columns: dict[str, Any], index: int) -> dict[str, Any]:
    kwargs = _parsed(columns.get("chat_template_kwargs"))
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(
            f"row {index}: chat_template_kwargs must be a dict of arguments of the chat template, "
            f'got {kwargs!r}; write {{"enable_thinking": false}}.'
        )
    return _drop_none(kwargs or {})


def _parsed(value: Any) -> Any:
    """Columns of mixed shape are often kept as JSON, since Arrow has one shape for all rows."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value  # refused by the caller


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
        if isinstance(message["content"], list)
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
    user = {
        **prompt[first],
        "content": [{"type": "image"} for _ in range(num_images)] + list(text or ()),
    }
    return [*prompt[:first], user, *prompt[first + 1 :]]
