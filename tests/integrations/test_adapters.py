"""Adapters of axolotl, verl and ms-swift, on their contracts."""

import importlib
import sys

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from gold_kernels import fused_linear_jsd, jsd_loss
from gold_kernels.integrations.swift import patch_swift
from gold_kernels.integrations.verl import register_fused_jsd
from support import peer_contracts
from support.tiny_models import tiny


@pytest.fixture
def axolotl(monkeypatch):
    peer_contracts.axolotl(monkeypatch)
    monkeypatch.delitem(sys.modules, "gold_kernels.integrations.axolotl", raising=False)
    yield importlib.import_module("gold_kernels.integrations.axolotl")
    sys.modules.pop("gold_kernels.integrations.axolotl", None)


def axolotl_trainer(axolotl, tmp_path, student, **fields):
    teacher = tiny("qwen3", "teacher")[0]
    teacher.save_pretrained(tmp_path / "teacher")
    given = {"distillation_teacher": str(tmp_path / "teacher"), **fields}
    cfg = axolotl.DistillationArgs(**given)
    plugin = axolotl.DistillationPlugin()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (4, 9), generator=generator)
    rows = [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ids.tolist()]
    trainer = plugin.get_trainer_cls(cfg)(
        model=student,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
    )
    plugin.post_trainer_create(cfg, trainer)
    return trainer, teacher, ids


def test_axolotl_trains_on_the_mean_divergence_of_the_labels_tokens(axolotl, tmp_path):
    student = tiny("qwen3")[0]
    trainer, teacher, ids = axolotl_trainer(
        axolotl, tmp_path, student, distillation_beta=0.3, distillation_temperature=2.0
    )
    with torch.no_grad():
        logits = [
            model(input_ids=ids).logits[:, 2:-1].flatten(0, 1) for model in (student, teacher)
        ]
    expected = jsd_loss(*logits, beta=0.3, temperature=2.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_axolotl_counts_the_tokens_of_all_ranks_where_ddp_takes_their_mean(
    axolotl, tmp_path, monkeypatch
):
    trainer, _, ids = axolotl_trainer(axolotl, tmp_path, tiny("qwen3")[0])
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    losses = []
    for is_average, num_processes in ((True, 1), (True, 3), (False, 3)):
        trainer.args.average_tokens_across_devices = is_average
        monkeypatch.setattr(
            type(trainer.accelerator), "num_processes", property(lambda _, n=num_processes: n)
        )
        batch = {"input_ids": ids, "labels": ids.clone()}
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=96)
        losses.append(float(loss.detach()))
    assert losses[1:] == [pytest.approx(3 * losses[0]), pytest.approx(losses[0])]


def test_axolotl_finds_the_fields_and_leaves_other_runs_alone(axolotl):
    plugin = axolotl.DistillationPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    assert getattr(sys.modules[module], name) is axolotl.DistillationArgs
    assert plugin.get_trainer_cls(axolotl.DistillationArgs()) is None
    for field, value in (("beta", 0.0), ("temperature", 2.0), ("vocab_size", 9)):
        alone = axolotl.DistillationArgs(**{f"distillation_{field}": value})
        message = f"distillation_teacher is expected beside distillation_{field}, got .* name the"
        with pytest.raises(ValueError, match=message):
            plugin.get_trainer_cls(alone)


def test_axolotl_refuses_a_head_that_is_not_understood_by_name(axolotl, tmp_path):
    student = tiny("llama")[0]
    student.lm_head = nn.Sequential(student.lm_head)
    trainer = axolotl_trainer(axolotl, tmp_path, student)[0]
    with pytest.raises(ValueError, match="plain lm_head are expected, got the head Sequential"):
        trainer.train()


def test_axolotl_takes_heads_that_are_padded_differently(axolotl, tmp_path):
    """Their shared entries alone count, once they are named."""
    student = tiny("qwen3")[0]
    size = student.lm_head.out_features
    student.resize_token_embeddings(size + 128)
    with pytest.raises(ValueError, match=f"{size + 128} entries .* set distillation_vocab_size"):
        axolotl_trainer(axolotl, tmp_path, student)
    trainer, teacher, ids = axolotl_trainer(
        axolotl, tmp_path, student, distillation_vocab_size=size
    )
    with torch.no_grad():
        logits = [
            model(input_ids=ids).logits[:, 2:-1, :size].flatten(0, 1)
            for model in (student, teacher)
        ]
    expected = jsd_loss(*logits, beta=0.5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_verl_takes_heads_that_are_padded_differently(monkeypatch):
    registry = peer_contracts.verl(monkeypatch)
    heads = nn.Linear(8, 16), nn.Linear(12, 11)
    register_fused_jsd(*heads, vocab_size=11)
    student, teacher = torch.randn(1, 3, 8), torch.randn(1, 3, 12)
    losses, _ = registry["fused_jsd"](
        config=None,
        distillation_config=None,
        model_output={"student_hidden_states": student},
        data={"teacher_hidden_states": teacher, "response_mask": torch.ones(1, 3)},
    )
    logits = heads[0](student)[0, :, :11], heads[1](teacher)[0]
    torch.testing.assert_close(losses[0], jsd_loss(*logits, beta=0.0, reduction="none"))


def test_verl_gets_a_loss_for_every_response_token(monkeypatch):
    registry = peer_contracts.verl(monkeypatch)
    heads = nn.Linear(8, 11), nn.Linear(12, 11, bias=False)
    register_fused_jsd(*heads, beta=0.0, temperature=1.5)
    student, teacher = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 12)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    losses, metrics = registry["fused_jsd"](
        config=None,
        distillation_config=None,
        model_output={"student_hidden_states": student},
        data={"teacher_hidden_states": teacher, "response_mask": mask},
    )
    assert losses.shape == mask.shape and (losses[mask == 0] == 0).all()
    logits = [head(side)[mask.bool()] for head, side in zip(heads, (student, teacher), strict=True)]
    expected = jsd_loss(*logits, beta=0.0, temperature=1.5)
    torch.testing.assert_close(peer_contracts.aggregated(losses, mask), expected)
    assert metrics["distillation/fused_jsd"] == pytest.approx(float(expected), rel=1e-5)
    data = {"teacher_hidden_states": teacher, "response_mask": 0 * mask}
    none, metrics = registry["fused_jsd"](None, None, {"student_hidden_states": student}, data)
    assert not none.any() and metrics == {"distillation/fused_jsd": 0}
    weights = torch.rand(2, 4)  # clamps, advantages and means are verl's
    (actual,) = torch.autograd.grad((losses.clamp(max=2.0) * weights)[mask.bool()].sum(), student)
    rows = jsd_loss(*logits, beta=0.0, temperature=1.5, reduction="none").clamp(max=2.0)
    (gradient,) = torch.autograd.grad((rows * weights[mask.bool()]).sum(), student)
    torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [{}, {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}])
def test_swift_trains_the_divergence_alone(weights, monkeypatch):
    """Also where a release passes no weights, which in Liger is half cross-entropy."""
    module = peer_contracts.swift(monkeypatch)
    given = torch.randn(5, 8), torch.randn(11, 8), torch.randn(5, 12), torch.randn(11, 12)
    labels = torch.tensor([1, -100, 2, 3, -100])
    with patch_swift():
        loss = peer_contracts.swift_call(
            peer_contracts.swift_loss(module, **weights), given, labels
        )
    rows = labels != -100
    hidden = given[0][rows], given[1], given[2][rows], given[3]
    expected = fused_linear_jsd(*hidden, beta=0.5, temperature=0.9)
    torch.testing.assert_close(loss, expected)


def test_swift_may_pass_numbers_by_place(monkeypatch):
    trainer = peer_contracts.swift(monkeypatch)
    with patch_swift():
        loss = trainer.LigerFusedLinearJSDLoss(0.0, 1.0, 0.25, 7, 2.0)
    assert (loss.row_loss.beta, loss.ignore_index, loss.row_loss.temperature) == (0.25, 7, 2.0)


def test_swift_gets_its_names_back(monkeypatch):
    liger = object()
    module = peer_contracts.swift(monkeypatch, LigerFusedLinearJSDLoss=liger)
    with patch_swift():
        assert module.LigerFusedLinearJSDLoss is not liger and module._liger_kernel_available
    assert module.LigerFusedLinearJSDLoss is liger and not module._liger_kernel_available


def test_swift_without_liger_has_no_name_of_it_left(monkeypatch):
    module = peer_contracts.swift(monkeypatch)
    assert not hasattr(module, "LigerFusedLinearJSDLoss")
    patch_swift().undo()
    assert not hasattr(module, "LigerFusedLinearJSDLoss")


def test_swift_of_another_layout_is_refused_by_name(monkeypatch):
    module = peer_contracts.swift(monkeypatch)
    del module._liger_kernel_available
    with pytest.raises(ValueError, match="_liger_kernel_available is expected, got another"):
        patch_swift()


def test_verl_refuses_states_of_other_positions_than_the_mask(monkeypatch):
    """Flat rows of (B, L + 1) states and a (B, L) mask are of other tokens."""
    registry = peer_contracts.verl(monkeypatch)
    register_fused_jsd(nn.Linear(8, 11), nn.Linear(12, 11))
    given = {"student_hidden_states": torch.randn(2, 5, 8)}
    data = {"teacher_hidden_states": torch.randn(2, 4, 12), "response_mask": torch.ones(2, 4)}
    message = r"the same \(B, L\) .* \(2, 4\) of response_mask, \(2, 5\) of student_hidden_states"
    with pytest.raises(ValueError, match=f"register_fused_jsd: .*{message}"):
        registry["fused_jsd"](None, None, model_output=given, data=data)


def test_axolotl_evaluates_and_refuses_a_batch_without_labels(axolotl, tmp_path):
    trainer, _, ids = axolotl_trainer(axolotl, tmp_path, tiny("qwen3")[0])
    metrics = trainer.evaluate(trainer.train_dataset)
    batch = {"input_ids": ids, "labels": ids.clone()}
    assert metrics["eval_loss"] > 0
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs["loss"] is loss
    with pytest.raises(ValueError, match=r"a batch with labels is expected.*got input_ids; choose"):
        trainer.compute_loss(trainer.model, {"input_ids": ids})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation_beta": 2.0}, r"DistillationPlugin: beta must be in \[0, 1\] .* got 2"),
        ({"distillation_temperature": 0.0}, "DistillationPlugin: temperature must be positive"),
        (
            {"distillation_vocab_size": 0},
            r"distillation_vocab_size must be in \[1, \d+\], .* got 0",
        ),
        ({"distillation_vocab_size": 10**6}, r"distillation_vocab_size must be in .* got 1000000"),
    ],
)
def test_axolotl_refuses_numbers_before_the_first_step(axolotl, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        axolotl_trainer(axolotl, tmp_path, tiny("qwen3")[0], **fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, r"register_fused_jsd: beta must be in \[0, 1\]"),
        ({"temperature": "1"}, "register_fused_jsd: temperature must be a number of Python"),
        ({"vocab_size": True}, "register_fused_jsd: vocab_size must be a whole number"),
        ({"teacher_head": None}, "the weight of teacher_head must be a tensor, got NoneType"),
    ],
)
def test_verl_refuses_numbers_and_heads_when_they_are_registered(options, message, monkeypatch):
    registry = peer_contracts.verl(monkeypatch)
    heads = {"student_head": nn.Linear(8, 11), "teacher_head": nn.Linear(12, 11)}
    with pytest.raises(ValueError, match=message):
        register_fused_jsd(**{**heads, **options})
    assert not registry
