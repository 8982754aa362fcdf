"""Datasets that hold columns in place of rows are refused with what makes rows of them; everything
that gives rows is taken.
"""

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch

from gold_trainer import GOLDConfig, refusals
from gold_trainer.data import tables
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.streams import read_rows

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A bar."}
ROWS = [{"messages": [USER, ANSWER]}] * 2
OPTIONS = {"needs_completion": True, "is_text": True}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


class Frame(pandas.DataFrame):
    """As geopandas has one."""


def stand_in(package, name):
    """Of a class of a package that is not installed."""
    return type(name, (), {"__module__": f"{package}.frame"})()


REFUSED = {
    "pandas.DataFrame": (pandas.DataFrame(ROWS), "datasets.Dataset.from_pandas(it)"),
    "a subclass": (Frame(ROWS), "datasets.Dataset.from_pandas(it)"),
    "pyarrow.Table": (pyarrow.Table.from_pylist(ROWS), "datasets.Dataset(it)"),
    "pyarrow.RecordBatch": (
        pyarrow.RecordBatch.from_pylist(ROWS),
        "datasets.Dataset(pyarrow.Table.from_batches([it]))",
    ),
    "polars.DataFrame": (stand_in("polars", "DataFrame"), "datasets.Dataset.from_polars(it)"),
    "polars.LazyFrame": (stand_in("polars", "LazyFrame"), "from_polars(it.collect())"),
    "columns": ({"messages": [[USER, ANSWER]]}, "datasets.Dataset.from_dict(it)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_columns_are_refused_with_what_makes_rows_of_them(name):
    dataset, remedy = REFUSED[name]
    args = GOLDConfig(output_dir="runs/none", use_cpu=True)
    for read in (
        lambda: RowDataset(dataset, **OPTIONS),
        lambda: read_rows(dataset, args, **OPTIONS),
        lambda: refusals.refuse_splits(dataset),
    ):
        with pytest.raises(ValueError, match="a dataset must give rows, got a") as caught:
            read()
        assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: datasets.Dataset.from_pandas(pandas.DataFrame(ROWS)),
        lambda: datasets.Dataset(pyarrow.Table.from_pylist(ROWS)),
        lambda: datasets.Dataset(
            pyarrow.Table.from_batches([pyarrow.RecordBatch.from_pylist(ROWS)])
        ),
        lambda: datasets.Dataset.from_dict({"messages": [[USER, ANSWER]]}),
        Rows,
        lambda: torch.utils.data.Subset(Rows(), [1]),
        lambda: torch.utils.data.ConcatDataset([Rows(), Rows()]),
        lambda: tuple(ROWS),
        lambda: np.array(ROWS, dtype=object),
    ],
)
def test_what_the_remedies_make_and_other_rows_are_read(make):
    row = RowDataset(make(), **OPTIONS)[0]
    assert (row.prompt, row.answer) == ([USER], ANSWER)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (["just text"], "row 0: a row must be a dict of columns, got str; pass"),
        ([[USER, ANSWER]], "row 0: a row must be a dict of columns, got list; pass"),
        (torch.utils.data.TensorDataset(torch.ones(2, 3)), "row 0: a row must be a dict of col"),
        ({"train": ROWS}, "one dataset is expected, got dict with .'train'.; pass one of its spl"),
        (iter(ROWS), "a map-style dataset with a length is expected, got list_iterator"),
    ],
)
def test_what_gives_no_rows_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        list(RowDataset(dataset, **OPTIONS))


def test_splits_are_not_taken_for_columns():
    assert not tables.is_columns({"messages": Rows()})
    assert not tables.is_columns({"train": ROWS})
    assert not tables.is_columns({})
