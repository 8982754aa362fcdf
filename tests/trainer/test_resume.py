"""Checkpoints: a resumed run is the uninterrupted one, after a crash too, and evaluation in between
changes nothing.
"""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from gold_trainer import GOLDConfig
from gold_trainer.objectives import same_vocabulary
from gold_trainer.survival import checkpoints
from gold_trainer.survival.resuming import check_settings, settings_of_run
from support.eager_step import completion_of, eager_step
from support.resumed_runs import FIELDS, NUM_STEPS, assert_same_run
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import losses_of, make_trainer, recorded_warnings

ROWS = tiny_rows(11, images="mixed")
SAVING = {"save_strategy": "steps", "save_steps": 2}


def adapter():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])


def run(output_dir, *, resume=None, **options):
    trainer = make_trainer(output_dir, ROWS, **(FIELDS | options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_resumed_run_is_the_uninterrupted_one(lmbda, tmp_path):
    whole = run(tmp_path, lmbda=lmbda, **SAVING)
    losses = losses_of(whole)
    assert len(set(losses)) == NUM_STEPS, "a step done twice or left out would not show"
    if lmbda == 0.5:
        entries = [e for e in whole.state.log_history if "loss" in e]
        for part in (entries[:2], entries[2:]):
            assert any("on_policy_loss" in e for e in part)
            assert any("off_policy_loss" in e for e in part)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-2"), lmbda=lmbda)
    assert_same_run(resumed, whole)


def test_a_resumed_run_keeps_its_optimizer_and_says_what_else_has_changed(tmp_path, caplog):
    run(tmp_path, lmbda=0.0, max_steps=2, **SAVING)
    options = {"resume": True, "lmbda": 0.0, "max_steps": 3}
    name = FIELDS.get("optim", "sgd")
    other = "adafactor"
    with pytest.raises(ValueError, match=f"optim='{other}'.*set optim='{name}', or start a new"):
        run(tmp_path, optim=other, **options)
    caplog.clear()
    run(tmp_path, beta=0.25, **options)
    changes = [record.getMessage() for record in caplog.records if "settings" in record.message]
    assert len(changes) == 1
    assert changes[0].endswith("with other settings: beta 0.5 -> 0.25, max_steps 2 -> 3.")


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"temperature": 0.5}, "temperature 0.9 -> 0.5"),
        ({"top_p": 1.0, "top_k": 5}, "top_p 0.95 -> 1.0, top_k 0 -> 5"),
        ({"min_p": 0.1, "repetition_penalty": 1.1}, "repetition_penalty 1.0 -> 1.1"),
        ({"stop_strings": ["."]}, "stop_strings None -> ['.']"),
        ({"max_completion_length": 7}, "max_completion_length 128 -> 7"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "-> {'no_repeat_ngram_size': 2}"),
        (
            {"use_vllm": True, "vllm_mode": "colocate"},
            "use_vllm False -> True, vllm_mode server ->",
        ),
        (
            {"use_vllm": True, "async_rollouts": 1},
            "async_rollouts 0 -> 1.",
        ),
        ({"teacher_cache": "x", "lmbda": 0.0}, "teacher_cache None -> x"),
        ({"teacher_model_name_or_path": "a/b"}, "teacher_model_name_or_path None -> a/b"),
        ({"teacher_model_revision": "v2"}, "teacher_model_revision None -> v2"),
        ({"teacher_model_init_kwargs": {"dtype": torch.float16}}, "{'dtype': 'torch.float16'}"),
    ],
)
def test_what_is_learnt_and_from_whom_is_told_where_it_has_changed(
    fields, changes, tmp_path, caplog
):
    def args(**options):
        return GOLDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **options)

    mark = {"settings": settings_of_run(args()), "files": {}}
    (tmp_path / checkpoints.MARK).write_text(json.dumps(mark))
    check_settings(tmp_path, args())
    assert not caplog.records
    check_settings(tmp_path, args(**fields))
    assert len(caplog.records) == 1 and changes in caplog.records[0].getMessage()
    (tmp_path / checkpoints.MARK).write_text(
        json.dumps({"settings": settings_of_run(args(**fields)), "files": {}})
    )
    check_settings(tmp_path, args(**fields))
    assert len(caplog.records) == 1, "read again a setting is the same"


def test_resumed_adapter_with_dropout_is_the_uninterrupted_one(tmp_path):
    options = {"lmbda": 0.5, "disable_dropout": False, "peft_config": adapter()}
    whole = run(tmp_path, **options, **SAVING)
    dry = run(tmp_path / "dry", **(options | {"disable_dropout": True}))
    assert losses_of(dry) != losses_of(whole), "dropout must be on"
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert_same_run(resumed, whole)


def test_crash_in_a_step_leaves_the_last_checkpoint_to_resume_from(tmp_path, monkeypatch):
    """The second micro-batch of the fourth step fails: what three steps have learnt is saved."""
    whole = run(tmp_path / "whole", lmbda=0.5)
    loss, calls = same_vocabulary.fused_linear_loss, []

    def fail_late(*args, **options):
        calls.append(args)
        if len(calls) == 8:
            raise RuntimeError("out of memory")
        return loss(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(same_vocabulary, "fused_linear_loss", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(tmp_path, lmbda=0.5, **SAVING)
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]

    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-3")
    assert type(saved) is type(whole.model)
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint-2")
    assert type(processor) is type(whole.processing_class)
    resumed = run(tmp_path, resume=True, lmbda=0.5)
    assert len(calls) == 8, "the resumed run has the real loss"
    assert_same_run(resumed, whole)


def test_evaluation_of_picture_rows_is_the_eager_loss_and_leaves_training_alone(tmp_path):
    quiet = run(tmp_path / "quiet", lmbda=0.5)
    rows = tiny_rows(5, images="mixed", seed=3)
    evaluated = run(
        tmp_path / "evaluated",
        lmbda=0.5,
        eval_rows=rows,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=2,
    )
    assert_same_run(evaluated, quiet)
    losses = [e["eval_loss"] for e in evaluated.state.log_history if "eval_loss" in e]
    assert len(losses) == NUM_STEPS + 1 and len(set(losses)) == NUM_STEPS + 1

    teacher, processor = tiny("qwen3_vl", "teacher")
    completions = [completion_of("qwen3_vl", processor, row) for row in rows]
    for model, loss in ((tiny("qwen3_vl")[0], losses[0]), (evaluated.model, losses[-1])):
        expected, _ = eager_step(model, teacher, processor, rows, completions, beta=0.5)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_of_rows_that_the_teacher_completes_is_the_same_each_time(tmp_path):
    """Other weights of the student, other random numbers drawn before: the same completions."""
    rows = [{**row, "messages": row["messages"][:1]} for row in ROWS[:4]]
    options = {"eval_strategy": "steps", "eval_steps": 1, "seq_kd": True}
    trainer = make_trainer(
        tmp_path, ROWS, eval_rows=rows, max_steps=2, learning_rate=0.0, **options
    )
    trainer.train()
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluations) == 2
    for name in ("eval_loss", "eval_completion_length", "eval_teacher_entropy"):
        assert evaluations[0][name] == evaluations[1][name]
    assert evaluations[0]["eval_loss"] > 0


def test_best_checkpoint_comes_back_at_the_end(tmp_path):
    """Steps of a far too large size: the first evaluation is the best."""
    trainer = run(
        tmp_path,
        eval_rows=ROWS[:2],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    with recorded_warnings() as warnings:  # of the tied head that a checkpoint does not have
        trainer._load_best_model()
    assert warnings == []
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    best = min(range(3), key=losses.__getitem__) + 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


class StopAfter(TrainerCallback):
    """Ends training politely, as a time limit of a cluster does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        control.should_save = control.should_training_stop


def test_run_that_was_stopped_in_an_epoch_goes_on_where_it_was(tmp_path):
    whole = run(tmp_path / "whole", lmbda=0.5)
    run(tmp_path, lmbda=0.5, callbacks=[StopAfter(4)], save_strategy="steps", save_steps=100)
    assert (tmp_path / "checkpoint-4").is_dir()
    assert_same_run(run(tmp_path, resume=True, lmbda=0.5), whole)


@pytest.mark.parametrize("steps", [2, 3])  # within an epoch, and at its end
def test_a_run_that_had_ended_takes_no_step_more(steps, tmp_path):
    whole = run(tmp_path, max_steps=steps, **SAVING)
    whole._save_checkpoint(whole.model, None)
    resumed = run(tmp_path, resume=True, max_steps=steps, **SAVING)
    assert resumed.state.global_step == steps
    assert not (tmp_path / f"checkpoint-{steps + 1}").exists()
    weights = whole.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
