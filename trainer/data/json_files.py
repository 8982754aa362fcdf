"""Rows of json and jsonl files: as they are written, contents of mixed shape too."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON_SUFFIXES = (".json", ".jsonl")


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .json file, which is one list or has a row a line, or of a .jsonl file, line by
    line; pictures by path.
    """
    rows = _in_list(path) if path.suffix == ".json" else _in_lines(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"dataset {path}, {where}: an object is expected, got {type(row).__name__}; write "
                'the row as {"messages": [...]}'
            )
        yield row


def _in_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows and the place of each, as errors say it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise no_utf8(path, error) from error
    except (ValueError, RecursionError) as error:
        is_json = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if is_json and text.lstrip().startswith("{"):
            yield from _in_lines(path)  # as many projects write it
            return
        raise ValueError(f"dataset {path}: not valid JSON: {error}; mend it there") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"dataset {path}: a list of objects is expected, one for each row, got "
            f"{type(rows).__name__}; write a list, or one row a line in a .jsonl file"
        )
    yield from ((f"row {index}", row) for index, row in enumerate(rows))


def _in_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:  # which end at line feeds only: strings may hold U+2028
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
            except UnicodeDecodeError as error:
                raise no_utf8(path, error) from error
            except json.JSONDecodeError as error:  # it counts lines within this one
                raise ValueError(
                    f"dataset {path}, {where}: not valid JSON: {error.msg} at character "
                    f"{error.pos}; write one row a line"
                ) from error
            except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
                raise ValueError(
                    f"dataset {path}, {where}: JSON that Python reads is expected: {error}; mend "
                    "the row"
                ) from error
            yield where, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, no key of which takes the place of another."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!a} stands twice in one object")
    return made


def no_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"dataset {path}: text in UTF-8 is expected, got byte {byte:#04x}; convert it"
    )
