"""What surrounds the passes of a micro-batch so that they are fast; a run's rest is outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import nn

from gold_trainer import models
from gold_trainer.batches import MicroBatch, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.speed.answers import answers_of
from gold_trainer.speed.attention import AttentionKernels, without_cudnn
from gold_trainer.speed.compile_note import CompileNote
from gold_trainer.speed.compiling import CompiledStep, is_regional
from gold_trainer.speed.on_host import with_positions
from gold_trainer.speed.packing import Packing
from gold_trainer.speed.replacing import Replacement, all_replaced
from gold_trainer.speed.towers import Towers
from gold_trainer.speed.training_mode import TrainingMode
from gold_trainer.teachers.by_id import TeachersById
from gold_trainer.teachers.teacher import Teacher


class FastStep:
    def __init__(
        self,
        args: GOLDConfig,
        student: nn.Module,
        teacher: Teacher,
        note: CompileNote,
    ) -> None:
        sides = {"student": student, "teacher": teacher.model}
        if isinstance(teacher, TeachersById):
            sides |= {f"teacher {key!r}": one.model for key, one in teacher.teachers.items()}
        self.sides = sides
        self.compiled = CompiledStep(args, sides, note)
        self.packing = Packing(args, sides)
        self.attention = AttentionKernels(args)
        self.mode = TrainingMode()
        self.towers = Towers(sides, can_be_recorded=is_regional(args))

    @cached_property
    def answers(self) -> list[Replacement]:
        return answers_of(self.sides.values())

    @contextmanager
    def running(self, batch: WindowBatch, model: nn.Module) -> Iterator[None]:
        """Around forward and backward pass of a micro-batch; model: the student in its wrapper."""
        packed, kernels = self.packing.running(batch), self.attention.running(batch)
        answers, towers = all_replaced(self.answers), self.towers.running()
        with packed, kernels, answers, self.compiled.running(), towers, self.mode.kept(model):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around a micro-batch of an evaluation: lengths differ, and come but once."""
        with without_cudnn():
            yield

    def foresee(self, inputs: MicroBatch) -> None:
        """Compute positions of a micro-batch that is on the host, whose turn is still to come."""
        for side, own in (("student", inputs.student), ("teacher", inputs.teacher)):
            model = self.sides.get(side)
            if model is not None and own.tensors:
                with_positions(models.base_model(model), models.forward_inputs(model, own.tensors))
