"""Passes of the teacher over other numbers of rows than a micro-batch has: teacher_batch_size.

Rows are known before the first pass of their window, so the teacher may see those of several
micro-batches at once: layers that stream from the host, or are gathered, come once for all of them.
Or it sees a part of a micro-batch at a time, where its own pass is what needs the memory.

N scored rows of the teacher's, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gold_trainer.batches import Example, SideInputs, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives import Objective
from gold_trainer.rendering.collator import build_side
from gold_trainer.teachers.teacher import Teacher


class TeacherPasses:
    def __init__(
        self, objective: Objective, args: GOLDConfig, move: Callable[[Tensor], Tensor]
    ) -> None:
        self.objective, self.move = objective, move
        self.num_rows = args.teacher_batch_size  # None: those of a micro-batch
        objective.is_teacher_apart = self.num_rows is not None
        own = args.per_device_train_batch_size
        self.num_batches = max(1, (self.num_rows or own) // own)  # that share a pass
        is_split = self.num_rows is not None and self.num_rows < own
        self.part_size = self.num_rows if is_split else None  # rows at a time; None: all
        self.window: list[WindowBatch] = []
        self.hidden: dict[int, Tensor] = {}  # (N of it, D) by the id of an example of the window

    def start(self, window: list[WindowBatch]) -> None:
        """Its micro-batches come next."""
        self.window = window
        self.hidden.clear()

    def hidden_rows(self, teacher: Teacher, inputs: SideInputs) -> Tensor:  # (N, D)
        if self.num_rows is None:
            return teacher.hidden_rows(inputs)
        if any(id(example) not in self.hidden for example in inputs.examples):
            self._run(teacher, inputs.examples)
        return torch.cat([self.hidden.pop(id(example)) for example in inputs.examples])

    def _run(self, teacher: Teacher, examples: list[Example]) -> None:
        """Over all of the micro-batches that share a pass with that of these examples."""
        first = next(
            place
            for place, batch in enumerate(self.window)
            if any(example is examples[0] for example in batch.teacher_examples)
        )
        rows: list[Example] = []
        unscored: list[Example] = []
        for batch in self.window[first : first + self.num_batches]:
            is_one = batch.teacher_examples is batch.examples
            rows += batch.teacher_examples
            unscored += batch.unscored if is_one else batch.teacher_unscored
        size, is_shared = self.part_size or len(rows), self.window[first].shares_prompts
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            processor = self.objective.collators["teacher"].processor
            others = () if start else unscored
            inputs = build_side(processor, part, self.move, others, shares_prompts=is_shared)
            counts = [len(example.written_ids) for example in part]
            pieces = teacher.hidden_rows(inputs).split(counts)
            self.hidden |= {id(e): piece for e, piece in zip(part, pieces, strict=True)}
