"""Rows in the words of other APIs: read as their authors mean them, or refused by name."""

import base64

import pytest
from transformers.utils import logging

from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from support.chat_templates import templated, text_template_names
from support.picture_files import file_of
from support.tiny_models import tiny_picture, tiny_processor

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}


def read(columns, *, is_text=True, **options):
    rows = RowDataset([columns], needs_completion=True, is_text=is_text, **options)
    return [rows[i] for i in range(len(rows))] if options else rows[0]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    for module in ("data.messages", "rendering.lost_parts"):
        logger = logging.get_logger(f"gold_trainer.{module}")
        monkeypatch.setattr(logger, "warning_once", said.append, raising=False)
    return said


def collator(name):
    if name not in text_template_names():
        pytest.skip("chat templates of trl")
    tokenizer = templated(name, "qwen")
    return GOLDCollator(tokenizer, [tokenizer.eos_token_id], 512)


@pytest.mark.parametrize(
    ("asks", "says"), [("human", "gpt"), ("User", "Assistant"), ("USER", "model"), ("user ", "bot")]
)
def test_roles_by_other_names_are_those_that_templates_know(asks, says):
    turns = [{"role": asks, "content": "Weather in Ulm?"}, {"role": says, "content": "Rain."}]
    row = read({"messages": [{"role": "System", "content": "Be brief."}, *turns]})
    assert row.prompt == [{"role": "system", "content": "Be brief."}, USER]
    assert row.answer == ANSWER


def test_speakers_of_sharegpt_are_read_in_any_case():
    turns = [{"from": "Human", "value": "Weather in Ulm?"}, {"from": "GPT", "value": "Rain."}]
    assert read({"conversations": turns}).prompt == [USER]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "reasoning", "text": "hm"},
    ],
)
def test_thoughts_in_parts_are_thoughts(part):
    text = {"type": "text", "text": "Rain."}
    row = read({"messages": [USER, {"role": "assistant", "content": [part, text]}]})
    assert row.answer == {"role": "assistant", "content": [text], "reasoning_content": "hm"}
    assert row.completion == "Rain."


@pytest.mark.parametrize("key", ["thinking", "reasoning"])
def test_thoughts_in_two_places_that_differ_are_refused(key):
    answer = ANSWER | {"reasoning_content": "hm", key: "ho"}
    with pytest.raises(ValueError, match=f"row 0: .* got reasoning_content and {key}, which diff"):
        read({"messages": [USER, answer]})
    assert read({"messages": [USER, answer | {key: "hm"}]}).completion == "Rain."
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Rain."}]
    with pytest.raises(ValueError, match=f"row 0: .* got parts of its content and {key}; keep one"):
        read({"messages": [USER, {"role": "assistant", "content": parts, key: "ho"}]})


def test_an_answer_of_weight_0_is_not_learnt():
    first, last = ANSWER | {"weight": 0}, {"role": "assistant", "content": "Hot.", "weight": 1}
    (row,) = read({"messages": [USER, first, USER, last]}, train_on="all")
    assert (row.prompt, row.completion) == ([USER, first, USER], "Hot.")
    row = read({"messages": [USER, last, USER, first]})
    assert (row.prompt, row.completion) == ([USER], "Hot.")
    with pytest.raises(ValueError, match="row 0: an answer must have a weight of 1, got 0 for all"):
        read({"messages": [USER, first]})


def test_a_picture_may_stand_in_a_source_as_anthropic_has_it():
    data = base64.b64encode(file_of(tiny_picture(0))).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    user = {"role": "user", "content": [{"type": "image", "source": source}]}
    row = read({"messages": [user, ANSWER]}, is_text=False)
    assert row.images[0].tobytes() == tiny_picture(0).tobytes()
    source = {"type": "url", "url": "https://example.com/a.png"}
    user = {"role": "user", "content": [{"type": "image", "source": source}]}
    with pytest.raises(ValueError, match=r"row 0: .*, source must be a file, got the address"):
        read({"messages": [user, ANSWER]}, is_text=False)


def test_an_address_of_a_file_says_to_write_the_path():
    with pytest.raises(
        ValueError, match="download the files first, and leave file:// out of a path"
    ):
        read({"messages": [USER, ANSWER], "image": "file:///a.png"}, is_text=False)


@pytest.mark.parametrize("weight", [0.5, "0", 2, [0]])
def test_a_weight_of_an_answer_that_is_neither_0_nor_1_is_refused(weight):
    """It was learnt as if it had none."""
    with pytest.raises(
        ValueError, match=r"row 0: the weight of an answer must be 0 or 1, got .*; wr"
    ):
        read({"messages": [USER, ANSWER | {"weight": weight}]})
    read({"messages": [USER | {"weight": weight}, ANSWER | {"weight": 1.0}]})


def test_keys_of_parts_that_nothing_reads_are_told(warnings):
    part = {"type": "image", "image": tiny_picture(0), "min_pixels": 9, "detail": None}
    user = {"role": "user", "content": [part]}
    read({"messages": [user, ANSWER]}, is_text=False)
    assert warnings == [
        "nothing reads min_pixels, keys of parts of messages: what they hold is left out"
    ]


def test_a_key_that_only_begins_like_one_of_the_template_is_told(warnings):
    qwen = collator("qwen3")
    for key in ("enable_thinkin", "enable_thinking"):
        qwen.example(read({"messages": [USER, ANSWER], "chat_template_kwargs": {key: False}}))
    (warning,) = warnings
    assert "reads nothing of enable_thinkin, keys" in warning


@pytest.mark.parametrize("text", ["a", "Weather"])
def test_a_turn_that_is_left_out_is_refused_although_its_text_stands_elsewhere(text):
    row = read({"messages": [{"role": "developer", "content": text}, USER, ANSWER]})
    with pytest.raises(ValueError, match="leaves out message 0, of the role 'developer'"):
        collator("qwen3").example(row)
    collator("gptoss").example(row)  # it knows the role


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_placeholder_in_another_turn_than_a_users_is_refused(role):
    processor = tiny_processor("qwen3_vl")
    qwen = GOLDCollator(processor, [processor.tokenizer.eos_token_id], 512)
    picture = {"image": tiny_picture(0)}
    turns = [{"role": role, "content": "An <image> is"}, USER, ANSWER]
    row = read({"messages": turns, **picture}, is_text=False)
    with pytest.raises(ValueError, match=f"row 0: <image> must stand in a .* in the {role}'s; wr"):
        qwen.example(row)
    qwen.example(read({"messages": turns}, is_text=False))  # without pictures it is text
    said = {"role": "assistant", "content": "<image> is a tag."}
    qwen.example(read({"messages": [USER, said, USER, ANSWER], **picture}, is_text=False))


def test_pictures_under_a_key_of_their_message_are_at_the_places_that_it_has_for_them():
    text, place = {"type": "text", "text": "Which?"}, {"type": "image", "image": None}
    pictures = [tiny_picture(0), tiny_picture(1)]
    turn = {**USER, "content": [text, place, text, {"type": "image"}], "images": pictures}
    row = read({"messages": [turn, ANSWER]}, is_text=False)
    assert row.images == pictures
    assert [part["type"] for part in row.prompt[0]["content"]] == ["text", "image"] * 2
    with pytest.raises(ValueError, match="image parts must all hold their picture or none"):
        read({"messages": [{**turn, "images": pictures[:1]}, ANSWER]}, is_text=False)


@pytest.mark.parametrize("role", ["user", "Human"])
def test_pictures_under_a_key_of_their_message_are_at_its_placeholders(role):
    """They were refused: one place as a part, one as a placeholder."""
    pictures = [tiny_picture(0), tiny_picture(1)]
    turn = {"role": role, "content": "<image>\nOr <image>?", "images": pictures}
    row = read({"messages": [turn, ANSWER]}, is_text=False)
    as_column = {"role": role, "content": turn["content"]}
    other = read({"messages": [as_column, ANSWER], "images": pictures}, is_text=False)
    assert (row.prompt, row.images) == (other.prompt, other.images)
    with pytest.raises(ValueError, match=r"^row 0: a picture's place must be an image part or"):
        read({"messages": [{**turn, "images": pictures[:1]}, ANSWER]}, is_text=False)


@pytest.mark.parametrize(
    ("held", "number"),
    [
        ({"images": [tiny_picture(0), tiny_picture(1)]}, 2),
        ({"image": tiny_picture(0)}, 1),
        ({"images": tiny_picture(0), "videos": [], "video": None}, 1),
        ({"images": []}, 0),
    ],
)
@pytest.mark.parametrize("content", ["What?", [{"type": "text", "text": "What?"}]])
def test_pictures_under_a_key_of_their_message_are_its_parts(content, held, number):
    """They were left out: Qwen's template has the word image in it, so that no warning came."""
    row = read(
        {"messages": [USER, ANSWER, {**USER, "content": content, **held}, ANSWER]}, is_text=False
    )
    assert row.images == [tiny_picture(i) for i in range(number)]
    text = [{"type": "text", "text": "What?"}]
    expected = [{"type": "image"}] * number + text if number else content
    assert row.prompt[2] == {**USER, "content": expected}
    if number:
        with pytest.raises(ValueError, match=rf"text-only student takes no pictures, got {number}"):
            read({"messages": [{**USER, **held}, ANSWER]})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "text", "text": "q", "image": "a.png"}, "one thing, got text and image in a"),
        (
            {"type": "image", "image": "a.png", "text": "a cat"},
            "one thing, got text and image in a",
        ),
        ({"type": "image", "image": "a.png", "url": "b.png"}, "one thing, got image and url in a"),
        ({"type": "image", "text": "a cat"}, "of the type 'image' must hold that, got text"),
    ],
)
def test_a_part_that_holds_two_things_is_refused(part, message):
    with pytest.raises(
        ValueError, match=f"row 0: a part .* must hold {message.split('hold ')[-1]}"
    ):
        read({"messages": [{"role": "user", "content": [part]}, ANSWER]}, is_text=False)
    filled = {key: value for key, value in part.items() if key in ("type", part["type"])}
    if len(filled) == 2 and part["type"] == "text":  # None and empty text hold nothing
        filled |= {"image": None, "url": ""}
        row = read({"messages": [{"role": "user", "content": [filled]}, ANSWER]}, is_text=False)
        assert row.images == []


def test_what_is_said_under_two_keys_is_refused():
    turns = [
        {"from": "human", "value": "Rain?", "content": "Snow?"},
        {"from": "gpt", "value": "A."},
    ]
    with pytest.raises(ValueError, match="row 0: a message must say once what is said, got value"):
        read({"conversations": turns})
    turns[0]["content"] = "Rain?"
    assert read({"conversations": turns}).prompt[0]["content"] == "Rain?"
