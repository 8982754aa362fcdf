"""The generalized JSD of trl's GKDTrainer and GOLDTrainer, patched and not."""

import itertools
import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from torch import nn
from trl.experimental.gkd import GKDTrainer

from gold_kernels.engine.logit_form import LogitForm
from gold_kernels.integrations.trl import patch_trl
from gold_kernels.integrations.trl.pending import PendingLogits
from support import logit_forms
from support.tiny_models import tiny, tiny_rows
from support.trl_trainers import (
    LargestTensor,
    assert_no_logits_are_made,
    assert_same_losses,
    batch_of,
    build,
    logs,
    losses,
    patched,
)

KINDS = ("gkd", "gold")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_losses_and_gradients_are_those_of_trl(kind, beta, tmp_path):
    assert_same_losses(build(kind, tmp_path, beta=beta, temperature=0.7), chunk_size=5)


@pytest.mark.parametrize("num_items", [13, torch.tensor(13)])
def test_items_of_the_global_batch_divide_the_sum(num_items, tmp_path):
    trainer = build("gold", tmp_path)
    assert_same_losses(trainer, num_items=num_items)


@pytest.mark.parametrize("name", ["Gemma2", "Cohere"])
def test_softcaps_and_scales_are_the_models_own(kind, name, tmp_path):
    models = logit_forms.pair(name)
    trainer = build(kind, tmp_path, models, "llama", dtype=torch.float32)  # Gemma's need it
    assert_same_losses(trainer, tolerance=2e-5)


def phi(width):
    """Phi's head has a bias."""
    tokenizer = tiny("llama")[1]
    torch.manual_seed(width)
    config = transformers.PhiConfig(
        vocab_size=384,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")},
    )
    model = transformers.PhiForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


def test_biases_of_heads_are_used(kind, tmp_path):
    models = phi(32), phi(64)
    trainer = build(kind, tmp_path, models, "llama")
    assert_same_losses(trainer)
    assert trainer.model.lm_head.bias.grad is not None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_prompts_are_not_scored(kind, side, tmp_path):
    trainer = build(kind, tmp_path, per_device_train_batch_size=3)
    batch = batch_of(trainer)
    if side == "right":
        firsts = batch["attention_mask"].int().argmax(1).tolist()
        for name in ("input_ids", "attention_mask", "labels"):
            rows = zip(batch[name], firsts, strict=True)
            batch[name] = torch.stack([row.roll(-first) for row, first in rows])
    is_padding = batch["attention_mask"] == 0
    assert is_padding.any() and (batch["labels"][is_padding] == -100).all()
    assert_same_losses(trainer, batch)


def test_batch_without_labels_has_loss_zero_and_a_graph(kind, tmp_path):
    trainer = build(kind, tmp_path)
    batch = batch_of(trainer)
    batch["labels"].fill_(-100)
    _, ours = losses(trainer, batch)
    assert all(float(value.abs().sum()) == 0 for value in ours.values())
    assert len(ours) > 5


PEFT = {
    "LoRA": {"target_modules": ["q_proj"], "r": 2},
    "a trained copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fields", PEFT.values(), ids=PEFT)
def test_adapters_learn_as_in_trl(kind, fields, tmp_path, recwarn):
    trainer = build(kind, tmp_path, family="llama", peft_config=LoraConfig(**fields))
    assert_same_losses(trainer)
    assert not [w for w in recwarn if "patch_trl" in str(w.message)]


def test_pictures_go_through_both_models(tmp_path):
    rows = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}
        for row in tiny_rows(4, images=1)
    ]
    trainer = build("gold", tmp_path, family="qwen3_vl", rows=rows, dtype=torch.float32)
    assert_same_losses(trainer, tolerance=3e-5)


RUNS = {
    "off-policy, accumulated": {"gradient_accumulation_steps": 2},
    "on-policy": {"lmbda": 1.0, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_run_logs_what_trl_logs(kind, options, tmp_path):
    length = {"max_new_tokens" if kind == "gkd" else "max_completion_length": 8}
    theirs, ours = logs(lambda folder: build(kind, tmp_path / folder, **options, **length))
    for expected, actual in itertools.zip_longest(theirs, ours):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_evaluation_is_that_of_trl(kind, tmp_path):
    trainer = build(kind, tmp_path, eval_dataset=Dataset.from_list(tiny_rows(3)))
    values = []
    for is_patched in (False, True):
        with patched(is_patched):
            values.append(trainer.evaluate()["eval_loss"])
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_bf16_autocast_computes_the_head_in_bf16(tmp_path):
    """Under mixed precision weights are float32 and the head's product is bf16."""
    trainer = build("gold", tmp_path, dtype=torch.float32, bf16=True)
    trainer.model = trainer.accelerator.prepare_model(trainer.model)
    theirs, ours = losses(trainer)
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-2)


def test_no_logits_of_a_batch_are_made(kind, tmp_path):
    models = tiny("qwen3")[0], tiny("qwen3", "teacher")[0]
    for model in models:
        model.resize_token_embeddings(4096)
    options = {"rows": tiny_rows(12), "per_device_train_batch_size": 12, "dtype": torch.float32}
    trainer = build(kind, tmp_path, models, **options)
    assert_no_logits_are_made(trainer, chunk_size=16)


class OwnHead(nn.Module):
    """No nn.Linear, as heads with an adapter and quantised heads are none."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden):
        return hidden @ self.weight.T


def test_head_of_another_kind_keeps_the_loss_of_trl_and_says_so(kind, tmp_path):
    trainer = build(kind, tmp_path, family="llama")
    trainer.model.lm_head = OwnHead(trainer.model.lm_head)
    with pytest.warns(UserWarning, match="patch_trl: .* full logits, because of the head OwnHead"):
        assert_same_losses(trainer)
    with patch_trl(), warnings.catch_warnings(record=True) as told:
        trainer.compute_loss(trainer.model, batch_of(trainer))
    assert not [warning for warning in told if "full logits" in str(warning.message)], "once"


def test_a_compiled_model_keeps_the_loss_of_trl(tmp_path):
    trainer = build("gold", tmp_path)
    batch = batch_of(trainer)
    num_logits = batch["labels"].numel() * trainer.model.config.vocab_size
    for is_compiled in (False, True):
        trainer.args.torch_compile = is_compiled
        trainer.model.zero_grad()
        with patch_trl(), LargestTensor() as largest, torch.no_grad():
            trainer.compute_loss(trainer.model, dict(batch))
        assert (largest.numel >= num_logits) == is_compiled


def test_logits_of_another_form_keep_the_loss_of_trl_and_say_so(tmp_path):
    student, teacher = tiny("llama")[0], tiny("llama", "teacher")[0]

    class Squared(type(student)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits**2
            return output

    student.__class__ = Squared
    trainer = build("gold", tmp_path, (student, teacher), "llama")
    with pytest.warns(UserWarning, match="because of logits that are something else"):
        assert_same_losses(trainer)


def test_virtual_tokens_keep_the_loss_of_trl(tmp_path):
    """They shift positions: trl's own loss fails on them, with its own error."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = build("gkd", tmp_path, peft_config=config)
    with patch_trl(), pytest.raises((IndexError, RuntimeError)), pytest.warns(UserWarning):
        trainer.compute_loss(trainer.model, batch_of(trainer))


def test_logits_that_are_asked_for_are_those_of_trl(kind, tmp_path):
    trainer = build(kind, tmp_path)
    batch = batch_of(trainer)
    with patch_trl():
        _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    expected = trainer.model(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(outputs.logits, expected)


def test_a_subclass_with_a_loss_of_its_own_keeps_it(tmp_path):
    trainer = build("gkd", tmp_path)

    class Own(GKDTrainer):
        @staticmethod
        def generalized_jsd_loss(student_logits, teacher_logits, **options):
            return (student_logits - teacher_logits).abs().mean()

    trainer.__class__ = Own
    assert_same_losses(trainer)


def test_logits_that_a_caller_holds_go_to_trl():
    logits = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    for options in ({}, {"labels": labels}, {"reduction": "none"}, {"beta": 0.0, "labels": labels}):
        expected = GKDTrainer.generalized_jsd_loss(*logits, **options)
        with patch_trl():
            assert torch.equal(GKDTrainer.generalized_jsd_loss(*logits, **options), expected)


def test_logits_of_other_positions_than_the_labels_are_refused():
    """Positions were counted through both, and rows of other tokens taken."""
    head = nn.Linear(8, 7, bias=False)
    long, short = (
        PendingLogits(torch.randn(2, size, 8), head, LogitForm(), None) for size in (4, 3)
    )
    for sides in ((long, short), (short, long)):
        with patch_trl(), pytest.raises(ValueError, match=r"positions must be the same \(B, L\)"):
            GKDTrainer.generalized_jsd_loss(*sides, torch.ones(2, 3, dtype=torch.int64))
