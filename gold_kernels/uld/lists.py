"""Second half of a ULD row: where counts leave the sign of D open, entries of a bin are ordered.

1. sum_signed passes over a side. It sums the entries whose sign is known from the counts (bins.py)
   and appends the others to a list, in any order.
2. place_entries turns the list into keys. The keys of a bin lie side by side, the student's before
   the teacher's.
3. order_lists compares each key with every other key of its bin and so counts the entries above it.

Entries whose values agree to 2**-13 of a bin are ties: they get the average of their signs. All
others get the sign that a sort would give. The order in a list differs from run to run; sums over
entries are in fixed point, so that their result does not.
"""

import triton
import triton.language as tl

from gold_kernels.triton.lines import NATS, block_columns
from gold_kernels.uld.bin_table import (
    LISTED,
    NO_SIGN,
    NUM_BINS,
    WAITING,
    append_listed,
    load_table,
    scatter,
    store_table,
    take_from_table,
)
from gold_kernels.uld.bins import (
    MAX_LISTED,
    SIZE_BITS,
    SIZE_MASK,
    average_sign,
    bins_of,
    counted_sign,
    load_places,
    matched_entries,
)

# The word of a listed bin counts the keys that already have a place: 1 for each of the student's,
# HIGH_KEY for each of the teacher's.
HIGH_KEY = tl.constexpr(1 << 11)
_BLOCK = tl.constexpr(512)  # one entry a thread; twice as many take 8 KiB of shared memory
# A key: the level in the bin in its high bits, the column in its low ones. It has 31 bits, so that
# the difference of two keys has a sign.
LEVEL_BITS, COLUMN_BITS = 13, 18
_LEVEL_SHIFT = tl.constexpr(COLUMN_BITS)
_NUM_LEVELS = tl.constexpr(1 << LEVEL_BITS)
_COLUMN_MASK = tl.constexpr((1 << COLUMN_BITS) - 1)
_NO_KEY = tl.constexpr((1 << 31) - 1)  # larger than every key: no entry has the last level
_UNROLL = tl.constexpr(8)
FIXED_POINT = tl.constexpr(2.0**50)  # sums are below 2**11


def list_words(list_size: int) -> int:
    """Words of a program's working memory: for each bin the offset of its keys and D above it; the
    list; keys; for each key its bin.
    """
    return 2 * NUM_BINS + 3 * (list_size + MAX_LISTED)


@triton.jit
def parts_of_lists(lists_ptr, NUM_BINS: tl.constexpr, NUM_KEYS: tl.constexpr):
    """Pointers to the parts of a program's working memory, in the order of list_words."""
    list_ptr = lists_ptr + 2 * NUM_BINS
    keys_ptr = list_ptr + NUM_KEYS
    return lists_ptr, lists_ptr + NUM_BINS, list_ptr, keys_ptr, keys_ptr + NUM_KEYS


@triton.jit
def levels_of(logits, bins, origin):
    """Level of a value in its bin, 0 at the upper edge. A fused product is not rounded, so that
    logits which differ in the last bit get different levels (the interpreter does round it).
    """
    scale, whole, part = origin
    place = tl.fma(-logits, scale, whole - bins.to(tl.float32)) + part
    levels = tl.minimum(tl.maximum(place * _NUM_LEVELS, 0.0), _NUM_LEVELS - 2.0)
    return levels.to(tl.int32)


@triton.jit
def open_window(
    table,
    offsets_ptr,
    base,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
):
    """Turn WAITING into LISTED in bins whose keys begin in [base, base + LIST_SIZE)."""
    for first in range(0, NUM_BINS, SCAN_BINS):
        bins = first + tl.arange(0, SCAN_BINS)
        words = load_table(table, bins, IS_SHARED)
        is_waiting = words == WAITING
        offsets = tl.load(offsets_ptr + bins, mask=is_waiting, other=0) >> SIZE_BITS
        is_next = is_waiting & (offsets < base + LIST_SIZE)
        store_table(table, bins, tl.where(is_next, LISTED, words), IS_SHARED)


@triton.jit
def sum_signed(
    row_ptr,
    matched_ptr,
    table,
    counter,
    list_ptr,
    vocab_size,
    side,
    origin,
    IS_TEACHER: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () sum of value * sign of its bin over the unmatched entries of a side
    """Entries of listed bins add nothing: they are appended to the list."""
    row_max, shift, bits = side
    signed = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        logits = load_places(row_ptr, columns, is_column)
        words = load_table(table, bins_of(logits, origin, NUM_BINS), IS_SHARED)
        if HAS_OVERLAP:
            is_matched = matched_entries(matched_ptr, columns, is_column, True)
            words = tl.where(is_matched, NO_SIGN, words)
        values = tl.exp2((logits - row_max) * bits + shift)
        signed += tl.sum(counted_sign(words) * values, axis=1)
        if HAS_LISTS:
            entries = (columns << 1) | (1 if IS_TEACHER else 0)
            append_listed(counter, list_ptr, words, entries, IS_SHARED)
    return tl.sum(signed, 0)


@triton.jit
def place_entries(
    student_row,
    teacher_row,
    student_origin,
    teacher_origin,
    table,
    lists,
    base,
    num_entries,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """Write the keys of a list, those of a bin side by side. base: offset of its first key."""
    offsets_ptr, _, list_ptr, keys_ptr, owners_ptr = lists
    for first in range(0, num_entries, _BLOCK):
        places = first + tl.arange(0, _BLOCK)
        is_entry = places < num_entries
        entries = tl.load(list_ptr + places, mask=is_entry, other=0)
        is_teacher, columns = (entries & 1) != 0, entries >> 1
        student = tl.load(student_row + columns, mask=is_entry & (is_teacher == 0), other=0.0)
        teacher = tl.load(teacher_row + columns, mask=is_entry & is_teacher, other=0.0)
        logits = tl.where(is_teacher, teacher, student).to(tl.float32)
        scale = tl.where(is_teacher, teacher_origin[0], student_origin[0])
        whole = tl.where(is_teacher, teacher_origin[1], student_origin[1])
        part = tl.where(is_teacher, teacher_origin[2], student_origin[2])
        origin = (scale, whole, part)
        bins = bins_of(logits, origin, NUM_BINS)
        offsets = tl.load(offsets_ptr + bins, mask=is_entry, other=0)
        step = tl.where(is_teacher, HIGH_KEY, 1)
        words = take_from_table(table, bins, step, is_entry, IS_SHARED)
        student_place = words & SIZE_MASK
        teacher_place = (offsets & SIZE_MASK) + ((words >> SIZE_BITS) & SIZE_MASK)
        own_places = (offsets >> SIZE_BITS) - base
        own_places += tl.where(is_teacher, teacher_place, student_place)
        keys = (levels_of(logits, bins, origin) << _LEVEL_SHIFT) | columns
        scatter(keys_ptr + own_places, keys, is_entry, IS_SHARED)
        scatter(owners_ptr + own_places, bins, is_entry, IS_SHARED)


@triton.jit
def _is_below(key, other):  # int32, 1 or 0
    """key < other, from the sign of key - other: one instruction less to sum than a mask."""
    return ((key - other).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _count_above(keys_ptr, starts, num_keys, first_key, next_key):
    """How many of the num_keys keys from starts on are below first_key, and below next_key."""
    above, through = tl.zeros_like(starts), tl.zeros_like(starts)
    for start in range(0, tl.max(num_keys, 0), _UNROLL):
        num_left = num_keys - start
        for step in tl.static_range(_UNROLL):
            others = keys_ptr + starts + (start + step)
            keys = tl.load(others, mask=num_left > step, other=_NO_KEY)
            above += _is_below(keys, first_key)
            through += _is_below(keys, next_key)
    return above, through


@triton.jit
def order_lists(
    table,
    lists,
    signs_ptr,
    grid,
    base,
    num_entries,
    NEEDS_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
):  # -> () part of the loss, () sum of s times its sign, over listed student entries; fixed point
    """Find the sign of every listed student entry by counting the entries above it in its bin.

    The entries of one level lead D from `above` to `through`. The loss of a bin is
    |d_before| (upper - lower) + sum over levels of (value - lower) (|through| - |above|).
    """
    offsets_ptr, befores_ptr, _, keys_ptr, owners_ptr = lists
    top, bin_bits = grid
    loss = tl.zeros([_BLOCK], dtype=tl.int64)
    mean_sign = tl.zeros([_BLOCK], dtype=tl.int64)
    for first in range(0, num_entries, _BLOCK):
        places = first + tl.arange(0, _BLOCK)
        is_entry = places < num_entries
        owners = tl.load(owners_ptr + places, mask=is_entry, other=0)
        keys = tl.load(keys_ptr + places, mask=is_entry, other=0)
        offsets = tl.load(offsets_ptr + owners, mask=is_entry, other=0)
        before = tl.load(befores_ptr + owners, mask=is_entry, other=0)
        words = load_table(table, owners, IS_SHARED)
        num_student = tl.where(is_entry, words & SIZE_MASK, 0)
        num_teacher = tl.where(is_entry, (words >> SIZE_BITS) & SIZE_MASK, 0)
        starts = (offsets >> SIZE_BITS) - base
        levels = keys >> _LEVEL_SHIFT
        first_key, next_key = levels << _LEVEL_SHIFT, (levels + 1) << _LEVEL_SHIFT
        above, through = _count_above(keys_ptr, starts, num_student, first_key, next_key)
        teacher_above, teacher_through = _count_above(
            keys_ptr, starts + num_student, num_teacher, first_key, next_key
        )
        above += before - teacher_above
        through += before - teacher_through
        sign = average_sign(above, through)
        is_teacher = places - starts >= num_student
        below = (levels.to(tl.float32) + 0.5) / _NUM_LEVELS
        lower = tl.exp2(top - (owners + 1).to(tl.float32) * bin_bits)
        nats = (1.0 - below) * bin_bits * NATS
        height = lower * nats * (1.0 + nats * (0.5 + nats / 6.0))  # value - lower
        part = tl.where(above == through, 0.0, sign * height)
        part = tl.where(is_entry, tl.where(is_teacher, -part, part), 0.0)
        loss += (part * FIXED_POINT).to(tl.int64)
        is_student = is_entry & (is_teacher == 0)
        if NEEDS_GRAD:
            signed = tl.where(is_student, sign * (lower + height), 0.0)
            mean_sign += (signed * FIXED_POINT).to(tl.int64)
            columns = keys & _COLUMN_MASK
            tl.store(signs_ptr + columns, sign.to(signs_ptr.dtype.element_ty), mask=is_student)
    return tl.sum(loss, 0), tl.sum(mean_sign, 0)


@triton.jit
def sum_both(
    student_row,
    teacher_row,
    student_matched_ptr,
    teacher_matched_ptr,
    table,
    counter,
    list_ptr,
    vocab_sizes,  # of student and teacher, like sides and origins
    sides,
    origins,
    HAS_OVERLAP: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> see sum_signed, of either side
    student_sum = sum_signed(
        student_row, student_matched_ptr, table, counter, list_ptr, vocab_sizes[0], sides[0],
        origins[0], False, HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
    )  # fmt: skip
    teacher_sum = sum_signed(
        teacher_row, teacher_matched_ptr, table, counter, list_ptr, vocab_sizes[1], sides[1],
        origins[1], True, HAS_OVERLAP, HAS_LISTS, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
    )  # fmt: skip
    return student_sum, teacher_sum


@triton.jit
def order_row(
    student_row,
    teacher_row,
    student_matched_ptr,
    teacher_matched_ptr,
    table,
    counter,
    lists,
    signs_ptr,
    vocab_sizes,  # of student and teacher, like sides and origins
    sides,
    origins,
    grid,
    num_listed,
    NEEDS_GRAD: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () part of the loss, () sum of s times its sign, over listed student entries
    """Order all listed entries, LIST_SIZE at a time. The first ones are in the list already."""
    offsets_ptr, list_ptr = lists[0], lists[2]
    loss, mean_sign, base = tl.cast(0, tl.int64), tl.cast(0, tl.int64), 0
    while base < num_listed:
        if base > 0:
            open_window(table, offsets_ptr, base, IS_SHARED, NUM_BINS, SCAN_BINS, LIST_SIZE)
            store_table(table, NUM_BINS, 0, IS_SHARED)
            tl.debug_barrier()
            sum_both(  # for the list alone
                student_row, teacher_row, student_matched_ptr, teacher_matched_ptr, table, counter,
                list_ptr, vocab_sizes, sides, origins, HAS_OVERLAP, True, IS_SHARED, NUM_BINS,
                BLOCK_V, LINE,
            )  # fmt: skip
        tl.debug_barrier()
        num_entries = load_table(table, NUM_BINS, IS_SHARED)
        place_entries(
            student_row, teacher_row, origins[0], origins[1], table, lists, base, num_entries,
            IS_SHARED, NUM_BINS,
        )  # fmt: skip
        tl.debug_barrier()
        part, signed = order_lists(
            table, lists, signs_ptr, grid, base, num_entries, NEEDS_GRAD, IS_SHARED
        )
        loss += part
        mean_sign += signed
        base += tl.maximum(num_entries, 1)
        tl.debug_barrier()
    return loss.to(tl.float32) / FIXED_POINT, mean_sign.to(tl.float32) / FIXED_POINT
