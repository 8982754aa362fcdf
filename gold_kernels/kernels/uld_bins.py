"""D(x) = #{s_i > x} - #{t_j > x} of a row, from counts on a grid and, where needed, in order.

s and t are the values of student and teacher, V_s and V_t of them. The grid is uniform in log2: bin
b holds values from 2**(top - b / per_bit) down, the last one all that are smaller. That one is not
counted: the other bins leave its D. A word of the table has the student's entries of a bin in its
low half and the teacher's in its high half. A row with 65536 entries of a side in one bin, all but
constant, is counted again as their difference alone, and not listed.

The scan of the counts gives D at the edges of every bin. Where D cannot change its sign inside,
that sign is the gradient of every student entry there. Where it can, the entries of the bin are
listed in global memory and each counts those above it: exact up to values that agree to 2**-13 of a
bin, which are ties and get the average of their signs.
"""

import triton
import triton.language as tl

from gold_kernels.kernels.bin_table import (
    NUM_BINS,
    add_to_table,
    load_table,
    scatter,
    store_table,
    take_from_table,
)
from gold_kernels.kernels.lines import block_columns, load_logits

HIGH_STEP = tl.constexpr(1 << 16)  # one entry in the high half of a word
_HALF_BITS = tl.constexpr(16)
_HALF_MASK = tl.constexpr((1 << 16) - 1)
# A listed bin's word is LISTED plus the entries listed so far; as a float it is 2 and a little, and
# no sign. More than MAX_LISTED entries are not listed: every one of them meets every other.
LISTED = tl.constexpr(0x40000000)
MAX_LISTED = 1024
LIST_SIZE = 1 << 15  # entries listed at a time, but for what a last bin holds
_ORDER_BLOCK = tl.constexpr(512)  # an entry a thread: twice that asks for 8 KiB of shared memory
# A key is, from the top, the level in the bin less half the levels, the column and the side.
LEVEL_BITS, COLUMN_BITS = 13, 18
_LEVEL_SHIFT = tl.constexpr(COLUMN_BITS + 1)
_NUM_LEVELS = tl.constexpr(1 << LEVEL_BITS)
_HALF_LEVELS = tl.constexpr(1 << (LEVEL_BITS - 1))
_COLUMN_MASK = tl.constexpr((1 << COLUMN_BITS) - 1)
_NO_KEY = tl.constexpr((1 << 31) - 1)  # below every other: the last level is left to it
_UNROLL = tl.constexpr(8)
# D may leave the sign of its ends d0, d1 in a bin of n entries if min(|d0|, |d1|) < n and it is
# likely enough: a walk of n steps from d0 to d1 reaches 0 with probability exp(-2 d0 d1 / n).
CROSSING = tl.constexpr(2.5)

# The working memory of a program, in words: offsets of the lists of bins, D above bins, keys of
# listed entries and their bins.
LIST_WORDS = 2 * NUM_BINS + 2 * (LIST_SIZE + MAX_LISTED)


@triton.jit
def origin_of(row_max, bits, per_bit, base, gap):
    """Bins that a logit of 1 is worth, and the place in bins of a logit of 0, as a whole number and
    a part. The largest logit of the side is at base + gap.
    """
    scale = bits * per_bit
    product = row_max * scale
    whole, base_whole, gap_whole = tl.floor(product), tl.floor(base), tl.floor(gap)
    part = (product - whole) + tl.fma(row_max, scale, -product)
    part += (base - base_whole) + (gap - gap_whole)
    return scale, whole + base_whole + gap_whole, part


@triton.jit
def bins_of(logits, origin, NUM_BINS: tl.constexpr):
    """Bin of each value, 0 at the top; NaN of a poisoned row stays inside the table."""
    scale, whole, part = origin
    offsets = tl.minimum((whole + part) - logits * scale, NUM_BINS - 1.0)
    return tl.minimum(tl.maximum(offsets.to(tl.int32), 0), NUM_BINS - 1)


@triton.jit
def _levels_of(logits, bins, origin):
    """Place of a value in its bin, least at the upper edge. The product is not rounded, so that
    values differ where their logits differ in the last bit.
    """
    scale, whole, part = origin
    place = tl.fma(-logits, scale, whole - bins.to(tl.float32)) + part
    levels = tl.minimum(tl.maximum(place * _NUM_LEVELS, 0.0), _NUM_LEVELS - 2.0)
    return levels.to(tl.int32) - _HALF_LEVELS


@triton.jit
def matched_entries(matched_ptr, columns, is_column, HAS_OVERLAP: tl.constexpr):
    """Which entries are matched, so neither counted nor listed."""
    if HAS_OVERLAP:
        is_matched = tl.load(matched_ptr + columns, mask=is_column, other=0) != 0
    else:
        is_matched = columns < 0
    return is_matched


@triton.jit
def clear_bins(table, IS_SHARED: tl.constexpr, NUM_BINS: tl.constexpr, SCAN_BINS: tl.constexpr):
    for first in range(0, NUM_BINS, SCAN_BINS):
        bins = first + tl.arange(0, SCAN_BINS)
        store_table(table, bins, tl.zeros([SCAN_BINS], dtype=tl.int32), IS_SHARED)


@triton.jit
def count_side(
    row_ptr,
    matched_ptr,
    table,
    vocab_size,
    origin,
    step,
    HAS_OVERLAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () entries counted
    """Add step to the bin of every unmatched entry of one side that is above the last bin."""
    num_counted = tl.zeros([BLOCK_V // LINE], dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_counted = columns < vocab_size
        logits = load_logits(row_ptr, columns, is_counted)
        if HAS_OVERLAP:
            is_counted &= ~matched_entries(matched_ptr, columns, is_counted, True)
        bins = bins_of(logits, origin, NUM_BINS)
        is_counted &= bins < NUM_BINS - 1
        add_to_table(table, bins, step, is_counted, IS_SHARED)
        num_counted += tl.sum(is_counted.to(tl.int32), axis=1)
    return tl.sum(num_counted, 0)


@triton.jit
def _average_sign(before, after):
    """Sign of D over steps that lead it from before to after, taken as linear."""
    is_same = ((before >= 0) & (after >= 0)) | ((before <= 0) & (after <= 0))
    middle = before + after
    same = tl.where(middle > 0, 1.0, tl.where(middle < 0, -1.0, 0.0))
    step = tl.where(is_same, 1, after - before).to(tl.float32)
    mixed = (tl.abs(after) - tl.abs(before)).to(tl.float32) / step
    return tl.where(is_same, same, mixed)


@triton.jit
def scan_bins(
    table,
    offsets_ptr,
    befores_ptr,
    grid,
    last,
    has_halves,
    HAS_LISTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):  # -> () part of the loss that hangs on bins alone, () entries to list, () D above the last bin
    """Counts -> signs, in place, or LISTED. A sign of exactly -1, 0 or 1: D keeps its sign in the
    bin; between: the average over a bin in which it does not. last: D below everything.
    has_halves: words count both sides apart, not their difference.
    """
    top, per_bit = grid
    width = 1.0 - tl.exp2(-1.0 / per_bit)  # of a bin, relative to its upper edge
    carry, num_listed = 0, 0
    edges = tl.zeros([SCAN_BINS], dtype=tl.float32)
    for first in range(0, NUM_BINS, SCAN_BINS):
        bins = first + tl.arange(0, SCAN_BINS)
        words = load_table(table, bins, IS_SHARED)
        is_tail = bins == NUM_BINS - 1
        net, totals = words, tl.zeros_like(words)
        if HAS_LISTS:
            num_student, num_teacher = words & _HALF_MASK, (words >> _HALF_BITS) & _HALF_MASK
            net = tl.where(has_halves, num_student - num_teacher, words)
            totals = tl.where(has_halves, num_student + num_teacher, 0)
        after = carry + tl.cumsum(net, 0)
        before = after - net
        carry += tl.sum(net, 0)
        after = tl.where(is_tail, last, after)
        signs = _average_sign(before, after)
        d_before, d_after = before.to(tl.float32), after.to(tl.float32)
        upper = tl.exp2(top - bins.to(tl.float32) / per_bit)
        height = upper * tl.where(is_tail, 1.0, width)
        lower = tl.where(is_tail, 0.0, upper - height)
        # the rest, signs times the values of the bin, is added where the values are
        edge = tl.abs(d_before) * height + (tl.abs(before) - tl.abs(after)).to(tl.float32) * lower
        new_words = signs.to(tl.int32, bitcast=True)
        if HAS_LISTS:
            count = totals.to(tl.float32)
            is_listed = (totals >= 2) & (totals <= MAX_LISTED) & (bins < NUM_BINS - 1)
            is_listed &= d_before * d_after <= count * CROSSING
            is_listed &= tl.minimum(tl.abs(before), tl.abs(after)) < totals
            sizes = tl.where(is_listed, totals, 0)
            tl.store(offsets_ptr + bins, num_listed + tl.cumsum(sizes, 0) - sizes)
            tl.store(befores_ptr + bins, before)
            num_listed += tl.sum(sizes, 0)
            edge = tl.where(is_listed, tl.abs(d_before) * height, edge)
            new_words = tl.where(is_listed, LISTED, new_words)
        edges += edge
        store_table(table, bins, new_words, IS_SHARED)
    return tl.sum(edges, 0), num_listed, carry


@triton.jit
def list_side(
    row_ptr,
    matched_ptr,
    table,
    lists,
    vocab_size,
    origin,
    first_listed,
    is_teacher,
    HAS_OVERLAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Keys of one side's entries of the bins whose lists begin in [first_listed, + LIST_SIZE)."""
    offsets_ptr, keys_ptr, owners_ptr = lists[0], lists[2], lists[3]
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        logits = load_logits(row_ptr, columns, is_column)
        if HAS_OVERLAP:
            is_column &= ~matched_entries(matched_ptr, columns, is_column, True)
        bins = bins_of(logits, origin, NUM_BINS)
        is_listed = is_column & (load_table(table, bins, IS_SHARED) >= LISTED)
        places = tl.load(offsets_ptr + bins, mask=is_listed, other=-1) - first_listed
        is_listed &= (places >= 0) & (places < LIST_SIZE)
        words = take_from_table(table, bins, is_listed, IS_SHARED)
        places += words - LISTED
        is_listed &= places < LIST_SIZE + MAX_LISTED
        levels = _levels_of(logits, bins, origin)
        keys = (levels << _LEVEL_SHIFT) | (columns << 1) | is_teacher
        scatter(keys_ptr + places, keys, is_listed, IS_SHARED)
        scatter(owners_ptr + places, bins, is_listed, IS_SHARED)


@triton.jit
def clear_lists(owners_ptr, LIST_SIZE: tl.constexpr, MAX_LISTED: tl.constexpr):
    for first in range(0, LIST_SIZE + MAX_LISTED, MAX_LISTED):
        places = first + tl.arange(0, MAX_LISTED)
        tl.store(owners_ptr + places, tl.zeros([MAX_LISTED], dtype=tl.int32) - 1)


@triton.jit
def order_lists(
    table,
    lists,
    signs_ptr,
    grid,
    first_listed,
    NEEDS_GRAD: tl.constexpr,
    IS_SHARED: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):  # -> () part of the loss
    """Sign of every listed student entry, by counting what is above it in its bin.

    With D from `above` to `through` over the entries of one level: the loss of a bin is
    |d_before| (upper - lower) + sum over levels of (value - lower) (|through| - |above|).
    """
    offsets_ptr, befores_ptr, keys_ptr, owners_ptr = lists
    top, per_bit = grid
    loss = tl.zeros([_ORDER_BLOCK], dtype=tl.float32)
    for first in range(0, LIST_SIZE + MAX_LISTED, _ORDER_BLOCK):
        places = first + tl.arange(0, _ORDER_BLOCK)
        owners = tl.load(owners_ptr + places)
        is_entry = owners >= 0
        num_entries = tl.where(
            is_entry, load_table(table, tl.maximum(owners, 0), IS_SHARED) - LISTED, 0
        )
        most = tl.max(num_entries, 0)
        if most > 0:
            keys = tl.load(keys_ptr + places, mask=is_entry, other=0)
            starts = tl.load(offsets_ptr + owners, mask=is_entry, other=0) - first_listed
            before = tl.load(befores_ptr + owners, mask=is_entry, other=0)
            levels = keys >> _LEVEL_SHIFT
            first_key, next_key = levels << _LEVEL_SHIFT, (levels + 1) << _LEVEL_SHIFT
            above, through = before, before
            for start in range(0, most, _UNROLL):
                for step in tl.static_range(_UNROLL):
                    is_other = start + step < num_entries
                    others = keys_ptr + starts + (start + step)
                    other_keys = tl.load(others, mask=is_other, other=_NO_KEY)
                    net = 1 - 2 * (other_keys & 1)
                    above += tl.where(other_keys < first_key, net, 0)
                    through += tl.where(other_keys < next_key, net, 0)
            sign = _average_sign(above, through)
            is_teacher = (keys & 1) != 0
            below = (levels.to(tl.float32) + (_HALF_LEVELS + 0.5)) / _NUM_LEVELS
            lower = tl.exp2(top - (owners + 1).to(tl.float32) / per_bit)
            nats = (1.0 - below) / per_bit * 0.6931471805599453
            height = lower * nats * (1.0 + nats * (0.5 + nats / 6.0))  # value - lower
            part = tl.where(above == through, 0.0, sign * height)
            loss += tl.where(is_entry, tl.where(is_teacher, -part, part), 0.0)
            if NEEDS_GRAD:
                columns = (keys >> 1) & _COLUMN_MASK
                sign = sign.to(signs_ptr.dtype.element_ty)
                tl.store(signs_ptr + columns, sign, mask=is_entry & (is_teacher == 0))
    return tl.sum(loss, 0)
