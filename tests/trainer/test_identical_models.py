"""Student and teacher with the same weights through the trainer: nothing to learn with one
tokenizer, what the oracle says with two that cut the same bytes into other tokens.
"""

import json
from copy import deepcopy

import pytest
from tokenizers import models

from support.cross_cases import (
    TEACHER_MERGES,
    Side,
    assert_step_is_eager,
    by_position,
    cross_trainer,
    off_policy_parts,
    rows_of,
)
from support.eager_step import prompt_inputs
from support.tiny_models import tiny, tiny_processor
from support.trainer_cases import losses_of


def identical_sides(family: str) -> tuple[Side, Side]:
    model, processor = tiny(family)
    return Side(family, model, processor), Side(family, deepcopy(model), tiny_processor(family))


def cut_into_shorter_tokens(side: Side) -> None:
    """The same entries with the same ids, of which the longer ones no longer come up."""
    backend = side.tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"][:TEACHER_MERGES]]
    backend.model = models.BPE(vocab=model["vocab"], merges=merges)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_extended_uld": False},
        {"use_extended_uld": False, "uld_skip_student_eos": True, "uld_skip_teacher_eos": True},
        {},
        {"uld_use_hybrid_loss": True},
    ],
    ids=["positions", "positions_without_end", "groups", "hybrid"],
)
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llama"])
def test_identical_models_of_one_tokenizer_have_no_loss(family, fields, tmp_path):
    student, teacher = identical_sides(family)
    trainer, recorder = cross_trainer(tmp_path, rows_of(family), student, teacher, **fields)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry, gradients in zip(entries, recorder.steps, strict=True):
        assert entry["groups_per_token"] > 0.5
        assert abs(entry["loss"]) < 1e-6
        assert gradients and all(gradient.norm() < 1e-6 for gradient in gradients.values())


@pytest.mark.parametrize("is_extended", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "llama"])
def test_identical_models_of_two_tokenizers_have_the_loss_of_the_oracle(
    family, is_extended, tmp_path
):
    student, teacher = identical_sides(family)
    cut_into_shorter_tokens(teacher)
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    # The longer question. The other one is the same tokens on both sides: so are then the first
    # predictions, where the L1 distance has a kink and no one gradient.
    rows = rows_of(family, count=5)[::2]
    for row in rows:
        own, other = (prompt_inputs(side.processor, row) for side in (student, teacher))
        assert own["input_ids"].shape != other["input_ids"].shape
    completions, alignments = off_policy_parts(student, teacher, rows)
    assert all(len(own) < len(other) for own, other in completions)
    if not is_extended:
        alignments = by_position(completions, alignments, skips=False)
    parts, fields = (completions, alignments), {"use_extended_uld": is_extended}
    trainer = assert_step_is_eager(tmp_path, (student, teacher), rows, parts, **fields)
    assert losses_of(trainer)[0] > 0.01, "other tokens must make another loss"
