"""A row's conversation, and the turn of it that an example learns.

Every example is what inference sees: a prompt, and behind it the one turn that is learnt. Templates
write earlier turns otherwise than the last one (Qwen3's leave their thoughts out), so that several
turns of one rendering would not be those that a model writes.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch

from gold_trainer.data.messages import (
    Message,
    Messages,
    checked_messages,
    continued,
    joined_text,
    parsed_messages,
    refuse_spoilt,
)


class Conversation(NamedTuple):
    """All messages of a row, the completion's behind the prompt's."""

    messages: Messages
    num_given: int  # the prompt's, which are not learnt; 0 where one column holds all
    is_prefill: bool = False  # the completion goes on where the prompt's last message stops

    def learnt(self, train_on: str) -> list[int]:
        """Where the turns stand that are learnt, each in an example of its own: not those whose
        author gave them the weight 0, as OpenAI's data have it. Behind the last message stands
        what is yet to be written.
        """
        first = max(self.num_given, 1)  # nobody asked for what an assistant says first
        places = [
            i
            for i, message in enumerate(self.messages)
            if i >= first and message["role"] == "assistant" and message.get("weight") != 0
        ]
        if self.messages[-1]["role"] != "assistant" or not places:
            places.append(len(self.messages))
        return places if train_on == "all" else places[-1:]

    def answer(self, place: int) -> Message | None:
        """The message that is learnt; None where it has to be written."""
        return self.messages[place] if place < len(self.messages) else None

    def prompt(self, place: int) -> Messages:
        """What stands before it."""
        first = self.num_given
        if not self.is_prefill or place <= first:
            return self.messages[:place]
        begun = continued(self.messages[first - 1], self.messages[first])
        return [*self.messages[: first - 1], begun, *self.messages[first + 1 : place]]

    def goes_on(self, place: int) -> bool:
        """Whether the answer goes on where its prompt's last message stops."""
        return self.is_prefill and place == self.num_given


def read_conversation(
    columns: Mapping[str, Any], index: int, is_text: bool, is_table: bool
) -> Conversation | None:
    """The conversation of messages, or of prompt and completion; None for plain text that stays
    plain.
    """
    conversation = _as_written(columns, index, is_text, is_table)
    if conversation is None or conversation.messages[-1]["role"] != "assistant":
        return conversation
    if conversation.learnt("last") == [len(conversation.messages)]:
        raise ValueError(
            f"row {index}: an answer must have a weight of 1, got 0 for all of them, of which "
            "nothing is learnt; drop the row."
        )
    return conversation


def _as_written(
    columns: Mapping[str, Any], index: int, is_text: bool, is_table: bool
) -> Conversation | None:
    if columns.get("messages") is not None:
        messages = checked_messages(columns["messages"], index, is_table)
        if len(messages) == 1 and messages[0]["role"] == "assistant":
            raise ValueError(
                f"row {index}: a conversation must have a message before its answer, got the "
                "answer alone; add what it answers, or drop the row."
            )
        return Conversation(messages, 0)
    prompt, completion = columns["prompt"], columns.get("completion")
    for text in (prompt, completion):
        refuse_spoilt(text, index)
    if _is_plain(prompt):
        if completion is not None and not _is_plain(completion):
            return _whole(prompt, completion, index, is_table)
        if is_text:
            return None
        prompt = [{"role": "user", "content": prompt}]
    prompt = checked_messages(prompt, index, is_table)
    if _is_plain(completion):
        completion = [{"role": "assistant", "content": completion}]
    is_open = prompt[-1]["role"] == "assistant"
    if not completion:  # a table's empty list too
        if is_open:
            raise ValueError(
                f"row {index}: a prompt must end before the assistant's turn, got an answer as its "
                "last message; make it the completion, or name the column messages."
            )
        return Conversation(prompt, len(prompt))
    if is_open and prompt[-1]["content"] is None:  # its thoughts are all that it says so far
        prompt[-1] = {**prompt[-1], "content": ""}
    messages = checked_messages(completion, index, is_table)
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise ValueError(
            f"row {index}: a completion must end with an assistant's message, got {roles}; put "
            "earlier turns into the prompt, and leave later ones out."
        )
    prompt, messages = _without_repeated(prompt, messages)
    goes_on = is_open and messages[0]["role"] == "assistant"
    return Conversation(prompt + messages, len(prompt), goes_on)


def _whole(prompt: str, completion: Any, index: int, is_table: bool) -> Conversation:
    """Of a completion that is a conversation and begins with what the prompt says."""
    if isinstance(parsed_messages(completion), list | tuple) and len(completion):
        messages = checked_messages(completion, index, is_table)
        asked = list(takewhile(lambda message: message["role"] != "assistant", messages))
        said = [joined_text(message["content"]) for message in asked if message["role"] == "user"]
        if said == [prompt] and messages[-1]["role"] == "assistant":
            return Conversation(messages, len(asked))
    is_number = isinstance(completion, int | float)
    kind = f"the number {completion!r}" if is_number else type(completion).__name__
    remedy = "write it in quotes" if is_number else "make both conversations or both text"
    raise ValueError(
        f"row {index}: prompt is plain text, so completion must be too, got {kind}; {remedy}."
    )


def _without_repeated(prompt: Messages, completion: Messages) -> tuple[Messages, Messages]:
    """Both, of which no message is in both: chosen answers of preferences are whole conversations,
    which may have a system's message that the prompt has not.
    """
    if completion[0]["role"] == "assistant":
        return prompt, completion
    asked, said = list(map(_told, prompt)), list(map(_told, completion))
    num_system = next(i for i, message in enumerate(said) if message["role"] != "system")
    stop = num_system + len(prompt)
    if asked == said[num_system:stop] and stop < len(said):
        return [*completion[:num_system], *prompt], completion[stop:]
    sizes = range(min(len(asked), len(said) - 1), 0, -1)
    num_repeated = next((size for size in sizes if asked[-size:] == said[:size]), 0)
    return prompt, completion[num_repeated:]


def _told(message: Message) -> Message:
    """What a message says, in whatever form: text may be parts, and labels may be left out."""
    content, labels = message["content"], ("name", "id", "weight")
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        content = joined_text(content)
    told = {key: value for key, value in message.items() if key not in labels}
    content = content.strip() if isinstance(content, str) else _comparable(content)
    return {**told, "content": content}


def _comparable(value: Any) -> Any:
    """Parts whose arrays say by == whether they are the same."""
    if isinstance(value, dict):
        return {key: _comparable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_comparable(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value


def _is_plain(value: Any) -> bool:
    return isinstance(parsed_messages(value), str)
