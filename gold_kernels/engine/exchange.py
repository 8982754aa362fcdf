"""Whole rows of logits from slices of a vocabulary: each process gets a share of a chunk's rows.

C rows of a chunk, V vocabulary (V_s, V_t), V_r entries of a process, R processes, each with a slice
of every row. A loss that compares entries of a row with all others, as one that sorts, needs whole
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


def shares_of(num_rows: int, num_parts: int) -> list[slice]:
    """The rows of a chunk that each process gets whole, by rank."""
    least, more = divmod(num_rows, num_parts)
    shares, start = [], 0
    for part in range(num_parts):
        shares.append(slice(start, start + least + (part < more)))
        start = shares[-1].stop
    return shares


class _Parcels:
    """Memory of parts of rows on their way to and from other processes, by rank; none to this one.
    Rows are aligned.
    """

    def __init__(
        self,
        like: Tensor,
        dtype: torch.dtype,
        slices: Slices,
        sent: Sequence[Shape],
        received: Sequence[Shape],
    ) -> None:
        self._slices = slices
        self._work: dist.Work | None = None
        self._out, self._out_counts, self.sent = _parts(like, dtype, slices.rank, sent)
        self._in, self._in_counts, self._received = _parts(like, dtype, slices.rank, received)

    def post(self) -> None:
        if len(self._in_counts) == 1:  # nobody else is there
            return
        self._work = dist.all_to_all_single(
            *(self._in, self._out, self._in_counts, self._out_counts),
            group=self._slices.group(),
            async_op=True,
        )

    def unpack(self, places: Sequence[Tensor]) -> None:
        """Wait, on the current stream, and copy what each rank sent to its place."""
        if self._work is not None:
            self._work.wait()
        for rank, part in self._received.items():
            places[rank].copy_(part)


def _parts(
    like: Tensor, dtype: torch.dtype, rank: int, shapes: Sequence[Shape]
) -> tuple[Tensor, list[int], dict[int, Tensor]]:
    """Flat memory, how much of it is each rank's, and views of the ranks that have some."""
    counts = [rows * aligned_width(size) for rows, size in shapes]
    counts[rank] = 0
    memory = like.new_empty(sum(counts), dtype=dtype)
    views = {}
    for other, (part, (rows, size)) in enumerate(zip(memory.split(counts), shapes, strict=True)):
        if part.numel():
            views[other] = part.view(rows, aligned_width(size))[:, :size]
    return memory, counts, views


class _Side:
    """Rows of one head in a chunk of so many: what is sent, what arrives, and whole rows."""

    def __init__(self, head: LinearHead, shares: list[slice], dtype: torch.dtype) -> None:
        assert head.slices is not None, "both heads are in slices"
        slices, rank = head.slices, head.slices.rank
        sizes = [share.stop - share.start for share in shares]
        self._head, self._shares, self._rank = head, shares, rank
        self._is_aligned = slices.first % ROW_ALIGNMENT == 0
        self.whole = empty_rows(head.hidden, sizes[rank], slices.total, dtype)
        self.columns = self.whole.split(list(slices.sizes), 1)
        self.parcels = _Parcels(
            head.hidden,
            dtype,
            slices,
            [(size, slices.sizes[rank]) for size in sizes],
            [(sizes[rank], size) for size in slices.sizes],
        )

    def _rows(self, first: int, rank: int) -> slice:
        share = self._shares[rank]
        return slice(first + share.start, first + share.stop)

    def post(self, first: int) -> None:
        """Project the rows of others in the chunk that begins at first, and send them."""
        for rank, part in self.parcels.sent.items():
            self._head.project_(part, self._rows(first, rank))
        self.parcels.post()

    def project(self, first: int) -> None:
        """The columns of this process in its share."""
        columns, rows = self.columns[self._rank], self._rows(first, self._rank)
        if not columns.numel():
            return
        if self._is_aligned:
            self._head.project_(columns, rows)
        else:  # products want aligned memory
            part = empty_rows(columns, len(columns), columns.shape[1], columns.dtype)
            columns.copy_(self._head.project_(part, rows))


class _Gradients:
    """Gradients of whole rows in a chunk of so many, and their way back."""

    def __init__(
        self, whole: Tensor, slices: Slices, shares: list[slice], dtype: torch.dtype
    ) -> None:
        sizes = [share.stop - share.start for share in shares]
        self._shares, self._rank = shares, slices.rank
        self.whole = whole
        if dtype != whole.dtype:
            self.whole = empty_rows(whole, len(whole), slices.total, dtype)
        self._columns = self.whole.split(list(slices.sizes), 1)
        self._parcels = _Parcels(
            whole,
            dtype,
            slices,
            [(sizes[slices.rank], size) for size in slices.sizes],
            [(size, slices.sizes[slices.rank]) for size in sizes],
        )
        self._places: list[Tensor] | None = None

    def post(self, grad_logits: Tensor) -> None:  # (C, V_r)
        """Send what others have the logits of; the rest is in its place."""
        for rank, part in self._parcels.sent.items():
            part.copy_(self._columns[rank])
        self._parcels.post()
        self._places = [grad_logits[share] for share in self._shares]
        self._places[self._rank].copy_(self._columns[self._rank])

    def unpack(self) -> None:
        """Put what is on its way into the rows that post was given."""
        if self._places is not None:
            self._parcels.unpack(self._places)
            self._places = None


class SliceRows:
    """A row function of slices that may leave chunks to one of whole rows."""

    whole: Callable[..., None]  # a chunking.RowFunction
    whole_bytes: int  # that it needs beside a row of logits
    is_over = False  # all chunks from here on need whole rows: it need not be called

    def __call__(
        self, student: Tensor, teacher: Tensor, grad: Tensor | None, rows: slice, weights: Tensor
    ) -> None:
        raise NotImplementedError

    def leave(self, rows: slice) -> None:
        """A chunk that it was not called for, since is_over."""
        raise NotImplementedError

    def refused(self) -> list[slice]:
        """Rows of chunks, since it was asked last, that need whole rows: the same on all processes.
        Their gradients and values may be anything. Waits for the device, but not for gradients.
        """
        raise NotImplementedError


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
        self._slices, self._rank = student.slices, student.slices.rank
        self._values, self._dtype = values, logits_dtype
        self._num_summed = 0  # rows whose values all processes know
        self._kind: tuple[int, bool] | None = None  # of the last chunk: its rows, if it is paired
        self._shares: list[slice] = []
        self._sides: list[_Side] = []  # the student's, the teacher's
        self._grads: _Gradients | None = None
        device = student.hidden.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def row_bytes(self, grad_dtype: torch.dtype) -> int:
        """Memory of a row of a chunk beside logits of the widest slices: parts that are sent and
        received, whole rows, gradients and their way back.
        """
        own, number = self._slices, len(self._slices.sizes)
        sides = [own] if self._teacher is None else [own, self._teacher.slices or own]
        wide = sum((2 * s.total - min(s.sizes) - s.widest) // number for s in sides)
        grads = (2 * own.total - min(own.sizes)) // number + own.widest - own.widest // number
        if self._dtype == grad_dtype:  # no logits are counted, since a panel could hold them
            wide += own.widest
        return wide * self._dtype.itemsize + grads * grad_dtype.itemsize

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
        self._prepare(rows.stop - rows.start, is_paired, grad_logits)
        self._make_rows(rows.start)
        share = self._shares[self._rank]
        if share.start < share.stop:
            logits = [side.whole for side in self._sides]
            self._row_function(
                logits[0],
                logits[1] if len(logits) > 1 else None,
                None if self._grads is None else self._grads.whole,
                slice(rows.start + share.start, rows.start + share.stop),
                weights[share],
            )
        if self._grads is not None and grad_logits is not None:
            self._grads.post(grad_logits)

    def run_again(
        self,
        chunks: Sequence[slice],
        panel: Tensor | None,  # (P, V_r) gradients, of rows from first on
        first: int,
        row_weights: Tensor,  # (N,) or (N, T)
        part: int,  # rows at a time, at most
    ) -> None:
        """Chunks of paired rows that a function of slices has left."""
        for chunk in chunks:
            self._values[:, chunk] = 0  # processes add up their shares
            self._num_summed = chunk.start
            size = -(-(chunk.stop - chunk.start) // -(-(chunk.stop - chunk.start) // part))
            for start in range(chunk.start, chunk.stop, size):
                rows = slice(start, min(start + size, chunk.stop))
                grad = None if panel is None else panel[rows.start - first : rows.stop - first]
                self.run(rows, grad, row_weights[rows], is_paired=True)
                self.finish(rows.stop)
        self._kind, self._sides, self._grads = None, [], None  # memory is for what comes next

    def finish(self, stop: int) -> None:
        """Wait for gradients of the rows before stop, and sum their values over the processes."""
        if self._grads is not None:
            self._grads.unpack()
        self._sum_values(stop)

    def _prepare(self, num_rows: int, is_paired: bool, grad_logits: Tensor | None) -> None:
        """Memory, which the next chunk of this kind uses again."""
        if self._kind == (num_rows, is_paired):
            return
        if self._grads is not None:
            self._grads.unpack()
        self._kind, self._sides, self._grads = (num_rows, is_paired), [], None
        self._shares = shares_of(num_rows, len(self._slices.sizes))
        # the student's products are mostly the shorter ones: messages begin sooner
        heads = [self._student, self._teacher if is_paired else None]
        self._sides = [_Side(one, self._shares, self._dtype) for one in heads if one is not None]
        if grad_logits is not None:
            whole = self._sides[0].whole
            self._grads = _Gradients(whole, self._slices, self._shares, grad_logits.dtype)

    def _make_rows(self, first: int) -> None:
        """Whole rows of the chunk that begins at first; what arrives is copied beside products."""
        for side in self._sides:
            side.post(first)
        stream = self._stream
        if stream is None:
            for side in self._sides:
                side.project(first)
            self._unpack()
            return
        current = torch.cuda.current_stream(stream.device)
        posted = current.record_event()
        for side in self._sides:
            side.project(first)
        stream.wait_event(posted)
        with torch.cuda.stream(stream):
            self._unpack()
        current.wait_stream(stream)

    def _unpack(self) -> None:
        if self._grads is not None:
            self._grads.unpack()
        for side in self._sides:
            side.parcels.unpack(side.columns)

    def _sum_values(self, stop: int) -> None:
        if stop <= self._num_summed:
            return
        rows = slice(self._num_summed, stop)
        self._values[:, rows] = self._slices.sum_(self._values[:, rows].contiguous())
        self._num_summed = stop
