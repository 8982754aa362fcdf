"""Samples of WebDataset's tar files: members of one name, as the columns of a row."""

from collections.abc import Collection, Mapping
from typing import Any

KEY = "__key__"  # of a sample; beside it stands where its file is
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def are_samples(names: Collection[str]) -> bool:
    return KEY in names


def from_sample(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """0001.json holds columns, 0001.png or 0001.a.png and 0001.b.png pictures; anything else is as
    it is.
    """
    if not are_samples(row):
        return row
    columns: dict[str, Any] = {}
    pictures = []
    for name, value in row.items():
        kind = name.rpartition(".")[2].lower()
        if kind in PICTURES and value is not None:
            pictures.append(value)
        elif kind == "json" and isinstance(value, Mapping):
            columns |= value
        elif not name.startswith("__"):
            columns[name] = value
    if pictures:
        for name in ("image", "images"):  # names of the same members
            if _is_of_text(columns.get(name)):
                del columns[name]
        columns["images"] = pictures
    return columns


def _is_of_text(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(part, str) for part in parts)
