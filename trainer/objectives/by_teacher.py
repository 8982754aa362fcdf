"""A loss from several teachers: each row's from its own, all of them one mean.

N_s, N_t scored rows of a side, D hidden size (D_s, D_t).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gold_kernels import TokenAlignment
from gold_trainer.batches import BatchAlignment, Example, MicroBatch, SideInputs, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.models import Head
from gold_trainer.objectives.objective import Objective, even_weights
from gold_trainer.preparing import Prepared
from gold_trainer.rendering.collator import Processor
from gold_trainer.sides import Side
from gold_trainer.teachers.by_id import TeachersById, places_by_teacher
from gold_trainer.teachers.teacher import Teacher
from gold_trainer.weighting.weighting import Weighting


def make_objective(
    prepared: Prepared, args: GOLDConfig, student: Side, teacher: Teacher
) -> Objective:
    kind = prepared.objective
    if isinstance(teacher, TeachersById):
        return ByTeacher(kind, args, student, teacher)
    return kind(args, student, teacher.side)


class ByTeacher(Objective):
    """One objective a teacher. What does not depend on heads is the first's to say."""

    def __init__(
        self, kind: type[Objective], args: GOLDConfig, student: Side, teachers: TeachersById
    ) -> None:
        self.teachers = teachers
        self.parts = {key: kind(args, student, t.side) for key, t in teachers.teachers.items()}
        self.first = first = next(iter(self.parts.values()))
        self.collator, self.collators, self.forms = first.collator, first.collators, first.forms
        self.distillation_weight = first.distillation_weight
        self.crossentropy_weight = first.crossentropy_weight
        self.counts = (*first.counts, *map(_units, self.parts))  # type: ignore[misc]
        self.sums = (*first.sums, *map(_loss, self.parts))

    def weigh_tokens(self, weighting: Weighting | None) -> None:
        self.weighting = weighting  # for those who say what it is; the parts weigh
        for part in self.parts.values():
            part.weigh_tokens(weighting)
        self.sums = (*self.first.sums, *map(_loss, self.parts))

    @staticmethod
    def check_pair(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        raise AssertionError("the kind of objective is asked, before this is made of it")

    @staticmethod
    def teacher_processor(
        teacher_model: PreTrainedModel | str,
        args: GOLDConfig,
        given: Processor | None,
        student: Processor,
    ) -> Processor:
        raise AssertionError("the kind of objective is asked, before this is made of it")

    def prompts(self, batch: WindowBatch, writer: str) -> list[Example]:
        return self.first.prompts(batch, writer)

    def with_completions(
        self, batch: WindowBatch, writer: str, examples: list[Example]
    ) -> WindowBatch:
        return self.first.with_completions(batch, writer, examples)

    def prepare(self, batch: WindowBatch, to_device: Callable[[Tensor], Tensor]) -> MicroBatch:
        return self.first.prepare(batch, to_device)

    def num_units(self, batches: list[WindowBatch]) -> int:
        return self.first.num_units(batches)

    def loss(
        self,
        student_hidden: Tensor,  # (N_s, D_s)
        student_head: Head,
        teacher_hidden: Tensor,  # not looked at: batch.teacher.by_teacher has them
        teacher_head: Head,  # nor this
        batch: MicroBatch,
        item_weights: Tensor | None,  # (2,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        by_teacher = batch.teacher.by_teacher
        assert by_teacher is not None, "the teachers were asked"
        if item_weights is None:  # means of the whole batch, not of a teacher's part
            counts = self.first.batch_counts(batch)
            sizes = counts.get("groups", counts["tokens"]), counts["tokens"]
            item_weights = even_weights(*sizes, student_hidden.device)
        losses: list[Tensor] = []
        total: dict[str, Tensor] = {}
        groups = places_by_teacher(batch.student.examples, self.parts)
        # where nothing is scored the loss has its graph all the same
        groups = groups or {next(iter(self.parts)): []}
        for key, places in groups.items():
            hidden, sub = student_hidden, batch
            if len(groups) > 1:
                rows = _rows_of(batch.student.examples, places, student_hidden.device)
                hidden, sub = student_hidden[rows], _part(batch, places, rows)
            if batch.without_detail is not None:
                looks = batch.without_detail.by_teacher or {}
                sub = replace(sub, hidden_without_detail=looks.get(key))
            width = self.teachers.teachers[key].side.head.weight.shape[1]
            own_hidden = by_teacher.get(key)  # None: nothing of it is spelled on that side
            if own_hidden is None:
                own_hidden = hidden.new_empty(0, width)
            own, sums = self.parts[key].loss(
                hidden, student_head, own_hidden, self.teachers.head(key), sub, item_weights
            )
            if sub.bad_weights is not None:
                before = batch.bad_weights
                batch.bad_weights = sub.bad_weights if before is None else before | sub.bad_weights
            losses.append(own)
            sums |= {_loss(key): sums["loss"]}
            for name, value in sums.items():
                total[name] = total[name] + value if name in total else value
        return torch.stack(losses).sum(), total

    def batch_counts(self, batch: MicroBatch) -> dict[str, int]:
        counts = self.first.batch_counts(batch)
        groups = places_by_teacher(batch.student.examples, self.parts)
        for key in self.parts:
            places = groups.get(key, [])
            if batch.alignment is not None and batch.alignment.parts is not None:
                units = sum(batch.alignment.parts[place].num_groups for place in places)
            else:
                units = sum(len(batch.student.examples[place].written_ids) for place in places)
            counts[_units(key)] = units
        return counts

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """The first's, and the mean of each teacher's own units, where it has some."""
        units = {key: totals[_units(key)] for key in self.parts}
        own = {_loss(key): totals[_loss(key)] / count for key, count in units.items() if count}
        return self.first.means(totals) | own


def _units(key: str) -> str:
    return f"units/{key}"


def _loss(key: str) -> str:
    return f"loss/{key}"


def _rows_of(examples: list[Example], places: list[int], device: torch.device) -> Tensor:
    """Scored rows of these examples among those of all."""
    lengths = [len(example.written_ids) for example in examples]
    rows = torch.arange(sum(lengths)).split(lengths)
    return torch.cat([rows[place] for place in places]).to(device, non_blocking=True)


def _part(batch: MicroBatch, places: list[int], rows: Tensor) -> MicroBatch:
    """What the loss reads of a batch, of these examples alone."""

    def side(inputs: SideInputs, labels: Tensor) -> SideInputs:
        examples = [inputs.examples[place] for place in places]
        return replace(SideInputs.without_tensors(examples), labels=labels)

    alignment: Any = None
    if batch.alignment is not None:
        parts = batch.alignment.parts
        assert parts is not None, "kept where examples have a teacher_id"
        own = BatchAlignment(
            TokenAlignment.concatenate([parts[place] for place in places]),
            [batch.alignment.skip_reasons[place] for place in places],
        )
        alignment = own.to(lambda tensor: tensor.to(rows.device, non_blocking=True))
    none = torch.empty(0, dtype=torch.int64)
    return replace(
        batch,
        student=side(batch.student, batch.student.labels[rows]),
        teacher=side(batch.teacher, none),
        alignment=alignment,
    )
