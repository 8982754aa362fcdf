"""Loggers of a library that say nothing within a context, in the thread that is in it alone.

A library's verbosity is one for all threads: of two that lower it at a time and put back what they
found, the second leaves it low for good, and warnings and progress bars of the run are gone.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# how two libraries fit each other, said when they are imported, whatever the run is
WARN_OF_THEMSELVES = ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops")

_QUIET: ContextVar[frozenset[str]] = ContextVar("_QUIET", default=frozenset())


def _is_heard(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.name not in _QUIET.get()


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Warnings of these loggers are dropped, those of loggers below them are not."""
    for name in names:
        logging.getLogger(name).addFilter(_is_heard)  # once, however often
    token = _QUIET.set(_QUIET.get() | set(names))
    try:
        yield
    finally:
        _QUIET.reset(token)
