"""GOLDTrainer's ULD of trl, patched and not: two tokenizers, whose groups have several tokens."""

import copy
import itertools

import pytest
import torch

from gold_kernels.integrations.trl import patch_trl
from gold_kernels.integrations.trl.uld import Side, find_groups
from support import logit_forms
from support.tiny_models import tiny, tiny_rows
from support.trl_trainers import (
    assert_equal,
    assert_no_logits_are_made,
    assert_same_losses,
    batch_of,
    build,
    logs,
    losses,
    patched,
    without_floor,
)

HYBRID = {"uld_use_hybrid_loss": True}
CASES = {
    "observed": {},
    "bayesian": {"uld_token_merge_strategy": "bayesian"},
    "by position": {"use_extended_uld": False},
    "by position, bayesian": {"use_extended_uld": False, "uld_token_merge_strategy": "bayesian"},
    "temperatures": {"uld_student_temperature": 3.0, "uld_teacher_temperature": 2.0},
    "with cross-entropy": {"uld_crossentropy_weight": 0.3, "uld_distillation_weight": 0.6},
    "bayesian, cross-entropy": {
        "uld_crossentropy_weight": 0.3,
        "uld_token_merge_strategy": "bayesian",
    },
    "with ends of turns": {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False},
    "hybrid": HYBRID,
    "hybrid, uneven beta": {**HYBRID, "beta": 0.2},
    "hybrid, bayesian": {**HYBRID, "uld_token_merge_strategy": "bayesian"},
    "hybrid, weights": {
        **HYBRID,
        "uld_hybrid_matched_weight": 0.7,
        "uld_hybrid_unmatched_weight": 0.2,
        "uld_crossentropy_weight": 0.5,
    },
    "hybrid, by position": {**HYBRID, "use_extended_uld": False},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_losses_gradients_and_metrics_are_those_of_trl(options, tmp_path):
    trainer = build("uld", tmp_path, per_device_train_batch_size=3, **options)
    batch = batch_of(trainer)
    with without_floor():
        assert_same_losses(trainer, batch, chunk_size=7)
    if "uld_use_hybrid_loss" in options:
        parts = []
        for is_patched in (False, True):
            with patched(is_patched), without_floor():
                trainer.compute_loss(trainer.model, dict(batch))
            loss_fn = trainer.uld_loss_fn
            parts.append((float(loss_fn.last_matched_loss), float(loss_fn.last_unmatched_loss)))
        assert parts[1] == pytest.approx(parts[0], rel=1e-9)
        assert min(parts[1]) > 1e-3


def test_some_groups_have_several_tokens_on_both_sides(tmp_path):
    """What the cases above rest on."""
    trainer = build("uld", tmp_path, per_device_train_batch_size=8)
    seen = []
    loss_fn = trainer.uld_loss_fn
    call = type(loss_fn).__call__

    def spy(self, **given):
        seen.append(given)
        return call(self, **given)

    type(loss_fn).__call__ = spy
    try:
        trainer.compute_loss(trainer.model, batch_of(trainer))
    finally:
        type(loss_fn).__call__ = call
    sides = [
        Side(*(seen[0][f"{name}_{key}"] for key in ("labels", "input_ids", "byte_offsets")))
        for name in ("student", "teacher")
    ]
    groups, counts = find_groups(loss_fn, *sides)
    assert sum(counts) == len(groups) and min(counts) > 2
    sizes = {(len(group.student), len(group.teacher)) for group in groups}
    assert {(1, 1), (2, 1), (2, 2)} <= sizes


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
@pytest.mark.parametrize("is_extended", [True, False])
def test_completion_at_the_first_position_is_scored_as_in_trl(merge, is_extended, tmp_path):
    """A prompt that was cut away: no position predicts the first token."""
    options = {"uld_token_merge_strategy": merge, "use_extended_uld": is_extended}
    trainer = build("uld", tmp_path, per_device_train_batch_size=2, **options)
    batch = batch_of(trainer)
    first = int((batch["labels"][0] != -100).int().argmax())
    for name in ("input_ids", "attention_mask", "labels", "byte_offsets"):
        batch[name] = batch[name].roll(-first, 1)
    assert batch["labels"][0, 0] != -100
    with without_floor():
        assert_same_losses(trainer, batch)


def test_sample_without_a_completion_counts_in_the_mean(tmp_path):
    trainer = build("uld", tmp_path, per_device_train_batch_size=3)
    batch = batch_of(trainer)
    batch["labels"][1] = -100
    with without_floor():
        assert_same_losses(trainer, batch)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_batch_without_completions_has_a_loss_of_zero_and_no_shape(weight, tmp_path):
    """trl returns shape (1,), and NaN with a cross-entropy."""
    trainer = build("uld", tmp_path, uld_crossentropy_weight=weight)
    batch = batch_of(trainer)
    batch["labels"].fill_(-100)
    with patch_trl():
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.shape == () and float(loss) == 0
    assert float(trainer.model.lm_head.weight.grad.abs().sum()) == 0


def test_softcaps_and_scales_are_the_models_own(tmp_path):
    student = logit_forms.build("Gemma2", "student", **logit_forms.FORMS["Gemma2"][0])
    models = student, tiny("qwen3", "teacher")[0]
    trainer = build("uld", tmp_path, models, "llama", "qwen3", dtype=torch.float32)
    assert_same_losses(trainer, tolerance=2e-5)


def test_vocabularies_that_match_in_full_compare_no_others(tmp_path):
    trainer = build("uld", tmp_path, teacher_family="qwen3", **HYBRID)
    size = len(trainer.uld_loss_fn._vocab_mapping)
    for model in (trainer.model, trainer.teacher_model):
        model.resize_token_embeddings(size)
    theirs, ours = losses(trainer)
    assert_equal(ours, theirs)
    assert trainer.uld_loss_fn.last_unmatched_loss == 0


def test_forward_kl_of_matched_entries_has_the_mass_that_trl_leaves_out(tmp_path):
    """Between parts of distributions a KL lacks sum q - sum p, and can be negative: trl's does."""
    options = {**HYBRID, "uld_hybrid_matched_weight": 1.0, "uld_hybrid_unmatched_weight": 0.0}
    trainer = build("uld", tmp_path, per_device_train_batch_size=1, beta=0.0, **options)
    theirs, ours = losses(trainer)
    assert float(ours["loss"]) >= 0
    assert abs(float(ours["loss"]) - float(theirs["loss"])) > 1e-4


def test_probabilities_below_1e_8_are_those_of_the_model(tmp_path):
    """trl raises those of the tokens that it multiplies, and of matched entries, to 1e-8, which
    cuts their gradients.
    """
    student = tiny("qwen3")[0]
    student.lm_head.weight.data *= 30
    models = student, tiny("llama", "teacher")[0]
    trainer = build("uld", tmp_path, models, per_device_train_batch_size=4, **HYBRID)
    batch = batch_of(trainer)
    theirs, ours = losses(trainer, batch)
    with without_floor():
        exact, _ = losses(trainer, batch)
    assert_equal(ours, exact)
    assert abs(float(theirs["loss"] - exact["loss"])) > 1e-6


def test_pictures_go_through_each_models_own_processor(tmp_path):
    rows = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}
        for row in tiny_rows(4, images=1)
    ]
    trainer = build("uld", tmp_path, None, "qwen3_vl", "lfm2_vl", rows=rows, dtype=torch.float32)
    assert_same_losses(trainer, tolerance=5e-5)


RUNS = {
    "off-policy, accumulated": {"gradient_accumulation_steps": 2, **HYBRID},
    "on-policy": {"lmbda": 1.0, "max_completion_length": 12},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_run_logs_what_trl_logs(options, tmp_path):
    student, tokenizer = tiny("qwen3")
    student.resize_token_embeddings(len(tokenizer))  # trl fails where a padded entry is sampled

    def make(folder):
        models = copy.deepcopy(student), tiny("llama", "teacher")[0]
        return build("uld", tmp_path / folder, models, **options)

    theirs, ours = logs(make)
    for expected, actual in itertools.zip_longest(theirs, ours):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1.1e-4)


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["extended", "hybrid"])
def test_no_logits_of_a_batch_are_made(options, tmp_path):
    models = tiny("qwen3")[0], tiny("llama", "teacher")[0]
    for model, size in zip(models, (4096, 2048), strict=True):
        model.resize_token_embeddings(size)
    rows = tiny_rows(6)
    options = {"per_device_train_batch_size": 6, "dtype": torch.float32, **options}
    trainer = build("uld", tmp_path, models, rows=rows, **options)
    assert_no_logits_are_made(trainer, chunk_size=8)


def test_logits_that_a_caller_holds_go_to_trl(tmp_path):
    loss_fn = build("uld", tmp_path).uld_loss_fn
    labels = torch.tensor([[-100, 3, 4, 5]])
    offsets = torch.tensor([[[0, 0], [0, 1], [1, 2], [2, 3]]])
    given = (torch.randn(1, 4, 7), torch.randn(1, 4, 9), labels, labels, labels, labels)
    expected = loss_fn(*given, offsets, offsets)
    with patch_trl():
        assert torch.equal(loss_fn(*given, offsets, offsets), expected)
