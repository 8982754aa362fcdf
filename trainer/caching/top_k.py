"""A cache in the form "top_k": of each position the ids of the teacher's k likeliest tokens, and
their log-probabilities.

N scored positions, D_t hidden size. See trainer/objectives/from_top_k.py.
"""

import torch
from torch import Tensor

from gold_trainer.batches import SideInputs
from gold_trainer.caching.packed import pack
from gold_trainer.caching.run import Encoder
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives.from_top_k import FromTopK
from gold_trainer.sides import Side
from gold_trainer.teachers.teacher import Teacher


class TopKEncoder(Encoder):
    form = "top_k"

    def __init__(self, args: GOLDConfig, student: Side, teacher: Side) -> None:  # without weights
        self.args, self.student = args, student
        self.facts = FromTopK(args, student, teacher).facts | {"loss_top_k": args.loss_top_k}
        self.dtype, self.width, self.head_bytes = torch.float32, 2 * args.loss_top_k, 0

    def start(
        self, teacher: Teacher, precision: torch.dtype | None, inputs: SideInputs
    ) -> dict[str, Tensor]:
        """No head: training needs none of the teacher."""
        self.objective = FromTopK(self.args, self.student, teacher.side)
        self.head = teacher.side.head
        return {}

    def rows(self, hidden: Tensor) -> Tensor:  # (N, D_t) -> (N, 2 k)
        if self.objective.is_stored:  # by a server, which has packed tokens in their place
            return hidden
        return pack(*self.objective.teacher_entries(hidden, self.head))
