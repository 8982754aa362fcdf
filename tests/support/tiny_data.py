"""Rows of pictures and sentences for the tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SHAPES = ("square", "circle", "bar", "cross")
COLOURS = ("red", "green", "blue", "yellow", "white")
PICTURE_SIZES = (
    (40, 40),
    (64, 32),
    (36, 60),
    (96, 48),
    (20, 80),
)  # width, height; each family resizes its own way


def tiny_rows(count: int, images: int | str = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a question and an answer of mixed lengths, with 0, 1, 2 or "mixed" pictures.

    The column "images" is a list of PIL pictures of mixed sizes (mixed: 1, 2, 0, 1, ... of them);
    images=0 has no such column.
    """
    return [
        _row(index, (1, 2, 0)[index % 3] if images == "mixed" else images, images, seed)
        for index in range(count)
    ]


def with_lengths(rows: list[dict[str, Any]], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Those rows, changed in place: answers of 2 * length words."""
    for row, length in zip(rows, lengths, strict=True):
        row["messages"][-1]["content"] = "a b " * length
    return rows


def _row(index: int, num_images: int, images: int | str, seed: int) -> dict[str, Any]:
    number = seed * 7 + index
    colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
    question = "What is this?" if number % 2 else "Name the colour and the shape, please."
    answer = (
        f"A {colour} {shape}."
        if number % 3
        else f"The {shape} is {colour}, and it is not small at all."
    )
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
    if images != 0:
        row["images"] = [tiny_picture(number + 3 * picture) for picture in range(num_images)]
    return row


def tiny_picture(number: int) -> Image.Image:
    """One coloured shape on black; the number picks size, colour and shape."""
    width, height = PICTURE_SIZES[number % len(PICTURE_SIZES)]
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
    left, top, right, bottom = width // 4, height // 4, 3 * width // 4, 3 * height // 4
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "cross":
        draw.line((left, top, right, bottom), fill=colour, width=5)
        draw.line((left, bottom, right, top), fill=colour, width=5)
    else:
        draw.rectangle((left, top, right, bottom if shape == "square" else top + 6), fill=colour)
    return picture


def write_json_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """rows.jsonl in a new folder, with a picture's path in each row, relative to the file."""
    folder.mkdir()
    lines = []
    for number, row in enumerate(rows):
        tiny_picture(number).save(folder / f"{number}.png")
        lines.append(json.dumps(row | {"image": f"{number}.png"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"
