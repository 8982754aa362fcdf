"""A teacher that is a model of its own: frozen, in this process.

N_t scored rows, D_t hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from gold_trainer import loading, models, quantised
from gold_trainer.batches import SideInputs
from gold_trainer.config import GOLDConfig
from gold_trainer.rendering.collator import Processor
from gold_trainer.sides import Side
from gold_trainer.teachers.teacher import Teacher


def _bring_back(head: Any) -> None:
    """Keep the head of an offloaded model on the device: the loss reads its weight outside the
    head's own forward pass.
    """
    if head.weight.is_meta:
        device = head._hf_hook.execution_device
        remove_hook_from_module(head)
        head.to(device)


def _is_same_gpu(own: torch.device, device: torch.device) -> bool:
    """device may be without an index: the current one."""
    if own.type != device.type or device.index is not None:
        return False
    return bool(own.index == torch.get_device_module(own).current_device())


def refuse_kinds(model: nn.Module, field: str) -> None:
    """What this field cannot place."""
    what = None
    if models.is_quantised(model):
        what = "one in 8 or 4 bits: load it in 16 bits"
    elif any(hasattr(module, "_hf_hook") for module in model.modules()):
        what = "one that accelerate has placed: load it without device_map and cpu_offload"
    if what is not None:
        raise ValueError(
            f"GOLDTrainer: {field} is for a teacher whose weights are plain tensors in memory, got "
            f"{what}, or leave {field} out."
        )


class FrozenTeacher(Teacher):
    def __init__(self, model: nn.Module, processor: Processor, args: GOLDConfig) -> None:
        self.model, self.args = model, args
        self.side = Side.of(model, "teacher", processor, args)

    @classmethod
    def load(
        cls, model: PreTrainedModel | str, processor: Processor, args: GOLDConfig
    ) -> "FrozenTeacher":
        return cls(cls.load_model(model, args), processor, args)

    @staticmethod
    def load_model(model: PreTrainedModel | str, args: GOLDConfig) -> PreTrainedModel:
        if isinstance(model, str):
            source = args.teacher_model_init_kwargs, args.teacher_model_revision
            device = torch.device(args.teacher_device or args.device)
            with loading.whole_weights():
                model = loading.load_model(model, *source, device=device)
        quantised.restore_head(model, "teacher")
        return model

    @property
    def own_device(self) -> torch.device | None:
        """None: the student's."""
        name = self.args.teacher_device
        return None if name is None else torch.device(name)

    def place(self, device: torch.device) -> None:
        """A quantised, dispatched or offloaded model stays where it is.

        Not accelerate's prepare_model: its list of models decides how the student is evaluated.
        """
        self.model.requires_grad_(False).eval()
        marks = ("hf_device_map", "quantization_method")
        if models.is_offloaded(self.model):
            _bring_back(self.side.head)
        elif all(getattr(self.model, name, None) is None for name in marks):
            self.model = self.model.to(self.own_device or device)
        self.meet(device)

    def meet(self, device: torch.device) -> None:
        """On another device than the student the teacher takes what comes from there, and answers
        there; the loss gets a copy of its head.
        """
        head: Any = self.side.head
        own = head.weight.device
        # a process of several on the CPU has cpu:0, accelerate's one GPU is cuda
        if own == device or own.type == device.type == "cpu" or _is_same_gpu(own, device):
            return
        if own.type == "cpu" and self.own_device is None:
            raise ValueError(
                f"GOLDTrainer: a quantised or dispatched teacher must be on {device}, got one on "
                "the CPU; load it with device_map, or set teacher_device='cpu', which is slow."
            )
        copy = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        copy.weight = nn.Parameter(head.weight.detach().to(device), False)
        if head.bias is not None:
            copy.bias = nn.Parameter(head.bias.detach().to(device), False)
        self.side = replace(self.side, head=copy)
        if not hasattr(self.model, "_hf_hook"):  # of a model that accelerate has spread
            skipped = getattr(self.model, "_skip_keys_device_placement", None)
            hook = AlignDevicesHook(head.weight.device, io_same_device=True, skip_keys=skipped)
            add_hook_to_module(self.model, hook)

    @torch.no_grad()
    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (N_t, D_t)
        with self.writing() as model:
            return self.side.run(model, model, inputs, lambda hidden: hidden)[0]

    @contextmanager
    def writing(self) -> Iterator[nn.Module]:
        yield self.model
