"""Working memory of uld_rows_kernel: how many programs run, and what each needs beside its rows.

C rows of a chunk, V vocabulary (V_s, V_t).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.triton.launch import (
    aligned_width,
    empty_rows,
    has_aligned_rows,
    is_interpreted,
)
from gold_kernels.uld.bin_table import TABLE_WORDS
from gold_kernels.uld.bins import LIST_SIZES
from gold_kernels.uld.lists import COLUMN_BITS, list_words

MAX_PROGRAMS = 264  # two on every multiprocessor of a Hopper GPU, each with working memory


class Memory(NamedTuple):
    """What programs work in. A tensor that nobody needs is some other tensor."""

    num_programs: int
    is_shared: bool
    table: Tensor  # (programs, TABLE_WORDS) int32
    lists: Tensor  # (programs, list_words(list_size)) int32
    signs: Tensor  # (C or programs, V_s)
    has_lists: bool
    list_size: int


def _list_size(num_bytes: int, num_programs: int) -> int:
    """Entries of the longest list that so many programs have memory for, or of the shortest one."""
    fitting = (size for size in LIST_SIZES if 4 * list_words(size) * num_programs <= num_bytes)
    return next(fitting, LIST_SIZES[-1])


def working_memory(
    student_logits: Tensor,
    teacher_logits: Tensor,
    grad_logits: Tensor | None,
    scratch_bytes: int,
    *,
    has_overlap: bool,
) -> Memory:
    """Tables, lists and signs for as many programs as scratch_bytes hold.

    Only float32 logits have lists: ties fill the bins of 16-bit ones. The signs of listed entries
    and the gradients of matched ones are kept in grad_logits until the final gradient replaces
    them. Where grad_logits is student_logits, which is still read, they have memory of their own.
    The table of bins is in shared memory if all rows are aligned: unaligned rows pass through
    shared memory themselves, and a program may ask for 48 KiB, less than both take.
    """
    num_rows, vocab_size = student_logits.shape
    device, integer = student_logits.device, torch.int32
    rows = [student_logits, teacher_logits, *([] if grad_logits is None else [grad_logits])]
    is_shared = device.type == "cuda" and torch.version.hip is None
    is_shared &= all(has_aligned_rows(tensor) for tensor in rows)
    has_lists = student_logits.dtype == torch.float32
    has_lists &= max(vocab_size, teacher_logits.shape[1]) <= 1 << COLUMN_BITS
    has_signs = (
        grad_logits is not None
        and (has_lists or has_overlap)
        and grad_logits.data_ptr() == student_logits.data_ptr()
    )
    program_bytes = 0 if is_shared else 4 * TABLE_WORDS
    program_bytes += student_logits.dtype.itemsize * aligned_width(vocab_size) if has_signs else 0
    num_programs, list_size = num_rows, LIST_SIZES[0]
    if has_lists:
        enough = min(num_rows, MAX_PROGRAMS // 2)  # with fewer, multiprocessors have nothing to do
        list_size = _list_size(scratch_bytes - enough * program_bytes, enough)
        program_bytes += 4 * list_words(list_size)
    if program_bytes:
        most = scratch_bytes // program_bytes
        num_programs = 1 if is_interpreted() else max(1, min(num_rows, MAX_PROGRAMS, most))
    table = torch.empty(1 if is_shared else num_programs, TABLE_WORDS, dtype=integer, device=device)
    lists, signs = table, student_logits if grad_logits is None else grad_logits
    if has_lists:
        lists = torch.empty(num_programs, list_words(list_size), dtype=integer, device=device)
    if has_signs:
        signs = empty_rows(student_logits, num_programs, vocab_size, student_logits.dtype)
    return Memory(num_programs, is_shared, table, lists, signs, has_lists, list_size)
