"""How many rows at a time the chunk loop takes, from what the caller says about memory.

N scored rows, C rows of a chunk, P rows of a panel, D hidden size (D_s, D_t), V vocabulary (V_s,
V_t).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.products import Projection, cut_of
from gold_kernels.triton.launch import aligned_width

DEFAULT_BUDGET_BYTES = 1 << 30  # of the buffers of a chunk and a panel
# So many rows of a chunk, or a multiple: two programs of a row kernel on each multiprocessor of a
# Hopper GPU. Of fewer rows every one counts, since reading the heads takes most of the time.
ROUND_ROWS = 256
# Where a 16-bit gradient may lie over the logits of its row. Not on a CPU: what is behind it in the
# row is read there (chunking.py). "meta" stands for a GPU in plans.
PACKED_ON = ("cuda", "meta")
# More rows of logits at a time gain little: what a product reads of a head is hidden behind it.
ENOUGH_ROWS = 1024


class Needs(NamedTuple):
    """Which gradients the caller will ask for."""

    hidden: bool
    weight: bool
    bias: bool


class Limits(NamedTuple):
    """What the caller says about memory."""

    chunk_size: int | None = None  # rows of logits at a time; None takes them from the budget
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    logits_dtype: torch.dtype | None = None  # None: float32, or float64 for float64 inputs
    row_bytes: int = 0  # that the row function needs beside a row of logits
    may_pack: bool = False  # the row function may write a gradient over logits of twice its size

    def dtype_of_logits(self, like: torch.Tensor) -> torch.dtype:
        """like: hidden states, or row values."""
        return self.logits_dtype or float_dtype(like)


class ChunkPlan(NamedTuple):
    """How many rows at a time; panel is at least chunk. What is lent lies in the memory of the
    gradient of the head that a call returns, which is written last.
    """

    chunk: int
    panel: int
    lent: tuple[str, ...] = ()  # of "panel" and the logits of "student" and "teacher"


class _RowBytes(NamedTuple):
    """Bytes of a row of a chunk, and of a row of a panel."""

    student: int  # its logits; 0 where they are made in the panel
    teacher: int
    beside_logits: int
    grad: int  # 0 where no gradient is needed
    beside_grad: int

    @property
    def chunk(self) -> int:
        return self.student + self.teacher + self.beside_logits

    @property
    def panel(self) -> int:
        return self.grad + self.beside_grad


def float_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype of row values, accumulators and, unless asked otherwise, logits."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def is_packed(
    student: LinearHead, needs: Needs, limits: Limits, projection: Projection | None
) -> bool:
    """Gradients of logits, which a frozen head needs a chunk at a time, take no memory."""
    hidden, logits_dtype = student.hidden, limits.dtype_of_logits(student.hidden)
    has_room = hidden.device.type in PACKED_ON and logits_dtype.itemsize == 2 * hidden.itemsize
    is_frozen = any(needs) and not needs.weight and projection is None
    return limits.may_pack and has_room and is_frozen and student.slices is None


def plan_chunks(
    student: LinearHead,
    teacher: LinearHead | None,
    needs: Needs,
    limits: Limits,
    projection: Projection | None = None,
) -> ChunkPlan:
    """Rows per chunk and per panel: their buffers stay within the budget, but for a panel of all
    rows in place of the float32 accumulator of grad_weight, where it is no larger, and for what is
    lent.
    """
    student, teacher = _of_widest(student), None if teacher is None else _of_widest(teacher)
    row = _row_bytes(student, teacher, needs, limits, projection)
    num_rows, budget = max(1, student.num_rows), limits.budget_bytes
    is_bfloat16 = student.hidden.dtype == torch.bfloat16
    # all rows in one panel: their gradients are multiplied once, and need no accumulator
    is_one = needs.weight and is_bfloat16
    is_one = is_one and num_rows * row.grad <= 4 * student.weight.numel()
    if limits.chunk_size is not None:
        chunk = min(limits.chunk_size, num_rows)
        return ChunkPlan(chunk, num_rows if is_one else chunk)
    if not needs.weight:
        chunk = _even_rows(num_rows, budget // max(1, row.chunk + row.panel))
        return ChunkPlan(chunk, chunk)
    if not is_one and num_rows * (row.chunk + row.panel) <= budget:
        return ChunkPlan(num_rows, num_rows)
    # the gradient of a slice may be too small for what that of the widest one holds
    lent = 2 * student.weight.numel() if is_bfloat16 and student.slices is None else 0
    if is_one and num_rows * row.beside_grad <= budget:
        plans = _plans_of_panel(num_rows, budget - num_rows * row.beside_grad, lent, row)
    else:
        plans = _plans_of_panels(num_rows, budget, lent, row)
    # smaller chunks make the products of logits slow, smaller panels the sums into grad_weight
    return max(plans, key=lambda plan: (min(plan.chunk, ENOUGH_ROWS), plan.panel))


def _plans_of_panels(num_rows: int, budget: int, lent: int, row: _RowBytes) -> Iterator[ChunkPlan]:
    """A panel in half of the budget, in all that is lent, or in half of that."""
    panel = _even_rows(num_rows, budget // 2 // row.panel)
    yield from _plans_of_panel(panel, budget - panel * row.panel, 0, row)
    for part in (1, 2):
        limit = min(lent // part // row.grad, budget // max(1, row.beside_grad))
        panel = _even_rows(num_rows, limit)
        if panel * row.grad <= lent // part:
            room, left = budget - panel * row.beside_grad, lent - panel * row.grad
            yield from _plans_of_panel(panel, room, left, row, ("panel",))


def _plans_of_panel(
    panel: int, room: int, lent: int, row: _RowBytes, lent_already: tuple[str, ...] = ()
) -> Iterator[ChunkPlan]:
    """Logits in the room of their own, in what is lent, or one side in each."""
    lend: tuple[str, ...]
    for lend in ((), ("student",), ("student", "teacher")):
        inside = sum(getattr(row, side) for side in lend)
        outside = row.chunk - inside
        limit = room // outside if outside else panel
        if inside:
            limit = min(limit, lent // inside)
        if limit > 0 or not lend:
            yield ChunkPlan(_even_rows(panel, limit), panel, (*lent_already, *lend))


def _row_bytes(
    student: LinearHead,
    teacher: LinearHead | None,
    needs: Needs,
    limits: Limits,
    projection: Projection | None,
) -> _RowBytes:
    hidden, has_grad = student.hidden, any(needs)
    panel_dtype = hidden.dtype if projection is None else float_dtype(hidden)
    v_student = aligned_width(student.weight.shape[0])
    v_teacher = 0 if teacher is None else aligned_width(teacher.weight.shape[0])
    logits_dtype = limits.dtype_of_logits(hidden)
    is_in_place = has_grad and logits_dtype == panel_dtype
    student_logits = 0 if is_in_place else logits_dtype.itemsize * v_student
    teacher_logits = logits_dtype.itemsize * v_teacher
    beside_logits = limits.row_bytes
    beside_logits += sum(_gathered_row(side) for side in (student, teacher) if side is not None)
    if logits_dtype.itemsize < hidden.dtype.itemsize:  # rounded after the GEMM, one side at a time
        beside_logits += hidden.dtype.itemsize * max(v_student, v_teacher)
    grad = panel_dtype.itemsize * v_student if has_grad else 0
    if projection is not None:
        grad += projection.row_bytes(student.weight)
    if is_packed(student, needs, limits, projection):
        grad = 0
    # beside a panel: the copy of its hidden states without rows of weight 0
    beside_grad = hidden.dtype.itemsize * hidden.shape[1] if needs.weight else 0
    if needs.weight:
        beside_grad += _gathered_row(student)
    if needs.hidden and cut_of(student.weight.shape[0], hidden) < student.weight.shape[0]:
        beside_grad += 4 * hidden.shape[1]  # the sum of two products
    return _RowBytes(student_logits, teacher_logits, beside_logits, grad, beside_grad)


def _of_widest(head: LinearHead) -> LinearHead:
    """The head of the widest slice, for sizes alone: processes of a group take the same rows at a
    time, whatever their slice.
    """
    if head.slices is None:
        return head
    size = head.weight.shape[1]
    return head._replace(weight=head.weight.new_empty(1, size).expand(head.slices.widest, size))


def _gathered_row(side: LinearHead) -> int:
    """Bytes of a row of hidden states that an index copies."""
    return 0 if side.row_index is None else side.hidden.dtype.itemsize * side.hidden.shape[1]


def _even_rows(num_rows: int, limit: int) -> int:
    """At most limit rows, and 1 at least, in parts of about equal size."""
    limit = max(1, limit)
    if num_rows <= limit:
        return num_rows
    multiple = ROUND_ROWS if limit >= ROUND_ROWS else 1
    limit -= limit % multiple
    even = -(-num_rows // -(-num_rows // limit))
    return -(-even // multiple) * multiple
