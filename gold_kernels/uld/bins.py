"""D(x) = #{s_i > x} - #{t_j > x} of a row, from counts on a grid.

s and t are the values of student and teacher, V_s and V_t of them. The grid is uniform in log2: bin
b holds values from 2**(top - b / per_bit) down, the last one all that are smaller. That one is not
counted: the other bins leave its D. A word of the table has the student's entries of a bin in its
low half and the teacher's in its high half. A row with 65536 entries of a side in one bin, all but
constant, is counted again as their difference alone, and not listed.

The scan of the counts gives D at the edges of every bin. Where D cannot change its sign inside,
that sign is the gradient of every student entry there. Where it can, the entries of the bin are
listed and ordered (uld_lists.py).
"""

import triton
import triton.language as tl

from gold_kernels.triton.lines import block_columns, load_logits
from gold_kernels.uld.bin_table import (
    LISTED,
    WAITING,
    add_to_table,
    load_table,
    store_table,
)

# Entries below 2**-12 / V share a bin: together below 1/4096 of a side. Peaked rows, as trained
# models have, keep most entries there: a bound of 2**-6 / V cost up to 2e-2 of their loss.
_TAIL_BITS = tl.constexpr(12.0)
_LOWEST_MARGIN = tl.constexpr(1 / 4096)  # two or three bins above the last: the lowest entry counts
_MIN_RANGE_BITS = tl.constexpr(1.0)
_MAX_SCALE_GAP = tl.constexpr(24.0)  # bits; a side further below the other falls into the last bin
_HIGH_STEP = tl.constexpr(1 << 16)  # one entry in the high half of a word
_HALF_BITS = tl.constexpr(16)
_HALF_MASK = tl.constexpr((1 << 16) - 1)
_WHOLE = tl.constexpr(1.5 * 2**23)
_WHOLE_MASK = tl.constexpr((1 << 22) - 1)
_SOME_BINS = tl.constexpr((1 << 13) - 1)
# Every entry of a listed bin meets every other.
MAX_LISTED = 1024
LIST_SIZE = 1 << 15  # entries listed at a time, but for what a last bin holds
SIZE_BITS = tl.constexpr(11)  # of an offset: entries of the student in the bin
SIZE_MASK = tl.constexpr((1 << 11) - 1)
# D may leave the sign of its ends d0, d1 in a bin of n entries if min(|d0|, |d1|) < n and it is
# likely enough: a walk of n steps from d0 to d1 reaches 0 with probability exp(-2 d0 d1 / n).
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
    # nothing is below the lowest entry of both sides: finer bins, fewer entries to order
    student_lowest = (student_lowest - student_max) * student_bits + student_shift
    teacher_lowest = (teacher_lowest - teacher_max) * teacher_bits + teacher_shift
    lowest = tl.minimum(student_lowest, teacher_lowest)
    lowest -= (top - lowest) * _LOWEST_MARGIN
    bottom = tl.maximum(bottom, lowest)
    return top, tl.maximum(top - bottom, _MIN_RANGE_BITS)


@triton.jit
def origin_of(row_max, bits, per_bit, base, gap):
    """Bins that a logit of 1 is worth, and the place in bins of a logit of 0, as a whole number and
    a part. The largest logit of the side is at base + gap. In float64: a rounded product and what
    it lost, in float32, are right only if no compiler fuses the product into a later sum.
    """
    scale = bits * per_bit
    place = row_max.to(tl.float64) * scale + (base.to(tl.float64) + gap)
    whole = tl.floor(place).to(tl.float32)  # rounded from 2**24 on
    return scale, whole, (place - whole.to(tl.float64)).to(tl.float32)


@triton.jit
def _whole_bits(offsets):
    """Offsets rounded to whole numbers, as int32: a float32 of 2**23 and more has no fraction, its
    low bits are the number. A conversion takes four times as long.
    """
    return (offsets + _WHOLE).to(tl.int32, bitcast=True)


@triton.jit
def _offsets_of(logits, origin):
    """Place of each value in bins, less 1/2, 0 at the top. Beside the logits' distance from 0 the
    part would be rounded.
    """
    scale, whole, part = origin
    return tl.maximum(tl.fma(-logits, scale, whole) + (part - 0.5), 0.0)


@triton.jit
def bins_of(logits, origin, NUM_BINS: tl.constexpr):
    """Bin of each value, 0 at the top; NaN of a poisoned row stays inside the table."""
    offsets = tl.minimum(_offsets_of(logits, origin), NUM_BINS - 1.0)
    return _whole_bits(offsets) & _WHOLE_MASK


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
    """Add step to the bin of every unmatched entry of one side that is above the last bin, where
    columns beyond the vocabulary are too. The others add 0 to some bin: not to one and the same,
    which would take them one by one.
    """
    sums = tl.zeros([BLOCK_V // LINE], dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_column = columns < vocab_size
        offsets = _offsets_of(load_logits(row_ptr, columns, is_column), origin)
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
    """Sign of D over steps that lead it from before to after, taken as linear."""
    is_same = ((before >= 0) & (after >= 0)) | ((before <= 0) & (after <= 0))
    middle = before + after
    same = tl.where(middle > 0, 1.0, tl.where(middle < 0, -1.0, 0.0))
    step = tl.where(is_same, 1, after - before).to(tl.float32)
    mixed = (tl.abs(after) - tl.abs(before)).to(tl.float32) / step
    return tl.where(is_same, same, mixed)


@triton.jit
def counted_sign(words):
    """The sign of a bin; 0 where its entries are listed, whose loss order_lists counts."""
    return tl.where(words >= LISTED, 0.0, words.to(tl.float32, bitcast=True))


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
    """Counts -> signs, in place, or WAITING. A sign of exactly -1, 0 or 1: D keeps its sign in the
    bin; between: the average over a bin in which it does not. last: D below everything.
    has_halves: words count both sides apart, not their difference.
    """
    top, bin_bits = grid
    width = 1.0 - tl.exp2(-bin_bits)  # of a bin, relative to its upper edge
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
        signs = average_sign(before, after)
        d_before, d_after = before.to(tl.float32), after.to(tl.float32)
        upper = tl.exp2(top - bins.to(tl.float32) * bin_bits)
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
            offsets = num_listed + tl.cumsum(sizes, 0) - sizes
            tl.store(
                offsets_ptr + bins, (offsets << SIZE_BITS) | tl.minimum(num_student, SIZE_MASK)
            )
            tl.store(befores_ptr + bins, before)
            num_listed += tl.sum(sizes, 0)
            edge = tl.where(is_listed, tl.abs(d_before) * height, edge)
            new_words = tl.where(is_listed, WAITING, new_words)
        edges += edge
        store_table(table, bins, new_words, IS_SHARED)
    return tl.sum(edges, 0), num_listed, carry


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
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () part of the loss that hangs on bins alone, () entries to list
    """The passes over both sides that count, and the scan of what they counted."""
    has_halves, is_counted, edges, num_listed = HAS_LISTS, False, 0.0, 0
    while not is_counted:
        tl.debug_barrier()  # signs may still be read
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
        edges, num_listed, found = scan_bins(
            table, offsets_ptr, befores_ptr, grid, vocab_sizes[0] - vocab_sizes[1], has_halves,
            HAS_LISTS, IS_SHARED, NUM_BINS, SCAN_BINS, MAX_LISTED,
        )  # fmt: skip
        # a half that ran over changes the difference of all halves
        is_counted, has_halves = found == counted, False
    return edges, num_listed
