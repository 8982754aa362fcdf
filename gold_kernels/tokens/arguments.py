"""Arguments of another kind than the classes of tokens take.

The folder imports no other of the library: engine/kinds.py has the like for losses.
"""

from typing import Any

import torch
from torch import Tensor


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, float) or is_whole(value)


def check_flags(name: str, **flags: Any) -> None:
    """Any text is true in Python, "False" too."""
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {flag} must be True or False, got {value!r}; pass one.")


def check_tables(name: str, **tables: Any) -> None:
    """TokenBytes of both sides, which know the bytes of every token."""
    for side, table in tables.items():
        if not hasattr(table, "pieces"):
            raise ValueError(
                f"{name}: the {side} must be TokenBytes, got {type(table).__name__}; pass "
                f"TokenBytes(tokenizer), or use {name.partition('.')[0]}.from_tokenizers."
            )


def check_index(name: str, index: Any, expected: str) -> None:  # (N,) int64
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.int64:
        is_tensor = isinstance(index, Tensor)
        got = f"{tuple(index.shape)} {index.dtype}" if is_tensor else type(index).__name__
        raise ValueError(f"{name} must be (N,) int64, got {got}; pass {expected}.")
