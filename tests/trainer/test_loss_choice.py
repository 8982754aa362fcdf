"""Losses of gold_kernels.losses in training, by name: loss and gradients are those of an eager
float64 step, with and without cross-entropy, and the log says what was computed.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from gold_kernels.engine.row_loss import ROW_LOSSES
from gold_kernels.losses import LOSSES, FormulaLoss
from gold_trainer.objectives import cross_tokenizer, same_vocabulary
from support.cross_cases import cross_trainer, make_sides, rows_of
from support.eager_step import completion_of, eager_step
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import (
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
)

ROWS = tiny_rows(4, images="mixed")


def skew_kl(alpha):
    def rows(student_logits, teacher_logits):
        p, q = teacher_logits.softmax(-1), student_logits.softmax(-1)
        return (p * (p.log() - (alpha * p + (1 - alpha) * q).log())).sum(-1)

    return rows


def total_variation(student_logits, teacher_logits):
    return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2


def step(tmp_path, rows=ROWS, **fields):
    """A trainer after one step, and its gradients."""
    recorder = GradientRecorder()
    trainer = make_trainer(tmp_path, rows, callbacks=[recorder], **fields)
    trainer.train()
    return trainer, recorder.gradients


def expected_step(rows=ROWS, **options):
    (student, processor), (teacher, _) = tiny("qwen3_vl"), tiny("qwen3_vl", "teacher")
    completions = [completion_of("qwen3_vl", processor, row) for row in rows]
    return eager_step(student, teacher, processor, rows, completions, **options)


def assert_equals(trainer, gradients, expected):
    assert losses_of(trainer)[0] == pytest.approx(expected[0], rel=1e-5)
    gradients = {name: gradients[name].double() for name in expected[1]}
    assert_equal_gradients(gradients, expected[1], relative=1e-4)


@pytest.mark.parametrize(
    ("fields", "row_loss"),
    [
        ({"loss": "skew_kl"}, skew_kl(0.1)),
        ({"loss": "skew_kl", "loss_kwargs": {"alpha": 0.3}}, skew_kl(0.3)),
        ({"loss": "total_variation"}, total_variation),
    ],
)
def test_loss_by_name_equals_the_eager_step(fields, row_loss, tmp_path):
    fields = {"max_completion_length": 64} | fields
    assert_equals(*step(tmp_path, **fields), expected_step(row_loss=row_loss))


@pytest.mark.parametrize("weights", [(1.0, 0.3), (0.5, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("loss", ["jsd", "total_variation"])
def test_cross_entropy_is_part_of_the_loss_and_of_the_log(loss, weights, tmp_path):
    row_loss = total_variation if loss == "total_variation" else None
    fields = {"distillation_weight": weights[0], "crossentropy_weight": weights[1]}
    trainer, gradients = step(tmp_path, loss=loss, max_completion_length=64, **fields)
    expected = expected_step(row_loss=row_loss, weights=weights)
    assert_equals(trainer, gradients, expected)
    entry = trainer.state.log_history[0]
    assert entry["crossentropy"] == pytest.approx(expected_step(weights=(0.0, 1.0))[0], rel=1e-5)
    if weights[0]:
        alone = expected_step(row_loss=row_loss)[0]
        assert entry[f"{loss}_loss"] == pytest.approx(alone, rel=1e-5)
    else:  # not computed
        assert not {f"{loss}_loss", "student_entropy", "forward_kl"} & set(entry)
    assert entry["off_policy_loss"] == pytest.approx(expected[0], rel=1e-5)


def test_cross_entropy_does_not_depend_on_how_the_batch_is_split(tmp_path):
    fields = {"crossentropy_weight": 0.5, "distillation_weight": 2.0}
    whole, expected = step(tmp_path, per_device_train_batch_size=4, **fields)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer, gradients = step(tmp_path, **split, **fields)
    assert losses_of(trainer) == pytest.approx(losses_of(whole), rel=1e-5)
    assert_equal_gradients(gradients, expected)
    names = ("jsd_loss", "crossentropy", "student_entropy")
    logs = [run.state.log_history[0] for run in (trainer, whole)]
    values = [[entry[name] for name in names] for entry in logs]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluation_has_the_cross_entropy_for_any_batch_size(batch_size, tmp_path):
    trainer = make_trainer(
        tmp_path,
        ROWS,
        eval_rows=ROWS,
        per_device_eval_batch_size=batch_size,
        crossentropy_weight=0.5,
        max_completion_length=64,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected_step(weights=(1.0, 0.5))[0], rel=1e-5)
    parts = metrics["eval_jsd_loss"] + 0.5 * metrics["eval_crossentropy"]
    assert metrics["eval_loss"] == pytest.approx(parts, rel=1e-6)


def test_cross_entropy_is_not_taken_on_what_the_student_wrote(tmp_path):
    """lmbda = 1: the gradient is that of the distillation alone."""
    fields = {"lmbda": 1.0, "max_completion_length": 8, "seed": 3}
    with_weight, gradients = step(tmp_path, crossentropy_weight=0.5, **fields)
    without, expected = step(tmp_path, **fields)
    assert losses_of(with_weight) == losses_of(without)
    assert_equal_gradients(gradients, expected, relative=1e-6)
    entry = with_weight.state.log_history[0]
    assert entry["crossentropy"] == 0 and entry["jsd_loss"] == pytest.approx(entry["loss"])


def test_log_has_the_row_values_of_the_loss_and_no_others(tmp_path):
    entry = step(tmp_path, loss="total_variation")[0].state.log_history[0]
    assert not {"crossentropy", "total_variation_loss", "forward_kl", "jsd_loss"} & set(entry)
    own = set(LOSSES["total_variation"].value_names) - {"cross_entropy"}
    assert own <= set(entry)


@pytest.mark.parametrize("across", [False, True])
def test_memory_backend_and_type_of_the_logits_reach_the_loss(across, tmp_path, monkeypatch):
    calls = []
    owner = cross_tokenizer.CrossTokenizer if across else same_vocabulary
    name = "function" if across else "fused_linear_loss"
    loss = getattr(owner, name)

    def record(*args, **options):
        calls.append(options)
        return loss(*args, **options)

    monkeypatch.setattr(owner, name, staticmethod(record) if across else record)
    fields = {"loss_budget_mib": 0.5, "logits_dtype": "bfloat16", "loss_backend": "torch"}
    fields |= {"max_completion_length": 64, "max_steps": 1}
    if across:
        student, teacher = make_sides("llama", "qwen3")
        trainer, _ = cross_trainer(tmp_path, rows_of("llama"), student, teacher, **fields)
        trainer.train()
    else:
        trainer, _ = step(tmp_path, **fields)
    (options,) = calls
    assert options["budget_bytes"] == 2**19 and options["backend"] == "torch"
    assert options["logits_dtype"] == torch.bfloat16
    assert losses_of(trainer)[0] > 0


def test_fast_mode_is_close_and_not_equal(tmp_path):
    precise = losses_of(step(tmp_path)[0])[0]
    fast = losses_of(step(tmp_path, logits_dtype="bfloat16")[0])[0]
    assert fast == pytest.approx(precise, rel=2e-2) and fast != precise


def test_budget_changes_neither_loss_nor_gradient(tmp_path):
    whole, expected = step(tmp_path)
    trainer, gradients = step(tmp_path, loss_budget_mib=0.1)
    assert losses_of(trainer) == pytest.approx(losses_of(whole), rel=1e-5)
    assert_equal_gradients(gradients, expected)


def test_teacher_has_a_temperature_of_its_own(tmp_path):
    def row_loss(student_logits, teacher_logits):
        return total_kl(student_logits / 2.0, teacher_logits / 0.5)

    def total_kl(student_logits, teacher_logits):
        log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    fields = {"beta": 0.0, "loss_temperature": 2.0, "loss_teacher_temperature": 0.5}
    actual = step(tmp_path, max_completion_length=64, **fields)
    assert_equals(*actual, expected_step(row_loss=row_loss))


def test_a_loss_in_a_file_of_its_own_trains_without_a_change_of_the_trainer(tmp_path, monkeypatch):
    """What a file in gold_kernels/losses does: a class with a name. LOSSES is filled from it."""
    monkeypatch.setitem(ROW_LOSSES, "power_gap", None)  # removed again after the test

    @dataclass(frozen=True)
    class PowerGap(FormulaLoss):
        power: float = 2.0
        name: ClassVar[str] = "power_gap"

        def entries(self, log_q, log_p, log_ratio):
            q, gap = log_q.exp(), log_q.exp() - log_p.exp()
            return gap.abs() ** self.power, self.power * gap.abs() ** (
                self.power - 1
            ) * gap.sign() * q

    def row_loss(student_logits, teacher_logits):
        return ((student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs() ** 3).sum(-1)

    monkeypatch.setitem(LOSSES, "power_gap", PowerGap)
    fields = {"loss": "power_gap", "loss_kwargs": {"power": 3.0}, "max_completion_length": 64}
    assert_equals(*step(tmp_path, **fields), expected_step(row_loss=row_loss))
