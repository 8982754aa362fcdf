"""Distillation across families through the real trainer: each side with its own tokenizer,
processor and chat template; the step equals the eager float64 step on full logits.
"""

import math
from copy import deepcopy

import pytest
import torch

from support.cross_cases import (
    aligned,
    aligner_of,
    assert_equals,
    assert_step_is_eager,
    by_position,
    completions_of,
    cross_trainer,
    eager_cross_step,
    make_sides,
    off_policy_parts,
    parts_of,
    rows_of,
    written_text,
)
from support.trainer_cases import losses_of, record_completions, recorded_warnings

PAIRS = (  # student, teacher: every family on either side
    ("lfm2_vl", "qwen3_vl"),
    ("smolvlm", "qwen3_vl"),
    ("idefics3", "lfm2_vl"),
    ("qwen2_5_vl", "gemma3"),
    ("gemma3", "llava"),
    ("llava", "idefics3"),
    ("qwen3_vl", "smolvlm"),
    ("lfm2_vl", "qwen2_5_vl"),
    ("llama", "qwen3"),
    ("qwen3", "llama"),
)
HYBRID = {"uld_use_hybrid_loss": True, "uld_crossentropy_weight": 0.3}
HYBRID_EAGER = {"is_hybrid": True, "crossentropy_weight": 0.3}


@pytest.mark.parametrize(
    ("student", "teacher", "is_hybrid"), [(*pair, i % 2 == 0) for i, pair in enumerate(PAIRS)]
)
def test_off_policy_step_equals_the_eager_float64_step(student, teacher, is_hybrid, tmp_path):
    sides, rows = make_sides(student, teacher), rows_of(student)
    fields, eager = (HYBRID, HYBRID_EAGER) if is_hybrid else ({}, {})
    with recorded_warnings() as messages:
        trainer = assert_step_is_eager(tmp_path, sides, rows, eager=eager, max_steps=2, **fields)
    assert messages == []
    assert len(losses_of(trainer)) == 2
    assert all(math.isfinite(loss) for loss in losses_of(trainer))


@pytest.mark.parametrize(
    ("student", "teacher", "is_hybrid"), [(*pair, i % 2 == 1) for i, pair in enumerate(PAIRS)]
)
def test_on_policy_step_equals_the_eager_step_on_what_was_sampled(
    student, teacher, is_hybrid, tmp_path
):
    """Random models write broken UTF-8: what cannot be aligned is left out, the rest is scored."""
    student, teacher = make_sides(student, teacher)
    rows = rows_of(student.family, count=6)
    before = student._replace(model=deepcopy(student.model))
    trainer, recorder = cross_trainer(
        tmp_path,
        rows,
        student,
        teacher,
        lmbda=1.0,
        max_completion_length=8,
        **(HYBRID if is_hybrid else {}),
    )
    sampled = record_completions(trainer, "student")
    trainer.train()
    del sampled[len(rows) :]  # of later steps
    assert all(math.isfinite(loss) for loss in losses_of(trainer))
    aligner = aligner_of(before, teacher)
    completions, alignments = parts_of(before, teacher, sampled, aligner)
    assert sum(alignment.num_groups for alignment in alignments) > 0
    # no cross-entropy on what the student wrote itself
    expected = eager_cross_step(before, teacher, rows, completions, alignments, is_hybrid=is_hybrid)
    assert_equals(trainer, recorder, expected)
    entry = trainer.state.log_history[0]
    assert entry["on_policy_loss"] == pytest.approx(entry["loss"], rel=1e-5)
    assert entry["skipped_no_common_end"] == sum(a.num_groups == 0 for a in alignments)


def test_cross_entropy_of_a_mixed_window_is_a_mean_over_its_off_policy_tokens(tmp_path):
    student, teacher = make_sides("llama", "qwen3")
    rows = rows_of("llama", count=6)
    before = student._replace(model=deepcopy(student.model))
    fields = {"lmbda": 0.5, "max_completion_length": 8, "max_steps": 1, "logging_steps": 1}
    batches = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer, recorder = cross_trainer(
        tmp_path,
        rows,
        student,
        teacher,
        train_sampling_strategy="sequential",
        **(fields | batches | HYBRID),
    )
    sources = [trainer.rollouts.source(0, micro_step) for micro_step in (0, 1)]
    assert sorted(sources) == ["dataset", "student"], "choose another seed"
    sampled = record_completions(trainer, "student")
    trainer.train()
    aligner = aligner_of(before, teacher)
    known, written = completions_of(before, rows), iter(sampled)
    has_labels = [sources[i // 3] == "dataset" for i in range(len(rows))]
    ids = [known[i] if has else next(written) for i, has in enumerate(has_labels)]
    completions = [(own, aligner.teacher_ids(own)) for own in ids]
    alignments = [aligner.align(*pair) for pair in completions]
    expected = eager_cross_step(
        before, teacher, rows, completions, alignments, has_labels=has_labels, **HYBRID_EAGER
    )
    assert_equals(trainer, recorder, expected)


@pytest.mark.parametrize(("student", "teacher"), PAIRS[:2])
def test_teacher_writes_and_the_student_learns_its_text_in_own_tokens(student, teacher, tmp_path):
    student, teacher = make_sides(student, teacher)
    rows = [{**row, "messages": row["messages"][:1]} for row in rows_of(student.family, count=4)]
    trainer, recorder = cross_trainer(
        tmp_path, rows, student, teacher, seq_kd=True, max_completion_length=8, max_steps=1
    )
    sampled = record_completions(trainer, "teacher")
    before = student._replace(model=deepcopy(student.model))
    trainer.train()
    aligner, reverse = aligner_of(student, teacher), aligner_of(teacher, student)
    reversed_pairs, _ = parts_of(teacher, student, sampled, reverse)
    completions = [(own, ids) for ids, own in reversed_pairs]
    texts = [written_text(teacher, ids, aligner.teacher)[0].encode() for ids in sampled]
    alignments = [aligned(aligner, *pair) for pair in zip(completions, texts, strict=True)]
    assert sum(alignment.num_groups for alignment in alignments) > 0
    for row in rows:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": ""}]
    expected = eager_cross_step(before, teacher, rows, completions, alignments)
    assert_equals(trainer, recorder, expected)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulation_changes_neither_loss_nor_gradient(accumulation, tmp_path):
    sides, rows = make_sides("lfm2_vl", "qwen3_vl"), rows_of("lfm2_vl", count=4)
    parts = off_policy_parts(*sides, rows)
    groups = [alignment.num_groups for alignment in parts[1]]
    assert len(set(groups)) > 1, "a mean of means would differ"
    batches = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    assert_step_is_eager(tmp_path, sides, rows, parts, HYBRID_EAGER, **batches, **HYBRID)


@pytest.mark.parametrize(
    "fields",
    [
        {"dataloader_num_workers": 1},
        {"gradient_checkpointing": True},
        {"chunk_size": 3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_how_a_step_is_computed_changes_nothing(fields, tmp_path):
    sides = make_sides("smolvlm", "qwen3_vl")
    assert_step_is_eager(tmp_path, sides, rows_of("smolvlm"), **fields)


@pytest.mark.parametrize("sides", [("right", "left"), ("left", "right")])
def test_padding_sides_may_differ_and_change_nothing(sides, tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    student.tokenizer.padding_side, teacher.tokenizer.padding_side = sides
    assert_step_is_eager(tmp_path, (student, teacher), rows_of("lfm2_vl"))


def test_bf16_autocast_is_close_to_float32(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    rows = rows_of("lfm2_vl")
    parts = off_policy_parts(student, teacher, rows)
    expected, gradients = eager_cross_step(student, teacher, rows, *parts, **HYBRID_EAGER)
    options = {"max_steps": 1, "bf16": True, "eval_rows": rows}
    trainer, recorder = cross_trainer(tmp_path, rows, student, teacher, **options, **HYBRID)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=2e-2)
    assert before == pytest.approx(losses_of(trainer)[0], rel=1e-3)
    names = [name for name in gradients if name in recorder.gradients]
    flat = [
        torch.cat([part[name].flatten().double() for name in names])
        for part in (recorder.gradients, gradients)
    ]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_options_reach_the_loss(tmp_path):
    sides, rows = make_sides("llama", "qwen3"), rows_of("llama")
    options = {
        "crossentropy_weight": 0.6,
        "distillation_weight": 1.5,
        "student_temperature": 1.25,
        "teacher_temperature": 0.75,
    }
    assert_step_is_eager(
        *(tmp_path, sides, rows),
        off_policy_parts(*sides, rows, aligner_of(*sides, has_end_of_turn=False)),
        {"is_hybrid": True, "weights": (0.7, 0.4), "beta": 0.2, **options},
        beta=0.2,
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=0.7,
        uld_hybrid_unmatched_weight=0.4,
        uld_skip_student_eos=True,
        **{f"uld_{name}": value for name, value in options.items()},
    )


def test_observed_merging_is_that_of_trl(tmp_path):
    sides, rows = make_sides("llama", "qwen3"), rows_of("llama")
    parts = off_policy_parts(*sides, rows, aligner_of(*sides, "observed"))
    assert_step_is_eager(tmp_path, sides, rows, parts, uld_token_merge_strategy="observed")


@pytest.mark.parametrize("skips", [False, True])
def test_plain_uld_pairs_tokens_by_position(skips, tmp_path):
    sides, rows = make_sides("llama", "qwen3"), rows_of("llama")
    completions, alignments = off_policy_parts(*sides, rows)
    parts = completions, by_position(completions, alignments, skips)
    fields = dict.fromkeys(("uld_skip_student_eos", "uld_skip_teacher_eos"), skips)
    assert_step_is_eager(tmp_path, sides, rows, parts, use_extended_uld=False, **fields)


def test_plain_uld_takes_what_a_student_sampled_beyond_its_tokens(tmp_path):
    student, teacher = make_sides("llama", "qwen3")
    trainer, _ = cross_trainer(tmp_path, rows_of("llama"), student, teacher, use_extended_uld=False)
    padded = student.model.get_output_embeddings().out_features - 1
    assert padded > len(student.tokenizer)
    text_ids = student.tokenizer("A red square.", add_special_tokens=False)["input_ids"]
    batch = trainer.data_collator([trainer.train_dataset[0]])
    sampled = batch.examples[0].with_completion([padded, *text_ids])
    batch = trainer.objective.collator.with_student_completions(batch, [sampled])
    teacher_ids, groups = batch.teacher_examples[0].written_ids, batch.alignment.groups
    num_pairs = min(1 + len(text_ids), len(teacher_ids))
    assert teacher.tokenizer.decode(teacher_ids) == "A red square."
    assert groups.num_groups == num_pairs
    assert groups.student_base_ids.tolist() == [padded, *text_ids][:num_pairs]
    spelled = student.tokenizer.decode(text_ids[: num_pairs - 1])
    assert groups.scored_bytes == len(spelled)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluation_is_a_mean_over_groups_for_any_batch_size(batch_size, tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    rows = rows_of("lfm2_vl", count=4)
    parts = off_policy_parts(student, teacher, rows)
    expected, _ = eager_cross_step(student, teacher, rows, *parts, **HYBRID_EAGER)
    trainer, _ = cross_trainer(
        tmp_path,
        rows,
        student,
        teacher,
        eval_rows=rows,
        per_device_eval_batch_size=batch_size,
        **HYBRID,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    part = metrics["eval_uld_loss"] + 0.3 * metrics["eval_crossentropy"]
    assert metrics["eval_loss"] == pytest.approx(part, rel=1e-6)
    num_tokens = sum(len(ids) for ids, _ in parts[0])
    num_groups = sum(alignment.num_groups for alignment in parts[1])
    assert metrics["eval_groups_per_token"] == pytest.approx(num_groups / num_tokens)
    assert metrics["eval_scored_bytes"] == 1
    assert 0 < metrics["eval_student_matched_mass"] < 1
    assert metrics["eval_matched_loss"] > 0 and metrics["eval_unmatched_loss"] > 0
    assert metrics["eval_skipped_unspelled"] == metrics["eval_skipped_no_common_end"] == 0


def test_evaluation_of_rows_that_the_teacher_completes_is_the_same_each_time(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    rows = [{**row, "messages": row["messages"][:1]} for row in rows_of("lfm2_vl", count=8)]
    trainer, _ = cross_trainer(
        tmp_path, rows, student, teacher, eval_rows=rows, seq_kd=True, max_completion_length=8
    )
    losses = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert losses[0] == losses[1] > 0
