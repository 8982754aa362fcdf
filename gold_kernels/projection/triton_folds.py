"""The student's probabilities, their sums into entries of the teacher, and the way back of their
slopes: the kernels of the projected JSD that read the tables of a projection.

C rows of a chunk, V vocabulary of the student, F folds, P pieces of an entry. See triton_rows.py.

Entries are gathered from all over a row, and memory comes in sectors of 32 bytes. So LANES rows lie
beside each other, (C / LANES, V or F, LANES): one sector has an entry of all of them.
"""

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.tokens.projection import FOLD_WIDTH, Folds
from gold_kernels.triton.launch import is_interpreted, num_blocks
from gold_kernels.triton.lines import BITS, LOWEST_LOGIT, NATS, at_least

# of a row: largest logit and log2 of the sum, of both sides; sum s g; slope and 1 - q of the span;
# 1 - q of the label, log2 of its sum at temperature 1
STATE = 9
STATE_SIZE = tl.constexpr(STATE)
LANES = 8
# So many columns of LANES rows that numbers of a table are loaded where they are used: with 256
# columns they pass through shared memory first.
TILE_COLUMNS, TILE_WARPS = 1 << 7, 8


@triton.jit
def lanes_ptr(ptr, width, entries, LANES: tl.constexpr):  # -> (LANES, entries)
    """Pointers to entries of the LANES rows of this program."""
    first = tl.program_id(1).to(tl.int64) * width * LANES
    return ptr + first + entries[None, :] * LANES + tl.arange(0, LANES)[:, None]


@triton.jit
def rows_of_program(LANES: tl.constexpr):
    return tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)


@triton.jit(do_not_specialize=["num_rows"])
def spread_rows_kernel(
    student_ptr,  # (C, V) logits
    probs_ptr,  # (C / LANES, num_entries, LANES) float32, overwritten
    state_ptr,  # (C, STATE)
    student_row_stride,
    num_rows,
    num_entries,
    bits,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = rows_of_program(LANES)
    is_row = rows < num_rows
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_entries
    largest = tl.load(state_ptr + rows * STATE_SIZE, mask=is_row, other=0.0)
    log_sum = tl.load(state_ptr + rows * STATE_SIZE + 1, mask=is_row, other=0.0)
    student = student_ptr + rows[:, None] * student_row_stride + columns[None, :]
    mask = is_row[:, None] & is_column[None, :]
    logits = tl.load(student, mask=mask, other=float("-inf")).to(tl.float32)
    logits = at_least(logits, LOWEST_LOGIT)
    probs = tl.exp2((logits - largest[:, None]) * bits - log_sum[:, None])
    # a mask of rows would cut the 16 bytes that a thread stores at once
    tl.store(lanes_ptr(probs_ptr, num_entries, columns, LANES), probs, mask=is_column[None, :])


@triton.jit(do_not_specialize=["first", "last"])  # one kernel for all levels
def fold_rows_kernel(
    in_ptr,  # (C / LANES, in_width, LANES) float32: probabilities, or folds
    out_ptr,  # (C / LANES, F, LANES) float32, folds from first to last are overwritten
    ids_ptr,  # (FOLD_WIDTH, F) int32
    weights_ptr,  # (FOLD_WIDTH, F) float32
    in_width,
    first,
    last,
    num_folds,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    folds = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_fold = folds < last
    total = tl.zeros([LANES, BLOCK], dtype=tl.float32)
    for number in tl.static_range(WIDTH):
        weights = tl.load(weights_ptr + number * num_folds + folds, mask=is_fold, other=0.0)
        is_entry = is_fold & (weights != 0.0)
        ids = tl.load(ids_ptr + number * num_folds + folds, mask=is_entry, other=0)
        values = lanes_ptr(in_ptr, in_width, ids, LANES)
        total += weights[None, :] * tl.load(values, mask=is_entry[None, :], other=0.0)
    tl.store(lanes_ptr(out_ptr, num_folds, folds, LANES), total, mask=is_fold[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def grad_rows_kernel(
    student_ptr,  # (C, V) logits
    grad_ptr,  # (C, V) overwritten; may be student_ptr
    slopes_ptr,  # (C / LANES, F, LANES) float32
    weights_ptr,  # (C, 2) float32
    row_places_ptr,  # (P, num_entries) int32
    row_weights_ptr,  # (P, num_entries) float32
    spans_ptr,  # (C,) int64, read if HAS_SPANS
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    state_ptr,  # (C, STATE)
    student_row_stride,
    grad_row_stride,
    num_rows,
    vocab_size,
    num_entries,
    num_folds,
    bits,
    softcap,
    HAS_SPANS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = rows_of_program(LANES)
    is_row = rows < num_rows
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < vocab_size
    slopes = tl.zeros([LANES, BLOCK], dtype=tl.float32)
    for piece in tl.static_range(NUM_PIECES):
        is_entry = columns < num_entries
        at = piece * num_entries + columns
        weights = tl.load(row_weights_ptr + at, mask=is_entry, other=0.0)
        is_entry &= weights != 0.0
        places = tl.load(row_places_ptr + at, mask=is_entry, other=0)
        found = lanes_ptr(slopes_ptr, num_folds, places, LANES)
        slopes += weights[None, :] * tl.load(found, mask=is_entry[None, :], other=0.0)
    mask = is_row[:, None] & is_column[None, :]
    state = state_ptr + rows * STATE_SIZE
    largest = tl.load(state, mask=is_row, other=0.0)
    log_sum = tl.load(state + 1, mask=is_row, other=0.0)
    pull = tl.load(state + 4, mask=is_row, other=0.0)
    weight = tl.load(weights_ptr + 2 * rows, mask=is_row, other=0.0)
    is_live = (weight != 0.0)[:, None]
    student = student_ptr + rows[:, None] * student_row_stride + columns[None, :]
    logits = tl.load(student, mask=mask, other=float("-inf")).to(tl.float32)
    logits = at_least(logits, LOWEST_LOGIT)
    q = tl.exp2((logits - largest[:, None]) * bits - log_sum[:, None])
    grad = q * (slopes - pull[:, None])
    if HAS_SPANS:
        span = tl.load(spans_ptr + rows, mask=is_row, other=-1)
        slope = tl.load(state + 5, mask=is_row, other=0.0)
        rest = tl.load(state + 6, mask=is_row, other=0.0)
        move = tl.where(columns[None, :] == span[:, None], rest[:, None], -q)
        grad += tl.where((span >= 0)[:, None], slope[:, None] * move, 0.0)
    # where, not a product: a row of weight 0 may hold anything
    grad = tl.where(is_live, grad * (weight * bits * NATS)[:, None], 0.0)
    if HAS_LABELS:
        label = tl.load(labels_ptr + rows, mask=is_row, other=-1)
        rest = tl.load(state + 7, mask=is_row, other=-1.0)
        hard_weight = tl.load(weights_ptr + 2 * rows + 1, mask=is_row, other=0.0)
        is_hard = ((rest >= 0.0) & (hard_weight != 0.0))[:, None]
        hard_sum = tl.load(state + 8, mask=is_row, other=0.0)
        hard = tl.exp2((logits - largest[:, None]) * BITS - hard_sum[:, None])
        hard = tl.where(columns[None, :] == label[:, None], -rest[:, None], hard)
        grad += tl.where(is_hard, hard_weight[:, None] * hard, 0.0)
        is_live |= is_hard
    if HAS_SOFTCAP:  # logits are softcap tanh(x / softcap)
        capped = logits / softcap
        grad *= tl.where(is_live & (logits > LOWEST_LOGIT), 1.0 - capped * capped, 0.0)
    out = grad_ptr + rows[:, None] * grad_row_stride + columns[None, :]
    tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def block_size() -> int:
    """Columns of a program; under the interpreter programs are few and large."""
    return 1 << 12 if is_interpreted() else TILE_COLUMNS


def fold_rows_(
    student_logits: Tensor,  # (C, V_s)
    probs: Tensor,  # (C / LANES, V_s of the tokenizer, LANES) overwritten
    out: Tensor,  # (C / LANES, F, LANES) overwritten
    folds: Folds,
    state: Tensor,
    bits: float,
) -> None:
    """Probabilities, then a launch for each level of sums, which the next one reads."""
    groups, num_entries, lanes = probs.shape
    sizes = {"LANES": lanes, "BLOCK": block_size(), "num_warps": TILE_WARPS}
    spread_rows_kernel[(num_blocks(num_entries, sizes["BLOCK"]), groups)](
        *(student_logits, probs, state, student_logits.stride(0)),
        *(student_logits.shape[0], num_entries, bits),
        **sizes,
    )
    for level, first in enumerate(folds.starts[:-1]):
        last = folds.starts[level + 1]
        read = out if level else probs
        fold_rows_kernel[(num_blocks(last - first, sizes["BLOCK"]), groups)](
            *(read, out, folds.ids, folds.weights, read.shape[1], first, last, folds.num_folds),
            WIDTH=FOLD_WIDTH,
            **sizes,
        )


def grad_rows_(
    student_logits: Tensor,  # (C, V)
    grad_logits: Tensor,  # (C, V), overwritten; may be student_logits
    slopes: Tensor,  # (C / LANES, F, LANES) dloss / ds at places
    weights: Tensor,  # (C, 2)
    folds: Folds,
    spans: Tensor | None,  # (C,) int64
    labels: Tensor | None,  # (C,) int64
    state: Tensor,  # (C, STATE)
    *,
    bits: float,
    softcap: float | None,
) -> None:
    """Launch grad_rows_kernel."""
    num_rows, vocab_size = student_logits.shape
    groups, num_folds, lanes = slopes.shape
    grad_rows_kernel[(num_blocks(vocab_size, block_size()), groups)](
        student_logits,
        grad_logits,
        slopes,
        weights,
        folds.row_places,
        folds.row_weights,
        state if spans is None else spans,
        state if labels is None else labels,
        state,
        student_logits.stride(0),
        grad_logits.stride(0),
        num_rows,
        vocab_size,
        folds.row_places.shape[1],
        num_folds,
        bits,
        1.0 if softcap is None else softcap,
        HAS_SPANS=spans is not None,
        HAS_LABELS=labels is not None,
        HAS_SOFTCAP=softcap is not None,
        NUM_PIECES=folds.row_places.shape[0],
        LANES=lanes,
        BLOCK=block_size(),
        num_warps=TILE_WARPS,
    )
