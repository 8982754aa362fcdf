"""A teacher that is a model of its own: frozen, in this process.

N_t scored rows, D_t hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from gold_trainer import loading, loss_at_head, models, sharding
from gold_trainer.batches import SideInputs
from gold_trainer.collator import Processor
from gold_trainer.config import GOLDConfig
from gold_trainer.sides import Side
from gold_trainer.teachers.teacher import Teacher


def _bring_back(head: Any) -> None:
    """Of an offloaded model the head alone stays on the device: the loss reads its weight outside
    the head's own forward pass.
    """
    if head.weight.is_meta:
        device = head._hf_hook.execution_device
        remove_hook_from_module(head)
        head.to(device)


class FrozenTeacher(Teacher):
    def __init__(self, model: nn.Module, processor: Processor, args: GOLDConfig) -> None:
        self.model = model
        self.side = Side.of(model, "teacher", processor, args)

    @classmethod
    def load(
        cls, model: PreTrainedModel | str, processor: Processor, args: GOLDConfig
    ) -> "FrozenTeacher":
        if isinstance(model, str):
            source = args.teacher_model_init_kwargs, args.teacher_model_revision
            with sharding.whole_weights(args):
                model = loading.load_model(model, *source)
        return cls(model, processor, args)

    def place(self, device: torch.device) -> None:
        """A quantised, dispatched or offloaded model stays where it is.

        Not accelerate's prepare_model: its list of models decides how the student is evaluated.
        """
        self.model.requires_grad_(False).eval()
        if models.is_offloaded(self.model):
            _bring_back(self.side.head)
            return
        marks = ("hf_device_map", "quantization_method")
        if all(getattr(self.model, name, None) is None for name in marks):
            self.model = self.model.to(device)

    @torch.no_grad()
    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (N_t, D_t)
        def at_head(hidden: Tensor) -> Tensor:
            return loss_at_head.gather_rows(hidden, inputs.scored_rows)

        with self.writing() as model:
            return self.side.run(model, model, inputs.tensors, at_head)[0]

    @contextmanager
    def writing(self) -> Iterator[nn.Module]:
        yield self.model
