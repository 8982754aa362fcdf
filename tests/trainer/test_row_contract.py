"""What an author wrote reaches the row: keys of messages, tools, arguments of the template."""

import json

import datasets
import pytest

from gold_trainer.dataset import RowDataset

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read(columns, *, needs_completion=True, is_text=True):
    return RowDataset([columns], needs_completion=needs_completion, is_text=is_text)[0]


def test_every_key_of_every_message_is_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": "planner"}
    result = {"role": "tool", "content": "rain", "tool_call_id": "1"}
    answer = ANSWER | {"reasoning_content": "It says rain.", "confidence": 1}
    row = read({"messages": [USER, call, result, answer]})
    assert row.prompt == [USER, call, result]
    assert (row.completion, row.answer) == ("Rain.", answer)


def test_a_completion_keeps_its_keys_and_its_parts():
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Rain."}], "thinking": "?"}
    row = read({"prompt": [USER], "completion": [answer]})
    assert (row.completion, row.answer) == ("Rain.", answer)
    assert read({"prompt": [USER], "completion": "Rain."}).answer == ANSWER
    assert read({"prompt": "a", "completion": "b"}).answer is None


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_answer_may_be_a_call_of_tools_alone(content):
    answer = {"role": "assistant", **content, "tool_calls": [CALL]}
    row = read({"messages": [USER, answer]})
    assert row.completion == ""
    assert row.answer == {"content": None} | answer


def test_a_message_with_nothing_in_it_is_refused():
    with pytest.raises(ValueError, match="the content of a message must be text or a list"):
        read({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]})


@pytest.mark.parametrize("write", [lambda value: value, json.dumps])
def test_tools_and_arguments_of_the_template_belong_to_the_row(write):
    columns = {"tools": write([TOOL]), "chat_template_kwargs": write({"enable_thinking": False})}
    row = read({"messages": [USER, ANSWER]} | columns)
    assert (row.tools, row.chat_template_kwargs) == ([TOOL], {"enable_thinking": False})
    plain = read({"messages": [USER, ANSWER], "tools": None, "chat_template_kwargs": None})
    assert (plain.tools, plain.chat_template_kwargs) == (None, {})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "weather"}, "tools must be a list of JSON schemas or functions, got 'weather'"),
        ({"tools": {"name": "weather"}}, "tools must be a list of JSON schemas or functions"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs must be a dict"),
    ],
)
def test_tools_and_arguments_that_are_none_are_refused(columns, message):
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        read({"messages": [USER, ANSWER]} | columns)


def test_a_prompt_that_ends_with_an_assistant_turn_is_a_prefill():
    start = {"role": "assistant", "content": "The capital is"}
    row = read({"prompt": [USER, start], "completion": " Paris."})
    assert row.is_prefill and row.prompt == [USER, start] and row.completion == " Paris."
    assert not read({"prompt": [USER], "completion": "Paris."}).is_prefill
    assert not read({"messages": [USER, ANSWER, USER, ANSWER]}).is_prefill


def test_what_a_table_fills_up_with_none_is_left_out_of_calls_and_tools():
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, other]}]
    table = datasets.Dataset.from_list([{"messages": messages}])
    row = RowDataset(table, needs_completion=True, is_text=True)[0]
    assert row.answer["tool_calls"] == [CALL, other]
    assert row.prompt == [USER]
