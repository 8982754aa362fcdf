"""Kernels of triton_counts.py for entries of open bins: every process collects its own, the owner
of a row orders those of all (lists.py).

C rows of a chunk, V_r columns of this process, V of all, R processes, c rows of which each is the
owner, S slices of a row that each process has, P open entries that a pool has room for.
"""

import triton
import triton.language as tl

from gold_kernels.uld.bin_table import load_table, scatter, take_from_table
from gold_kernels.uld.bins import SIZE_BITS, SIZE_MASK, bins_of, clear_bins
from gold_kernels.uld.count_kernels import BLOCK, REFUSED, grid_of_row, open_table, read_table
from gold_kernels.uld.lists import (
    COLUMN_BITS,
    FIXED_POINT,
    HIGH_KEY,
    LEVEL_BITS,
    levels_of,
    order_lists,
    sum_both,
)

_LEVEL_BITS = tl.constexpr(LEVEL_BITS)
_LEVEL_MASK = tl.constexpr((1 << LEVEL_BITS) - 1)
_KEY_SHIFT = tl.constexpr(COLUMN_BITS)


@triton.jit
def _pack_entries(
    student_row,
    teacher_row,
    origins,
    list_ptr,
    num_entries,
    pool_ptr,  # of the row
    kept_ptr,
    NUM_BINS: tl.constexpr,
):
    """Listed entries, 2 * column + side, as words of a pool; kept as they are."""
    for first in range(0, num_entries, BLOCK):
        places = first + tl.arange(0, BLOCK)
        is_entry = places < num_entries
        entries = tl.load(list_ptr + places, mask=is_entry, other=0)
        is_teacher, columns = (entries & 1) != 0, entries >> 1
        student = tl.load(student_row + columns, mask=is_entry & (is_teacher == 0), other=0.0)
        teacher = tl.load(teacher_row + columns, mask=is_entry & is_teacher, other=0.0)
        logits = tl.where(is_teacher, teacher, student).to(tl.float32)
        scale = tl.where(is_teacher, origins[1][0], origins[0][0])
        whole = tl.where(is_teacher, origins[1][1], origins[0][1])
        part = tl.where(is_teacher, origins[1][2], origins[0][2])
        origin = (scale, whole, part)
        bins = bins_of(logits, origin, NUM_BINS)
        words = (bins << _LEVEL_BITS) | levels_of(logits, bins, origin)
        tl.store(pool_ptr + places, (words << 1) | (entries & 1), mask=is_entry)
        tl.store(kept_ptr + places, entries, mask=is_entry)


@triton.jit
def collect_open_kernel(
    student_ptr,  # (C, V_r) logits
    teacher_ptr,  # (C, V_r)
    weights_ptr,  # (C, 2) float32
    words_ptr,  # (R c, words) int32, see scan_counts_kernel
    lists_ptr,  # (programs, L) int32, overwritten
    pools_ptr,  # (R, 2 c + P) int32, overwritten but for what is behind the entries
    entries_ptr,  # (R, 2 c + P) int32, the same with 2 * column + side of the entries
    ends_ptr,  # (R,) int32, 0: entries of each pool
    totals_ptr,  # (C, 3) float32, overwritten
    sums_ptr,  # (R, C, 2, S, 3) float64
    sums_stride,  # from one process to the next
    student_size,
    teacher_size,
    student_bits,
    teacher_bits,
    student_row_stride,
    teacher_row_stride,
    num_rows,
    num_own,  # c
    pool_size,  # P
    list_size,
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
    """Sum the entries whose sign is known, and list the others."""
    program = tl.program_id(0).to(tl.int64)
    list_ptr = lists_ptr + program * list_size
    row = tl.program_id(0)
    while row < num_rows:
        offset = tl.cast(row, tl.int64)
        sides, _, origins, _ = grid_of_row(
            sums_ptr, sums_stride, offset, student_size, teacher_size, student_bits, teacher_bits,
            NUM_BINS, NUM_SLICES, NUM_RANKS, RANK_BLOCK,
        )  # fmt: skip
        student_row = student_ptr + offset * student_row_stride
        teacher_row = teacher_ptr + offset * teacher_row_stride
        row_words = words_ptr + offset * TABLE_WORDS
        is_refused = tl.load(row_words + NUM_BINS + REFUSED) != 0
        is_counted = (tl.load(weights_ptr + 2 * offset) != 0.0) & (is_refused == 0)
        table = open_table(row_words, IS_SHARED)
        counter = table + (4 * NUM_BINS if IS_SHARED else NUM_BINS)
        tl.debug_barrier()  # the row before may still be read
        read_table(table, row_words, IS_SHARED, NUM_BINS, SCAN_BINS)
        nums = (tl.where(is_counted, num_student, 0), tl.where(is_counted, num_teacher, 0))
        student_sum, teacher_sum = sum_both(
            student_row, teacher_row, student_ptr, teacher_ptr, table, counter, list_ptr, nums,
            sides, origins, False, True, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
        )  # fmt: skip
        tl.debug_barrier()
        num_open = load_table(table, NUM_BINS, IS_SHARED)
        rank = offset // num_own
        base = tl.atomic_add(ends_ptr + rank, num_open, sem="relaxed")
        has_room = base + num_open <= pool_size
        num_packed = tl.where(has_room, num_open, 0)
        first_word = rank * (2 * num_own + pool_size)
        header = first_word + 2 * (offset - rank * num_own)
        tl.store(pools_ptr + header, base)
        tl.store(pools_ptr + header + 1, num_packed)
        tl.store(entries_ptr + header, base)
        tl.store(entries_ptr + header + 1, num_packed)
        first_word += 2 * num_own + base
        _pack_entries(
            student_row, teacher_row, origins, list_ptr, num_packed,
            pools_ptr + first_word, entries_ptr + first_word, NUM_BINS,
        )  # fmt: skip
        row_totals = totals_ptr + 3 * offset
        tl.store(row_totals, student_sum - teacher_sum)
        tl.store(row_totals + 1, student_sum)
        is_refused |= has_room == 0
        tl.store(row_totals + 2, is_refused.to(tl.float32))
        row += tl.num_programs(0)


@triton.jit
def _place_entries(
    pool_ptr,  # of a rank's entries of the row
    first_place,
    num_entries,
    table,
    offsets_ptr,
    keys_ptr,
    owners_ptr,
    IS_SHARED: tl.constexpr,
):
    """As lists.place_entries. The low bits of a key are the entry's place in the row's list."""
    for first in range(0, num_entries, BLOCK):
        places = first + tl.arange(0, BLOCK)
        is_entry = places < num_entries
        entries = tl.load(pool_ptr + places, mask=is_entry, other=0)
        is_teacher = (entries & 1) != 0
        levels, bins = (entries >> 1) & _LEVEL_MASK, entries >> (_LEVEL_BITS + 1)
        offsets = tl.load(offsets_ptr + bins, mask=is_entry, other=0)
        step = tl.where(is_teacher, HIGH_KEY, 1)
        words = take_from_table(table, bins, step, is_entry, IS_SHARED)
        teacher_place = (offsets & SIZE_MASK) + ((words >> SIZE_BITS) & SIZE_MASK)
        own_places = (offsets >> SIZE_BITS) + tl.where(is_teacher, teacher_place, words & SIZE_MASK)
        keys = (levels << _KEY_SHIFT) | (first_place + places)
        scatter(keys_ptr + own_places, keys, is_entry, IS_SHARED)
        scatter(owners_ptr + own_places, bins, is_entry, IS_SHARED)


@triton.jit
def order_open_kernel(
    pools_ptr,  # (R, 2 c + P) int32 of own rows
    offsets_ptr,  # (c, bins) int32
    befores_ptr,  # (c, bins) int32
    state_ptr,  # (c, 2) int32
    edges_ptr,  # (c,) float32
    keys_ptr,  # (R P,) int32, overwritten
    owners_ptr,  # (R P,) int32, overwritten
    found_ptr,  # (R P,) overwritten: signs in the order of a row's list
    signs_ptr,  # (R, P) overwritten: signs of the student's entries of the pools
    table_ptr,  # (c, words) int32, overwritten; not read if IS_SHARED
    totals_ptr,  # (C, 3) float32, to which own rows are added
    sums_ptr,  # (R, C, 2, S, 3) float64
    sums_stride,  # from one process to the next
    student_size,
    teacher_size,
    student_bits,
    teacher_bits,
    first_row,
    num_own,  # c
    pool_size,  # P
    NEEDS_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    own_row = tl.program_id(0).to(tl.int64)
    row = first_row + own_row
    _, grid, _, _ = grid_of_row(
        sums_ptr, sums_stride, row, student_size, teacher_size, student_bits, teacher_bits,
        NUM_BINS, NUM_SLICES, NUM_RANKS, RANK_BLOCK,
    )  # fmt: skip
    base = tl.load(state_ptr + 2 * own_row)
    expected = tl.load(state_ptr + 2 * own_row + 1)
    num_open = 0
    for rank in tl.static_range(NUM_RANKS):
        pool_ptr = pools_ptr + (2 * num_own + pool_size) * tl.cast(rank, tl.int64)
        num_open += tl.load(pool_ptr + 2 * own_row + 1)
    is_whole = num_open == expected  # a pool without room has flagged the chunk
    num_open = tl.where(is_whole, num_open, 0)
    table = open_table(table_ptr + own_row * TABLE_WORDS, IS_SHARED)
    clear_bins(table, IS_SHARED, NUM_BINS, SCAN_BINS)  # words count the keys that have a place
    tl.debug_barrier()
    offsets_ptr += own_row * NUM_BINS
    first_place = 0
    for rank in tl.static_range(NUM_RANKS):
        pool_ptr = pools_ptr + (2 * num_own + pool_size) * tl.cast(rank, tl.int64)
        first_entry = 2 * num_own + tl.load(pool_ptr + 2 * own_row)
        num_entries = tl.where(is_whole, tl.load(pool_ptr + 2 * own_row + 1), 0)
        _place_entries(
            pool_ptr + first_entry, first_place, num_entries, table, offsets_ptr,
            keys_ptr + base, owners_ptr + base, IS_SHARED,
        )  # fmt: skip
        first_place += num_entries
    tl.debug_barrier()
    lists = (
        offsets_ptr, befores_ptr + own_row * NUM_BINS, keys_ptr, keys_ptr + base, owners_ptr + base
    )  # fmt: skip
    loss, mean_sign = order_lists(
        table, lists, found_ptr + base, grid, 0, num_open, NEEDS_GRAD, IS_SHARED
    )
    if NEEDS_GRAD:
        tl.debug_barrier()
        first_place = 0
        for rank in tl.static_range(NUM_RANKS):
            pool_ptr = pools_ptr + (2 * num_own + pool_size) * tl.cast(rank, tl.int64)
            reply_ptr = signs_ptr + pool_size * tl.cast(rank, tl.int64)
            reply_ptr += tl.load(pool_ptr + 2 * own_row)
            num_entries = tl.where(is_whole, tl.load(pool_ptr + 2 * own_row + 1), 0)
            for first in range(0, num_entries, BLOCK):
                places = first + tl.arange(0, BLOCK)
                is_entry = places < num_entries
                signs = tl.load(found_ptr + base + first_place + places, mask=is_entry, other=0.0)
                tl.store(reply_ptr + places, signs, mask=is_entry)
            first_place += num_entries
    own_loss = tl.load(edges_ptr + own_row) + loss.to(tl.float32) / FIXED_POINT
    totals_ptr += 3 * row
    tl.store(totals_ptr, tl.load(totals_ptr) + own_loss)
    own_pull = mean_sign.to(tl.float32) / FIXED_POINT
    tl.store(totals_ptr + 1, tl.load(totals_ptr + 1) + own_pull)
