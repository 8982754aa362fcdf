"""The next window is written by a server while this one is learnt (async_rollouts=1).

Its completions come from the weights before this window's step: they are one step old. The first
window of a run, of an epoch and of a resumed run is written with the newest weights, as without it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from transformers import TrainerState

from gold_trainer.batches import Example, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.sharding import PicturesForAll
from gold_trainer.window import Rollouts, fetch_window


class Asked(NamedTuple):
    """A window whose rollouts are on their way."""

    batches: list[WindowBatch]
    step: int
    written: Callable[[], Iterator[Example]] | None  # None: the student writes none of it


class WindowSource:
    """The windows of a run, one after the other, with their completions."""

    def __init__(
        self, args: GOLDConfig, rollouts: Rollouts, pictures_for_all: PicturesForAll
    ) -> None:
        self.args, self.rollouts, self.pictures_for_all = args, rollouts, pictures_for_all
        self.asked: Asked | None = None

    def next(
        self, batches: Iterator[WindowBatch], num_batches: int, state: TrainerState
    ) -> list[WindowBatch]:
        """Called on all ranks. batches: of the rest of the epoch; [] where it has ended."""
        step, asked, self.asked = state.global_step, self.asked, None
        if asked is not None and asked.step == step:
            window = self.rollouts.complete(asked.batches, step, asked.written)
        else:
            fetched = self._fetch(batches, num_batches)
            window = self.rollouts.complete(fetched, step) if fetched else []
        if self.args.async_rollouts and step + 1 < state.max_steps:
            following = self._fetch(batches, self.args.gradient_accumulation_steps)
            if following:
                written = self.rollouts.ask(following, step + 1)
                self.asked = Asked(following, step + 1, written)
        return window

    def close(self) -> None:
        """The run has ended, or its next one begins elsewhere."""
        self.asked = None
        for writer in self.rollouts.writers.values():
            writer.close()

    def _fetch(self, batches: Iterator[WindowBatch], num_batches: int) -> list[WindowBatch]:
        return self.pictures_for_all.add(fetch_window(batches, num_batches))
