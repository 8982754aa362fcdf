"""What the row kernels share: loads, and log-sum-exps of a row in blocks of lines.

A program walks one row in blocks of shape (BLOCK_V / LINE, LINE). A line is what one thread loads
at once, so that each sums its line alone and carries one number for it; threads meet once at the
end of a pass. Logarithms are in bits, since exp2 is one instruction and exp four.
"""

import triton
import triton.language as tl

LOWEST_LOGIT = tl.constexpr(-1e30)  # stands for a column masked with -inf: probability 0, no NaN
BITS = tl.constexpr(1.4426950408889634)  # per nat
NATS = tl.constexpr(0.6931471805599453)  # per bit


@triton.jit
def block_columns(start, BLOCK_V: tl.constexpr, LINE: tl.constexpr):  # (BLOCK_V / LINE, LINE)
    lines = tl.arange(0, BLOCK_V // LINE)
    return start + lines[:, None] * LINE + tl.arange(0, LINE)[None, :]


@triton.jit
def load_logits(row_ptr, columns, is_column):
    """Float32 logits; -1e30 for -inf and beyond the vocabulary, so probability 0."""
    logits = tl.load(row_ptr + columns, mask=is_column, other=float("-inf")).to(tl.float32)
    return tl.maximum(logits, LOWEST_LOGIT)


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
    vocab_size,
    bits,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
    HAS_LOWEST: tl.constexpr = False,
):
    """Largest logit of a row, the sum of exp2((logit - largest) * bits) and, with HAS_LOWEST, the
    lowest logit (-1e30 if one is masked).
    """
    line_max = tl.zeros([BLOCK_V // LINE], dtype=tl.float32) - 1e30
    line_lowest = tl.zeros([BLOCK_V // LINE], dtype=tl.float32) + 1e30
    line_sum = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = block_columns(start, BLOCK_V, LINE)
        logits = load_logits(row_ptr, columns, columns < vocab_size)
        new_max = tl.maximum(line_max, tl.max(logits, axis=1))
        line_sum *= tl.exp2((line_max - new_max) * bits)
        line_sum += line_sums(logits, new_max, bits)
        line_max = new_max
        if HAS_LOWEST:
            lowest = tl.min(tl.where(columns < vocab_size, logits, 1e30), axis=1)
            line_lowest = tl.minimum(line_lowest, lowest)
    row_max, total = join_lines(line_max, line_sum, bits)
    return row_max, total, tl.min(line_lowest, 0)
