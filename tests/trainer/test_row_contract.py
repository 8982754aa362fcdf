"""What an author wrote reaches the row: keys of messages, tools, arguments of the template."""

import json

import datasets
import pytest
from PIL import Image

from gold_trainer.config import GOLDConfig
from gold_trainer.data.columns import as_conversation
from gold_trainer.data.dataset import RowDataset, as_rows
from gold_trainer.data.row_errors import ColumnsError

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


@pytest.mark.parametrize(
    "silent", [{"role": "tool", "tool_call_id": "a", "name": "b"}, {"role": "user", "id": "a"}]
)
def test_keys_that_label_a_message_say_nothing(silent):
    """Some templates write None in the place of a content."""
    with pytest.raises(ValueError, match=r"^row 0: the content of a message must be text"):
        read({"messages": [USER, silent | {"content": None}, ANSWER]})


@pytest.mark.parametrize("role", ["user", "system", "Human"])
@pytest.mark.parametrize("key", ["text", "value", "message"])
@pytest.mark.parametrize("pictures", [{}, {"image": Image.new("RGB", (8, 6))}])
def test_a_question_under_another_key_is_not_lost(role, key, pictures):
    turns = [{"role": role, key: "What?", "content": None}, USER, ANSWER]
    with pytest.raises(ValueError, match=rf"^row 0: the content of .*, got None beside {key}; wri"):
        read({"messages": turns, **pictures}, is_text=not pictures)


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


@pytest.mark.parametrize("column", [{"tools": [TOOL]}, {"chat_template_kwargs": {"a": 1}}])
def test_plain_text_has_no_use_for_arguments_of_the_template(column):
    (name,) = column
    with pytest.raises(ValueError, match=f"^row 0: {name} must stand beside a conversation, got"):
        read({"prompt": "a", "completion": "b", **column})
    read({"prompt": "a", "completion": "b", **column}, is_text=False)  # there it is a conversation
    read({"prompt": "a", "completion": "b", **dict.fromkeys(column)})


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_an_answer_to_nothing_is_refused(column):
    with pytest.raises(ValueError, match=r"^row 0: a conversation must have a message before its"):
        read({column: [ANSWER]})


def test_a_null_that_the_author_wrote_stays():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"unit": None}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {"type": "function", "function": {"name": "weather", "default": None}}
    row = read({"messages": [USER, answer], "tools": [tool]})
    assert (row.answer, row.tools) == (answer, [tool])
    rows = datasets.Dataset.from_list([{"messages": [USER, ANSWER], "tools": json.dumps([tool])}])
    assert RowDataset(rows, needs_completion=True, is_text=True)[0].tools == [tool]


@pytest.mark.parametrize("others", [{"name": "planner"}, {"weight": 1}, {"thinking": ""}])
def test_a_message_without_content_needs_a_key_that_carries_the_turn(others):
    with pytest.raises(ValueError, match="the content of a message must be text or a list"):
        read({"messages": [USER, {"role": "assistant", "content": None, **others}]})


def test_what_a_table_fills_up_with_none_is_left_out_of_calls_and_tools():
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, other]}]
    table = datasets.Dataset.from_list([{"messages": messages}])
    row = RowDataset(table, needs_completion=True, is_text=True)[0]
    assert row.answer["tool_calls"] == [CALL, other]
    assert row.prompt == [USER]
    tools = [TOOL, {"type": "function", "function": {"name": "time", "strict": True}}]
    table = datasets.Dataset.from_list([{"messages": messages, "tools": tools}])
    row = RowDataset(table, needs_completion=True, is_text=True)[0]
    assert [tool["function"].keys() for tool in row.tools] == [
        {"name", "parameters"} if tool is TOOL else {"name", "strict"} for tool in tools
    ]


@pytest.mark.parametrize("column", ["id", "image_path", "audio", "chosen"])
@pytest.mark.parametrize("is_table", [True, False])
def test_a_column_that_nothing_uses_is_refused_once_by_name(column, is_table):
    rows = [{"messages": [USER, ANSWER], column: value} for value in (None, "7")]
    rows = datasets.Dataset.from_list(rows) if is_table else rows
    options = {"needs_completion": True, "is_text": True}
    with pytest.raises(
        ValueError,
        match=rf"^RowDataset: columns must be among .* got {column}, which nothing uses; rename "
        rf"them, or set dataset_ignore_columns=\['{column}'\]",
    ):
        RowDataset(rows, **options)
    assert RowDataset(rows, ignore_columns=[column, "other"], **options)[1].completion == "Rain."


def test_columns_to_ignore_are_a_list():
    with pytest.raises(
        ValueError, match=r"ignore_columns must be a list of names, got the text 'i"
    ):
        RowDataset([{}], needs_completion=True, is_text=True, ignore_columns="id")
    for names in ("id", [3]):
        with pytest.raises(ValueError, match="dataset_ignore_columns must be a list of names, got"):
            GOLDConfig(output_dir="runs/none", dataset_ignore_columns=names)


def test_a_column_that_holds_nothing_is_no_loss():
    rows = [{"messages": [USER, ANSWER], "note": empty} for empty in (None, "", [], {})]
    assert RowDataset(rows, needs_completion=True, is_text=True)[0].completion == "Rain."
    table = datasets.Dataset.from_list([rows[0], rows[0]])
    assert table.features["note"] == datasets.Value("null")
    assert RowDataset(table, needs_completion=True, is_text=True)[0].completion == "Rain."
    for empty, held in (("", "x"), ([], ["x"]), (None, "x")):
        notes = [empty, empty, held]
        table = datasets.Dataset.from_dict({"messages": [[USER, ANSWER]] * 3, "note": notes})
        first = RowDataset(table.select([0, 1]), needs_completion=True, is_text=True)[0]
        assert first.completion == "Rain."
        with pytest.raises(ValueError, match="got note, which nothing uses"):
            RowDataset(table, needs_completion=True, is_text=True)


@pytest.mark.parametrize("column", ["prompt", "completion", "output", "system"])
def test_a_column_that_does_not_go_with_the_others_names_the_row(column):
    rows = [{"messages": [USER, ANSWER]}] * 2
    rows.append({"messages": [USER, ANSWER], column: "Hail."})
    dataset = RowDataset(rows, needs_completion=True, is_text=True)
    with pytest.raises(ValueError, match=rf"^row 2: columns must go with 'messages', got {column}"):
        dataset[2]
    options = {"needs_completion": True, "is_text": True, "ignore_columns": [column]}
    assert RowDataset(rows, **options)[2].completion == "Rain."


def test_columns_of_a_dataset_of_ones_own_are_refused_with_the_row():
    class Rows:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"messages": [USER, ANSWER], "id": index}

    dataset = RowDataset(Rows(), needs_completion=True, is_text=True)
    with pytest.raises(ValueError, match=r"^row 1: columns must go with 'messages', got id, which"):
        dataset[1]
    assert len(list(RowDataset(Rows(), needs_completion=True, is_text=True, ignore_columns=["id"])))


@pytest.mark.parametrize(
    "error", [TypeError, ImportError, RuntimeError, KeyError, ZeroDivisionError]
)
def test_an_error_of_a_dataset_of_ones_own_names_the_row(error):
    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise error("no luck")
            return super().__getitem__(index)

    dataset = RowDataset(
        Rows([{"messages": [USER, ANSWER]}] * 2), needs_completion=True, is_text=True
    )
    with pytest.raises(ValueError, match=rf"^row 1: .* \({error.__name__}: .*no luck"):
        dataset[1]


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({"messages": [{"role": "user", "content": "a\ud83d"}, ANSWER]}, r"prompt\[0\], content"),
        ({"messages": [USER, {"role": "assistant", "content": "\udc00"}]}, "completion"),
        ({"messages": [USER, ANSWER | {"reasoning_content": "\ud83d"}]}, "answer, reasoning_"),
        ({"prompt": "\ud83d", "completion": "b"}, "prompt"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "\ud83d"}]}, r"tools\[0\], name"),
    ],
)
def test_a_lone_surrogate_names_row_and_key(columns, key):
    with pytest.raises(
        ValueError, match=f"^row 0: {key}.* the lone surrogate .* replace it"
    ) as caught:
        read(columns)
    assert str(caught.value).isascii(), "a terminal can print it"


IMAGE, PICTURE = {"type": "image"}, Image.new("RGB", (8, 8))


def text(content):
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<image>\nWhat?", [IMAGE, text("\nWhat?")]),
        ("What is <image>?", [text("What is "), IMAGE, text("?")]),
        ("Is <image><image> or <image>", [text("Is "), IMAGE, IMAGE, text(" or "), IMAGE]),
        ([text("<image>"), text("What?")], [IMAGE, text("What?")]),
    ],
)
@pytest.mark.parametrize("shape", ["messages", "prompt", "plain", "sharegpt"])
def test_a_placeholder_is_the_place_of_its_picture(content, parts, shape):
    user = {"role": "user", "content": content}
    columns = {
        "messages": {"messages": [user, ANSWER]},
        "prompt": {"prompt": [user], "completion": [ANSWER]},
        "plain": {"prompt": content if isinstance(content, str) else [user], "completion": "b"},
        "sharegpt": {"conversations": [{"from": "human", "value": content}, ANSWER]},
    }[shape]
    row = read(columns | {"images": [PICTURE] * parts.count(IMAGE)}, is_text=False)
    assert row.prompt == [{"role": "user", "content": parts}]
    assert len(row.images) == parts.count(IMAGE)


def test_placeholders_of_several_turns_take_the_pictures_in_order():
    turns = [{"role": "user", "content": c} for c in ("<image> a", "b", "c <image>")]
    messages = [turns[0], ANSWER, turns[1], ANSWER, turns[2], ANSWER]
    row = read({"messages": messages, "images": [PICTURE] * 2}, is_text=False)
    contents = [message["content"] for message in row.prompt if message["role"] == "user"]
    assert contents == [[IMAGE, text(" a")], "b", [text("c "), IMAGE]]


@pytest.mark.parametrize("num_pictures", [0, 1, 3])
def test_placeholders_and_pictures_that_do_not_match_name_the_row(num_pictures):
    user = {"role": "user", "content": "<image> or <image>?"}
    with pytest.raises(
        ValueError, match=rf"^row 0: the prompt has <image> 2 times but the row has {num_pictures} "
    ):
        read({"messages": [user, ANSWER], "images": [PICTURE] * num_pictures}, is_text=False)


def test_a_placeholder_beside_an_image_part_is_refused():
    user = {"role": "user", "content": [IMAGE, text("<image> What?")]}
    with pytest.raises(
        ValueError, match="must be an image part or <image>, got 1 of the one and 1"
    ):
        read({"messages": [user, ANSWER], "images": [PICTURE]}, is_text=False)


def test_a_text_student_reads_a_placeholder_as_text():
    user = {"role": "user", "content": "What does <image> do in SVG?"}
    assert read({"messages": [user, ANSWER]}).prompt == [user]


SHAREGPT = [
    {"from": "human", "value": "Weather in Ulm?"},
    {"from": "function_call", "value": json.dumps(CALL["function"])},
    {"from": "observation", "value": "rain"},
    {"from": "gpt", "value": "Rain.", "weight": 1},
]


def test_sharegpt_conversations_are_read():
    row = read({"conversations": SHAREGPT, "system": "Be brief.", "tools": json.dumps([TOOL])})
    assert row.prompt == [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
    ]
    assert (row.completion, row.answer, row.tools) == ("Rain.", ANSWER | {"weight": 1}, [TOOL])
    assert read({"conversations": [USER, ANSWER]}).prompt == [USER]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"from": "narrator", "value": "?"}, "`from` must be one of human, .* got 'narrator'"),
        ({"from": "function_call", "value": "weather"}, "a function_call must be JSON with name"),
        ({"from": "human", "value": 3}, "the content of a message must be text or a list"),
    ],
)
def test_sharegpt_messages_that_mean_nothing_are_refused(message, said):
    with pytest.raises(ValueError, match=f"^row 0: {said}"):
        read({"conversations": [message, ANSWER]})


def test_alpaca_columns_are_a_conversation():
    row = read({"instruction": "Translate.", "input": "Regen", "output": "Rain."})
    assert row.prompt == [{"role": "user", "content": "Translate.\nRegen"}]
    assert (row.completion, row.answer) == ("Rain.", ANSWER)
    history = [["Hello", "Hi."]]
    row = read(
        {
            "instruction": "Go.",
            "input": "",
            "output": "x",
            "system": "Be brief.",
            "history": history,
        }
    )
    said = [(message["role"], message["content"]) for message in row.prompt]
    assert said == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "Hi."),
        ("user", "Go."),
    ]
    assert read({"instruction": "Go."}, needs_completion=False).completion is None


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"instruction": ["Go."], "output": "x"}, "instruction must be text, got list"),
        ({"instruction": "Go.", "history": "Hello"}, "history must be a list, got str"),
        ({"instruction": "Go.", "history": ["Hi"]}, "history must be a list of .question, answ"),
        ({"conversations": "Hello"}, "conversations must be a list, got str"),
    ],
)
def test_alpaca_columns_that_mean_nothing_are_refused(columns, said):
    with pytest.raises(ValueError, match=f"^row 0: {said}"):
        read(columns)


@pytest.mark.parametrize("has_chat_template", [True, False])
def test_one_rule_says_who_gets_the_chat_template_and_the_log_says_it(has_chat_template, caplog):
    options = {"needs_completion": True, "is_text": True, "has_chat_template": has_chat_template}
    caplog.set_level("INFO", logger="gold_trainer.data.dataset")
    for columns in ({"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": "b"}):
        as_rows([columns], **options)
    said = [record.getMessage() for record in caplog.records]
    plain = ["rows are plain text: they are taken as they stand, without the tokenizer's chat "]
    assert [line[: len(plain[0])] for line in said[:-1]] == plain * has_chat_template
    assert said[-1] == "rows are conversations: the chat template is applied"


def test_only_a_column_that_nobody_knows_is_an_error_of_all_rows():
    """One of another shape may be a slip of its row, which on_bad_row leaves out."""
    row = {"messages": [USER, ANSWER]}
    for more, is_of_all in (({"output": "x"}, False), ({"output": "x", "score": 1}, True)):
        with pytest.raises(ValueError, match="columns must go with 'messages', got ") as error:
            as_conversation(row | more, 0)
        assert isinstance(error.value, ColumnsError) == is_of_all
