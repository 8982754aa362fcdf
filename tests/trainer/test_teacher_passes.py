"""The teacher runs over more or fewer rows than a micro-batch has, and teaches the same."""

import pytest

from gold_trainer import GOLDConfig, refusals
from support.cross_cases import cross_trainer, make_sides
from support.tiny_models import tiny_rows
from support.trainer_cases import (
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
)

WINDOW = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2}
ROWS = tiny_rows(11, images="mixed")  # the second window is shorter
MERGED, SPLIT = [4, 2, 4, 1], [1, 1] * 5 + [1]


def run(folder, size, family="qwen3_vl", **fields):
    recorder = GradientRecorder()
    fields = WINDOW | fields | {"teacher_batch_size": size}
    if family == "two tokenizers":
        sides = make_sides("qwen3_vl", "smolvlm")
        trainer, recorder = cross_trainer(folder, ROWS, *sides, **fields)
    else:
        trainer = make_trainer(
            *(folder, ROWS, family), eval_rows=ROWS[:3], callbacks=[recorder], **fields
        )
    hidden_rows, sizes = trainer.teacher.hidden_rows, []

    def watched(inputs):
        sizes.append(len(inputs.examples))
        return hidden_rows(inputs)

    trainer.teacher.hidden_rows = watched
    trainer.train()
    return trainer, recorder, sizes


def assert_same(one, other):
    torch_losses = losses_of(one[0]), losses_of(other[0])
    assert torch_losses[0] == pytest.approx(torch_losses[1], rel=1e-5)
    for step, step_2 in zip(one[1].steps, other[1].steps, strict=True):
        assert_equal_gradients(step_2, step)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3_vl", {}),
        ("two tokenizers", {"max_completion_length": 8}),
        ("qwen3_vl", {"padding_free": True, "group_by_length": True}),
    ],
)
def test_passes_of_other_sizes_give_the_same_steps(family, fields, tmp_path):
    plain = run(tmp_path, None, family, **fields)
    merged = run(tmp_path, 4, family, **fields)
    assert plain[2] == [2, 2, 2, 2, 2, 1] and merged[2] == MERGED
    assert_same(plain, merged)
    assert not merged[0].inputs.passes.hidden, "each is used once"


def test_a_part_of_a_micro_batch_at_a_time(tmp_path):
    plain, split = run(tmp_path, None), run(tmp_path, 1)
    assert split[2] == SPLIT
    assert_same(plain, split)
    expected = plain[0].evaluate()["eval_loss"]
    assert split[0].evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert split[2][len(SPLIT) :] == [1, 1, 1]


def test_completions_that_are_written_in_the_run_are_seen_together(tmp_path):
    fields = {"lmbda": 1.0, "max_steps": 1, "num_generations": 3}
    plain, merged = run(tmp_path, None, **fields), run(tmp_path, 6, **fields)
    assert merged[2] == [6]
    assert_same(plain, merged)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_batch_size": 0}, "teacher_batch_size must be None or at least 1, got 0"),
        ({"teacher_batch_size": 3}, "multiple of it within a window.*got 3 with 2 and 3; set 2"),
        ({"teacher_batch_size": 8}, "multiple of it within a window.*got 8 with 2 and 3; set 6"),
        (
            {"teacher_batch_size": 4, "teacher_cache": "cache"},
            "teacher_batch_size must be None for a teacher that does not run here, got 4",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GOLDConfig(output_dir="runs/x", use_cpu=True, report_to="none", **WINDOW | fields)


def test_several_processes_run_the_teacher_as_often(monkeypatch):
    args = GOLDConfig(
        output_dir="runs/x", use_cpu=True, report_to="none", teacher_batch_size=1, **WINDOW
    )
    monkeypatch.setattr(GOLDConfig, "world_size", 2)
    with pytest.raises(ValueError, match="at least per_device_train_batch_size=2 with 2 processes"):
        refusals.refuse_split_teacher(args)
