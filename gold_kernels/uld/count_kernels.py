"""Kernels of triton_counts.py that walk columns with a sign, and the scan: passes of the row kernel
of triton_rows.py, for columns of which this process has a part. What a row kernel keeps in shared
memory between its passes goes through global memory here.

C rows of a chunk, V_r columns of this process, V of all, R processes, c rows of which each is the
owner, S slices of a row that each process has, P open entries that a pool has room for.
"""

import triton
import triton.language as tl

from gold_kernels.triton.lines import NATS
from gold_kernels.uld.bin_table import load_table, scatter, shared_table, store_table
from gold_kernels.uld.bins import clear_bins, count_side, scan_bins
from gold_kernels.uld.row_parts import grid_of, row_sides, write_gradient

SCAN_BINS = 1 << 11
MOST_OPEN = 1 << 16  # open entries of a row; a row with more is refused
_MOST_OPEN = tl.constexpr(MOST_OPEN)
REFUSED = tl.constexpr(1)  # word behind the bins: a row that has too many
_HIGH_STEP = tl.constexpr(1 << 16)
BLOCK = tl.constexpr(1024)


@triton.jit
def grid_of_row(
    sums_ptr,  # (R, C, 2, S, 3) float64
    sums_stride,  # from one process to the next
    row,
    student_size,
    teacher_size,
    student_bits,
    teacher_bits,
    NUM_BINS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):  # -> sides, grid, origins, log2 of the student's sum; the same on all processes
    bits = (student_bits, teacher_bits)
    nobody = (NUM_SLICES, NUM_SLICES)  # slices without entries are there, and neutral
    sides, lowest, scales, totals, gap = row_sides(
        sums_ptr, sums_ptr, sums_ptr, row, nobody, bits, False, 1, NUM_SLICES, sums_stride,
        NUM_RANKS, RANK_BLOCK,
    )  # fmt: skip
    sizes = (student_size, teacher_size)
    grid, origins = grid_of(sides, lowest, scales, gap, sizes, False, NUM_BINS)
    return sides, grid, origins, tl.log2(totals[0])


@triton.jit
def open_table(words_ptr, IS_SHARED: tl.constexpr):
    """The table of this program, and its counter's word."""
    return shared_table() if IS_SHARED else words_ptr


@triton.jit
def read_table(
    table, words_ptr, IS_SHARED: tl.constexpr, NUM_BINS: tl.constexpr, SCAN_BINS: tl.constexpr
):
    """Words of a row into the table; its counter is 0."""
    if IS_SHARED:
        for first in range(0, NUM_BINS, SCAN_BINS):
            bins = first + tl.arange(0, SCAN_BINS)
            store_table(table, bins, tl.load(words_ptr + bins), IS_SHARED)
    store_table(table, NUM_BINS, 0, IS_SHARED)
    tl.debug_barrier()


@triton.jit
def _write_table(
    table, words_ptr, IS_SHARED: tl.constexpr, NUM_BINS: tl.constexpr, SCAN_BINS: tl.constexpr
):
    if IS_SHARED:
        for first in range(0, NUM_BINS, SCAN_BINS):
            bins = first + tl.arange(0, SCAN_BINS)
            tl.store(words_ptr + bins, load_table(table, bins, IS_SHARED))


@triton.jit
def count_columns_kernel(
    student_ptr,  # (C, V_r) logits
    teacher_ptr,  # (C, V_r)
    weights_ptr,  # (C, 2) float32
    counts_ptr,  # (R c, words) int32, overwritten: counts of bins, entries counted of both sides
    sums_ptr,  # (R, C, 2, S, 3) float64
    sums_stride,  # from one process to the next
    student_size,  # V
    teacher_size,
    student_bits,
    teacher_bits,
    student_row_stride,
    teacher_row_stride,
    num_student,  # V_r
    num_teacher,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """A row of weight 0 counts nothing: it may hold NaN."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    _, _, origins, _ = grid_of_row(
        sums_ptr, sums_stride, row, student_size, teacher_size, student_bits, teacher_bits,
        NUM_BINS, NUM_SLICES, NUM_RANKS, RANK_BLOCK,
    )  # fmt: skip
    is_live = tl.load(weights_ptr + 2 * row) != 0.0
    words_ptr = counts_ptr + row * TABLE_WORDS
    table = open_table(words_ptr, IS_SHARED)
    clear_bins(table, IS_SHARED, NUM_BINS, SCAN_BINS)
    tl.debug_barrier()
    student_counted = count_side(
        student_ptr + row * student_row_stride, student_ptr, table,
        tl.where(is_live, num_student, 0), origins[0], 1, False, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
    )  # fmt: skip
    teacher_counted = count_side(
        teacher_ptr + row * teacher_row_stride, teacher_ptr, table,
        tl.where(is_live, num_teacher, 0), origins[1], _HIGH_STEP, False, IS_SHARED, NUM_BINS,
        BLOCK_V, LINE,
    )  # fmt: skip
    tl.debug_barrier()
    _write_table(table, words_ptr, IS_SHARED, NUM_BINS, SCAN_BINS)
    tl.store(words_ptr + NUM_BINS, student_counted - teacher_counted)


@triton.jit
def scan_counts_kernel(
    counts_ptr,  # (R, c, words) int32 of own rows
    weights_ptr,  # (C, 2) float32
    words_ptr,  # (c, words) int32, overwritten: signs of bins, which are open; whether refused
    offsets_ptr,  # (c, bins) int32, overwritten for open bins
    befores_ptr,  # (c, bins)
    state_ptr,  # (c, 2) int32, overwritten: where keys of a row begin, and how many it has
    next_ptr,  # () int32, 0: keys of all rows
    edges_ptr,  # (c,) float32, overwritten: part of the loss that hangs on bins alone
    sums_ptr,  # (R, C, 2, S, 3) float64
    sums_stride,  # from one process to the next
    student_size,
    teacher_size,
    student_bits,
    teacher_bits,
    first_row,  # of the chunk that is this process' own
    num_own,  # c
    num_keys,  # that there is room for
    MAX_LISTED: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """One row of those that this process owns."""
    own_row = tl.program_id(0).to(tl.int64)
    row = first_row + own_row
    _, grid, _, _ = grid_of_row(
        sums_ptr, sums_stride, row, student_size, teacher_size, student_bits, teacher_bits,
        NUM_BINS, NUM_SLICES, NUM_RANKS, RANK_BLOCK,
    )  # fmt: skip
    words_ptr += own_row * TABLE_WORDS
    counts_ptr += own_row * TABLE_WORDS
    table = open_table(words_ptr, IS_SHARED)
    counted = 0
    for rank in tl.static_range(NUM_RANKS):
        part_ptr = counts_ptr + (rank * num_own).to(tl.int64) * TABLE_WORDS
        counted += tl.load(part_ptr + NUM_BINS)
    for first in range(0, NUM_BINS, SCAN_BINS):
        bins = first + tl.arange(0, SCAN_BINS)
        total = tl.zeros([SCAN_BINS], dtype=tl.int32)
        for rank in tl.static_range(NUM_RANKS):
            part_ptr = counts_ptr + (rank * num_own).to(tl.int64) * TABLE_WORDS
            total += tl.load(part_ptr + bins)
        store_table(table, bins, total, IS_SHARED)
    store_table(table, NUM_BINS, 0, IS_SHARED)
    tl.debug_barrier()
    is_live = tl.load(weights_ptr + 2 * row) != 0.0
    edges, found = scan_bins(
        table, offsets_ptr + own_row * NUM_BINS, befores_ptr + own_row * NUM_BINS, grid,
        tl.where(is_live, student_size - teacher_size, 0), tl.program_id(0) >= 0, True, IS_SHARED,
        NUM_BINS, SCAN_BINS, MAX_LISTED, 1 << 30,
    )  # fmt: skip
    tl.debug_barrier()
    num_open = load_table(table, NUM_BINS, IS_SHARED)
    first_key = tl.atomic_add(next_ptr, num_open, sem="relaxed")
    # an overflow of 16 bits shows: what the scan found is not what was counted
    is_refused = (found != counted) | (num_open > _MOST_OPEN) | (first_key + num_open > num_keys)
    tl.debug_barrier()
    _write_table(table, words_ptr, IS_SHARED, NUM_BINS, SCAN_BINS)
    tl.store(words_ptr + NUM_BINS + REFUSED, is_refused.to(tl.int32))
    tl.store(state_ptr + 2 * own_row, first_key)
    tl.store(state_ptr + 2 * own_row + 1, tl.where(is_refused, 0, num_open))
    tl.store(edges_ptr + own_row, tl.where(is_live, edges, 0.0))  # of NaN they would be NaN


@triton.jit
def sign_columns_kernel(
    student_ptr,  # (C, V_r) logits
    grad_ptr,  # (C, V_r) overwritten with the gradient; may be student_ptr
    own_signs_ptr,  # (C, V_r) overwritten; may be grad_ptr
    weights_ptr,  # (C, 2) float32
    words_ptr,  # (R c, words) int32, see scan_counts_kernel
    entries_ptr,  # (R, 2 c + P) int32, see collect_open_kernel
    signs_ptr,  # (R, P) of the student's entries
    totals_ptr,  # (C, 3) float32, of all processes: see counted_rows
    sums_ptr,  # (R, C, 2, S, 3) float64
    sums_stride,  # from one process to the next
    student_size,
    teacher_size,
    student_bits,
    teacher_bits,
    student_row_stride,
    grad_row_stride,
    signs_row_stride,
    num_own,  # c
    pool_size,  # P
    num_student,  # V_r
    unmatched_weight,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sides, _, origins, log2_total = grid_of_row(
        sums_ptr, sums_stride, row, student_size, teacher_size, student_bits, teacher_bits,
        NUM_BINS, NUM_SLICES, NUM_RANKS, RANK_BLOCK,
    )  # fmt: skip
    rank = row // num_own
    entries_ptr += rank * (2 * num_own + pool_size)
    header_ptr = entries_ptr + 2 * (row - rank * num_own)
    first_entry, num_entries = tl.load(header_ptr), tl.load(header_ptr + 1)
    entries_ptr += 2 * num_own + first_entry
    signs_ptr += rank * pool_size + first_entry
    own_signs = own_signs_ptr + row * signs_row_stride
    for first in range(0, num_entries, BLOCK):
        places = first + tl.arange(0, BLOCK)
        is_entry = places < num_entries
        entries = tl.load(entries_ptr + places, mask=is_entry, other=1)
        signs = tl.load(signs_ptr + places, mask=is_entry, other=0.0)
        signs = signs.to(tl.float32).to(own_signs.dtype.element_ty)
        scatter(own_signs + (entries >> 1), signs, is_entry & ((entries & 1) == 0), IS_SHARED)
    row_words = words_ptr + row * TABLE_WORDS
    table = open_table(row_words, IS_SHARED)
    read_table(table, row_words, IS_SHARED, NUM_BINS, SCAN_BINS)
    weight = tl.load(weights_ptr + 2 * row)
    soft = (
        weight * student_bits * NATS, unmatched_weight,
        unmatched_weight * tl.load(totals_ptr + 3 * row + 1), weight != 0.0,
    )  # fmt: skip
    nothing = (-1, 0.0, 0.0, 0.0, row < 0)  # no label
    write_gradient(
        grad_ptr + row * grad_row_stride, student_ptr + row * student_row_stride, student_ptr,
        table, own_signs, num_student, sides[0], 0.0, origins[0], soft,
        (row < 0, -1, 0.0, log2_total), nothing, softcap, False, False, False, False, HAS_SOFTCAP,
        True, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
    )  # fmt: skip
