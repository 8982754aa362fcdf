"""The student on disk: stock classes load it and it answers as in memory; what is logged on the way
is complete and finite, in bfloat16 too.
"""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TrainerCallback,
)

from gold_trainer.rendering.prompts import tokenizer_of
from support.eager_step import prompt_inputs
from support.tiny_models import TEXT_FAMILIES, tiny, tiny_rows
from support.trainer_cases import losses_of, make_trainer

# Idefics3 has an untied head, the others tied ones.
FAMILIES = ("qwen3_vl", "lfm2_vl", "idefics3", "qwen3", "llama")
METRICS = {
    *("loss", "on_policy_loss", "off_policy_loss", "student_entropy", "teacher_entropy"),
    *("top1_agreement", "forward_kl", "reverse_kl", "completion_length", "tokens_per_second"),
    *("grad_norm", "learning_rate", "epoch", "step"),
    *(f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")),
}


def rows_of(family):
    return tiny_rows(4, images=0 if family in TEXT_FAMILIES else "mixed")


def load(family, folder):
    if family in TEXT_FAMILIES:
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return (
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )


def answers(model, processor, rows):
    """Logits of each row's prompt, and what the model says to it."""
    model.eval()
    results = []
    with torch.no_grad():
        for row in rows:
            inputs = prompt_inputs(processor, row)
            said = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            results.append((model(**inputs).logits, said))
    return results


def assert_same_answers(actual, expected):
    for (logits, said), (expected_logits, expected_said) in zip(actual, expected, strict=True):
        assert torch.equal(logits, expected_logits)
        assert torch.equal(said, expected_said)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_student_answers_as_in_memory(family, tmp_path):
    rows = rows_of(family)
    run = make_trainer(tmp_path, rows, family, lmbda=0.5, max_steps=2, learning_rate=0.1)
    run.train()
    run.save_model()
    student, processor = load(family, tmp_path)
    assert type(student) is type(run.model)
    assert tokenizer_of(processor).get_vocab() == tokenizer_of(run.processing_class).get_vocab()
    assert processor.chat_template == run.processing_class.chat_template
    expected = answers(run.model, run.processing_class, rows)
    assert_same_answers(answers(student, processor, rows), expected)
    before, _ = tiny(family)
    assert not torch.equal(answers(before, processor, rows)[0][0], expected[0][0]), "no training"


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_saved_config_and_side_of_padding_are_those_that_came(family, tmp_path):
    """The Trainer turns use_cache off, and rollouts pad on the left."""
    student, processor = tiny(family)
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "right"
    del tokenizer.init_kwargs["padding_side"]  # the tokenizers of most models do not say it
    tokenizer.save_pretrained(tmp_path / "before")
    came = AutoTokenizer.from_pretrained(tmp_path / "before")
    assert came.padding_side == "right"
    before = student.config.to_dict()
    fields = {"lmbda": 1.0, "save_strategy": "steps", "save_steps": 1}
    models = {"student": student, "processor": processor}
    run = make_trainer(tmp_path / "run", rows_of(family), family, **models, **fields)
    run.train()
    run.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        saved, again = load(family, folder)
        assert ("use_cache" in saved.config.to_dict()) == ("use_cache" in before)
        assert saved.config.to_dict().get("use_cache") == before.get("use_cache")
        assert tokenizer_of(again).padding_side == "right"


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_saved_student_is_a_student_and_a_teacher_again(family, tmp_path):
    """By its folder, its processor found there: further training starts from its loss."""
    rows = rows_of(family)
    first = make_trainer(tmp_path / "first", rows, family, max_steps=3, eval_rows=rows)
    first.train()
    first.save_model()
    folder = str(tmp_path / "first")
    second = make_trainer(tmp_path / "second", rows, family, student=folder, eval_rows=rows)
    assert second.evaluate()["eval_loss"] == pytest.approx(first.evaluate()["eval_loss"], rel=1e-6)
    same = make_trainer(tmp_path / "third", rows, family, student=folder, teacher=folder)
    same.train()
    assert losses_of(same)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_saved_adapter_loads_on_its_base_and_merges(family, tmp_path):
    peft = pytest.importorskip("peft")
    rows = rows_of(family)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    options = {"lmbda": 0.5, "max_steps": 2, "learning_rate": 1.0, "peft_config": config}
    run = make_trainer(tmp_path, rows, family, **options)
    run.train()
    run.save_model()
    assert not (tmp_path / "model.safetensors").exists(), "the adapter alone is saved"
    expected = answers(run.model, run.processing_class, rows)
    base, _ = tiny(family)
    assert not torch.equal(answers(base, run.processing_class, rows)[0][0], expected[0][0])
    student = peft.PeftModel.from_pretrained(base, tmp_path)
    processor_class = AutoTokenizer if family in TEXT_FAMILIES else AutoProcessor
    processor = processor_class.from_pretrained(tmp_path)
    assert_same_answers(answers(student, processor, rows), expected)
    merged = answers(student.merge_and_unload(), processor, rows)
    assert type(student.get_base_model()) is type(base)
    for (logits, _), (expected_logits, _) in zip(merged, expected, strict=True):
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({"bf16": True}, torch.float32), ({}, torch.bfloat16)],
    ids=["autocast", "weights"],
)
def test_bf16_training_learns_and_stays_finite(fields, dtype, tmp_path):
    rows = rows_of("qwen3_vl")
    student, _ = tiny("qwen3_vl")
    teacher, _ = tiny("qwen3_vl", "teacher")
    run = make_trainer(
        tmp_path,
        rows,
        student=student.to(dtype),
        teacher=teacher.to(dtype),
        max_steps=12,
        learning_rate=0.5,
        max_grad_norm=1.0,
        **fields,
    )
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    assert losses_of(run)[-1] < 0.9 * losses_of(run)[0]
    assert {parameter.dtype for parameter in run.model.parameters()} == {dtype}
    run.save_model()
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert saved.dtype == dtype
    assert all(torch.equal(w, run.model.state_dict()[n]) for n, w in saved.state_dict().items())


class Reporter(TrainerCallback):
    """Receives what TensorBoard, Weights & Biases and others do."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_log_of_a_mixed_run_is_complete(tmp_path):
    """Eight micro-batches of both policies in one window; report_to gets it through on_log."""
    reporter = Reporter()
    run = make_trainer(
        tmp_path,
        rows_of("qwen3_vl"),
        lmbda=0.5,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
        logging_steps=2,
        callbacks=[reporter],
    )
    run.train()
    (entry,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert set(entry) == METRICS
    assert all(math.isfinite(value) for value in entry.values())
    assert reporter.logs[0].items() <= entry.items()
    assert set(reporter.logs[0]) == METRICS - {"step"}
