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

A process sends 41 KB (R - 1) / R a row for counts, as much for signs, and 6 bytes for each entry of
others' rows that a pool has room for, one in OPEN_PART. A chunk that has more of them, as near
convergence, is flagged in the sums of step 5, alike on all processes, and its rows are exchanged
(engine/exchange.py). So are those of the chunks behind it.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gold_kernels.engine.exchange import SliceRows
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.slices import Slices, to_host

# Random rows of 151936 entries twice have 16,200 of 304,000 open, as the mean of a chunk
OPEN_PART = 16  # of so many entries of a row one may be open, as the mean of a pool's rows
LOSS, PULL, IS_REFUSED = range(3)
NUM_TOTALS = 3  # of a row: loss, sum of s times its sign, whether its chunk is refused
UNMATCHED, SCALE_SLOPE = 3, 6  # places in ULD.value_names


class Counts(Protocol):
    """The work of a backend on a chunk, in the order of its calls. It adds this process' part to
    totals (C, 3), which are 0, or overwrites them; write_gradient reads those of all.
    """

    spare: Tensor | None  # memory for what comes back, after scan and after order

    def sums(self) -> Tensor: ...  # (C, any) what log-sum-exps and the grid follow from

    def count(self, sums: Tensor) -> Tensor: ...  # (R, C, any) sums -> (R, c, words)

    def scan(self, counts: Tensor) -> Tensor: ...  # (R, c, words) of own rows -> (c, words)

    def collect(self, signs: Tensor) -> Tensor: ...  # (R c, words) -> (R, P) open entries

    def order(self, entries: Tensor) -> Tensor: ...  # (R, P) of own rows -> (R, P) their signs

    def write_gradient(self, signs: Tensor) -> None: ...


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
        self._totals = values.new_zeros(values.shape[1], NUM_TOTALS)
        self._done: list[slice] = []  # chunks that values do not have yet
        self._copies: list[tuple[slice, Tensor, torch.cuda.Event | None]] = []  # not looked at
        self._refused: list[slice] = []

    def __call__(
        self,
        student: Tensor,  # (C, V_r)
        teacher: Tensor,
        grad: Tensor | None,  # (C, V_r)
        rows: slice,
        weights: Tensor,  # (C, 2)
    ) -> None:
        self._look()  # the chunk before is done, or will be before the products of this one
        if self.is_over:
            self.leave(rows)
            return
        group, totals = self._slices[0], self._totals[rows]
        counts = self._counts(student, teacher, grad, weights, totals, self._slices)
        words = counts.scan(group.swap(counts.count(group.gather(counts.sums()))))
        entries = counts.collect(group.join(words, counts.spare))
        signs = group.swap(counts.order(group.swap(entries)), counts.spare)
        group.sum_(totals)
        self._done.append(rows)
        self._copies.append((rows, *to_host(totals)))
        if grad is not None:
            counts.write_gradient(signs)

    def leave(self, rows: slice) -> None:
        self._refused.append(rows)

    def _look(self) -> None:
        """Waits for the device, until totals of the last chunk are known."""
        for rows, totals, copied in self._copies:
            if copied is not None:
                copied.synchronize()
            if totals[:, IS_REFUSED].any():
                self.leave(rows)
                self.is_over = True  # rows are like the ones before them
        self._copies = []

    def refused(self) -> list[slice]:
        self._look()
        if self._done:
            rows = slice(self._done[0].start, self._done[-1].stop)
            totals, values = self._totals[rows].T, self._values[:, rows]
            torch.mul(totals[LOSS], self._weight, out=values[0])
            torch.mul(totals[PULL], self._weight, out=values[SCALE_SLOPE])
            values[UNMATCHED] = totals[LOSS]
        found, self._refused, self._done = self._refused, [], []
        return found
