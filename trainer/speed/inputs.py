"""Micro-batches become tensors while others are computed.

A thread makes them, one ahead: what launches kernels has no time for pictures where the device is
as fast as it is. For the next window rows are read between the last forward and backward pass of
this one; its first tensors, and those of prompts that are to be written for, are made during the
latter. Without the thread the former come behind it: a device has work for as many kernels as its
queue holds, which is not enough for both at once. Between two windows the host reads the gradient's
norm, and would only then begin to read rows and pictures.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor

from gold_trainer.batches import MicroBatch, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives import Objective
from gold_trainer.speed.on_host import moved, pinned
from gold_trainer.speed.step import FastStep
from gold_trainer.speed.teacher_passes import TeacherPasses


class Made(NamedTuple):
    batch: WindowBatch
    inputs: MicroBatch | Exception  # on the host, or what making them has ended in


class Ahead(NamedTuple):
    """Of the next window, whose rows are read."""

    see: Callable[[], None]  # writers see its prompts, of which they can make tensors
    first: WindowBatch | None  # None: others come before its tensors


class Mover:
    """Tensors of the host to the device."""

    def __init__(self, args: GOLDConfig, finish: Callable[[Tensor], Tensor]) -> None:
        self.args = args
        self.finish = WeakMethod(finish)  # of the trainer, which holds this: DeepSpeed's dtype

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.move(self.pinned(tensor))

    def pinned(self, tensor: Tensor) -> Tensor:
        return pinned(tensor, self.args)

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
        step: FastStep,
    ) -> None:
        self.objective, self.mover, self.step = objective, Mover(args, finish), step
        self.made: Made | None = None
        self.pending: Future[Made | None] | None = None  # of the next one
        self.find: Callable[[], Ahead | None] | None = None  # reads the rows of the next window
        self.found: WindowBatch | None = None
        self.passes = TeacherPasses(objective, args, self.mover)
        # A processor is for one thread at a time: others may ask it within a step.
        makes_tensors = objective.is_teacher_apart or args.teacher_models is not None
        is_asked = makes_tensors or objective.weighting is not None
        self.has_thread = args.device.type == "cuda" and not is_asked

    @cached_property
    def thread(self) -> ThreadPoolExecutor:
        device = self.mover.args.device
        on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        return ThreadPoolExecutor(1, "gold_trainer inputs", *on_device)

    def start(self, window: list[WindowBatch]) -> None:
        """Its micro-batches come next, in training."""
        for batch in window:
            batch.shares_prompts = self.step.packing.shares(batch)
        self.passes.start(window)

    @contextmanager
    def preparing(self, find: Callable[[], Ahead | None] | None) -> Iterator[None]:
        """Around both passes of a micro-batch. find: of a window's last one."""
        self.find, self.found = find, None
        try:
            yield
            self.look_ahead()
            if find is not None:
                self._finish()
        finally:
            self.find = self.found = None

    def look_ahead(self) -> None:
        """Between both passes."""
        find, self.find = self.find, None
        ahead = None if find is None else find()
        if ahead is None:
            return
        if ahead.first is not None:
            ahead.first.shares_prompts = self.step.packing.shares(ahead.first)
        if self.has_thread:
            self.pending = self.thread.submit(self._made_ahead, ahead)
        else:
            ahead.see()
            self.found = ahead.first

    def _made_ahead(self, ahead: Ahead) -> Made | None:
        ahead.see()
        return None if ahead.first is None else self._made(ahead.first)

    def _finish(self) -> None:
        """What comes behind a step may ask the processor: an evaluation does."""
        self.made = None if self.found is None else self._made(self.found)
        self._receive()

    def _receive(self) -> None:
        """What the thread has made. Its error is raised once."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.made = pending.result()

    def _made(self, batch: WindowBatch) -> Made:
        try:
            inputs = self.objective.prepare(batch, self.mover.pinned)
            self.step.foresee(inputs)
            return Made(batch, inputs)
        except Exception as error:  # of a row: the step that is computed does not end with it
            return Made(batch, error)

    def take(self, batch: WindowBatch) -> MicroBatch:
        """The tensors on the device."""
        self._receive()
        if all(batch is not other for other in self.passes.window):
            self.passes.start([batch])  # an evaluation: what is made is of the step behind it
            return self.objective.prepare(batch, self.mover)
        made, self.made = self.made, None
        # what decides and counts makes new batches of the same examples
        if made is None or made.batch.examples is not batch.examples:
            inputs = self.objective.prepare(batch, self.mover)
        elif isinstance(made.inputs, Exception):
            raise made.inputs
        else:
            inputs = made.inputs.to(self.mover.move)
        self._begin(batch)
        return inputs

    def _begin(self, batch: WindowBatch) -> None:
        """Begin to make the micro-batch behind this one in the window."""
        window = self.passes.window
        place = next(i for i, other in enumerate(window) if other is batch) + 1
        if self.has_thread and place < len(window):
            self.pending = self.thread.submit(self._made, window[place])
