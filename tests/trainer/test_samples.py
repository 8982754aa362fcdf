"""Tar files of WebDataset: a sample is a row."""

import io
import json
import tarfile

import pytest

from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.file_streams import load_stream
from gold_trainer.data.streams import RowStream
from support.tiny_data import tiny_picture

TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bar."}]


def write(path, samples):
    """A sample is a dict of what its members hold, by what is behind their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for kind, value in sample.items():
                data = io.BytesIO()
                if isinstance(value, dict):
                    data.write(json.dumps(value).encode())
                else:
                    value.save(data, "PNG")
                member = tarfile.TarInfo(f"{number:04}.{kind}")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)
    return path


def read(path, load=load_rows, split="train", **options):
    options = {"needs_completion": True, "is_text": False} | options
    args = DataArguments(str(path), dataset_train_split=split)
    if load is load_stream:
        return list(RowStream(load_stream(args, "train"), **options))
    rows = RowDataset(load_rows(args, "train"), **options)
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("load", [load_rows, load_stream])
@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_sample_is_a_row(of, load, tmp_path):
    pictures = [tiny_picture(number) for number in range(3)]
    samples = [{"json": {"messages": TALK, "image": "x.png"}, "png": p} for p in pictures]
    path = write(tmp_path / "d" / "train-0000.tar", samples)
    rows = read(path if of == "file" else path.parent, load)
    assert [row.completion for row in rows] == ["A bar."] * 3
    assert [row.images[0].size for row in rows] == [picture.size for picture in pictures]


def test_a_sample_may_have_several_pictures_and_answers(tmp_path):
    talk = [*TALK, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Red."}]
    sample = {"json": {"messages": talk}, "a.png": tiny_picture(0), "b.png": tiny_picture(1)}
    rows = read(write(tmp_path / "x.tar", [sample]), train_on="all")
    assert [row.completion for row in rows] == ["A bar.", "Red."]
    assert [picture.size for picture in rows[0].images] == [tiny_picture(i).size for i in (0, 1)]


def test_a_member_that_nothing_uses_is_refused_by_name(tmp_path):
    samples = [{"json": {"messages": TALK}, "png": tiny_picture(0), "meta.json": {"id": 3}}] * 2
    with pytest.raises(ValueError, match=r"row 0: columns must go with 'messages', got id, which"):
        read(write(tmp_path / "x.tar", samples))
    assert read(tmp_path / "x.tar", ignore_columns=["id"])[0].completion == "A bar."


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["0000.b.png", "0000.a.png"], (1, 0)),
        ([{"path": "d/0000.b.png"}, {"path": "d/0000.a.png"}], (1, 0)),
        (["0000.a.png", "0000.b.png", "0000.a.png"], (0, 1, 0)),
        (["coco/2.jpg", "coco/1.jpg"], (0, 1)),  # what they were called before
    ],
)
def test_pictures_come_in_the_order_in_which_the_json_names_them(names, order, tmp_path):
    sample = {"json": {"messages": TALK, "images": names}}
    sample |= {"a.png": tiny_picture(0), "b.png": tiny_picture(1)}
    row = read(write(tmp_path / "x.tar", [sample]))[0]
    assert [picture.size for picture in row.images] == [tiny_picture(i).size for i in order]


@pytest.mark.parametrize("names", [["0000.b.png"], ["0000.a.png", "0000.c.png"], "coco/1.jpg"])
def test_pictures_that_the_json_does_not_name_are_not_passed_over(names, tmp_path):
    sample = {"json": {"messages": TALK, "images": names}}
    sample |= {"a.png": tiny_picture(0), "b.png": tiny_picture(1)}
    message = r"^row 0: .*sample 0000: the pictures of its json must be its members, which are "
    with pytest.raises(ValueError, match=message + r"0000\.a\.png, 0000\.b\.png, got .*; name all"):
        read(write(tmp_path / "x.tar", [sample]))


def test_two_members_that_hold_one_column_are_refused(tmp_path):
    sample = {"json": {"messages": TALK, "id": 1}, "meta.json": {"id": 2}}
    with pytest.raises(ValueError, match=r"sample 0000: its files must hold columns of different "):
        read(write(tmp_path / "x.tar", [sample]))
