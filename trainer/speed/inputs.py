"""The first micro-batch of the next window is made while the device computes this one's.

Within a window that happens by itself: a micro-batch is given to the device, which works on it
while the next one is made. Between two windows the host reads the gradient's norm, and would only
then begin to read rows and pictures.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakMethod

from torch import Tensor

from gold_trainer.batches import MicroBatch, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives import Objective
from gold_trainer.speed.on_host import moved, pinned
from gold_trainer.speed.teacher_passes import TeacherPasses


class Made(NamedTuple):
    batch: WindowBatch
    inputs: MicroBatch | Exception  # on the host, or what making them has ended in


class Mover:
    """Tensors of the host to the device."""

    def __init__(self, args: GOLDConfig, finish: Callable[[Tensor], Tensor]) -> None:
        self.args = args
        self.finish = WeakMethod(finish)  # of the trainer, which holds this: DeepSpeed's dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.move(self.pinned(tensor))

    def pinned(self, tensor: Tensor) -> Tensor:
        return pinned(tensor, self.args.device) if self.args.dataloader_pin_memory else tensor

    def move(self, tensor: Tensor) -> Tensor:
        finish = self.finish()
        assert finish is not None, "the trainer is there while it trains"
        return finish(moved(tensor, self.args.device))


class Inputs:
    """Tensors of micro-batches, in their turn or before it."""

    def __init__(
        self,
        objective: Objective,
        args: GOLDConfig,
        finish: Callable[[Tensor], Tensor],
        foresee: Callable[[MicroBatch], None],  # what models will ask of it
    ) -> None:
        self.objective, self.mover, self.foresee = objective, Mover(args, finish), foresee
        self.made: Made | None = None
        self.passes = TeacherPasses(objective, args, self.mover)

    def make(self, batch: WindowBatch | None) -> None:
        """Of a batch whose turn comes next; None: it is not known, or has to be written first."""
        self.made = None
        if batch is None:
            return
        try:
            inputs = self.objective.prepare(batch, self.mover.pinned)
            self.foresee(inputs)
            self.made = Made(batch, inputs)
        except Exception as error:  # of a row: the step that is computed does not end with it
            self.made = Made(batch, error)

    def take(self, batch: WindowBatch) -> MicroBatch:
        """On the device."""
        if all(batch is not other for other in self.passes.window):  # of an evaluation
            self.passes.start([batch])
        made, self.made = self.made, None
        # what decides and counts makes new batches of the same examples
        if made is not None and made.batch.examples is batch.examples:
            if isinstance(made.inputs, Exception):
                raise made.inputs
            return made.inputs.to(self.mover.move)
        return self.objective.prepare(batch, self.mover)
