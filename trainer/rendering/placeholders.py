"""Placeholders of pictures: tokens in whose places a model looks for a picture. Text that holds one
by chance is refused with its row and key.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from inspect import getdoc
from typing import Any

from transformers import ProcessorMixin

from gold_trainer.data.placing import PICTURE, VIDEO
from gold_trainer.data.rows import Row

# Attributes of processors that name what they look for in a text.
NAMES = re.compile(r"(image|video|audio|vision|boi|eoi)\w*token$")


def placeholder_names(processor: Any, ids: Collection[int]) -> list[str]:
    """Names of the model's placeholder ids, and those that its processor looks for."""
    is_vlm = isinstance(processor, ProcessorMixin)
    tokenizer = processor.tokenizer if is_vlm else processor
    names = tokenizer.convert_ids_to_tokens(sorted(ids))
    if is_vlm:
        added = tokenizer.get_added_vocab()
        values = (value for name, value in vars(processor).items() if NAMES.search(name))
        names += [value for value in values if isinstance(value, str) and value in added]
    return sorted({name for name in names if isinstance(name, str) and name})


def refuse_placeholders(row: Row, names: Collection[str]) -> None:
    """Refuse placeholders in all that a template may write before the answer."""
    for where, text in _texts(row):
        found = next((name for name in names if name in text), None)
        if found is not None:
            raise ValueError(
                f"{row.where}: a prompt's text must not hold a picture's placeholder, got "
                f"{found!r} in {where}; write the picture's place as the part "
                '{"type": "image"}, or remove it from the text.'
            )


def refuse_places_elsewhere(row: Row) -> None:
    """ValueError for <image> and <video> in a turn whose text is no place of a picture's."""
    given = ((PICTURE, row.images), (VIDEO, row.videos))
    for message in row.prompt if not isinstance(row.prompt, str) else ():
        role = message["role"]
        if role in ("user", "assistant"):  # a place is read there; what an assistant says is text
            continue
        texts = list(_strings(message.get("content")))
        for medium, held in given:
            if held and any(medium.placeholder in text for text in texts):
                raise ValueError(
                    f"{row.where}: {medium.placeholder} must stand in a user's turn, got it in the "
                    f"{role}'s; write {medium.part} there, or leave it out."
                )


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    """Those texts, each behind its place in the row."""
    if isinstance(row.prompt, str):
        yield "prompt", row.prompt
        return
    for message in row.prompt:
        for key, value in message.items():
            name = f"the {message['role']}'s turn" + (", " + key) * (key != "content")
            yield from ((name, text) for text in _strings(value))
    for name in ("tools", "chat_template_kwargs"):
        yield from ((name, text) for text in _strings(getattr(row, name)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for key, part in value.items() for text in (str(key), *_strings(part)))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _strings(part))
    elif callable(value):  # a tool: the template gets its name and what it says of itself
        yield getdoc(value) or ""
