"""What is left out of a row: turns of a role that a chat template does not know, tools and keys
that it does not read, text behind the end of a completion.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from transformers.utils import logging

from gold_trainer.data.calls import CALLS
from gold_trainer.data.messages import LABELS
from gold_trainer.data.row_errors import TemplateError
from gold_trainer.data.rows import Row
from gold_trainer.data.thoughts import THOUGHT_KEYS
from gold_trainer.rendering.frames import Piece
from gold_trainer.rendering.renderer import probes_beside
from gold_trainer.rendering.template_keys import keys_read

logger = logging.get_logger(__name__)

TOOLS = ("tool", "ipython", "observation", "function")  # roles whose results may be written as JSON
USUAL = ("user", "assistant", *TOOLS)


def refuse_unread_turns(row: Row, template: Any) -> None:
    """ValueError for a turn of the prompt that says something under keys alone of which the
    template reads none. Calls and thoughts that it does not read are left out with a warning.
    """
    assert not isinstance(row.prompt, str), "plain text meets no template"
    read = keys_read(template, has_tools=bool(row.tools))
    for i, message in enumerate(row.prompt):
        keys = [key for key in message if key not in LABELS]
        is_known = not {CALLS, *THOUGHT_KEYS}.isdisjoint(keys)
        if message.get("content") is None and not is_known and not read.reads_any(keys):
            raise TemplateError(
                f"{row.where}: the chat template leaves out message {i}, of the role "
                f"{message['role']!r}: it reads nothing of {', '.join(keys)}; write what it says "
                "as its content, or drop the message."
            )


def refuse_lost_turns(row: Row, prompt: str, render: Callable[[Row], str]) -> None:
    """ValueError for a turn of the prompt that is not in what the template made of it. Roles that
    not every template writes are looked for with a text that stands nowhere else, too.

    An assistant's turns may lose their thoughts, and results of tools may be written as JSON.
    """
    assert not isinstance(row.prompt, str), "plain text meets no template"
    for i, message in enumerate(row.prompt):
        role, content = message["role"], message.get("content")
        texts = [content] if isinstance(content, str) else [p.get("text") for p in content or ()]
        for text in filter(None, texts):
            mark = _mark_of(text, role)
            is_lost = role != "assistant" and mark not in prompt
            if not is_lost and role not in USUAL and (i, role) != (0, "system"):
                is_lost = _is_lost(row, i, prompt, render)
            if is_lost:
                known = "tool" if role in TOOLS[1:] else "user"
                known = "system, user" if role not in (*USUAL, "system") else known
                raise TemplateError(
                    f"{row.where}: the chat template leaves out message {i}, of the role {role!r}: "
                    f"{text[:80]!a}; give it a role that the template knows ({known}), or drop the "
                    "message."
                )


def refuse_cut_text(row: Row, pieces: Sequence[Piece], behind_end: Callable[[str], str]) -> None:
    """Refuse an answer that goes on behind an end token, where nothing tells its text from what
    ends it: the first end token is the end.
    """
    lost = behind_end(pieces[0].text) if len(pieces) == 1 else ""
    if lost:
        raise ValueError(
            f"{row.where}: a completion must end with its first end token, got {lost[:80]!a} "
            "behind it; leave that out, or write the row as messages, in whose answers such a "
            "token is text."
        )


def _is_lost(row: Row, place: int, prompt: str, render: Callable[[Row], str]) -> bool:
    assert not isinstance(row.prompt, str), "plain text meets no template"
    probe = next(probes_beside(prompt))
    message = {**row.prompt[place], "content": probe}
    probed = [*row.prompt[:place], message, *row.prompt[place + 1 :]]
    try:
        return probe not in render(replace(row, prompt=probed))
    except ValueError:  # it takes no such text there, so it reads what stands there
        return False


def _mark_of(text: str, role: str) -> str:
    """What has to be in the prompt."""
    if role in TOOLS:
        return max(re.findall("[A-Za-z0-9]+", text), key=len, default="")
    return text.strip()


def warn_of_unread_keys(
    row: Row,
    template: Any,
    template_kwargs: Iterable[str],  # of all rows
) -> None:
    """Once for each set of keys, in each process."""
    read = keys_read(template, has_tools=bool(row.tools))
    messages = [*(row.prompt if not isinstance(row.prompt, str) else ()), row.answer or {}]
    names = {str(key) for message in messages for key in message if key not in LABELS}
    if read.reads_any(THOUGHT_KEYS):  # the template gets thoughts under its own key
        names -= {*THOUGHT_KEYS}
    variables = [*template_kwargs, *row.chat_template_kwargs, *(["tools"] if row.tools else [])]
    keys = sorted(read.unread(names, variables))
    if keys:
        logger.warning_once(
            f"the chat template reads nothing of {', '.join(keys)}, keys of rows, messages or "
            "chat_template_kwargs: what they hold is left out"
        )
