"""Runs across families: saved, resumed, started from folders on the command line, and with a
SentencePiece teacher.
"""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from gold_trainer.__main__ import main
from support.cross_cases import (
    Side,
    aligner_of,
    assert_step_is_eager,
    completions_of,
    cross_trainer,
    make_sides,
    rows_of,
)
from support.tiny_models import tiny
from support.tokenizers_cases import TOKENIZERS
from support.trainer_cases import losses_of


def test_saved_student_has_its_own_processor(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    trainer, _ = cross_trainer(tmp_path, rows_of("lfm2_vl"), student, teacher)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(model) is type(student.model) and type(processor) is type(student.processor)
    assert processor.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    fields = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "max_completion_length": 6,
        "lmbda": 0.5,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer, _ = cross_trainer(
            tmp_path,
            rows_of("lfm2_vl", count=8),
            *make_sides("lfm2_vl", "qwen3_vl"),
            save_strategy="steps",
            save_steps=2,
            **fields,
        )
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    assert any("on_policy_loss" in e for e in runs[0].state.log_history)
    assert any("off_policy_loss" in e for e in runs[0].state.log_history)
    assert losses_of(runs[0]) == losses_of(runs[1]) and len(losses_of(runs[0])) == 4
    weights = runs[0].model.state_dict()
    for name, weight in runs[1].model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_command_line_trains_an_adapter_from_folders(tmp_path):
    """The shape of gold_vlm_cross.yaml: the teacher's processor is found where its weights are."""
    pytest.importorskip("peft")
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    for side, folder in ((student, "student"), (teacher, "teacher")):
        side.model.save_pretrained(tmp_path / folder)
        side.processor.save_pretrained(tmp_path / folder)
    rows = rows_of("lfm2_vl", count=4)
    lines = [json.dumps({"messages": row["messages"]}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    arguments = {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "run",
        "use_uld_loss": True,
        "uld_use_hybrid_loss": True,
        "use_peft": True,
        "max_steps": 2,
        "max_completion_length": 8,
        "max_length": 256,
        "use_cpu": True,
        "report_to": "none",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in arguments.items())]) == 0
    assert (tmp_path / "run" / "adapter_config.json").exists()
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert type(processor) is type(student.processor)


def test_sentencepiece_teacher_whose_end_of_turn_is_not_its_eos(tmp_path):
    tokenizer = TOKENIZERS["gemma"]()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    student = Side("qwen3", *tiny("qwen3"))
    teacher = Side("gemma3", transformers.LlamaForCausalLM(config).eval(), tokenizer)
    rows = rows_of("qwen3", count=4)
    aligner = aligner_of(student, teacher)
    completions = [(ids, aligner.teacher_ids(ids)) for ids in completions_of(student, rows)]
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end != tokenizer.eos_token_id and all(ids[-1] == end for _, ids in completions)
    alignments = [aligner.align(*pair) for pair in completions]
    options = {"uld_use_hybrid_loss": True, "uld_crossentropy_weight": 0.3}
    eager = {"is_hybrid": True, "crossentropy_weight": 0.3}
    parts = completions, alignments
    trainer = assert_step_is_eager(tmp_path, (student, teacher), rows, parts, eager, **options)
    assert trainer.state.log_history[0]["scored_bytes"] == 1
