"""gold-trainer plan: peak memory of a run without its weights, and what makes it fit."""

import json
import re
import time
from dataclasses import replace

import pytest
import torch

from gold_kernels.engine.memory import peak_extra_bytes
from gold_trainer import loading, models
from gold_trainer.__main__ import main
from gold_trainer.loss_at_head import gather_rows, head_replaced
from gold_trainer.planning.memory import PARTS, Planner, Setup, Subject
from gold_trainer.planning.passes import Precision, run_passes
from gold_trainer.sides import Side
from support.plan_cases import subject_of
from support.tiny_models import FAMILIES, tiny, tiny_rows

GIB = 2**30
MIB_LINE = re.compile(r"peak +([\d.]+) GiB a GPU, in the (.*)")


def passes_of(subject: Subject, *, is_checkpointed: bool, share: float = 1.0):
    parts = subject.sides, subject.objective, subject.batch, Precision(None, None)
    options = {"is_checkpointed": is_checkpointed, "kept_gradients": share}
    return run_passes(subject.student, subject.teacher, *parts, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_run_without_numbers(family):
    subject = subject_of(family)
    found = passes_of(subject, is_checkpointed=False)
    assert found.teacher > found.teacher_hidden > 0
    assert found.forward["activations"] > 0 and found.forward["loss"] > 0
    trained = sum(p.numel() * p.element_size() for p in subject.trained)
    assert found.backward["gradients"] <= trained
    assert all(p.grad is None for p in subject.student.parameters())
    if subject.student.supports_gradient_checkpointing:
        less = passes_of(subject, is_checkpointed=True)
        assert less.forward["activations"] < found.forward["activations"]


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_vl"])
def test_what_is_planned_is_what_a_real_step_allocates(family):
    """Eager attention: that of a CPU keeps something else than that of a GPU."""
    subject, real = subject_of(family), subject_of(family, is_real=True)
    for model in (subject.student, real.student):
        model.set_attn_implementation("eager")
    found = passes_of(subject, is_checkpointed=False)
    rows, head = real.batch.student.scored_rows, real.sides[0].head
    inputs = models.forward_inputs(real.student, real.batch.student.tensors)

    def forward():  # without the loss, whose rows are made of other operators on a CPU
        with head_replaced(real.sides[0].place, lambda h: gather_rows(h, rows).sum()) as value_of:
            return value_of(real.student.train()(**inputs).logits)

    measured = peak_extra_bytes(forward)
    assert found.forward["activations"] == pytest.approx(measured, rel=0.1)
    trained = sum(p.numel() * p.element_size() for p in real.trained)
    measured = peak_extra_bytes(lambda: forward().backward())
    assert head.weight.requires_grad
    assert max(found.forward.total(), found.backward.total()) == pytest.approx(
        measured, abs=0.15 * (measured + trained) + found.forward["loss"]
    )


def test_parts_of_gradients_go_with_the_engine():
    subject = subject_of("qwen3")
    whole, half = (Planner(subject, Setup(name, 2)) for name in ("ddp", "fsdp2"))
    parts = [dict(planner._moments())["step of the optimizer"] for planner in (whole, half)]
    assert parts[0]["optimizer"] == pytest.approx(2 * parts[1]["optimizer"], rel=0.01)
    assert parts[0]["weights"] == pytest.approx(2 * parts[1]["weights"], rel=0.01)
    # DDP has them in buckets once more
    assert parts[0]["gradients"] == pytest.approx(4 * parts[1]["gradients"], rel=0.01)


def test_gradients_of_micro_batches_before_are_there_from_the_start():
    plans = []
    for accumulation in (1, 2):
        fields = {"gradient_accumulation_steps": accumulation}
        planner = Planner(subject_of("qwen3", **fields), Setup())
        plans.append(dict(planner._moments())["forward pass of the teacher"])
    trained = sum(p.numel() * p.element_size() for p in planner.subject.trained)
    assert plans[0]["gradients"] == 0 and plans[1]["gradients"] == trained


def test_rollouts_take_what_their_field_says_and_need_one_row():
    fields = {"lmbda": 1.0, "gradient_accumulation_steps": 8}
    sizes = []
    for cache in (None, 1e-9, 1.0):
        planner = Planner(subject_of("qwen3", **fields, rollout_cache_gib=cache), Setup())
        sizes.append(dict(planner._moments())["writing of rollouts"]["rollouts"])
    rows = 8 * planner.subject.args.per_device_train_batch_size
    assert sizes[0] == sizes[1] > 0 and sizes[2] == rows * sizes[0]
    off_policy = Planner(subject_of("qwen3"), Setup())
    assert "writing of rollouts" not in dict(off_policy._moments())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Configs and processors alone: reading weights would fail."""
    folder = tmp_path_factory.mktemp("plan")
    for size in ("student", "teacher"):
        model, processor = tiny("qwen3", size)
        model.config.save_pretrained(folder / size)
        processor.save_pretrained(folder / size)
    rows = [{key: row[key] for key in ("messages",)} for row in tiny_rows(8, images=0)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def plan(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setenv("COLUMNS", "160")

    def run(*flags: str) -> tuple[int, str]:
        named = {
            "model_name_or_path": pair / "student",
            "teacher_model_name_or_path": pair / "teacher",
            "dataset_name": pair / "rows.jsonl",
            "output_dir": tmp_path / "out",
            "lmbda": 0.0,
            "per_device_train_batch_size": 4,
        }
        code = main(["plan", *[f"--{name}={value}" for name, value in named.items()], *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_a_plan_says_what_it_is_for_and_has_its_parts(plan):
    code, text = plan()
    assert code == 0, text
    assert re.search(r"a micro-batch: 4 rows of \d+ tokens, the longest of 8 rows looked at", text)
    assert "engine single, 1 GPU; bf16; gradient_checkpointing is on" in text
    assert MIB_LINE.search(text)
    assert any(re.search(rf"^{part} ", text, re.MULTILINE) for part in PARTS)


def test_rows_are_as_long_as_tokens_says(plan):
    assert "4 rows of 100 tokens" in plan("--tokens", "100")[1]
    code, text = plan("--tokens", "1")
    assert code == 2 and "tokens must be above the" in text and "got 1; raise it" in text


def test_completions_that_are_written_have_their_most_tokens_and_a_cache(plan):
    known = int(re.search(r"rows of (\d+) tokens", plan()[1]).group(1))
    text = plan("--lmbda=1.0", "--max_completion_length=400", "--max_length=900")[1]
    assert int(re.search(r"rows of (\d+) tokens", text).group(1)) > max(known, 400)
    assert "max_completion_length=400 where one is written" in text


def test_what_does_not_fit_gets_lines_to_add_that_keep_their_promise(plan):
    code, text = plan("--gpu_memory=1000")
    assert code == 0 and "fits in 1000 GiB, of which 5% are left free" in text
    flags = ("--tokens=4000", "--max_length=5000", "--gradient_checkpointing=false")
    code, text = plan(*flags, "--gpu_memory=0.02")
    assert code == 1 and "does not fit in 0.02 GiB" in text
    lines = re.findall(r"^  (.*?) +# ([\d.]+) GiB; ", text, re.MULTILINE)
    assert lines[0][0] == "gradient_checkpointing: true"
    given, peaks = list(flags), [float(MIB_LINE.search(text).group(1))]
    for line, peak in lines:
        if re.match("teacher_cache|use_peft|accelerate", line):
            break
        for part in line.split(", ") if "{" not in line else [line]:
            name, _, value = part.partition(": ")
            given.append(f"--{name}={value}")
        assert float(peak) <= peaks[-1]
        peaks.append(float(peak))
    found = float(MIB_LINE.search(plan(*given)[1]).group(1))
    assert len(peaks) > 2 and found == pytest.approx(peaks[-1], abs=0.011, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine=fsdp3"], "engine must be one of single, ddp, fsdp2, zero2, zero3, got 'fsdp3'"),
        (["--engine=single", "--gpus=2"], "gpus must be 1 for the engine single, got 2; choose"),
        (["--gpus=0"], "gpus must be a whole number above 0, got '0'; it counts processes"),
        (["--gpu_memory=much"], "gpu_memory must be a number of GiB above 0, got 'much'"),
        (["--tokens=x"], "tokens must be a whole number above 0, got 'x'; it counts a row"),
        (["--gpu_mem=3"], "unknown flag --gpu_mem"),
    ],
)
def test_errors_are_one_sentence(flags, message, plan):
    code, text = plan(*flags)
    assert code == 2 and text.startswith("error: ") and message in text and text.count("\n") == 1


def test_rows_that_cannot_be_used_are_no_plan(plan, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    code, text = plan(f"--dataset_name={path}", "--on_bad_row=skip")
    assert code == 2 and "error: " in text


def test_a_plan_of_billions_takes_seconds_and_no_memory():
    """On one core; without the imports, which take as long again."""
    subject = subject_of("qwen3")
    config = subject.student.config
    config.update({"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36})
    config.update({"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128})
    config.layer_types = ["full_attention"] * 36
    with torch.device("meta"):
        student = type(subject.student)(config)
    processor = subject.sides[0].collator.processor
    side = Side.of(student, "student", processor, subject.args)
    sides = side, subject.sides[1]
    large = replace(subject, student=student, sides=sides)
    started = time.process_time()
    parts = Planner(large, Setup()).plan().parts
    assert time.process_time() - started < 6
    assert parts["weights"] > 20 * GIB and parts["optimizer"] == 2 * parts["weights"]
