"""The public function of the projected JSD: from hidden states, heads and a projection.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, D hidden size (D_s, D_t), V
vocabulary (V_s, V_t). P teacher, Q student.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import linear_options, told
from gold_kernels.engine.linear import RowPlan
from gold_kernels.engine.options import LinearOptions, PerSide, per_side
from gold_kernels.engine.row_loss import RowLoss
from gold_kernels.projection.row_loss import ProjectedJSD
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.tokens.projection import VocabProjection
from gold_kernels.uld import checks as group_checks
from gold_kernels.uld.group_call import GroupCall, run_group_call
from gold_kernels.uld.plan import plan_groups, two_terms


class ProjectedMetrics(NamedTuple):
    """Unweighted values, detached, float32: of every group or pair of rows, (G,) each.

    A mass is the probability that is compared: of the student what is projected, of the teacher the
    entries that are reached. cross_entropy, (N_s,) of the labels in nats, is None without labels.
    """

    loss: Tensor
    student_projected_mass: Tensor  # probability of what is projected
    teacher_projected_mass: Tensor  # probability of the entries that are reached
    cross_entropy: Tensor | None = None  # (N_s,) of the labels, nats; None without labels


@overload
def fused_linear_projected_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    projection: VocabProjection,
    row_weights: Tensor | None = None,
    *,
    alignment: TokenAlignment | None = None,
    beta: float = 0.0,
    temperature: PerSide = 1.0,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def fused_linear_projected_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    projection: VocabProjection,
    row_weights: Tensor | None = None,
    *,
    alignment: TokenAlignment | None = None,
    beta: float = 0.0,
    temperature: PerSide = 1.0,
    return_metrics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, ProjectedMetrics]: ...


def fused_linear_projected_jsd(
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    projection: VocabProjection,
    row_weights: Tensor | None = None,  # (G,), float32; None means 1 / G each
    *,
    alignment: TokenAlignment | None = None,  # None: row i with row i, G = N_s = N_t
    beta: float = 0.0,
    temperature: PerSide = 1.0,  # of both sides, or (student, teacher)
    return_metrics: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, ProjectedMetrics]:  # (), float32; (G,) with reduction="none"
    """Generalized JSD of the teacher and the student's distribution projected into its vocabulary.

    Shapes: student_hidden (N_s, D_s), student_weight (V_s, D_s), teacher_hidden (N_t, D_t),
    teacher_weight (V_t, D_t), row_weights (G,) float32, 1 / G each if None. Returns () float32;
    (G,) with reduction="none". G groups; without an alignment row i meets row i, and G = N.

        loss = sum_g row_weights[g] * JSD_beta(P_g, Q_g W) + sum_i label_weights[i] * CE_i

    W (V_s, V_t) is sparse: see VocabProjection. An entry of the teacher that no row of W reaches is
    left out on both sides, and the KL terms have + sum q - sum p, so that they are never negative.
    No logits of V_t columns are kept, and no W is ever dense.

    With an alignment (merge="bayesian") P_g and Q_g are those of the first tokens of the group,
    which both follow the same bytes. A group of several tokens has JSD_beta of two outcomes beside
    it, its bytes or others, so that its later tokens learn too.

    This is P-KL of X-Token (Sreenivas et al. 2026, arXiv 2605.21699) at beta = 0. Taken from it
    are the sparse projection, built from both tokenizers by weight 1 for equal entries and weights
    that fall to a tenth from piece to piece (so in its published code), and the KL in the teacher's
    vocabulary without a partition. Not taken: the second pass, from the teacher's entries to the
    student's; the average of a group's log-probabilities over its tokens; the cut to the teacher's
    most likely entries; the factor temperature^2 and its balance with the cross-entropy; several
    teachers. Written from the description, not from the paper's equations.

    Options are those of fused_linear_loss, vocab_size as a pair (student, teacher); labels with an
    alignment need reduction="sum". Extra memory is at most budget_bytes, plus one float32
    student_weight if a 16-bit one needs a gradient. Groups of weight 0 may hold anything.
    return_metrics=True returns (loss, ProjectedMetrics). Move the projection to the device once,
    projection.to(device): else each call does. Not supported: a second derivative, torch.func
    transforms. Raises ValueError for what does not fit, with the remedy.
    """
    function = "fused_linear_projected_jsd"
    chosen = linear_options(
        function, options, student_hidden, student_weight, return_metrics=return_metrics
    )
    with told(chosen.process_group, student_hidden, student_weight):
        checks.check_temperature(function, temperature)
        row_loss = ProjectedJSD(beta, per_side(temperature))
        row_loss.check(function)
        if alignment is not None:
            group_checks.check_chain_rule(function, alignment)
        _check_kind(function, projection)
    folds = projection.folds
    loss, values = run_group_call(
        function,
        *(student_hidden, student_weight, teacher_hidden, teacher_weight),
        row_weights,
        alignment,
        chosen,
        row_loss,
        return_metrics,
        partial(_plan_rows, function, row_loss, projection, alignment),
        (folds.teacher_ids, folds.places, folds.row_weights.view(torch.int32)),
    )
    if not return_metrics:
        return loss
    return loss, ProjectedMetrics(**values.by_name(ProjectedMetrics._fields))


def _plan_rows(
    function: str,
    row_loss: ProjectedJSD,
    projection: VocabProjection,
    alignment: TokenAlignment | None,
    call: GroupCall,
) -> tuple[RowPlan, RowLoss]:
    """Rows of groups or pairs, and the loss with its tensors."""
    hidden, labels = call.student.hidden, call.options.labels
    _check_projection(function, projection, *call.sizes)
    folds = projection.to(hidden.device).folds.tensors()
    row_loss = dataclasses.replace(row_loss, folds=folds)
    if alignment is None:
        labels = None if labels is None else labels.contiguous()
        return RowPlan(two_terms(call.row_weights, call.label_weights), labels), row_loss
    firsts = alignment.to(hidden.device).with_first_base()
    plan, student_scalars, teacher_scalars = plan_groups(
        firsts, call.row_weights, labels, call.label_weights, call.student.num_rows
    )
    has_spans = student_scalars is not None or teacher_scalars is not None
    row_loss = dataclasses.replace(
        row_loss,
        student_scalars=student_scalars,
        teacher_scalars=teacher_scalars,
        spans=firsts.span_ids() if has_spans else None,
    )
    return plan, row_loss


def _check_kind(function: str, projection: VocabProjection) -> None:
    if not isinstance(projection, VocabProjection):
        raise ValueError(
            f"{function}: projection must be a VocabProjection, got {type(projection).__name__}; "
            "pass VocabProjection.from_tokenizers(student, teacher)."
        )


def _check_projection(
    function: str, projection: VocabProjection, v_student: int, v_teacher: int
) -> None:
    sizes = projection.student_vocab_size, projection.teacher_vocab_size
    group_checks.check_entries(function, "projection", sizes, v_student, v_teacher)
    if not projection.folds.teacher_ids.shape[0]:
        raise ValueError(
            f"{function}: the projection must reach an entry of the teacher, got none; build it "
            "from the tokenizers of these models."
        )
