"""Callbacks that need evaluation or that count, and names of who gets the log."""

import pytest
from transformers import EarlyStoppingCallback

from gold_trainer import GOLDConfig
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_loss",
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def trainer(folder, patience=2, **fields):
    rows = tiny_rows(8)
    # no loss is better than another by so much: each evaluation behind the first one counts
    stop = EarlyStoppingCallback(patience, early_stopping_threshold=10.0)
    return make_trainer(folder, rows, "qwen3", eval_rows=rows[:2], callbacks=[stop], **fields)


@pytest.mark.parametrize("restores", [False, True])
def test_patience_of_early_stopping_goes_on_in_a_resumed_run(restores, tmp_path):
    fields = EVALUATION | {"restore_callback_states_from_checkpoint": restores}
    whole = trainer(tmp_path / "whole", max_steps=8, **fields)
    whole.train()
    assert whole.state.global_step == 3
    trainer(tmp_path / "parts", max_steps=2, **fields).train()
    resumed = trainer(tmp_path / "parts", max_steps=8, **fields)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_another_patience_of_a_resumed_run_counts(tmp_path):
    trainer(tmp_path, max_steps=2, **EVALUATION).train()
    resumed = trainer(tmp_path, patience=3, max_steps=8, **EVALUATION)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "eval_strategy must be set with an EarlyStoppingCallback, got 'no', with which it"),
        (
            {"eval_strategy": "steps", "eval_steps": 1},
            "metric_for_best_model must be set with an EarlyStoppingCallback, got None, with whic",
        ),
    ],
)
def test_early_stopping_without_what_it_looks_at_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=f"^GOLDTrainer: {message}"):
        trainer(tmp_path, **fields)


@pytest.mark.parametrize(
    ("metric", "is_merit"),
    [
        ("forward_kl", False),
        ("eval_reverse_kl", False),
        ("eval_news_crossentropy", False),
        ("eval_loss/math", False),
        ("loss", False),
        ("runtime", False),
        ("top1_agreement", True),
        ("samples_per_second", True),
    ],
)
def test_less_of_a_divergence_is_better_unless_the_user_says_otherwise(metric, is_merit, tmp_path):
    fields = {"output_dir": str(tmp_path), "metric_for_best_model": metric}
    assert GOLDConfig(**fields).greater_is_better is is_merit
    assert GOLDConfig(**fields, greater_is_better=not is_merit).greater_is_better is not is_merit


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorbord", "got 'tensorbord'; did you mean tensorboard"),
        (["wandb,tensorboard"], "got 'wandb,tensorboard'; write them as a list"),
        ("None", "got 'None'; write none"),
        (["False"], "got 'False'; write none"),
    ],
)
def test_who_gets_the_log_is_checked_before_models_are_loaded(names, message, tmp_path):
    with pytest.raises(ValueError, match=f"report_to must be among none, .*{message}"):
        make_trainer(tmp_path, [], student="no/model", teacher="no/model", report_to=names)
