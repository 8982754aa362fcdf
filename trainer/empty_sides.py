"""The pair of models of a run, made of their configs without weights, as the loss sees it."""

from torch import nn

from gold_trainer import loading
from gold_trainer.command_line import Run
from gold_trainer.preparing import Prepared
from gold_trainer.sides import Side
from gold_trainer.teachers.frozen import FrozenTeacher


def empty_sides(
    run: Run, prepared: Prepared
) -> tuple[tuple[nn.Module, nn.Module], tuple[Side, Side]]:
    """Student and teacher: the models, the student with its adapter, and their sides."""
    args = run.config
    empty = loading.empty_model(run.student, args.model_init_kwargs)
    has_adapter = run.peft_config is not None
    student = loading.add_adapter(empty, run.peft_config) if has_adapter else empty
    teacher = loading.empty_model(
        str(run.teacher), args.teacher_model_init_kwargs, args.teacher_model_revision
    )
    sides = (
        Side.of(student, "student", prepared.student_processor, args),
        FrozenTeacher(teacher, prepared.teacher_processor, args).side,
    )
    return (student, teacher), sides
