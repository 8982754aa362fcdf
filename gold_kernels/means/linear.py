"""The forward KL of a student whose head is frozen, from a mean of it that the teacher leaves.

N scored rows, D_s and D_t hidden sizes, V vocabulary. P teacher, Q student, h the student's hidden
state, W (V, D_s) and b (V,) its head, s its logit_scale, T its temperature, y the teacher's
likeliest token. The student's logits are linear in h, and so is the only term in which both meet:

    z = s (W h + b) / T,  Q = softmax(z)
    KL(P || Q) = sum_v P_v log P_v - sum_v P_v z_v + lse(z)
               = sum_v P_v log P_v - s ((P W) . h + P . b) / T + lse(z)
    grad_h     = s (Q W - P W) / T

So P W (D_s,), and two numbers, are all that is needed of the teacher: neither its logits, nor its
head. They hold while W and b do. With W_y and b_y taken off both sides,

    KL(P || Q) = -H(P) - s ((P W - W_y) . h + P . b - b_y) / T - log Q_y
    grad_h     = s ((Q - onehot(y)) W - (P W - W_y)) / T

where the entropy, the differences and log Q_y are small together if both models are sure of y. Near
convergence grad_h is a small difference all the same, of two sums over the vocabulary: P W is kept
in float32, and Q W computed from float32 Q, the column of y apart (engine/products.py). In bfloat16
either would have an error of the size of grad_h. The value of the loss has an absolute error: less
than 1e-6 nats on a CPU, about 1e-5 on a GPU, whose tensor cores cut off what they add and so make
every logit 1e-6 of itself too small; P W . h knows nothing of that (benchmarks/NOTES.md).

Heads: any scale, bias and temperature of either side, any softcap of the teacher. Not supported: a
softcap of the student, whose logits are not linear in h; a head that is trained; biases of -inf.
"""

from typing import Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import refuse_slices
from gold_kernels.engine.chunk_plan import Limits, Needs, float_dtype
from gold_kernels.engine.chunking import run_chunks
from gold_kernels.engine.heads import (
    check_head,
    check_head_tensors,
    only_head,
)
from gold_kernels.engine.kinds import check_tensors, has_numbers, is_readable
from gold_kernels.engine.linear_head import LinearHead, first_entries
from gold_kernels.engine.options import Reduction, resolve_options
from gold_kernels.engine.products import Projection
from gold_kernels.engine.shared import Metrics, run_shared
from gold_kernels.means.row_loss import HeadMeans, MeanKL, mean_rows


class MeansOptions(TypedDict, total=False):
    """Options of head_means; logit_scale and final_logit_softcapping are the teacher's."""

    student_bias: Tensor | None  # (V,)
    teacher_bias: Tensor | None  # (V,)
    vocab_size: int | None
    chunk_size: int | None
    budget_bytes: int
    final_logit_softcapping: float | None
    logit_scale: float
    backend: str | None


class MeanKLOptions(TypedDict, total=False):
    """Options of fused_linear_mean_kl; see LinearOptions. logit_scale is the student's."""

    student_bias: Tensor | None  # (V,)
    labels: Tensor | None  # (N,) int64
    label_weights: Tensor | None  # (N,)
    vocab_size: int | None
    chunk_size: int | None
    budget_bytes: int
    logit_scale: float
    backend: str | None
    reduction: Reduction


@torch.compiler.disable(reason="head_means runs outside the graph: call it before")
@torch.no_grad()
def head_means(
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    student_weight: Tensor,  # (V, D_s)
    *,
    temperature: float = 1.0,  # of the teacher
    **options: Unpack[MeansOptions],
) -> HeadMeans:  # float32
    """What fused_linear_mean_kl takes of the teacher, computed once and kept.

    Shapes: teacher_hidden (N, D_t), teacher_weight (V, D_t), student_weight (V, D_s). Returns
    HeadMeans of the N rows, float32.

        means = P W - W_y,  P = softmax(teacher_logits / temperature),  y = argmax P

    student_weight has to be what the student computes with, in its dtype: of a float32 head under
    autocast the rounded one. Under autocast that is done here too. Extra memory is at most
    budget_bytes. Raises ValueError for what does not fit, with the remedy.
    """
    function = "head_means"
    chosen = resolve_options(function, options, MeansOptions)
    refuse_slices(
        function,
        chosen,
        student_weight=student_weight,
        teacher_weight=teacher_weight,
        teacher_hidden=teacher_hidden,
    )
    checks.check_one_temperature(function, temperature)
    check_tensors(function, student_weight=student_weight)
    teacher = only_head("teacher", teacher_hidden, teacher_weight, chosen)
    teacher = check_head(function, "teacher", teacher)
    none = student_weight.new_empty(0, student_weight.shape[-1])  # hidden states, for the check
    student = check_head(function, "student", LinearHead(none, student_weight, chosen.student_bias))
    checks.check_same_kind(function, student.hidden, teacher.hidden)
    chosen = checks.check_options(function, chosen, teacher.hidden)
    sizes = student.weight.shape[0], teacher.weight.shape[0]
    vocab_size = checks.check_vocabulary(function, *sizes, chosen.vocab_size)
    student, teacher = (first_entries(head, vocab_size) for head in (student, teacher))
    check_bias(function, student.bias)
    assert chosen.backend is not None, "check_options names the backend"
    wide, num_rows = float_dtype(teacher.hidden), teacher.num_rows
    numbers = teacher.hidden.new_zeros(2, num_rows, dtype=wide)
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=numbers.device)
    targets = HeadMeans(student.hidden, numbers[0], numbers[1], tokens)
    gradients = run_chunks(
        teacher,
        None,
        # the gradient of -log p(y) for the logits, without what led to them
        numbers.new_full((num_rows, 1), temperature / teacher.logit_scale),
        mean_rows(teacher, chosen.backend, temperature, student.bias, targets),
        Needs(True, False, False),
        Limits(chosen.chunk_size, chosen.budget_bytes, row_bytes=wide.itemsize * 2 * vocab_size),
        projection=Projection(student.weight, num_parts=3, tokens=tokens),
    )
    assert gradients.hidden is not None, "they are needed"
    return targets._replace(means=gradients.hidden)


def check_bias(function: str, bias: Tensor | None) -> None:
    """Waits for the device."""
    if bias is not None and has_numbers(bias) and not bool(bias.isfinite().all()):
        raise ValueError(
            f"{function}: student_bias must be finite, got -inf, inf or NaN, of which no mean can "
            "be taken; leave such entries out with vocab_size, or use fused_linear_jsd."
        )


@overload
def fused_linear_mean_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: HeadMeans,
    row_weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_metrics: Literal[False] = False,
    **options: Unpack[MeanKLOptions],
) -> Tensor: ...


@overload
def fused_linear_mean_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: HeadMeans,
    row_weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_metrics: Literal[True],
    **options: Unpack[MeanKLOptions],
) -> tuple[Tensor, Metrics]: ...


def fused_linear_mean_kl(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s), frozen, the one of head_means
    teacher: HeadMeans,  # of the N rows
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    temperature: float = 1.0,  # of the student; the teacher's is that of head_means
    return_metrics: bool = False,
    **options: Unpack[MeanKLOptions],
) -> Tensor | tuple[Tensor, Metrics]:  # (), float32; (N,) with reduction="none"
    """KL(P || Q) summed over rows with row_weights: fused_linear_jsd with beta = 0, of a student
    whose head is frozen, without the teacher's logits.

    Shapes: student_hidden (N, D_s), student_weight (V, D_s), frozen and the one of head_means,
    row_weights (N,) float32, 1 / N each if None. Returns () float32, in nats; (N,) with
    reduction="none".

        loss = sum_i row_weights[i] * KL(P_i || Q_i)
             + sum_i label_weights[i] * CE_i                             where labels are given

    Supported are any scale, bias and temperature of either side, and any softcap of the teacher.
    Not supported are a softcap of the student, a trained head, biases of -inf. Near convergence the
    value has an absolute error, about 1e-5 nats on a GPU. The gradient goes to student_hidden.
    Extra memory is at most budget_bytes. return_metrics=True returns (loss, dict): loss,
    cross_entropy, teacher_entropy, forward_kl and top1_agreement of every row. Raises ValueError
    for what does not fit, with the remedy.
    """
    function = "fused_linear_mean_kl"
    chosen = resolve_options(function, options, MeanKLOptions, return_metrics=return_metrics)
    sides = {"student_weight": student_weight, "student_hidden": student_hidden}
    refuse_slices(function, chosen, **sides, row_weights=row_weights)
    _check_kind(function, teacher)
    refuse_slices(function, chosen, **teacher._asdict())
    row_loss = MeanKL(temperature, teacher)
    row_loss.check(function)
    student = only_head("student", student_hidden, student_weight, chosen)
    check_head_tensors(function, "student", student)
    _check_frozen(function, student)
    student = check_head(function, "student", student)
    chosen = checks.check_options(function, chosen, student.hidden)
    checks.check_row_weights(function, row_weights, student.hidden)
    checks.check_label_weights(function, chosen, student.hidden)
    _check_means(function, student, teacher)
    v_student = student.weight.shape[0]
    vocab_size = checks.check_vocabulary(function, v_student, v_student, chosen.vocab_size)
    _check_tokens(function, teacher.tokens, vocab_size)
    given = row_weights, chosen, return_metrics, vocab_size
    loss, rows = run_shared(row_loss, student, None, *given)
    return (loss, rows.by_name()) if return_metrics else loss


def _check_frozen(function: str, student: LinearHead) -> None:
    for name, tensor in (("student_weight", student.weight), ("student_bias", student.bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{function}: {name} must be frozen, got requires_grad=True; means of the head "
                "hold while it stays as it is: freeze it, or use fused_linear_jsd with beta=0."
            )


def _check_kind(function: str, teacher: HeadMeans) -> None:
    if not isinstance(teacher, HeadMeans):
        raise ValueError(
            f"{function}: teacher must be HeadMeans, got {type(teacher).__name__}; pass what "
            "head_means returns, or HeadMeans(**...) of its fields."
        )
    check_tensors(
        function, **{f"{name} of the teacher": t for name, t in teacher._asdict().items()}
    )


def _check_tokens(function: str, tokens: Tensor, vocab_size: int) -> None:
    """Looked at on the CPU alone: elsewhere a look would wait for the device."""
    if not is_readable(tokens) or not tokens.shape[0]:
        return
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"{function}: tokens of the teacher must be in [0, {vocab_size}), the entries of the "
            f"head, got {int(tokens.min())} to {int(tokens.max())}; pass head_means of this head "
            "with the same vocab_size."
        )


def _check_means(function: str, student: LinearHead, teacher: HeadMeans) -> None:
    """Shapes, device, and float32, or float64 with float64 hidden states."""
    num_rows, size = student.num_rows, student.hidden.shape[1]
    wide = float_dtype(student.hidden)
    expected = {"means": (num_rows, size), "tokens": (num_rows,)}
    for name, tensor in teacher._asdict().items():
        dtype = torch.int64 if name == "tokens" else wide
        shape = expected.get(name, (num_rows,))
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{function}: {name} of the teacher must be {shape} {dtype}, got "
                f"{tuple(tensor.shape)} {tensor.dtype}; pass head_means(...) of the same rows and "
                "this head, in float32."
            )
        checks.check_device(function, f"{name} of the teacher", tensor, student.hidden)
