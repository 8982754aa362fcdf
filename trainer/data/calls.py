"""Calls of tools in a conversation, however other projects write them, as tool_calls.

What speaks a call may be a message of its own: {"role": "tool_call", "content": JSON}, in sharegpt
{"from": "function_call", "value": JSON}, in older requests the key function_call.
"""

from collections.abc import Mapping
from typing import Any

from gold_trainer.data.json_text import parsed_json
from gold_trainer.data.row_errors import shown

Message = Mapping[str, Any]
CALLS = "tool_calls"
# Who speaks calls and their results in messages of their own; written with - or a space too.
CALLERS = ("function_call", "tool_call", "tool_calls")
RESULTS = ("function_response", "tool_response", "tool_result")
# What calls have their arguments under: Llama's JSON has parameters, Anthropic's requests input.
ARGUMENTS = ("arguments", "parameters", "input", "args")
LEGACY, OF_LEGACY = "function_call", "function"  # a key, and the role of its result


def speaker_of(name: str) -> str:
    """A role as names of roles are compared."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def with_calls(messages: list[Message], index: int) -> list[Message]:
    """The messages with every call in the tool_calls of an assistant's message.

    A message that is a call belongs to the assistant's message before it, if there is one.
    """
    is_legacy = any(message.get(LEGACY) is not None for message in messages)
    made: list[Message] = []
    for message in messages:
        speaker = speaker_of(message["role"])
        if speaker in CALLERS:
            message = _from_caller(message, index)
            if made and _takes_calls(made[-1], message):
                calls = [*(made[-1].get(CALLS) or ()), *message[CALLS]]
                made[-1] = {**made[-1], CALLS: calls}
                continue
        elif speaker in RESULTS or (is_legacy and speaker == OF_LEGACY):
            message = {**message, "role": "tool"}
        elif message.get(LEGACY) is not None:
            message = _from_legacy(message, index)
        made.append(_with_listed_calls(message, index))
    return made


def _from_caller(message: Message, index: int) -> Message:
    calls = parsed_json(message.get("content"))
    calls = [_as_call(call) for call in (calls if isinstance(calls, list) else [calls]) if call]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(
            f"row {index}: a {message['role']} must be JSON with name and arguments, got "
            f"{shown(message.get('content'))}; write it as a message with tool_calls."
        )
    return {**message, "role": "assistant", "content": None, CALLS: calls}


def _as_call(call: Any) -> Any:
    """The call in the form that servers have; what is no call stays as it is."""
    if not isinstance(call, Mapping) or isinstance(call.get("function"), Mapping):
        return call
    return {"type": "function", "function": call}


def _takes_calls(before: Message, message: Message) -> bool:
    """Whether a call is part of the turn before it; what else it holds would be lost."""
    others = {k: v for k, v in message.items() if k not in ("role", "content", CALLS)}
    return before["role"] == "assistant" and not any(v is not None for v in others.values())


def _from_legacy(message: Message, index: int) -> Message:
    call = parsed_json(message[LEGACY] or {})
    if not isinstance(call, Mapping) or message.get(CALLS):
        raise ValueError(
            f"row {index}: function_call must hold name and arguments, beside no tool_calls, got "
            f"{shown(message[LEGACY])}; write it as tool_calls."
        )
    others = {key: value for key, value in message.items() if key != LEGACY}
    return {**others, CALLS: [_as_call(call)]} if call else others


def _with_listed_calls(message: Message, index: int) -> Message:
    """Calls of tools may be JSON text: a table has one shape for the arguments of all."""
    calls = message.get(CALLS)
    if calls is None:
        return message
    calls = parsed_json(calls or [])
    if not isinstance(calls, list | tuple):
        raise ValueError(
            f"row {index}: tool_calls must be a list of calls, got {shown(message[CALLS])}; "
            'write [{"type": "function", "function": {"name": ..., "arguments": ...}}].'
        )
    # text that is no JSON is as its template wants it
    return {**message, CALLS: [_with_arguments(parsed_json(call), index) for call in calls]}


def _with_arguments(call: Any, index: int) -> Any:
    """The call with its arguments under that name, as which templates look for them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    given = {key: function[key] for key in ARGUMENTS if function.get(key) is not None}
    if len(given) > 1:
        raise ValueError(
            f"row {index}: a call must have its arguments once, got {' and '.join(given)} in "
            f"{shown(function)}; keep one of them."
        )
    if not given or "arguments" in given:
        return call
    others = {key: value for key, value in function.items() if key not in ARGUMENTS}
    function = {**others, "arguments": next(iter(given.values()))}
    return {**call, "function": function} if "function" in call else function


def as_tool(tool: Any) -> Any:
    """A tool as Anthropic's requests have it in the form of the others."""
    if not isinstance(tool, Mapping) or "input_schema" not in tool or "name" not in tool:
        return tool
    function = {key: value for key, value in tool.items() if key != "input_schema"}
    function["parameters"] = tool["input_schema"]
    return {"type": "function", "function": function}
