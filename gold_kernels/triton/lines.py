"""What the row kernels share: loads of logits, the log-sum-exp of a row, one entry of a row.

A program walks one row in blocks of shape (BLOCK_V / LINE, LINE). A line is what one thread loads
at once. Each thread sums its own line and carries one number for it; threads meet once, at the end
of a pass. Logarithms are in bits: exp2 is one instruction, exp is four.
"""

import triton
import triton.language as tl

LOWEST_LOGIT = tl.constexpr(-1e30)  # stands for a column masked with -inf: probability 0, no NaN
BITS = tl.constexpr(1.4426950408889634)  # per nat
NATS = tl.constexpr(0.6931471805599453)  # per bit
LOG2_ZERO = tl.constexpr(-1e6 * 1.4426950408889634)  # bits: of a masked token, without a slope


@triton.jit
def block_columns(start, BLOCK_V: tl.constexpr, LINE: tl.constexpr):  # (BLOCK_V / LINE, LINE)
    lines = tl.arange(0, BLOCK_V // LINE)
    return start + lines[:, None] * LINE + tl.arange(0, LINE)[None, :]


@triton.jit
def at_least(x, least):
    """NaN stays NaN: the maximum of a GPU, left alone, is the other number."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, most):
    return tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_logits(row_ptr, columns, is_column):
    """Float32 logits; -1e30, so probability 0, for -inf and for columns beyond the vocabulary."""
    logits = tl.load(row_ptr + columns, mask=is_column, other=float("-inf")).to(tl.float32)
    return at_least(logits, LOWEST_LOGIT)


@triton.jit
def line_sums(logits, line_max, bits):
    return tl.sum(tl.exp2((logits - line_max[:, None]) * bits), axis=1)


@triton.jit
def join_lines(line_max, line_sum, bits):
    row_max = tl.max(line_max, 0)
    return row_max, tl.sum(line_sum * tl.exp2((line_max - row_max) * bits), 0)


@triton.jit
def row_sum(
    row_ptr,
    first,
    last,
    bits,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
    HAS_LOWEST: tl.constexpr = False,
):
    """Of the columns from first to last: the largest logit; the sum of
    exp2((logit - largest) * bits); with HAS_LOWEST the lowest logit, -1e30 if one is masked.

    The sum is float64, because near convergence the sums of two nearly equal rows are compared.
    """
    line_max = tl.zeros([BLOCK_V // LINE], dtype=tl.float32) - 1e30
    line_lowest = tl.zeros([BLOCK_V // LINE], dtype=tl.float32) + 1e30
    line_sum = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    for start in range(first, last, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        logits = load_logits(row_ptr, columns, columns < last)
        new_max = tl.maximum(line_max, tl.max(logits, axis=1))
        line_sum *= tl.exp2((line_max - new_max) * bits)
        line_sum += line_sums(logits, new_max, bits)
        line_max = new_max
        if HAS_LOWEST:
            lowest = tl.min(tl.where(columns < last, logits, 1e30), axis=1)
            line_lowest = tl.minimum(line_lowest, lowest)
    row_max = tl.max(line_max, 0)
    parts = line_sum.to(tl.float64) * tl.exp2((line_max - row_max) * bits).to(tl.float64)
    return row_max, tl.sum(parts, 0), tl.min(line_lowest, 0)


@triton.jit
def log_of(x, log_sum):
    """log(1 + x): by its series near 0, elsewhere log_sum, which the caller computed."""
    series = 1.0 / 3.0 - x * (0.25 - x * (0.2 - x / 6.0))
    return tl.where(tl.abs(x) < 0.0625, x * (1.0 - x * (0.5 - x * series)), log_sum)


@triton.jit
def log1p_of(x):
    """log(1 + x), to float32 rounding for x near 0 too."""
    total = 1.0 + x
    lost = tl.where(tl.abs(x) < 0.5, x - (total - 1.0), 0.0)  # what rounding took from x
    return tl.log(total) + lost / total


@triton.jit
def expm1_of(x):
    """exp(x) - 1, to float32 rounding for x near 0 too."""
    series = x * (1.0 + x * (1.0 / 2.0 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x / 120.0))))
    return tl.where(tl.abs(x) < 0.125, series, tl.exp(x) - 1.0)


@triton.jit
def kl_entries(first, second, ratio):
    """first log(first / second) + (second - first) of every entry, in bits, from ratio = log2(first
    / second). No entry is negative; near convergence it is first (r + exp(-r) - 1) in powers of r,
    r in nats.
    """
    nats = ratio * NATS
    series = 1.0 / 24.0 - nats * (1.0 / 120.0 - nats * (1.0 / 720.0 - nats / 5040.0))
    near = nats * nats * (0.5 - nats * (1.0 / 6.0 - nats * series)) * (first * BITS)
    return tl.where(tl.abs(nats) < 0.25, near, first * ratio + (second - first) * BITS)


@triton.jit
def entry_parts(
    row_ptr,
    entry,
    is_entry,
    vocab_size,
    row_max,
    row_total,
    bits,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):  # -> () log2 q of one entry of a row, () 1 - q
    """Where q is above 1/2, both come from the sum of the other entries. So they are right even for
    a q that rounds to 1, as trained models have.
    """
    logit = tl.load(row_ptr + entry, mask=is_entry, other=0.0).to(tl.float32)
    log2_q = (at_least(logit, LOWEST_LOGIT) - row_max) * bits - tl.log2(row_total)
    log2_q = at_most(at_least(log2_q, LOG2_ZERO), 0.0)
    is_large = is_entry & (log2_q > -1.0)
    others = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    for start in range(0, tl.where(is_large, vocab_size, 0), BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        is_other = (columns < vocab_size) & (columns != entry)
        logits = load_logits(row_ptr, columns, is_other)
        others += tl.sum(tl.exp2((logits - row_max) * bits), axis=1)
    rest = tl.sum(others, 0) / row_total
    log2_large = log_of(-rest, tl.log2(1.0 - rest) * NATS) * BITS
    return tl.where(is_large, log2_large, log2_q), tl.where(is_large, rest, 1.0 - tl.exp2(log2_q))
