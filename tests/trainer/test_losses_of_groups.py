"""Losses across tokenizers beside ULD, through the real trainer: the step is the eager float64
step on full logits.
"""

import math

import pytest

from gold_kernels import VocabProjection, reference
from support.cross_cases import (
    assert_step_is_eager,
    cross_trainer,
    make_sides,
    rows_of,
)
from support.trainer_cases import losses_of

FIELDS = {
    "beta": 0.25,
    "uld_student_temperature": 1.5,
    "uld_teacher_temperature": 0.8,
    "uld_crossentropy_weight": 0.3,
}


def eager_projected(projection):
    def rows(student_logits, teacher_logits, alignment, weights):
        options = {"alignment": alignment, "beta": 0.25, "temperature": (1.5, 0.8)}
        return reference.projected_jsd(
            student_logits, teacher_logits, projection, weights.double(), **options
        )

    return rows


def eager_likelihood(student_logits, teacher_logits, alignment, weights):
    return reference.chunk_likelihood(
        *(student_logits, teacher_logits, alignment, weights.double()),
        beta=0.25,
        group_temperature=10.0,
        temperature=(1.5, 0.8),
    )


@pytest.mark.parametrize(("student", "teacher"), [("qwen3", "llama"), ("idefics3", "lfm2_vl")])
def test_the_chunk_likelihood_equals_the_eager_float64_step(student, teacher, tmp_path):
    sides, rows = make_sides(student, teacher), rows_of(student)
    eager = {"unit_loss": eager_likelihood, "crossentropy_weight": 0.3}
    fields = {"uld_loss_type": "chunk_likelihood", "uld_group_temperature": 10.0, **FIELDS}
    trainer = assert_step_is_eager(tmp_path, sides, rows, None, eager, **fields)
    assert all(math.isfinite(loss) for loss in losses_of(trainer))
    log = trainer.state.log_history[0]
    assert log["chunk_likelihood_loss"] > 0 and "uld_loss" not in log
    assert log["student_log_likelihood"] < 0 and log["teacher_log_likelihood"] < 0


@pytest.mark.parametrize(("student", "teacher"), [("qwen3", "llama"), ("lfm2_vl", "qwen3_vl")])
def test_the_projected_jsd_equals_the_eager_float64_step(student, teacher, tmp_path):
    sides, rows = make_sides(student, teacher), rows_of(student)
    projection = VocabProjection.from_tokenizers(*(side.tokenizer for side in sides))
    assert (projection.columns[:, 1] >= 0).any()
    eager = {"unit_loss": eager_projected(projection), "crossentropy_weight": 0.3}
    fields = {"uld_loss_type": "projected_jsd", **FIELDS}
    trainer = assert_step_is_eager(tmp_path, sides, rows, None, eager, **fields)
    log = trainer.state.log_history[0]
    assert log["projected_jsd_loss"] > 0 and 0 < log["teacher_projected_mass"] <= 1


def test_the_relaxed_overlap_reaches_the_hybrid_loss(tmp_path, monkeypatch):
    """The tiny tokenizers have no entries to relax: here the wider overlap is a smaller one."""

    def fewer(projection, exact):
        assert projection.student_vocab_size == exact.student_vocab_size
        return exact._replace(student_ids=exact.student_ids[:9], teacher_ids=exact.teacher_ids[:9])

    monkeypatch.setattr(VocabProjection, "relaxed_overlap", fewer)
    student, teacher = make_sides("qwen3", "llama")
    fields = {"uld_use_hybrid_loss": True, "uld_relaxed_overlap": True}
    trainer, _ = cross_trainer(tmp_path, rows_of("qwen3"), student, teacher, **fields)
    assert trainer.objective.overlap.num_matched == 9
    assert trainer.objective.options["overlap"] is trainer.objective.overlap
