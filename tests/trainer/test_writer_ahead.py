"""Prompts that become tensors within the step before: the same run, and less work in a call."""

import threading
from copy import copy
from dataclasses import replace

import pytest
import torch

from gold_trainer.batches import PromptTensors
from gold_trainer.rendering.prompts import process_examples
from gold_trainer.speed import on_host, segments
from gold_trainer.speed.replacing import all_replaced
from gold_trainer.writers import LocalWriter, fast_prefill, local
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import GradientRecorder, losses_of, make_trainer, record_completions

FIELDS = {"lmbda": 1.0, "max_completion_length": 6, "max_steps": 4}


class Calls(list):
    by_thread = 0  # how many of them


@pytest.fixture
def processed(monkeypatch):
    """Rows of what the processor is asked for."""
    calls = Calls()

    def record(processor, examples):
        calls.append([example.index for example in examples])
        calls.by_thread += threading.current_thread() is not threading.main_thread()
        return process_examples(processor, examples)

    monkeypatch.setattr(local, "process_examples", record)
    monkeypatch.setattr("gold_trainer.rendering.collator.process_examples", record)
    return calls


def run(folder, *, is_ahead=True, num_rows=10, has_thread=False, **fields):
    """An epoch of 10 rows ends within the run."""
    torch.manual_seed(0)
    recorder = GradientRecorder()
    options = {**FIELDS, "per_device_train_batch_size": 4, **fields}
    rows = tiny_rows(num_rows, images="mixed")
    trainer = make_trainer(folder, rows, "qwen3_vl", callbacks=[recorder], **options)
    trainer.inputs.has_thread = has_thread
    written = record_completions(trainer, "student")
    if not is_ahead:
        for writer in trainer.rollouts.writers.values():
            writer.look_ahead = lambda prompts: None
            writer.take_made = lambda: None
    trainer.train()
    return trainer, written, recorder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"num_generations": 2, "gradient_accumulation_steps": 2},
        {"lmbda": 0.5, "seq_kd": True},
    ],
)
def test_a_run_that_looks_ahead_is_the_run_that_does_not(fields, tmp_path):
    ahead, written, recorder = run(tmp_path / "ahead", has_thread=bool(fields), **fields)
    plain, written_2, recorder_2 = run(tmp_path / "plain", is_ahead=False, **fields)
    assert written and written == written_2
    assert losses_of(ahead) == losses_of(plain)
    for step, step_2 in zip(recorder.steps, recorder_2.steps, strict=True):
        assert all(step[name].equal(step_2[name]) for name in step)


@pytest.mark.parametrize("has_thread", [False, True])
def test_prompts_of_the_next_step_are_made_once_and_before_its_call(
    has_thread, tmp_path, processed
):
    in_calls, complete = [], LocalWriter.complete
    with pytest.MonkeyPatch.context() as patch:

        def counted(self, *args):
            before = len(processed)
            result = complete(self, *args)
            in_calls.append(len(processed) - before)
            return result

        patch.setattr(LocalWriter, "complete", counted)
        trainer, _, _ = run(tmp_path, num_rows=16, has_thread=has_thread)
    assert in_calls == [2, 0, 0, 0], "in the first call a step is compared before"
    assert [len(rows) for rows in processed] == [2, 4, 4, 4, 4], "who learns takes the writer's"
    assert trainer.rollouts.writers["student"].made is None
    assert processed.by_thread == (3 if has_thread else 0)


def test_what_is_made_before_is_what_the_cache_holds_first(tmp_path, processed):
    run(tmp_path, num_rows=8, max_steps=2, rollout_cache_gib=1e-9)
    sizes = [len(rows) for rows in processed]
    assert sizes == [2, *[1] * 4, 4, *[1] * 4, 4], "one at a time, and all of them to learn from"


def test_an_error_of_the_next_prompts_is_its_own_steps(tmp_path, monkeypatch):
    steps = []

    def failing(processor, examples):
        steps.append(trainer.state.global_step)
        if any(example.index == 5 for example in examples):
            raise ValueError("the processor refuses row 5")
        return process_examples(processor, examples)

    monkeypatch.setattr(local, "process_examples", failing)
    trainer = make_trainer(tmp_path, tiny_rows(12), "qwen3", **FIELDS)
    with pytest.raises(ValueError, match="the processor refuses row 5"):
        trainer.train()
    assert steps == [0, 0, 0, 1], "ahead, and in its turn again"
    assert trainer.state.global_step == 1 and len(losses_of(trainer)) == 1


def test_tensors_are_those_of_the_same_prompts_and_pictures_alone(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(3, images=1), "qwen3_vl", lmbda=1.0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    examples = [example.unanswered() for example in batch.examples]
    processor = trainer.processing_class
    made = PromptTensors(processor, examples, {})
    answered = [example.with_sample([1, 2], [0.0, 0.0]) for example in examples]
    assert made.are_of(processor, answered) and not made.are_of(copy(processor), answered)
    assert not made.are_of(processor, examples[:2])
    assert not made.are_of(processor, examples[::-1])
    first = examples[0]
    for changes in (
        {"images": [image.copy() for image in first.images]},
        {"videos": []},
        {"prompt_text": first.prompt_text + " "},
        {"is_cut": True},
        {"prompt_length": first.prompt_length - 1},
        {"adds_special_tokens": not first.adds_special_tokens},
    ):
        assert not made.are_of(processor, [replace(first, **changes), *examples[1:]])


def written_with(trainer, batch):
    (written,) = trainer.rollouts.write("student", [batch], 0)
    return [example.written_ids for example in written.examples]


def test_pictures_attend_in_one_call_and_a_tower_that_cannot_keeps_its_own(tmp_path, monkeypatch):
    rows = tiny_rows(4, images="mixed")
    trainer = make_trainer(tmp_path, rows, "qwen3_vl", lmbda=1.0, max_completion_length=6)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    writer, warnings = trainer.rollouts.writers["student"], []
    expected = written_with(trainer, batch)
    assert writer.fast.configs == [], "on a CPU its own"
    writer.fast.configs = fast_prefill.towers_of(trainer.model, trainer.args)
    assert writer.fast.configs == [trainer.model.config.vision_config]
    calls, within = [], segments.within
    monkeypatch.setattr(
        segments, "within", lambda *args, **kw: calls.append(1) or within(*args, **kw)
    )
    assert written_with(trainer, batch) == expected
    assert len(calls) == len(trainer.model.model.visual.blocks)
    assert trainer.model.config.vision_config._attn_implementation == "sdpa"

    def refuse(*args, **kwargs):
        raise ValueError("no kernel for these heads")

    monkeypatch.setattr(segments, "within", refuse)
    monkeypatch.setattr(fast_prefill.logger, "warning", lambda *args: warnings.append(args))
    assert written_with(trainer, batch) == expected == written_with(trainer, batch)
    ((text, name, reason),) = warnings
    assert "its own attention of pictures" in text and name == type(trainer.model).__name__
    assert reason == "no kernel for these heads" and writer.fast.configs == []


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_prompts_positions_are_counted_on_the_host(family, tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(4, images="mixed"), family)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    inputs = process_examples(trainer.processing_class, batch.examples)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    own = {name: inputs[name] for name in names}
    there = {name: on_host.moved(tensor, torch.device("meta")) for name, tensor in own.items()}
    below, moves = trainer.model.model, []
    expected = below.get_rope_index(**own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_host, "_to", lambda value, device: moves.append(device) or value)
        with all_replaced(on_host.index_of(trainer.model)):
            actual = below.get_rope_index(**there, pixel_values=torch.zeros(1, device="meta"))
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))
    assert moves == [torch.device("meta")] * 2
    with pytest.raises(Exception, match="meta"):
        below.get_rope_index(**there)
    there["attention_mask"] = torch.ones(1, device="meta")  # nobody knows it on the host
    with all_replaced(on_host.index_of(trainer.model)), pytest.raises(Exception, match="meta"):
        below.get_rope_index(**there)
    assert on_host.index_of(tiny("qwen3")[0]) == []
