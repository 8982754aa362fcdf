"""Rows that the trainer refuses before weights are read and anything is written."""

import pytest

from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

ROWS = tiny_rows(4, images=1)
TEXT_ROWS = tiny_rows(4)


def refused(message, output_dir, rows=ROWS, family="qwen3_vl", **options):
    with pytest.raises(ValueError, match=message):
        make_trainer(output_dir, rows, family, **options)


def test_picture_column_needs_a_vision_language_student(output_dir):
    message = "^row 0: a text-only student takes no pictures, got 1; drop the picture column"
    refused(message, output_dir, family="llama")


@pytest.mark.parametrize("rows", ["folder/rows.json", [], iter(ROWS)])
def test_dataset_must_be_rows(rows, output_dir):
    refused("^RowDataset: .* expected, got", output_dir, rows)
    refused("^RowDataset: .* expected, got", output_dir, eval_rows=rows)


def test_evaluation_needs_rows(output_dir):
    refused("eval_dataset", output_dir, eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize("workers", [0, 1])
def test_overlong_prompt_with_pictures_names_row_length_and_field(lmbda, workers, tmp_path):
    rows = [*tiny_rows(2), *tiny_rows(1, images=2)]
    fields = {"per_device_train_batch_size": 1, "max_steps": 3, "lmbda": lmbda}
    run = make_trainer(tmp_path, rows, max_length=40, dataloader_num_workers=workers, **fields)
    message = (
        r"row 2: the prompt has (\d+) tokens with 2 pictures, max_length=40 leaves no room for a "
        "completion; raise max_length or make the pictures smaller"
    )
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 1, "rows before it are trained on; the loader is one ahead"
