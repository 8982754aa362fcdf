"""The columns `teacher_images` and `teacher_messages` of a row -> what the teacher sees of it.

The completion is the row's own on both sides.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from gold_trainer.data.columns import TEACHER_VIEW, holds
from gold_trainer.data.json_text import parsed_json
from gold_trainer.data.messages import (
    Message,
    Messages,
    check_unicode,
    checked_messages,
    joined_text,
    parsed_messages,
    refuse_spoilt,
)
from gold_trainer.data.placing import PICTURE, VIDEO, num_parts_of, place, take
from gold_trainer.data.row_errors import renamed, shown
from gold_trainer.data.turns import Conversation
from gold_trainer.data.videos import Video, VideoReader

if TYPE_CHECKING:
    from gold_trainer.data.rows import Row, RowReader

IMAGES, MESSAGES = TEACHER_VIEW


class TeacherView(NamedTuple):
    """What the teacher is prompted with in the place of the row's own."""

    prompt: Messages | str
    images: list[Image.Image]
    videos: list[Video]


class Place(NamedTuple):
    """Where in its conversation a row's answer stands."""

    conversation: Conversation | None  # None: plain text
    at: int
    num_videos: int  # of the whole conversation


def read_view(
    columns: Mapping[str, Any], row: "Row", answer: Place, reader: "RowReader"
) -> TeacherView | None:
    """None where both columns hold nothing; ValueError names the row and the column."""
    # JSON text of nothing, as a csv file has it, holds nothing
    given = [name for name in TEACHER_VIEW if holds(parsed_json(columns.get(name)))]
    if not given:
        return None
    key, start = given[-1], f"row {row.index}: "
    try:
        refuse_spoilt(columns.get(MESSAGES), row.index)
        if answer.conversation is None:
            view = _of_text(columns, row, reader)
        elif key == IMAGES:
            view = _with_pictures(columns, row, answer, reader)
        else:
            view = _with_messages(columns, row, answer, reader)
        check_unicode(view.prompt, f"{start}{key}")
    except ValueError as error:
        text = str(error).removeprefix(start)
        if text.startswith(tuple(given)):  # it names its column
            raise
        raise renamed(error, f"{start}{key}: {text}") from error
    return view


def _of_text(columns: Mapping[str, Any], row: "Row", reader: "RowReader") -> TeacherView:
    """The teacher's view of plain text, which has no pictures."""
    values = reader.column(columns, IMAGES, row.index)
    reader.refuse_media(values, [], row.index)
    prompt = parsed_messages(columns.get(MESSAGES))
    if not isinstance(prompt, str):
        raise ValueError(
            f"row {row.index}: {MESSAGES} must be plain text beside a plain prompt, got "
            f"{type(prompt).__name__}; write prompt and completion as messages."
        )
    return TeacherView(prompt, [], [])


def _with_pictures(
    columns: Mapping[str, Any], row: "Row", answer: Place, reader: "RowReader"
) -> TeacherView:
    """The row's own conversation with other pictures."""
    conversation = answer.conversation
    assert conversation is not None, "plain text is read elsewhere"
    messages, _ = take(conversation.messages, row.index, PICTURE)
    values = reader.column(columns, IMAGES, row.index)
    reader.refuse_media(values, [], row.index)
    messages = place(messages, len(values), row.index, PICTURE, True)
    messages, _ = take(messages, row.index, VIDEO)
    messages = place(messages, answer.num_videos, row.index, VIDEO, reader.takes_videos)
    prompt = conversation._replace(messages=messages).prompt(answer.at)
    values = values[: num_parts_of(prompt, PICTURE)]  # later turns bring their own
    images = [reader.pictures.read(value, row.index, key) for value, key in values]
    return TeacherView(prompt, images, row.videos)


def _with_messages(
    columns: Mapping[str, Any], row: "Row", answer: Place, reader: "RowReader"
) -> TeacherView:
    """Another conversation, with pictures of its own or those of the row."""
    index, messages = row.index, parsed_messages(columns[MESSAGES])
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    messages = _prompt_of(checked_messages(messages, index, reader.is_table), row, answer, reader)
    messages, pictures = take(messages, index, PICTURE)
    messages, videos = take(messages, index, VIDEO)
    given = reader.column(columns, IMAGES, index)
    if given and pictures:
        raise ValueError(
            f"row {index}: pictures must be in one place, got {IMAGES} and parts that hold "
            f"theirs; drop {IMAGES}, or leave the parts bare."
        )
    reader.refuse_media(given or pictures, videos, index)
    images, own = row.images, row.videos
    if given or pictures:
        images = [reader.pictures.read(value, index, key) for value, key in given or pictures]
    if videos:
        own = [VideoReader(reader.pictures).read(value, index, key) for value, key in videos]
    messages = place(messages, len(images), index, PICTURE, not reader.is_text)
    messages = place(messages, len(own), index, VIDEO, reader.takes_videos)
    return TeacherView(messages, images, own)


def _prompt_of(messages: Messages, row: "Row", answer: Place, reader: "RowReader") -> Messages:
    """The prompt without the answer, which may stand at the end and is the row's own."""
    conversation = answer.conversation
    assert conversation is not None, "plain text is read elsewhere"
    num_answers = len(conversation.learnt(reader.train_on))
    if num_answers > 1:
        raise ValueError(
            f"row {row.index}: it must be for one answer, got {num_answers}, each an example with "
            "train_on='all'; write a row for each, or set train_on='last'."
        )
    if row.is_prefill:
        raise ValueError(
            f"row {row.index}: it must not stand beside a completion that goes on where the "
            "prompt's last message stops, got one; put the beginning into the completion."
        )
    *prompt, last = messages
    if last["role"] != "assistant":
        return messages
    if not prompt:
        raise ValueError(
            f"row {row.index}: a conversation must have a message before its answer, got the "
            "answer alone; add what it answers."
        )
    given = _told(last)
    own = {} if row.answer is None else _told(row.answer)
    keys = [key for key in ("content", *given, *own) if given.get(key) != own.get(key)]
    if keys:
        has = f"{keys[0]} {shown(own.get(keys[0]))}" if own else "none, which is yet to be written"
        raise ValueError(
            f"row {row.index}: its answer must be the row's own, which both sides are compared on, "
            f"got {keys[0]} {shown(given.get(keys[0]))} where the row has {has}; leave it out."
        )
    return prompt


def _told(answer: Message) -> dict[str, Any]:
    return {**answer, "content": answer["content"] and joined_text(answer["content"])}
