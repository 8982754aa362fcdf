"""Teachers whose model is not in this process: its last hidden states come from elsewhere."""

from contextlib import AbstractContextManager

import torch
from torch import nn

from gold_trainer.models import StoredHead
from gold_trainer.sides import Side
from gold_trainer.teachers.teacher import Teacher


class AbsentTeacher(Teacher):
    """Its head alone is in memory."""

    model = None
    side: Side
    device = torch.device("cpu")

    def place_rows(self, device: torch.device) -> None:
        """Where its hidden states go."""
        self.device = device

    def place(self, device: torch.device) -> None:
        self.place_rows(device)
        head = self.side.head
        if isinstance(head, StoredHead):
            there = head.to(device)
            head.weight, head.bias = there.weight, there.bias

    def writing(self) -> AbstractContextManager[nn.Module]:
        raise AssertionError("a config with such a teacher asks nobody to write")
