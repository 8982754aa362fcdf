"""Logits that in_place=True overwrites with their gradient: which may be, and which have been.

A call that took overwritten logits for logits would return numbers without an error. So their
storage is marked: every view and detached tensor of it has the mark, and both go together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.kinds import has_numbers

_MARK = "_gold_kernels_overwritten"


class _Overwritten(NamedTuple):
    """Parts of a storage that hold gradients, and its version since: whoever has written to it
    later has made logits of it again, or spoiled the gradients.
    """

    version: int
    places: frozenset[range]  # bytes


@contextmanager
def overwriting(logits: Tensor) -> Iterator[None]:
    """Within it a gradient is written to the memory of logits, which remembers that."""
    if not has_numbers(logits):
        yield
        return
    storage, before = logits.untyped_storage(), logits._version
    mark = getattr(storage, _MARK, None)
    places = mark.places if mark and before <= mark.version else frozenset()
    yield
    setattr(storage, _MARK, _Overwritten(logits._version, places | {_place(logits)}))


def is_intact(grad: Tensor) -> bool:
    """Whether nobody has written to a gradient since it was put in the place of logits."""
    return not has_numbers(grad) or _place(grad) in _gradients_in(grad)


def refuse_overwritten(function: str, **logits: Tensor) -> None:
    if torch.compiler.is_compiling():  # then the operator asks, of the tensors that it gets
        return
    for name, tensor in logits.items():
        place = _place(tensor)
        if any(_overlap(place, other) for other in _gradients_in(tensor)):
            raise ValueError(
                f"{function}: {name} must be logits, got memory that an earlier loss with "
                "in_place=True has overwritten with a gradient; pass in_place=False to all losses "
                "of these logits but the last."
            )


def _gradients_in(tensor: Tensor) -> frozenset[range]:
    """Places of the tensor's storage that hold gradients. A version of its own, as x.data has, is
    lower; tensors of inference mode have none.
    """
    mark = getattr(tensor.untyped_storage(), _MARK, None) if has_numbers(tensor) else None
    if mark is None or not (tensor.is_inference() or tensor._version <= mark.version):
        return frozenset()
    return mark.places


def check_in_place(
    function: str, in_place: bool, logits: Tensor, vocab_size: int, teacher: Tensor
) -> None:
    """A gradient can take the place of logits that are one block of memory of their own."""
    if not in_place:
        return
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            f"{function}: in_place needs student_logits that a model computed, got a leaf tensor "
            "that requires a gradient; its .grad would be the tensor itself: pass in_place=False."
        )
    if logits.dtype == torch.float16:
        raise ValueError(
            f"{function}: in_place needs logits that can hold their gradient, got torch.float16; "
            "pass in_place=False, or logits in bfloat16 or float32."
        )
    if not logits.is_contiguous() or vocab_size != logits.shape[1]:
        raise ValueError(
            f"{function}: in_place needs contiguous student_logits of vocab_size columns, got "
            f"strides {logits.stride()}, {logits.shape[1]} columns and vocab_size {vocab_size}; "
            "pass in_place=False."
        )
    if _overlaps(logits, teacher):
        raise ValueError(
            f"{function}: in_place needs student_logits that share no memory with teacher_logits, "
            "got views of one tensor, of which the gradient would overwrite the teacher's rows; "
            "pass in_place=False."
        )


def _overlaps(logits: Tensor, other: Tensor) -> bool:
    """Whether both have memory in common. Not so where all of it is the same: a row's gradient is
    written when both of its rows were read.
    """
    if torch.compiler.is_compiling() or "meta" in (logits.device.type, other.device.type):
        return False
    starts = (t.untyped_storage().data_ptr() for t in (logits, other))
    own, others = (_place(t, start) for t, start in zip((logits, other), starts, strict=True))
    is_same = own == others and logits.stride() == other.stride()
    return not is_same and _overlap(own, others)


def _place(tensor: Tensor, start: int = 0) -> range:
    """Bytes of its entries, and of what lies between them, in a storage that begins at start."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    span = tensor.numel() and 1 + sum((size - 1) * step for size, step in sides)
    start += int(tensor.storage_offset()) * tensor.itemsize
    return range(start, start + span * tensor.itemsize)


def _overlap(first: range, second: range) -> bool:
    return first.start < second.stop and second.start < first.stop
