"""Rows, tokens and pictures that users wrote, through the command line: used, or one sentence."""

import base64
from typing import Any

import pytest
from PIL import Image

from support.picture_files import file_of
from support.tiny_models import tiny_picture
from support.walk import ANSWER, CHAT, PLAIN, USER, Case, walk

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "look", "arguments": {}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def text_of(picture: Image.Image) -> str:
    return base64.b64encode(file_of(picture)).decode()


def says(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}, ANSWER]}


def used(name: str, rows: Any, flags: str = "", says: str = "", **options: Any) -> Case:
    return Case(name, rows, flags, 0, says, **options)


def refused(name: str, says: str, rows: Any, flags: str = "", **options: Any) -> Case:
    return Case(name, rows, flags, 2, says, **options)


def of(**columns) -> list:
    return [CHAT | columns] * 2


CASES: list[Case] = [
    used("tools beside messages reach the template", of(tools=[TOOL])),
    used("tools as json text", of(tools='[{"type": "function", "function": {"name": "a"}}]')),
    refused("tools that are a number", "row 0: tools must be a list of JSON schemas", of(tools=3)),
    used(
        "thoughts beside an answer",
        [{"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}] * 2,
    ),
    used(
        "a call of a tool without content among the turns",
        [{"messages": [USER, CALLS, {"role": "tool", "content": "bar"}, ANSWER]}] * 2,
    ),
    used("arguments of the template", of(chat_template_kwargs={"enable_thinking": False})),
    refused(
        "arguments of the template that are a list",
        "row 0: chat_template_kwargs must be a dict",
        of(chat_template_kwargs=["enable_thinking"]),
    ),
    refused("a column that nothing uses", "got id, which nothing uses; rename", of(id=7)),
    used("a column that is left out by name", of(id=7), "--dataset_ignore_columns id"),
    refused("a column of another shape", "got completion, which nothing uses", of(completion="a")),
    used("a placeholder with its picture", [says("<image>\nWhat?") | {"image": "0.png"}] * 2),
    refused(
        "two placeholders with one picture",
        "row 0: the prompt has <image> 2 times but the row has 1 pictures",
        [says("<image><image>") | {"image": "0.png"}],
    ),
    used(
        "an answer that goes on where the prompt stops",
        [{"prompt": [USER, ANSWER], "completion": " Red."}] * 2,
    ),
    used(
        "special tokens in an answer are text",
        [{"messages": [USER, ANSWER | {"content": "<|im_end|>a"}]}],
    ),
    refused("a lone surrogate", r"row 0: prompt\[0\], content must be text", [says("a\ud83d")]),
    refused("no answer", "row 0: an assistant's answer is expected", [{"messages": [USER]}]),
    refused(
        "an answer alone", "row 0: a conversation must have a message", [{"messages": [ANSWER]}]
    ),
    refused("messages that are no list", "row 0", [{"messages": 3}]),
    refused("a message without a role", "row 0", [{"messages": [{"content": "a"}, ANSWER]}]),
    refused("a row that is no object", "line 1: an object is expected", "[1]\n"),
    refused("a line that is no json", "line 1: not valid JSON", "{broken\n"),
    refused("an empty file", "has no rows", ""),
    refused("no known column", "are expected, got", [{"question": "a", "answer": "b"}]),
    used(
        "columns with other names",
        [{"question": "a", "answer": "b"}] * 2,
        "--prompt_column question --completion_column answer",
    ),
    refused("a column that there is not", "no column 'q'", of(), "--prompt_column q"),
    used(
        "sharegpt",
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2,
    ),
    used("alpaca", [{"instruction": "a", "input": "b", "output": "c"}] * 2),
    used("plain text for a text model", [PLAIN] * 2, family="llama", says="no chat template"),
    used(
        "plain text as messages",
        [PLAIN] * 2,
        "--text_as_messages",
        family="llama",
        says="conversations: the chat template is applied",
    ),
    used("both kinds of rows", [CHAT, PLAIN], family="llama", says="of two kinds: of 2 looked at"),
    refused("a picture for a text model", "takes no pictures", of(image="0.png"), family="llama"),
    used(
        "empty and blank answers",
        [{"messages": [USER, ANSWER | {"content": c}]} for c in ("", " ")],
    ),
    refused(
        "a prompt that is too long",
        "row 0: the prompt has .* tokens.*raise max_length",
        [says("long " * 300)],
        "--max_length 64",
    ),
    used("a picture by path", of(image="0.png")),
    used("pictures in a list", of(images=["0.png", "0.png"])),
    used("a picture as base64 text", of(image=text_of(tiny_picture(0)))),
    used(
        "a picture in a part of a message",
        [
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "0.png"}]},
                    ANSWER,
                ]
            }
        ],
    ),
    refused("a picture that is not there", "row 0: image must be the path", of(image="none.png")),
    refused("an address", "row 0: image must be a file, got the address", of(image="http://a/b")),
    refused("a path with a NUL", "row 0: image must be the path", of(image="a\0.png")),
    refused(
        "a file that is no picture", "row 0: its picture cannot be read", of(image="rows.jsonl")
    ),
    refused("a strip", "row 0.*200", of(image="strip.png")),
    refused("too many pixels", "at most max_pixels=9", of(image="0.png"), "--max_pixels 9"),
    refused(
        "a path that leaves its folder",
        "row 0: image",
        of(image="../0.png"),
        "--picture_folder {}/pictures",
    ),
    used("a picture with levels of 16 bits", of(image="deep.png")),
    used("a picture with a transparent colour", of(image="clear.png")),
    refused("a number as a picture", "row 0: image", of(image=5)),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def folder(tmp_path):
    tiny_picture(0).save(tmp_path / "0.png")
    (tmp_path / "pictures").mkdir()
    Image.new("L", (1200, 4)).save(tmp_path / "strip.png")
    Image.new("I;16", (32, 32), 40000).save(tmp_path / "deep.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "clear.png", transparency=(255, 0, 0))
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_used_or_refused_in_one_sentence(case, models, folder, capfd):
    walk(case, models, folder, capfd)
