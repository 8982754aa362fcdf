"""A student with an adapter that is its own teacher: the weights below the adapter teach."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gold_trainer.config import GOLDConfig
from gold_trainer.rendering.collator import Processor
from gold_trainer.sides import Side
from gold_trainer.teachers.frozen import FrozenTeacher

# Values of init_lora_weights with which peft subtracts the adapter's start from the weights below,
# or quantises them.
INITS_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class OwnWeights(FrozenTeacher):
    """Runs as a frozen teacher, on the student's module with its adapter switched off."""

    def __init__(self, student: nn.Module, processor: Processor, args: GOLDConfig) -> None:
        check_only_adapter_is_trained(student)
        self.model = student
        self.side = Side.of(student, "teacher", processor, args, is_below_adapter=True)

    def place(self, device: torch.device) -> None:
        """The student is placed by its Trainer."""

    @contextmanager
    def writing(self) -> Iterator[nn.Module]:
        """The student without its adapter and in eval mode. The end of the context restores both,
        and which parameters are trained.
        """
        student: Any = self.model  # a PeftModel
        was_training = student.training
        needed_grad = [(p, p.requires_grad) for p in student.parameters()]
        student.eval()
        try:
            with student.disable_adapter():
                # peft freezes the adapter, and FSDP looks once, at the first forward pass, for the
                # type of what is trained
                _restore(needed_grad)
                yield student
        finally:
            student.train(was_training)
            _restore(needed_grad)  # peft thaws what was frozen of an adapter


def _restore(needed_grad: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, needs_grad in needed_grad:
        parameter.requires_grad_(needs_grad)


def check_only_adapter_is_trained(student: Any) -> None:  # a PeftModel
    """What the student trains must not change its teacher, nor the adapter's start its weights."""
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    tuner = getattr(student.base_model, "prefix", "no prefix")  # lora_ in lora_A.default.weight
    parts = (tuner, ".modules_to_save.", ".trainable_tokens_")
    shared = [name for name in trained if not any(part in name for part in parts)]
    if shared:
        raise ValueError(
            "GOLDTrainer: a student that is its own teacher must train its adapter only, got "
            f"{shared[0]} among {len(shared)} parameters that the teacher would share; freeze them "
            "(bias='none'), train copies (modules_to_save), or pass teacher_model=."
        )
    for name in student.active_adapters:
        init = getattr(student.peft_config[name], "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(INITS_OF_THE_BASE):
            raise ValueError(
                "GOLDTrainer: a student that is its own teacher must keep the weights below its "
                f"adapter, got init_lora_weights={init!r}, which takes the adapter out of them; "
                "use init_lora_weights=True, or pass teacher_model=."
            )
