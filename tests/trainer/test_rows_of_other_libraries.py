"""Rows as pandas, numpy, torch and servers hand them over, and errors in one line about them."""

import base64

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from gold_trainer.data.bad_rows import tolerant
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.pictures import PictureReader
from gold_trainer.data.streams import RowStream
from support.picture_files import file_of
from support.tiny_models import tiny_picture

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}
TOOL = {"type": "function", "function": {"name": "weather"}}


def read(columns, **options):
    options = {"needs_completion": True, "is_text": True} | options
    return RowDataset([columns], **options)[0]


def objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def test_arrays_of_objects_are_lists_at_any_depth():
    parts = objects([{"type": "text", "text": "Weather in Ulm?"}])
    row = read(
        {"messages": objects([{**USER, "content": parts}, ANSWER]), "tools": objects([TOOL])}
    )
    assert row.prompt == [{**USER, "content": [{"type": "text", "text": "Weather in Ulm?"}]}]
    assert (row.answer, row.tools) == (ANSWER, [TOOL])
    columns = {"messages": [USER, ANSWER], "images": objects([tiny_picture(0), tiny_picture(1)])}
    assert len(read(columns, is_text=False).images) == 2


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
def test_a_streams_format_changes_nothing(kind):
    table = datasets.Dataset.from_list([{"messages": [USER, ANSWER]}])
    stream = table.to_iterable_dataset().with_format(kind)
    (row,) = RowStream(stream, needs_completion=True, is_text=True)
    assert (row.prompt, row.answer) == ([USER], ANSWER)


@pytest.mark.parametrize(
    "levels",
    [
        np.ones((4, 6, 3), bool),
        np.ones((4, 6), bool),
        torch.ones(3, 4, 6, dtype=torch.bfloat16),
        torch.ones(4, 6, dtype=torch.bool),
    ],
)
def test_bits_and_bfloat16_are_levels(levels):
    picture = PictureReader().read(levels, 0, "image")
    assert (picture.size, picture.getpixel((5, 3))) == ((6, 4), (255, 255, 255))


@pytest.mark.parametrize(
    "tensor", [torch.ones(4, 6).to_sparse(), torch.empty(3, 4, 6, device="meta")]
)
@pytest.mark.parametrize("column", ["image", "video"])
def test_a_tensor_without_numbers_of_its_own_is_refused(tensor, column):
    columns = {"messages": [USER, ANSWER], column: tensor}
    with pytest.raises(ValueError, match=f"row 0: {column} must be a tensor with numbers that"):
        read(columns, is_text=False, takes_videos=True)


def test_base64_may_have_no_padding_or_the_alphabet_of_addresses():
    picture = Image.effect_noise((31, 20), 60)
    file = file_of(picture)
    text = base64.b64encode(file).decode()
    address = base64.urlsafe_b64encode(file).decode()
    assert "-" in address and "_" in address
    for value in (
        *(text.rstrip("="), address, address.rstrip("="), "\n" + text),
        *(f"DATA:image/png;BASE64,{text}", {"base64": text.encode()}),
    ):
        assert PictureReader().read(value, 0, "image").size == (31, 20)


def test_a_dict_of_datasets_is_no_dataset():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list([{"messages": [USER, ANSWER]}]))
    with pytest.raises(ValueError, match=r"got DatasetDict with \['train'\]; pass one of its"):
        RowDataset(splits, needs_completion=True, is_text=True)


def test_a_key_of_a_message_is_text():
    with pytest.raises(ValueError, match="row 0: the keys of a message must be text, got 7; "):
        read({"messages": [{**USER, 7: "x"}, ANSWER]})


def broken_stream():
    yield {"messages": [USER, ANSWER]}
    raise RuntimeError("first line\nsecond line " + "x" * 1000)


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": ["x" * 5000]},
        {"messages": [{"role": "user", "content": list(range(5000))}, ANSWER]},
        {"messages": np.arange(100).reshape(20, 5)},
        {"messages": [USER, ANSWER], "tools": ["no\nJSON " * 500]},
        {"messages": [USER, ANSWER], "image": "a" * 5000},
    ],
)
def test_an_error_is_one_line_however_long_the_row_is(columns):
    with pytest.raises(ValueError, match="row 0: ") as caught:
        read(columns, is_text=False)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_an_error_of_a_streams_own_code_is_told_in_one_line():
    stream = datasets.IterableDataset.from_generator(broken_stream)
    with pytest.raises(ValueError, match=r"row 1: .*first line second line") as caught:
        list(RowStream(stream, needs_completion=True, is_text=True))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


class Late(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"messages": [USER, ANSWER]} | ({"id": 7} if index else {})


def test_a_column_that_nobody_knows_is_an_error_wherever_it_turns_up():
    options = {"needs_completion": True, "is_text": True}
    rows = RowDataset(Late(), **options)
    assert rows.first(skips_bad=True).answer == ANSWER
    with pytest.raises(ValueError, match="row 1: columns must go with 'messages', got id"):
        tolerant(rows)[1]
    stream = RowStream([Late()[i] for i in range(2)], **options)
    with pytest.raises(ValueError, match="row 1: columns must go with 'messages', got id"):
        list(tolerant(stream))
