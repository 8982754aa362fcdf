"""Conversations under other names: chosen answers of preferences, pairs of a question and its
answer.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset
from support.tiny_data import tiny_picture

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}
SYSTEM = {"role": "system", "content": "Be brief."}
OTHER = {"role": "assistant", "content": "Sun."}
OF_PARTS = {"role": "user", "content": [{"type": "text", "text": "Weather in Ulm?"}]}
PAIR = {"user": "Weather in Ulm?", "assistant": "Rain.", "source": "x"}


def read(columns, **options):
    return RowDataset([columns], needs_completion=True, is_text=True, **options)[0]


def load(tmp_path, columns, **fields):
    (tmp_path / "rows.jsonl").write_text(json.dumps(columns) + "\n")
    rows = load_rows(DataArguments(str(tmp_path / "rows.jsonl"), **fields), "train")
    return RowDataset(rows, needs_completion=True, is_text=True)[0]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ([USER], [USER, ANSWER], [USER]),
        ("Weather in Ulm?", [USER, ANSWER], [USER]),
        ("Weather in Ulm?", [SYSTEM, USER, ANSWER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER, ANSWER], [SYSTEM, USER]),
        ([SYSTEM, USER], [SYSTEM, USER, ANSWER], [SYSTEM, USER]),
        ([USER, OTHER, USER], [USER, OTHER, USER, ANSWER], [USER, OTHER, USER]),
        ([USER, OTHER], [USER, ANSWER], [USER, OTHER, USER]),  # the question once more
        ([SYSTEM], [USER, ANSWER], [SYSTEM, USER]),
        ([USER], [SYSTEM, USER, ANSWER], [SYSTEM, USER]),
        ([USER, OTHER, USER], [SYSTEM, USER, OTHER, USER, ANSWER], [SYSTEM, USER, OTHER, USER]),
        ([USER], [OF_PARTS, ANSWER], [USER]),
        ([OF_PARTS], [USER, ANSWER], [OF_PARTS]),
        ([USER | {"name": "Ann"}], [USER, ANSWER], [USER | {"name": "Ann"}]),
        ([USER], [USER | {"content": "Weather in Ulm?\n"}, ANSWER], [USER]),
        ([USER], [USER | {"content": "Hail?"}, ANSWER], [USER, USER | {"content": "Hail?"}]),
    ],
)
def test_a_completion_that_begins_with_its_prompt_has_it_once(prompt, completion, expected):
    row = read({"prompt": prompt, "completion": completion})
    assert (row.prompt, row.completion) == (expected, "Rain.")


@pytest.mark.parametrize("make", [np.asarray, lambda a: torch.from_numpy(a), Image.fromarray])
def test_a_question_with_a_picture_is_repeated_if_the_picture_is_the_same(make):
    def asking(level):
        picture = {"type": "image", "image": make(np.full((9, 8, 3), level, dtype=np.uint8))}
        return {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}

    for level, number in ((0, 1), (1, 2)):
        columns = {"prompt": [asking(0)], "completion": [asking(level), ANSWER]}
        row = RowDataset([columns], needs_completion=True, is_text=False)[0]
        assert len(row.prompt) == len(row.images) == number


@pytest.mark.parametrize("completion", [[USER, ANSWER], [ANSWER], [USER]])
def test_a_conversation_beside_another_plain_prompt_is_refused(completion):
    with pytest.raises(ValueError, match=r"^row 0: prompt is plain text, so completion must"):
        read({"prompt": "Hail?", "completion": completion})


def test_answers_that_repeat_the_prompt_are_learnt_alone():
    columns = {"prompt": [USER], "completion": [USER, OTHER, USER, ANSWER]}
    rows = RowDataset([columns], needs_completion=True, is_text=True, train_on="all")
    assert [(len(row.prompt), row.completion) for row in rows] == [(1, "Sun."), (3, "Rain.")]


@pytest.mark.parametrize(
    "conversation",
    [
        [USER, ANSWER],
        json.dumps([USER, ANSWER]),
        [{"from": "human", "value": "Weather in Ulm?"}, {"from": "gpt", "value": "Rain."}],
        [PAIR],
    ],
)
def test_a_conversation_of_another_name_is_one(conversation, tmp_path):
    row = load(tmp_path, {"chat": conversation}, prompt_column="chat")
    assert (row.prompt, row.completion) == ([USER], "Rain.")
    row = load(tmp_path, {"chat": conversation}, prompt_column="chat", system_prompt="Be brief.")
    assert row.prompt == [SYSTEM, USER]
    columns = {"chosen": conversation, "question": "Weather in Ulm?"}
    row = load(tmp_path, columns, prompt_column="question", completion_column="chosen")
    assert (row.prompt, row.completion) == ([USER], "Rain.")


def test_pairs_of_question_and_answer_are_a_conversation():
    second = {"user": "And now?", "assistant": "Sun."}
    columns = {"texts": [PAIR, second], "images": [tiny_picture(0)]}
    rows = RowDataset([columns], needs_completion=True, is_text=False, train_on="all")
    first, last = rows[0], rows[1]
    assert first.answer == ANSWER | {"source": "x"} and len(first.images) == 1
    assert first.prompt[0]["content"][1:] == [{"type": "text", "text": "Weather in Ulm?"}]
    assert (len(last.prompt), last.completion) == (3, "Sun.")


def test_a_system_message_that_stands_twice_counts_once_and_two_are_refused():
    talk = [{"from": "system", "value": "Be brief."}, USER, ANSWER]
    assert read({"conversations": talk, "system": "Be brief."}).prompt == [SYSTEM, USER]
    assert read({"conversations": talk, "system": ""}).prompt == [SYSTEM, USER]
    with pytest.raises(ValueError, match=r"^row 0: a row must have one system message, got others"):
        read({"conversations": talk, "system": "Be kind."})
