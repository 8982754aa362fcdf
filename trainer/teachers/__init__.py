"""Where the teacher's hidden states come from: one file a kind, chosen here."""

from torch import nn
from transformers import PreTrainedModel

from gold_trainer.collator import Processor
from gold_trainer.config import GOLDConfig
from gold_trainer.teachers.frozen import FrozenTeacher
from gold_trainer.teachers.offloaded import OffloadedTeacher
from gold_trainer.teachers.own_weights import OwnWeights
from gold_trainer.teachers.teacher import Teacher

__all__ = ["FrozenTeacher", "OffloadedTeacher", "OwnWeights", "Teacher", "make_teacher"]


def make_teacher(
    teacher_model: PreTrainedModel | str | None,
    student: nn.Module,
    processor: Processor,  # the teacher's
    args: GOLDConfig,
) -> Teacher:
    if teacher_model is None:
        return OwnWeights(student, processor, args)
    kind = OffloadedTeacher if args.teacher_offload is not None else FrozenTeacher
    return kind.load(teacher_model, processor, args)
