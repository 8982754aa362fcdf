"""Dataset row -> prompt, completion and raw pictures, with errors that name the row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

Messages = list[dict[str, Any]]


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
        self.rows = rows
        self.needs_completion = needs_completion
        self.is_text = is_text  # the student takes no pictures

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        try:
            columns = self.rows[index]
        except (OSError, SyntaxError) as error:  # datasets decodes pictures here
            raise ValueError(
                f"row {index}: its picture cannot be read ({error}); mend or drop the row."
            ) from error
        row = parse_row(columns, index)
        if self.needs_completion and row.completion is None:
            raise ValueError(
                f"row {index}: an assistant's answer is expected as `completion` or as the last of "
                "`messages`, got none; add it, or set lmbda=1.0 or seq_kd=True to generate it."
            )
        if self.is_text and row.images:
            raise ValueError(
                f"row {index}: a text-only student takes no pictures, got {len(row.images)}; drop "
                "the picture column or choose a vision-language student."
            )
        return row


def parse_row(columns: dict[str, Any], index: int) -> Row:
    """Read messages, or prompt and completion, with image or images."""
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
        if images:
            prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        prompt = _place_images(prompt, len(images), index)
    return Row(index, prompt, completion, images)


def _split_messages(messages: Messages, index: int) -> tuple[Messages, str | None]:
    """The last assistant message is the completion; earlier turns belong to the prompt."""
    if not messages:
        raise ValueError(f"row {index}: messages must not be empty; drop the row.")
    if messages[-1]["role"] != "assistant":
        return messages, None
    return messages[:-1], _assistant_text(messages[-1:], index)


def _assistant_text(completion: Messages, index: int) -> str:
    if len(completion) != 1 or completion[0].get("role") != "assistant":
        raise ValueError(
            f"row {index}: completion must be one assistant message, got "
            f"{[message.get('role') for message in completion]}; put earlier turns into the prompt."
        )
    content = completion[0]["content"]
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" for part in content):
        raise ValueError(f"row {index}: an answer must be text, got {content}; drop other parts.")
    return "".join(part["text"] for part in content)


def _images(columns: dict[str, Any], index: int) -> list[Image.Image]:
    images = columns.get("images")
    if images is None:
        image = columns.get("image")
        images = [] if image is None else [image]
    elif not isinstance(images, list | tuple):
        images = [images]
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"row {index}: pictures must be PIL images, got {type(image).__name__}; cast the "
                "column with datasets.Image() or open the files first."
            )
        try:
            image.load()  # PIL reads lazily: a broken file shows here, where the row is known
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"row {index}: its picture cannot be read ({error}); mend or drop the row."
            ) from error
    return list(images)


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
