"""Rows of the projected JSD: four kernels a chunk, after the log-sum-exps of uld/triton_sums.py.

C rows of a chunk, V vocabulary (V_s, V_t), K entries of the teacher that are reached, F folds, P
pieces of an entry of the student. s = Q W and t = P on the reached entries.

    loss = JSD_beta(t, s),  g = dloss / ds,  a = W g
    grad = q (a - sum_v q_v a_v) / temperature,  sum_v q_v a_v = sum_k s_k g_k

join_rows   the log-sum-exp of each row and side
fold_rows   s: a launch for each level of sums, see tokens/projection.py
pair_rows   loss, g in the place of s, and sum s g; with spans their two outcomes
grad_rows   a, gathered from g, and the gradient, a few rows at a time: tables are read once for all
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.jsd.triton_rows import FORWARD_KL, JSD, REVERSE_KL
from gold_kernels.projection.triton_folds import STATE, STATE_SIZE, fold_rows, grad_rows_
from gold_kernels.tokens.projection import Folds
from gold_kernels.triton.launch import is_interpreted, row_block
from gold_kernels.triton.lines import (
    BITS,
    LOG2_ZERO,
    LOWEST_LOGIT,
    NATS,
    entry_parts,
    row_sum,
)
from gold_kernels.uld.entries import pair_entries
from gold_kernels.uld.triton_sums import join_slices, uld_sums
from gold_kernels.uld.triton_sums import row_bytes as sum_bytes
from gold_kernels.uld.triton_token_rows import two_outcomes

PAIR_BLOCK = 1 << 11
TINY = tl.constexpr(1.1754944e-38)


def row_bytes(v_student: int, v_teacher: int, folds: Folds, dtype: torch.dtype) -> int:
    """Bytes a row of folds, sums and state."""
    return sum_bytes(v_student, v_teacher, 0, dtype) + 4 * (folds.num_folds + 16 + STATE)


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


@triton.jit
def pair_rows_kernel(
    student_ptr,  # (C, V_s) logits
    teacher_ptr,  # (C, V_t) logits
    folds_ptr,  # (C, F) float32, s at places, overwritten with g
    weights_ptr,  # (C, 2) float32
    teacher_ids_ptr,  # (K,) int32
    places_ptr,  # (K,) int32
    student_spans_ptr,  # (C,) int64, read if HAS_SPANS
    teacher_spans_ptr,  # (C,) int64
    student_scales_ptr,  # (C,) float32, read if HAS_SCALES
    teacher_scales_ptr,  # (C,) float32
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    state_ptr,  # (C, STATE), from the fifth on overwritten
    values_ptr,  # (6, C) float32, overwritten
    student_row_stride,
    teacher_row_stride,
    folds_row_stride,
    values_stride,
    student_vocab_size,
    teacher_vocab_size,
    num_reached,
    beta,
    one_minus_beta,
    student_bits,
    teacher_bits,
    MODE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_row = student_ptr + row * student_row_stride
    teacher_row = teacher_ptr + row * teacher_row_stride
    folds_row = folds_ptr + row * folds_row_stride
    row_state = state_ptr + row * STATE_SIZE
    is_live = tl.load(weights_ptr + 2 * row) != 0.0
    student_max, student_sum = tl.load(row_state), tl.load(row_state + 1)
    teacher_max, teacher_sum = tl.load(row_state + 2), tl.load(row_state + 3)
    betas = (beta, one_minus_beta)
    zeros = tl.zeros([PAIR_BLOCK], dtype=tl.float32)
    losses, pulls, student_mass, teacher_mass = zeros, zeros, zeros, zeros
    for start in range(0, num_reached, PAIR_BLOCK):
        index = start + tl.arange(0, PAIR_BLOCK)
        is_pair = index < num_reached
        place = tl.load(places_ptr + index, mask=is_pair, other=0)
        entry = tl.load(teacher_ids_ptr + index, mask=is_pair, other=0)
        s = tl.load(folds_row + place, mask=is_pair, other=0.0)
        logits = tl.load(teacher_row + entry, mask=is_pair, other=float("-inf")).to(tl.float32)
        log2_t = (tl.maximum(logits, LOWEST_LOGIT) - teacher_max) * teacher_bits - teacher_sum
        log2_t = tl.maximum(log2_t, LOG2_ZERO)
        log2_s = tl.where(s > TINY, tl.log2(tl.maximum(s, TINY)), LOG2_ZERO)
        loss, pull = pair_entries(log2_s, log2_t, betas, MODE)
        losses += tl.where(is_pair, loss, 0.0)
        pulls += tl.where(is_pair, pull, 0.0)
        student_mass += tl.where(is_pair, s, 0.0)
        teacher_mass += tl.where(is_pair, tl.exp2(log2_t), 0.0)
        slope = tl.where(s > TINY, pull / tl.maximum(s, TINY), 0.0)
        tl.store(folds_row + place, slope, mask=is_pair)
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
        log_s = tl.minimum(tl.maximum(log_s, LOG2_ZERO * NATS), 0.0).to(tl.float64)
        log_t = tl.minimum(tl.maximum(log_t, LOG2_ZERO * NATS), 0.0).to(tl.float64)
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
) -> None:
    """Launch the kernels on the rows of a chunk."""
    num_rows, v_student = student_logits.shape
    v_teacher = teacher_logits.shape[1]
    bits = [BITS.value / temperature for temperature in temperatures]
    sums, _, size, _ = uld_sums(student_logits, teacher_logits, None, *bits)
    state = sums.new_empty(num_rows, STATE, dtype=values.dtype)
    slices = {"SLICE": size, "NUM_SLICES": sums.shape[2]}
    join_rows_kernel[(num_rows,)](sums, state, v_student, v_teacher, *bits, **slices)
    out = fold_rows(student_logits, folds, state, bits[0])
    block_v, line, num_warps = row_block(v_student, student_logits.dtype)
    pair_rows_kernel[(num_rows,)](
        student_logits, teacher_logits, out, weights, folds.teacher_ids, folds.places,
        *((state, state) if spans is None else spans),
        *((state, state) if log_scales is None else log_scales),
        state if labels is None else labels, state, values, student_logits.stride(0),
        teacher_logits.stride(0), out.stride(0), values.stride(0), v_student, v_teacher,
        folds.teacher_ids.shape[0], beta, 1.0 - beta, *bits,
        MODE={0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(beta), JSD),
        HAS_SPANS=spans is not None, HAS_SCALES=log_scales is not None,
        HAS_LABELS=labels is not None,
        PAIR_BLOCK=1 << 16 if is_interpreted() else PAIR_BLOCK, BLOCK_V=block_v, LINE=line,
        num_warps=num_warps,
    )  # fmt: skip
    if grad_logits is None:
        return
    grad_rows_(
        *(student_logits, grad_logits, out, weights, folds),
        *(None if spans is None else spans[0], labels, state),
        bits=bits[0],
        softcap=softcap,
    )
