"""Counts of counted_rows.py in plain torch, exact: a bin has a sign only where no order of its
entries could give another.

C rows of a chunk, V_r columns of this process, R processes, c rows of which each is the owner, B
bins, P entries of a pool, E open entries. s and t are probabilities of student and teacher.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gold_kernels.engine.probabilities import LOWEST_LOGIT
from gold_kernels.engine.slices import Slices
from gold_kernels.engine.torch_rows import store_gradient_
from gold_kernels.uld.counted_rows import (
    IS_REFUSED,
    LOSS,
    PULL,
    pool_rows,
    pool_size,
)

MOST_BINS = 10240
ENTRIES_A_BIN = 16
# Of pools: random rows of 151936 entries twice have 30,000 of 304,000 open, since no sign is taken
# for likely here.
ROOM = 2
_RANGE = 12 * math.log(2)  # nats that the grid goes below 1 / V
_OPEN = 2  # beside the signs -1, 0 and 1
_FIELDS = 3  # of an open entry: its row of the owner or -1, 2 * bin + side, value


def row_bytes(slices: Sequence[Slices], dtype: torch.dtype, is_in_place: bool) -> int:
    """What a row of a chunk takes, at most."""
    entries, bins = sum(s.widest for s in slices), num_bins(*(s.total for s in slices))
    return dtype.itemsize * (14 * entries + 24 * bins)


def num_bins(v_student: int, v_teacher: int) -> int:
    return min(MOST_BINS, max(8, (v_student + v_teacher) // ENTRIES_A_BIN))


class TorchCounts:
    """See counted_rows.Counts."""

    def __init__(
        self,
        student: Tensor,  # (C, V_r)
        teacher: Tensor,
        grad: Tensor | None,  # (C, V_r), overwritten; may be student
        weights: Tensor,  # (C, 2)
        totals: Tensor,  # (C, 3) zeros
        slices: tuple[Slices, Slices],
        *,
        temperatures: tuple[float, float],
        unmatched_weight: float,
        softcap: float | None,
        scratch_bytes: int = 0,  # of the kernels
    ) -> None:
        self._is_live = weights[:, 0] != 0  # a row of weight 0 may hold anything
        dtype, live = weights.dtype, self._is_live.unsqueeze(1)
        self._student = torch.where(live, student, 0).to(dtype)
        sides = self._student, torch.where(live, teacher, 0).to(dtype)
        self._logits = [
            (side / temperature).clamp_min(LOWEST_LOGIT)
            for side, temperature in zip(sides, temperatures, strict=True)
        ]
        self._grad, self._softcap, self._slices = grad, softcap, slices
        self._weight = weights[:, 0] * unmatched_weight / temperatures[0]
        self._num_ranks, self._num_rows = len(slices[0].sizes), len(student)
        self._own = pool_rows(self._num_rows, self._num_ranks)
        self._bins = num_bins(*(side.total for side in slices))
        self._totals = totals.T
        self.spare: Tensor | None = None

    def sums(self) -> Tensor:  # (C, 2)
        return torch.stack([side.logsumexp(1) for side in self._logits], 1)

    def count(self, sums: Tensor) -> Tensor:  # (R, C, 2) -> (R, c, 2 B)
        self._values, self._places = [], []
        sizes = max(side.total for side in self._slices)
        per_nat = (self._bins - 1) / (math.log(sizes) + _RANGE)
        counts = self._student.new_zeros(self._own * self._num_ranks, 2, self._bins)
        totals = sums.logsumexp(0).unbind(1)
        for side, (logits, total) in enumerate(zip(self._logits, totals, strict=True)):
            log_values = logits - total.unsqueeze(1)
            places = (-per_nat * log_values).nan_to_num(0.0)  # of a row of NaN any will do
            places = places.floor().clamp(0, self._bins - 1).long()
            self._values.append(log_values.exp())
            self._places.append(places)
            ones = log_values.new_ones(()).expand_as(log_values)
            counts[: self._num_rows, side].scatter_add_(1, places, ones)
        counts[: self._num_rows] *= self._is_live.view(-1, 1, 1)
        bins = torch.arange(self._bins + 1, dtype=counts.dtype, device=counts.device)
        self._edges = torch.where(bins < self._bins, torch.exp(-bins / per_nat), 0)
        return counts.view(self._num_ranks, self._own, 2 * self._bins)

    def _own_totals(self) -> Tensor:  # (3, any) of the rows that are this process' own
        first = self._slices[0].rank * self._own
        return self._totals[:, first : first + self._own]

    def scan(self, counts: Tensor) -> Tensor:  # (R, c, 2 B) -> (c, B) int8
        student, teacher = counts.sum(0).view(self._own, 2, self._bins).unbind(1)
        net = student - teacher
        after = net.cumsum(1)
        self._before = before = after - net
        signs = (before - teacher >= 0).to(torch.int8) - (before + student <= 0).to(torch.int8)
        is_open = (signs == 0) & (student + teacher > 0)
        signs[is_open] = _OPEN
        upper, lower = self._edges[:-1], self._edges[1:]
        height = before.abs() * (upper - lower)
        edges = torch.where(is_open, height, height - signs * net * lower)
        own = self._own_totals()
        own[LOSS] += edges.sum(1)[: own.shape[1]]
        return signs

    def collect(self, signs: Tensor) -> Tensor:  # (R c, B) -> (R, P, 3)
        signs = signs[: self._num_rows]
        codes = [signs.gather(1, places) for places in self._places]
        is_open = [(one == _OPEN) & self._is_live.unsqueeze(1) for one in codes]
        self._signs = torch.where(is_open[0], 0, codes[0]).to(self._student.dtype)
        closed = torch.where(is_open[1], 0, codes[1]) * self._values[1]
        pull = (self._signs * self._values[0]).sum(1)
        self._totals[PULL] += pull
        self._totals[LOSS] += pull - closed.sum(1)
        size = ROOM * pool_size(self._own, self._slices)
        pools = self._student.new_full((self._num_ranks, size, _FIELDS), -1)
        self._listed = []
        for rank in range(self._num_ranks):
            rows = slice(rank * self._own, (rank + 1) * self._own)
            index = [one[rows].nonzero(as_tuple=True) for one in is_open]
            found = [
                torch.stack([at[0].to(v.dtype), 2.0 * places[rows][at] + side, v[rows][at]], 1)
                for side, (at, places, v) in enumerate(
                    zip(index, self._places, self._values, strict=True)
                )
            ]
            entries = torch.cat(found)
            if len(entries) > size:
                self._totals[IS_REFUSED, rows] = 1
                entries = entries[:size]
            pools[rank, : len(entries)] = entries
            self._listed.append(index[0])
        return pools

    def order(self, entries: Tensor) -> Tensor:  # (R, P, 3) -> (R, P)
        """Every open bin from the largest value down: D before and after each level of ties."""
        signs = entries.new_zeros(entries.shape[:2])
        at = (entries[..., 0] >= 0).nonzero(as_tuple=True)
        rows, codes, values = entries[at].unbind(1)
        if not len(rows):
            return signs
        bins, is_teacher = codes.div(2, rounding_mode="floor"), codes.remainder(2)
        group = rows * self._bins + bins
        turn = values.argsort(descending=True, stable=True)
        turn = turn[group[turn].argsort(stable=True)]
        group, values, step = group[turn].long(), values[turn], 1 - 2 * is_teacher[turn]
        is_first = torch.ones_like(group, dtype=torch.bool)
        is_first[1:] = group[1:] != group[:-1]
        is_level = is_first.clone()  # begins there
        is_level[1:] |= values[1:] != values[:-1]
        level = is_level.long().cumsum(0) - 1
        starts = is_level.nonzero().squeeze(1)
        sums = step.cumsum(0)
        # of a level: what D of its bin counts so far, and behind it
        above = (sums - step)[starts]
        ends = torch.cat([starts[1:], starts.new_full((1,), len(step))]) - 1
        through = sums[ends]
        first_of_bin = torch.where(is_first, torch.arange(len(step), device=step.device), 0)
        first_of_bin = first_of_bin.cummax(0).values[starts]
        bin_of_level = group[starts]
        offset = self._before.reshape(-1)[bin_of_level] - (sums - step)[first_of_bin]
        above, through = above + offset, through + offset
        tied = torch.zeros_like(above).index_add_(0, level, (step > 0).to(above.dtype))
        plus, minus = through.clamp_min(0).minimum(tied), (-above).clamp_min(0).minimum(tied)
        sign = (plus - minus) / tied.clamp_min(1)
        lower = self._edges[1:][bin_of_level % self._bins]
        loss = (values[starts] - lower) * (through.abs() - above.abs())
        own = self._own_totals()
        row_of_level = bin_of_level // self._bins
        own[LOSS].index_add_(0, row_of_level, loss)
        own[PULL].index_add_(0, row_of_level, sign * tied * values[starts])
        signs[at[0][turn], at[1][turn]] = sign[level]
        return signs

    def write_gradient(self, signs: Tensor) -> None:
        assert self._grad is not None, "called for a gradient"
        for rank, index in enumerate(self._listed):
            rows = slice(rank * self._own, (rank + 1) * self._own)
            num = min(len(index[0]), signs.shape[1])
            self._signs[rows][index[0][:num], index[1][:num]] = signs[rank, :num]
        grad = self._values[0] * (self._signs - self._totals[PULL].unsqueeze(1))
        grad *= self._weight.unsqueeze(1)
        store_gradient_(self._grad, grad, self._student, self._is_live, self._softcap)
