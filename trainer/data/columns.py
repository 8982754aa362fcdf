"""Columns of a dataset: those that are used, those that are refused, and other projects' shapes as
messages, or prompt and completion.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

from gold_trainer.data.features import undecoded
from gold_trainer.data.json_text import parsed_json
from gold_trainer.data.messages import is_system, parsed_messages, refuse_spoilt
from gold_trainer.data.row_errors import ColumnsError, shown
from gold_trainer.data.samples import are_samples
from gold_trainer.nearest import did_you_mean

MEDIA = ("image", "images"), ("video", "videos")  # columns of one and of several
TEACHER_VIEW = ("teacher_images", "teacher_messages")  # what the teacher sees in their place
TEACHER_ID = "teacher_id"  # which of teacher_models the row learns from
BESIDE_ALL = (*MEDIA[0], *MEDIA[1], "tools", "chat_template_kwargs", *TEACHER_VIEW, TEACHER_ID)
# The column that tells how a row holds its conversation -> the columns that go with it.
SHAPES: dict[str, tuple[str, ...]] = {
    "messages": (),
    "prompt": ("completion",),
    "conversations": ("system",),  # sharegpt
    "texts": (),  # The Cauldron and FineVision
    "instruction": ("input", "output", "system", "history"),  # alpaca
}
SHAPE_COLUMNS = tuple(dict.fromkeys(c for shape in SHAPES.items() for c in (shape[0], *shape[1])))
KNOWN = (*BESIDE_ALL, *SHAPE_COLUMNS)


def refuse_unused_columns(names: Iterable[str]) -> None:
    """ValueError for columns that nobody reads: what they hold would be lost without a word."""
    unused = sorted(printable(name) for name in names if name not in KNOWN)
    if unused:
        raise ValueError(
            f"RowDataset: columns must be among {', '.join(KNOWN)}, got {', '.join(unused)}, which "
            f"nothing uses; rename them, or set dataset_ignore_columns={unused}."
        )


def has_shape(columns: Any) -> bool:
    """False where the row's own error says more than one about its columns."""
    return isinstance(columns, Mapping) and any(columns.get(name) is not None for name in SHAPES)


def names_of(rows: Any) -> list[str]:
    """Columns that hold something, as far as they are known without reading files."""
    if isinstance(rows, datasets.Dataset):
        if rows.format["type"] == "custom" or are_samples(rows.column_names):
            return []  # other columns are made of them
        return [name for name in rows.format["columns"] if name in KNOWN or _is_held(rows, name)]
    if not isinstance(rows, list | tuple):
        return []  # row 0 shows them
    names: dict[str, None] = {}
    for row in rows:
        if isinstance(row, Mapping):
            names.update((name, None) for name, value in row.items() if holds(value))
    return list(names)


def _is_held(rows: datasets.Dataset, name: str) -> bool:
    """Whether a row holds something there: mostly the first one."""
    column = rows.data.column(name)
    if column.null_count == len(column):  # told without reading rows, of which there may be many
        return False
    values = undecoded(rows).select_columns(name)
    return any(holds(row[name]) for row in values)


def as_conversation(columns: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The row's columns with messages, or prompt and completion; ValueError for any column that is
    neither part of that nor goes with it.
    """
    given = [name for name in SHAPES if columns.get(name) is not None]
    shape = next((name for name in given if holds(columns[name])), given[0] if given else None)
    if shape is None:
        raise ValueError(
            f"row {index}: `messages`, or `prompt` and `completion`, are expected, got "
            f"{sorted(map(printable, columns))}; rename the columns, or on the command line name "
            "them in prompt_column and completion_column."
        )
    used = (shape, *SHAPES[shape], *BESIDE_ALL)
    unused = sorted(printable(k) for k, v in columns.items() if k not in used and holds(v))
    if unused:
        kind = ValueError if set(unused) <= set(KNOWN) else ColumnsError
        raise kind(
            f"row {index}: columns must go with {shape!r}, got {', '.join(unused)}, which nothing "
            f"uses beside it; rename them, or set dataset_ignore_columns={unused}."
        )
    row = {name: columns[name] for name in BESIDE_ALL if columns.get(name) is not None}
    if shape == "conversations":
        refuse_spoilt(columns[shape], index)
        messages = _listed(parsed_messages(columns[shape]), shape, index)
        return row | {"messages": _with_system(messages, _system(columns, index), index)}
    if shape == "texts":
        return row | {"messages": columns[shape]}
    if shape == "instruction":
        return row | _from_alpaca(columns, index)
    return row | {name: columns.get(name) for name in (shape, *SHAPES[shape])}


def read_teacher_id(columns: Mapping[str, Any], index: int, known: Sequence[str]) -> str | None:
    """known: ids of teacher_models, none where the run has one teacher."""
    value = columns.get(TEACHER_ID)
    if isinstance(value, float) and value.is_integer():  # as pandas has them beside a gap
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not known:
        if value is None:
            return None
        raise ValueError(
            f"row {index}: teacher_id must stand in a run with teacher_models, got "
            f"{shown(value)}; set teacher_models, or dataset_ignore_columns=['{TEACHER_ID}']."
        )
    if value not in known:
        remedy = did_you_mean(str(value), known) or "; mend the row, or add its teacher."
        raise ValueError(
            f"row {index}: teacher_id must be one of teacher_models, {', '.join(known)}, got "
            f"{shown(value)}{remedy}"
        )
    return str(value)


def printable(name: Any) -> str:
    """A name that any terminal shows."""
    return str(name).encode("ascii", "backslashreplace").decode()


def holds(value: Any) -> bool:
    return not is_gap(value) and not (isinstance(value, str | list | tuple | dict) and not value)


def is_gap(value: Any) -> bool:
    """None, and what pandas has where a cell is empty: NaN, NA and NaT."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


def _from_alpaca(columns: Mapping[str, Any], index: int) -> dict[str, Any]:
    prompt = _system(columns, index)
    for turns in _listed(parsed_json(columns.get("history") or None), "history", index):
        if not isinstance(turns, list | tuple) or len(turns) != 2:
            raise ValueError(
                f"row {index}: history must be a list of [question, answer], got {shown(turns)}; "
                "mend the column."
            )
        roles = zip(("user", "assistant"), turns, strict=True)
        prompt += [{"role": role, "content": text} for role, text in roles]
    texts = [_text(columns, name, index) for name in ("instruction", "input")]
    prompt.append({"role": "user", "content": "\n".join(text for text in texts if text)})
    output = columns.get("output")
    if output is not None:
        prompt.append({"role": "assistant", "content": _text(columns, "output", index)})
    return {"messages": prompt}


def _system(columns: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    text = _text(columns, "system", index)
    return [{"role": "system", "content": text}] if text else []


def _with_system(messages: list[Any], system: list[Any], index: int) -> list[Any]:
    """A conversation that brings what the column says has it once."""
    if not system or not messages or not is_system(messages[0]):
        return system + messages
    first = parsed_json(messages[0])
    own = first.get("content") if first.get("value") is None else first["value"]
    if own != system[0]["content"]:
        raise ValueError(
            f"row {index}: a row must have one system message, got others in `system` and in "
            "`conversations`; keep one of them."
        )
    return messages


def _text(columns: Mapping[str, Any], name: str, index: int) -> str:
    value = columns.get(name)
    if not isinstance(value, str | None):
        raise ValueError(
            f"row {index}: {name} must be text, got {type(value).__name__}; rename the column, or "
            "write it as text."
        )
    return value or ""


def _listed(value: Any, name: str, index: int) -> list[Any]:
    if not isinstance(value, list | tuple | None):
        raise ValueError(
            f"row {index}: {name} must be a list, got {type(value).__name__}; mend the column."
        )
    return list(value or ())
