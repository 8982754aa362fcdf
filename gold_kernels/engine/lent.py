"""Buffers in the memory of a tensor that is written after they are read.

A call returns the gradient of a trained head: 0.6 GiB for 151936 entries of 2048 numbers, which
nobody needs until the last rows are done. A small budget of its own holds few rows of logits, and
at few rows their products take as long as reading the heads. So it borrows.
"""

import torch
from torch import Tensor

from gold_kernels.triton.launch import aligned_width, empty_rows


class LentMemory:
    """The bytes of a contiguous tensor, given out from the first on."""

    def __init__(self, tensor: Tensor) -> None:
        self._bytes = tensor.view(-1).view(torch.uint8)
        self._start = 0

    def rows(self, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised (num_rows, vocab_size) with aligned rows."""
        width = aligned_width(vocab_size)
        stop = self._start + num_rows * width * dtype.itemsize
        assert stop <= len(self._bytes), "more is lent than there is"
        rows = self._bytes[self._start : stop].view(dtype).view(num_rows, width)
        self._start = stop  # a multiple of 32 bytes, since rows are of 16 numbers
        return rows[:, :vocab_size]


def rows_in(
    memory: LentMemory | None,  # None: memory of their own
    like: Tensor,
    num_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:  # (num_rows, vocab_size), uninitialised
    if memory is None:
        return empty_rows(like, num_rows, vocab_size, dtype)
    return memory.rows(num_rows, vocab_size, dtype)
