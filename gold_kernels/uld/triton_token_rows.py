"""Log-probability of one token a row, and its gradient: for scalar rows of groups, for labels, and
for the rows that end groups, whose likelihoods are compared.

C rows of a chunk, V vocabulary. With q_T = softmax(logits / T):

    values = -log q_T(id), -log q_1(label)
    grad = soft_weight (q_T - onehot(id)) / T + hard_weight (q_1 - onehot(label))

With HAS_ENDS the token is the last of a group, log s and log t are the likelihoods of the group,
divided by the group's temperature, and the loss is a generalized JSD of (s, 1 - s) and (t, 1 - t).
Its slope in log q_T(id) multiplies soft_weight. Both are float64: s is near 1.

A row takes one pass for the log-sum-exps and one for the gradient, if there is one. A token with q
above 1/2 takes another: see entry_parts.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.jsd.triton_rows import FORWARD_KL, JSD, REVERSE_KL
from gold_kernels.triton.launch import ANY_ROWS, row_block
from gold_kernels.triton.lines import (
    BITS,
    LOG2_ZERO,
    LOWEST_LOGIT,
    NATS,
    at_least,
    at_most,
    block_columns,
    entry_parts,
    load_logits,
    row_sum,
)
from gold_kernels.uld.entries import SMALLEST_REST

_FORWARD_KL = tl.constexpr(FORWARD_KL)
_REVERSE_KL = tl.constexpr(REVERSE_KL)


@triton.jit
def _rest_of(log_x):
    """1 - x, float64, at least SMALLEST_REST."""
    rest = tl.where(log_x > -1e-4, -log_x * (1.0 + log_x * (0.5 + log_x / 6.0)), 1 - tl.exp(log_x))
    return tl.maximum(rest, SMALLEST_REST)


@triton.jit
def _to_mixture(ratio, betas):
    """log m - log s of m = beta t + (1 - beta) s from log t - log s; 0 where that is 0."""
    excess = tl.exp(-tl.abs(ratio)) - 1
    weight = tl.where(ratio < 0, betas[0], betas[1])
    return tl.maximum(ratio, 0.0) + tl.log(1 + weight * excess)


@triton.jit
def two_outcomes(log_s, log_t, betas, MODE: tl.constexpr):
    """Loss of two outcomes and its slope in log s, as in likelihood/torch_rows.py; all float64."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    r, o = _rest_of(log_s), _rest_of(log_t)
    log_r, log_o = tl.log(r), tl.log(o)
    if MODE == _FORWARD_KL:
        gap = tl.where(log_s > -0.5, o - r, s - t)
        return t * (log_t - log_s) + o * (log_o - log_r), gap / r
    if MODE == _REVERSE_KL:
        pull = (log_s - log_t) - (log_r - log_o)
        return s * (log_s - log_t) + r * (log_r - log_o), s * pull
    beta, one_minus_beta = betas
    ratio, rest_ratio = log_t - log_s, log_o - log_r
    to_m, to_n = _to_mixture(ratio, betas), _to_mixture(rest_ratio, betas)
    loss = beta * (t * (ratio - to_m) + o * (rest_ratio - to_n))
    loss -= one_minus_beta * (s * to_m + r * to_n)
    return loss, one_minus_beta * s * (to_n - to_m)


@triton.jit(**ANY_ROWS)
def token_rows_kernel(
    logits_ptr,  # (C, V)
    grad_ptr,  # (C, V) overwritten with the gradient; may be logits_ptr
    ids_ptr,  # (C,) int64; outside the vocabulary: no token, value and gradient 0
    labels_ptr,  # (C,) int64, likewise
    weights_ptr,  # (C, 2) float32: of the token, of the label
    values_ptr,  # (2, C) or, if HAS_ENDS, (5, C) float32, overwritten; 0 for weight 0
    scales_ptr,  # (C,) float32 log-likelihood of a group's other tokens, read if HAS_SCALES
    log_p_ptr,  # (C,) float32 log-likelihood of the group, the teacher's, read if HAS_ENDS
    logits_row_stride,
    grad_row_stride,
    values_stride,
    vocab_size,
    bits,  # that a logit of 1 is worth: log2(e) / temperature
    softcap,
    beta,
    one_minus_beta,
    group_scale,  # 1 / temperature of a group
    MODE: tl.constexpr,
    HAS_ENDS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    logits_ptr += row * logits_row_stride
    token, label = tl.load(ids_ptr + row), tl.load(labels_ptr + row)
    soft_weight = tl.load(weights_ptr + 2 * row)
    hard_weight = tl.load(weights_ptr + 2 * row + 1)
    is_soft = (token >= 0) & (token < vocab_size) & (soft_weight != 0.0)
    is_hard = (label >= 0) & (label < vocab_size) & (hard_weight != 0.0)
    row_max, soft_total, _ = row_sum(logits_ptr, 0, vocab_size, bits, BLOCK_V, LINE)
    hard_total = soft_total
    if bits != BITS:
        hard_total = row_sum(logits_ptr, 0, vocab_size, BITS, BLOCK_V, LINE)[1]
    soft_total, hard_total = soft_total.to(tl.float32), hard_total.to(tl.float32)
    soft_log2_q, soft_rest = entry_parts(
        logits_ptr, token, is_soft, vocab_size, row_max, soft_total, bits, BLOCK_V, LINE
    )
    hard_log2_q, hard_rest = entry_parts(
        logits_ptr, label, is_hard, vocab_size, row_max, hard_total, BITS, BLOCK_V, LINE
    )
    soft_sum, hard_sum = tl.log2(soft_total), tl.log2(hard_total)
    soft_value, hard_value = -soft_log2_q * NATS, -hard_log2_q * NATS
    tl.store(values_ptr + values_stride + row, tl.where(is_hard, hard_value, 0.0))
    if HAS_ENDS:
        log_q, log_p = -soft_value, tl.load(log_p_ptr + row)
        if HAS_SCALES:
            log_q += tl.load(scales_ptr + row)
        log_q, log_p = at_least(log_q, LOG2_ZERO * NATS), at_least(log_p, LOG2_ZERO * NATS)
        betas = (beta, one_minus_beta)  # float32; with float64 they become float64
        log_s = at_most(log_q, 0.0).to(tl.float64) * group_scale
        log_t = at_most(log_p, 0.0).to(tl.float64) * group_scale
        loss, slope = two_outcomes(log_s, log_t, betas, MODE)
        soft_value, slope = loss.to(tl.float32), (slope * group_scale).to(tl.float32)
        slope = tl.where(log_q > LOG2_ZERO * NATS, slope, 0.0)  # the floor of a masked token
        out_ptr = values_ptr + 2 * values_stride + row
        tl.store(out_ptr, tl.where(is_soft, log_q, 0.0))
        tl.store(out_ptr + values_stride, tl.where(is_soft, log_p, 0.0))
        tl.store(out_ptr + 2 * values_stride, tl.where(is_soft, slope, 0.0))
        soft_weight *= -slope
    tl.store(values_ptr + row, tl.where(is_soft, soft_value, 0.0))
    is_soft &= soft_log2_q > LOG2_ZERO  # a masked token has no slope
    is_hard &= hard_log2_q > LOG2_ZERO
    if NEEDS_GRAD:
        grad_ptr += row * grad_row_stride
        soft_scale = soft_weight * bits * NATS
        for start in range(0, vocab_size, BLOCK_V):
            columns = block_columns(start, BLOCK_V, LINE)
            is_column = columns < vocab_size
            logits = load_logits(logits_ptr, columns, is_column)
            soft_grad = tl.exp2((logits - row_max) * bits - soft_sum)
            soft_grad = tl.where(columns == token, -soft_rest, soft_grad)
            hard_grad = tl.exp2((logits - row_max) * BITS - hard_sum)
            hard_grad = tl.where(columns == label, -hard_rest, hard_grad)
            # where, not a product: a row of weight 0 may hold anything
            grad = tl.where(is_soft, soft_scale * soft_grad, 0.0)
            grad += tl.where(is_hard, hard_weight * hard_grad, 0.0)
            if HAS_SOFTCAP:  # logits are softcap tanh(x / softcap)
                capped = logits / softcap
                is_finite = (logits > LOWEST_LOGIT) & (is_soft | is_hard)
                grad *= tl.where(is_finite, 1.0 - capped * capped, 0.0)
            tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=is_column)


def token_rows_(
    logits: Tensor,  # (C, V), unit column stride
    grad_logits: Tensor | None,  # (C, V), overwritten; may be logits; None: no gradient
    ids: Tensor,  # (C,) int64; outside the vocabulary: no token
    labels: Tensor,  # (C,) int64, likewise
    weights: Tensor,  # (C, 2) float32, contiguous: of the token, of the label
    values: Tensor,  # (2, C) float32, overwritten: -log q_T(id), -log q_1(label); 0 for weight 0
    *,
    temperature: float,
    softcap: float | None,
) -> None:
    """-log-probabilities of tokens and labels, and their gradients."""
    launch_token_rows_(
        *(logits, grad_logits, ids, labels, weights, values),
        temperature=temperature,
        softcap=softcap,
    )


class Ends(NamedTuple):
    """What rows that end groups have beside token rows."""

    log_scales: Tensor | None  # (C,) float32 of the group's other tokens
    log_p: Tensor  # (C,) float32 of the group, the teacher's
    beta: float
    group_temperature: float


def launch_token_rows_(
    logits: Tensor,  # (C, V), unit column stride
    grad_logits: Tensor | None,  # (C, V), overwritten; may be logits; None: no gradient
    ids: Tensor,  # (C,) int64
    labels: Tensor,  # (C,) int64
    weights: Tensor,  # (C, 2) float32, contiguous: of the token or the group, of the label
    values: Tensor,  # (2, C) float32, overwritten; (5, C) of ends
    ends: Ends | None = None,
    *,
    temperature: float,
    softcap: float | None,
) -> None:
    num_rows, vocab_size = logits.shape
    block_v, line, num_warps = row_block(vocab_size, logits.dtype)
    grad = logits if grad_logits is None else grad_logits
    has_scales = ends is not None and ends.log_scales is not None
    own = Ends(None, weights, 0.0, 1.0) if ends is None else ends
    token_rows_kernel[(num_rows,)](
        logits,
        grad,
        ids,
        labels,
        weights,
        values,
        own.log_scales if has_scales else own.log_p,
        own.log_p,
        logits.stride(0),
        grad.stride(0),
        values.stride(0),
        vocab_size,
        BITS.value / temperature,
        1.0 if softcap is None else softcap,
        own.beta,
        1.0 - own.beta,
        1.0 / own.group_temperature,
        MODE={0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(own.beta), JSD),
        HAS_ENDS=ends is not None,
        HAS_SCALES=has_scales,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=grad_logits is not None,
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
    )
