"""What a resumed run is told where fields, rows or its adapter are not those of its checkpoint."""

import json
from dataclasses import fields
from shutil import copy

import pytest
from transformers import TrainingArguments

from gold_trainer import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.survival.checkpoints import MARK, what_is_wrong
from gold_trainer.survival.resuming import OF_OPTIMIZER, SETTINGS, settings_of_run
from support.tiny_models import tiny_rows
from support.trainer_cases import losses_of, make_trainer

ROWS = tiny_rows(12)


# Fields that say where and how fast a run learns, and what it tells.
ELSEWHERE = {
    *("chunk_size", "loss_budget_mib", "loss_backend", "compile_models", "padding_free"),
    "share_prompts",
    *("group_by_length", "rollout_cache_gib", "rollout_compile", "generation_batch_size"),
    *("teacher_sharding", "teacher_device", "teacher_offload", "teacher_batch_size"),
    *("teacher_model_server_url", "teacher_server_timeout"),
    *("teacher_request_timeout", "teacher_request_retries"),
    *("picture_folder", "dataset_ignore_columns", "model_init_kwargs", "on_nonfinite"),
    *("overwrite_output_dir", "log_completions", "log_completions_steps"),
    "num_completions_to_print",
}


def test_each_field_that_is_ours_is_told_or_changes_nothing_that_is_learnt():
    own = {one.name for one in fields(GOLDConfig)} - {one.name for one in fields(TrainingArguments)}
    own -= {name for name in own if name.startswith("vllm_")}
    assert own - {*SETTINGS} - {*OF_OPTIMIZER} == ELSEWHERE


def run(folder, rows=ROWS, *, resume=None, **fields):
    fields = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1} | fields
    trainer = make_trainer(folder, rows, "qwen3", **fields)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def told(caplog):
    return [r.getMessage() for r in caplog.records if "going on from" in r.getMessage()]


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"loss_temperature": 2.0}, "loss_temperature 1.0 -> 2.0."),
        ({"crossentropy_weight": 1.0}, "crossentropy_weight 0.0 -> 1.0."),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha None -> 5.0."),
        ({"bf16": True}, "bf16 False -> True."),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type constant -> linear."),
        ({"on_bad_row": "skip"}, "on_bad_row error -> skip."),
    ],
)
def test_a_field_that_changes_what_is_learnt_is_told(fields, change, tmp_path, caplog):
    run(tmp_path)
    run(tmp_path, resume=True, max_steps=2)
    assert not told(caplog)
    run(tmp_path, resume=True, max_steps=3, **fields)
    assert [message.endswith(f"with other settings: {change}") for message in told(caplog)] == [
        True
    ]


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy sequential -> random"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size 4 -> 2"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
    ],
)
def test_a_field_that_gives_steps_other_rows_says_so(fields, change, tmp_path, caplog):
    run(tmp_path)
    run(tmp_path, resume=True, max_steps=2, **fields)
    (message,) = told(caplog)
    rows = "a step has other rows: some come twice in this epoch, or not at all."
    assert message.endswith(f"{change}; {rows}")


def test_a_longer_run_is_told_where_its_schedule_is_another(tmp_path, caplog):
    run(tmp_path, lr_scheduler_type="linear")
    run(tmp_path, resume=True, max_steps=2, lr_scheduler_type="linear")
    assert told(caplog)[0].endswith("with other settings: max_steps 1 -> 2.")


def test_another_number_of_processes_is_told_in_both_directions(tmp_path, caplog):
    """The checkpoint of one process was incomplete for two, and the other way round no one said
    that the rows of a step are others."""
    run(tmp_path)
    checkpoint = tmp_path / "checkpoint-1"
    assert what_is_wrong(checkpoint) is None
    assert what_is_wrong(checkpoint, num_ranks=2) is None
    for rank in range(2):
        copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    mark = json.loads((checkpoint / MARK).read_text())
    mark["settings"]["processes"] = 2
    del mark["files"]["rng_state.pth"]
    (checkpoint / MARK).write_text(json.dumps(mark))
    assert what_is_wrong(checkpoint, num_ranks=4) is None
    run(tmp_path, resume=True, max_steps=2)
    assert "processes 2 -> 1; a step has other rows" in told(caplog)[0]
    (checkpoint / "rng_state_0.pth").unlink()
    assert what_is_wrong(checkpoint, num_ranks=2) == "rng_state_0.pth is missing"


def test_a_rate_that_the_optimizer_brings_back_is_told_to_stay(tmp_path, caplog):
    run(tmp_path, learning_rate=0.5)
    same = run(tmp_path / "same", learning_rate=0.5, max_steps=3)
    resumed = run(tmp_path, resume=True, max_steps=3, learning_rate=1e-3, weight_decay=0.1)
    assert losses_of(resumed) == losses_of(same), "the rate of the checkpoint is used"
    (message,) = told(caplog)
    assert "learning_rate stays 0.5, not 0.001, weight_decay stays 0.0, not 0.1; to" in message


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        (ROWS[:8], "other settings: rows 12 -> 8; a step has other rows"),
        (tiny_rows(12, seed=1), "other settings: first_row "),
    ],
)
def test_other_rows_are_told(rows, change, tmp_path, caplog):
    run(tmp_path)
    run(tmp_path, rows, resume=True, max_steps=2)
    (message,) = told(caplog)
    assert change in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "got r 8 and .*checkpoint-1 with 4; set r to that"),
        ({"lora_alpha": 64}, "got lora_alpha 64 and"),
        ({"target_modules": ["v_proj"]}, r"got target_modules \['v_proj'\] and .*\['q_proj'\]"),
        ({"use_dora": True}, "got use_dora True and"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(change, message, tmp_path):
    peft = pytest.importorskip("peft")
    shape = {"r": 4, "target_modules": ["q_proj"]}
    run(tmp_path, peft_config=peft.LoraConfig(**shape))
    run(tmp_path, resume=True, peft_config=peft.LoraConfig(lora_dropout=0.1, **shape))
    with pytest.raises(ValueError, match=f"must have its checkpoint's adapter, {message}"):
        run(tmp_path, resume=True, peft_config=peft.LoraConfig(**(shape | change)))


def test_a_folder_that_the_limit_would_delete_is_refused_by_name(tmp_path):
    run(tmp_path)
    kept = tmp_path / "checkpoint-best"
    kept.mkdir()
    with pytest.raises(ValueError, match=r"got checkpoint-best in .*; rename it or move it\."):
        run(tmp_path, resume=True, max_steps=3, save_total_limit=1)
    run(tmp_path, resume=True, max_steps=2)
    assert kept.is_dir()


def test_a_second_checkpoint_reads_no_row_again(tmp_path, monkeypatch):
    args = GOLDConfig(output_dir=str(tmp_path), use_cpu=True)
    rows = RowDataset(ROWS, needs_completion=True, is_text=False)
    settings = settings_of_run(args, rows=rows)
    monkeypatch.setattr(RowDataset, "__getitem__", lambda *_: pytest.fail("a row is read"))
    assert settings_of_run(args, rows=rows) == settings
