"""The public functions of the generalized JSD: from hidden states and heads, and from logits.

N scored rows, D_s and D_t hidden sizes, V vocabulary. P teacher, Q student.
"""

from typing import Any, Literal, NamedTuple, overload

from torch import Tensor
from typing_extensions import Unpack

from gold_kernels.engine.agreement import linear_options
from gold_kernels.engine.options import LinearOptions, LogitsOptions, PerSide, resolve_options
from gold_kernels.engine.row_loss import CROSS_ENTROPY
from gold_kernels.engine.shared import Metrics, shared_linear_loss, shared_logits_loss
from gold_kernels.jsd.row_loss import JSD


class JSDMetrics(NamedTuple):
    """Unweighted values of every scored row, detached, (N,) float32 each; entropies, divergences
    and the cross-entropy in nats.

    forward_kl is KL(P || Q), reverse_kl KL(Q || P). top1_agreement is 1 where some token is the
    most likely one on both sides, else 0. cross_entropy is None without labels.
    """

    loss: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor  # KL(P || Q)
    reverse_kl: Tensor  # KL(Q || P)
    top1_agreement: Tensor  # 1 where some token is the most likely one on both sides, else 0
    cross_entropy: Tensor | None = None  # of the labels; None without labels

    @classmethod
    def from_rows(cls, rows: Metrics) -> "JSDMetrics":
        fields: dict[str, Any] = {CROSS_ENTROPY: None, **rows}
        return cls(**fields)


@overload
def fused_linear_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: PerSide = 1.0,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def fused_linear_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: PerSide = 1.0,
    return_metrics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, JSDMetrics]: ...


def fused_linear_jsd(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    beta: float = 0.5,
    temperature: PerSide = 1.0,  # of both sides, or (student, teacher)
    return_metrics: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, JSDMetrics]:  # (), float32; (N,) with reduction="none"
    """Generalized JSD of teacher P and student Q, summed over rows with row_weights, without full
    logits.

    Shapes: student_hidden (N, D_s), student_weight (V, D_s), teacher_hidden (N, D_t),
    teacher_weight (V, D_t), row_weights (N,) float32, 1 / N each if None. Returns () float32, in
    nats; (N,) with reduction="none". N scored rows, V vocabulary, D hidden sizes.

        loss = sum_i row_weights[i] * (beta KL(P_i || M_i) + (1 - beta) KL(Q_i || M_i))
             + sum_i label_weights[i] * CE_i                             where labels are given
        M = beta P + (1 - beta) Q,  Q = softmax(student_hidden student_weight^T / temperature),  P
        likewise

    as in GKD (Agarwal et al. 2023, arXiv 2306.13649, section 2); beta = 0 means KL(P || Q), beta =
    1 KL(Q || P). The cross-entropy is taken at temperature 1. Options are student_bias,
    teacher_bias, labels, label_weights, vocab_size, chunk_size, budget_bytes, logits_dtype,
    final_logit_softcapping, logit_scale, backend, reduction, process_group (heads are then slices
    of the vocabulary). LossOptions and CallTensors in gold_kernels.engine.options say what they do,
    fused_linear_loss what memory is taken and where gradients go.

    logits_dtype=torch.bfloat16 is faster and wrong near convergence: with a teacher that is the
    student with 1 % of noise the loss is a tenth off and the gradient half.

    A column masked with -inf on both sides is left out; masked on one side it has probability 0
    there, which costs at most 1e6 nats for beta 0 or 1 (log 0 is taken as -1e6) and log 2 or so
    between.

    return_metrics=True returns (loss, JSDMetrics). Not supported: a second derivative, torch.func
    transforms. Raises ValueError for shapes, dtypes, devices and numbers that do not fit, with the
    remedy.
    """
    function = "fused_linear_jsd"
    loss, rows = shared_linear_loss(
        function,
        JSD(beta, temperature),
        *(student_hidden, student_weight, teacher_hidden, teacher_weight, row_weights),
        linear_options(
            function, options, student_hidden, student_weight, return_metrics=return_metrics
        ),
        return_metrics,
    )
    return (loss, JSDMetrics.from_rows(rows.by_name())) if return_metrics else loss


@overload
def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: PerSide = 1.0,
    in_place: bool = False,
    return_metrics: Literal[False] = False,
    **options: Unpack[LogitsOptions],
) -> Tensor: ...


@overload
def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: PerSide = 1.0,
    in_place: bool = False,
    return_metrics: Literal[True],
    **options: Unpack[LogitsOptions],
) -> tuple[Tensor, JSDMetrics]: ...


def jsd_loss(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    beta: float = 0.5,
    temperature: PerSide = 1.0,  # of both sides, or (student, teacher)
    in_place: bool = False,
    return_metrics: bool = False,
    **options: Unpack[LogitsOptions],
) -> Tensor | tuple[Tensor, JSDMetrics]:  # (), float32; (N,) with reduction="none"
    """Generalized JSD of teacher P and student Q from logits, the meaning of fused_linear_jsd.

    Shapes: student_logits (N, V), teacher_logits (N, V), row_weights (N,) float32, 1 / N each if
    None. Returns () float32, in nats; (N,) with reduction="none".

        loss = sum_i row_weights[i] * (beta KL(P_i || M_i) + (1 - beta) KL(Q_i || M_i))

    (Agarwal et al. 2023, arXiv 2306.13649, section 2.) Gradients go to student_logits only. Softmax
    and loss are float32; logits that are bf16 have already lost what matters near convergence:
    prefer fused_linear_jsd, which never rounds them. Options: vocab_size, labels, label_weights,
    backend, reduction.

    in_place=True overwrites student_logits with their gradient, so that nothing of size (N, V) is
    allocated; do not read them afterwards, and call backward once. Of several losses of the same
    logits the last alone may be in place: later ones are refused. Under torch.compile the logits
    stay as they are, and the gradient is allocated. Padded columns (vocab_size) get gradient 0. Not
    supported: a second derivative. Raises ValueError for shapes, dtypes, devices and numbers that
    do not fit.
    """
    function = "jsd_loss"
    loss, rows = shared_logits_loss(
        function,
        JSD(beta, temperature),
        *(student_logits, teacher_logits, row_weights),
        resolve_options(
            function, options, LogitsOptions, in_place=in_place, return_metrics=return_metrics
        ),
        return_metrics,
        in_place,
    )
    return (loss, JSDMetrics.from_rows(rows.by_name())) if return_metrics else loss
