"""Which of an assistant's turns are learnt: the last of a row, or each behind those before it."""

import json

import datasets
import pytest
from transformers.utils.logging import warning_once

from gold_trainer.config import GOLDConfig
from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.streams import RowStream
from gold_trainer.rendering.collator import GOLDCollator
from support.chat_templates import template_names, templated
from support.tiny_models import tiny_picture

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
IMAGE = {"type": "image"}


def said(role, content, **others):
    return {"role": role, "content": content, **others}


SYSTEM = said("system", "Be brief.")
U1, U2 = said("user", "Weather in Ulm?"), said("user", "And in Rome?")
A1, A2 = said("assistant", "Rain."), said("assistant", "Sun.")
ASKED = said("assistant", None, tool_calls=[CALL])
TOLD = said("tool", "rain")


def read(columns, train_on="all", *, is_text=True, needs_completion=True):
    rows = columns if isinstance(columns, list) else [columns]
    options = {"is_text": is_text, "needs_completion": needs_completion, "train_on": train_on}
    return list(RowDataset(rows, **options))


def turns_of(rows):
    return [(row.prompt, row.answer) for row in rows]


@pytest.mark.parametrize(
    ("columns", "turns"),
    [
        ({"messages": [U1, A1, U2, A2]}, [([U1], A1), ([U1, A1, U2], A2)]),
        ({"messages": [SYSTEM, U1, A1]}, [([SYSTEM, U1], A1)]),
        (
            {"messages": [U1, ASKED, TOLD, A1, U2, A2]},
            [([U1], ASKED), ([U1, ASKED, TOLD], A1), ([U1, ASKED, TOLD, A1, U2], A2)],
        ),
        # what an assistant says unasked is no answer
        ({"messages": [A1, U1, A2]}, [([A1, U1], A2)]),
        (
            {
                "conversations": [
                    {"from": "human", "value": U1["content"]},
                    {"from": "gpt", "value": "Rain."},
                    {"from": "human", "value": U2["content"]},
                    {"from": "gpt", "value": "Sun."},
                ],
                "system": "Be brief.",
            },
            [([SYSTEM, U1], A1), ([SYSTEM, U1, A1, U2], A2)],
        ),
        (
            {"instruction": U2["content"], "output": "Sun.", "history": [[U1["content"], "Rain."]]},
            [([U1], A1), ([U1, A1, U2], A2)],
        ),
        ({"prompt": [U1, A1, U2], "completion": [A2]}, [([U1, A1, U2], A2)]),
        (
            {"prompt": [U1], "completion": [ASKED, TOLD, A1]},
            [([U1], ASKED), ([U1, ASKED, TOLD], A1)],
        ),
        ({"prompt": "Weather in Ulm?", "completion": "Rain."}, [("Weather in Ulm?", None)]),
    ],
)
def test_every_turn_is_an_example_behind_the_turns_before_it(columns, turns):
    rows = read(columns)
    assert turns_of(rows) == turns
    assert turns_of(read(columns, "last")) == turns[-1:]
    as_json = {k: v if isinstance(v, str) else json.dumps(v) for k, v in columns.items()}
    assert turns_of(read(as_json)) == turns, "the same as JSON text"
    stream = RowStream(
        datasets.IterableDataset.from_generator(lambda: iter([as_json])),
        is_text=True,
        needs_completion=True,
        train_on="all",
    )
    assert list(stream) == read(as_json)


def test_a_row_says_which_turn_it_is():
    rows = read([{"messages": [U1, A1]}, {"messages": [U1, A1, U2, A2]}])
    assert [row.where for row in rows] == ["row 0, turn 0", "row 1, turn 0", "row 1, turn 1"]
    assert [row.where for row in read({"messages": [U1, A1]}, "last")] == ["row 0"]


def test_a_prefill_goes_on_and_is_whole_for_the_turns_behind_it():
    begun = said("assistant", "Let me")
    columns = {"prompt": [U1, begun], "completion": [said("assistant", " look."), U2, A2]}
    first, second = read(columns)
    assert (first.prompt, first.completion, first.is_prefill) == ([U1, begun], " look.", True)
    whole = said("assistant", "Let me look.")
    assert (second.prompt, second.answer, second.is_prefill) == ([U1, whole, U2], A2, False)
    (last,) = read(columns, "last")
    assert (last.prompt, last.is_prefill) == (second.prompt, False)


def test_a_prompt_alone_is_one_turn_that_is_yet_to_be_written():
    (row,) = read({"prompt": [U1, A1, U2], "completion": []}, needs_completion=False)
    assert (row.prompt, row.answer) == ([U1, A1, U2], None)
    rows = read({"messages": [U1, A1, U2]}, needs_completion=False)
    assert turns_of(rows) == [([U1], A1), ([U1, A1, U2], None)]
    dataset = RowDataset(
        [{"messages": [U1, A1, U2]}], is_text=True, needs_completion=True, train_on="all"
    )
    assert dataset[0].completion == "Rain."
    with pytest.raises(ValueError, match=r"^row 0, turn 1: an assistant's answer is expected"):
        dataset[1]


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (said("user", [{"type": "text"}]), "^row 1, turn 0: a part of a message must be text"),
        (said("user", 3), "^row 1, turn 0: the content of a message must be text"),
    ],
)
def test_a_row_that_cannot_be_read_says_so_when_its_turn_comes(user, message):
    rows = [{"messages": [U1, A1, U2, A2]}, {"messages": [user, A1]}, {"messages": [U1, A1]}]
    dataset = RowDataset(rows, is_text=True, needs_completion=True, train_on="all")
    assert len(dataset) == 4 and dataset[3].where == "row 2, turn 0"
    with pytest.raises(ValueError, match=message):
        dataset[2]


def test_an_error_of_one_turn_leaves_the_others():
    broken = said("assistant", "\ud83d")
    dataset = RowDataset(
        [{"messages": [U1, A1, U2, broken]}], is_text=True, needs_completion=True, train_on="all"
    )
    assert dataset[0].completion == "Rain."
    with pytest.raises(ValueError, match=r"^row 0, turn 1: completion must be text in Unicode"):
        dataset[1]


@pytest.mark.parametrize("places", ["placeholders", "parts", "none", "held"])
def test_a_turn_has_the_pictures_before_it(places):
    pictures = [tiny_picture(i) for i in range(3)]

    def asked(*indices):
        text = {"type": "text", "text": "What?"}
        if places == "placeholders":
            return said("user", "<image>" * len(indices) + "What?")
        if places == "held":
            return said("user", [{**IMAGE, "image": pictures[i]} for i in indices] + [text])
        return said("user", [IMAGE] * (len(indices) * (places == "parts")) + [text])

    messages = [asked(0), A1, asked(), A1, asked(1, 2), A2]
    columns = {"messages": messages} | ({} if places == "held" else {"images": pictures})
    rows = read(columns, is_text=False)
    counts = [3, 3, 3] if places == "none" else [1, 1, 3]
    assert [row.images for row in rows] == [pictures[:count] for count in counts]
    for row in rows:
        parts = [p for m in row.prompt if isinstance(m["content"], list) for p in m["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(row.images)


def test_turns_are_counted_without_reading_pictures(tmp_path):
    data = tmp_path / "0.png"
    tiny_picture(0).save(data)
    row = {"messages": [U1, A1, U2, A2], "image": {"bytes": data.read_bytes(), "path": None}}
    datasets.Dataset.from_list([row] * 2).to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(DataArguments(dataset_name=str(tmp_path / "rows.parquet")), "train")
    read_columns = []
    real = datasets.Dataset.__getitem__

    def recorded(table, key):
        read_columns.append(set(table.column_names))
        return real(table, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.Dataset, "__getitem__", recorded)
        dataset = RowDataset(rows, is_text=False, needs_completion=True, train_on="all")
    assert read_columns == [{"messages", "image"}] + [{"messages"}] * 2
    assert [len(row.images) for row in dataset] == [1] * 4


def test_named_columns_are_counted_too(tmp_path):
    row = {"ask": [U1], "say": [ASKED, TOLD, A1], "look": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    names = {"prompt_column": "ask", "completion_column": "say", "image_column": "look"}
    rows = load_rows(DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), **names), "train")
    dataset = RowDataset(rows, is_text=True, needs_completion=True, train_on="all")
    assert [row.answer for row in dataset] == [ASKED, A1]


@pytest.mark.skipif("qwen3" not in template_names(), reason="templates come with trl")
def test_thoughts_of_every_turn_are_learnt_where_the_template_drops_earlier_ones():
    tokenizer = templated("qwen3", "qwen")
    answers = [A1 | {"reasoning_content": "Clouds."}, A2 | {"reasoning_content": "Blue."}]
    rows = read({"messages": [U1, answers[0], U2, answers[1]]})
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    examples = [collator.example(row) for row in rows]
    texts = [tokenizer.decode(example.written_ids) for example in examples]
    for text, answer in zip(texts, answers, strict=True):
        assert answer["reasoning_content"] in text and answer["content"] in text
    assert "Clouds." not in examples[1].prompt_text, "as inference has it"


def test_an_answer_of_which_the_template_writes_nothing_is_refused():
    tokenizer = templated("qwen3", "qwen") if "qwen3" in template_names() else None
    if tokenizer is None:
        pytest.skip("templates come with trl")
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    silent = said("assistant", None, mood=["calm"])
    rows = read({"messages": [U1, A1, U2, silent]})
    assert collator.example(rows[0]).written_ids
    with pytest.raises(
        ValueError,
        match=r"^row 0, turn 1: an answer must have a content, or .* got None and \['mood'\], of",
    ):
        collator.example(rows[1])
    (called,) = read({"messages": [U1, ASKED]})
    assert "weather" in tokenizer.decode(collator.example(called).written_ids)
    assert collator.example(read({"messages": [U1, said("assistant", "")]})[0]).written_ids


def test_train_on_is_one_of_two():
    with pytest.raises(ValueError, match="train_on must be 'last' or 'all', got 'first'; the"):
        GOLDConfig(output_dir="runs/none", train_on="first")


@pytest.mark.parametrize(
    "name", ["tools", "tokenize", "add_generation_prompt", "return_dict", "chat_template"]
)
def test_arguments_that_are_the_trainers_own_are_refused(name):
    kwargs = {"enable_thinking": False, name: True}
    message = f"chat_template_kwargs must hold what only the chat template reads, got '{name}', whi"
    for train_on, where in (("last", "row 0"), ("all", "row 0, turn 0")):
        with pytest.raises(ValueError, match=f"^{where}: {message}"):
            read({"messages": [U1, A1], "chat_template_kwargs": kwargs}, train_on)
    for value in (kwargs, json.dumps(kwargs)):
        with pytest.raises(ValueError, match=f"^GOLDConfig: {message}"):
            GOLDConfig(output_dir="runs/none", chat_template_kwargs=value)


def test_answers_of_a_completion_that_are_not_learnt_are_said_once(caplog):
    warning_once.cache_clear()
    columns = {"prompt": [U1], "completion": [ASKED, TOLD, A1]}
    for _ in range(2):
        read(columns, "last")
        read(columns)
        read({"messages": [U1, A1, U2, A2]}, "last")
    (record,) = caplog.records
    assert record.getMessage().startswith("row 0: of the 2 answers in its completion the last is")
