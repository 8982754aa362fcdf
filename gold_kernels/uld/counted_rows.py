"""ULD of heads in slices by counts: no process sees a whole row.

C rows of a chunk, V_r columns of this process, R processes, c = ceil(C / R) rows of which each is
the owner, P entries of a pool.

1. Every process counts its columns of all rows on one grid, and sends the counts of each row to the
   row's owner.
2. The owner adds them up and scans them, as the row kernel does. The signs of all bins go to every
   process; where counts leave the sign open the bin's entries are asked for.
3. Every process sums what has a sign, and sends its entries of open bins to the owner: their place
   on the grid alone, and in any order.
4. The owner orders them, adds their loss, and sends back the sign of each.
5. Sums of the rows are added up over the processes, and each writes the gradient of its columns.

A process sends 41 KB (R - 1) / R a row for counts, as much for signs, and 6 bytes for each entry
of others' rows that a pool has room for, one in OPEN_PART. A chunk that has
more of them, as near convergence, is flagged in the sums of step 5, alike on all processes, and
its rows are exchanged (engine/exchange.py).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gold_kernels.engine.exchange import SliceRows
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.slices import Slices

# Random rows of 151936 entries twice have 16,000 of 304,000 open, as the mean of a chunk
OPEN_PART = 12  # of so many entries of a row one may be open, as the mean of a pool's rows
LOSS, PULL, IS_REFUSED = range(3)
NUM_TOTALS = 3  # of a row: loss, sum of s times its sign, whether its chunk is refused
UNMATCHED, SCALE_SLOPE = 3, 6  # places in ULD.value_names


class Counts(Protocol):
    """The work of a backend on a chunk, in the order of its calls."""

    totals: Tensor  # (3, C) float, this process' part

    def sums(self) -> Tensor: ...  # (any) what log-sum-exps and the grid follow from

    def count(self, sums: Tensor) -> Tensor: ...  # (R, any) sums -> (R, c, words)

    def scan(self, counts: Tensor) -> Tensor: ...  # (R, c, words) of own rows -> (c, words)

    def collect(self, signs: Tensor) -> Tensor: ...  # (R c, words) -> (R, P) open entries

    def order(self, entries: Tensor) -> Tensor: ...  # (R, P) of own rows -> (R, P) their signs

    def write_gradient(self, signs: Tensor, totals: Tensor) -> None: ...


def pool_rows(num_rows: int, num_parts: int) -> int:
    """Rows of a chunk that a process owns."""
    return -(-num_rows // num_parts)


def pool_size(num_rows: int, slices: tuple[Slices, Slices]) -> int:
    """Open entries of so many rows that there is room for: the same number on all processes."""
    widest = sum(side.widest for side in slices)
    return max(1, num_rows * widest // OPEN_PART)


class CountedRows(SliceRows):
    """A row function of slices of both vocabularies."""

    def __init__(
        self,
        whole: Callable[..., None],
        whole_bytes: int,
        counts: Callable[..., Counts],
        student: LinearHead,
        teacher: LinearHead,
        values: Tensor,  # (7, N)
        unmatched_weight: float,
    ) -> None:
        assert student.slices is not None and teacher.slices is not None, "heads are in slices"
        self.whole, self.whole_bytes = whole, whole_bytes
        self._counts, self._values, self._weight = counts, values, unmatched_weight
        self._slices = student.slices, teacher.slices
        self._refused: list[tuple[slice, Tensor]] = []

    def __call__(
        self,
        student: Tensor,  # (C, V_r)
        teacher: Tensor,
        grad: Tensor | None,  # (C, V_r)
        rows: slice,
        weights: Tensor,  # (C, 2)
    ) -> None:
        group = self._slices[0]
        counts = self._counts(student, teacher, grad, weights, self._slices)
        signs = group.join(counts.scan(group.swap(counts.count(group.gather(counts.sums())))))
        own_signs = group.swap(counts.order(group.swap(counts.collect(signs))))
        totals = group.sum_(counts.totals)
        if grad is not None:
            counts.write_gradient(own_signs, totals)
        self._refused.append((rows, totals[IS_REFUSED].amax()))
        is_live = weights[:, 0] != 0
        loss, pull = (torch.where(is_live, totals[place], 0) for place in (LOSS, PULL))
        values = self._values[:, rows]
        values[0] = self._weight * loss
        values[UNMATCHED] = loss
        values[SCALE_SLOPE] = self._weight * pull

    def refused(self) -> list[slice]:
        """Waits for the device, once a panel."""
        if not self._refused:
            return []
        flags = torch.stack([flag for _, flag in self._refused]).tolist()
        found = [rows for (rows, _), flag in zip(self._refused, flags, strict=True) if flag]
        self._refused = []
        return found
