"""Arguments of another kind than the classes of tokens take.

The folder imports no other of the library: engine/kinds.py has the like for losses.
"""

from typing import Any


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, float) or is_whole(value)


def check_flags(name: str, **flags: Any) -> None:
    """Any text is true in Python, "False" too."""
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {flag} must be True or False, got {value!r}; pass one.")
