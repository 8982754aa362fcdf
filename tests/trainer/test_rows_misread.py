"""Rows that would be read as something else than their authors mean: refused, or read as meant."""

import datasets
import pytest

from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from support.chat_templates import templated, text_template_names
from support.tiny_models import tiny_picture

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(columns, *, is_text=True, **options):
    rows = RowDataset([columns], needs_completion=True, is_text=is_text, **options)
    return [rows[i] for i in range(len(rows))] if options else rows[0]


@pytest.mark.parametrize(
    "placeholder",
    [
        *(
            "<image_1>",
            "<image1>",
            "<image 1>",
            "<image:0>",
            "<image-2>",
            "<|image|>",
            "<|image_1|>",
        ),
        *("<img>", "<IMG>", "<Image>", "<image_placeholder>", "<|image_pad|>", "<ImageHere>"),
        *("<start_of_image>", "[IMG]", "<image_token>"),
        *("[image]", "{image}", "{{ image_1 }}", "<picture>", "[Picture]"),
    ],
)
def test_other_placeholders_beside_a_picture_without_a_place_are_refused(placeholder):
    user = {"role": "user", "content": f"What is in {placeholder}?"}
    picture = tiny_picture(0)
    with pytest.raises(ValueError) as caught:
        read({"messages": [user, ANSWER], "image": picture}, is_text=False)
    start = f"row 0: a picture's place in a user's text must be <image>, got {placeholder!r}; write"
    assert str(caught.value).startswith(start)
    read({"messages": [user, ANSWER]}, is_text=False)  # without pictures it is text
    read({"messages": [USER, {**ANSWER, "content": placeholder}], "image": picture}, is_text=False)
    content = [{"type": "image"}, {"type": "text", "text": user["content"]}]
    row = read(
        {"messages": [{**user, "content": content}, ANSWER], "image": picture}, is_text=False
    )
    assert row.prompt[0]["content"] == content


def test_other_placeholders_beside_placeholders_and_in_other_turns_are_refused():
    columns = {"image": tiny_picture(0)}
    user = {"role": "user", "content": "<image> or <image_2>?"}
    with pytest.raises(ValueError, match=r"row 0: .* in a user's text must be <image>, got '<im"):
        read({"messages": [user, ANSWER], **columns}, is_text=False)
    system = {"role": "system", "content": "See <image_1>."}
    told = "in the system's text must be <image>, got '<image_1>'; write <image> in a user's turn"
    with pytest.raises(ValueError, match=told):
        read({"messages": [system, USER, ANSWER], **columns}, is_text=False)


@pytest.mark.parametrize(
    "text",
    ['<img src="a.png">', "<images>", "image_1", "<imagine>", "x<3", "[Image 1]", "<audio>", "{x}"],
)
def test_text_that_is_no_placeholder_stays_text(text):
    user = {"role": "user", "content": text}
    row = read({"messages": [user, ANSWER], "image": tiny_picture(0)}, is_text=False)
    assert row.prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": text}]


def test_other_placeholders_of_a_video_are_refused():
    user = {"role": "user", "content": "What is in <video_1>?"}
    columns = {"messages": [user, ANSWER], "video": [tiny_picture(0), tiny_picture(1)]}
    with pytest.raises(ValueError, match="a video's place in a user's text must be <video>, got"):
        read(columns, is_text=False, takes_videos=True)


@pytest.mark.parametrize(
    ("key", "is_learnt", "is_not"),
    [
        ("loss", True, False),
        ("loss", 1, 0),
        ("train", True, False),
        ("training", 1.0, 0.0),
        ("masked", False, True),
    ],
)
def test_a_flag_that_a_turn_is_not_learnt_is_its_weight(key, is_learnt, is_not):
    turns = [USER, ANSWER | {key: is_not}, USER, {**ANSWER, "content": "Hot.", key: is_learnt}]
    (row,) = read({"messages": turns}, train_on="all")
    assert row.completion == "Hot." and key not in row.answer
    assert row.prompt == [USER, ANSWER | {"weight": 0}, USER]
    with pytest.raises(ValueError, match="row 0: an answer must have a weight of 1, got 0 for all"):
        read({"messages": [USER, ANSWER | {key: is_not}]})


def test_flags_of_sharegpt_and_of_tables_are_read():
    turns = [
        {"from": "human", "value": "a", "loss": False},
        {"from": "gpt", "value": "b", "loss": False},
        {"from": "human", "value": "c", "loss": None},
        {"from": "gpt", "value": "d", "loss": None},
    ]
    rows = RowDataset(
        datasets.Dataset.from_list([{"conversations": turns}]),
        needs_completion=True,
        is_text=True,
        train_on="all",
    )
    assert [row.completion for row in rows] == ["d"]
    assert "loss" not in rows[0].prompt[0]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (ANSWER | {"loss": "false"}, "loss of a message must be true or false, got 'false'"),
        (ANSWER | {"train": 0.5}, "train of a message must be true or false, got 0.5"),
        (ANSWER | {"loss": False, "weight": 1}, "must say once .* got weight=1 and loss=False"),
        (ANSWER | {"train": True, "masked": True}, "must say once whether it is learnt, got"),
        (
            ANSWER | {"loss_mask": 0},
            "by weight .* whether it is learnt, got loss_mask=0, which not",
        ),
        (ANSWER | {"is_masked": True}, "whether it is learnt, got is_masked=True"),
        (ANSWER | {"train_on_turn": False}, "whether it is learnt, got train_on_turn=False"),
        (USER | {"loss": True}, "loss of a message must be false beside the role 'user', got true"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(message, told):
    turns = [message, ANSWER] if message["role"] == "user" else [USER, message]
    with pytest.raises(ValueError, match=f"^row 0: .*{told}"):
        read({"messages": turns})


@pytest.mark.parametrize(
    ("turns", "remedy"),
    [
        (
            [USER, ANSWER, ANSWER, USER],
            "merge the messages 1 and 2, both of the assistant, into one",
        ),
        ([USER, USER], "merge the messages 0 and 1, both of the user, into one"),
        ([ANSWER, USER], "begin with a user's turn, or leave out message 0, of the assistant"),
        ([SYSTEM, USER], "write what the system's message says into the first user's turn"),
        ([USER, ANSWER, SYSTEM, USER], "put what message 2, of the system, says in front"),
        ([USER, {**USER, "role": "critic"}], "give message 1, of the role 'critic', another role"),
    ],
)
def test_turns_that_a_template_refuses_have_the_remedy_of_their_kind(turns, remedy):
    tokenizer = templated(text_template_names()[0], "qwen")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError) as caught:
        GOLDCollator(tokenizer, [tokenizer.eos_token_id], 512).example(
            read({"messages": [*turns, ANSWER]})
        )
    assert str(caught.value).startswith("row 0: the chat template must take the conversation, got")
    assert f"(roles must alternate); {remedy}" in str(caught.value)
