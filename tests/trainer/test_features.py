"""What the features of a table say of its rows: nulls, classes, arrays, media that nobody reads."""

import json
import pickle

import datasets
import numpy as np
import pytest
from datasets import Array2D, Array3D, ClassLabel, Features, LargeList, List, Value
from PIL import Image

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.streams import RowStream

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": None, "in": {"a": 1}}}}
OTHER = {"type": "function", "function": {"name": "look", "arguments": {"for": [None, 2]}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"default": None, "b": 1}}}
PLAIN = List({"role": Value("string"), "content": Value("string")})
TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bar."}]


def talk(call):
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [TALK[0], asked, {"role": "tool", "content": "x"}, TALK[1]]
    return [{"tool_calls": [], **message} for message in rows]


def table(rows, **features):
    return datasets.Dataset.from_list(rows, features=Features(features))


def read(rows, **options):
    return RowDataset(rows, needs_completion=True, is_text=False, **options)


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 5")
@pytest.mark.parametrize("where", ["table", "stream", "file"])
@pytest.mark.parametrize("of", ["messages", "calls"])
def test_a_null_in_json_is_its_authors(of, where, tmp_path):
    rows = [{"messages": talk(call), "tools": [TOOL]} for call in (CALL, OTHER)]
    calls = {
        "role": Value("string"),
        "content": Value("string"),
        "tool_calls": List(datasets.Json()),
    }
    messages = List(datasets.Json()) if of == "messages" else List(calls)
    given = table(rows, messages=messages, tools=List(datasets.Json()))
    if where == "file":
        given.to_parquet(tmp_path / "rows.parquet")
        given = load_rows(DataArguments(str(tmp_path / "rows.parquet")), "train")
    if where == "stream":
        stream = RowStream(given.to_iterable_dataset(), needs_completion=True, is_text=True)
        read_rows = list(stream)
    else:
        read_rows = [read(given)[i] for i in range(2)]
    for row, call in zip(read_rows, (CALL, OTHER), strict=True):
        assert row.prompt[1]["tool_calls"] == [call] and row.tools == [TOOL]


def test_a_null_that_a_table_has_filled_in_is_nobodys():
    rows = [{"messages": talk(call)} for call in (CALL, OTHER)]
    function = {"name": "look", "arguments": {"in": {"a": 1}}}
    asked = read(datasets.Dataset.from_list(rows))[0].prompt[1]
    assert asked["tool_calls"] == [{"type": "function", "function": function}]


def test_rows_of_a_table_reach_workers_that_are_not_forked():
    rows = pickle.loads(pickle.dumps(read(datasets.Dataset.from_list([{"messages": TALK}]))))
    assert rows[0].completion == "A bar."


def test_a_class_is_its_name():
    names = ClassLabel(names=["cat", "dog"])
    rows = table([{"prompt": "?", "completion": 1}], prompt=Value("string"), completion=names)
    row = RowDataset(rows, needs_completion=True, is_text=True)[0]
    assert (row.prompt, row.completion) == ("?", "dog")


@pytest.mark.parametrize("name", ["Pdf", "Nifti", "Image"])
def test_an_ignored_column_needs_no_package_that_decodes_it(name):
    feature = getattr(datasets, name)()
    rows = table(
        [{"messages": TALK, "doc": {"path": None, "bytes": b"x"}}], messages=PLAIN, doc=feature
    )
    assert read(rows, ignore_columns=["doc"])[0].completion == "A bar."


GREY = np.arange(15, dtype=np.uint8).reshape(3, 5)
RGB = np.stack([GREY, GREY + 1, GREY + 2], -1)


@pytest.mark.parametrize("kind", [None, "numpy", "torch"])
@pytest.mark.parametrize(
    ("column", "feature", "value"),
    [
        ("image", Array2D((3, 5), "uint8"), GREY),
        ("image", Array3D((3, 5, 3), "uint8"), RGB),
        ("image", Array3D((3, 3, 5), "float32"), RGB.transpose(2, 0, 1) / np.float32(255)),
        ("images", List(Array3D((3, 5, 3), "uint8")), [RGB, RGB]),
        ("image", LargeList(LargeList(Value("uint8"))), GREY.tolist()),
    ],
)
def test_an_array_of_a_table_is_a_picture(column, feature, value, kind):
    rows = table([{"messages": TALK, column: value}], messages=PLAIN, **{column: feature})
    images = read(rows.with_format(kind))[0].images
    assert len(images) == (2 if column == "images" else 1)
    expected = Image.fromarray(RGB if np.ndim(value) > 2 else GREY).convert("RGB")
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(expected))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2], [3]], "must be lists of numbers of one length, got others"),
        ([[70000, 2]], "must be an array .* got int64"),
        ([[-1, 2]], "must be an array .* got int64"),
        ([1, 2], r"\[0\] must be a picture: "),
    ],
)
def test_lists_that_are_no_picture_are_refused(value, message):
    with pytest.raises(ValueError, match=f"^row 0: image.*{message}"):
        read([{"messages": TALK, "image": value}])[0]


@pytest.mark.parametrize("empty", [None, "", {"bytes": None, "path": None}])
def test_a_part_has_no_picture_under_a_key_that_holds_nothing(empty):
    text = {"type": "text", "text": "What?", "image": empty, "image_url": empty}
    picture = {"type": "image", "text": None, "image": Image.new("RGB", (8, 6))}
    row = read([{"messages": [{"role": "user", "content": [picture, text]}, TALK[1]]}])[0]
    assert row.prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert len(row.images) == 1


def test_messages_may_be_json_text_each():
    row = read([{"messages": [json.dumps(message) for message in TALK]}])[0]
    assert (row.prompt, row.completion) == (TALK[:1], "A bar.")


@pytest.mark.parametrize("number", [3, 1.5, True])
def test_a_number_is_no_completion(number):
    with pytest.raises(ValueError, match=f"^row 0: .* got the number {number}; write it in quotes"):
        read([{"prompt": "How many?", "completion": number}])[0]
