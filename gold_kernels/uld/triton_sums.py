"""Kernel that runs before the ULD row kernel: log-sum-exps of both sides, in slices of a row, and
the teacher's logits of matched entries side by side.

C rows of a chunk, V vocabulary (V_s, V_t), K matched entries, S slices of a row.

It is a kernel of its own because of the gather of matched entries. Memory comes in sectors of 32
bytes, and the partners of neighbours lie in different sectors. Here programs work on a few rows at
a time, so that a sector which is needed again is still in the L2 cache. The row kernel works on as
many rows as it has programs, more than the cache holds: there each entry cost a sector of memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import (
    aligned_width,
    empty_rows,
    is_interpreted,
    num_blocks,
    row_block,
)
from gold_kernels.triton.lines import LOWEST_LOGIT, row_sum

SLICE_BLOCKS = 4  # blocks in a slice, which one program sums
PAIR_BLOCK = 1 << 9
SLICE_VALUES = 3  # largest logit, sum of exp2 from there, lowest logit
_VALUES = tl.constexpr(SLICE_VALUES)


class Slices(NamedTuple):
    """How rows are cut."""

    size: int  # columns of a slice; the last one may have fewer
    student: int  # slices of a row
    teacher: int
    block_v: int
    line: int
    num_warps: int

    @classmethod
    def of(cls, v_student: int, v_teacher: int, dtype: torch.dtype) -> "Slices":
        block_v, line, num_warps = row_block(max(v_student, v_teacher), dtype)
        size = SLICE_BLOCKS * block_v
        counts = (num_blocks(v_student, size), num_blocks(v_teacher, size))
        return cls(size, *counts, block_v, line, num_warps)

    @property
    def most(self) -> int:  # S
        return 1 << (max(self.student, self.teacher) - 1).bit_length()


class Sums(NamedTuple):
    """What uld_sums_kernel leaves to the row kernel.

    sums has, for student and teacher, and each slice, the largest logit, the sum of exp2(bits *
    (logit - largest)) and the lowest logit.
    """

    sums: Tensor  # (C, 2, S, 3) float64
    partners: Tensor | None  # (C, K) their logits
    slice_size: int  # columns
    next_row: Tensor  # () int32, 0


def row_bytes(v_student: int, v_teacher: int, num_matched: int, dtype: torch.dtype) -> int:
    """Bytes a row of the tensors that uld_sums returns."""
    sums = 2 * Slices.of(v_student, v_teacher, dtype).most * SLICE_VALUES
    return torch.float64.itemsize * sums + dtype.itemsize * aligned_width(num_matched)


@triton.jit
def _slices_ptr(sums_ptr, row, IS_TEACHER: tl.constexpr, NUM_SLICES: tl.constexpr):
    return sums_ptr + (2 * row + (1 if IS_TEACHER else 0)) * (NUM_SLICES * _VALUES)


@triton.jit
def _store_slice(
    row_ptr,
    slices_ptr,
    part,
    vocab_size,
    bits,
    SLICE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    first = part * SLICE
    last = tl.minimum(first + SLICE, vocab_size)
    largest, total, lowest = row_sum(row_ptr, first, last, bits, BLOCK_V, LINE, True)
    slice_ptr = slices_ptr + part * _VALUES
    tl.store(slice_ptr, largest.to(tl.float64))
    tl.store(slice_ptr + 1, total)
    tl.store(slice_ptr + 2, lowest.to(tl.float64))


@triton.jit
def uld_sums_kernel(
    student_ptr,  # (C, V_s) logits
    teacher_ptr,  # (C, V_t)
    teacher_ids_ptr,  # (K,) int32, read if HAS_OVERLAP
    sums_ptr,  # (C, 2, S, 3) float64, overwritten as far as there are slices
    partners_ptr,  # (C, K), overwritten if HAS_OVERLAP
    next_ptr,  # () int32, overwritten with 0: rows that the row kernel's programs have taken
    student_row_stride,
    teacher_row_stride,
    partners_row_stride,
    num_parts,  # programs of a row: slices of both sides, blocks of pairs
    num_student_slices,
    num_teacher_slices,
    student_vocab_size,
    teacher_vocab_size,
    num_matched,
    student_bits,  # bits that a logit of 1 is worth: log2(e) / temperature
    teacher_bits,
    NUM_SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
):
    row = (tl.program_id(0) // num_parts).to(tl.int64)  # row * stride passes 2**31
    part = tl.program_id(0) % num_parts
    if tl.program_id(0) == 0:
        tl.store(next_ptr, 0)
    teacher_row = teacher_ptr + row * teacher_row_stride
    if part < num_student_slices:
        student_row = student_ptr + row * student_row_stride
        slices_ptr = _slices_ptr(sums_ptr, row, False, NUM_SLICES)
        _store_slice(
            student_row, slices_ptr, part, student_vocab_size, student_bits, SLICE, BLOCK_V, LINE
        )
    elif part < num_student_slices + num_teacher_slices:
        part -= num_student_slices
        slices_ptr = _slices_ptr(sums_ptr, row, True, NUM_SLICES)
        _store_slice(
            teacher_row, slices_ptr, part, teacher_vocab_size, teacher_bits, SLICE, BLOCK_V, LINE
        )
    elif HAS_OVERLAP:
        first = (part - num_student_slices - num_teacher_slices) * PAIR_BLOCK
        index = first + tl.arange(0, PAIR_BLOCK)
        is_pair = index < num_matched
        teacher_ids = tl.load(teacher_ids_ptr + index, mask=is_pair, other=0)
        logits = tl.load(teacher_row + teacher_ids, mask=is_pair, other=0.0)
        tl.store(partners_ptr + row * partners_row_stride + index, logits, mask=is_pair)


@triton.jit
def join_slices(
    sums_ptr,
    row,
    vocab_size,
    bits,
    IS_TEACHER: tl.constexpr,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    rank_stride=0,
    NUM_RANKS: tl.constexpr = 1,
    RANK_BLOCK: tl.constexpr = 1,  # a power of two, as NUM_SLICES is
):  # -> () largest logit of a row, () float64 sum of exp2 from there, () lowest logit
    """With ranks: of all processes, each of which has so many slices."""
    slices = tl.arange(0, RANK_BLOCK * NUM_SLICES)
    is_slice = slices * SLICE < vocab_size
    slice_ptrs = _slices_ptr(sums_ptr, row, IS_TEACHER, NUM_SLICES)
    if NUM_RANKS > 1:
        ranks = slices // NUM_SLICES
        slices -= ranks * NUM_SLICES
        is_slice = (slices * SLICE < vocab_size) & (ranks < NUM_RANKS)
        slice_ptrs += ranks.to(tl.int64) * rank_stride
    slice_ptrs += slices * _VALUES
    largest = tl.load(slice_ptrs, mask=is_slice, other=LOWEST_LOGIT).to(tl.float32)
    totals = tl.load(slice_ptrs + 1, mask=is_slice, other=0.0)
    lowest = tl.load(slice_ptrs + 2, mask=is_slice, other=1e30).to(tl.float32)
    row_max = tl.max(largest, 0)
    totals *= tl.exp2((largest - row_max) * bits).to(tl.float64)
    return row_max, tl.sum(totals, 0), tl.min(lowest, 0)


def uld_sums(
    student_logits: Tensor,  # (C, V_s), unit column stride
    teacher_logits: Tensor,  # (C, V_t), unit column stride
    teacher_ids: Tensor | None,  # (K,) int32
    student_bits: float,
    teacher_bits: float,
    most: int | None = None,  # S, of all of which values are written; without entries neutral ones
) -> Sums:
    """Launch uld_sums_kernel on the rows of a chunk."""
    num_rows, v_student = student_logits.shape
    v_teacher = teacher_logits.shape[1]
    slices = Slices.of(v_student, v_teacher, student_logits.dtype)
    if most is not None:
        slices = slices._replace(student=most, teacher=most)
    sums = student_logits.new_empty(num_rows, 2, slices.most, SLICE_VALUES, dtype=torch.float64)
    next_row = student_logits.new_empty((), dtype=torch.int32)
    partners, num_matched, pair_block = None, 0, 1 << 16 if is_interpreted() else PAIR_BLOCK
    if teacher_ids is not None:
        num_matched = teacher_ids.shape[0]
        partners = empty_rows(teacher_logits, num_rows, num_matched, teacher_logits.dtype)
    num_parts = slices.student + slices.teacher + num_blocks(num_matched, pair_block)
    uld_sums_kernel[(num_rows * num_parts,)](
        student_logits,
        teacher_logits,
        sums if teacher_ids is None else teacher_ids,
        sums,
        sums if partners is None else partners,
        next_row,
        student_logits.stride(0),
        teacher_logits.stride(0),
        0 if partners is None else partners.stride(0),
        num_parts,
        slices.student,
        slices.teacher,
        v_student,
        v_teacher,
        num_matched,
        student_bits,
        teacher_bits,
        NUM_SLICES=slices.most,
        SLICE=slices.size,
        BLOCK_V=slices.block_v,
        LINE=slices.line,
        PAIR_BLOCK=pair_block,
        HAS_OVERLAP=teacher_ids is not None,
        num_warps=slices.num_warps,
    )
    return Sums(sums, partners, slices.size, next_row)
