"""Where the teacher's hidden states come from: one file a kind, chosen here."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gold_trainer import sharding
from gold_trainer.batches import WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.teacher import args_by_teacher
from gold_trainer.rendering.collator import Processor
from gold_trainer.teachers.by_id import TeachersById
from gold_trainer.teachers.cached import CachedTeacher
from gold_trainer.teachers.frozen import FrozenTeacher
from gold_trainer.teachers.named import source_of
from gold_trainer.teachers.offloaded import OffloadedTeacher
from gold_trainer.teachers.own_weights import OwnWeights
from gold_trainer.teachers.served.teacher import ServedTeacher, ServedTopK
from gold_trainer.teachers.sharded import ShardedTeacher
from gold_trainer.teachers.teacher import Teacher

__all__ = [
    "CachedTeacher",
    "FrozenTeacher",
    "OffloadedTeacher",
    "OwnWeights",
    "ServedTeacher",
    "ServedTopK",
    "ShardedTeacher",
    "Teacher",
    "TeachersById",
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
    if args.teacher_models is not None:
        each = args_by_teacher(args).items()
        made = {
            key: make_teacher(source_of(None, one), student, processor, one) for key, one in each
        }
        return TeachersById(made, processor)
    if args.teacher_cache is not None:
        teacher: Teacher = CachedTeacher.open(processor, args)
    else:
        teacher = make_live_teacher(teacher_model, student, processor, args)
    sharding.check_tensor_parallel(student, teacher, args)
    return teacher


def make_live_teacher(
    teacher_model: PreTrainedModel | str | None,
    student: nn.Module | None,  # of which the teacher is the part below the adapter
    processor: Processor,
    args: GOLDConfig,
) -> Teacher:
    """One that can be asked about any row, also where a cache of it is made."""
    if args.teacher_model_server_url is not None:
        assert isinstance(teacher_model, str), "source_of has found its checkpoint"
        served = ServedTopK if args.asks_for_tokens else ServedTeacher
        return served.open(teacher_model, processor, args)
    if teacher_model is None:
        assert student is not None, "a teacher is named, or the student is its own"
        return OwnWeights(student, processor, args)
    if args.teacher_offload is not None:
        return OffloadedTeacher.load(teacher_model, processor, args)
    kind = FrozenTeacher if args.teacher_sharding is None else ShardedTeacher
    return kind.load(teacher_model, processor, args)


def check_cached(
    teacher: Teacher,
    train_dataset: Any,
    eval_dataset: Any,  # or a dict of them
    collate: Callable[[list[Any]], WindowBatch],
) -> None:
    """Refuse a cache that does not hold these rows; of several, those with its id."""
    several: dict[str | None, Teacher] = {None: teacher}
    if isinstance(teacher, TeachersById):
        several = dict(teacher.teachers.items())
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    for key, one in several.items():
        for rows in (train_dataset, *evaluated):
            if isinstance(one, CachedTeacher) and rows is not None:
                one.check_rows(rows, collate, key)
