"""Generalized JSD of logit rows and its gradient, one program a row, three passes over the row.

C rows of a chunk, V vocabulary. With a = log q, b = log p (temperature applied) and r = b - a:

    w     = log(beta exp(r) + 1 - beta)                      log m - a
    loss  = sum_v beta p (r - w) - (1 - beta) q w            beta KL(P || M) + (1 - beta) KL(Q || M)
    grad  = q (g - sum q g) / temperature                    g = -(1 - beta) w
    beta 0: loss = sum p r + (q - p), grad = (q - p) / T;    beta 1: loss = sum -q r + (p - q), g =
    -r

Everything hangs on r, which is small where the two distributions are close, instead of on a - log
m, a difference of two numbers near -12: near convergence that is ten times the precision at the
same cost. The terms q - p sum to zero and cancel the first-order effect of the rounding of both
log-sum-exps. |r| <= 80 in w changes nothing that float32 can hold, since either p or q is then
below 1e-34.

Pass 1 takes both log-sum-exps, pass 2 the loss, sum q g and the metrics, pass 3 writes the
gradient.
"""

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.kernels.launch import row_block

LOWEST_LOGIT = tl.constexpr(-1e30)  # stands for a column masked with -inf: probability 0, no NaN
LOG_ZERO = tl.constexpr(-1e6)
MAX_LOG_RATIO = tl.constexpr(80.0)

FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
_FORWARD_KL = tl.constexpr(FORWARD_KL)
_REVERSE_KL = tl.constexpr(REVERSE_KL)

NUM_ROW_VALUES = (
    7  # loss, cross_entropy, student_entropy, teacher_entropy, both KLs, top-1 agreement
)


@triton.jit
def _load_scaled(row_ptr, columns, is_column, scale):
    """Float32 logits * scale; -1e30 for -inf and beyond the vocabulary, so probability 0."""
    logits = tl.load(row_ptr + columns, mask=is_column, other=float("-inf")).to(tl.float32)
    return tl.maximum(logits * scale, LOWEST_LOGIT)


@triton.jit
def _update_lse(running_max, running_sum, scaled):
    new_max = tl.maximum(running_max, tl.max(scaled, axis=0))
    running_sum = running_sum * tl.exp(running_max - new_max) + tl.sum(tl.exp(scaled - new_max), 0)
    return new_max, running_sum


@triton.jit
def _log_ratio(student, teacher, lse_gap):
    """b - a from scaled logits, lse_gap = lse_teacher - lse_student."""
    return tl.minimum(tl.maximum((teacher - student) - lse_gap, LOG_ZERO), -LOG_ZERO)


@triton.jit
def _log_mixture(ratio, beta):
    """Clipped ratio and w = log m - log q."""
    clipped = tl.minimum(tl.maximum(ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO)
    teacher_over_student = tl.exp(clipped)
    mixture = beta * teacher_over_student + (1.0 - beta)
    # log1p where mixture is near 1: the first-order term of what rounding took from its excess over
    # 1
    excess = beta * (teacher_over_student - 1.0)
    lost = tl.where(tl.abs(excess) < 0.5, excess - (mixture - 1.0), 0.0)
    return clipped, tl.log(mixture) + lost


@triton.jit
def jsd_rows_kernel(
    student_ptr,  # (C, V) logits
    teacher_ptr,  # (C, V) logits
    grad_ptr,  # (C, V) overwritten with the gradient; may be student_ptr
    row_weights_ptr,  # (C,) float32
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    values_ptr,  # (7, C) float32, overwritten with the unweighted values of each row
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    values_stride,
    vocab_size,
    beta,
    inverse_temperature,
    weight_soft,
    weight_hard,
    MODE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_METRICS: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    values_ptr += row
    row_weight = tl.load(row_weights_ptr + row)
    is_live = row_weight != 0.0  # a row of weight 0 may hold anything, NaN included

    max_student = float("-inf")
    max_teacher = float("-inf")
    max_hard = float("-inf")
    sum_student = 0.0
    sum_teacher = 0.0
    sum_hard = 0.0
    for start in range(0, vocab_size, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        is_column = columns < vocab_size
        student = _load_scaled(student_ptr, columns, is_column, inverse_temperature)
        teacher = _load_scaled(teacher_ptr, columns, is_column, inverse_temperature)
        max_student, sum_student = _update_lse(max_student, sum_student, student)
        max_teacher, sum_teacher = _update_lse(max_teacher, sum_teacher, teacher)
        if HAS_LABELS:
            unscaled = _load_scaled(student_ptr, columns, is_column, 1.0)
            max_hard, sum_hard = _update_lse(max_hard, sum_hard, unscaled)
    log_sum_student = tl.log(sum_student)
    log_sum_teacher = tl.log(sum_teacher)
    lse_gap = (max_teacher - max_student) + (log_sum_teacher - log_sum_student)

    label = -1
    lse_hard = 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        is_label = (label >= 0) & (label < vocab_size)
        label_logit = tl.load(student_ptr + label, mask=is_label, other=0.0).to(tl.float32)
        lse_hard = max_hard + tl.log(sum_hard)
        cross_entropy = lse_hard - tl.maximum(label_logit, LOWEST_LOGIT)
        tl.store(values_ptr + values_stride, tl.where(is_live & is_label, cross_entropy, 0.0))

    loss = tl.zeros([BLOCK_V], dtype=tl.float32)
    mean_grad = tl.zeros([BLOCK_V], dtype=tl.float32)
    student_entropy = tl.zeros([BLOCK_V], dtype=tl.float32)
    teacher_entropy = tl.zeros([BLOCK_V], dtype=tl.float32)
    forward_kl = tl.zeros([BLOCK_V], dtype=tl.float32)
    reverse_kl = tl.zeros([BLOCK_V], dtype=tl.float32)
    agreement = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        is_column = columns < vocab_size
        student = _load_scaled(student_ptr, columns, is_column, inverse_temperature)
        teacher = _load_scaled(teacher_ptr, columns, is_column, inverse_temperature)
        ratio = _log_ratio(student, teacher, lse_gap)
        q = tl.exp(student - max_student) / sum_student
        p = tl.exp(teacher - max_teacher) / sum_teacher
        if MODE == _FORWARD_KL:
            loss += p * ratio + (q - p)
        elif MODE == _REVERSE_KL:
            loss += (p - q) - q * ratio
            mean_grad -= q * ratio
        else:
            clipped, w = _log_mixture(ratio, beta)
            loss += beta * p * (clipped - w) - (1.0 - beta) * q * w
            mean_grad -= (1.0 - beta) * q * w
        if HAS_METRICS:
            log_q = tl.maximum(student - max_student - log_sum_student, LOG_ZERO)
            log_p = tl.maximum(teacher - max_teacher - log_sum_teacher, LOG_ZERO)
            student_entropy -= q * log_q
            teacher_entropy -= p * log_p
            forward_kl += p * ratio + (q - p)
            reverse_kl += (p - q) - q * ratio
            is_shared_top = (student == max_student) & (teacher == max_teacher)
            agreement = tl.maximum(agreement, is_shared_top.to(tl.float32))

    tl.store(values_ptr, tl.where(is_live, tl.sum(loss, 0), 0.0))
    if HAS_METRICS:
        out_ptr = values_ptr + 2 * values_stride
        tl.store(out_ptr, tl.where(is_live, tl.sum(student_entropy, 0), 0.0))
        tl.store(out_ptr + values_stride, tl.where(is_live, tl.sum(teacher_entropy, 0), 0.0))
        tl.store(out_ptr + 2 * values_stride, tl.where(is_live, tl.sum(forward_kl, 0), 0.0))
        tl.store(out_ptr + 3 * values_stride, tl.where(is_live, tl.sum(reverse_kl, 0), 0.0))
        tl.store(out_ptr + 4 * values_stride, tl.where(is_live, tl.max(agreement, 0), 0.0))

    if NEEDS_GRAD:
        grad_ptr += row * grad_row_stride
        shift = tl.sum(mean_grad, 0)
        soft_scale = row_weight * weight_soft * inverse_temperature
        hard_scale = row_weight * weight_hard
        for start in range(0, vocab_size, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            is_column = columns < vocab_size
            student = _load_scaled(student_ptr, columns, is_column, inverse_temperature)
            teacher = _load_scaled(teacher_ptr, columns, is_column, inverse_temperature)
            q = tl.exp(student - max_student) / sum_student
            if MODE == _FORWARD_KL:
                grad = q - tl.exp(teacher - max_teacher) / sum_teacher
            elif MODE == _REVERSE_KL:
                grad = q * (-_log_ratio(student, teacher, lse_gap) - shift)
            else:
                ratio = _log_ratio(student, teacher, lse_gap)
                _, w = _log_mixture(ratio, beta)
                grad = q * ((beta - 1.0) * w - shift)
            grad *= soft_scale
            if HAS_LABELS:
                unscaled = _load_scaled(student_ptr, columns, is_column, 1.0)
                hard_grad = tl.exp(unscaled - lse_hard) - (columns == label).to(tl.float32)
                grad += tl.where(is_label, hard_scale, 0.0) * hard_grad
            grad = tl.where(is_live, grad, 0.0).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + columns, grad, mask=is_column)


def jsd_rows_(
    student_logits: Tensor,  # (C, V), unit column stride
    teacher_logits: Tensor,  # (C, V), unit column stride
    grad_logits: Tensor
    | None,  # (C, V), overwritten; may be student_logits; None computes no gradient
    row_weights: Tensor,  # (C,) float32
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (7, C) float32, overwritten: see NUM_ROW_VALUES
    *,
    beta: float,
    temperature: float,
    weight_soft: float,
    weight_hard: float,
    has_metrics: bool,
) -> None:
    """Launch jsd_rows_kernel on every row of a chunk."""
    num_rows, vocab_size = student_logits.shape
    block_v, num_warps = row_block(vocab_size)
    grad = student_logits if grad_logits is None else grad_logits
    jsd_rows_kernel[(num_rows,)](
        student_logits,
        teacher_logits,
        grad,
        row_weights,
        row_weights if labels is None else labels,
        values,
        student_logits.stride(0),
        teacher_logits.stride(0),
        grad.stride(0),
        values.stride(0),
        vocab_size,
        beta,
        1.0 / temperature,
        weight_soft,
        weight_hard,
        MODE={0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(float(beta), JSD),
        HAS_LABELS=labels is not None,
        HAS_METRICS=has_metrics,
        NEEDS_GRAD=grad_logits is not None,
        BLOCK_V=block_v,
        num_warps=num_warps,
    )
