"""Files of a folder with the rows of a split: all are read, or it is said which are not."""

import json

import datasets
import pytest

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.file_streams import load_stream


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        rows = [{"prompt": name, "completion": "c"}]
        if path.suffix in (".jsonl", ".json"):
            path.write_text(json.dumps(rows if path.suffix == ".json" else rows[0]))
        else:
            getattr(datasets.Dataset.from_list(rows), f"to_{path.suffix[1:]}")(str(path))


def prompts(folder, load, split="train"):
    args = DataArguments(dataset_name=str(folder), dataset_train_split=split)
    return [row["prompt"] for row in load(args, "train")]


@pytest.mark.parametrize("load", [load_rows, load_stream])
@pytest.mark.parametrize(
    "names",
    [
        ("train.json", "train.jsonl"),
        ("train.jsonl", "train.parquet"),
        ("train.csv", "train.parquet"),
        ("train-0.csv", "train-1.jsonl"),
    ],
)
def test_files_of_several_kinds_for_one_split_are_refused(names, load, tmp_path):
    """One of them was read; a stream took another one than the table."""
    write(tmp_path, names)
    with pytest.raises(ValueError, match=f"must be in files of one kind, got {', '.join(names)};"):
        prompts(tmp_path, load)


@pytest.mark.parametrize("load", [load_rows, load_stream])
@pytest.mark.parametrize(
    ("names", "read", "told"),
    [
        (("train.jsonl", "train_2.jsonl"), "train.jsonl", "alone, and not from train_2.jsonl"),
        (("train.jsonl", "data/train.csv"), "train.jsonl", "alone, and not from data/train.csv"),
        (("a.jsonl", "b.jsonl", "c.csv"), "a.jsonl", "not from all of a.jsonl, b.jsonl, c.csv"),
        (("train.jsonl", "test.csv", ".train.json"), "train.jsonl", None),
        (("train-0.jsonl", "train-1.jsonl", "test.jsonl"), "train-0.jsonl", None),
        (("train.jsonl", "labels.csv", "metadata.jsonl"), "train.jsonl", None),
    ],
)
def test_files_that_are_not_read_are_named(names, read, told, load, tmp_path, caplog):
    write(tmp_path, names)
    assert prompts(tmp_path, load)[0] == read
    assert ("is read from" in caplog.text) == (told is not None)
    assert told is None or told in caplog.text
