"""Datasets of every kind as the command line reads them."""

import json

import datasets
import pytest
from PIL import Image

from gold_trainer.data.data_files import DataArguments, MappedRows, load_rows
from gold_trainer.data.dataset import RowDataset
from support.tiny_data import write_json_rows
from support.tiny_models import tiny_picture, tiny_rows


@pytest.fixture
def json_rows(tmp_path):
    return write_json_rows(tmp_path / "data", tiny_rows(8))


def read_rows(path, **options):
    rows = load_rows(DataArguments(dataset_name=str(path), **options), "train")
    return RowDataset(rows, needs_completion=True, is_text=False)


def test_json_rows_open_pictures_relative_to_the_file(json_rows):
    rows = read_rows(json_rows)
    assert len(rows) == 8
    assert isinstance(rows[3].images[0], Image.Image)
    assert rows[3].images[0].size == tiny_picture(3).size
    assert rows[3].answer == tiny_rows(8)[3]["messages"][-1]


def test_pictures_by_path_stand_upright_as_those_of_datasets(tmp_path):
    """Phones write them turned, with the orientation beside."""
    turned = Image.Exif()
    turned[0x0112] = 6
    row = {"prompt": "What?", "completion": "That.", "image": str(tmp_path / "0.jpg")}
    Image.new("RGB", (40, 20), "red").save(row["image"], exif=turned)
    table = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    assert table[0]["image"].size == (20, 40), "what datasets makes of it"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_rows(tmp_path / "rows.jsonl")[0].images[0].size == (20, 40)


def test_json_lines_end_at_line_feeds_only(tmp_path):
    """Unicode's own separators stand in strings as they are, unless the writer escapes all."""
    row = {"prompt": "one\u2028two\u0085three", "completion": "\u2029"}
    lines = f"{json.dumps(row, ensure_ascii=False)}\r\n\n" * 2
    (tmp_path / "rows.jsonl").write_bytes(lines.encode())
    rows = load_rows(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")), "train")
    assert [rows[0], rows[1]] == [row, row] and len(rows) == 2


def test_json_list_may_hold_lists_of_pictures_and_mixed_contents(tmp_path):
    for number in range(2):
        tiny_picture(number).save(tmp_path / f"{number}.png")
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Same?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}]
    rows = [{"messages": messages, "images": ["0.png", "1.png"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    row = read_rows(tmp_path / "rows.json")[0]
    assert [picture.size for picture in row.images] == [tiny_picture(n).size for n in range(2)]
    assert [*row.prompt, row.answer] == messages


def test_columns_become_a_conversation():
    row = {"problem": "What?", "solution": "That.", "figure": [tiny_picture(0)], "level": 3}
    args = DataArguments(
        prompt_column="problem",
        completion_column="solution",
        image_column="figure",
        system_prompt="Be brief.",
    )
    mapped = MappedRows([row], None, args)[0]
    assert mapped["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?"},
    ]
    assert mapped["completion"] == [{"role": "assistant", "content": "That."}]
    assert mapped["images"] == row["figure"]
    assert "problem" in row, "the dataset's own row must stay as it was"


def test_saved_folders_parquet_and_imagefolder_load(tmp_path):
    table = datasets.Dataset.from_list(
        [{"prompt": "What?", "completion": "That.", "image": tiny_picture(n)} for n in range(3)]
    )
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    table.to_parquet(tmp_path / "rows.parquet")
    pictures = tmp_path / "pictures" / "train"
    pictures.mkdir(parents=True)
    lines = []
    for number in range(3):
        tiny_picture(number).save(pictures / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": "a", "completion": "b"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    for name in ("plain", "splits", "rows.parquet", "pictures"):
        rows = read_rows(tmp_path / name)
        assert len(rows) == 3, name
        assert rows[2].images[0].size == tiny_picture(2).size, name
    splits = DataArguments(dataset_name=str(tmp_path / "splits"))
    assert len(load_rows(splits, "eval")) == 1
    sliced = DataArguments(
        dataset_name=str(tmp_path / "rows.parquet"), dataset_train_split="train[:2]"
    )
    assert len(load_rows(sliced, "train")) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "no such file"),
        ("rows.jsonl", "{broken", "not valid JSON"),
        ("rows.json", '{"a": 1}', "a list of objects"),
        ("rows.jsonl", "\n", "has no rows"),
        ("rows.xyz", "?", "unknown format '.xyz'"),
    ],
)
def test_dataset_that_cannot_be_read_says_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(DataArguments(dataset_name=str(tmp_path / name)), "train")


def test_evaluation_on_a_single_file_asks_for_another_dataset(json_rows):
    with pytest.raises(ValueError, match="eval_dataset_name"):
        load_rows(DataArguments(dataset_name=str(json_rows)), "eval")
    both = DataArguments(dataset_name=str(json_rows), eval_dataset_name=str(json_rows))
    assert len(load_rows(both, "eval")) == 8


def test_unreadable_picture_and_missing_column_name_the_row(json_rows):
    (json_rows.parent / "5.png").write_bytes(b"not a picture")
    rows = read_rows(json_rows)
    with pytest.raises(ValueError, match=r"row 5: its picture cannot be read \(image: .*5\.png"):
        rows[5]
    (json_rows.parent / "6.png").unlink()
    with pytest.raises(ValueError, match=r"row 6: image must be the path .* no file '.*6\.png'"):
        rows[6]
    args = DataArguments(dataset_name=str(json_rows), prompt_column="question")
    with pytest.raises(ValueError, match=r"row 0: no column 'question'; .* image, messages"):
        load_rows(args, "train")[0]
