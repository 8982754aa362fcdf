"""Numbers by which the tensors of a call are told from those of another call.

N scored rows of a side, D hidden size, V_r entries of a slice.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gold_kernels.engine.chunk_plan import float_dtype
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.options import Options

NUM_FLOATS = 5  # of the samples that processes compare; behind them are whole numbers
SAMPLE_ENTRIES = 64  # of a slice, by which it is told from another


class Samples(NamedTuple):
    """What processes compare of tensors."""

    slices: Sequence[Tensor]  # (any, D) some entries of the student's slice and of the teacher's
    # hidden states of both sides, two more floats, weights of labels; labels, other ids
    rows: Sequence[Tensor | None]
    is_live: Tensor | None  # (N,) others may hold anything; None: all, or groups have the weights

    @classmethod
    def of(
        cls,
        heads: Sequence[LinearHead],
        options: Options,
        tensors: Sequence[Tensor | None],
        ids: Sequence[Tensor],
    ) -> "Samples":
        hidden: list[Tensor | None] = [head.hidden for head in heads]
        hidden += [None] * (2 - len(hidden))
        device = heads[0].hidden.device
        joined = torch.cat([part.flatten().to(device) for part in ids]) if ids else None
        rows = [*hidden, *tensors, *[None] * (2 - len(tensors))]
        rows += [options.label_weights, options.labels, joined]
        is_live = _live_rows(heads[0].num_rows, tensors[0], options)
        return cls([_some_entries(head.weight) for head in heads], rows, is_live)


def _some_entries(weight: Tensor) -> Tensor:  # (V_r, D) -> (any, D)
    """All over the slice: two slices that differ do not share them. A sum of all would read the
    head.
    """
    return weight.detach()[:: max(1, weight.shape[0] // SAMPLE_ENTRIES)]


def _live_rows(
    num_rows: int, row_weights: Tensor | None, options: Options
) -> Tensor | None:  # (N,)
    """Other rows may hold anything, and not the same on all processes."""
    if row_weights is None or row_weights.shape != (num_rows,):
        return None
    is_live = row_weights != 0
    if options.labels is not None:
        weights = options.label_weights
        is_live = is_live | ((options.labels >= 0) if weights is None else (weights != 0))
    return is_live


def write_facts_(
    facts: Tensor,  # (5 + 7 * 3,) float64 zeros
    samples: Samples,
    sizes: Sequence[int],  # of both slices, or of one
    same: int,  # a number of all that must be equal
    backend: str | None,
) -> None:
    """Both sizes; the number; a sum of either slice's sample (without a teacher one); of each
    sample of rows two sums, of which the second sees the order, and the sum of squares: of whole
    numbers, which must be equal, 0.
    """
    if backend == "triton":
        from gold_kernels.triton.call_facts import add_facts_  # triton may be missing

        numbers = *(*sizes, 0)[:2], same
        add_facts_(facts, samples.slices, samples.rows, samples.is_live, numbers)
        return
    facts[:3] = facts.new_tensor([*(*sizes, 0)[:2], same])
    sums = [part.sum(dtype=float_dtype(part)) for part in samples.slices]
    facts[3:5] = torch.stack([*sums, *sums][:2])  # without a teacher the student's twice
    first = 5
    for kind, is_whole in ((samples.rows[:NUM_FLOATS], False), (samples.rows[NUM_FLOATS:], True)):
        sums_of_kind = _sums(kind, samples.is_live, is_whole, facts)
        facts[first : first + sums_of_kind.numel()] = sums_of_kind.flatten()
        first += sums_of_kind.numel()


def _sums(
    samples: Sequence[Tensor | None], is_live: Tensor | None, is_whole: bool, like: Tensor
) -> Tensor:  # (number of samples, 3), those that there are before the others
    """All at once: the device waits for each launch."""
    rows = [_row_numbers(one.detach(), is_live) for one in samples if one is not None]
    size = max(map(len, rows), default=0)
    if not size:
        return like.new_zeros(len(samples), 3)
    pads = [one if len(one) == size else pad(one, (0, size - len(one))) for one in rows]
    stacked = torch.stack(pads).double().nan_to_num_(0.0, 0.0, 0.0)
    if is_whole:
        factors = torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
    else:
        places = torch.linspace(0, size - 1, size, device=like.device, dtype=like.dtype)
        factors = places.mul_(1.3).cos_()
    squares = stacked.new_zeros(len(rows)) if is_whole else stacked.square().sum(1)
    sums = torch.stack([stacked.sum(1), stacked @ factors, squares], dim=1)
    return sums if len(rows) == len(samples) else pad(sums, (0, 0, 0, len(samples) - len(rows)))


def _row_numbers(tensor: Tensor, is_live: Tensor | None) -> Tensor:  # (N, D) or (N,) -> (N,)
    """A number of each row: of hidden states the sum."""
    rows = tensor.flatten()
    if tensor.ndim == 2 and tensor.is_floating_point():
        rows = tensor.sum(1, dtype=float_dtype(tensor))
    elif tensor.dtype.itemsize < 4:  # no stack of 16-bit numbers with others
        rows = rows.float()
    if is_live is not None and is_live.shape == rows.shape:
        rows = torch.where(is_live, rows, 0)
    return rows
