"""What was probably meant by a name that there is not."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, known: Iterable[Any], cutoff: float = 0.6) -> str | None:
    found = difflib.get_close_matches(str(name), [str(other) for other in known], 1, cutoff)
    return found[0] if found else None


def did_you_mean(name: Any, known: Iterable[Any], cutoff: float = 0.6) -> str:
    """The end of a sentence; empty where no known name is near."""
    found = nearest(name, known, cutoff)
    return "" if found is None else f"; did you mean {found}?"
