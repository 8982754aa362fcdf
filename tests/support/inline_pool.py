"""A pool of the workers of bench_quality.py that starts no process."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Inline:
    """A pool whose tasks run where they are handed out."""

    def submit(self, task: Callable[..., Any], *args: Any) -> Future:
        done: Future = Future()
        try:
            done.set_result(task(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, **options: Any) -> None: ...
