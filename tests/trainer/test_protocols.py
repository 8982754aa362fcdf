"""A teacher and a writer that are no module: what the trainer asks of either is enough for another
kind, which answers from what it has stored.
"""

from contextlib import contextmanager

import pytest
import torch

from gold_trainer.writers import Completion, Writer
from support.cross_cases import cross_trainer, make_sides, rows_of
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import (
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
)

ROWS = tiny_rows(4, images="mixed")


class StoredTeacher:
    """Hidden states by the index of a row, as a cache on disk would have them."""

    model = None

    def __init__(self, trainer):
        self.side, self.stored = trainer.teacher.side, {}
        for index in range(len(trainer.train_dataset)):
            batch = trainer.data_collator([trainer.train_dataset[index]])
            inputs = trainer.objective.prepare(batch, lambda tensor: tensor).teacher
            self.stored[index] = trainer.teacher.hidden_rows(inputs)

    def place(self, device):
        pass

    def hidden_rows(self, inputs):
        assert inputs.scored_rows.dtype == torch.int64
        return torch.cat([self.stored[example.index] for example in inputs.examples])

    @contextmanager
    def writing(self):
        raise AssertionError("it has no module that writes")
        yield


@pytest.mark.parametrize("across", [False, True])
def test_teacher_that_is_no_module_gives_the_same_step(across, tmp_path):
    def build(folder):
        if across:
            student, teacher = make_sides("lfm2_vl", "qwen3_vl")
            return cross_trainer(folder, rows_of("lfm2_vl"), student, teacher, max_steps=1)
        recorder = GradientRecorder()
        return make_trainer(folder, ROWS, callbacks=[recorder]), recorder

    live, expected = build(tmp_path / "live")
    live.train()
    trainer, recorder = build(tmp_path / "stored")
    trainer.teacher = StoredTeacher(trainer)
    trainer.train()
    assert trainer.teacher_model is None
    assert losses_of(trainer) == pytest.approx(losses_of(live), rel=1e-5)
    assert_equal_gradients(recorder.gradients, expected.gradients, relative=1e-4)


class StoredWriter(Writer):
    """Completions of a server, say: it gets prompts, and is told of new weights."""

    runs_together = False

    def __init__(self, completion_ids):
        self.completion_ids, self.events = completion_ids, []

    def sync_weights(self, model, step):
        self.events.append(("sync", step, model))

    def complete(self, prompts, sampling):
        self.events.append(("complete", [prompt.example.index for prompt in prompts]))
        ids = self.completion_ids
        return [[Completion(ids, [0.0] * len(ids), 0)] * p.num_completions for p in prompts]


def test_writer_that_is_no_module_is_asked_once_a_window_after_its_weights_are_new(tmp_path):
    student, processor = tiny("qwen3_vl")
    fields = {"lmbda": 1.0, "max_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(tmp_path, ROWS, student=student, gradient_accumulation_steps=1, **fields)
    writer = StoredWriter([5, 6, processor.tokenizer.eos_token_id])
    trainer.rollouts.writers["student"] = writer
    trainer.train()
    expected = [("sync", 0, student), ("complete", [0, 1])]
    expected += [("sync", 1, student), ("complete", [2, 3])]
    assert writer.events == expected
    assert all(entry["completion_length"] == 3 for entry in trainer.state.log_history[:2])
