"""Whole rows of logits from slices of a vocabulary: each process gets a share of a chunk's rows.

C rows of a chunk, V vocabulary (V_s, V_t), V_r entries of rank r, R processes, each with a slice of
every row. A loss that compares entries of a row with all others, as one that sorts, needs whole
rows. So processes send each other parts of their slices, run the row function on C / R whole rows,
and send gradients back. That is exact. A process sends about 4 (V_s + V_t) (R - 1) / R^2 bytes of
float32 logits a row, and the gradient of its share.

Others' rows are projected first. They travel while a process projects its own share, and gradients
travel while it projects the next chunk.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.slices import Slices
from gold_kernels.triton.launch import ROW_ALIGNMENT, aligned_width, empty_rows

Shape = tuple[int, int]  # rows, entries


def shares_of(rows: slice, num_parts: int) -> list[slice]:
    """The rows of a chunk that each process gets whole, by rank."""
    least, more = divmod(rows.stop - rows.start, num_parts)
    shares, start = [], rows.start
    for part in range(num_parts):
        shares.append(slice(start, start + least + (part < more)))
        start = shares[-1].stop
    return shares


class _Parcels:
    """Parts of rows on their way, by rank; none to this process itself. Rows are aligned."""

    def __init__(
        self,
        like: Tensor,
        dtype: torch.dtype,
        slices: Slices,
        sent: Sequence[Shape],
        received: Sequence[Shape],
    ) -> None:
        self._group = slices.group
        self._work: dist.Work | None = None
        self._sides: list[Tensor] = []
        self._counts: list[list[int]] = []
        views = []
        for shapes in (sent, received):
            counts = [rows * aligned_width(size) for rows, size in shapes]
            counts[slices.rank] = 0
            buffer = like.new_empty(sum(counts), dtype=dtype)
            self._sides.append(buffer)
            self._counts.append(counts)
            parts = zip(buffer.split(counts), counts, shapes, strict=True)
            views.append(
                [
                    part.view(rows if count else 0, aligned_width(size))[:, :size]
                    for part, count, (rows, size) in parts
                ]
            )
        self.sent, self.received = views

    def post(self) -> None:
        (sent, received), (counts, received_counts) = self._sides, self._counts
        if len(counts) == 1:  # nobody else is there
            return
        self._work = dist.all_to_all_single(
            received, sent, received_counts, counts, group=self._group, async_op=True
        )

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()


class WholeRows:
    """Runs a row function that takes whole rows on this process' share of every chunk."""

    def __init__(
        self,
        row_function: Callable[..., None],  # a chunking.RowFunction
        student: LinearHead,
        teacher: LinearHead | None,
        values: Tensor,  # (any, N) zeros, of which row_function writes the rows that it is given
        logits_dtype: torch.dtype,
    ) -> None:
        assert student.slices is not None, "heads are in slices"
        self._row_function, self._student, self._teacher = row_function, student, teacher
        self._slices, self._values, self._dtype = student.slices, values, logits_dtype
        self._num_summed = 0  # rows whose values all processes know
        # gradients on their way, and the rows of the panel where they belong
        self._returning: tuple[_Parcels, list[Tensor]] | None = None
        is_cuda = student.hidden.is_cuda
        self._side = torch.cuda.Stream(student.hidden.device) if is_cuda else None

    def row_bytes(self, grad_dtype: torch.dtype) -> int:
        """Memory of a row of a chunk beside logits of the widest slices: parts that are sent and
        received, whole rows, gradients on their way back.
        """
        own, dtype, number = self._slices, self._dtype, len(self._slices.sizes)
        heads = [self._student] if self._teacher is None else [self._student, self._teacher]
        moved = wide = 0
        for side in map(_slices_of, heads):
            received = (side.total - min(side.sizes)) // number
            moved += received + side.widest - side.widest // number
            wide += received + (side.total - side.widest) // number
        if dtype == grad_dtype:  # no logits are counted, since a panel could hold them
            wide += own.widest
        grads = (own.total - min(own.sizes)) // number + own.widest - own.widest // number
        if dtype != grad_dtype:  # where parts that were sent and received have been
            grads += max(0, own.total // number - moved * dtype.itemsize // grad_dtype.itemsize)
        return wide * dtype.itemsize + grads * grad_dtype.itemsize

    def run(
        self,
        rows: slice,
        grad_logits: Tensor | None,  # (C, V_r), overwritten until finish returns
        weights: Tensor,  # (C,) or (C, T)
        *,
        is_paired: bool,
    ) -> None:
        if not is_paired and self._teacher is not None:  # rows behind look at values of paired ones
            self._sum_values(self._teacher.num_rows)
        shares = shares_of(rows, len(self._slices.sizes))
        share = shares[self._slices.rank]
        heads = [self._student]  # its products are mostly the shorter ones: messages begin sooner
        if is_paired and self._teacher is not None:
            heads.append(self._teacher)
        student_rows, *teacher_rows = self._whole_rows(heads, shares)
        grad = None
        if grad_logits is not None:
            grad = student_rows
            if grad_logits.dtype != student_rows.dtype:
                shape = len(student_rows), self._slices.total
                grad = empty_rows(student_rows, *shape, grad_logits.dtype)
        if share.start < share.stop:
            own = weights[share.start - rows.start : share.stop - rows.start]
            partner = teacher_rows[0] if teacher_rows else None
            self._row_function(student_rows, partner, grad, share, own)
            del partner
        del student_rows, teacher_rows
        if grad is not None and grad_logits is not None:
            parts = [
                grad_logits[part.start - rows.start : part.stop - rows.start] for part in shares
            ]
            self._return(grad, parts)

    def finish(self, stop: int) -> None:
        """Wait for gradients of the rows before stop, and sum their values over the processes."""
        if self._returning is not None:
            _unpack(*self._returning)
        self._returning = None
        self._sum_values(stop)

    def _whole_rows(self, heads: Sequence[LinearHead], shares: list[slice]) -> list[Tensor]:
        """(C / R, V) of each head."""
        share, side = shares[self._slices.rank], self._side
        arriving = [] if self._returning is None else [self._returning]
        whole = []
        for head in heads:
            sizes = list(_slices_of(head).sizes)
            parcels = self._post(head, shares)
            whole.append(empty_rows(head.hidden, share.stop - share.start, sum(sizes), self._dtype))
            arriving.append((parcels, list(whole[-1].split(sizes, 1))))
        if side is not None:  # what arrives is copied beside the products
            side.wait_stream(torch.cuda.current_stream(side.device))
            with torch.cuda.stream(side):
                for parcels, places in arriving:
                    _unpack(parcels, places)
        for head, rows in zip(heads, whole, strict=True):
            self._project_own(head, rows, share)
        if side is not None:
            torch.cuda.current_stream(side.device).wait_stream(side)
        else:
            for parcels, places in arriving:
                _unpack(parcels, places)
        self._returning = None  # from here on its memory may be used again
        return whole

    def _post(self, head: LinearHead, shares: list[slice]) -> _Parcels:
        """Project the rows of others, and send them."""
        slices = _slices_of(head)
        sizes = [share.stop - share.start for share in shares]
        own_rows, own_size = sizes[slices.rank], slices.sizes[slices.rank]
        sent = [(size, own_size) for size in sizes]
        received = [(own_rows, size) for size in slices.sizes]
        parcels = _Parcels(head.hidden, self._dtype, slices, sent, received)
        for share, part in zip(shares, parcels.sent, strict=True):
            if part.numel():
                head.project_(part, share)
        parcels.post()
        return parcels

    def _project_own(self, head: LinearHead, whole: Tensor, share: slice) -> None:
        """This process' columns of whole rows (C / R, V)."""
        slices = _slices_of(head)
        size, first = slices.sizes[slices.rank], slices.first
        if not len(whole) or not size:
            return
        columns = whole[:, first : first + size]
        if first % ROW_ALIGNMENT == 0:
            head.project_(columns, share)
        else:  # products want aligned memory
            part = empty_rows(whole, len(whole), size, whole.dtype)
            columns.copy_(head.project_(part, share))

    def _return(self, grad: Tensor, parts: list[Tensor]) -> None:
        """Send the gradients (C / R, V) of whole rows; parts are (rows, V_r) of each process'."""
        slices, rank = self._slices, self._slices.rank
        sent = [(len(grad), size) for size in slices.sizes]
        received = [(len(part), slices.sizes[rank]) for part in parts]
        parcels = _Parcels(grad, grad.dtype, slices, sent, received)
        columns = grad.split(list(slices.sizes), 1)
        for part, own in zip(parcels.sent, columns, strict=True):
            if part.numel():
                part.copy_(own)
        parcels.post()
        parts[rank].copy_(columns[rank])
        self._returning = parcels, parts

    def _sum_values(self, stop: int) -> None:
        if stop <= self._num_summed:
            return
        rows = slice(self._num_summed, stop)
        self._values[:, rows] = self._slices.sum_(self._values[:, rows].contiguous())
        self._num_summed = stop


def _unpack(parcels: _Parcels, places: Sequence[Tensor]) -> None:
    """Wait for parcels, on the current stream, and copy what each rank sent to its place."""
    parcels.wait()
    for part, place in zip(parcels.received, places, strict=True):
        if part.numel():
            place.copy_(part)


def _slices_of(head: LinearHead) -> Slices:
    assert head.slices is not None, "both heads are in slices"
    return head.slices
