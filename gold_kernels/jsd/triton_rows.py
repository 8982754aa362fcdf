"""Generalized JSD of logit rows and its gradient, one program a row, two or three passes over it.

C rows of a chunk, V vocabulary. With r = log p - log q (temperature applied):

    loss = sum_v beta p (log p - log m) + (1 - beta) q (log q - log m)
    grad = q (g - sum q g) / temperature,  g = (1 - beta) (log q - log m)
    beta 0: loss = sum p r + (q - p), grad = (q - p) / T
    beta 1: loss = sum -q r + (p - q), g = -r; columns at the floor of log p are summed apart

beta 1/2 is written from the larger of p and q, so that the only exponential of r is E = exp(-|r|)
in (0, 1] and u = log m - log max(p, q) = log1p((E - 1) / 2), its argument in [-1/2, 0], is a short
polynomial instead of a logarithm.

Everything hangs on r, taken from the difference of both logits, which is exact where the two
distributions are close, and not from log-probabilities, numbers near -12: near convergence that is
ten times the precision at the same cost. The terms q - p sum to zero and cancel the first-order
effect of the rounding of both log-sum-exps. Inside the kernel logarithms are in bits, since exp2 is
one instruction and exp four.

Pass 1 takes both log-sum-exps, pass 2 the loss, sum q g and the metrics, pass 3 writes the
gradient. The two KL divergences (beta 0 and 1) need no pass 3 where no column is masked: the
gradient of the first hangs on the log-sum-exps alone, and sum q g of the second is the mean of a
difference of logits, which pass 1 takes beside the student's log-sum-exp.

Blocks are two-dimensional: a line is what a few threads load at once, so that each sums its line
alone and carries one number for it; threads meet once at the end of a pass.
"""

import triton
import triton.language as tl
from torch import Tensor

from gold_kernels.triton.launch import ANY_ROWS, is_over, row_block
from gold_kernels.triton.lines import BITS, NATS, kl_entries
from gold_kernels.triton.shared_rows import load_pair, open_row, store_gradient

LOG_ZERO = tl.constexpr(-1e6 * 1.4426950408889634)
MAX_LOG_RATIO = tl.constexpr(115.0)  # bits: either p or q is then below 1e-34

FORWARD_KL, REVERSE_KL, JSD, SYMMETRIC_JSD = 0, 1, 2, 3
_FORWARD_KL = tl.constexpr(FORWARD_KL)
_REVERSE_KL = tl.constexpr(REVERSE_KL)
_JSD = tl.constexpr(JSD)
_SYMMETRIC_JSD = tl.constexpr(SYMMETRIC_JSD)


@triton.jit
def _log1p_half(z):
    """log2(1 + z) on [-1/2, 0]: minimax polynomial of log2(1 + z) / z, relative error 2.3e-8."""
    series = 2.0790792 * z + 2.4465395
    series = series * z + 1.814434
    series = series * z + 0.29364465
    series = series * z + 0.38896899
    series = series * z - 0.35029368
    series = series * z + 0.48142822
    series = series * z - 0.72133721
    series = series * z + 1.442695
    return series * z


@triton.jit
def _symmetric_entries(ratio, student, teacher, per_student, per_teacher, bits):
    """q, p, loss and log q - log m of every entry for beta = 1/2, from the larger of p and q."""
    is_teacher = ratio > 0.0
    gap = -tl.abs(ratio)
    small_over_big = tl.exp2(gap)
    big = tl.exp2(tl.where(is_teacher, teacher, student) * bits)
    big *= tl.where(is_teacher, per_teacher, per_student)
    small = big * small_over_big
    excess = 0.5 * small_over_big - 0.5
    u = _log1p_half(excess)
    loss = big * (0.5 * small_over_big * gap - u * (1.0 + excess))
    q, p = tl.where(is_teacher, small, big), tl.where(is_teacher, big, small)
    return q, p, loss, tl.where(is_teacher, gap, 0.0) - u


@triton.jit
def mixture_entries(q, p, ratio, betas):
    """Loss and log q - log m for 0 < beta < 1, in bits, from the side with the larger weight in m,
    so that neither end of beta cancels.
    """
    beta, one_minus_beta = betas  # both from the host: 1 - beta in float32 has lost a beta near 1
    is_student = beta <= 0.5
    weight = tl.where(is_student, beta, one_minus_beta)
    log_other = tl.where(is_student, ratio, -ratio)
    log_other = tl.minimum(tl.maximum(log_other, -MAX_LOG_RATIO), MAX_LOG_RATIO)
    other_over_base = tl.exp2(log_other)
    mixture = (1.0 - weight) + weight * other_over_base
    # log1p where mixture is near 1: the first-order term of what rounding took from its excess
    excess = weight * (other_over_base - 1.0)
    lost = tl.where(tl.abs(excess) < 0.5, excess - (mixture - 1.0), 0.0)
    u = tl.log2(mixture) + lost * BITS
    base, other = tl.where(is_student, q, p), tl.where(is_student, p, q)
    loss = weight * other * (log_other - u) - (1.0 - weight) * base * u
    return loss, tl.where(is_student, -u, log_other - u)


@triton.jit
def jsd_entries(
    student, teacher, row_sums, bits, betas, MODE: tl.constexpr, HAS_MASKS: tl.constexpr
):
    """q, p, log p - log q, loss and pull of every entry, in bits; a logit of 1 is worth bits. The
    pull is log q - log m (beta 1: log q - log p; beta 0: the p of a masked column, else 0).
    """
    lse_gap, max_student, max_teacher, per_student, per_teacher = row_sums
    ratio = (teacher - student) * bits - lse_gap
    student -= max_student
    teacher -= max_teacher
    if MODE == _SYMMETRIC_JSD:
        q, p, loss, pull = _symmetric_entries(
            ratio, student, teacher, per_student, per_teacher, bits
        )
        ratio = tl.minimum(tl.maximum(ratio, LOG_ZERO), -LOG_ZERO)
        return q, p, ratio, loss, pull
    q = tl.exp2(student * bits) * per_student
    p = tl.exp2(teacher * bits) * per_teacher
    ratio = tl.minimum(tl.maximum(ratio, LOG_ZERO), -LOG_ZERO)
    if MODE == _FORWARD_KL:
        pull = p
        if HAS_MASKS:  # p log q has no slope where log q is the floor of a masked column
            pull = tl.where(student * bits <= LOG_ZERO, p, 0.0)
        return q, p, ratio, kl_entries(p, q, ratio), pull
    if MODE == _REVERSE_KL:
        return q, p, ratio, kl_entries(q, p, -ratio), -ratio
    loss, pull = mixture_entries(q, p, ratio, betas)
    return q, p, ratio, loss, pull


@triton.jit
def sums_of_row(max_student, sum_student, max_teacher, sum_teacher, bits):
    """What jsd_entries takes."""
    lse_gap = (max_teacher - max_student) * bits + (tl.log2(sum_teacher) - tl.log2(sum_student))
    return lse_gap, max_student, max_teacher, 1.0 / sum_student, 1.0 / sum_teacher


@triton.jit
def scale_of_row(row_weight, inverse_temperature, one_minus_beta, MODE: tl.constexpr):
    """By what the gradient's pulls are multiplied."""
    scale = row_weight * inverse_temperature
    if MODE != _FORWARD_KL:
        scale *= NATS
        if MODE != _REVERSE_KL:
            scale *= one_minus_beta
    return scale


@triton.jit
def add_pulls(sums, q, ratio, pull, MODE: tl.constexpr):
    """Sums of lines, mean pull, q of columns at the floor of log p, q of the others, with those of
    a block. 1e6 in one sum with the other pulls would cost float32 all the others.
    """
    mean_pull, floored, rest = sums
    if MODE == _REVERSE_KL:
        is_floored = ratio <= LOG_ZERO
        floored += tl.sum(tl.where(is_floored, q, 0.0), axis=1)
        rest += tl.sum(tl.where(is_floored, 0.0, q), axis=1)
        pull = tl.where(is_floored, 0.0, pull)
    mean_pull += tl.sum(pull if MODE == _FORWARD_KL else q * pull, axis=1)
    return mean_pull, floored, rest


@triton.jit
def add_metrics(sums, q, p, ratio, student, teacher):
    """Sums of lines, mean logit over q, over p, both KL divergences, with those of a block."""
    student_mean, teacher_mean, forward_kl, reverse_kl = sums
    student_mean += tl.sum(q * student, axis=1)
    teacher_mean += tl.sum(p * teacher, axis=1)
    forward_kl += tl.sum(kl_entries(p, q, ratio), axis=1)
    reverse_kl += tl.sum(kl_entries(q, p, -ratio), axis=1)
    return student_mean, teacher_mean, forward_kl, reverse_kl


@triton.jit
def _store_metrics(out_ptr, stride, sums, top_sum, log_sums, bits, is_live):
    """Entropies, both KL divergences and whether the likeliest tokens agree, from sums of lines."""
    student_entropy = log_sums[0] - tl.sum(sums[0], 0) * bits
    teacher_entropy = log_sums[1] - tl.sum(sums[1], 0) * bits
    agreement = (tl.max(top_sum, 0) == 0.0).to(tl.float32)  # one column has both maxima
    tl.store(out_ptr, tl.where(is_live, student_entropy * NATS, 0.0))
    tl.store(out_ptr + stride, tl.where(is_live, teacher_entropy * NATS, 0.0))
    tl.store(out_ptr + 2 * stride, tl.where(is_live, tl.sum(sums[2], 0) * NATS, 0.0))
    tl.store(out_ptr + 3 * stride, tl.where(is_live, tl.sum(sums[3], 0) * NATS, 0.0))
    tl.store(out_ptr + 4 * stride, tl.where(is_live, agreement, 0.0))


@triton.jit
def write_gradient(
    student_ptr,
    teacher_ptr,
    grad_ptr,
    vocab_size,
    teacher_scale,
    row_sums,
    bits,
    betas,
    pull_sums,  # mean pull, q of columns at the floor of log p, q of the others
    soft_scale,
    row_terms,
    softcap,
    MODE: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    """Pass 3."""
    mean_pull = pull_sums[0]
    floored, rest = -LOG_ZERO * pull_sums[1], -LOG_ZERO * pull_sums[2]
    for start in range(0, vocab_size, BLOCK_V):
        columns, is_column, student, teacher = load_pair(
            student_ptr, teacher_ptr, start, vocab_size, teacher_scale, HAS_PAIR, BLOCK_V, LINE
        )
        if IS_PACKED:  # what is stored below lies over what was read here and before
            tl.debug_barrier()
        q, p, ratio, _, pull = jsd_entries(student, teacher, row_sums, bits, betas, MODE, HAS_MASKS)
        if MODE == _REVERSE_KL:
            pull = tl.where(ratio <= LOG_ZERO, rest, pull - floored)
        grad = q * (pull - mean_pull)
        if MODE == _FORWARD_KL:
            grad = q * (1.0 - mean_pull) - (p - pull)
        store_gradient(
            grad_ptr, grad * soft_scale, student, columns, is_column, row_terms, softcap,
            HAS_LABELS, HAS_SOFTCAP,
        )  # fmt: skip


@triton.jit(**ANY_ROWS)
def jsd_rows_kernel(
    student_ptr,  # (C, V) logits
    teacher_ptr,  # (C, V) logits
    grad_ptr,  # (C, V) overwritten with the gradient; may be student_ptr, and IS_PACKED over it
    weights_ptr,  # (C, T) float32: of the loss and, if HAS_LABELS, of the cross-entropy
    labels_ptr,  # (C,) int64, read if HAS_LABELS
    values_ptr,  # (7, C) float32, overwritten with the unweighted values of each row
    student_row_stride,
    teacher_row_stride,
    grad_row_stride,
    values_stride,
    vocab_size,
    beta,
    one_minus_beta,
    inverse_temperature,
    teacher_scale,
    softcap,
    MODE: tl.constexpr,
    HAS_PAIR: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_METRICS: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    IS_PACKED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 from 14k rows at V = 152k
    student_ptr += row * student_row_stride
    teacher_ptr += row * teacher_row_stride
    values_ptr += row
    bits = inverse_temperature * BITS
    IS_ONE_SIDED: tl.constexpr = MODE != _JSD and MODE != _SYMMETRIC_JSD and not HAS_MASKS
    HAS_GAP: tl.constexpr = IS_ONE_SIDED and MODE == _REVERSE_KL
    offset = 0.0
    if HAS_GAP:
        offset = tl.load(student_ptr).to(tl.float32)
        offset -= tl.load(teacher_ptr).to(tl.float32) * teacher_scale
    row_weight, max_student, sum_student, max_teacher, sum_teacher, mean_gap, row_terms = open_row(
        student_ptr, teacher_ptr, weights_ptr, labels_ptr, values_ptr, values_stride, row,
        vocab_size, bits, teacher_scale, offset, HAS_PAIR, HAS_LABELS, HAS_GAP, BLOCK_V, LINE,
    )  # fmt: skip
    is_live = row_terms[0]
    row_sums = sums_of_row(max_student, sum_student, max_teacher, sum_teacher, bits)
    betas = (beta, one_minus_beta)
    soft_scale = scale_of_row(row_weight, inverse_temperature, one_minus_beta, MODE)
    grad_ptr += row * grad_row_stride
    lines = tl.zeros([BLOCK_V // LINE], dtype=tl.float32)
    loss, pulls, metrics = lines, (lines, lines, lines), (lines, lines, lines, lines)
    top_sum = lines - 1e30
    for start in range(0, vocab_size, BLOCK_V):
        columns, is_column, student, teacher = load_pair(
            student_ptr, teacher_ptr, start, vocab_size, teacher_scale, HAS_PAIR, BLOCK_V, LINE
        )
        if IS_PACKED and IS_ONE_SIDED:
            tl.debug_barrier()
        q, p, ratio, entry_loss, pull = jsd_entries(
            student, teacher, row_sums, bits, betas, MODE, HAS_MASKS
        )
        loss += tl.sum(entry_loss, axis=1)
        if IS_ONE_SIDED:
            if NEEDS_GRAD:
                grad = q - p
                if HAS_GAP:
                    grad = q * (((student - teacher) - offset) - mean_gap) * bits
                store_gradient(
                    grad_ptr, grad * soft_scale, student, columns, is_column, row_terms, softcap,
                    HAS_LABELS, HAS_SOFTCAP,
                )  # fmt: skip
        else:
            pulls = add_pulls(pulls, q, ratio, pull, MODE)
        if HAS_METRICS:
            student -= max_student
            teacher -= max_teacher
            metrics = add_metrics(metrics, q, p, ratio, student, teacher)
            top_sum = tl.maximum(top_sum, tl.max(student + teacher, axis=1))

    tl.store(values_ptr, tl.where(is_live, tl.sum(loss, 0) * NATS, 0.0))
    if HAS_METRICS:
        log_sums = (tl.log2(sum_student), tl.log2(sum_teacher))
        _store_metrics(
            values_ptr + 2 * values_stride, values_stride, metrics, top_sum, log_sums, bits, is_live
        )
    if NEEDS_GRAD and not IS_ONE_SIDED:
        pull_sums = (tl.sum(pulls[0], 0), tl.sum(pulls[1], 0), tl.sum(pulls[2], 0))
        write_gradient(
            student_ptr, teacher_ptr, grad_ptr, vocab_size, teacher_scale, row_sums, bits, betas,
            pull_sums, soft_scale, row_terms, softcap, MODE, HAS_PAIR, HAS_MASKS, HAS_LABELS,
            HAS_SOFTCAP, IS_PACKED, BLOCK_V, LINE,
        )  # fmt: skip


def mode_of(beta: float) -> int:
    return {0.0: FORWARD_KL, 1.0: REVERSE_KL, 0.5: SYMMETRIC_JSD}.get(float(beta), JSD)


def jsd_rows_(
    student_logits: Tensor,  # (C, V), unit column stride
    teacher_logits: Tensor,  # (C, V), unit column stride
    grad_logits: Tensor
    | None,  # (C, V), overwritten; may be student_logits; None computes no gradient
    weights: Tensor,  # (C, T) float32, contiguous: of the loss and, with labels, of cross-entropy
    labels: Tensor | None,  # (C,) int64
    values: Tensor,  # (7, C) float32, overwritten, in the order of JSD.value_names
    *,
    beta: float,
    temperatures: tuple[float, float],  # student, teacher
    softcap: float | None,
    has_metrics: bool,
    has_masks: bool,  # logits may be -inf
) -> None:
    """Launch jsd_rows_kernel on every row of a chunk. softcap: the student's logits went through
    softcap tanh(x / softcap), the gradient is that of x.
    """
    num_rows, vocab_size = student_logits.shape
    block_v, line, num_warps = row_block(vocab_size, student_logits.dtype)
    grad = student_logits if grad_logits is None else grad_logits
    jsd_rows_kernel[(num_rows,)](
        student_logits,
        teacher_logits,
        grad,
        weights,
        weights if labels is None else labels,
        values,
        student_logits.stride(0),
        teacher_logits.stride(0),
        grad.stride(0),
        values.stride(0),
        vocab_size,
        beta,
        1.0 - beta,
        1.0 / temperatures[0],
        temperatures[0] / temperatures[1],
        1.0 if softcap is None else softcap,
        MODE=mode_of(beta),
        HAS_PAIR=temperatures[0] != temperatures[1],
        HAS_LABELS=labels is not None,
        HAS_METRICS=has_metrics,
        HAS_MASKS=has_masks,
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRAD=grad_logits is not None,
        IS_PACKED=is_over(grad, student_logits),
        BLOCK_V=block_v,
        LINE=line,
        num_warps=num_warps,
    )
