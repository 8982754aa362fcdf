"""Whole rows of logits from slices of a vocabulary: each process gets a share of a chunk's rows.

C rows of a chunk, V vocabulary (V_s, V_t), R processes, each with a slice of every row. A loss that
compares entries of a row with all others, as one that sorts, needs whole rows. So processes send
each other parts of their slices, run the row function on C / R whole rows, and send gradients back:
exact, and for a row of float32 logits (V_s + V_t) (R - 1) / R 4 bytes, and its gradient's.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from gold_kernels.engine.slices import Slices
from gold_kernels.triton.launch import empty_rows


def share_sizes(num_rows: int, num_parts: int) -> list[int]:
    """Rows that each process gets, by rank."""
    least, more = divmod(num_rows, num_parts)
    return [least + (part < more) for part in range(num_parts)]


def whole_rows(
    logits: Tensor,  # (C, V_r), this process' slice
    slices: Slices,
) -> Tensor:  # (its share of C, V)
    rows, rank = share_sizes(logits.shape[0], len(slices.sizes)), slices.rank
    sent = logits.contiguous().view(-1)  # of one column reshape would make a view with gaps
    received = sent.new_empty(rows[rank] * slices.total)
    dist.all_to_all_single(
        received,
        sent,
        [rows[rank] * size for size in slices.sizes],
        [count * slices.sizes[rank] for count in rows],
        group=slices.group,
    )
    whole = empty_rows(logits, rows[rank], slices.total, logits.dtype)
    parts = received.split([rows[rank] * size for size in slices.sizes])
    for columns, part in zip(whole.split(list(slices.sizes), 1), parts, strict=True):
        columns.copy_(part.view(columns.shape))
    return whole


def return_rows_(
    logits: Tensor,  # (C, V_r), overwritten
    whole: Tensor,  # (its share of C, V)
    slices: Slices,
) -> None:
    """The inverse of whole_rows."""
    rows, rank = share_sizes(logits.shape[0], len(slices.sizes)), slices.rank
    sent = torch.cat([columns.reshape(-1) for columns in whole.split(list(slices.sizes), 1)])
    received = sent.new_empty(logits.numel())
    dist.all_to_all_single(
        received,
        sent,
        [count * slices.sizes[rank] for count in rows],
        [rows[rank] * size for size in slices.sizes],
        group=slices.group,
    )
    logits.copy_(received.view(logits.shape))


def own_share(rows: slice, slices: Slices) -> slice:
    """Of the rows of a chunk those that this process gets whole."""
    sizes = share_sizes(rows.stop - rows.start, len(slices.sizes))
    start = rows.start + sum(sizes[: slices.rank])
    return slice(start, start + sizes[slices.rank])


def exchange_bytes(
    own: Slices, others: Slices | None, dtype: torch.dtype, grad_dtype: torch.dtype
) -> int:
    """Memory of a row beside its slices: what is sent, what is received, and whole rows."""
    numbers = [3 * side.widest + side.total // len(own.sizes) for side in (own, others or own)]
    sides = numbers[:1] if others is None else numbers
    return sum(sides) * dtype.itemsize + numbers[0] * grad_dtype.itemsize


def with_whole_rows(
    row_function: Callable[..., None],  # a chunking.RowFunction that takes whole rows
    own: Slices,  # the student's
    others: Slices | None,  # the teacher's
    values: Tensor,  # (any, N) zeros, of which row_function writes the rows that it is given
) -> Callable[..., None]:
    """A row function of slices: exchanges them, runs row_function on this process' share of a
    chunk's rows, and returns gradients. Afterwards the values are known to all.
    """

    def exchanged(
        student_logits: Tensor,  # (C, V_r)
        teacher_logits: Tensor | None,
        grad_logits: Tensor | None,  # may be student_logits
        rows: slice,
        weights: Tensor,
    ) -> None:
        share = own_share(rows, own)
        whole, partner, grad = whole_rows(student_logits, own), None, None
        if teacher_logits is not None:
            assert others is not None, "both heads are in slices"
            partner = whole_rows(teacher_logits, others)
        if grad_logits is not None:
            grad = whole
            if grad_logits.dtype != whole.dtype:
                grad = empty_rows(whole, whole.shape[0], own.total, grad_logits.dtype)
        if share.start < share.stop:
            in_chunk = slice(share.start - rows.start, share.stop - rows.start)
            row_function(whole, partner, grad, share, weights[in_chunk])
        if grad_logits is not None and grad is not None:
            return_rows_(grad_logits, grad, own)
        values[:, rows] = own.sum_(values[:, rows].contiguous())

    return exchanged
