"""Messages of a row as its author wrote them: checked, with every key that holds something."""

import re
from collections.abc import Mapping
from typing import Any

from transformers.utils import logging

from gold_trainer.data.calls import CALLERS, RESULTS, speaker_of, with_calls
from gold_trainer.data.json_text import parsed_json
from gold_trainer.data.row_errors import shown
from gold_trainer.data.thoughts import with_thoughts

logger = logging.get_logger(__name__)

Message = dict[str, Any]  # role, content, and every other key that its author wrote
Messages = list[Message]

MEDIA_TYPES = ("image", "video")
MEDIA_KEYS = ("image", "images", "video", "videos")  # of a message itself
# Types of parts in requests to servers, and what chat templates call them.
OTHER_TYPES = {
    "input_text": "text",
    "output_text": "text",
    "input_image": "image",
    "image_url": "image",
    "video_url": "video",
}
# Keys that say which call a result belongs to, who speaks, what is learnt: no part of what is said.
LABELS = ("role", "content", "name", "id", "tool_call_id", "weight")
PART_KEYS = (
    *("type", "text", "fps", "image", "image_url", "url", "path", "base64", "bytes", "source"),
    *("data", "video", "video_url"),
)
# Whether a turn is learnt: ms-swift and XTuner, axolotl, torchtune.
LEARNT = ("loss", "train", "training", "trainable")
UNLEARNT = ("masked",)
# Other flags that say so, by their names; whoever brings one means a weight.
OF_LEARNING = re.compile(r"(^|_)(loss|train\w*|mask\w*|learn\w*|supervised?)(_|$)")
# Who speaks in {"from": ..., "value": ...}, as sharegpt's data have it.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}
# How text begins that was to be a conversation: Python's, as pandas writes lists into csv files, or
# JSON that is cut off.
OF_MESSAGES = re.compile(r"\s*\[\s*\{\s*(['\"])(role|from|content|value)\1\s*:")
# The same as a role, in any case; roles of tools and others are the template's business.
ROLES = {**{r: to for r, to in SHAREGPT_ROLES.items() if to != "tool"}, "tool": "tool"}


def checked_messages(messages: Any, index: int, is_table: bool) -> Messages:
    """Copies of the messages, or of those that JSON text holds, with every key that holds
    something.
    """
    if isinstance(messages, str):  # which holds a null only where its author wrote one
        messages, is_table = parsed_messages(messages), False
    refuse_spoilt(messages, index)
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(
            f"row {index}: a conversation must be a list of messages, got {shown(messages)}; drop "
            "the row or mend the column."
        )
    single = [part for message in messages for part in _turns_of(parsed_json(message))]
    checked = [_from_sharegpt(message, index) for message in single]
    for message in checked:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"row {index}: a message must have a role and a content, got {shown(message)}; "
                "write "
                '{"role": "user", "content": "..."}.'
            )
        odd = next((key for key in message if not isinstance(key, str)), None)
        if odd is not None:
            raise ValueError(
                f"row {index}: the keys of a message must be text, got {shown(odd)}; rename it."
            )
    checked = with_calls([_with_own_types(_with_media(m)) for m in checked], index)
    checked = [with_thoughts(_with_known_role(message), index) for message in checked]
    checked = [_with_weight(message, index) for message in checked]
    for message in checked:
        _check_content(message, index)
        weight = message.get("weight")
        if message["role"] == "assistant" and weight not in (None, 0, 1):
            raise ValueError(
                f"row {index}: the weight of an answer must be 0 or 1, got {shown(weight)}; write "
                "0 for one that is not learnt, or leave it out."
            )
    return [_without_none(message, is_table) for message in checked]


def _turns_of(message: Any) -> list[Any]:
    """A question with its answer, as The Cauldron and FineVision have them, as two messages."""
    if not isinstance(message, Mapping) or not {"user", "assistant"} <= message.keys():
        return [message]
    if not {"role", "from"}.isdisjoint(message):  # these are keys of its own
        return [message]
    others = {key: value for key, value in message.items() if key not in ("user", "assistant")}
    asked = {"role": "user", "content": message["user"]}
    return [asked, {"role": "assistant", "content": message["assistant"], **others}]


def is_system(message: Any) -> bool:
    """Whether a message, or the JSON text of one, is the system's, in whatever words."""
    return _speaker_in(parsed_json(message)) in ("system", "developer")


def ends_with_answer(value: Any) -> bool:
    """Whether a conversation's last message is the assistant's."""
    messages = parsed_messages(value)
    last = parsed_json(messages[-1]) if isinstance(messages, list | tuple) and messages else None
    speaker = _speaker_in(last)
    is_answer = ROLES.get(speaker) == "assistant" or speaker in CALLERS
    return is_answer or (isinstance(last, Mapping) and "assistant" in last)


def _speaker_in(message: Any) -> str:
    """Who speaks, as names of roles are compared; empty where nobody does."""
    if not isinstance(message, Mapping):
        return ""
    return speaker_of(str(message.get("role") or message.get("from") or ""))


def _from_sharegpt(message: Any, index: int) -> Any:
    """{"from": "human", "value": "..."} as a message; anything else as it is."""
    if not isinstance(message, Mapping) or not isinstance(message.get("from"), str):
        return message
    if message.get("role") is not None:
        return message  # "from" is a key like any other
    speaker, value = message["from"], message.get("value")
    speaker = speaker.lower() if speaker.lower() in SHAREGPT_ROLES else speaker
    if value is not None and message.get("content") not in (None, "", [], value):
        raise ValueError(
            f"row {index}: a message must say once what is said, got value and content, which "
            "differ; keep one of them."
        )
    value = message.get("content") if value is None else value
    others = {k: v for k, v in message.items() if k not in ("from", "value", "role")}
    if speaker_of(speaker) in (*CALLERS, *RESULTS):
        return others | {"role": speaker, "content": value}
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(
            f"row {index}: `from` must be one of {', '.join(SHAREGPT_ROLES)} or function_call, got "
            f"{shown(speaker)}; rename it, or write the message with role and content."
        )
    return others | {"role": SHAREGPT_ROLES[speaker], "content": value}


def _with_media(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Pictures and videos that a message has under keys of its own, as Ollama's requests have them:
    as parts, at the places that its content has for them (<image> too), or in front of it.
    """
    parts: list[Any] = []
    for key in MEDIA_KEYS:
        held = message.get(key)
        kind = key.removesuffix("s")
        several = held if isinstance(held, list | tuple) and key != kind else [held]
        parts += [{"type": kind, kind: one} for one in several if _holds(one)]
    others = {key: value for key, value in message.items() if key not in MEDIA_KEYS}
    if not parts:
        return others
    content = message.get("content")
    if isinstance(content, str):
        content = _split_at_places(content, [part["type"] for part in parts])
    content = list(content or ())
    places = [i for i, part in enumerate(content) if _is_place(part)]
    if [content[i]["type"] for i in places] != [part["type"] for part in parts]:
        return {**others, "content": [*parts, *content]}
    for place, part in zip(places, parts, strict=True):
        content[place] = part
    return {**others, "content": content}


def _split_at_places(text: str, kinds: list[str]) -> list[Any]:
    """The text with a part for each <image> and <video>, if these are of the kinds; else alone."""
    pieces = re.split("<(image|video)>", text)
    if pieces[1::2] != kinds:
        return [{"type": "text", "text": text}]
    made = [{"type": p} if i % 2 else {"type": "text", "text": p} for i, p in enumerate(pieces)]
    return [part for part in made if part.get("text") != ""]


def _is_place(part: Any) -> bool:
    """A part for a picture or video that is elsewhere."""
    if not isinstance(part, Mapping) or part.get("type") not in MEDIA_TYPES:
        return False
    return not any(_holds(value) for key, value in part.items() if key in PART_KEYS[3:])


def _holds(value: Any) -> bool:
    is_empty = isinstance(value, str | bytes | list | dict) and not value
    return not is_empty and not holds_nothing(value)


def holds_nothing(value: Any) -> bool:
    """None, an empty text, and a struct of them, as tables have it."""
    if isinstance(value, Mapping):
        return all(part is None for part in value.values())
    return value is None or (isinstance(value, str) and not value)


def _with_own_types(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": [_own_part(part) for part in content]}


def _own_part(part: Any) -> Any:
    """A part without keys of pictures that hold nothing, which templates take for a picture."""
    if not isinstance(part, Mapping):
        return part
    kept = {
        k: v for k, v in part.items() if k in ("type", "text") or k not in PART_KEYS or _holds(v)
    }
    own_type = OTHER_TYPES.get(str(kept.get("type")))
    return kept if own_type is None else {**kept, "type": own_type}


def _with_known_role(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """human, gpt, User and the like under the names that templates know."""
    role = ROLES.get(message["role"].strip().lower())
    return message if role is None else {**message, "role": role}


def _with_weight(message: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Flags of other projects that say whether a turn is learnt, as the weight that it has."""
    for key, value in message.items():
        is_flag = isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
        if is_flag and key not in (*LEARNT, *UNLEARNT) and OF_LEARNING.search(key):
            raise ValueError(
                f"row {index}: a message says by weight (0 or 1) whether it is learnt, got "
                f"{key}={value}, which nothing reads; rename it, or leave it out."
            )
    given = {key: message[key] for key in (*LEARNT, *UNLEARNT) if message.get(key) is not None}
    weights = {} if message.get("weight") is None else {"weight": message["weight"]}
    for key, value in given.items():
        if value not in (0, 1) or not isinstance(value, bool | int | float):
            raise ValueError(
                f"row {index}: {key} of a message must be true or false, got {shown(value)}; write "
                "one of them, or leave it out."
            )
        weights[key] = int(value) if key in LEARNT else 1 - int(value)
    if not given:
        return message
    others = {key: value for key, value in message.items() if key not in given}
    if message["role"] != "assistant":
        learnt = next((key for key in given if key in LEARNT and weights[key]), None)
        if learnt is not None:
            raise ValueError(
                f"row {index}: {learnt} of a message must be false beside the role "
                f"{message['role']!r}, got true; an assistant's turns alone are learnt: leave it "
                "out."
            )
        return others
    if len(set(weights.values())) > 1:
        raise ValueError(
            f"row {index}: a message must say once whether it is learnt, got "
            f"{' and '.join(f'{key}={shown(message[key])}' for key in weights)}; keep one of them."
        )
    return {**others, "weight": next(iter(weights.values()))}


def _check_content(message: Mapping[str, Any], index: int) -> None:
    content, kinds = message.get("content"), str | list | tuple | Mapping
    others = [k for k, v in message.items() if k not in LABELS and v and isinstance(v, kinds)]
    # a call of tools, or whatever else the template reads; a question has no other key
    if content is None and others and message["role"] not in ("user", "system"):
        return
    parts = content if isinstance(content, list | tuple) else ()
    is_parts = parts is content and all(isinstance(part, Mapping) for part in parts)
    if not isinstance(content, str) and not is_parts:
        beside = f" beside {', '.join(others)}" if content is None and others else ""
        raise ValueError(
            f"row {index}: the content of a message must be text or a list of parts, got "
            f"{shown(content)}{beside}; write it as text, or as "
            '[{"type": "image"}, {"type": "text", "text": "..."}].'
        )
    for part in parts:
        is_text = part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text and part.get("type") not in MEDIA_TYPES:
            raise ValueError(
                f"row {index}: a part of a message must be text, or the place of a picture or a "
                f'video, got {shown(part)}; write {{"type": "text", "text": "..."}} or '
                '{"type": "image"}; no model here takes sound.'
            )
        _refuse_two_things(part, index)
        unread = sorted(str(k) for k, v in part.items() if k not in PART_KEYS and v is not None)
        if unread:
            logger.warning_once(
                f"nothing reads {', '.join(unread)}, keys of parts of messages: what they hold is "
                "left out"
            )


def _refuse_two_things(part: Mapping[str, Any], index: int) -> None:
    """A part is a text, or one picture or video: of two things one would be lost."""
    given = [key for key in PART_KEYS if key not in ("type", "fps") and _holds(part.get(key))]
    is_file = set(given) == {"bytes", "path"}  # whose path is a name
    if len(given) > 1 and not is_file:
        raise ValueError(
            f"row {index}: a part of a message must hold one thing, got {' and '.join(given)} in a "
            f"part of the type {part['type']!r}; write a part for each."
        )
    if given and (given == ["text"]) != (part["type"] == "text"):
        raise ValueError(
            f"row {index}: a part of the type {part['type']!r} must hold that, got {given[0]}; "
            "write its type."
        )


def _without_none(message: Mapping[str, Any], is_table: bool) -> Message:
    """A message without keys that hold None: Arrow gives every message and part the keys of all,
    and templates take a part with the key "image" for a picture. Content stays, and so does a null
    deeper down, in the arguments of a call, where no table has filled it in.
    """
    kept = {k: v for k, v in message.items() if v is not None}
    content = kept.get("content")
    if is_table or isinstance(content, list | tuple):
        content = drop_none(content)
    return (drop_none(kept) if is_table else kept) | {"content": content}


def drop_none(value: Any) -> Any:
    """The messages without the keys that a table has filled up with None."""
    if isinstance(value, Mapping):
        return {k: drop_none(v) for k, v in value.items() if v is not None}
    return [drop_none(item) for item in value] if isinstance(value, list | tuple) else value


def parsed_messages(value: Any) -> Any:
    """A conversation that is kept as JSON text; anything else, plain text too, as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    messages = parsed_json(value)
    is_conversation = isinstance(messages, list) and all(
        isinstance(message, Mapping) and not {"role", "from", "assistant"}.isdisjoint(message)
        for message in messages
    )
    return messages if is_conversation and messages else value


def is_spoilt(value: Any) -> bool:
    """Whether text was to be a conversation and is no JSON."""
    return isinstance(parsed_messages(value), str) and OF_MESSAGES.match(value) is not None


def refuse_spoilt(value: Any, index: int) -> None:
    if is_spoilt(value):
        raise ValueError(
            f"row {index}: a conversation that is text must be JSON of its messages, got "
            f"{shown(value)}; write it with json.dumps, and what is text as a message's content."
        )


def text_of(answer: Message, index: int) -> str:
    content = answer["content"]
    if isinstance(content, list) and any(part["type"] != "text" for part in content):
        raise ValueError(
            f"row {index}: an answer must be text, got {shown(content)}; drop other parts."
        )
    return joined_text(content) or ""


def joined_text(content: Any) -> str | None:
    """A content of text as one text, whatever its parts."""
    if content is None or isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def continued(last: Mapping[str, Any], answer: Mapping[str, Any]) -> Message:
    """The turn that a prompt leaves open, with the answer at its end."""
    content, end = last.get("content"), joined_text(answer.get("content"))
    if isinstance(content, str | None):
        return {**last, **answer, "content": (content or "") + (end or "")}
    *parts, open_part = content
    text = {**open_part, "text": open_part["text"] + (end or "")}
    return {**last, **answer, "content": [*parts, text]}


def check_unicode(value: Any, where: str) -> None:
    """ValueError for a lone surrogate, which no tokenizer can encode."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} must be text in Unicode, got the lone surrogate "
                f"{value[error.start]!a} at character {error.start}; replace it or drop the row."
            ) from error
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_unicode(key, f"{where}, a key")
            check_unicode(part, f"{where}, {key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            check_unicode(part, f"{where}[{i}]")
