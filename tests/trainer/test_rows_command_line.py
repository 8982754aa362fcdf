"""Rows that cannot be used end the command in one line with row, key and remedy, before weights."""

import json

import datasets
import pytest

from gold_trainer import loading
from gold_trainer.__main__ import main
from support.tiny_models import save_tiny_pair, tiny_picture

CHAT = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A bar."}]
PICTURE_PART = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_pair(folder, "qwen3_vl")


def run(models, data, output_dir, *flags):
    return main(
        [
            *("train", "--model_name_or_path", str(models / "student")),
            *("--teacher_model_name_or_path", str(models / "teacher")),
            *("--dataset_name", str(data), "--output_dir", str(output_dir), "--report_to", "none"),
            *("--max_steps", "1", "--per_device_train_batch_size", "1", "--use_cpu"),
            *("--lmbda", "0", "--learning_rate", "1e-3", "--save_strategy", "no", *flags),
        ]
    )


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"messages": CHAT, "id": 7}, [], "got id, which nothing uses; rename them, or set data"),
        ({"messages": CHAT, "prompt": "a"}, [], "row 0: columns must go with 'messages', got pro"),
        ({"messages": [CHAT[0]]}, [], "row 0: an assistant's answer is expected"),
        ({"prompt": "a\ud83d", "completion": "b"}, [], "row 0: prompt[0], content must be text in"),
        ({"messages": CHAT, "tools": 3}, [], "row 0: tools must be a list of JSON schemas"),
        ({"messages": CHAT, "image": "a\u0000.png"}, [], "row 0: image must be the path"),
        ({"messages": CHAT, "image": "s3://a.png"}, [], "row 0: image must be a file, got the"),
        (
            {"messages": CHAT, "image": "0.png"},
            ["--max_pixels", "9"],
            "at most max_pixels=9 pixels",
        ),
        (
            {"messages": CHAT, "image": "0.png"},
            ["--picture_folder", "/none"],
            "a folder that exists",
        ),
        ({"messages": CHAT, "image": "0.png"}, ["--max_pixels", "0"], "None or at least 1, got 0"),
        ({"messages": CHAT}, ["--dataset_train_split", "nonsense"], "the split 'train', got 'nons"),
        (
            {
                "messages": [{"role": "user", "content": "<image> <image>"}, CHAT[1]],
                "image": "0.png",
            },
            [],
            "row 0: the prompt has <image> 2 times but the row has 1 pictures",
        ),
        (
            {"messages": [{"role": "user", "content": [PICTURE_PART]}, CHAT[1]]},
            [],
            "row 0: message 0, part 0, image_url must be a file, got the address",
        ),
    ],
)
def test_a_row_that_cannot_be_used_ends_in_one_line(
    models, row, flags, message, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(loading, "load_student", lambda *_: pytest.fail("weights were read"))
    tiny_picture(1).save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert run(models, tmp_path / "rows.jsonl", tmp_path / "run", *flags) == 2
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert shown.err.count("error: ") == 1 and message in shown.err


def test_rows_of_other_projects_are_trained_on(models, tmp_path, capfd):
    """A column is left out by name; a picture is bytes of a table."""
    tiny_picture(1).save(tmp_path / "0.png")
    row = {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A bar."},
        ],
        "image": {"bytes": (tmp_path / "0.png").read_bytes(), "path": None},
        "id": 7,
    }
    datasets.Dataset.from_list([row] * 2).to_parquet(tmp_path / "rows.parquet")
    flags = ("--dataset_ignore_columns", "id", "--dataset_train_split", "train[:1]")
    assert run(models, tmp_path / "rows.parquet", tmp_path / "run", *flags) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "Traceback" not in capfd.readouterr().err
