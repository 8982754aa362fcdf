"""Samples of WebDataset's tar files: members of one name, as the columns of a row."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

KEY = "__key__"  # of a sample; beside it stands where its file is
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def are_samples(names: Collection[str]) -> bool:
    return KEY in names


def from_sample(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """0001.json holds columns, 0001.png or 0001.a.png and 0001.b.png pictures; anything else is as
    it is. Pictures come in the order in which the json names them, else in that of the file.
    """
    if not are_samples(row):
        return row
    columns: dict[str, Any] = {}
    pictures = {}
    for name, value in row.items():
        kind = name.rpartition(".")[2].lower()
        if kind in PICTURES and value is not None:
            pictures[f"{row[KEY]}.{name}".rpartition("/")[2]] = value
        elif not name.startswith("__"):
            given = value if kind == "json" and isinstance(value, Mapping) else {name: value}
            twice = [key for key in given if columns.get(key) not in (None, given[key])]
            if twice:
                raise ValueError(
                    f"sample {row[KEY]}: its files must hold columns of different names, got "
                    f"{twice[0]!a} in two that differ; keep one of them."
                )
            columns |= given
    if pictures:
        named = [columns.pop(key) for key in ("image", "images") if _names_in(columns.get(key))]
        columns["images"] = _in_order(pictures, _names_in(named[-1]) if named else [], row[KEY])
    return columns


def _in_order(pictures: Mapping[str, Any], names: Sequence[str], key: str) -> list[Any]:
    """Names that are none of the members' may be those that pictures had before."""
    files = [name.replace("\\", "/").rpartition("/")[2] for name in names]
    if files and set(files) == set(pictures):
        return [pictures[file] for file in files]
    if not files or (len(files) == len(pictures) and not set(files) & set(pictures)):
        return list(pictures.values())
    raise ValueError(
        f"sample {key}: the pictures of its json must be its members, which are "
        f"{', '.join(pictures)}, got {', '.join(names)}; name all of them, or none."
    )


def _names_in(value: Any) -> list[str]:
    """Names of files, alone or in a list; empty for anything else."""
    parts = value if isinstance(value, list) else [value]
    parts = [part.get("path") if isinstance(part, Mapping) else part for part in parts]
    names = [part for part in parts if isinstance(part, str)]
    return names if len(names) == len(parts) else []
