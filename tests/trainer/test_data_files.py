"""Files of every kind as rows: slices, columns of other projects, pictures in files and in text."""

import base64
import json

import datasets
import pytest

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.file_streams import load_stream
from gold_trainer.data.messages import parsed_messages
from support.picture_files import file_of
from support.tiny_models import tiny_picture

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(10)]
USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A bar."}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def load(path, split="train", purpose="train", **options):
    key = "dataset_train_split" if purpose == "train" else "dataset_test_split"
    return load_rows(DataArguments(dataset_name=str(path), **{key: split}, **options), purpose)


def prompts(rows):
    return [row["prompt"] for row in rows]


def parsed(path, is_text=True, **options):
    return RowDataset(load(path, **options), needs_completion=True, is_text=is_text)[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(10)),
        ("train[:4]", range(4)),
        ("train[-3:]", range(7, 10)),
        ("train[:20%]", range(2)),
        ("train[:2]+train[8:]", [0, 1, 8, 9]),
        ("rows[2:4]", range(2, 4)),  # the file's own name
    ],
)
def test_a_slice_of_a_file_is_that_slice(tmp_path, suffix, split, rows):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert prompts(load(path, split)) == [ROWS[i]["prompt"] for i in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("split", ["nonsense", "validation", "nonsense[:4]", "train+nonsense", ""])
def test_a_split_that_a_file_has_not_is_refused_by_name(tmp_path, suffix, split):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    with pytest.raises(
        ValueError, match=r"rows\.\w+: a single file has the split 'train', got"
    ) as e:
        load(path, split)
    assert repr(split) in str(e.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("split", ["train[a:b]", "train[4]", "train[:4"])
def test_a_slice_that_is_none_is_refused_by_name(tmp_path, suffix, split):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    with pytest.raises(ValueError, match=r"^dataset .*train\["):
        load(path, split)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_one_file_trains_and_evaluates_on_two_slices(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert len(load(path, "train[:8]")) == 8
    assert prompts(load(path, "train[8:]", "eval")) == [row["prompt"] for row in ROWS[8:]]
    with pytest.raises(ValueError, match="eval_dataset_name"):
        load(path, "test", "eval")


def test_a_slice_of_a_folder_is_that_slice(tmp_path):
    (tmp_path / "lines").mkdir()
    write(tmp_path / "lines" / "train.jsonl", ROWS)
    write(tmp_path / "lines" / "test.json", ROWS[:3])
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    splits["test"] = splits["train"].select(range(3))
    splits.save_to_disk(tmp_path / "splits")
    for name in ("lines", "saved", "splits"):
        assert prompts(load(tmp_path / name, "train[1:3]")) == [r["prompt"] for r in ROWS[1:3]]
    for name in ("lines", "splits"):
        assert len(load(tmp_path / name, "test[1:]", "eval")) == 2
        assert len(load(tmp_path / name, "train[:2]+test")) == 5
    for name in ("saved", "splits"):
        with pytest.raises(ValueError, match=r"no split 'nonsense\[:2\]'; it has train"):
            load(tmp_path / name, "nonsense[:2]")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load(tmp_path / "saved", "test", "eval")


def test_a_row_of_json_holds_pictures_by_path_as_base64_and_in_messages(tmp_path):
    data = file_of(tiny_picture(1))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    for value in ("pictures/1.png", text, f"data:image/png;base64,{text}"):
        content = [{"type": "image", "image": value}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": content}, ANSWER]
        for row in ({"messages": messages}, {"messages": [USER, ANSWER], "image": value}):
            path = write(tmp_path / "rows.jsonl", [row])
            (picture,) = parsed(path, is_text=False).images
            assert picture.tobytes() == tiny_picture(1).convert("RGB").tobytes()


def test_a_parquet_of_bytes_or_structs_holds_pictures(tmp_path):
    data = file_of(tiny_picture(1))
    for i, value in enumerate((data, {"bytes": data, "path": "1.png"})):
        path = write(tmp_path / f"{i}.parquet", [{**ROWS[0], "picture": value}])
        row = parsed(path, is_text=False, image_column="picture")
        assert row.images[0].size == tiny_picture(1).size


def test_sharegpt_and_alpaca_files_are_read(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bar."}]
    tiny_picture(1).save(tmp_path / "1.png")
    path = write(tmp_path / "llava.json", [{"conversations": turns, "image": "1.png"}])
    row = parsed(path, is_text=False)
    image = {"type": "image"}
    assert row.prompt == [{"role": "user", "content": [image, {"type": "text", "text": "\nWhat?"}]}]
    path = write(tmp_path / "alpaca.csv", [{"instruction": "Add.", "input": "1 1", "output": "2"}])
    row = parsed(path)
    assert row.prompt == [{"role": "user", "content": "Add.\n1 1"}] and row.completion == "2"


def test_cells_of_a_csv_are_text_as_they_are_written(tmp_path):
    cells = [("007", "0.10"), ("None", "NA"), ("a\nb", "true"), ('say "c"', "2026-01-02")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in cells]
    path = write(tmp_path / "rows.csv", rows)
    assert [load(path)[i] for i in range(len(rows))] == rows
    path.write_text("prompt,completion\nWhat?,\n")
    assert load(path)[0]["completion"] is None, "an empty cell holds nothing"
    path.write_text("")
    with pytest.raises(ValueError, match=r"the first line must name the columns, got \[\]"):
        load(path)


def test_a_column_that_nothing_uses_is_refused_from_a_file_too(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        path = write(tmp_path / f"rows{suffix}", [row | {"id": "7"} for row in ROWS])
        with pytest.raises(ValueError, match=r"^RowDataset: columns must .* got id, which nothing"):
            parsed(path)
        options = {"needs_completion": True, "is_text": True, "ignore_columns": ["id"]}
        assert RowDataset(load(path), **options)[3].completion == " 4"


def test_columns_that_are_named_are_used(tmp_path):
    rows = [{"question": "What?", "answer": "That.", "level": 3}]
    named = {"prompt_column": "question", "completion_column": "answer"}
    for suffix in (".jsonl", ".parquet"):
        path = write(tmp_path / f"rows{suffix}", rows)
        with pytest.raises(ValueError, match=r"got level, which nothing uses"):
            parsed(path, **named)
        options = {"needs_completion": True, "is_text": True, "ignore_columns": ["level"]}
        assert RowDataset(load(path, **named), **options)[0].completion == "That."


def test_plain_text_stays_plain_whichever_columns_are_named(tmp_path):
    """And the two fields that make a conversation of it say so in their names."""
    path = write(tmp_path / "rows.jsonl", ROWS)
    for options in ({}, {"prompt_column": "prompt", "completion_column": "completion"}):
        row = parsed(path, **options)
        assert (row.prompt, row.completion, row.answer) == ("0 + 1 =", " 1", None)
        row = parsed(path, text_as_messages=True, **options)
        assert row.prompt == [{"role": "user", "content": "0 + 1 ="}]
        assert row.answer == {"role": "assistant", "content": " 1"}
        row = parsed(path, system_prompt="Add.", **options)
        assert [message["role"] for message in row.prompt] == ["system", "user"]


def test_a_system_prompt_comes_first_in_every_shape_and_a_rows_own_wins(tmp_path):
    shapes = [
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
        {"instruction": "Go.", "output": "Gone."},
    ]
    for shape in shapes:
        path = write(tmp_path / "rows.jsonl", [shape])
        row = parsed(path, system_prompt="Brief.")
        assert row.prompt[0] == {"role": "system", "content": "Brief."}
        assert [message["role"] for message in row.prompt] == ["system", "user"]
    own = {"role": "system", "content": "Long."}
    for shape in (
        {"messages": [own, USER, ANSWER]},
        {"conversations": [USER, ANSWER], "system": "Long."},
        {"instruction": "Go.", "output": "Gone.", "system": "Long."},
        {"messages": [own | {"role": "System"}, USER, ANSWER]},
        {"prompt": json.dumps([own | {"role": " SYSTEM"}, USER]), "completion": "Gone."},
        {"conversations": [{"from": "System", "value": "Long."}, USER, ANSWER]},
        {"messages": [json.dumps(own), json.dumps(USER), json.dumps(ANSWER)]},
    ):
        path = write(tmp_path / "rows.jsonl", [shape])
        assert parsed(path, system_prompt="Brief.").prompt == [own, parsed(path).prompt[-1]]
    developer = {"role": "developer", "content": "Long."}
    path = write(tmp_path / "rows.jsonl", [{"messages": [developer, USER, ANSWER]}])
    assert parsed(path, system_prompt="Brief.").prompt[0] == developer


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_file_that_is_not_utf8_is_named_and_a_byte_order_mark_is_no_part_of_it(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert prompts(load(path)) == prompts(ROWS)
    path.write_bytes(b"\xe9" + content)
    with pytest.raises(ValueError, match=rf"rows\{suffix}: text in UTF-8 is expected, got byte 0x"):
        load(path)


@pytest.mark.parametrize("line", ["{broken", "[1]"])
def test_line_that_is_no_row_is_named(tmp_path, line):
    path = write(tmp_path / "rows.jsonl", ROWS[:1])
    path.write_text(path.read_text() + f"\n{line}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: (not valid JSON|an object)"):
        load(path)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("rows.parquet", "notes", "Parquet file size"),
        ("rows.csv", 'prompt,completion\na,b\n"c,d\n', "EOF inside string"),
    ],
)
def test_file_that_breaks_off_is_named_with_the_reason(name, text, reason, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: .*{reason}"):
        load(tmp_path / name)


@pytest.mark.parametrize("load", [load_rows, load_stream])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b,c\n", "at most 2 cells, as the first line has, got 3 in the next"),
        ("prompt,completion\n\na,b,\nc,d,\n", "at most 2 cells"),
        ("prompt,completion\n", "a line for each row is expected, got none; add rows"),
    ],
)
def test_no_cell_of_a_csv_gets_lost(tmp_path, text, message, load):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(DataArguments(dataset_name=str(path)), "train")


def test_a_cell_of_a_csv_may_be_long(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "a" * 200_000 + ",b\n")
    assert load_rows(DataArguments(dataset_name=str(path)), "train")[0]["completion"] == "b"


@pytest.mark.parametrize("cell", ["[" * 100_000, "[" + "1" * 5000 + "]"])
def test_json_that_python_does_not_read_names_the_file_or_is_text(tmp_path, cell):
    for name, load in (("a.json", load_rows), ("a.jsonl", load_rows), ("b.jsonl", load_stream)):
        path = tmp_path / name
        path.write_text(cell)
        with pytest.raises(ValueError, match=f"dataset .*{name}"):
            list(load(DataArguments(dataset_name=str(path)), "train"))
    assert parsed_messages(cell) == cell


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1: .* the key 'prompt' stands twice"),
        (
            "a.json",
            '[{"messages": [{"role": "a", "role": "b"}]}]',
            "the key 'role' stands twice in",
        ),
        ("a.csv", "prompt;completion\na;b\n", "separated by commas, got 'prompt;completion' as"),
        ("a.csv", "prompt\tcompletion\na\tb\n", "cells must be separated by commas, got"),
    ],
)
def test_what_would_be_lost_of_a_file_is_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"dataset .*{name}.*{message}"):
        load(tmp_path / name)
