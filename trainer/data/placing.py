"""Pictures and videos of a row, and the parts of its messages that say where they stand."""

import re
from typing import Any, NamedTuple

from gold_trainer.data.messages import Message, Messages
from gold_trainer.data.pictures import PLACE_KEYS
from gold_trainer.data.videos import FRAME_KEYS


class Medium(NamedTuple):
    kind: str  # type of a part that holds one or says where it stands
    name: str  # in what errors say
    part: str
    keys: tuple[str, ...]  # of a part, under which one may stand
    placeholder: str  # where one stands in a user's text, as LLaVA's data have it
    others: re.Pattern[str]  # what other data and models have in its place


_NUMBER = r"([ _:-]?\d+|[ _]?(placeholder|token|soft_token|pad|here))?"
_BRACES = r"\{{1,2}\s?(%s)\s?\}{1,2}"  # of templates of text


def _others(names: str, more: str = "") -> re.Pattern[str]:
    numbered = rf"({names}){_NUMBER}"
    forms = rf"<\|?{numbered}\|?>", rf"\[({names})\]", _BRACES % numbered
    return re.compile("|".join(forms) + more, re.IGNORECASE)


PICTURE = Medium(
    *("image", "picture", "an image part", PLACE_KEYS, "<image>"),
    _others("image|img|picture", "|<start_of_image>"),
)
VIDEO = Medium(
    *("video", "video", "a video part", FRAME_KEYS, "<video>"),
    _others("video|vid"),
)


def take(messages: Messages, index: int, medium: Medium) -> tuple[Messages, list[tuple[Any, str]]]:
    """The messages with bare parts, and what the parts held, with the keys it stood under."""
    taken: list[tuple[Any, str]] = []
    bare = []
    num_places = 0
    for i, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list):
            content = list(content)
            for j, part in enumerate(content):
                if part["type"] != medium.kind:
                    continue
                num_places += 1
                key = next((key for key in medium.keys if part.get(key) is not None), None)
                if key is not None:
                    value = part[key]
                    if part.get("fps") is not None:
                        value = {key: value, "fps": part["fps"]}
                    taken.append((value, f"message {i}, part {j}, {key}"))
                    content[j] = {"type": medium.kind}
            message = {**message, "content": content}
        bare.append(message)
    if taken and len(taken) != num_places:
        raise ValueError(
            f"row {index}: {medium.kind} parts must all hold their {medium.name} or none, got "
            f"{len(taken)} of {num_places}; write "
            f'{{"type": "{medium.kind}", "{medium.kind}": ...}} everywhere.'
        )
    return bare, taken


def place(
    messages: Messages, number: int, index: int, medium: Medium, has_placeholders: bool
) -> Messages:
    """The messages with a part for every picture or video: where they have such parts, else at
    placeholders in a user's text, else in front of the first user turn. Without has_placeholders a
    placeholder is text.
    """
    name, placeholder = medium.name, medium.placeholder
    num_parts = num_parts_of(messages, medium)
    num_placeholders = 0
    if has_placeholders:
        num_placeholders = sum(_num_placeholders(message, placeholder) for message in messages)
    if num_parts and num_placeholders:
        raise ValueError(
            f"row {index}: a {name}'s place must be {medium.part} or {placeholder}, got "
            f"{num_parts} of the one and {num_placeholders} of the other; write all alike."
        )
    if num_placeholders and num_placeholders != number:
        raise ValueError(
            f"row {index}: the prompt has {placeholder} {num_placeholders} times but the row has "
            f"{number} {name}s; make them equal, or leave the placeholders out."
        )
    if num_placeholders:
        _refuse_other_placeholders(messages, index, medium)
        return [_at_placeholders(message, medium) for message in messages]
    if num_parts == number:
        return messages
    if num_parts:
        raise ValueError(
            f"row {index}: the prompt has {num_parts} {medium.kind} parts but the row has {number} "
            f"{name}s; make them equal, or leave all {medium.kind} parts out."
        )
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"row {index}: {name}s need a user turn to belong to; add one.")
    if number and has_placeholders:
        _refuse_other_placeholders(messages, index, medium)
    places = [{"type": medium.kind} for _ in range(number)]
    user = {**messages[first], "content": places + _parts(messages[first]["content"])}
    return [*messages[:first], user, *messages[first + 1 :]]


def _refuse_other_placeholders(messages: Messages, index: int, medium: Medium) -> None:
    """They would stay text, and what they stand for would stand elsewhere."""
    for message in messages:
        role = message["role"]
        for part in _parts(message["content"]) if role != "assistant" else ():
            text = (part.get("text") or "").replace(medium.placeholder, "")
            found = medium.others.search(text)
            if found is not None:
                whose = "a user's" if role == "user" else f"the {role}'s"
                where = "there" if role == "user" else "in a user's turn"
                raise ValueError(
                    f"row {index}: a {medium.name}'s place in {whose} text must be "
                    f"{medium.placeholder}, got {found[0]!r}; write {medium.placeholder} {where}, "
                    f"or where it is text, {medium.part} for each {medium.name}."
                )


def num_parts_of(messages: Messages, medium: Medium) -> int:
    return sum(
        part["type"] == medium.kind
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )


def _num_placeholders(message: Message, placeholder: str) -> int:
    if message["role"] != "user":
        return 0
    return sum((part.get("text") or "").count(placeholder) for part in _parts(message["content"]))


def _at_placeholders(message: Message, medium: Medium) -> Message:
    if not _num_placeholders(message, medium.placeholder):
        return message
    content: list[dict[str, Any]] = []
    for part in _parts(message["content"]):
        if "text" not in part:
            content.append(part)
            continue
        for i, text in enumerate(part["text"].split(medium.placeholder)):
            content += [{"type": medium.kind}] if i else []
            content += [{**part, "text": text}] if text else []
    return {**message, "content": content}


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or ())
