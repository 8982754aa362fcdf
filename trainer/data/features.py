"""Rows of a table as their author wrote them, which its features say how to read.

Arrow gives every struct the keys of all rows, with null where a row has none; of a column of JSON
every null is its author's. Classes are numbers with names. Pictures come as bytes and paths, to be
checked before decoding.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from gold_trainer.data.json_text import parsed_json
from gold_trainer.data.samples import from_sample

# Of datasets 4 and later; what is never read must not need a package that decodes it.
MEDIA = tuple(
    getattr(datasets, name)
    for name in ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh", "BioSequence", "BioStructure")
    if hasattr(datasets, name)
)
JSON = getattr(datasets, "Json", ())


def undecoded(rows: Any) -> Any:
    """A table or a stream whose media come as bytes and paths.

    With a transform of its own a table is left as it is; formats (torch, numpy, ...) change nothing
    but the kind of its lists.
    """
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.with_format(None)
        return rows.decode(False) if rows.features else rows
    if not isinstance(rows, datasets.Dataset) or rows.format["type"] == "custom":
        return rows
    view = rows.with_format(None, columns=rows.format["columns"])
    view.info.features = datasets.Features(_without_decoding(dict(rows.features)))
    return view


def may_be_filled(rows: Any) -> bool:
    """Whether nothing says which nulls of these rows are their author's."""
    is_table = isinstance(rows, datasets.Dataset | datasets.IterableDataset)
    return is_table and _features_of(rows) is None


@dataclass(frozen=True)
class AsWritten:
    """Takes the nulls out of a row that its table has filled in, and samples apart; workers get a
    copy of it.
    """

    features: Mapping[str, Any] | None

    @classmethod
    def of(cls, rows: Any) -> "AsWritten":
        return cls(_features_of(rows))

    def __call__(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        known = self.features
        if known is not None:
            row = {name: _as_written(value, known.get(name)) for name, value in row.items()}
        return from_sample(row)


def _features_of(rows: Any) -> Mapping[str, Any] | None:
    """None for what has none, or makes other columns of them."""
    if isinstance(rows, datasets.Dataset):
        return None if rows.format["type"] == "custom" else rows.features
    return rows.features if isinstance(rows, datasets.IterableDataset) else None


def _as_written(value: Any, feature: Any) -> Any:
    if JSON and isinstance(feature, JSON):
        return parsed_json(value)  # of a stream that does not decode
    if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, dict) and isinstance(value, Mapping):
        parts = {k: v for k, v in value.items() if v is not None}
        return {key: _as_written(part, feature.get(key)) for key, part in parts.items()}
    if isinstance(feature, datasets.List | datasets.LargeList) and isinstance(value, list):
        return [_as_written(part, feature.feature) for part in value]
    return value


def _without_decoding(feature: Any) -> Any:
    if isinstance(feature, MEDIA):
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _without_decoding(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_without_decoding(feature.feature), length=feature.length)
    if isinstance(feature, datasets.LargeList):
        return datasets.LargeList(_without_decoding(feature.feature))
    return feature
