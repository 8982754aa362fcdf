"""Sums of all tensors of a call in one launch (engine/call_facts.py): of so few numbers a launch
takes longer than they do.

N rows of a sample, D numbers of each. Sums are added up in any order: they are compared with some
tolerance, and those of whole numbers are exact in float64.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import num_blocks

ROWS = 8  # of floats that a program takes
BLOCK = 256  # numbers of a row at a time; whole numbers that a program takes
FIRST_SAMPLE = 5  # place of the first sums of rows
_FIRST_SAMPLE = tl.constexpr(FIRST_SAMPLE)
_ORDER = tl.constexpr(40503)  # 2**16 times the golden ratio: rows next to each other differ


@triton.jit
def _finite(values):
    return tl.where(tl.abs(values) < float("inf"), values, 0.0)  # nor is NaN


@triton.jit
def _add_rows(
    facts_ptr,  # three of them
    rows_ptr,
    num_rows,
    num_numbers,
    live_ptr,
    num_live,
    HAS_LIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of rows, with factors that tell their order, and squares of the rows of this program."""
    first = tl.program_id(0) * ROWS
    if first < num_rows:
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        offsets = rows.to(tl.int64) * num_numbers
        parts = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, num_numbers, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            is_number = is_row[:, None] & (columns < num_numbers)[None, :]
            pointers = rows_ptr + offsets[:, None] + columns[None, :]
            parts += tl.load(pointers, mask=is_number, other=0.0).to(tl.float32)
        sums = tl.sum(parts, axis=1)
        if HAS_LIVE:
            is_masked = is_row & (num_rows == num_live)
            is_live = tl.load(live_ptr + rows, mask=is_masked, other=1) != 0
            sums = tl.where(is_live, sums, 0.0)
        sums = _finite(sums)
        factors = ((rows * _ORDER) & 0xFFFF).to(tl.float32) / 65536 - 0.5
        tl.atomic_add(facts_ptr, tl.sum(sums.to(tl.float64), 0), sem="relaxed")
        tl.atomic_add(facts_ptr + 1, tl.sum((sums * factors).to(tl.float64), 0), sem="relaxed")
        squares = sums.to(tl.float64) * sums.to(tl.float64)
        tl.atomic_add(facts_ptr + 2, tl.sum(squares, 0), sem="relaxed")


@triton.jit
def _add_whole_numbers(
    facts_ptr, ids_ptr, size, live_ptr, num_live, HAS_LIVE: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0) * BLOCK
    if first < size:
        places = first + tl.arange(0, BLOCK)
        is_id = places < size
        ids = tl.load(ids_ptr + places, mask=is_id, other=0)
        if HAS_LIVE:
            is_live = tl.load(live_ptr + places, mask=is_id & (size == num_live), other=1) != 0
            ids = tl.where(is_live, ids, 0)
        ids = ids.to(tl.float64)
        tl.atomic_add(facts_ptr, tl.sum(ids, 0), sem="relaxed")
        factors = (places + 1).to(tl.float64)
        tl.atomic_add(facts_ptr + 1, tl.sum(ids * factors, 0), sem="relaxed")


@triton.jit
def _add_entry(fact_ptr, entries_ptr, num_entries, stride, num_numbers, BLOCK: tl.constexpr):
    """The sum of a sampled entry, one a program."""
    entry = tl.program_id(0)
    if entry < num_entries:
        row_ptr = entries_ptr + entry.to(tl.int64) * stride
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, num_numbers, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values = tl.load(row_ptr + columns, mask=columns < num_numbers, other=0.0)
            total += values.to(tl.float32)
        tl.atomic_add(fact_ptr, tl.sum(_finite(total).to(tl.float64), 0), sem="relaxed")


# They differ from call to call: a kernel for each kind of them would be compiled in the run.
_VARYING = [
    *("num_student_entries", "num_teacher_entries", "num_students", "num_teachers", "num_first"),
    *("num_second", "num_label_weights", "num_labels", "num_ids", "student_vocab_size"),
    *("teacher_vocab_size", "same"),
]


@triton.jit(do_not_specialize=_VARYING)
def call_facts_kernel(
    facts_ptr,  # (26,) float64, zeros, to which all is added
    student_entries_ptr,  # (any, D_s)
    teacher_entries_ptr,  # (any, D_t)
    student_hidden_ptr,  # (N_s, D_s)
    teacher_hidden_ptr,  # (N_t, D_t)
    first_floats_ptr,  # (any, any)
    second_floats_ptr,
    label_weights_ptr,  # (any,)
    labels_ptr,  # (any,) whole numbers
    ids_ptr,  # (any,)
    live_ptr,  # (N_s,) bool, read if HAS_LIVE
    num_student_entries,
    num_teacher_entries,
    student_stride,  # from one entry of the sample to the next
    teacher_stride,
    num_students,  # N_s
    num_teachers,
    student_size,  # D_s
    teacher_size,
    num_first,
    first_size,
    num_second,
    second_size,
    num_label_weights,
    num_labels,
    num_ids,
    student_vocab_size,
    teacher_vocab_size,
    same,
    HAS_LIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        tl.store(facts_ptr, student_vocab_size)
        tl.store(facts_ptr + 1, teacher_vocab_size)
        tl.store(facts_ptr + 2, same)
    _add_entry(
        facts_ptr + 3, student_entries_ptr, num_student_entries, student_stride, student_size, BLOCK
    )
    _add_entry(
        facts_ptr + 4, teacher_entries_ptr, num_teacher_entries, teacher_stride, teacher_size, BLOCK
    )
    rows = facts_ptr + _FIRST_SAMPLE
    _add_rows(
        rows, student_hidden_ptr, num_students, student_size, live_ptr, num_students, HAS_LIVE,
        ROWS, BLOCK,
    )  # fmt: skip
    _add_rows(
        rows + 3, teacher_hidden_ptr, num_teachers, teacher_size, live_ptr, num_students, HAS_LIVE,
        ROWS, BLOCK,
    )  # fmt: skip
    _add_rows(
        rows + 6, first_floats_ptr, num_first, first_size, live_ptr, num_students, HAS_LIVE, ROWS,
        BLOCK,
    )  # fmt: skip
    _add_rows(
        rows + 9, second_floats_ptr, num_second, second_size, live_ptr, num_students, HAS_LIVE,
        ROWS, BLOCK,
    )  # fmt: skip
    _add_rows(
        rows + 12, label_weights_ptr, num_label_weights, 1, live_ptr, num_students, HAS_LIVE, ROWS,
        BLOCK,
    )  # fmt: skip
    _add_whole_numbers(rows + 15, labels_ptr, num_labels, live_ptr, num_students, HAS_LIVE, BLOCK)
    _add_whole_numbers(rows + 18, ids_ptr, num_ids, live_ptr, num_students, HAS_LIVE, BLOCK)


def add_facts_(
    facts: Tensor,  # (26,) float64, zeros
    slices: Sequence[Tensor],  # (any, D) one or two
    rows: Sequence[Tensor | None],  # floats of five kinds, whole numbers of two
    is_live: Tensor | None,  # (N_s,)
    numbers: Sequence[int],  # sizes of both slices, and what must be equal
) -> None:
    """Launch call_facts_kernel."""
    entries = [part if part.stride(1) == 1 else part.contiguous() for part in slices]
    samples = [facts.new_empty(0) if one is None else one.detach().contiguous() for one in rows]
    sizes = [one.shape[1] if one.ndim == 2 else 1 for one in samples[:5]]
    nums = [*(len(one) for one in samples[:5]), samples[5].numel(), samples[6].numel()]
    teacher = entries[-1]  # without a teacher nothing of it is read
    num_programs = max(
        *(len(part) for part in entries),
        *(num_blocks(number, ROWS) for number in nums[:5]),
        *(num_blocks(number, BLOCK) for number in nums[5:]),
        1,
    )
    call_facts_kernel[(num_programs,)](
        *(facts, entries[0], teacher, *samples, facts if is_live is None else is_live),
        *(len(entries[0]), len(teacher) if len(entries) > 1 else 0),
        *(entries[0].stride(0), teacher.stride(0)),
        *(nums[0], nums[1], sizes[0], sizes[1], nums[2], sizes[2], nums[3], sizes[3]),
        *(*nums[4:], *numbers),
        HAS_LIVE=is_live is not None,
        ROWS=ROWS,
        BLOCK=BLOCK,
    )
