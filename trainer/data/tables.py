"""Datasets that are no rows, and what makes rows of them."""

from collections.abc import Mapping
from typing import Any

from gold_trainer.data.columns import KNOWN
from gold_trainer.data.row_errors import shown

# Package and class -> how datasets reads it.
READ_BY = {
    ("pandas", "DataFrame"): "datasets.Dataset.from_pandas(it)",
    ("polars", "DataFrame"): "datasets.Dataset.from_polars(it)",
    ("polars", "LazyFrame"): "datasets.Dataset.from_polars(it.collect())",
    ("pyarrow", "Table"): "datasets.Dataset(it)",
    ("pyarrow", "RecordBatch"): "datasets.Dataset(pyarrow.Table.from_batches([it]))",
}


def refuse_tables(dataset: Any) -> None:
    """ValueError for what holds columns, and gives no row where a row is asked for."""
    for kind in type(dataset).__mro__:
        name = (kind.__module__.partition(".")[0], kind.__name__)
        if name in READ_BY:
            raise ValueError(
                f"GOLDTrainer: a dataset must give rows, got a {'.'.join(name)}, which gives "
                f"columns; pass {READ_BY[name]}."
            )
    if isinstance(dataset, Mapping) and is_columns(dataset):
        raise ValueError(
            f"GOLDTrainer: a dataset must give rows, got a dict of the columns "
            f"{shown(list(dataset))}; pass datasets.Dataset.from_dict(it)."
        )


def is_columns(dataset: Mapping[Any, Any]) -> bool:
    """Not a dict of splits: columns by the names that rows have."""
    return bool(dataset) and all(
        name in KNOWN and isinstance(column, list | tuple) for name, column in dataset.items()
    )
