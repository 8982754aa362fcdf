"""A vocabulary that is cut over the processes of a group: each has the head's rows of its slice.

C rows of a chunk, V vocabulary, R processes. Hidden states are the same on all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gold_kernels.engine.probabilities import LOWEST_LOGIT

if TYPE_CHECKING:  # a build without distributed has no such class
    from torch.distributed import ProcessGroup

# Of a row's largest logit: numbers near it are then within a factor of 2 of it, so that taking it
# off them rounds nothing, and float32 has lost 1e-4 of what is added to it.
FAR = 1024.0

# By name of a group: what is called before every message, and raises where there must be none.
_CHECKS: dict[str, Callable[[], None]] = {}


@contextmanager
def messages_after(group_name: str, check: Callable[[], None]) -> Iterator[None]:
    """Within it check is called before every message of slices over the group."""
    _CHECKS[group_name] = check
    try:
        yield
    finally:
        del _CHECKS[group_name]


class Slices(NamedTuple):
    """How many entries of a head each process has that take part, in the order of its ranks."""

    group_name: str  # an operator takes strings
    sizes: tuple[int, ...]  # may be 0

    @property
    def _group(self) -> "ProcessGroup":
        from torch.distributed.distributed_c10d import _resolve_process_group  # no public way

        return _resolve_process_group(self.group_name)  # type: ignore[arg-type]  # newer: GroupName

    def group(self) -> "ProcessGroup":
        """For a message: see messages_after."""
        check = _CHECKS.get(self.group_name)
        if check is not None:
            check()
        return self._group

    @property
    def rank(self) -> int:
        return dist.get_rank(self._group)

    @property
    def first(self) -> int:
        """The entry with which this process' slice begins."""
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:  # V
        return sum(self.sizes)

    @property
    def widest(self) -> int:
        """Entries of the widest slice: a number that is the same on all processes, which have to
        take the same rows at a time.
        """
        return max(self.sizes)

    def of_first(self, vocab_size: int) -> "Slices":
        """The first vocab_size entries; slices behind them are empty."""
        sizes, left = [], vocab_size
        for size in self.sizes:
            sizes.append(min(size, left))
            left -= sizes[-1]
        return self._replace(sizes=tuple(sizes))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Overwrite a contiguous tensor with the sum of all processes'."""
        if tensor.numel():
            dist.all_reduce(tensor, group=self.group())
        return tensor

    def start_sum_(self, tensor: Tensor) -> "dist.Work":
        """sum_ of a tensor with entries, which is written until the work has been waited for."""
        return dist.all_reduce(tensor, group=self.group(), async_op=True)

    def swap(self, parts: Tensor, out: Tensor | None = None) -> Tensor:  # (R, any) -> (R, any)
        """Part r goes to rank r; what comes has every rank's part for this one."""
        out = torch.empty_like(parts) if out is None else out
        dist.all_to_all_single(out, parts, group=self.group())
        return out

    def join(self, part: Tensor, out: Tensor | None = None) -> Tensor:  # (c, any) -> (R c, any)
        """Contiguous parts of all processes behind each other."""
        if out is None:
            out = part.new_empty(len(self.sizes) * part.shape[0], *part.shape[1:])
        # the older name from torch 2.14 on is a warning
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out, part, group=self.group())
        return out

    def gather(self, tensor: Tensor) -> Tensor:  # (any) -> (R, any)
        """A contiguous tensor of every process."""
        return self.join(tensor.flatten()).view(len(self.sizes), *tensor.shape)


def to_host(tensor: Tensor) -> "tuple[Tensor, torch.cuda.Event | None]":
    """A copy that the host may read after the event, if there is one; it does not wait here."""
    if tensor.device.type != "cuda":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    return copy, torch.cuda.current_stream(tensor.device).record_event()


def row_sum(values: Tensor, slices: Slices | None) -> Tensor:  # (c, V) -> (c, 1)
    """Sums over the vocabulary, of which this process may have a slice."""
    total = values.sum(-1, keepdim=True)
    return total if slices is None else slices.sum_(total)


def row_max(values: Tensor, slices: Slices, empty: float) -> Tensor:  # (c, V) -> (c, 1)
    """empty: what a slice without entries gives, below all others."""
    if values.shape[-1] == 0:
        values = values.new_full((values.shape[0], 1), empty)
    return slices.gather(values.amax(-1, keepdim=True)).amax(0)


def log_sum_exps_(
    sides: Sequence[Tensor],  # (c, V) finite logits each
    slices: Slices | None,
) -> list[Tensor]:  # (c, 1) each
    """Log-sum-exps over the vocabulary; with slices two numbers a row and side are exchanged. Where
    the largest logit of a row is FAR from 0 on any side, each side is overwritten with what its
    logits are above its own largest: sums and differences of such numbers keep no digit of others.
    """
    tops = torch.stack([_largest(side) for side in sides])
    rests = [(s - top).exp_().sum(-1, keepdim=True) for s, top in zip(sides, tops, strict=True)]
    logs = torch.stack(rests).log_()
    if slices is not None:
        tops_of, logs_of = slices.gather(torch.stack([tops, logs])).unbind(1)
        tops = tops_of.amax(0)
        logs = logs_of.add_(tops_of - tops).logsumexp(0)
    shifts = torch.where(tops.abs().amax(0) > FAR, tops, 0)
    for side, shift in zip(sides, shifts, strict=True):
        side.sub_(shift)
    return list(logs.add_(tops - shifts).unbind(0))


def _largest(values: Tensor) -> Tensor:  # (c, V) -> (c, 1); without entries below all others
    if values.shape[-1] == 0:
        return values.new_full((values.shape[0], 1), LOWEST_LOGIT)
    return values.amax(-1, keepdim=True)
