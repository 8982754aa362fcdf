"""dataset_streaming: rows one after the other, the same as without, whatever file they are in."""

import json

import datasets
import pytest

from gold_trainer import loading
from gold_trainer.__main__ import main
from gold_trainer.data.data_files import DataArguments, load_rows
from gold_trainer.data.file_streams import load_stream
from gold_trainer.data.streams import RowStream
from support.tiny_models import save_tiny_pair, tiny_picture, tiny_rows

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(10)]


def write(folder, kind, rows=ROWS):
    """The dataset's name."""
    table = datasets.Dataset.from_list(rows)
    if kind == "save_to_disk":
        datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "folder":
        (folder / "f").mkdir()
        table.to_parquet(folder / "f" / "train.parquet")
        return folder / "f"
    if kind == "folder of jsonl":
        (folder / "j").mkdir()
        (folder / "j" / "train.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
        return folder / "j"
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    return path


def arguments(name, split="train", **options):
    return DataArguments(dataset_name=str(name), dataset_train_split=split, **options)


KINDS = ["jsonl", "json", "csv", "parquet", "save_to_disk", "folder", "folder of jsonl"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "train[:3]", "train[7:]", "train[2:5]"])
def test_stream_has_the_rows_of_the_dataset(kind, split, tmp_path):
    args = arguments(write(tmp_path, kind), split, text_as_messages=True)
    streamed = load_stream(args, "train")
    assert list(streamed) == list(load_rows(args, "train")) == list(streamed), "twice the same"


@pytest.mark.parametrize("split", ["train[:10%]", "train[-3:]", "train[:2]+train[5:]", "train["])
def test_slice_that_no_stream_can_know_is_refused_by_name(split, tmp_path):
    message = r"with dataset_streaming a split must be one name.*got 'train\[.*without streaming"
    with pytest.raises(ValueError, match=message):
        load_stream(arguments(write(tmp_path, "parquet"), split), "train")


@pytest.mark.parametrize("kind", KINDS)
def test_split_that_there_is_not_is_refused_by_name(kind, tmp_path):
    with pytest.raises(ValueError, match="nonsense"):
        load_stream(arguments(write(tmp_path, kind), "nonsense"), "train")


@pytest.mark.parametrize("line", ["{broken", "[1]"])
def test_line_that_is_no_row_is_named(line, tmp_path):
    path = write(tmp_path, "jsonl")
    path.write_text(json.dumps(ROWS[0]) + f"\n{line}\n")
    stream = RowStream(load_stream(arguments(path), "train"), needs_completion=True, is_text=True)
    with pytest.raises(ValueError, match=r"row 1: the stream cannot .*rows\.jsonl, line 2: "):
        list(stream)


def test_column_that_there_is_not_is_named_with_the_row(tmp_path):
    args = arguments(write(tmp_path, "jsonl"), prompt_column="question")
    stream = RowStream(load_stream(args, "train"), needs_completion=True, is_text=True)
    with pytest.raises(ValueError, match=r"^row 0: no column 'question'; the columns are compl"):
        list(stream)


def test_pictures_start_from_the_file_s_folder(tmp_path):
    tiny_picture(2).save(tmp_path / "2.png")
    path = write(tmp_path, "jsonl", [tiny_rows(1)[0] | {"image": "2.png"}])
    stream = load_stream(arguments(path), "train")
    (row,) = RowStream(stream, needs_completion=True, is_text=False)
    assert row.images[0].size == tiny_picture(2).size


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_pair(folder, "llama")


def run(models, data, output_dir, *flags):
    return main(
        [
            *("train", "--model_name_or_path", str(models / "student")),
            *("--teacher_model_name_or_path", str(models / "teacher")),
            *("--dataset_name", str(data), "--output_dir", str(output_dir), "--use_cpu"),
            *("--per_device_train_batch_size", "2", "--lmbda", "0", "--learning_rate", "1e-3"),
            *("--report_to", "none", "--save_strategy", "no", "--dataset_streaming", *flags),
        ]
    )


@pytest.mark.parametrize("workers", ["0", "2"])
def test_command_line_trains_and_evaluates_on_streams(models, workers, tmp_path, capfd):
    data = write(tmp_path, "jsonl", tiny_rows(8))
    flags = ["--max_steps", "3", "--dataloader_num_workers", workers, "--eval_strategy", "steps"]
    flags += ["--eval_steps", "3", "--eval_dataset_name", str(data)]
    assert run(models, data, tmp_path / "run", *flags) == 0
    shown = capfd.readouterr()
    assert "a stream of rows" in shown.out and "eval_loss" in shown.out
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_command_line_refuses_a_stream_without_max_steps(models, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(loading, "load_student", lambda *_: pytest.fail("weights were read"))
    assert run(models, write(tmp_path, "parquet"), tmp_path / "run") == 2
    shown = capfd.readouterr().err
    assert "max_steps must be set for a streaming dataset" in shown
    assert "dataset_streaming" in shown and shown.count("error: ") == 1
