"""What the trainer asks of a teacher. A module here, a cache on disk or a server may answer.

N_t scored rows, D_t hidden size, V_t vocabulary.
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from gold_trainer.batches import SideInputs
from gold_trainer.sides import Side


class Teacher(Protocol):
    """Gives its last hidden states at the scored rows. The loss applies its head to them."""

    side: Side  # head with weight (V_t, D_t), form of its logits, collator
    model: nn.Module | None  # None where no module is here

    def place(self, device: torch.device) -> None:
        """Go to the device. Called once, before the first step."""
        ...

    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (N_t, D_t), without a gradient
        """The last hidden states at inputs.scored_rows, in that order.

        inputs has the examples too: a cache finds its rows by their index, a server gets token ids
        and pictures as they are.
        """
        ...

    def writing(self) -> AbstractContextManager[nn.Module]:
        """The module that completes prompts as this teacher would, for seq_kd."""
        ...
