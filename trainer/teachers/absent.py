"""Teachers whose model is not in this process: its last hidden states come from elsewhere.

D_t hidden size, V_t vocabulary.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gold_trainer.sides import Side
from gold_trainer.teachers.teacher import Teacher


@dataclass
class StoredHead:
    """The teacher's head without the rest of it."""

    weight: Tensor  # (V_t, D_t)
    bias: Tensor | None  # (V_t,)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


class AbsentTeacher(Teacher):
    """Its head alone is in memory."""

    model = None
    side: Side
    device = torch.device("cpu")

    def place(self, device: torch.device) -> None:
        self.device = device
        head = self.side.head
        if isinstance(head, StoredHead):
            head.weight = head.weight.to(device)
            head.bias = None if head.bias is None else head.bias.to(device)

    def writing(self) -> AbstractContextManager[nn.Module]:
        raise AssertionError("a config with such a teacher asks nobody to write")
