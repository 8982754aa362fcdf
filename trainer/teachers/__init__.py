"""Where the teacher's hidden states come from: one file a kind, chosen here."""

from torch import nn
from transformers import PreTrainedModel

from gold_trainer.collator import Processor
from gold_trainer.config import GOLDConfig
from gold_trainer.teachers.cached import CachedTeacher, check_cached
from gold_trainer.teachers.frozen import FrozenTeacher
from gold_trainer.teachers.named import source_of
from gold_trainer.teachers.offloaded import OffloadedTeacher
from gold_trainer.teachers.own_weights import OwnWeights
from gold_trainer.teachers.served.teacher import ServedTeacher
from gold_trainer.teachers.sharded import ShardedTeacher
from gold_trainer.teachers.teacher import Teacher

__all__ = [
    "CachedTeacher",
    "FrozenTeacher",
    "OffloadedTeacher",
    "OwnWeights",
    "ServedTeacher",
    "ShardedTeacher",
    "Teacher",
    "check_cached",
    "make_live_teacher",
    "make_teacher",
    "source_of",
]


def make_teacher(
    teacher_model: PreTrainedModel | str | None,
    student: nn.Module,
    processor: Processor,  # the teacher's
    args: GOLDConfig,
) -> Teacher:
    if args.teacher_cache is not None:
        return CachedTeacher.open(processor, args)
    return make_live_teacher(teacher_model, student, processor, args)


def make_live_teacher(
    teacher_model: PreTrainedModel | str | None,
    student: nn.Module | None,  # of which the teacher is the part below the adapter
    processor: Processor,
    args: GOLDConfig,
) -> Teacher:
    """One that can be asked about any row, also where a cache of it is made."""
    if args.teacher_model_server_url is not None:
        assert isinstance(teacher_model, str), "source_of has found its checkpoint"
        return ServedTeacher.open(teacher_model, processor, args)
    if teacher_model is None:
        assert student is not None, "a teacher is named, or the student is its own"
        return OwnWeights(student, processor, args)
    if args.teacher_offload is not None:
        return OffloadedTeacher.load(teacher_model, processor, args)
    kind = FrozenTeacher if args.teacher_sharding is None else ShardedTeacher
    return kind.load(teacher_model, processor, args)
