"""Calls that wait for a server, in threads that no process waits for when it ends."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any


class Background:
    """function of each argument, most of them at a time. The threads of a ThreadPoolExecutor would
    be waited for at exit, as long as the server takes for what nobody reads any more.
    """

    def __init__(self, function: Callable[[Any], Any], arguments: Sequence[Any], most: int) -> None:
        self.futures: list[Future] = [Future() for _ in arguments]
        self.waiting = deque(zip(self.futures, arguments, strict=True))
        self.function = function
        for _ in range(min(most, len(self.futures))):
            Thread(target=self._work, daemon=True).start()

    def results(self) -> list[Any]:
        """Waits for them; the error of the first that has one, the rest not begun."""
        try:
            return [future.result() for future in self.futures]
        finally:
            self.cancel()

    def cancel(self) -> None:
        """What has not begun never does."""
        for future in self.futures:
            future.cancel()

    def _work(self) -> None:
        while True:
            try:
                future, argument = self.waiting.popleft()
            except IndexError:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.function(argument))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
