"""Precision and checkpointing that nobody set are TRL's, where device and model can."""

import logging

import pytest
import torch
from peft import LoraConfig

from gold_trainer import GOLDConfig, precision
from gold_trainer.command_line import parse_arguments
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import make_trainer


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A device with bfloat16, as far as the choice goes; the config is then made without it."""
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize(
    ("fields", "environment", "is_bf16"),
    [
        ({}, {}, True),
        ({"fp16": True}, {}, False),
        ({"bf16": False}, {}, False),
        ({"use_cpu": True}, {}, False),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, False),
        ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, True),  # what accelerate launch sets anyway
    ],
)
def test_bf16_is_on_where_the_device_has_it_and_nothing_else_is_asked_for(
    fields, environment, is_bf16, on_a_gpu, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(GOLDConfig, "__post_init__", lambda self: None)
    config = GOLDConfig(**fields)
    precision.choose_precision(config)
    assert config.bf16 is is_bf16


def test_bf16_is_off_on_a_cpu(tmp_path):
    assert GOLDConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [None, True, False])
def test_checkpointing_is_on_unless_either_name_says_otherwise(name, value, tmp_path, recwarn):
    fields = {} if value is None else {name: value}
    config = GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **fields)
    assert config.gradient_checkpointing is config.activation_checkpointing is (value is not False)
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


def test_checkpointing_is_left_to_fsdp_where_that_has_its_own(tmp_path, monkeypatch):
    """Said by fsdp_config, which needs a launcher's processes beside it, or by the launcher."""
    config = GOLDConfig(output_dir=str(tmp_path), use_cpu=True)
    assert config.gradient_checkpointing is True
    config.fsdp_config = {"activation_checkpointing": True}
    precision.choose_checkpointing(config)
    assert config.gradient_checkpointing is False
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    config = GOLDConfig(output_dir=str(tmp_path), use_cpu=True)
    assert config.gradient_checkpointing is False


@pytest.mark.parametrize("how", ["config", "launcher"])
def test_fp16_which_a_cpu_has_not_is_refused(how, tmp_path, monkeypatch):
    if how == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    fields = {"fp16": True} if how == "config" else {}
    with pytest.raises(ValueError, match=r"fp16 needs a GPU, got a run on the CPU.*set bf16=True"):
        make_trainer(tmp_path, tiny_rows(4), "llama", **fields)


def test_bf16_without_a_gpu_that_has_it_is_refused_unless_the_run_is_the_cpu_s(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match=r"bf16 needs a GPU that has bfloat16.*set use_cpu=True"):
        GOLDConfig(output_dir=str(tmp_path), bf16=True)
    assert GOLDConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True).bf16
    assert GOLDConfig(output_dir=str(tmp_path)).bf16 is False


def test_flags_and_yaml_set_both(tmp_path):
    argv = ["--use_cpu", "--output_dir", str(tmp_path)]
    assert parse_arguments([*argv, "--bf16", "--gradient_checkpointing"])[2].bf16 is True
    _, _, config = parse_arguments([*argv, "--bf16", "false", "--gradient_checkpointing=no"])
    assert (config.bf16, config.gradient_checkpointing) == (False, False)


def test_model_that_has_no_checkpointing_trains_without(tmp_path, monkeypatch, caplog):
    student, processor = tiny("llama")
    monkeypatch.setattr(type(student), "supports_gradient_checkpointing", False)
    options = {"student": student, "processor": processor}
    with caplog.at_level(logging.INFO, "gold_trainer"):
        trainer = make(tmp_path, **options)
    assert not trainer.args.gradient_checkpointing
    assert "LlamaForCausalLM has no gradient checkpointing" in caplog.text
    with pytest.raises(ValueError, match=r"does not support .* checkpointing"):
        make(tmp_path, gradient_checkpointing=True, **options)


def make(folder, **options):
    fields = {"gradient_checkpointing": None} | options
    trainer = make_trainer(folder, tiny_rows(4), "llama", **fields)
    trainer.train()
    return trainer


def test_a_run_that_sets_nothing_computes_activations_again(tmp_path):
    trainer = make(tmp_path)
    assert trainer.model.is_gradient_checkpointing
    assert "loss" in trainer.state.log_history[0]


def test_weights_in_float16_are_trained_below_an_adapter_alone(tmp_path, monkeypatch):
    """SGD or Adam on them loses small updates; the first steps of a run went wrong without a word.
    FSDP and DeepSpeed keep weights of their own in float32.
    """
    rows = tiny_rows(4)

    def run(**more):
        student = tiny("qwen3")[0].to(torch.float16)
        return make_trainer(tmp_path, rows, "qwen3", student=student, **more)

    with pytest.raises(
        ValueError, match=r"trained must not be in float16, got .*; load .* float32"
    ):
        run()
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    assert run(peft_config=adapter).model.dtype == torch.float16
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    precision.refuse_trained_float16(
        GOLDConfig(output_dir=str(tmp_path), use_cpu=True), tiny("qwen3")[0].half()
    )
