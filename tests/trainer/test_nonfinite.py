"""NaN and inf stop a run before they reach the weights, or are left out and counted."""

import pytest
import torch
from safetensors.torch import load_file

from gold_trainer import GOLDConfig
from gold_trainer.objectives import same_vocabulary
from gold_trainer.survival.nonfinite import NonFiniteError, is_bad
from support.cross_cases import cross_trainer, make_sides, rows_of
from support.tiny_models import tiny_rows
from support.trainer_cases import losses_of, make_trainer

ROWS = tiny_rows(12)
FIELDS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "save_strategy": "steps",
    "save_steps": 1,
}
BAD_CALL = 6  # the second micro-batch of the third step: rows 10 and 11


def spoil(monkeypatch, side, call=BAD_CALL, value=float("nan")):
    """One micro-batch of the run has a bad loss, or a good loss with a bad gradient."""
    fused, calls = same_vocabulary.fused_linear_loss, []

    def spoiled(row_loss, student_hidden, *args, **options):
        calls.append(None)
        is_due = len(calls) == call
        if is_due and side == "gradient":
            student_hidden.register_hook(lambda grad: torch.full_like(grad, value))
        loss, values = fused(row_loss, student_hidden, *args, **options)
        return (loss * value if is_due and side == "loss" else loss), values

    monkeypatch.setattr(same_vocabulary, "fused_linear_loss", spoiled)


def spoil_teacher(trainer, call=BAD_CALL, value=float("inf")):
    hidden_rows, calls = trainer.teacher.hidden_rows, []

    def spoiled(inputs):
        calls.append(None)
        hidden = hidden_rows(inputs)
        if len(calls) == call:
            hidden = hidden.clone()
            hidden[1, 2] = value
        return hidden

    trainer.teacher.hidden_rows = spoiled


def weights_of(trainer):
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("side", "words", "rows"),
    [
        ("loss", "the student's loss", "10, 11"),
        ("teacher", "the teacher's hidden states", "10, 11"),
        ("gradient", "the student's gradient", "8, 9, 10, 11"),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_nonfinite_value_stops_before_the_step_with_step_side_and_rows(
    side, words, rows, max_grad_norm, tmp_path, monkeypatch
):
    quiet = make_trainer(tmp_path / "quiet", ROWS, **(FIELDS | {"max_steps": 2}))
    quiet.train()
    fields = FIELDS | {"max_grad_norm": max_grad_norm, "save_total_limit": 1}
    trainer = make_trainer(tmp_path / "run", ROWS, **fields)
    if side == "teacher":
        spoil_teacher(trainer)
    else:
        spoil(monkeypatch, side)
    with pytest.raises(NonFiniteError, match=f"step 3 .*{words}, dataset rows {rows};"):
        trainer.train()
    for name, weight in trainer.model.state_dict().items():
        assert torch.isfinite(weight).all(), name
        if max_grad_norm:
            assert torch.equal(weight, quiet.model.state_dict()[name]), name
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in saved.values())


@pytest.mark.parametrize("side", ["loss", "gradient"])
def test_skipped_step_leaves_weights_as_they_were_and_is_counted(side, tmp_path, monkeypatch):
    """The second of three steps is left out; the log's means are those of the others."""
    fields = FIELDS | {"save_strategy": "no", "logging_steps": 3, "learning_rate": 0.0}
    clean = make_trainer(tmp_path, ROWS, **(fields | {"logging_steps": 1}))
    clean.train()
    losses = losses_of(clean)
    spoil(monkeypatch, side, call=4)
    trainer = make_trainer(tmp_path, ROWS, on_nonfinite="skip", **fields)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["nonfinite_steps"] == 1
    assert entry["loss"] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-6)
    assert entry["off_policy_loss"] == pytest.approx(entry["loss"], rel=0.2)
    assert trainer.state.global_step == 3


def test_skipped_steps_do_not_move_the_optimizer(tmp_path, monkeypatch):
    spoil(monkeypatch, "loss", call=2)
    trainer = make_trainer(tmp_path, ROWS, on_nonfinite="skip", **(FIELDS | {"max_steps": 1}))
    before = weights_of(trainer)
    trainer.train()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert not trainer.optimizer.state


def test_teacher_of_another_family_is_watched_too(tmp_path):
    """Three micro-batches of one row: the second has NaN in one hidden state of its teacher."""
    trainer, _ = cross_trainer(
        tmp_path,
        rows_of("lfm2_vl"),
        *make_sides("lfm2_vl", "qwen3_vl"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )
    spoil_teacher(trainer, call=2, value=float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1 .*teacher's hidden states, dataset rows 1;"):
        trainer.train()


def test_weights_that_are_nan_already_end_a_run_that_skips(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, on_nonfinite="skip", **FIELDS)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="student's weights"):
        trainer.train()


def test_nonfinite_weights_are_never_saved(tmp_path):
    trainer = make_trainer(tmp_path, ROWS)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="was not written"):
        trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_value_is_found_and_large_ones_are_not_bad(dtype):
    values = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert not is_bad(values) and not is_bad(values[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        values[1, 3] = bad
        assert is_bad(values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "must not set dispatch_batches"),
        ({"accelerator_config": '{"dispatch_batches": true}'}, "must not set dispatch_batches"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics must be empty"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics must be empty"),
        ({"enable_jit_checkpoint": True}, "SIGTERM already ends a run"),
        ({"label_names": ["labels"]}, "label_names must be None, got .'labels'.; labels are"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics must be False, got True"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end must be False without eval"),
        ({"torch_compile": True}, "torch_compile must be False.*set compile_models"),
        ({"use_liger_kernel": True}, "use_liger_kernel must be False.*compile_models='regional'"),
        ({"torch_compile_backend": "inductor"}, "torch_compile must be False"),
    ],
)
def test_fields_that_would_fail_deep_inside_a_run_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GOLDConfig(**fields)


def test_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="on_nonfinite must be 'error' or 'skip', got 'ignore'"):
        GOLDConfig(on_nonfinite="ignore")
