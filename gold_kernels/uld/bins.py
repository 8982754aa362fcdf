"""First half of a ULD row: counts on a grid say how many values of each side lie above a point.

A row has V_s student values s and V_t teacher values t: probabilities, times the scale of their
row. The loss and its gradient follow from

    D(x) = #{s_i > x} - #{t_j > x}

The kernel counts how many values fall into each bin of a logarithmic grid. Bin b begins at
2**(top - b / per_bit) and ends where bin b + 1 begins. The last bin holds all smaller values and
needs no count: below every value D is V_s - V_t.

The table has a 32-bit word for each bin. The low half counts student values, the high half teacher
values. A half overflows at 65536 values, which only an all but constant row has in one bin. Such a
row is counted again, with the difference of the two counts in a word, and none of its bins is
listed.

A scan of the table gives D at the edges of every bin. Where D cannot change its sign inside a bin,
that sign is the gradient of every student value in it. Where it can, the values of the bin are
listed and ordered (lists.py).
"""

import triton
import triton.language as tl

from gold_kernels.triton.lines import NATS, block_columns
from gold_kernels.uld.bin_table import (
    LISTED,
    NO_SIGN,
    WAITING,
    add_to_table,
    load_table,
    scatter,
    store_table,
    take_from_table,
)

# Entries below 2**-12 / V share a bin: together below 1/4096 of a side. Peaked rows, as trained
# models have, keep most entries there: a bound of 2**-6 / V cost up to 2e-2 of their loss.
_TAIL_BITS = tl.constexpr(12.0)
# Share of the range below the lowest entry: it falls two or three bins above the last one, where it
# is counted.
_LOWEST_MARGIN = tl.constexpr(1 / 4096)
_MIN_RANGE_BITS = tl.constexpr(1.0)
# Bits that the grid goes down for the side with the lower scale. Further below, its values share
# the last bin.
_MAX_SCALE_GAP = tl.constexpr(24.0)
_HIGH_STEP = tl.constexpr(1 << 16)  # one entry in the high half of a word
_HALF_BITS = tl.constexpr(16)
_HALF_MASK = tl.constexpr((1 << 16) - 1)
_WHOLE = tl.constexpr(1.5 * 2**23)
_WHOLE_BITS = tl.constexpr(0x4B400000)  # of _WHOLE
_WHOLE_MASK = tl.constexpr((1 << 22) - 1)
_SOME_BINS = tl.constexpr((1 << 13) - 1)
# Entries of the largest bin that is listed: each of them is compared with every other.
MAX_LISTED = 1024
# Entries listed at a time, the last bin of a list may go beyond. Shorter lists take less memory and
# a pass over the row each. Random rows of 151936 twice have up to 14,000 entries to list.
LIST_SIZES = (1 << 15, 1 << 14, 1 << 13, 1 << 12)
SIZE_BITS = tl.constexpr(11)  # low bits of an offset: number of student entries in the bin
SIZE_MASK = tl.constexpr((1 << 11) - 1)
# Which bins are listed. A bin of n entries leads D from d0 to d1. D can reach 0 inside only if
# min(|d0|, |d1|) < n. A random walk of n steps from d0 to d1 does so with probability
# exp(-2 d0 d1 / n): bins with d0 d1 above CROSSING * n are taken to keep their sign.
CROSSING = tl.constexpr(2.0)


@triton.jit
def range_of(
    student_side,
    teacher_side,
    student_lowest,
    teacher_lowest,
    log2_scales,
    vocab_size,
    HAS_SCALES: tl.constexpr,
):  # -> () log2 of the largest value of both sides, () bits from there to the last bin
    student_max, student_shift, student_bits = student_side
    teacher_max, teacher_shift, teacher_bits = teacher_side
    top = tl.maximum(student_shift, teacher_shift)
    bottom = tl.maximum(log2_scales[0], log2_scales[1])
    bottom = bottom - tl.log2(vocab_size.to(tl.float32)) - _TAIL_BITS
    if HAS_SCALES:
        bottom -= tl.minimum(tl.abs(log2_scales[0] - log2_scales[1]), _MAX_SCALE_GAP)
    # the grid ends at the lowest entry of both sides: finer bins leave fewer entries to order
    student_lowest = (student_lowest - student_max) * student_bits + student_shift
    teacher_lowest = (teacher_lowest - teacher_max) * teacher_bits + teacher_shift
    lowest = tl.minimum(student_lowest, teacher_lowest)
    lowest -= (top - lowest) * _LOWEST_MARGIN
    bottom = tl.maximum(bottom, lowest)
    return top, tl.maximum(top - bottom, _MIN_RANGE_BITS)


@triton.jit
def origin_of(row_max, bits, per_bit, base, gap):
    """(scale, whole, part): logits of a side -> places on the grid, in bins. A logit of 1 is scale
    bins long, a logit of 0 lies at whole + part, the largest logit of the side at base + gap.

    Float64, because float32 cannot: a rounded product plus its rounding error is right only as
    long as no compiler fuses the product into a later sum.
    """
    scale = bits * per_bit
    place = row_max.to(tl.float64) * scale + (base.to(tl.float64) + gap)
    whole = tl.floor(place).to(tl.float32)  # rounded from 2**24 on
    return scale, whole, (place - whole.to(tl.float64)).to(tl.float32)


@triton.jit
def load_places(row_ptr, columns, is_column):
    """Float32 logits, -inf for columns beyond the vocabulary: it falls into the last bin, and its
    value is 0.
    """
    return tl.load(row_ptr + columns, mask=is_column, other=float("-inf")).to(tl.float32)


@triton.jit
def _whole_bits(offsets):
    """Offsets rounded to whole numbers, as int32. A float32 of 2**23 and more has no fraction: its
    low bits are the number. A conversion would take four times as long.
    """
    return (offsets + _WHOLE).to(tl.int32, bitcast=True)


@triton.jit
def _offsets_of(logits, origin):
    """Place of each value in bins, minus 1/2, so that rounding gives its bin; 0 or more. The part
    is added last: added to a large whole number, it would be rounded away.
    """
    scale, whole, part = origin
    return tl.maximum(tl.fma(-logits, scale, whole) + (part - 0.5), 0.0)


@triton.jit
def bins_of(logits, origin, NUM_BINS: tl.constexpr):
    """Bin of each value, 0 at the top. A NaN gets a bin inside the table too."""
    offsets = tl.minimum(_offsets_of(logits, origin), NUM_BINS - 1.0)
    return _whole_bits(offsets) - _WHOLE_BITS


@triton.jit
def matched_entries(matched_ptr, columns, is_column, HAS_OVERLAP: tl.constexpr):
    """Which entries are matched: those are neither counted nor listed."""
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
    store_table(table, NUM_BINS, 0, IS_SHARED)  # the counter


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
    """Add step to the bin of every unmatched entry of one side, except in the last bin, where
    columns beyond the vocabulary fall too. All others add 0, spread over many bins: additions to
    one and the same bin would run one after the other.
    """
    sums = tl.zeros([BLOCK_V // LINE], dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        offsets = _offsets_of(load_places(row_ptr, columns, is_column), origin)
        is_counted = offsets <= NUM_BINS - 1.5  # which bins_of rounds to an even number, down
        if HAS_OVERLAP:
            is_counted &= ~matched_entries(matched_ptr, columns, is_column, True)
        bins = _whole_bits(offsets) & tl.where(is_counted, _WHOLE_MASK, _SOME_BINS)
        values = tl.where(is_counted, step, 0)
        add_to_table(table, bins, values, IS_SHARED)
        sums += tl.sum(values, axis=1)
    return tl.sum(sums // step, 0)


@triton.jit
def average_sign(before, after):
    """Average sign of D on its way from before to after, taken as a straight line."""
    is_same = ((before >= 0) & (after >= 0)) | ((before <= 0) & (after <= 0))
    middle = before + after
    same = tl.where(middle > 0, 1.0, tl.where(middle < 0, -1.0, 0.0))
    step = tl.where(is_same, 1, after - before).to(tl.float32)
    mixed = (tl.abs(after) - tl.abs(before)).to(tl.float32) / step
    return tl.where(is_same, same, mixed)


@triton.jit
def counted_sign(words):
    """The sign of a bin; 0 where its entries are listed: order_lists adds their loss."""
    return words.to(tl.float32, bitcast=True)


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
    LIST_SIZE: tl.constexpr,
):  # -> () part of the loss that hangs on bins alone, () D above the last bin
    """Replace the counts of every bin by its sign or, if its entries are to be ordered, by LISTED:
    by WAITING where they are not among the first LIST_SIZE. The counter has how many there are.

    A sign of exactly -1, 0 or 1 means that D keeps its sign in the bin. A sign in between is the
    average over a bin in which D changes its sign. last is D below every value. has_halves: words
    count the two sides apart; otherwise they hold the difference.
    """
    top, bin_bits = grid
    # of a bin, relative to its upper edge: 1 - 2**-bin_bits as a series, since the difference has
    # lost 4e-4 of it, and the heights of all bins together 4e-4 of the loss
    nats = bin_bits * NATS
    width = nats * (1.0 - nats * (1 / 2 - nats * (1 / 6 - nats * (1 / 24 - nats / 120))))
    carry = 0
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
        signs = average_sign(before, after)
        d_before, d_after = before.to(tl.float32), after.to(tl.float32)
        upper = tl.exp2(top - bins.to(tl.float32) * bin_bits)
        height = upper * tl.where(is_tail, 1.0, width)
        lower = tl.where(is_tail, 0.0, upper - height)
        # the other part, sign times value, is added by sum_signed, which has the values
        edge = tl.abs(d_before) * height + (tl.abs(before) - tl.abs(after)).to(tl.float32) * lower
        new_words = signs.to(tl.int32, bitcast=True)
        if HAS_LISTS:
            count = totals.to(tl.float32)
            is_listed = (totals >= 2) & (totals <= MAX_LISTED) & (bins < NUM_BINS - 1)
            is_listed &= d_before * d_after <= count * CROSSING
            is_listed &= tl.minimum(tl.abs(before), tl.abs(after)) < totals
            # hardly any bin is listed: places in the order in which they come, not a second cumsum
            counter = tl.zeros_like(bins) + NUM_BINS
            offsets = take_from_table(table, counter, totals, is_listed, IS_SHARED)
            packed = (offsets << SIZE_BITS) | tl.minimum(num_student, SIZE_MASK)
            scatter(offsets_ptr + bins, packed, is_listed, IS_SHARED)
            scatter(befores_ptr + bins, before, is_listed, IS_SHARED)
            edge = tl.where(is_listed, tl.abs(d_before) * height, edge)
            new_words = tl.where(signs == 0.0, NO_SIGN, new_words)
            listed_words = tl.where(offsets < LIST_SIZE, LISTED, WAITING)
            new_words = tl.where(is_listed, listed_words, new_words)
        edges += edge
        store_table(table, bins, new_words, IS_SHARED)
    return tl.sum(edges, 0), carry


@triton.jit
def count_row(
    student_row,
    teacher_row,
    student_matched_ptr,
    teacher_matched_ptr,
    table,
    offsets_ptr,
    befores_ptr,
    vocab_sizes,  # of student and teacher, like origins
    origins,
    grid,
    HAS_OVERLAP: tl.constexpr,
    HAS_LISTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SCAN_BINS: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    LIST_SIZE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () part of the loss that hangs on bins alone, () entries to list
    """Count both sides of a row and scan the counts; once more if a half of a word overflowed."""
    has_halves, is_counted, edges, num_listed = HAS_LISTS, False, 0.0, 0
    while not is_counted:
        tl.debug_barrier()  # signs of the row before may still be read
        clear_bins(table, IS_SHARED, NUM_BINS, SCAN_BINS)
        tl.debug_barrier()
        step = tl.where(has_halves, _HIGH_STEP, -1)
        counted = count_side(
            student_row, student_matched_ptr, table, vocab_sizes[0], origins[0], 1,
            HAS_OVERLAP, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
        )  # fmt: skip
        counted -= count_side(
            teacher_row, teacher_matched_ptr, table, vocab_sizes[1], origins[1], step,
            HAS_OVERLAP, IS_SHARED, NUM_BINS, BLOCK_V, LINE,
        )  # fmt: skip
        tl.debug_barrier()
        edges, found = scan_bins(
            table, offsets_ptr, befores_ptr, grid, vocab_sizes[0] - vocab_sizes[1], has_halves,
            HAS_LISTS, IS_SHARED, NUM_BINS, SCAN_BINS, MAX_LISTED, LIST_SIZE,
        )  # fmt: skip
        # an overflow shows: what the scan found is not what was counted
        is_counted, has_halves = found == counted, False
    if HAS_LISTS:
        tl.debug_barrier()
        num_listed = load_table(table, NUM_BINS, IS_SHARED)
        tl.debug_barrier()
        store_table(table, NUM_BINS, 0, IS_SHARED)  # from here on the length of the list
    tl.debug_barrier()
    return edges, num_listed
