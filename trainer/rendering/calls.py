"""Calls of tools, and turns without a content, in the form that a chat template takes.

Data have the arguments of a call as an object, or as its JSON, as servers send it. Templates are
written for objects: most of them refuse JSON or write it as one text in quotes. A few (DeepSeek)
take JSON alone. So an object is tried first. A template that looks for a content where there is
none gets an empty one.
"""

import json
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

from gold_trainer.data.calls import CALLS
from gold_trainer.data.json_text import parsed_json
from gold_trainer.data.messages import Message, Messages

Tools = list[Any] | None
Render = Callable[[Messages, Tools], str]


def rendered_in_form(render: Render, messages: Messages, tools: Tools) -> str:
    """What render makes of the first form that it takes; its first error where it takes none."""
    refused: Exception | None = None
    # apart: calls of an answer alone change nothing of the tools, which stand in its prompt too
    for is_described, is_whole in product((False, True), repeat=2):
        given = [_whole(message) for message in messages] if is_whole else messages
        given_tools = [_described(tool) for tool in tools or ()] or None if is_described else tools
        as_object = as_text = None
        try:
            as_object = render(_with_arguments(given, _object), given_tools)
            if not _has_text(given) and not _is_python(given, as_object):
                return as_object
        except Exception as error:  # of the template
            refused = refused or error
        try:
            as_text = render(_with_arguments(given, _text), given_tools)
        except Exception as error:
            refused = refused or error
        if as_text is not None and (as_object is None or _takes_text(given, as_object, as_text)):
            return as_text
        if as_object is not None:
            return as_object
    assert refused is not None, "a form that was not refused is returned"
    raise refused


def has_forms(messages: Messages, tools: Tools) -> bool:
    """Whether a template may ask for another form of them."""
    return bool(tools) or any(m.get(CALLS) or m.get("content") is None for m in messages)


def _functions(messages: Messages) -> list[Mapping[str, Any]]:
    calls = [call for message in messages for call in message.get(CALLS) or ()]
    functions = [_function(call) for call in calls if isinstance(call, Mapping)]
    return [function for function in functions if isinstance(function, Mapping)]


def _function(call: Mapping[str, Any]) -> Any:
    return call.get("function", call)


def _has_text(messages: Messages) -> bool:
    return any(isinstance(part.get("arguments"), str) for part in _functions(messages))


def _is_python(messages: Messages, as_object: str, as_text: str = "") -> bool:
    """Whether the template writes an object as Python does, so that it wants a text. What stands
    in both forms is of another message: a result may repeat the arguments.
    """
    objects = [_object(function.get("arguments")) for function in _functions(messages)]
    written = [str(o) for o in objects if isinstance(o, dict) and o]
    return any(as_object.count(text) > as_text.count(text) for text in written)


def _takes_text(messages: Messages, as_object: str, as_text: str) -> bool:
    """Whether the template writes a text where it writes the JSON of an object."""
    if _is_python(messages, as_object, as_text):
        return True
    for function in _functions(messages):
        arguments = function.get("arguments")
        as_object = as_object.replace(_text(_object(arguments)), _text(arguments))
    return as_object == as_text


def _with_arguments(messages: Messages, change: Callable[[Any], Any]) -> Messages:
    return [
        {**message, CALLS: [_changed(call, change) for call in message[CALLS]]}
        if message.get(CALLS)
        else message
        for message in messages
    ]


def _changed(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping) or not isinstance(_function(call), Mapping):
        return call  # as its author wrote it
    function = {**_function(call), "arguments": change(_function(call).get("arguments"))}
    return {**call, "function": function} if "function" in call else function


def _object(arguments: Any) -> Any:
    """None and an empty text are no arguments; a text that is no JSON of an object stays."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    parsed = parsed_json(arguments)
    return parsed if isinstance(parsed, dict) else arguments


def _text(arguments: Any) -> str:
    arguments = _object(arguments) if not isinstance(arguments, str) or not arguments else arguments
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _whole(message: Message) -> Message:
    """Calls as servers have them, and a content."""
    message = {**message, "content": ""} if message.get("content") is None else message
    if not message.get(CALLS):
        return message
    return {**message, CALLS: [_whole_tool(call) for call in message[CALLS]]}


def _whole_tool(tool: Any) -> Any:
    """{"type": "function", "function": ...} of the function alone."""
    is_alone = isinstance(tool, Mapping) and "function" not in tool and "name" in tool
    return {"type": "function", "function": tool} if is_alone else tool


def _described(tool: Any) -> Any:
    """A tool with all that templates ask for: what it is for, and its parameters."""
    tool = _whole_tool(tool)
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        return tool
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {**tool, "function": {**empty, **tool["function"]}}
