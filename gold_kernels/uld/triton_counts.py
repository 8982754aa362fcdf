"""Counts of counted_rows.py by kernels: the passes of triton_rows.py, with messages between them.

C rows of a chunk, V_r columns of this process (of student and of teacher), R processes, c rows of
which each is the owner, P open entries that a pool has room for.

A pool begins with two words for each of its c rows: where the row's entries begin behind these
words, and how many there are. An entry is its bin, its level in the bin (lists.py) and its side:
28 bits, and nothing of its column, which stays with its process at the same place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gold_kernels.engine.slices import Slices
from gold_kernels.triton.launch import (
    aligned_width,
    empty_rows,
    has_aligned_rows,
    is_interpreted,
    row_block,
)
from gold_kernels.triton.lines import BITS
from gold_kernels.uld.bin_table import APPEND_BLOCK, NUM_BINS, TABLE_WORDS
from gold_kernels.uld.bins import MAX_LISTED
from gold_kernels.uld.count_kernels import (
    MOST_OPEN,
    SCAN_BINS,
    count_columns_kernel,
    scan_counts_kernel,
    sign_columns_kernel,
)
from gold_kernels.uld.counted_rows import pool_rows, pool_size
from gold_kernels.uld.open_kernels import collect_open_kernel, order_open_kernel
from gold_kernels.uld.row_memory import MAX_PROGRAMS
from gold_kernels.uld.triton_sums import Slices as RowSlices
from gold_kernels.uld.triton_sums import uld_sums

SIGN_DTYPE = torch.float16  # of open entries on their way


def row_bytes(slices: Sequence[Slices], dtype: torch.dtype, is_in_place: bool) -> int:
    """What a row of a chunk takes, at most. is_in_place: its gradient lies over its logits."""
    number = len(slices[0].sizes)
    # counts that are sent, later offsets and D of own rows; those received, later signs of all
    # rows; signs of own rows, and a table where it is not shared
    tables = 4 * TABLE_WORDS * (max(2 / number, 1) + 1 + 2 / number)
    # pools that are sent, later keys; those received; columns of entries; bins of keys; signs of
    # entries that are found, later received; those sent
    entries = pool_size(1 << 10, (slices[0], slices[1])) / (1 << 10)
    signs = dtype.itemsize * aligned_width(slices[0].widest) if is_in_place else 0
    return int(tables + entries * (4 * 4 + 2 * SIGN_DTYPE.itemsize)) + signs


class TritonCounts:
    """See counted_rows.Counts."""

    def __init__(
        self,
        student: Tensor,  # (C, V_r), unit column stride
        teacher: Tensor,  # (C, V_r), unit column stride
        grad: Tensor | None,  # (C, V_r), overwritten; may be student
        weights: Tensor,  # (C, 2) float32, contiguous
        totals: Tensor,  # (C, 3) float32, overwritten
        slices: tuple[Slices, Slices],
        *,
        temperatures: tuple[float, float],
        unmatched_weight: float,
        softcap: float | None,
        scratch_bytes: int,  # of lists, at most
    ) -> None:
        self._student, self._teacher, self._grad, self._weights = student, teacher, grad, weights
        self._slices, self._softcap, self._weight = slices, softcap, unmatched_weight
        self._bits = [BITS.value / temperature for temperature in temperatures]
        self._num_rows, self._num_ranks = len(student), len(slices[0].sizes)
        self._own = pool_rows(self._num_rows, self._num_ranks)
        self._first = min(slices[0].rank * self._own, self._num_rows)
        self._num_own = min(self._own, self._num_rows - self._first)
        self._scratch_bytes = scratch_bytes
        self._pool = pool_size(self._own, slices)
        rows = [student, teacher, *([] if grad is None else [grad])]
        is_shared = student.device.type == "cuda" and torch.version.hip is None
        is_shared &= all(has_aligned_rows(tensor) for tensor in rows)
        block_v, line, num_warps = row_block(max(1, student.shape[1]), student.dtype)
        if is_shared:
            block_v = max(block_v, APPEND_BLOCK)
        self._columns = {"BLOCK_V": block_v, "LINE": line}
        self._table = {"IS_SHARED": is_shared, "NUM_BINS": NUM_BINS, "TABLE_WORDS": TABLE_WORDS}
        self._table |= {"SCAN_BINS": SCAN_BINS, "num_warps": num_warps}
        self._table |= {"maxnreg": 64} if is_shared else {}
        self._totals = totals
        self.spare: Tensor | None = None

    def _integers(self, *shape: int) -> Tensor:
        return self._student.new_empty(shape, dtype=torch.int32)

    def sums(self) -> Tensor:  # (C, 2, S, 3) float64
        student, teacher = self._slices
        most = RowSlices.of(student.widest, teacher.widest, self._student.dtype).most
        return uld_sums(self._student, self._teacher, None, self._bits[0], self._bits[1], most).sums

    def count(self, sums: Tensor) -> Tensor:  # (R, C, 2, S, 3) -> (R, c, words)
        self._grid = (sums, sums.stride(0), *(side.total for side in self._slices), *self._bits)
        self._table |= {"NUM_SLICES": sums.shape[3], "NUM_RANKS": self._num_ranks}
        self._table |= {"RANK_BLOCK": 1 << (self._num_ranks - 1).bit_length()}
        self._counts = self._integers(self._num_ranks, self._own, TABLE_WORDS)
        count_columns_kernel[(self._num_rows,)](
            *(self._student, self._teacher, self._weights, self._counts, *self._grid),
            *(self._student.stride(0), self._teacher.stride(0)),
            *(self._student.shape[1], self._teacher.shape[1]),
            **self._table,
            **self._columns,
        )
        return self._counts

    def scan(self, counts: Tensor) -> Tensor:  # (R, c, words) -> (c, words)
        words, self.spare = self._integers(self._own, TABLE_WORDS), counts.flatten(0, 1)
        self._befores, self._offsets = self._own_bins()
        self._state = self._integers(self._own, 2)
        self._ends = self._state.new_zeros(self._num_ranks + 1)  # of pools, and of keys
        self._edges = self._totals.new_empty(self._own)
        scan_counts_kernel[(self._num_own,)](
            *(counts, self._weights, words, self._offsets, self._befores, self._state),
            *(self._ends[-1:], self._edges, *self._grid, self._first, self._own),
            self._num_ranks * self._pool,
            MAX_LISTED=MAX_LISTED,
            **self._table,
        )
        return words

    def _own_bins(self) -> tuple[Tensor, Tensor]:  # (c, bins) each
        """Memory for this process' bins: that of counts that were sent, if it is enough."""
        size = self._own * NUM_BINS
        memory = self._counts.flatten()
        memory = memory if len(memory) >= 2 * size else self._integers(2 * size)
        first, second = (memory[at : at + size].view(self._own, NUM_BINS) for at in (0, size))
        return first, second

    def collect(self, signs: Tensor) -> Tensor:  # (R c, words) -> (R, 2 c + P)
        self._words = signs
        self._pools = self._integers(self._num_ranks, 2 * self._own + self._pool)
        self._entries = torch.empty_like(self._pools)
        list_size = min(MOST_OPEN, sum(aligned_width(side.widest) for side in self._slices))
        most = max(1, min(MAX_PROGRAMS, self._scratch_bytes // (4 * list_size)))
        num_programs = 1 if is_interpreted() else min(self._num_rows, most)
        lists = self._integers(num_programs, list_size)
        collect_open_kernel[(num_programs,)](
            *(self._student, self._teacher, self._weights, signs, lists, self._pools),
            *(self._entries, self._ends, self._totals, *self._grid),
            *(self._student.stride(0), self._teacher.stride(0)),
            *(self._num_rows, self._own, self._pool, list_size),
            *(self._student.shape[1], self._teacher.shape[1]),
            **self._table,
            **self._columns,
        )
        return self._pools

    def order(self, entries: Tensor) -> Tensor:  # (R, 2 c + P) -> (R, P)
        signs = self._student.new_empty(self._num_ranks, self._pool, dtype=SIGN_DTYPE)
        self.spare = torch.empty_like(signs)
        owners = self._integers(signs.numel())
        table = owners  # not read where it is shared
        if not self._table["IS_SHARED"]:
            table = self._integers(self._own, TABLE_WORDS)
        order_open_kernel[(self._num_own,)](
            *(entries, self._offsets, self._befores, self._state, self._edges),
            # what was sent is not needed again: its memory is that of the keys
            *(self._pools, owners, self.spare, signs, table, self._totals, *self._grid),
            *(self._first, self._own, self._pool),
            NEEDS_GRAD=self._grad is not None,
            **self._table,
        )
        return signs

    def write_gradient(self, signs: Tensor) -> None:  # (R, P)
        assert self._grad is not None, "called for a gradient"
        own = self._grad  # signs of open entries lie where the gradient is to be
        if own.data_ptr() == self._student.data_ptr():
            own = empty_rows(own, len(own), own.shape[1], own.dtype)
        sign_columns_kernel[(self._num_rows,)](
            *(self._student, self._grad, own, self._weights, self._words, self._entries),
            *(signs, self._totals, *self._grid),
            *(self._student.stride(0), self._grad.stride(0), own.stride(0)),
            *(self._own, self._pool, self._student.shape[1], self._weight),
            1.0 if self._softcap is None else self._softcap,
            HAS_SOFTCAP=self._softcap is not None,
            **self._table,
            **self._columns,
        )
