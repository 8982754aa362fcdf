"""A cache in the form "head_means": of each position what the forward KL of a frozen head takes.

N scored positions, D_s and D_t hidden sizes, V vocabulary. See gold_kernels/means/linear.py.
"""

from typing import Any

import torch
from torch import Tensor

from gold_kernels import head_means
from gold_trainer import loading
from gold_trainer.batches import SideInputs
from gold_trainer.caching.facts import PRECISIONS, precision_of
from gold_trainer.caching.run import Encoder
from gold_trainer.command_line import Run
from gold_trainer.objectives import SameVocabulary
from gold_trainer.objectives.from_means import check_softcap, facts_of_means, pack
from gold_trainer.objectives.objective import memory_options
from gold_trainer.preparing import Prepared
from gold_trainer.sides import Side
from gold_trainer.teachers.teacher import Teacher


class MeansEncoder(Encoder):
    """Means of the student's head, for which the student is loaded too."""

    form = "head_means"

    def __init__(self, run: Run, prepared: Prepared) -> None:
        args = self.args = run.config
        self.model: Any = loading.load_student(run.student, args, run.peft_config)
        self.student = Side.of(self.model, "student", prepared.student_processor, args)
        self.facts = facts_of_means(args, self.student.head)
        self.dtype, self.head_bytes = torch.float32, 0
        self.width = self.student.head.weight.shape[1] + 3

    def start(
        self, teacher: Teacher, precision: torch.dtype | None, inputs: SideInputs
    ) -> dict[str, Tensor]:
        """No head: training needs none of the teacher."""
        device, args = self.args.device, self.args
        model = self.model.to(device).eval()
        self.student.run(model, model, inputs, lambda hidden: hidden.sum())  # is measured
        check_softcap(self.student.form)
        head = self.student.head
        weight, bias = head.weight.detach(), head.bias
        dtype = PRECISIONS.get(precision_of(args)) or weight.dtype
        self.weight = weight.to(dtype)
        form = teacher.side.form
        self.options: dict[str, Any] = {
            **memory_options(args),
            "temperature": self.facts["teacher_temperature"],
            "student_bias": None if bias is None else bias.detach().to(dtype),
            "teacher_bias": teacher.side.head.bias,
            "vocab_size": SameVocabulary(args, self.student, teacher.side).num_entries,
            "logit_scale": form.scale,
            "final_logit_softcapping": form.softcap,
        }
        self.head = teacher.side.head
        self.model = None  # its head alone stays
        return {}

    def rows(self, hidden: Tensor) -> Tensor:  # (N, D_t) -> (N, D_s + 3)
        weight = self.head.weight.detach()
        return pack(head_means(hidden, weight, self.weight, **self.options))
