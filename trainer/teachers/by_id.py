"""Several teachers: the column teacher_id says which one a row learns from.

N_t scored rows of a teacher, D_t its hidden size.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from gold_trainer import loading
from gold_trainer.batches import Example, SideInputs
from gold_trainer.caching.facts import facts_of_processor
from gold_trainer.caching.store import form_of_cache
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.teacher import args_by_teacher
from gold_trainer.models import Head, StoredHead
from gold_trainer.rendering.collator import Processor, build_side
from gold_trainer.speed.on_host import sent
from gold_trainer.teachers.absent import AbsentTeacher
from gold_trainer.teachers.named import live_source, source_of
from gold_trainer.teachers.teacher import Teacher

if TYPE_CHECKING:
    from gold_trainer.objectives import Objective


class TeachersById(Teacher):
    """Rows of a micro-batch are grouped by their teacher, each of which is asked once for its own.
    Heads of teachers that are elsewhere are in host memory; the loss has one at a time.
    """

    model = None  # no one of them is it

    def __init__(self, teachers: Mapping[str, Teacher], processor: Processor) -> None:
        self.teachers, self.processor = dict(teachers), processor
        self.side = next(iter(self.teachers.values())).side
        self.device = torch.device("cpu")

    def place(self, device: torch.device) -> None:
        self.device = device
        for teacher in self.teachers.values():
            if isinstance(teacher, AbsentTeacher):
                teacher.place_rows(device)
            else:
                teacher.place(device)

    def head(self, key: str) -> Head:
        """The head on the device, for as long as the caller holds it."""
        head = self.teachers[key].side.head
        return head.to(self.device) if isinstance(head, StoredHead) else head

    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (sum of N_t * D_t,)
        """inputs.by_teacher holds them as they are; all in one row is for who looks for NaN."""
        inputs.by_teacher = {}
        for key, places in places_by_teacher(inputs.examples, self.teachers).items():
            examples = [inputs.examples[place] for place in places]
            own = self._inputs(key, examples, shares_prompts=inputs.shared is not None)
            inputs.by_teacher[key] = self.teachers[key].hidden_rows(own)
        flat = [rows.flatten() for rows in inputs.by_teacher.values()]
        return torch.cat(flat) if flat else torch.empty(0, device=self.device)

    def _inputs(self, key: str, examples: list[Example], *, shares_prompts: bool) -> SideInputs:
        if isinstance(self.teachers[key], AbsentTeacher):
            return SideInputs.without_tensors(examples)
        move = partial(sent, device=self.device)
        return build_side(self.processor, examples, move, shares_prompts=shares_prompts)

    def writing(self) -> AbstractContextManager[nn.Module]:
        raise AssertionError("a config with several teachers asks none to write")


def places_by_teacher(
    examples: Sequence[Example], keys: Mapping[str, object]
) -> dict[str, list[int]]:
    """Which of the examples learn from whom, in the order of teacher_models; none are left out but
    those of which nothing is scored.
    """
    places: dict[str, list[int]] = {key: [] for key in keys}
    for place, example in enumerate(examples):
        if example.written_ids:
            assert example.teacher_id is not None, "rows without a teacher_id were refused"
            places[example.teacher_id].append(place)
    return {key: of_one for key, of_one in places.items() if of_one}


def check_teachers(
    student: PretrainedConfig,
    processor: Processor,  # the student's
    first: Processor,  # that of the first teacher
    args: GOLDConfig,
    objective: "type[Objective]",
) -> None:
    """ValueError for one of several teachers that does not fit the student, or that sees rows
    otherwise than the first.
    """
    several = args_by_teacher(args)
    expected = facts_of_processor(first) if several else {}
    for key, one in list(several.items())[1:]:
        is_cached = form_of_cache(one) is not None  # else it may be what is cached now
        name = source_of(None, one) if is_cached else live_source(one)
        side = f"teacher {key!r}"
        kwargs = one.teacher_model_init_kwargs
        objective.check_pair(student, loading.config_of(name, side, kwargs))
        facts = facts_of_processor(objective.teacher_processor(name, one, None, processor))
        others = sorted(what for what in expected if facts.get(what) != expected[what])
        if others:
            raise ValueError(
                f"GOLDTrainer: all of teacher_models must see rows alike, got {side} with another "
                f"{', '.join(others)} than {next(iter(several))!r}; set "
                "teacher_tokenizer_name_or_path to a processor of them all, or train with one "
                "after the other."
            )
