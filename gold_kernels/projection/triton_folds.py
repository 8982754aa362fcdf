"""Sums of the student's probabilities into entries of the teacher, and the way back of their
slopes: two kernels of the projected JSD that read tables, once for a few rows at a time.

C rows of a chunk, V vocabulary of the student, F folds, P pieces of an entry. See triton_rows.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.tokens.projection import FOLD_WIDTH, Folds
from gold_kernels.triton.launch import empty_rows, is_interpreted
from gold_kernels.triton.lines import BITS, LOWEST_LOGIT, NATS

# of a row: largest logit and log2 of the sum, of both sides; sum s g; slope and 1 - q of the span;
# 1 - q of the label, log2 of its sum at temperature 1
STATE = 9
STATE_SIZE = tl.constexpr(STATE)
TILE_ROWS, TILE_COLUMNS = 4, 1 << 8


@triton.jit
def fold_rows_kernel(
    in_ptr,  # (C, V_s) logits, or (C, F) folds
    out_ptr,  # (C, F) float32, folds from first to last are overwritten
    ids_ptr,  # (FOLD_WIDTH, F) int32
    weights_ptr,  # (FOLD_WIDTH, F) float32
    state_ptr,  # (C, STATE)
    in_row_stride,
    out_row_stride,
    num_rows,
    first,
    last,
    num_folds,
    bits,
    HAS_LOGITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    folds = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_fold = folds < last
    largest = tl.load(state_ptr + rows * STATE_SIZE, mask=is_row, other=0.0)
    log_sum = tl.load(state_ptr + rows * STATE_SIZE + 1, mask=is_row, other=0.0)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for lane in tl.static_range(WIDTH):
        weights = tl.load(weights_ptr + lane * num_folds + folds, mask=is_fold, other=0.0)
        is_entry = is_fold & (weights != 0.0)
        ids = tl.load(ids_ptr + lane * num_folds + folds, mask=is_entry, other=0)
        places = in_ptr + rows[:, None] * in_row_stride + ids[None, :]
        mask = is_row[:, None] & is_entry[None, :]
        if HAS_LOGITS:
            logits = tl.load(places, mask=mask, other=float("-inf")).to(tl.float32)
            logits = tl.maximum(logits, LOWEST_LOGIT)
            probs = tl.exp2((logits - largest[:, None]) * bits - log_sum[:, None])
        else:
            probs = tl.load(places, mask=mask, other=0.0)
        total += weights[None, :] * probs
    places = out_ptr + rows[:, None] * out_row_stride + folds[None, :]
    tl.store(places, total, mask=is_row[:, None] & is_fold[None, :])


@triton.jit
def grad_rows_kernel(
    student_ptr,  # (C, V_s) logits
    grad_ptr,  # (C, V_s) overwritten; may be student_ptr
    slopes_ptr,  # (C, F) float32
    weights_ptr,  # (C, 2) float32
    row_places_ptr,  # (P, num_entries) int32
    row_weights_ptr,  # (P, num_entries) float32
    spans_ptr,  # (C,) int64, read if HAS_SPANS
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    state_ptr,  # (C, STATE)
    student_row_stride,
    grad_row_stride,
    slopes_row_stride,
    num_rows,
    vocab_size,
    num_entries,
    bits,
    softcap,
    HAS_SPANS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < vocab_size
    mask = is_row[:, None] & is_column[None, :]
    state = state_ptr + rows * STATE_SIZE
    largest = tl.load(state, mask=is_row, other=0.0)
    log_sum = tl.load(state + 1, mask=is_row, other=0.0)
    pull = tl.load(state + 4, mask=is_row, other=0.0)
    weight = tl.load(weights_ptr + 2 * rows, mask=is_row, other=0.0)
    is_live = (weight != 0.0)[:, None]
    student = student_ptr + rows[:, None] * student_row_stride + columns[None, :]
    logits = tl.load(student, mask=mask, other=float("-inf")).to(tl.float32)
    logits = tl.maximum(logits, LOWEST_LOGIT)
    q = tl.exp2((logits - largest[:, None]) * bits - log_sum[:, None])
    slopes = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for piece in tl.static_range(NUM_PIECES):
        is_entry = columns < num_entries
        at = piece * num_entries + columns
        weights = tl.load(row_weights_ptr + at, mask=is_entry, other=0.0)
        is_entry &= weights != 0.0
        places = tl.load(row_places_ptr + at, mask=is_entry, other=0)
        found = slopes_ptr + rows[:, None] * slopes_row_stride + places[None, :]
        is_found = is_row[:, None] & is_entry[None, :]
        slopes += weights[None, :] * tl.load(found, mask=is_found, other=0.0)
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


def fold_rows(student_logits: Tensor, folds: Folds, state: Tensor, bits: float) -> Tensor:  # (C, F)
    """A launch for each level, whose sums the next one reads."""
    num_rows = student_logits.shape[0]
    out = empty_rows(student_logits, num_rows, folds.num_folds, state.dtype)
    block, rows = _tile()
    for level, first in enumerate(folds.starts[:-1]):
        last = folds.starts[level + 1]
        read = out if level else student_logits
        fold_rows_kernel[(triton.cdiv(last - first, block), triton.cdiv(num_rows, rows))](
            *(read, out, folds.ids, folds.weights, state),
            *(read.stride(0), out.stride(0), num_rows, first, last, folds.num_folds, bits),
            HAS_LOGITS=level == 0,
            WIDTH=FOLD_WIDTH,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )
    return out


def grad_rows_(
    student_logits: Tensor,  # (C, V)
    grad_logits: Tensor,  # (C, V), overwritten; may be student_logits
    slopes: Tensor,  # (C, F) dloss / ds at places
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
    block, rows = _tile()
    grad_rows_kernel[(triton.cdiv(vocab_size, block), triton.cdiv(num_rows, rows))](
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
        slopes.stride(0),
        num_rows,
        vocab_size,
        folds.row_places.shape[1],
        bits,
        1.0 if softcap is None else softcap,
        HAS_SPANS=spans is not None,
        HAS_LABELS=labels is not None,
        HAS_SOFTCAP=softcap is not None,
        NUM_PIECES=folds.row_places.shape[0],
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )


def _tile() -> tuple[int, int]:
    """Columns and rows of a program; under the interpreter programs are few and large."""
    return (1 << 12 if is_interpreted() else TILE_COLUMNS), TILE_ROWS
