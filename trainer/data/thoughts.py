"""An assistant's thoughts: under one key, as one text."""

from collections.abc import Mapping
from typing import Any

from gold_trainer.data.row_errors import shown

# What a part says of thoughts, as other APIs have it, and the key of its text.
THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "text"}
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # the first that holds something


def with_thoughts(message: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Thoughts that stand in parts of the content under their own key; ValueError for thoughts
    under several keys that say different things, of which one would be lost.
    """
    if message["role"] != "assistant":
        return message
    content = message.get("content")
    if isinstance(content, list | tuple):
        thoughts = [_thought_of(part) for part in content]
        if any(thought is not None for thought in thoughts):
            rest = [p for p, thought in zip(content, thoughts, strict=True) if thought is None]
            text = "".join(thought for thought in thoughts if thought)
            if any(message.get(key) not in (None, "", text) for key in THOUGHT_KEYS):
                raise ValueError(
                    f"row {index}: a message must have its thoughts in one place, got parts of its "
                    f"content and {', '.join(k for k in THOUGHT_KEYS if message.get(k))}; keep one."
                )
            message = {**message, "content": rest, THOUGHT_KEYS[0]: text}
    given = {
        key: _thoughts_in(message[key], key, index)
        for key in THOUGHT_KEYS
        if message.get(key) is not None
    }
    if len({text for text in given.values() if text}) > 1:
        raise ValueError(
            f"row {index}: a message must have its thoughts under one key, got "
            f"{' and '.join(given)}, which differ; keep one of them."
        )
    return {**message, **given}


def _thoughts_in(value: Any, key: str, index: int) -> str:
    """What a key of thoughts holds: a text, parts with texts, or nothing (False, an empty dict)."""
    text = value if isinstance(value, str) else _text_of_parts(value or [])
    if text is None:
        raise ValueError(
            f"row {index}: {key} of a message must be text, got {shown(value)}; write the thoughts "
            "as one text."
        )
    return text


def _thought_of(part: Any) -> str | None:
    """Its text; None for a part of another type."""
    key = THOUGHT_PARTS.get(str(part.get("type"))) if isinstance(part, Mapping) else None
    if key is None:
        return None
    text = part.get(key)
    return text if isinstance(text, str) else _text_of_parts(text)


def _text_of_parts(parts: Any) -> str | None:
    """One text of a list of texts, or of parts that hold one; None for anything else."""
    if not isinstance(parts, list | tuple):
        return None
    texts = []
    for part in parts:
        text = _thought_of(part) or part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)
