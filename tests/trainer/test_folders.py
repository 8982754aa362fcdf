"""Folders with rows and pictures, and files whose names say little."""

import json

import pytest

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.file_streams import load_stream
from gold_trainer.data.streams import RowStream
from support.tiny_data import tiny_picture

OPTIONS = {"needs_completion": True, "is_text": False}


def rows_of(path, load, split="train"):
    args = DataArguments(str(path), dataset_train_split=split)
    if load is load_stream:
        return list(RowStream(load_stream(args, "train"), **OPTIONS))
    rows = RowDataset(load_rows(args, "train"), **OPTIONS)
    return [rows[i] for i in range(len(rows))]


def write(folder, name, answers=("007", "None"), num_pictures=9):
    """Rows in a file of this name, beside more pictures than there are rows."""
    (folder / "images").mkdir(parents=True)
    for number in range(num_pictures):
        tiny_picture(number).save(folder / "images" / f"{number}.png")
    rows = [
        {"image": f"images/{number}.png", "prompt": "?", "completion": answer}
        for number, answer in enumerate(answers)
    ]
    text = "\n".join(map(json.dumps, rows))
    if name.endswith(".csv"):
        key = "file_name" if name == "metadata.csv" else "image"
        lines = [f"{key},prompt,completion", *(",".join(row.values()) for row in rows)]
        text = "\n".join(lines) + "\n"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


@pytest.mark.parametrize("load", [load_rows, load_stream])
@pytest.mark.parametrize(
    "name", ["data.jsonl", "rows.csv", "train-00000.csv", "train/a.jsonl", "metadata.csv"]
)
def test_rows_beside_many_pictures_are_read(name, load, tmp_path):
    rows = rows_of(write(tmp_path / "d", name), load)
    assert [row.completion for row in rows] == ["007", "None"]
    assert [row.images[0].size for row in rows] == [tiny_picture(0).size, tiny_picture(1).size]


@pytest.mark.parametrize("load", [load_rows, load_stream])
def test_files_that_hold_no_rows_are_passed_over_beside_one_that_does(load, tmp_path):
    folder = write(tmp_path / "d", "data.csv")
    (folder / "dataset_info.json").write_text("{}")
    assert len(rows_of(folder, load)) == 2


def test_metadata_of_a_split_beside_its_pictures_is_read(tmp_path):
    for split in ("train", "test"):
        folder = write(tmp_path / split, "rows.jsonl")
        lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        (folder / "rows.jsonl").unlink()
        text = "\n".join(json.dumps({"file_name": row.pop("image"), **row}) for row in lines)
        (folder / "metadata.jsonl").write_text(text)
    for split in ("train", "test"):
        assert [row.completion for row in rows_of(tmp_path, load_rows, split)] == ["007", "None"]


@pytest.mark.parametrize("load", [load_rows, load_stream])
def test_a_json_file_may_have_a_row_a_line(load, tmp_path):
    folder = write(tmp_path, "train.json")
    assert [row.completion for row in rows_of(folder / "train.json", load)] == ["007", "None"]
    assert [row.completion for row in rows_of(folder, load)] == ["007", "None"]
    (folder / "train.json").write_text('{"prompt": "?", "completion": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"train\.json, line 2: not valid JSON: .* one row a line"):
        rows_of(folder / "train.json", load)


@pytest.mark.parametrize(
    ("there", "written"),
    [
        ("sub/b.png", "sub\\b.png"),
        ("sub/b.png", ".\\sub\\b.png"),
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
    ],
)
def test_a_path_as_another_system_writes_it_leads_to_the_file(there, written, tmp_path):
    (tmp_path / "sub").mkdir()
    tiny_picture(0).save(tmp_path / there)
    rows = [{"prompt": "?", "completion": "a", "image": written}]
    assert RowDataset(rows, picture_folder=str(tmp_path), **OPTIONS)[0].images
    rows[0]["image"] = "..\\b.png"
    tiny_picture(0).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"^row 0: image must lie in "):
        RowDataset(rows, picture_folder=str(tmp_path / "sub"), **OPTIONS)[0]


@pytest.mark.parametrize("load", [load_rows, load_stream])
@pytest.mark.parametrize("own", ["a", "training", "train"])
@pytest.mark.parametrize("other", ["test", "my_dev", "validation-00000", "eval/b"])
def test_files_of_other_splits_are_not_trained_on(own, other, load, tmp_path):
    for name, answer in ((own, "own"), (other, "held out")):
        path = tmp_path / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"prompt,completion\n?,{answer}\n")
    rows = rows_of(tmp_path, load)
    assert [row.completion for row in rows] == ["own"]


def test_a_folder_of_other_splits_alone_has_no_rows_to_train_on(tmp_path):
    (tmp_path / "test.csv").write_text("prompt,completion\n?,held out\n")
    with pytest.raises(ValueError, match=r"Unknown split \"train\"\. Should be one of \['test'\]"):
        rows_of(tmp_path, load_rows)


def test_pictures_of_metadata_are_in_one_column(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,image,prompt,completion\na,b,?,x\n")
    with pytest.raises(ValueError, match=r"one column, got file_name and image; drop one$"):
        rows_of(tmp_path, load_rows)


@pytest.mark.parametrize("load", [load_rows, load_stream])
@pytest.mark.parametrize("name", ["dev", "valid", "val", "validation"])
def test_cells_of_a_split_by_another_name_are_text_too(name, load, tmp_path):
    for file, answer in (("train", "1"), (name, "007")):
        (tmp_path / f"{file}.csv").write_text(f"prompt,completion\n?,{answer}\n")
    assert [row.completion for row in rows_of(tmp_path, load, "validation")] == ["007"]
