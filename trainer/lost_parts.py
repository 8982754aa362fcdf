"""What a chat template leaves out of a row: turns of a role that it does not know, tools and keys
that it does not read.
"""

import re
from typing import Any

from transformers.utils import logging

from gold_trainer.frames import THOUGHT_KEYS
from gold_trainer.row_errors import TemplateError
from gold_trainer.rows import Row

logger = logging.get_logger(__name__)

# Keys that say which call a result belongs to, or who speaks: no part of what is said.
LABELS = ("role", "content", "name", "id", "tool_call_id")


def refuse_lost_turns(row: Row, prompt: str) -> None:
    """ValueError for a turn of the prompt that is not in what the template made of it.

    An assistant's turns may lose their thoughts, and results of tools may be written as JSON.
    """
    assert not isinstance(row.prompt, str), "plain text meets no template"
    for i, message in enumerate(row.prompt):
        role, content = message["role"], message.get("content")
        texts = [content] if isinstance(content, str) else [p.get("text") for p in content or ()]
        for text in filter(None, texts):
            if role != "assistant" and _mark_of(text, role) not in prompt:
                raise TemplateError(
                    f"{row.where}: the chat template leaves out message {i}, of the role {role!r}: "
                    f"{text[:80]!a}; give it a role that the template knows (system, user), or "
                    "drop the message."
                )


def _mark_of(text: str, role: str) -> str:
    """What has to be in the prompt."""
    if role in ("tool", "ipython", "observation", "function"):
        return max(re.findall("[A-Za-z0-9]+", text), key=len, default="")
    return text.strip()


def warn_of_unread_keys(row: Row, template: Any) -> None:
    """Once for each set of keys, in each process."""
    source = str(template)
    messages = [*(row.prompt if not isinstance(row.prompt, str) else ()), row.answer or {}]
    names = {str(key) for message in messages for key in message if key not in LABELS}
    if any(key in source for key in THOUGHT_KEYS):  # the template gets thoughts under its own key
        names -= {*THOUGHT_KEYS}
    names |= {*row.chat_template_kwargs, *(["tools"] if row.tools else [])}
    keys = sorted(key for key in names if key not in source)
    if keys:
        logger.warning_once(
            f"the chat template reads nothing of {', '.join(keys)}, keys of rows, messages or "
            "chat_template_kwargs: what they hold is left out"
        )
