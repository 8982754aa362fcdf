"""Rows of every format become one form; what cannot be used is an error that names the row."""

import io
import json

import datasets
import pytest
from PIL import Image

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset
from support.picture_files import file_of
from support.tiny_models import tiny_picture

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A bar."}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is this?"}


def read(columns, *, needs_completion=True, is_text=False, index=0):
    rows = [{} for _ in range(index)] + [columns]
    return RowDataset(rows, needs_completion=needs_completion, is_text=is_text)[index]


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "A bar."},
        {"prompt": "What is this?", "completion": "A bar."},
        {"messages": [USER, ANSWER], "prompt": None, "completion": None},
        {
            "prompt": [USER],
            "completion": [{**ANSWER, "content": [{"type": "text", "text": "A bar."}]}],
        },
    ],
)
@pytest.mark.parametrize("pictures", [{}, {"image": None}, {"images": None}, {"images": []}])
def test_every_format_gives_prompt_and_completion(columns, pictures):
    row = read(columns | pictures)
    assert (row.prompt, row.completion, row.images) == ([USER], "A bar.", [])


def test_plain_text_stays_plain_for_a_text_student():
    row = read({"prompt": "2 + 2 =", "completion": " 4"}, is_text=True)
    assert (row.prompt, row.completion) == ("2 + 2 =", " 4")


def test_earlier_turns_belong_to_the_prompt():
    system = {"role": "system", "content": "Be brief."}
    turns = [system, USER, ANSWER, {"role": "user", "content": "Sure?"}]
    row = read({"messages": [*turns, {"role": "assistant", "content": "Yes."}]})
    assert (row.prompt, row.completion) == (turns, "Yes.")


@pytest.mark.parametrize(
    "columns", [{"messages": [USER]}, {"prompt": [USER]}, {"prompt": "What is this?"}]
)
def test_completion_may_be_missing_where_it_is_generated(columns):
    assert read(columns, needs_completion=False).completion is None


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("as_list", [True, False])
def test_picture_columns_hold_one_or_several(column, as_list):
    picture = tiny_picture(1)
    row = read({"messages": [USER, ANSWER], column: [picture] if as_list else picture})
    assert row.images == [picture]
    assert row.prompt == [{"role": "user", "content": [IMAGE, TEXT]}]


def test_pictures_go_into_the_first_user_turn():
    system = {"role": "system", "content": "Be brief."}
    later = {"role": "user", "content": "Sure?"}
    pictures = [tiny_picture(1), tiny_picture(2)]
    messages = [system, USER, ANSWER, later, ANSWER]
    row = read({"messages": messages, "images": pictures})
    first = {"role": "user", "content": [IMAGE, IMAGE, TEXT]}
    assert row.prompt == [system, first, ANSWER, later]
    assert messages[1] is USER and USER["content"] == "What is this?", (
        "the row itself is not changed"
    )


def test_placed_image_parts_stay_where_they_are():
    content = [TEXT, IMAGE, TEXT, IMAGE]
    row = read(
        {
            "prompt": [{"role": "user", "content": content}],
            "completion": "A bar.",
            "images": [tiny_picture(1), tiny_picture(2)],
        }
    )
    assert row.prompt[0]["content"] == content


def test_picture_beside_an_empty_column_is_kept():
    row = read({"messages": [USER, ANSWER], "image": tiny_picture(1), "images": []})
    assert len(row.images) == 1 and row.prompt[0]["content"] == [IMAGE, TEXT]


def test_keys_that_a_table_fills_with_none_are_left_out():
    """Qwen's templates write a picture for every part that has the key "image"."""
    picture = {"type": "image", "image": "1.png"}
    messages = [
        {"role": "user", "content": [picture, TEXT]},
        {"role": "assistant", "content": [TEXT]},
    ]
    table = datasets.Dataset.from_list([{"messages": messages}])
    columns = table[0] | {"images": [tiny_picture(1)]}
    assert columns["messages"][0]["content"][1] == {**TEXT, "image": None}, "what Arrow makes of it"
    row = read(columns)
    assert row.prompt == [{"role": "user", "content": [picture, TEXT]}]
    assert row.completion == TEXT["text"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_pictures_of_any_mode_become_rgb(mode):
    row = read({"messages": [USER, ANSWER], "image": Image.new(mode, (8, 6))})
    assert (row.images[0].mode, row.images[0].size) == ("RGB", (8, 6))


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bit_grey_keeps_its_levels(mode):
    dark = Image.new("I;16", (8, 6), 64 * 256).convert("I").convert(mode)
    row = read({"messages": [USER, ANSWER], "image": dark})
    assert row.images[0].getpixel((3, 3)) == (64, 64, 64)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white(mode):
    """A black drawing on nothing, which is stored as black too, must not become all black."""
    drawing = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    drawing.putpixel((3, 3), (0, 0, 0, 255))
    picture = drawing.convert(mode) if mode != "P" else drawing.quantize(4)
    (image,) = read({"messages": [USER, ANSWER], "image": picture}).images
    assert image.mode == "RGB"
    assert (image.getpixel((0, 0)), image.getpixel((3, 3))) == ((255,) * 3, (0,) * 3)


def test_rows_of_a_datasets_table_are_read_with_their_pictures(tmp_path):
    tiny_picture(1).save(tmp_path / "one.png")
    table = datasets.Dataset.from_dict(
        {"messages": [[USER, ANSWER]] * 2, "images": [[str(tmp_path / "one.png")], []]},
    ).cast_column("images", datasets.List(datasets.Image()))
    rows = RowDataset(table, needs_completion=True, is_text=False)
    assert [len(rows[i].images) for i in range(len(rows))] == [1, 0]
    assert rows[0].images[0].size == tiny_picture(1).size


def broken_picture() -> Image.Image:
    data = file_of(tiny_picture(1).resize((64, 64)))
    return Image.open(io.BytesIO(data[:-60]))


def test_unreadable_picture_names_the_row():
    with pytest.raises(
        ValueError, match=r"^row 2: its picture cannot be read \(.+\); mend or drop"
    ):
        read({"messages": [USER, ANSWER], "image": broken_picture()}, index=2)


def test_picture_that_datasets_cannot_decode_names_the_row(tmp_path):
    tiny_picture(1).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"not a picture")
    table = datasets.Dataset.from_dict(
        {"messages": [[USER, ANSWER]] * 2, "image": [str(tmp_path / f"{i}.png") for i in (0, 1)]}
    ).cast_column("image", datasets.Image())
    rows = RowDataset(table, needs_completion=True, is_text=False)
    assert rows[0].images
    with pytest.raises(ValueError, match=r"^row 1: its picture cannot be read"):
        rows[1]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"messages": [USER]}, {}, "an assistant's answer is expected .* got none; add it, or set"),
        ({"prompt": [USER]}, {}, "an assistant's answer is expected"),
        (
            {"text": "?", "label": 1},
            {},
            r"`messages`, or `prompt` and `completion`, are expected, got \['label', 'text'\]",
        ),
        (
            {"prompt": [USER, ANSWER]},
            {"needs_completion": False},
            "a prompt must end before the assistant's turn, got an answer as its last message; ",
        ),
        ("What?", {}, "a row must be a dict of columns, got str; pass a datasets.Dataset or a"),
        ({"messages": []}, {}, r"a conversation must be a list of messages, got \[\]"),
        ({"messages": ["Hi"]}, {}, "a message must have a role and a content, got 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, {}, "a message must have a role and a content"),
        ({"messages": [{"role": "user"}]}, {}, "the content of a message must be text or a list"),
        (
            {"prompt": "What?", "completion": [ANSWER]},
            {},
            "prompt is plain text, so completion must be too, got list",
        ),
        (
            {"prompt": [USER], "completion": [ANSWER, USER]},
            {},
            r"a completion must end with an assistant's message, got \['assistant', 'user'\]; put",
        ),
        (
            {"prompt": [USER], "completion": [{"role": "assistant", "content": [IMAGE]}]},
            {},
            "an answer must be text, got",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
            {},
            "a part of a message must be text, or the place of a picture or a video, got {'ty",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}, TEXT]}, ANSWER]},
            {},
            "the prompt has 1 video parts but the row has 0 videos; make them equal",
        ),
        (
            {"messages": [USER, ANSWER], "image": tiny_picture(1), "images": [tiny_picture(2)]},
            {},
            "pictures must be in one column, got image and images; drop one of them",
        ),
        (
            {"messages": [USER, ANSWER], "image": 1},
            {},
            "image must be a picture: a PIL image, a path, .* got int; convert the column",
        ),
        (
            {"messages": [{"role": "user", "content": [IMAGE, TEXT]}, ANSWER]},
            {},
            "the prompt has 1 image parts but the row has 0 pictures; make them equal",
        ),
        (
            {"messages": [{"role": "system", "content": "?"}, ANSWER], "image": tiny_picture(1)},
            {},
            "pictures need a user turn to belong to; add one",
        ),
        (
            {"messages": [USER, ANSWER], "images": [tiny_picture(1)]},
            {"is_text": True},
            "a text-only student takes no pictures, got 1; drop the picture column or choose",
        ),
    ],
)
def test_row_that_cannot_be_used_is_named(columns, options, message):
    with pytest.raises(ValueError, match=f"^row 3: {message}"):
        read(columns, index=3, **options)


def test_dataset_without_length_or_rows_is_refused():
    with pytest.raises(ValueError, match=r"a map-style dataset .* got generator; load it without"):
        RowDataset((row for row in [{}]), needs_completion=True, is_text=True)
    with pytest.raises(ValueError, match="at least one row is expected, got none"):
        RowDataset([], needs_completion=True, is_text=True)
    stream = datasets.Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="got IterableDataset; load it without streaming"):
        RowDataset(stream, needs_completion=True, is_text=True)


def test_columns_that_were_named_win_over_messages(tmp_path):
    other = [{"role": "user", "content": "Other?"}, {"role": "assistant", "content": "No."}]
    row = {"question": "What?", "answer": "That.", "messages": other}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    named = {"prompt_column": "question", "completion_column": "answer", "system_prompt": "Short."}
    rows = load_rows(DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), **named), "train")
    parsed = RowDataset(rows, needs_completion=True, is_text=True)[0]
    assert [message["content"] for message in parsed.prompt] == ["Short.", "What?"]
    assert parsed.completion == "That."
