"""Working memory of uld_rows_kernel: how many programs run, and what each needs beside its rows.

C rows of a chunk, V vocabulary (V_s, V_t).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gold_kernels.kernels.launch import empty_rows, has_aligned_rows, is_interpreted
from gold_kernels.kernels.uld_bins import COLUMN_BITS, LIST_WORDS, NUM_BINS

MAX_PROGRAMS = 264  # two on every multiprocessor of a Hopper GPU, each with working memory


class Memory(NamedTuple):
    """What programs work in; tensors that are not needed are some other one."""

    num_programs: int
    is_shared: bool
    table: Tensor  # (programs, NUM_BINS) int32
    lists: Tensor  # (programs, LIST_WORDS) int32
    signs: Tensor  # (C or programs, V_s)
    has_lists: bool
    has_signs: bool  # signs are memory of their own, not the logits


def working_memory(
    student_logits: Tensor, teacher_logits: Tensor, grad_logits: Tensor | None, scratch_bytes: int
) -> Memory:
    """Lists for float32 logits; the signs of listed entries and the pull of matched ones wait where
    the gradient is to be. The table of bins is in shared memory where the kernel needs none to turn
    unaligned rows round: both together are more than the 48 KiB that a program may ask for.
    """
    num_rows, vocab_size = student_logits.shape
    device, integer = student_logits.device, torch.int32
    rows = [student_logits, teacher_logits, *([] if grad_logits is None else [grad_logits])]
    is_shared = device.type == "cuda" and torch.version.hip is None
    is_shared &= all(has_aligned_rows(tensor) for tensor in rows)
    has_lists = student_logits.dtype == torch.float32
    has_lists &= max(vocab_size, teacher_logits.shape[1]) <= 1 << COLUMN_BITS
    num_programs = num_rows
    if has_lists or not is_shared:
        most = scratch_bytes // (4 * (LIST_WORDS + NUM_BINS))
        num_programs = 1 if is_interpreted() else max(1, min(num_rows, MAX_PROGRAMS, most))
    table = torch.empty(1 if is_shared else num_programs, NUM_BINS, dtype=integer, device=device)
    lists = table
    if has_lists:
        lists = torch.empty(num_programs, LIST_WORDS, dtype=integer, device=device)
    signs, has_signs = grad_logits, True
    if grad_logits is None:
        signs, has_signs = student_logits, False
    elif grad_logits.data_ptr() == student_logits.data_ptr():
        has_signs = has_lists
        if has_lists:
            signs = empty_rows(student_logits, num_programs, vocab_size, torch.float32)
    return Memory(num_programs, is_shared, table, lists, signs, has_lists, has_signs)
