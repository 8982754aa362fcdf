"""The next window's rows are read while the device computes this one.

With async_rollouts=1 a server writes its completions meanwhile.
These completions come from the weights before this window's step: they are one step old. The first
window of a run, of an epoch and of a resumed run is written with the newest weights, as without it.
"""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

from transformers import TrainerState

from gold_trainer.batches import Example, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.data.streams import passes
from gold_trainer.models import has_router_loss
from gold_trainer.sharding import PicturesForAll
from gold_trainer.speed.grouping import by_length
from gold_trainer.speed.inputs import Ahead
from gold_trainer.window import Rollouts, fetch_window


class Asked(NamedTuple):
    """A window whose rollouts are on their way."""

    batches: list[WindowBatch]
    step: int
    written: Callable[[], Iterator[Example]] | None  # None: the student writes none of it


class Fetched(NamedTuple):
    """A window whose rows are here, or the error that reading them has ended in."""

    batches: list[WindowBatch]
    error: Exception | None = None


class WindowSource:
    """The windows of a run, one after the other, with their completions."""

    def __init__(
        self, args: GOLDConfig, rollouts: Rollouts, pictures_for_all: PicturesForAll
    ) -> None:
        self.args, self.rollouts, self.pictures_for_all = args, rollouts, pictures_for_all
        self.asked: Asked | None = None
        self.fetched: Fetched | None = None
        self.rest: Iterator[WindowBatch] = iter(())  # of the epoch
        self.stream: tuple[Any, Iterator[WindowBatch]] | None = None  # its loader, what is left

    def of_stream(self, loader: Any, state: TrainerState) -> Iterator[WindowBatch]:
        """In the place of an epoch's: transformers takes max_steps for the one epoch of a stream,
        whatever a pass holds.
        """
        if self.stream is None or self.stream[0] is not loader:  # a run begins, or is resumed
            skips = not self.args.ignore_data_skip
            done = state.global_step * self.args.gradient_accumulation_steps * skips
            self.stream = loader, passes(loader, done)
        return self.stream[1]

    def next(
        self, batches: Iterator[WindowBatch], num_batches: int, state: TrainerState
    ) -> list[WindowBatch]:
        """Called on all ranks. batches: of the rest of the epoch; [] where it has ended."""
        step, asked, self.asked = state.global_step, self.asked, None
        if asked is not None and asked.step == step:
            window = self.rollouts.complete(asked.batches, step, asked.written)
        else:
            fetched = self._fetch(batches, num_batches, step)
            window = self.rollouts.complete(fetched, step) if fetched else []
        if self.args.async_rollouts and step + 1 < state.max_steps:
            following = self._fetch(batches, self.args.gradient_accumulation_steps, step + 1)
            if following:
                written = self.rollouts.ask(following, step + 1)
                self.asked = Asked(following, step + 1, written)
        return window

    def look_ahead(self, state: TrainerState) -> Ahead | None:
        """Read the rows of the next window, within a step. Its first micro-batch can become tensors
        before the window's turn if nobody has to write for it.
        """
        step = state.global_step + 1
        if step >= state.max_steps:
            return None
        if self.asked is None:
            try:
                rows = self._read(self.rest, self.args.gradient_accumulation_steps, step)
                self.fetched = Fetched(rows)
            except Exception as error:  # of a row: this step does not end with it
                self.fetched = Fetched([], error)
        following = self.asked or self.fetched
        if following is None or self.pictures_for_all.is_needed:  # ranks agree on them in its turn
            return None
        is_known = self.rollouts.source(step, 0) == "dataset"
        first = next(iter(following.batches), None) if is_known else None
        return Ahead(partial(self.rollouts.look_ahead, following.batches, step), first)

    def close(self) -> None:
        """The run has ended, or its next one begins elsewhere."""
        self.asked = self.fetched = self.stream = None
        self.rest = iter(())  # the data loader's, whose workers end with it
        for writer in self.rollouts.writers.values():
            writer.close()

    @cached_property
    def may_group(self) -> bool:
        """Two tokenizers are aligned a micro-batch at a time, and so are routers balanced."""
        collators, student = self.rollouts.objective.collators, self.rollouts.models["student"]
        is_split = self.args.gradient_accumulation_steps > 1
        is_free = collators["student"] is collators["teacher"]
        is_free = is_free and (student is None or not has_router_loss(student))
        is_wanted = self.args.group_by_length
        if is_wanted is None:  # packed rows have no padding, and the longest need the most memory
            is_wanted = self.args.device.type == "cuda" and not self.args.padding_free
        return is_wanted and is_split and is_free

    def _fetch(
        self, batches: Iterator[WindowBatch], num_batches: int, step: int
    ) -> list[WindowBatch]:
        fetched, self.fetched = self.fetched, None
        if fetched is None or batches is not self.rest:  # another epoch has begun
            self.rest = batches
            fetched = Fetched(self._read(batches, num_batches, step))
        if fetched.error is not None:
            raise fetched.error
        return self.pictures_for_all.add(fetched.batches)

    def _read(
        self, batches: Iterator[WindowBatch], num_batches: int, step: int
    ) -> list[WindowBatch]:
        """Which rows share a micro-batch is settled here, before ranks agree on its pictures and
        before anything is written: it follows from rows and step, also in a resumed run.
        """
        window = fetch_window(batches, num_batches, self.args.num_generations > 1)
        if not self.may_group:
            return window
        return by_length(window, [self.rollouts.source(step, i) for i in range(len(window))])
