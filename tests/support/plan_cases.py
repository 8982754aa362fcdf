"""Pairs of tiny models as the planner takes them."""

from typing import Any

from gold_trainer import GOLDConfig, models
from gold_trainer.data.streams import read_rows
from gold_trainer.planning.memory import Subject
from gold_trainer.planning.subject import repeated
from gold_trainer.preparing import prepare
from gold_trainer.sides import Side
from support.tiny_models import tiny, tiny_rows


def subject_of(family: str, *, is_real: bool = False, **fields: Any) -> Subject:
    """A pair of one family; its models are on the meta device unless they are real."""
    student, processor = tiny(family)
    teacher = tiny(family, "teacher")[0]
    args = GOLDConfig("unused", use_cpu=True, **({"lmbda": 0.0} | fields))
    prepared = prepare(student, teacher, args, processor)
    if not is_real:
        student, teacher = student.to("meta"), teacher.to("meta")
    sides = (
        Side.of(student, "student", processor, args),
        Side.of(teacher.requires_grad_(False), "teacher", processor, args),
    )
    objective = prepared.objective(args, *sides)
    is_text = not models.is_vision_language(student.config)
    rows = read_rows(tiny_rows(1, images=0 if is_text else 1), args, **prepared.row_options)
    window = objective.collator([rows[0]])

    def batch_of(size):
        return objective.prepare(repeated(window, objective, size), lambda tensor: tensor)

    return Subject(args, student, teacher, sides, objective, batch_of(2), batch_of)
