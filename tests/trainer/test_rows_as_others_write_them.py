"""Rows as tables, servers and other projects write them are read, or refused by name."""

import json

import datasets
import numpy as np
import pandas
import pytest
from PIL import Image

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"default": None}}}
PICTURE = Image.new("RGB", (8, 6), "red")
PART = {"type": "text", "text": "What?"}


def read(columns, *, is_text=True, **options):
    rows = columns if isinstance(columns, list | datasets.Dataset) else [columns]
    return RowDataset(rows, needs_completion=True, is_text=is_text, **options)[0]


@pytest.mark.parametrize("is_table", [True, False])
@pytest.mark.parametrize(
    "tools", [json.dumps([TOOL]), [json.dumps(TOOL)], [json.dumps(TOOL), json.dumps(TOOL)]]
)
def test_tools_may_be_json_text_each_or_all(tools, is_table):
    rows = [{"messages": [USER, ANSWER], "tools": tools}]
    row = read(datasets.Dataset.from_list(rows) if is_table else rows)
    assert row.tools == [TOOL] * (len(tools) if isinstance(tools, list) else 1)


@pytest.mark.parametrize("empty", ["", "null", "[]", [], None])
def test_a_row_without_tools_has_none(empty):
    assert read({"messages": [USER, ANSWER], "tools": empty}).tools is None


@pytest.mark.parametrize("empty", ["", "null", "{}", {}, None])
def test_a_row_without_arguments_of_the_template_has_none(empty):
    row = read({"messages": [USER, ANSWER], "chat_template_kwargs": empty})
    assert row.chat_template_kwargs == {}


@pytest.mark.parametrize("calls", [json.dumps([CALL]), [json.dumps(CALL)], [CALL], (CALL,)])
def test_calls_of_tools_may_be_json_text(calls):
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    told = {"role": "tool", "content": [{"type": "text", "text": "rain"}]}
    row = read({"messages": [USER, asked, told, ANSWER]})
    assert row.prompt[1]["tool_calls"] == [CALL] and row.prompt[2] == told


@pytest.mark.parametrize("calls", ["weather", {"name": "weather"}, 3, "3"])
def test_calls_that_are_none_are_refused(calls):
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    with pytest.raises(ValueError, match=r"^row 0: tool_calls must be a list of calls, got "):
        read({"messages": [USER, asked]})


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({"messages": [USER | {"\ud83d": 1}, ANSWER]}, r"prompt\[0\], a key"),
        ({"messages": [USER, ANSWER], "tools": [{"\ud83d": 1}]}, r"tools\[0\], a key"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"\ud83d": 1}}, "chat_template_kw"),
    ],
)
def test_a_lone_surrogate_in_a_key_names_row_and_place(columns, key):
    with pytest.raises(ValueError, match=f"^row 0: {key}.* the lone surrogate") as caught:
        read(columns)
    assert str(caught.value).isascii()


def test_a_column_with_an_odd_name_is_refused_and_left_out_by_name():
    for name in ("\ud83d", "caf\u00e9", 3):
        rows = [{"messages": [USER, ANSWER], name: "x"}]
        with pytest.raises(ValueError, match="columns must be among") as caught:
            read(rows)
        assert str(caught.value).isascii()
        assert read(rows, ignore_columns=[str(name)]).completion == "Rain."


def test_an_empty_way_to_hold_a_conversation_does_not_count():
    text = {"prompt": "a", "completion": "b"}
    assert read({"messages": [], **text}).prompt == "a"
    assert read({"messages": [USER, ANSWER], "prompt": "", "completion": ""}).prompt == [USER]
    with pytest.raises(ValueError, match=r"^row 0: a conversation must be a list of messages"):
        read({"messages": []})


def test_sharegpt_messages_may_say_content():
    turns = [{"from": "human", "content": "Weather in Ulm?"}, {"from": "gpt", "content": "Rain."}]
    row = read({"conversations": turns})
    assert (row.prompt, row.answer) == ([USER], ANSWER)


def test_parts_of_requests_to_servers_are_read():
    asked = [{"type": "input_text", "text": "What?"}]
    said = [{"type": "output_text", "text": "Rain."}]
    row = read({"messages": [USER | {"content": asked}, ANSWER | {"content": said}]})
    assert row.prompt[0]["content"] == [PART] and row.completion == "Rain."
    for part in ({"type": "image_url"}, {"type": "input_image"}, {"type": "image"}):
        messages = [{"role": "user", "content": [part, PART]}, ANSWER]
        row = read({"messages": messages, "image": PICTURE}, is_text=False)
        assert row.prompt[0]["content"] == [{"type": "image"}, PART]


@pytest.mark.parametrize("part", [{"text": "?"}, {"type": "refusal", "refusal": "No."}, {}])
def test_a_part_of_an_unknown_type_is_refused(part):
    with pytest.raises(ValueError, match=r"^row 0: a part of a message must be text, or the"):
        read({"messages": [USER, {"role": "assistant", "content": [part]}]})


@pytest.mark.parametrize("gap", [float("nan"), np.float64("nan"), pandas.NA, pandas.NaT])
def test_an_empty_cell_of_pandas_holds_nothing(gap):
    others = ("image", "images", "tools", "chat_template_kwargs", "teacher_id", "id", "prompt")
    table = pandas.DataFrame([{"messages": [USER, ANSWER]} | dict.fromkeys(others, gap)])
    row = read(table.to_dict("records"), is_text=False)
    assert (row.prompt, row.images, row.tools) == ([USER], [], None)
    row = read({"instruction": "Weather in Ulm?", "output": "Rain.", "input": gap, "history": gap})
    assert row.prompt == [USER]
    with pytest.raises(ValueError, match=r"^row 0: an assistant's answer is expected"):
        read({"prompt": "a", "completion": gap})


@pytest.mark.parametrize("shape", ["messages", "conversations", "prompt", "both"])
@pytest.mark.parametrize("write", [str, lambda turns: json.dumps(turns)[:-9]])
@pytest.mark.parametrize("option", [{}, {"text_as_messages": True}, {"system_prompt": "Brief."}])
def test_a_conversation_whose_text_is_no_json_is_no_plain_text(tmp_path, shape, write, option):
    """As pandas writes lists into csv files, and as JSON that was cut off."""
    written = write([USER, ANSWER])
    cells = {shape: written}
    if shape in ("prompt", "both"):
        cells = {"prompt": write([USER]) if shape == "both" else "What?", "completion": written}
    pandas.DataFrame([cells]).to_csv(tmp_path / "rows.csv", index=False)
    for is_text in (True, False):
        rows = load_rows(DataArguments(dataset_name=str(tmp_path / "rows.csv"), **option), "train")
        with pytest.raises(ValueError, match=r"^row 0: a conversation that is text must be JSON"):
            RowDataset(rows, needs_completion=True, is_text=is_text)[0]


def test_text_with_brackets_is_plain_text():
    for text in ("[1, 2]", "[{'a': 1}] is Python", "[role]", '{"role": "user"}'):
        row = read({"prompt": text, "completion": text})
        assert (row.prompt, row.completion) == (text, text)


@pytest.mark.parametrize(
    "own",
    [
        {"from": "System", "value": "Be brief."},
        {"role": "SYSTEM", "content": "Be brief."},
        json.dumps({"from": "system", "value": "Be brief."}),
    ],
)
def test_a_systems_message_stands_once_in_whatever_words(own):
    turns = [own, {"from": "human", "value": "Weather in Ulm?"}, {"from": "gpt", "value": "Rain."}]
    row = read({"conversations": turns, "system": "Be brief."})
    assert row.prompt == [{"role": "system", "content": "Be brief."}, USER]
    with pytest.raises(ValueError, match=r"^row 0: a row must have one system message"):
        read({"conversations": turns, "system": "Be long."})


@pytest.mark.parametrize("role", ["developer", "system", "ipython", "critic"])
def test_roles_are_the_templates_business(role):
    first = {"role": role, "content": "Be brief.", "name": "a"}
    assert read({"messages": [first, first, USER, ANSWER]}).prompt == [first, first, USER]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_the_format_of_a_table_changes_nothing(kind):
    rows = [{"messages": [USER, ANSWER], "image": PICTURE, "id": 3}]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    expected = read(table, is_text=False, ignore_columns=["id"])
    assert read(table.with_format(kind), is_text=False, ignore_columns=["id"]) == expected
    shown = table.with_format(kind, columns=["messages", "image"])
    assert read(shown, is_text=False) == expected, "columns that are hidden stay hidden"


def test_cells_of_a_csv_file_hold_conversations_tools_and_lists_of_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        PICTURE.save(tmp_path / name)
    cells = {
        "prompt": json.dumps([{"role": "user", "content": "<image><image>What?"}]),
        "completion": json.dumps([ANSWER]),
        "tools": json.dumps([TOOL]),
        "images": json.dumps(["a.png", "b.png"]),
    }
    quoted = [json.dumps(cell)[1:-1].replace('\\"', '""') for cell in cells.values()]
    lines = [",".join(cells), ",".join(f'"{cell}"' for cell in quoted)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    for options in ({}, {"text_as_messages": True}, {"system_prompt": "Be brief."}):
        rows = load_rows(DataArguments(dataset_name=str(tmp_path / "rows.csv"), **options), "train")
        row = RowDataset(rows, needs_completion=True, is_text=False)[0]
        system = [{"role": "system", "content": "Be brief."}] * ("system_prompt" in options)
        image = {"type": "image"}
        user = {"role": "user", "content": [image, image, PART]}
        assert (row.prompt, row.answer, row.tools) == ([*system, user], ANSWER, [TOOL])
        assert [picture.size for picture in row.images] == [(8, 6)] * 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": USER, "completion": ANSWER},
            "a conversation must be a list of messages, got {",
        ),
        ({"messages": "[oops"}, r"a conversation must be a list of messages, got '\[oops'"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "a conversation must be a list of me"),
        ({"messages": np.arange(4)}, "a conversation must be a list of messages"),
        ({"messages": [USER | {"content": {"a": 1}}, ANSWER]}, "the content of a message must be"),
        ({"messages": [USER | {"content": b"a"}, ANSWER]}, "the content of a message must be text"),
        ({"messages": [USER | {"content": ["a"]}, ANSWER]}, "the content of a message must be tex"),
        ({"instruction": "a", "output": ["b"]}, "output must be text, got list"),
        (
            {"instruction": "a", "output": "b", "history": '["c"]'},
            "history must be a list of .ques",
        ),
        ({"messages": [USER, ANSWER], "tools": ["[1"]}, "tools must be a list of JSON schemas or"),
    ],
)
def test_what_means_nothing_names_the_row(columns, message):
    with pytest.raises(ValueError, match=f"^row 0: {message}"):
        read(columns)


@pytest.mark.parametrize("nothing", ["", {}, None])
def test_an_older_key_of_calls_that_holds_nothing_is_none(nothing):
    said = ANSWER | {"function_call": nothing}
    assert not read({"messages": [USER, said]}).answer.get("function_call")


def test_keys_of_a_message_are_no_question_with_its_answer():
    asked = USER | {"user": "Ann", "assistant": "Bob"}
    assert read({"messages": [asked, ANSWER]}).prompt == [asked]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_type_of_a_part_that_is_no_text_names_the_row(role):
    part = {"type": ["text"], "text": "a"}
    with pytest.raises(ValueError, match=r"^row 0: a part of a message must be text, or the place"):
        read({"messages": [USER, {"role": role, "content": [part]}, ANSWER]})
