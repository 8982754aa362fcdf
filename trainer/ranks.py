"""What one rank finds, or fails with, known to all: none waits for a rank that has stopped.

Each function is called on all ranks.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def on_main_process(accelerator: Accelerator | PartialState, function: Callable[[], T]) -> T:
    """What the main process finds, on every rank; its errors too, so that none waits for it:
    a ValueError or OSError as a ValueError, any other as a RuntimeError with its name.
    """
    answer: list[Any] = [None, None, True]
    cause: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = str(error)
        except Exception as error:
            cause = error
            answer[1:] = f"{type(error).__name__}: {error}", False
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise (ValueError if answer[2] else RuntimeError)(answer[1]) from cause
    return answer[0]


def on_every_rank(function: Callable[[], T]) -> T:
    """What each rank finds for itself. Where one has an error, all end with it."""
    found: Any = None
    error: Exception | None = None
    try:
        found = function()
    except Exception as first:  # whatever it is, the other ranks must hear of it
        error = first
    raise_on_all(error)
    return found


def raise_on_all(error: Exception | None) -> None:
    """The error of one rank on every rank, so that none waits for it."""
    state = PartialState()
    if state.num_processes > 1:
        told = None if error is None else f"rank {state.process_index}: {error}"
        first = next((text for text in gather_object([told]) if text is not None), None)
        if error is None and first is not None:
            raise ValueError(first)
    if error is not None:
        raise error
