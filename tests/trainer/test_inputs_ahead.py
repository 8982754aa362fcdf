"""A thread makes the tensors of a window's next micro-batch: the same steps, in the same order."""

import threading

import pytest
import torch

from gold_trainer.speed.inputs import Inputs
from support.tiny_models import tiny_rows
from support.trainer_cases import GradientRecorder, assert_equal_steps, losses_of, make_trainer


def built(folder, *, has_thread, num_steps=2, **fields):
    torch.manual_seed(0)
    recorder = GradientRecorder()
    rows = tiny_rows(6 * num_steps, images="mixed")
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make_trainer(
        *(folder, rows, "qwen3_vl"), callbacks=[recorder], max_steps=num_steps, **sizes, **fields
    )
    trainer.inputs.has_thread = has_thread
    return trainer, recorder


def test_steps_are_those_without_a_thread_and_the_next_micro_batch_is_made_meanwhile(tmp_path):
    expected, recorder = built(tmp_path, has_thread=False)
    expected.train()
    trainer, recorder_2 = built(tmp_path, has_thread=True)
    prepare, compute_loss = trainer.objective.prepare, trainer.compute_loss
    made, threads = [], []

    def watched(batch, *args):
        made.append([example.index for example in batch.examples])
        threads.append(threading.current_thread() is threading.main_thread())
        return prepare(batch, *args)

    def computed(model, inputs, *args, **kwargs):
        if trainer.inputs.pending is not None:
            trainer.inputs.pending.result()  # it is made although nobody has asked for it
        own = [example.index for example in inputs.student.examples]
        assert own in made
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.objective.prepare, trainer.compute_loss = watched, computed
    trainer.train()
    assert threads == [True, *[False] * 5], "the first of the run, then those behind it"
    assert len({str(rows) for rows in made}) == 6, "each is made once"
    torch.testing.assert_close(losses_of(trainer), losses_of(expected), rtol=0, atol=0)
    assert_equal_steps(recorder, recorder_2)


def test_an_error_comes_when_it_is_the_micro_batchs_turn(tmp_path):
    trainer, _ = built(tmp_path, has_thread=True)
    prepare, compute_loss, seen, computed = trainer.objective.prepare, trainer.compute_loss, [], []

    def failing(*args):
        seen.append(None)
        if len(seen) == 3:
            raise ValueError("the processor refuses row 5")
        return prepare(*args)

    def counted(*args, **kwargs):
        computed.append(None)
        return compute_loss(*args, **kwargs)

    trainer.objective.prepare, trainer.compute_loss = failing, counted
    with pytest.raises(ValueError, match="the processor refuses row 5"):
        trainer.train()
    assert len(computed) == 2 and trainer.state.global_step == 0


def test_an_error_of_a_writer_that_looks_ahead_does_not_end_the_next_run_too(tmp_path):
    trainer, _ = built(tmp_path, has_thread=True, lmbda=1.0)
    writer = trainer.rollouts.writers["student"]
    look_ahead = writer.look_ahead

    def fail(prompts):
        raise ValueError("it cannot see them")

    writer.look_ahead = fail
    with pytest.raises(ValueError, match="it cannot see them"):
        trainer.train()
    writer.look_ahead = look_ahead
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"teacher_batch_size": 4}, False),
        ({"token_weighting": "picture_detail"}, False),
    ],
)
def test_where_a_step_asks_the_processor_itself_there_is_no_thread(
    fields, expected, monkeypatch, tmp_path
):
    trainer, _ = built(tmp_path, has_thread=False, **fields)
    parts = (trainer.objective, trainer.args, trainer._prepare_input, trainer.fast)
    assert not Inputs(*parts).has_thread, "nor on a CPU, which has its cores for the models"
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda"))
    assert Inputs(*parts).has_thread == expected
    monkeypatch.setattr(trainer.args, "teacher_models", {"one": "a", "two": "b"})
    assert not Inputs(*parts).has_thread, "each of several teachers has tensors of its own rows"


def test_rows_of_the_next_window_are_read_between_both_passes_of_this_ones_last(tmp_path):
    trainer, _ = built(tmp_path, has_thread=False)
    events = []

    def told(owner, name, event):
        function = getattr(owner, name)

        def run(*args, **kwargs):
            result = function(*args, **kwargs)
            events.append(event)
            return result

        setattr(owner, name, run)

    told(trainer.window_source, "look_ahead", "rows")
    told(trainer.objective, "loss", "forward")
    told(trainer.accelerator, "backward", "backward")
    told(trainer.objective, "prepare", "tensors")
    trainer.train()
    inner = ["tensors", "forward", "backward"]
    last = ["tensors", "forward", "rows", "backward"]
    # the second window's first tensors are there before its turn; behind the last window is none
    assert events == [*inner, *inner, *last, *inner, *inner, *last]


@pytest.mark.parametrize("has_thread", [True, False])
def test_an_evaluation_between_two_steps_leaves_what_is_made_for_the_next(has_thread, tmp_path):
    fields = {"eval_rows": tiny_rows(3, images="mixed"), "eval_strategy": "steps", "eval_steps": 1}
    expected, recorder = built(tmp_path, has_thread=False)
    expected.train()
    trainer, recorder_2 = built(tmp_path, has_thread=has_thread, **fields)
    prepare, made = trainer.objective.prepare, []

    def watched(batch, *args):
        made.append(batch.examples)
        return prepare(batch, *args)

    trainer.objective.prepare = watched
    trainer.train()
    evaluations = 2 * -(-3 // trainer.args.per_device_eval_batch_size)
    assert len(made) == 6 + evaluations, "each is made once"
    torch.testing.assert_close(losses_of(trainer), losses_of(expected), rtol=0, atol=0)
    assert_equal_steps(recorder, recorder_2)


def test_a_loss_that_is_asked_for_outside_of_a_step_reads_no_rows(tmp_path):
    trainer, _ = built(tmp_path, has_thread=False)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.window_source.look_ahead = None
    assert torch.isfinite(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)))
