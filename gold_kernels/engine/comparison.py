"""Whether all processes of a group make the same call: what they tell each other, and when it is
read.

N scored rows of a side, D hidden size, V vocabulary, V_r entries of a slice, R processes.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gold_kernels.engine.call_facts import Samples, write_facts_
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.options import Options
from gold_kernels.engine.slices import Slices, messages_after, to_host

# Of the norm of what is summed: rounding that differs between processes moves a sum by 1e-3 of it,
# other rows by about as much as it is.
MAX_GAP = 1e-2
# Of the sum of some entries of a slice: the same slice, whose entries were added in another order.
SAME_SUM = 1e-12
WHOLE = 2.0**53  # up to here whole numbers are exact in float64
NUM_FACTS, REFUSED = 26, -1.0
SIDES = ("student", "teacher")
Heads = tuple[LinearHead, ...]  # the student's and, if it has one, the teacher's
Sizes = tuple[tuple[int, ...], ...]  # of the slices of each head, by rank
Result = TypeVar("Result")

# What slices were in the last call, by group and this process' own: most calls are like the last.
_LAST_SIZES: dict[tuple[Any, ...], Sizes] = {}


class OtherSizes(Exception):
    """Slices of other processes are not what they were in the last call."""


class Comparison:
    """The facts of a call on their way to all processes, while the call begins.

    run makes the call with sizes of slices that were right the last time. No message of the call
    leaves before the facts have been read and compared: until then it works on its own. So the
    device has the first products to do while the host reads. Where another process has another
    slice now, the call begins anew, with the sizes that the facts have.
    """

    def __init__(
        self,
        function: str,
        slices: Slices,  # of any sizes
        heads: Heads,
        options: Options,
        tensors: Sequence[Tensor | None],  # floats of the rows, two at most
        settings: object,  # of the loss, and whether there are metrics
        ids: Sequence[Tensor] = (),  # int64 of the call beside labels
    ) -> None:
        self._function, self._slices, self._num_heads = function, slices, len(heads)
        own = tuple(head.weight.shape[0] for head in heads)
        self._key = slices.group_name, len(slices.sizes), own
        samples = Samples.of(heads, options, tensors, ids)
        plain = repr((_plain(heads, options, samples), settings))
        same = zlib.crc32(plain.encode()) >> 1  # 31 bits: one kind of number for kernels
        like = heads[0].hidden
        facts = like.new_zeros(len(slices.sizes), NUM_FACTS, dtype=torch.float64)
        write_facts_(facts[slices.rank], samples, own, same, options.backend)
        slices.sum_(facts)
        self._facts, self._copied = to_host(facts)
        self._is_read = False

    def sizes(self) -> Sizes:
        """What the facts say, and the next call begins with. Waits for the device. Raises what one
        of the processes would have to, on all of them.
        """
        self._is_read = True
        if self._copied is not None:
            self._copied.synchronize()
        facts = self._facts.tolist()
        _compare(self._function, facts)
        found = tuple(tuple(int(own[place]) for own in facts) for place in range(self._num_heads))
        _LAST_SIZES[self._key] = found
        return found

    def run(self, call: Callable[[Sizes], Result]) -> Result:
        """What call returns of the right sizes."""
        expected = None if torch.compiler.is_compiling() else _LAST_SIZES.get(self._key)
        if expected is not None:
            try:
                return self._run_ahead(call, expected)
            except OtherSizes:  # what it has made is freed here
                expected = _LAST_SIZES[self._key]
        return call(expected or self.sizes())

    def _run_ahead(self, call: Callable[[Sizes], Result], expected: Sizes) -> Result:
        def check() -> None:
            if not self._is_read and self.sizes() != expected:
                raise OtherSizes

        try:
            with messages_after(self._slices.group_name, check):
                result = call(expected)
        except Exception:
            check()  # an error that other sizes may have made
            raise
        check()  # a call without rows sends nothing
        return result


def _plain(heads: Heads, options: Options, samples: Samples) -> tuple[object, ...]:
    """What must be equal on all processes, and has a repr that says all."""
    student = heads[0]
    needs = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (student.hidden, student.weight, student.bias)
    ]
    plain = [
        (name, value)
        for name, value in options._asdict().items()
        if name != "process_group" and not isinstance(value, Tensor)
    ]
    shapes = [None if t is None else (tuple(t.shape), t.dtype) for t in samples.rows]
    return needs, plain, shapes, [(head.weight.dtype, head.bias is None) for head in heads]


def _compare(function: str, facts: list[list[float]]) -> None:
    """Facts of all processes, by rank."""
    first, others = facts[0], list(enumerate(facts))[1:]
    refused = [rank for rank, own in enumerate(facts) if own[0] == REFUSED]
    if refused:
        raise ValueError(
            f"{function}: every process of the group must make a call that fits, got errors on "
            f"ranks {refused}; they say what to do."
        )
    differ = [rank for rank, own in others if own[2] != first[2]]
    if differ:
        raise ValueError(
            f"{function}: every process of the group must make the same call, got other options, "
            f"shapes, dtypes or needed gradients on ranks {differ} than on rank 0; pass the same "
            "on all of them. What FSDP has in parts are no slices: pass weight.full_tensor()."
        )
    differ = [rank for rank, own in others if _has_other_rows(own, first)]
    if differ:
        raise ValueError(
            f"{function}: hidden states, weights, labels and ids of rows must be the same on all "
            f"processes of the group, got other ones on ranks {differ} than on rank 0; a group "
            "shares its batch. What FSDP has in parts are no slices: pass weight.full_tensor()."
        )
    for place, side in enumerate(SIDES):
        size, total = first[place], first[3 + place]
        is_same = [
            own[place] == size and math.isclose(own[3 + place], total, rel_tol=SAME_SUM)
            for _, own in others
        ]
        if others and total and all(is_same):
            raise ValueError(
                f"{function}: {side}_weight must be a slice of its own on each process of the "
                "group, got the same on all; pass weight.tensor_split(size)[rank], or whole heads "
                "without process_group."
            )


def _has_other_rows(own: list[float], first: list[float]) -> bool:
    for start in range(5, len(first), 3):
        *sums, squares = own[start : start + 3]
        *expected, other_squares = first[start : start + 3]
        limit = MAX_GAP * math.sqrt(max(squares, other_squares))
        for a, b in zip(sums, expected, strict=True):
            # of whole numbers so large float64 keeps no ones: it hangs on the order
            if abs(a - b) > max(limit, SAME_SUM * abs(b) if abs(b) > WHOLE else 0.0):
                return True
    return False
