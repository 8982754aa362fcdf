"""Losses over one vocabulary: any row loss from hidden states and heads, or from logits.

N scored rows, D hidden size (D_s, D_t), V vocabulary. P teacher, Q student.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

from torch import Tensor, nn
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import (
    linear_options,
    module_options,
    own_rows,
    refuse_slices,
    told,
    with_slices,
)
from gold_kernels.engine.heads import (
    check_heads,
    label_weights_of,
    row_weights_of,
    term_weights,
    unit_stride,
)
from gold_kernels.engine.linear import RowPlan, run_linear_loss
from gold_kernels.engine.linear_head import LinearHead, first_entries
from gold_kernels.engine.logits import run_logits_loss
from gold_kernels.engine.options import (
    CallTensors,
    LinearOptions,
    LossOptions,
    Options,
)
from gold_kernels.engine.overwriting import check_in_place, refuse_overwritten
from gold_kernels.engine.row_loss import CROSS_ENTROPY, RowLoss

Metrics = dict[str, Tensor]  # name -> (N,), unweighted and detached


class RowValues(NamedTuple):
    """Values of every row, and what they are called."""

    names: Sequence[str]
    values: Tensor  # (number of names, N)
    has_labels: bool

    def by_name(self) -> Metrics:
        """Values by name, without a cross-entropy where there were no labels."""
        rows = dict(zip(self.names, self.values.unbind(0), strict=True))
        if not self.has_labels:
            del rows[CROSS_ENTROPY]
        return rows


def shared_linear_loss(
    function: str,  # in whose name errors are raised
    row_loss: RowLoss,
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    row_weights: Tensor | None,  # (N,)
    options: Options,
    has_metrics: bool,
) -> tuple[Tensor, "RowValues"]:
    """Validate, slice the vocabulary, run; behind every public function of one vocabulary."""
    with told(options.process_group, student_hidden, student_weight):
        checks.check_row_loss(function, row_loss, options.backend)
        student, teacher, options = check_heads(
            function, student_hidden, student_weight, teacher_hidden, teacher_weight, options
        )
        row_weights = own_rows(function, "row_weights", row_weights)
        checks.check_pair(function, student.hidden, teacher.hidden)
        checks.check_row_weights(function, row_weights, student.hidden)
        checks.check_label_weights(function, options, student.hidden)
    given = options, (row_weights,), (row_loss, has_metrics)

    def run(student: LinearHead, teacher: LinearHead) -> tuple[Tensor, RowValues]:
        sizes = student.vocab_size, teacher.vocab_size
        vocab_size = checks.check_vocabulary(function, *sizes, options.vocab_size)
        heads = student, first_entries(teacher, vocab_size)
        return run_shared(row_loss, *heads, row_weights, options, has_metrics, vocab_size)

    return with_slices(function, (student, teacher), *given, run)


def run_shared(
    row_loss: RowLoss,
    student: LinearHead,
    teacher: LinearHead | None,  # None: the row loss knows it by its own tensors
    row_weights: Tensor | None,  # (N,)
    options: Options,
    has_metrics: bool,
    vocab_size: int,  # entries of the student's head that take part
) -> tuple[Tensor, RowValues]:
    """Run on what is checked."""
    weights = row_weights_of(row_weights, student.num_rows, student.hidden, options)
    label_weights = label_weights_of(vocab_size, student.hidden, options)
    labels = None if options.labels is None else options.labels.contiguous()
    plan = RowPlan(term_weights(weights, label_weights), labels)
    loss, values = run_linear_loss(
        row_loss, student, teacher, plan, options, has_metrics, vocab_size
    )
    return loss, RowValues(row_loss.value_names, values, labels is not None)


def shared_logits_loss(
    function: str,
    row_loss: RowLoss,
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    row_weights: Tensor | None,  # (N,)
    options: Options,
    has_metrics: bool,
    in_place: bool,
) -> tuple[Tensor, "RowValues"]:
    """The same for logits that the caller holds; padded columns get gradient 0."""
    checks.check_row_loss(function, row_loss, options.backend)
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    refuse_slices(function, options, row_weights=row_weights, **logits)
    checks.check_logits(function, student_logits, teacher_logits, row_weights)
    refuse_overwritten(function, **logits)
    options = checks.check_options(function, options, student_logits)
    checks.check_label_weights(function, options, student_logits)
    sizes = student_logits.shape[1], teacher_logits.shape[1]
    vocab_size = checks.check_vocabulary(function, *sizes, options.vocab_size)
    check_in_place(function, in_place, student_logits, vocab_size, teacher_logits)
    row_weights = row_weights_of(row_weights, student_logits.shape[0], student_logits, options)
    label_weights = label_weights_of(vocab_size, student_logits, options)
    loss, values = run_logits_loss(
        row_loss,
        unit_stride(student_logits[:, :vocab_size]),
        unit_stride(teacher_logits[:, :vocab_size]),
        term_weights(row_weights, label_weights),
        options,
        has_metrics,
        in_place,
    )
    return loss, RowValues(row_loss.value_names, values, options.labels is not None)


@overload
def fused_linear_loss(
    row_loss: RowLoss,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def fused_linear_loss(
    row_loss: RowLoss,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    row_weights: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Metrics]: ...


def fused_linear_loss(
    row_loss: RowLoss,
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    return_metrics: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, Metrics]:  # (), float32; (N,) with reduction="none"
    """Any row loss over one vocabulary, from hidden states and heads, without full logits.

    Shapes: student_hidden (N, D_s), student_weight (V, D_s), teacher_hidden (N, D_t),
    teacher_weight (V, D_t), row_weights (N,) float32, 1 / N each if None. Returns () float32;
    (N,) with reduction="none". N scored rows, V vocabulary, D hidden sizes.

        loss = sum_i row_weights[i] * row_loss(student_logits_i, teacher_logits_i)
             + sum_i label_weights[i] * CE_i                                 where labels are given
        logits = softcap(logit_scale * (hidden weight^T + bias)),  softcap(x) = c tanh(x / c)

    row_loss is an object of gold_kernels.losses, for instance SkewKL(alpha=0.1). The normaliser is
    the caller's: pass 1 / num_items of the global batch for a mean that any split into
    micro-batches and ranks leaves alone. Gradients go to student_hidden, student_weight and
    student_bias, never to the teacher. Rows of weight 0 contribute exactly 0 and may hold anything.

    Options are those of LossOptions and CallTensors in gold_kernels.engine.options, which say what
    each does. Extra memory is at most budget_bytes, plus one float32 student_weight if a 16-bit one
    needs a gradient. reduction="none" returns row_weights[i] * row_loss_i (None: 1 each) plus the
    weighted cross-entropy of each row, (N,); with a trained head its backward pass makes the logits
    once more.

    With process_group both heads are this process' slices of the vocabulary, and so is the gradient
    of the student's; everything else is the same on all processes of the group.

    return_metrics=True returns (loss, dict): unweighted, detached values of every row by name.
    Not supported: a second derivative, torch.func transforms. Raises ValueError for shapes, dtypes,
    devices and numbers that do not fit, with the remedy.
    """
    function = "fused_linear_loss"
    loss, rows = shared_linear_loss(
        function,
        row_loss,
        *(student_hidden, student_weight, teacher_hidden, teacher_weight, row_weights),
        linear_options(
            function, options, student_hidden, student_weight, return_metrics=return_metrics
        ),
        return_metrics,
    )
    return (loss, rows.by_name()) if return_metrics else loss


class FusedLinearLoss(nn.Module):
    """fused_linear_loss as a module: a row loss and options once, tensors at every call."""

    def __init__(
        self,
        row_loss: RowLoss,
        *,
        return_metrics: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        checks.check_module("FusedLinearLoss", options, return_metrics=return_metrics)
        checks.check_row_loss("FusedLinearLoss", row_loss, options.get("backend"))
        self.row_loss = row_loss
        self.return_metrics = return_metrics
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,  # (N, D_s)
        student_weight: Tensor,  # (V, D_s)
        teacher_hidden: Tensor,  # (N, D_t)
        teacher_weight: Tensor,  # (V, D_t)
        row_weights: Tensor | None = None,  # (N,)
        **tensors: Unpack[CallTensors],
    ) -> Tensor | tuple[Tensor, Metrics]:
        """Tensors, shapes and what is returned as in fused_linear_loss."""
        name = "FusedLinearLoss"
        loss, rows = shared_linear_loss(
            name,
            self.row_loss,
            *(student_hidden, student_weight, teacher_hidden, teacher_weight, row_weights),
            module_options(name, self.options, tensors, student_hidden, student_weight),
            self.return_metrics,
        )
        return (loss, rows.by_name()) if self.return_metrics else loss
