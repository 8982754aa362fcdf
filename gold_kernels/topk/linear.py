"""The public function of the loss of a teacher's top k: from hidden states and head of the student.

N scored rows, k entries a row, D hidden size, V vocabulary. P teacher, Q student.
"""

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import (
    linear_options,
    own_heads,
    own_rows,
    told,
    with_slices,
)
from gold_kernels.engine.chunk_plan import float_dtype
from gold_kernels.engine.heads import (
    check_head,
    check_head_tensors,
    only_head,
)
from gold_kernels.engine.kinds import check_tensors, is_readable
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.options import Reduction
from gold_kernels.engine.shared import Metrics, RowValues, run_shared
from gold_kernels.topk.row_loss import TopK

if TYPE_CHECKING:  # a build without distributed has no such class
    from torch.distributed import ProcessGroup

LARGEST_SUM = 1.05  # of a row's probabilities; log-probabilities of 16 bits are 1 % off


class TopKOptions(TypedDict, total=False):
    """Options of fused_linear_top_k; see LinearOptions. They are the student's."""

    student_bias: Tensor | None  # (V,)
    labels: Tensor | None  # (N,) int64
    label_weights: Tensor | None  # (N,)
    vocab_size: int | None
    chunk_size: int | None
    budget_bytes: int
    logits_dtype: torch.dtype | None
    final_logit_softcapping: float | None
    logit_scale: float
    backend: str | None
    reduction: Reduction
    process_group: "ProcessGroup | None"


@overload
def fused_linear_top_k(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    return_metrics: Literal[False] = False,
    **options: Unpack[TopKOptions],
) -> Tensor: ...


@overload
def fused_linear_top_k(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    return_metrics: Literal[True],
    **options: Unpack[TopKOptions],
) -> tuple[Tensor, Metrics]: ...


def fused_linear_top_k(
    student_hidden: Tensor,  # (N, D)
    student_weight: Tensor,  # (V, D)
    teacher_ids: Tensor,  # (N, k) int64, different in a row; negative for none
    teacher_log_probs: Tensor,  # (N, k) float, at the teacher's temperature
    row_weights: Tensor | None = None,  # (N,), float32; None means 1 / N each
    *,
    beta: float = 0.0,
    temperature: float = 1.0,  # of the student
    return_metrics: bool = False,
    **options: Unpack[TopKOptions],
) -> Tensor | tuple[Tensor, Metrics]:  # (), float32; (N,) with reduction="none"
    """Generalized JSD of k + 1 outcomes, from log-probabilities that a server or a file has.

    Shapes: student_hidden (N, D), student_weight (V, D), teacher_ids (N, k) int64, different in a
    row, negative for none; teacher_log_probs (N, k) float, at the teacher's temperature;
    row_weights (N,) float32, 1 / N each if None. Returns () float32, in nats; (N,) with
    reduction="none".

        loss = sum_i row_weights[i] * JSD_beta(P_i, Q_i) + sum_i label_weights[i] * CE_i

    over the teacher's k entries and one outcome for all others, 1 minus their sum on either side:
    no mass is left out, and nothing is renormalised. beta as in fused_linear_jsd; k = V - 1 or more
    is that loss. Log-probabilities whose sum exceeds 1 by rounding count as a rest of 1e-18; on a
    CPU sums above 1.05, as of logits, are refused, and so are ids that come twice in a row.

    The gradient goes to student_hidden, student_weight and student_bias. Rows of weight 0 may hold
    anything. Extra memory is at most budget_bytes, plus one float32 student_weight if a 16-bit one
    needs a gradient. Rows with labels at a temperature, and those of k above V / 4, run in torch on
    a GPU too. return_metrics=True returns (loss, dict): loss, cross_entropy, student_top_mass and
    teacher_top_mass of every row. Raises ValueError for what does not fit.
    """
    function = "fused_linear_top_k"
    chosen = linear_options(
        function,
        options,
        student_hidden,
        student_weight,
        TopKOptions,
        return_metrics=return_metrics,
    )
    head = only_head("student", student_hidden, student_weight, chosen)
    with told(chosen.process_group, student_hidden, student_weight):
        TopK(beta, temperature).check(function)
        check_head_tensors(function, "student", head)
        (head,), chosen = own_heads(function, (head,), chosen)
        student = check_head(function, "student", head, chosen.process_group is not None)
        chosen = checks.check_options(function, chosen, student.hidden)
        row_weights = own_rows(function, "row_weights", row_weights)
        checks.check_row_weights(function, row_weights, student.hidden)
        checks.check_label_weights(function, chosen, student.hidden)
        teacher_ids = own_rows(function, "teacher_ids", teacher_ids)
        teacher_log_probs = own_rows(function, "teacher_log_probs", teacher_log_probs)
        check_tensors(function, teacher_ids=teacher_ids, teacher_log_probs=teacher_log_probs)
        _check_targets(function, student.hidden, teacher_ids, teacher_log_probs)
    settings, tensors = (beta, temperature, return_metrics), (row_weights, teacher_log_probs)
    ids = teacher_ids
    if row_weights is not None:  # a row of weight 0 may hold anything, on each process another
        ids = torch.where((row_weights != 0).unsqueeze(1), ids, -1)

    def run(student: LinearHead) -> tuple[Tensor, RowValues]:
        v_student = student.vocab_size
        vocab_size = checks.check_vocabulary(function, v_student, v_student, chosen.vocab_size)
        _check_entries(function, ids, teacher_log_probs, vocab_size)
        log_probs = teacher_log_probs.detach().to(float_dtype(student.hidden))
        row_loss = TopK(beta, temperature, [ids, log_probs])
        return run_shared(row_loss, student, None, row_weights, chosen, return_metrics, vocab_size)

    loss, rows = with_slices(function, (student,), chosen, tensors, settings, run, (ids,))
    return (loss, rows.by_name()) if return_metrics else loss


def _check_targets(function: str, hidden: Tensor, ids: Tensor, log_probs: Tensor) -> None:
    shapes = tuple(ids.shape), tuple(log_probs.shape)
    is_pair = ids.ndim == 2 and shapes[0] == shapes[1] and shapes[0][0] == hidden.shape[0]
    kinds = ids.dtype == torch.int64 and log_probs.is_floating_point()
    if not (is_pair and kinds and shapes[0][1]):
        raise ValueError(
            f"{function}: teacher_ids and teacher_log_probs must be (N, k) int64 and float with "
            f"N={hidden.shape[0]} and k of at least 1, got {shapes[0]} {ids.dtype} and "
            f"{shapes[1]} {log_probs.dtype}; pad rows with fewer entries with id -1."
        )
    checks.check_device(function, "teacher_ids", ids, hidden)
    checks.check_device(function, "teacher_log_probs", log_probs, hidden)


def _check_entries(function: str, ids: Tensor, log_probs: Tensor, vocab_size: int) -> None:
    """They are looked at on the CPU alone: elsewhere a look would wait for the device."""
    if not is_readable(ids) or not ids.numel():
        return
    if int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{function}: teacher_ids must be below {vocab_size}, the rows of the head, got "
            f"{int(ids.max())}; they are token ids of the student's tokenizer."
        )
    _check_distribution(function, ids, log_probs)


def _check_distribution(function: str, ids: Tensor, log_probs: Tensor) -> None:
    """Different entries of a row whose probabilities add up to 1 at most."""
    is_entry = ids >= 0
    ordered = torch.where(is_entry, ids, -1).sort(1).values
    is_twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(is_twice.any()):
        row, place = is_twice.nonzero()[0].tolist()
        raise ValueError(
            f"{function}: teacher_ids must differ in a row, got {int(ordered[row, place])} twice "
            f"in row {row}; pad rows with fewer entries with id -1."
        )
    sums = torch.where(is_entry, log_probs.float().exp(), 0).sum(1)
    if bool((sums > LARGEST_SUM).any()):
        row = int((sums > LARGEST_SUM).nonzero()[0])
        raise ValueError(
            f"{function}: probabilities of a row must add up to 1 at most, got "
            f"{float(sums[row]):.4g} from teacher_log_probs in row {row}; take log_softmax over "
            "all entries before the k of them, at the teacher's temperature."
        )
