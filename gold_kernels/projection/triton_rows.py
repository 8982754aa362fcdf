"""Rows of the projected JSD: kernels for a few rows of a chunk at a time, after the log-sum-exps of
uld/triton_sums.py for all of them.

C rows of a chunk, V vocabulary (V_s, V_t), K entries of the teacher that are reached, F folds, P
pieces of an entry of the student. s = Q W and t = P on the reached entries.

    loss = JSD_beta(t, s),  g = dloss / ds,  a = W g
    grad = q (a - sum_v q_v a_v) / temperature,  sum_v q_v a_v = sum_k s_k g_k

join_rows   the log-sum-exp of each row and side
spread_rows q, LANES rows beside each other: see triton_folds.py
fold_rows   s: a launch for each level of sums, see tokens/projection.py
pair_rows   of a block of reached entries: loss, g in the place of s, and sum s g
close_rows  the sums of all blocks; with spans their two outcomes
grad_rows   a, gathered from g, and the gradient
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.jsd.triton_rows import FORWARD_KL, JSD, REVERSE_KL
from gold_kernels.projection.triton_folds import (
    LANES,
    STATE,
    STATE_SIZE,
    TILE_WARPS,
    block_size,
    fold_rows_,
    grad_rows_,
    lanes_ptr,
    rows_of_program,
)
from gold_kernels.tokens.projection import Folds
from gold_kernels.triton.launch import num_blocks, row_block
from gold_kernels.triton.lines import (
    BITS,
    LOG2_ZERO,
    LOWEST_LOGIT,
    NATS,
    at_least,
    at_most,
    entry_parts,
    row_sum,
)
from gold_kernels.uld.entries import pair_entries
from gold_kernels.uld.triton_sums import join_slices, uld_sums
from gold_kernels.uld.triton_sums import row_bytes as sum_bytes
from gold_kernels.uld.triton_token_rows import two_outcomes

# Rows that share a probability, its fold and its slope, whose memory is 77 MB for 65536 and 80k of
# them: what one kernel has written the next one finds in the L2 cache, or much of it.
ROWS = 128
SUMS = tl.constexpr(4)  # of a block: loss, s g, s, t
CLOSE_BLOCK = 1 << 9
TINY = tl.constexpr(1.1754944e-38)


def row_bytes(v_student: int, v_teacher: int, dtype: torch.dtype) -> int:
    """Bytes a row of sums and state."""
    return sum_bytes(v_student, v_teacher, 0, dtype) + 4 * STATE


def rows_at_a_time(folds: Folds, scratch_bytes: int) -> tuple[int, int]:
    """How many rows that memory has a Scratch for, one at least; and its bytes."""
    rows = ROWS
    size = 4 * (folds.row_places.shape[1] + folds.num_folds + SUMS.value * _num_parts(folds))
    while rows > 1 and rows * size > scratch_bytes:
        rows //= 2
    return rows, rows * size


def _num_parts(folds: Folds) -> int:
    return num_blocks(folds.teacher_ids.shape[0], block_size())


class Scratch(NamedTuple):
    """What the kernels leave to each other of a few rows, LANES of them beside each other."""

    probs: Tensor  # (rows / LANES, V_s of the tokenizer, LANES) float32
    folds: Tensor  # (rows / LANES, F, LANES) float32: s, then g in its places
    sums: Tensor  # (rows / LANES, parts, SUMS, LANES) float32, of each block of reached entries

    @classmethod
    def of(cls, like: Tensor, folds: Folds, num_rows: int, lanes: int) -> "Scratch":
        groups = num_blocks(num_rows, lanes)
        return cls(
            like.new_empty(groups, folds.row_places.shape[1], lanes),
            like.new_empty(groups, folds.num_folds, lanes),
            like.new_empty(groups, _num_parts(folds), SUMS.value, lanes),
        )

    def of_rows(self, num_rows: int) -> "Scratch":
        groups = num_blocks(num_rows, self.probs.shape[2])
        return Scratch(*(part[:groups] for part in self))


@triton.jit
def join_rows_kernel(
    sums_ptr,  # (C, 2, S, 3) float64
    state_ptr,  # (C, STATE) float32, the first four overwritten
    student_vocab_size,
    teacher_vocab_size,
    student_bits,
    teacher_bits,
    SLICE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_ptr = state_ptr + row * STATE_SIZE
    largest, total, _ = join_slices(
        sums_ptr, row, student_vocab_size, student_bits, False, SLICE, NUM_SLICES
    )
    tl.store(out_ptr, largest)
    tl.store(out_ptr + 1, tl.log2(total.to(tl.float32)))
    largest, total, _ = join_slices(
        sums_ptr, row, teacher_vocab_size, teacher_bits, True, SLICE, NUM_SLICES
    )
    tl.store(out_ptr + 2, largest)
    tl.store(out_ptr + 3, tl.log2(total.to(tl.float32)))


@triton.jit(do_not_specialize=["num_rows"])  # the last rows of a chunk are of any number
def pair_rows_kernel(
    teacher_ptr,  # (C, V_t) logits
    folds_ptr,  # (C / LANES, F, LANES) float32, s at places, overwritten with g
    teacher_ids_ptr,  # (K,) int32
    places_ptr,  # (K,) int32
    state_ptr,  # (C, STATE), the first four are read
    sums_ptr,  # (C / LANES, parts, SUMS, LANES) float32, overwritten
    teacher_row_stride,
    num_rows,
    num_folds,
    num_reached,
    beta,
    one_minus_beta,
    teacher_bits,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = rows_of_program(LANES)
    is_row = rows < num_rows
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_index = index < num_reached
    is_pair = is_index[None, :]
    teacher_max = tl.load(state_ptr + rows * STATE_SIZE + 2, mask=is_row, other=0.0)
    teacher_sum = tl.load(state_ptr + rows * STATE_SIZE + 3, mask=is_row, other=0.0)
    place = tl.load(places_ptr + index, mask=is_index, other=0)
    entry = tl.load(teacher_ids_ptr + index, mask=is_index, other=0)
    own = lanes_ptr(folds_ptr, num_folds, place, LANES)
    s = tl.load(own, mask=is_pair, other=0.0)
    teacher = teacher_ptr + rows[:, None] * teacher_row_stride + entry[None, :]
    mask = is_row[:, None] & is_pair
    logits = tl.load(teacher, mask=mask, other=float("-inf")).to(tl.float32)
    logits = at_least(logits, LOWEST_LOGIT) - teacher_max[:, None]
    log2_t = at_least(logits * teacher_bits - teacher_sum[:, None], LOG2_ZERO)
    log2_s = tl.where(s <= TINY, LOG2_ZERO, tl.log2(at_least(s, TINY)))  # NaN stays NaN
    loss, pull = pair_entries(log2_s, log2_t, (beta, one_minus_beta), MODE)
    tl.store(own, tl.where(s > TINY, pull / tl.maximum(s, TINY), 0.0), mask=is_pair)
    sums = lanes_ptr(sums_ptr, tl.num_programs(0) * SUMS, tl.arange(0, SUMS), LANES)
    sums += tl.program_id(0) * SUMS * LANES
    number = tl.arange(0, SUMS)[None, :]
    loss = tl.sum(tl.where(is_pair, loss, 0.0), axis=1)[:, None]
    pull = tl.sum(tl.where(is_pair, pull, 0.0), axis=1)[:, None]
    student_mass = tl.sum(s, axis=1)[:, None]
    teacher_mass = tl.sum(tl.where(is_pair, tl.exp2(log2_t), 0.0), axis=1)[:, None]
    masses = tl.where(number == 2, student_mass, teacher_mass)
    tl.store(sums, tl.where(number == 0, loss, tl.where(number == 1, pull, masses)))


@triton.jit
def close_rows_kernel(
    student_ptr,  # (C, V_s) logits
    teacher_ptr,  # (C, V_t) logits
    sums_ptr,  # (C / LANES, parts, SUMS, LANES) float32
    weights_ptr,  # (C, 2) float32
    student_spans_ptr,  # (C,) int64, read if HAS_SPANS
    teacher_spans_ptr,  # (C,) int64
    student_scales_ptr,  # (C,) float32, read if HAS_SCALES
    teacher_scales_ptr,  # (C,) float32
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    state_ptr,  # (C, STATE), from the fifth on overwritten
    values_ptr,  # (6, C) float32, overwritten
    student_row_stride,
    teacher_row_stride,
    values_stride,
    num_parts,
    student_vocab_size,
    teacher_vocab_size,
    beta,
    one_minus_beta,
    student_bits,
    teacher_bits,
    MODE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    LANES: tl.constexpr,
    CLOSE_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_row = student_ptr + row * student_row_stride
    teacher_row = teacher_ptr + row * teacher_row_stride
    row_state = state_ptr + row * STATE_SIZE
    is_live = tl.load(weights_ptr + 2 * row) != 0.0
    student_max, student_sum = tl.load(row_state), tl.load(row_state + 1)
    teacher_max, teacher_sum = tl.load(row_state + 2), tl.load(row_state + 3)
    betas = (beta, one_minus_beta)
    own_sums = sums_ptr + (row // LANES) * num_parts * SUMS * LANES + row % LANES
    zeros = tl.zeros([CLOSE_BLOCK], dtype=tl.float32)
    losses, pulls, student_mass, teacher_mass = zeros, zeros, zeros, zeros
    for first in range(0, num_parts, CLOSE_BLOCK):
        parts = first + tl.arange(0, CLOSE_BLOCK)
        is_part, sums = parts < num_parts, own_sums + parts * SUMS * LANES
        losses += tl.load(sums, mask=is_part, other=0.0)
        pulls += tl.load(sums + LANES, mask=is_part, other=0.0)
        student_mass += tl.load(sums + 2 * LANES, mask=is_part, other=0.0)
        teacher_mass += tl.load(sums + 3 * LANES, mask=is_part, other=0.0)
    loss, slope, rest = tl.sum(losses, 0), 0.0, 0.0
    if HAS_SPANS:
        span, partner = tl.load(student_spans_ptr + row), tl.load(teacher_spans_ptr + row)
        is_span = is_live & (span >= 0)
        log2_s, rest = entry_parts(
            student_row, span, is_span, student_vocab_size, student_max, tl.exp2(student_sum),
            student_bits, BLOCK_V, LINE,
        )  # fmt: skip
        log2_t, _ = entry_parts(
            teacher_row, partner, is_span, teacher_vocab_size, teacher_max, tl.exp2(teacher_sum),
            teacher_bits, BLOCK_V, LINE,
        )  # fmt: skip
        log_s, log_t = log2_s * NATS, log2_t * NATS
        if HAS_SCALES:
            log_s += tl.load(student_scales_ptr + row)
            log_t += tl.load(teacher_scales_ptr + row)
        log_s = at_most(at_least(log_s, LOG2_ZERO * NATS), 0.0).to(tl.float64)
        log_t = at_most(at_least(log_t, LOG2_ZERO * NATS), 0.0).to(tl.float64)
        span_loss, span_slope = two_outcomes(log_s, log_t, betas, MODE)
        loss += tl.where(is_span, span_loss.to(tl.float32), 0.0)
        is_span &= log_s > LOG2_ZERO * NATS  # the floor of a masked token has no slope
        slope = tl.where(is_span, span_slope.to(tl.float32), 0.0)
        tl.store(row_state + 5, slope)
        tl.store(row_state + 6, rest)
    tl.store(row_state + 4, tl.sum(pulls, 0))
    out_ptr = values_ptr + row
    tl.store(out_ptr, tl.where(is_live, loss, 0.0))
    tl.store(out_ptr + 2 * values_stride, tl.where(is_live, tl.sum(student_mass, 0), 0.0))
    tl.store(out_ptr + 3 * values_stride, tl.where(is_live, tl.sum(teacher_mass, 0), 0.0))
    tl.store(out_ptr + 4 * values_stride, tl.where(is_live, slope, 0.0))
    if HAS_LABELS:  # cross-entropy at temperature 1
        label = tl.load(labels_ptr + row)
        is_hard = (label >= 0) & (label < student_vocab_size)
        is_hard &= tl.load(weights_ptr + 2 * row + 1) != 0.0
        total = row_sum(student_row, 0, student_vocab_size, BITS, BLOCK_V, LINE)[1].to(tl.float32)
        log2_q, rest = entry_parts(
            student_row, label, is_hard, student_vocab_size, student_max, total, BITS, BLOCK_V, LINE
        )
        tl.store(out_ptr + values_stride, tl.where(is_hard, -log2_q * NATS, 0.0))
        # a masked label has no slope
        tl.store(row_state + 7, tl.where(is_hard & (log2_q > LOG2_ZERO), rest, -1.0))
        tl.store(row_state + 8, tl.log2(total))


def projected_rows_(
    student_logits: Tensor,  # (C, V_s), unit column stride
    teacher_logits: Tensor,  # (C, V_t), unit column stride
    grad_logits: Tensor | None,  # (C, V_s), overwritten; may be student_logits; None: no gradient
    weights: Tensor,  # (C, 2) float32, contiguous: of the loss, of the label
    folds: Folds,
    spans: list[Tensor] | None,  # (C,), (C,) int64 first tokens of merged groups, -1 for others
    log_scales: list[Tensor] | None,  # (C,), (C,) float32 of the later tokens of groups
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (6, C) float32, overwritten, in the order of ProjectedJSD.value_names
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
    scratch_bytes: int,
) -> None:
    """Launch the kernels on the rows of a chunk. scratch_bytes: see rows_at_a_time."""
    num_rows, v_student = student_logits.shape
    v_teacher = teacher_logits.shape[1]
    bits = BITS.value / temperatures[0], BITS.value / temperatures[1]
    sums, _, size, _ = uld_sums(student_logits, teacher_logits, None, *bits)
    state = sums.new_empty(num_rows, STATE, dtype=values.dtype)
    slices = {"SLICE": size, "NUM_SLICES": sums.shape[2]}
    join_rows_kernel[(num_rows,)](sums, state, v_student, v_teacher, *bits, **slices)
    step, _ = rows_at_a_time(folds, scratch_bytes)
    scratch = Scratch.of(state, folds, min(step, num_rows), min(step, LANES))
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        own = scratch.of_rows(rows.stop - first)
        student, own_state = student_logits[rows], state[rows]
        own_spans = None if spans is None else [side[rows] for side in spans]
        own_labels = None if labels is None else labels[rows]
        fold_rows_(student, own.probs, own.folds, folds, own_state, bits[0])
        _pair_rows_(
            *(student, teacher_logits[rows], own, weights[rows], folds, own_spans),
            None if log_scales is None else [side[rows] for side in log_scales],
            *(own_labels, own_state, values[:, rows], beta, bits),
        )
        if grad_logits is not None:
            grad_rows_(
                *(student, grad_logits[rows], own.folds, weights[rows], folds),
                *(None if own_spans is None else own_spans[0], own_labels, own_state),
                bits=bits[0],
                softcap=softcap,
            )


def _pair_rows_(
    student: Tensor,  # (C, V_s)
    teacher: Tensor,  # (C, V_t)
    scratch: Scratch,
    weights: Tensor,  # (C, 2)
    folds: Folds,
    spans: list[Tensor] | None,
    log_scales: list[Tensor] | None,
    labels: Tensor | None,
    state: Tensor,  # (C, STATE)
    values: Tensor,  # (6, C)
    beta: float,
    bits: tuple[float, float],
) -> None:
    """Launch pair_rows_kernel and close_rows_kernel."""
    num_rows, v_student = student.shape
    groups, num_parts, _, lanes = scratch.sums.shape
    block_v, line, num_warps = row_block(v_student, student.dtype)
    mode = {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(beta), JSD)
    betas = beta, 1.0 - beta
    pair_rows_kernel[(num_parts, groups)](
        teacher, scratch.folds, folds.teacher_ids, folds.places, state, scratch.sums,
        teacher.stride(0), num_rows, folds.num_folds, folds.teacher_ids.shape[0], *betas, bits[1],
        MODE=mode, LANES=lanes, BLOCK=block_size(), num_warps=TILE_WARPS,
    )  # fmt: skip
    close_rows_kernel[(num_rows,)](
        student, teacher, scratch.sums, weights, *((state, state) if spans is None else spans),
        *((state, state) if log_scales is None else log_scales),
        state if labels is None else labels, state, values, student.stride(0), teacher.stride(0),
        values.stride(0), num_parts, v_student, teacher.shape[1], *betas, *bits, MODE=mode,
        HAS_SPANS=spans is not None, HAS_SCALES=log_scales is not None,
        HAS_LABELS=labels is not None, LANES=lanes, CLOSE_BLOCK=CLOSE_BLOCK, BLOCK_V=block_v,
        LINE=line, num_warps=num_warps,
    )  # fmt: skip
