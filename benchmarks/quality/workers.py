"""Processes that work side by side, each with a queue of its own: one that dies takes no other
with it, and another takes its place.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from quality import tasks


class Workers:
    """A worker stays with a pair while that has cases as important as any: what it has rendered for
    one run serves the next.
    """

    def __init__(self, number: int, turns: Sequence[str]) -> None:
        self.pairs = [turns[place % len(turns)] for place in range(number)]
        self.pools = [self._new() for _ in range(number)]

    def __len__(self) -> int:
        return len(self.pools)

    def _new(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork would share what CUDA has begun
        pool = ProcessPoolExecutor(1, mp_context=context)
        pool.submit(tasks.warm)  # imports, while pictures are drawn
        return pool

    def submit(self, place: int, task: Callable, *arguments: Any) -> Future:
        return self.pools[place].submit(task, *arguments)

    def renew(self, place: int) -> None:
        self.pools[place].shutdown(wait=False, cancel_futures=True)
        self.pools[place] = self._new()

    def first_of(self, pair: str, after: int = 0) -> int:
        return next((i for i, own in enumerate(self.pairs) if own == pair and i >= after), 0)

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)


def choose(waiting: Sequence[Any], pair: str) -> Any:
    """The next case of a worker; what is most important waits first."""
    most = waiting[0].rank
    own = (case for case in waiting if case.rank == most and case.pair == pair)
    return next(own, waiting[0])
