"""The stable DistillationTrainer of trl, patched and not."""

import itertools

import pytest
import torch
from peft import LoraConfig
from trl.trainer import distillation_trainer

from gold_kernels.integrations.trl import patch_trl
from support import logit_forms
from support.trl_trainers import LargestTensor, assert_equal, build, logs

CASES = {
    "forward KL": {"beta": 0.0},
    "reverse KL": {"beta": 1.0},
    "uneven mixture": {"beta": 0.3},
    "temperature": {"temperature": 0.7},
    "mean over what is here": {"num_items_in_batch": None},
    "a number of items": {"num_items_in_batch": 17},
    "items on the device": {"num_items_in_batch": torch.tensor(17.0)},
    "scales": {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
    "softcap of both": {
        "student_final_logit_softcapping": 2.0,
        "teacher_final_logit_softcapping": 3.0,
        "student_logit_scale": 1.5,
    },
    "softcap of one": {"teacher_final_logit_softcapping": 1.5},
    "biases": {"student_lm_head_bias": True, "teacher_lm_head_bias": True},
    "bias of one": {"student_lm_head_bias": True},
}


def tensors(dtype=torch.float32, num_entries=50):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    student = normal(3, 5, 8).requires_grad_(), normal(num_entries, 8).requires_grad_()
    teacher = normal(3, 5, 12), normal(num_entries, 12)
    return (student[0], teacher[0], student[1], teacher[1], mask), normal(2, num_entries)


def evaluate(function, given, biases, beta=0.5, **options):
    """Values and gradients of a function of 14 arguments."""
    leaves = {"hidden": given[0], "weight": given[2]}
    for name, bias in zip(("student_lm_head_bias", "teacher_lm_head_bias"), biases, strict=True):
        if options.pop(name, False):
            options[name] = bias.clone().requires_grad_(name.startswith("student"))
    if "student_lm_head_bias" in options:
        leaves["bias"] = options["student_lm_head_bias"]
    for leaf in leaves.values():
        leaf.grad = None
    loss, entropy, num_valid = function(*given, beta, **options)
    (3 * loss).backward()
    values = {"loss": loss.detach(), "entropy": entropy.detach(), "valid": num_valid}
    return values | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_losses_entropies_and_gradients_are_those_of_trl(options):
    given, biases = tensors()
    theirs = evaluate(distillation_trainer._chunked_divergence_loss, given, biases, **options)
    with patch_trl(chunk_size=4):
        ours = evaluate(distillation_trainer._chunked_divergence_loss, given, biases, **options)
    assert float(theirs["loss"]) > 1e-2
    assert ours["valid"] == theirs["valid"] == 7
    assert_equal(ours, theirs, tolerance=1e-5)


@pytest.mark.parametrize("num_items", [None, 5])
def test_a_rank_without_scored_tokens_has_loss_zero_and_a_gradient(num_items):
    given, biases = tensors()
    given[-1].zero_()
    with patch_trl():
        ours = evaluate(
            distillation_trainer._chunked_divergence_loss,
            given,
            biases,
            num_items_in_batch=num_items,
        )
    assert all(float(value.abs().sum()) == 0 for value in ours.values())


def test_states_of_other_positions_than_the_mask_are_refused():
    """Positions were counted through both, and rows of other tokens taken."""
    given, _ = tensors()
    for place, cut in itertools.product((0, 1), (lambda t: t[:, 1:], lambda t: t[1:])):
        wrong = [cut(t) if place == i else t for i, t in enumerate(given)]
        with patch_trl(), pytest.raises(ValueError, match=r"positions must be the same \(B, L\)"):
            distillation_trainer._chunked_divergence_loss(*wrong, 0.5)


def test_flat_rows_are_taken_as_in_trl():
    given, _ = tensors()
    flat = [t.flatten(0, 1) for t in (*given[:2], given[4])]
    with patch_trl():
        rows = distillation_trainer._chunked_divergence_loss(*flat[:2], *given[2:4], flat[2], 0.5)
        batch = distillation_trainer._chunked_divergence_loss(*given, 0.5)
    assert all(map(torch.equal, rows, batch))


def test_frozen_head_gets_no_gradient():
    given, _ = tensors()
    given[2].requires_grad_(False)
    with patch_trl():
        loss, *_ = distillation_trainer._chunked_divergence_loss(*given, 0.5)
    loss.backward()
    assert given[2].grad is None and given[0].grad is not None


def test_float32_head_is_computed_in_the_dtype_of_bf16_hidden_states_as_in_trl():
    """Of a gathered float32 weight under mixed precision."""
    given, biases = tensors()
    hidden = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in given[:2]]
    given = (*hidden, *given[2:])
    theirs = evaluate(distillation_trainer._chunked_divergence_loss, given, biases)
    with patch_trl():
        ours = evaluate(distillation_trainer._chunked_divergence_loss, given, biases)
    assert ours["weight"].dtype == torch.float32
    assert_equal(ours, theirs, tolerance=2e-2)  # bf16 has 8 bits


def test_only_scored_rows_and_a_chunk_of_them_become_logits():
    given, _ = tensors(num_entries=5000)
    with patch_trl(chunk_size=2), LargestTensor() as largest:
        loss, *_ = distillation_trainer._chunked_divergence_loss(*given, 0.5)
        loss.backward()
    assert largest.numel <= given[3].numel() < 7 * 5000 * 12


MODELS = {
    "qwen3": {},
    "Gemma2": {"beta": 0.5, "temperature": 0.8},
    "Cohere": {"beta": 0.0},
}


@pytest.mark.parametrize("name", MODELS)
def test_run_of_the_trainer_logs_what_trl_logs(name, tmp_path):
    def make(folder):
        if name == "qwen3":
            options = {"peft_config": LoraConfig(target_modules=["q_proj"], r=2)}
            return build("distillation", tmp_path / folder, **options, **MODELS[name])
        models = logit_forms.pair(name)
        return build("distillation", tmp_path / folder, models, "llama", **MODELS[name])

    theirs, ours = logs(make)
    assert len(theirs) == 3 and theirs[0]["entropy"] > 0.1
    assert_same_logs(theirs, ours)


def test_accumulation_over_micro_batches_is_that_of_trl(tmp_path):
    theirs, ours = logs(
        lambda folder: build("distillation", tmp_path / folder, gradient_accumulation_steps=2)
    )
    assert_same_logs(theirs, ours)


def assert_same_logs(theirs, ours):
    for expected, actual in itertools.zip_longest(theirs, ours):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)
