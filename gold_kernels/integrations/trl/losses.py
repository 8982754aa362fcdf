"""compute_loss of trl's GKDTrainer and GOLDTrainer, run on hidden states."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from gold_kernels.engine.logit_form import forward_is
from gold_kernels.integrations.trl.pending import HiddenModel, NotTakenError

_NOT_TAKEN: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # student -> why


def without_logits(
    readers: Callable[[Any], list[Any]],  # of a trainer: the functions that will get its logits
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """trl's own compute_loss, with models that stand in for student and teacher: their outputs have
    PendingLogits, which the replaced losses take.

    It runs inside of the student's wrapper, as trl's DistillationTrainer does, so that DDP's hooks
    are armed and sharded weights are whole. A trainer or a model whose logits are needed, or whose
    head is not understood, takes trl's way.
    """

    def of(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(
            self: Any,
            model: nn.Module,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            own = partial(original, self, model, inputs, return_outputs, num_items_in_batch)
            student = self.accelerator.unwrap_model(model)
            is_read_elsewhere = not all(hasattr(f, IS_OURS) for f in readers(self))
            if (
                return_outputs
                or is_read_elsewhere
                or student in _NOT_TAKEN
                or self.args.torch_compile  # which would trace what stands in for the model
                or isinstance(model, nn.DataParallel)
                or self.accelerator.is_fsdp2 != (self.accelerator.distributed_type == "FSDP")
            ):
                return own()
            try:
                return _run(original, self, model, student, inputs, num_items_in_batch)
            except NotTakenError as error:
                _NOT_TAKEN[student] = str(error)
                warnings.warn(
                    f"patch_trl: {type(self).__name__} keeps trl's own loss, with full logits, "
                    f"because of {error}.",
                    stacklevel=2,
                )
                return own()

        return compute_loss

    return of


IS_OURS = "takes_pending_logits"


def takes_pending_logits(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mark for replaced losses: a subclass may have put its own in their place."""
    setattr(function, IS_OURS, True)
    return function


def _run(
    original: Callable[..., Any],
    trainer: Any,
    model: nn.Module,
    student: nn.Module,  # without its wrapper
    inputs: Any,
    num_items: Tensor | int | None,
) -> Any:
    teacher_model = trainer.teacher_model
    teacher = HiddenModel(trainer.accelerator.unwrap_model(teacher_model), teacher_model)
    pending = HiddenModel(student, student.forward)
    if pending.head.weight.device != teacher.head.weight.device:
        raise NotTakenError(
            f"heads on {pending.head.weight.device} and {teacher.head.weight.device}"
        )

    def at_model(batch: Any) -> Any:
        return original(trainer, pending, batch, False, num_items)

    trainer.teacher_model = teacher
    try:
        with forward_is(student, at_model):
            return model(inputs)
    finally:
        trainer.teacher_model = teacher_model
