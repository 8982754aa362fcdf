"""One row of a dataset -> Rows: prompt, completion and raw pictures of each example.

Errors name the row, and the turn where each is an example of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from gold_trainer.data.calls import as_tool
from gold_trainer.data.columns import MEDIA, as_conversation, is_gap, read_teacher_id
from gold_trainer.data.data_files import MappedRows
from gold_trainer.data.features import may_be_filled
from gold_trainer.data.file_streams import MappedStream
from gold_trainer.data.json_text import parsed_json
from gold_trainer.data.messages import (
    Message,
    Messages,
    check_unicode,
    drop_none,
    holds_nothing,
    text_of,
)
from gold_trainer.data.pictures import MAX_PIXELS, PictureReader, is_of_numbers
from gold_trainer.data.placing import PICTURE, VIDEO, Medium, num_parts_of, place, take
from gold_trainer.data.row_errors import BadRow, NoAnswerError, renamed, shown
from gold_trainer.data.turns import Conversation, read_conversation
from gold_trainer.data.videos import Video, VideoReader
from gold_trainer.fields.checks import refuse_quoted
from gold_trainer.fields.rows import refuse_reserved
from gold_trainer.privileged.reading import Place, TeacherView, read_view

logger = logging.get_logger(__name__)


def name_of(index: int, turn: int | None) -> str:
    """The row as errors begin."""
    return f"row {index}" if turn is None else f"row {index}, turn {turn}"


@dataclass
class Row:
    """One example; pictures stay as they came until a micro-batch needs them."""

    index: int
    prompt: Messages | str  # a conversation, or plain text
    completion: str | None  # what the assistant says; None where it has to be generated
    images: list[Image.Image]
    answer: Message | None = None  # the whole message that says it; None for text and generation
    tools: list[Any] | None = None  # JSON schemas or functions, for the chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    is_prefill: bool = False  # the completion goes on where the prompt's last message stops
    videos: list[Video] = field(default_factory=list)
    turn: int | None = None  # which of the row's; None where a row is one example
    teacher_id: str | None = None  # where the run has several
    view: TeacherView | None = None  # the teacher's; None: the same as the student's

    @property
    def where(self) -> str:
        return name_of(self.index, self.turn)

    def seen_by_teacher(self) -> "Row":
        return self if self.view is None else replace(self, **self.view._asdict(), view=None)


@dataclass(frozen=True)
class RowReader:
    """Reads what a dataset gives as Rows.

    A column that nothing uses is an error unless it is one of ignore_columns. With train_on="all"
    every assistant's turn of a conversation is a Row, behind the turns before it.
    """

    needs_completion: bool
    is_text: bool  # the student takes no pictures
    pictures: PictureReader
    ignore_columns: frozenset[str]
    is_table: bool  # keys may be filled up with None
    train_on: str  # "last" or "all"
    takes_videos: bool  # the student's processor does
    teacher_ids: tuple[str, ...] = ()  # of several teachers

    @classmethod
    def of(
        cls,
        rows: Any,
        *,
        needs_completion: bool,
        is_text: bool,
        ignore_columns: Sequence[str] | None = None,
        max_pixels: int | None = MAX_PIXELS,
        picture_folder: str | None = None,  # that paths of pictures start from and stay in
        is_table: bool | None = None,  # None: looked up
        train_on: str = "last",
        takes_videos: bool = False,
        teacher_ids: Sequence[str] = (),
    ) -> "RowReader":
        if isinstance(ignore_columns, str):
            raise ValueError(
                "RowDataset: ignore_columns must be a list of names, got the text "
                f"{ignore_columns!r}; write [{ignore_columns!r}]."
            )
        is_mapped = isinstance(rows, MappedRows | MappedStream)
        folder = rows.folder if is_mapped else None
        if picture_folder is not None:
            folder = Path(picture_folder)
        if is_table is None:
            raw = rows.rows if is_mapped else rows
            is_table = may_be_filled(raw)
        return cls(
            needs_completion,
            is_text,
            PictureReader(folder, max_pixels, picture_folder is not None),
            frozenset(ignore_columns or ()),
            is_table,
            train_on,
            takes_videos,
            tuple(teacher_ids),
        )

    def columns(self, columns: Any) -> Any:
        """A row's columns without those to ignore. Lists, of which pandas makes arrays, are lists,
        and its empty cells None.
        """
        if not isinstance(columns, Mapping):
            return columns
        return {
            name: None if is_gap(value) else _as_lists(value)
            for name, value in columns.items()
            if str(name) not in self.ignore_columns
        }

    def rows(
        self, columns: Any, index: int, *, is_tolerant: bool = False
    ) -> Iterator[Row | BadRow]:
        """A Row for every turn that is learnt."""
        columns = self.columns(columns)
        for turn in range(self.num_turns(columns, index)):
            try:
                yield self.row(columns, index, turn)
            except ValueError as error:
                if not is_tolerant:
                    raise
                yield BadRow.of(index, error)

    def num_turns(self, columns: Any, index: int) -> int:
        """How many examples a row is; 1 of a row that cannot be read, which then says why."""
        if self.train_on == "last" or not isinstance(columns, Mapping):
            return 1
        try:
            conversation = self._conversation(as_conversation(columns, index), index)
        except ValueError:
            return 1
        return 1 if conversation is None else len(conversation.learnt(self.train_on))

    def row(self, columns: Any, index: int, turn: int = 0) -> Row:
        """ValueError names the row, and the turn where each is an example."""
        if not isinstance(columns, Mapping):
            raise ValueError(
                f"row {index}: a row must be a dict of columns, got {type(columns).__name__}; pass "
                "a datasets.Dataset or a list of dicts."
            )
        try:
            row = self._parse(as_conversation(columns, index), index, turn)
            if self.needs_completion and row.completion is None:
                raise NoAnswerError(
                    f"row {index}: an assistant's answer is expected as `completion` or as the "
                    "last of `messages`, got none; add it, or set seq_kd=True with lmbda below 1, "
                    "so that the teacher writes it (with lmbda=1.0 rows of training need none, of "
                    "evaluation do)."
                )
            return row
        except ValueError as error:
            own, named = name_of(index, None), name_of(index, turn)
            if self.train_on == "last" or not str(error).startswith(f"{own}:"):
                raise
            raise renamed(error, named + str(error).removeprefix(own)) from error

    def _conversation(self, columns: Mapping[str, Any], index: int) -> Conversation | None:
        return read_conversation(columns, index, self.is_text, self.is_table)

    def _parse(self, columns: Mapping[str, Any], index: int, turn: int) -> Row:
        """Messages, or prompt and completion, with image or images, tools, chat_template_kwargs
        and what the teacher sees.

        For a vision-language student a plain prompt becomes a user's turn, with or without
        pictures: all rows of a dataset are prompted alike.
        """
        pictures, videos = (_values(columns, names, index) for names in MEDIA)
        conversation, at, num_videos = self._conversation(columns, index), 0, 0
        if conversation is None:
            _refuse_beside_text(columns, index)
            self.refuse_media(pictures, videos, index)
            prompt: Messages | str = columns["prompt"]
            completion, answer, is_prefill = columns.get("completion"), None, False
        else:
            self._warn_of_left_out(conversation, index)
            at = conversation.learnt(self.train_on)[turn]
            answer, is_prefill = conversation.answer(at), conversation.goes_on(at)
            completion = None if answer is None else text_of(answer, index)
            messages, pictures = self._placed(conversation.messages, pictures, PICTURE, index)
            messages, videos = self._placed(messages, videos, VIDEO, index)
            self.refuse_media(pictures, videos, index)
            num_videos = len(videos)
            prompt = conversation._replace(messages=messages).prompt(at)
            # later turns bring their own
            pictures = pictures[: num_parts_of(prompt, PICTURE)]
            videos = videos[: num_parts_of(prompt, VIDEO)]
        video_reader = VideoReader(self.pictures)
        row = Row(
            index,
            prompt,
            completion,
            [self.pictures.read(value, index, key) for value, key in pictures],
            answer,
            _tools(columns, index, self.is_table),
            _template_kwargs(columns, index, self.is_table),
            is_prefill,
            [video_reader.read(value, index, key) for value, key in videos],
            turn if self.train_on == "all" and conversation is not None else None,
        )
        for name in ("prompt", "completion", "answer", "tools", "chat_template_kwargs"):
            check_unicode(getattr(row, name), f"row {index}: {name}")
        place_of_answer = Place(conversation, at, num_videos)
        teacher_id = read_teacher_id(columns, index, self.teacher_ids)
        view = read_view(columns, row, place_of_answer, self)
        return replace(row, view=view, teacher_id=teacher_id)

    def column(self, columns: Mapping[str, Any], name: str, index: int) -> list[tuple[Any, str]]:
        """What a column of several pictures holds, with the keys it stands under."""
        return _values(columns, ("", name), index)

    def _warn_of_left_out(self, conversation: Conversation, index: int) -> None:
        """Whoever knows TRL expects all of a completion to be learnt."""
        num_answers = len(conversation.learnt("all"))
        if self.train_on == "last" and conversation.num_given and num_answers > 1:
            logger.warning_once(
                f"row {index}: of the {num_answers} answers in its completion the last is learnt, "
                "the others belong to the prompt, in this row and in others like it; set "
                "train_on='all' to learn each."
            )

    def _placed(
        self, messages: Messages, values: list[tuple[Any, str]], medium: Medium, index: int
    ) -> tuple[Messages, list[tuple[Any, str]]]:
        """The messages with a place for each of the row's pictures or videos, and those."""
        if not values:
            messages, values = take(messages, index, medium)
        has_placeholders = not self.is_text if medium is PICTURE else self.takes_videos
        if values and not has_placeholders:
            return messages, values  # refused below
        return place(messages, len(values), index, medium, has_placeholders), values

    def refuse_media(self, pictures: Sequence[Any], videos: Sequence[Any], index: int) -> None:
        if self.is_text and pictures:
            raise ValueError(
                f"row {index}: a text-only student takes no pictures, got {len(pictures)}; drop "
                "the picture column or choose a vision-language student."
            )
        if videos and not self.takes_videos:
            raise ValueError(
                f"row {index}: this student takes no videos, got {len(videos)}; drop them, give "
                "some frames as images, or choose a student whose processor takes videos."
            )


def _as_lists(value: Any) -> Any:
    """Arrays of objects as lists, at any depth; an array of numbers is a picture."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_as_lists(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _as_lists(part) for key, part in value.items()}
    return value


def _refuse_beside_text(columns: Mapping[str, Any], index: int) -> None:
    for name in ("tools", "chat_template_kwargs"):
        if columns.get(name):
            raise ValueError(
                f"row {index}: {name} must stand beside a conversation, got plain text, which has "
                "no chat template; write prompt and completion as messages."
            )


def _tools(columns: Mapping[str, Any], index: int, is_table: bool) -> list[Any] | None:
    tools = parsed_json(columns.get("tools") or None)
    if isinstance(tools, list | tuple):  # a list of JSON texts: each tool has a shape of its own
        tools = [as_tool(parsed_json(tool)) for tool in tools]
    if not isinstance(tools, list | tuple | None) or not all(
        isinstance(tool, Mapping) or callable(tool) for tool in tools or ()
    ):
        raise ValueError(
            f"row {index}: tools must be a list of JSON schemas or functions, got {shown(tools)}; "
            "write "
            '[{"type": "function", "function": {"name": ..., "parameters": ...}}].'
        )
    if not tools:
        return None
    # JSON text holds a null only where its author wrote one
    is_json = isinstance(columns["tools"], str) or isinstance(columns["tools"][0], str)
    is_filled = is_table and not is_json
    return drop_none(tools) if is_filled else list(tools)


def _template_kwargs(columns: Mapping[str, Any], index: int, is_table: bool) -> dict[str, Any]:
    kwargs = parsed_json(columns.get("chat_template_kwargs") or None)
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(
            f"row {index}: chat_template_kwargs must be a dict of arguments of the chat template, "
            f'got {shown(kwargs)}; write {{"enable_thinking": false}}.'
        )
    refuse_reserved(kwargs or {}, f"row {index}")
    refuse_quoted(kwargs, f"row {index}: chat_template_kwargs")
    is_filled = is_table and not isinstance(columns.get("chat_template_kwargs"), str)
    return drop_none(kwargs or {}) if is_filled else dict(kwargs or {})


def _values(
    columns: Mapping[str, Any], names: tuple[str, str], index: int
) -> list[tuple[Any, str]]:
    """What the columns of pictures or videos hold, with the keys it stands under."""
    one, several = (_held(columns.get(name), name) for name in names)
    if one and several:
        kind = "pictures" if names == MEDIA[0] else "videos"
        raise ValueError(
            f"row {index}: {kind} must be in one column, got {names[0]} and {names[1]}; drop one "
            "of them."
        )
    if one and names == MEDIA[1]:
        return [(_listed(columns[names[0]]), names[0])]  # a list is of its frames
    return one or several


def _held(value: Any, name: str) -> list[tuple[Any, str]]:
    """A row without a picture holds None, or an empty path, or what a table makes of them. In a
    list of pictures each has to be one.
    """
    value = _listed(value)
    if isinstance(value, list | tuple) and not (name == "image" and is_of_numbers(value)):
        return [(part, f"{name}[{i}]") for i, part in enumerate(value)]
    return [] if holds_nothing(value) else [(value, name)]


def _listed(value: Any) -> Any:
    """The list that JSON text is, as a csv file has paths; anything else as it is."""
    parsed = parsed_json(value) if isinstance(value, str) and value.startswith("[") else value
    return parsed if isinstance(parsed, list) else value
