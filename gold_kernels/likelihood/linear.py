"""The public function of the chunk likelihood: from hidden states, heads and aligned tokens.

N scored rows of a side (N_s, N_t), G aligned groups, D hidden size (D_s, D_t), V vocabulary (V_s,
V_t). P teacher, Q student.
"""

import dataclasses
from typing import Literal, NamedTuple, overload

from torch import Tensor
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import linear_options, told
from gold_kernels.engine.linear import RowPlan
from gold_kernels.engine.options import LinearOptions, PerSide, per_side
from gold_kernels.engine.row_loss import RowLoss
from gold_kernels.likelihood.row_loss import ChunkLikelihood
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.uld import checks as group_checks
from gold_kernels.uld.group_call import GroupCall, run_group_call
from gold_kernels.uld.plan import plan_groups


class LikelihoodMetrics(NamedTuple):
    """Unweighted values, detached, float32: of every group, (G,) each, in nats.

    Log-likelihoods are at the temperature of the logits, not that of the groups. cross_entropy,
    (N_s,) of the labels, is None without labels.
    """

    loss: Tensor
    student_log_likelihood: Tensor  # at the temperature of the logits, not that of the groups
    teacher_log_likelihood: Tensor
    cross_entropy: Tensor | None = None  # (N_s,) of the labels; None without labels


@overload
def fused_linear_chunk_likelihood(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    alignment: TokenAlignment,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.0,
    group_temperature: float = 100.0,
    temperature: PerSide = 1.0,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def fused_linear_chunk_likelihood(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    alignment: TokenAlignment,
    row_weights: Tensor | None = None,
    *,
    beta: float = 0.0,
    group_temperature: float = 100.0,
    temperature: PerSide = 1.0,
    return_metrics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, LikelihoodMetrics]: ...


def fused_linear_chunk_likelihood(
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    alignment: TokenAlignment,
    row_weights: Tensor | None = None,  # (G,), float32; None means 1 / G each
    *,
    beta: float = 0.0,
    group_temperature: float = 100.0,
    temperature: PerSide = 1.0,  # of both sides' logits, or (student, teacher)
    return_metrics: bool = False,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, LikelihoodMetrics]:  # (), float32; (G,) with reduction="none"
    """How likely both models find the bytes of a group, as a divergence of two outcomes.

    Shapes: student_hidden (N_s, D_s), student_weight (V_s, D_s), teacher_hidden (N_t, D_t),
    teacher_weight (V_t, D_t), row_weights (G,) float32, 1 / G each if None. Returns () float32;
    (G,) with reduction="none". G groups of the alignment.

        loss = sum_g row_weights[g] * JSD_beta((p_g, 1 - p_g), (q_g, 1 - q_g))
             + sum_i label_weights[i] * CE_i                             where labels are given
        q_g  = exp(sum over the group's tokens of log q(token) / group_temperature),  p_g likewise

    A group is what approximate likelihood matching (ALM; Minixhofer et al. 2025, arXiv 2503.20083)
    calls a chunk: the shortest runs of tokens of both sides that end at one byte. Taken from it are
    the two outcomes, the power 1 / group_temperature of the likelihoods, and, with beta = 0, the
    KL of the teacher from the student; 100 is the power of its published code. Not taken: its
    choice of chunks by how biased their ends are, its loss of hidden states, and the factors by
    which it balances several losses. Written from the definition, not from the paper's equations.

    No distribution over a vocabulary is compared: each side gives the log-sum-exp of its rows. The
    loss and its gradient are about 1 / group_temperature as large as those of other losses; with
    labels their weight decides between the two.

    beta as in fused_linear_jsd. alignment must be of merge="bayesian": every row predicts the token
    that its group has there. Options are those of fused_linear_loss, vocab_size as a pair (student,
    teacher); labels, one a token of the student, need reduction="sum". Extra memory is at most
    budget_bytes, plus one float32 student_weight if a 16-bit one needs a gradient. Rows in no group
    and groups of weight 0 may hold anything. return_metrics=True returns (loss, LikelihoodMetrics).
    Not supported: a second derivative, torch.func transforms. Raises ValueError for what does not
    fit, with the remedy.
    """
    function = "fused_linear_chunk_likelihood"
    chosen = linear_options(
        function, options, student_hidden, student_weight, return_metrics=return_metrics
    )
    with told(chosen.process_group, student_hidden, student_weight):
        checks.check_temperature(function, temperature)
        row_loss = ChunkLikelihood(beta, group_temperature, per_side(temperature))
        row_loss.check(function)
        group_checks.check_chain_rule(function, alignment)

    def plan_of(call: GroupCall) -> tuple[RowPlan, RowLoss]:
        groups = alignment.to(call.student.hidden.device)
        plan, student_scalars, teacher_scalars = plan_groups(
            *(groups, call.row_weights, call.options.labels, call.label_weights),
            call.student.num_rows,
        )
        own_loss = dataclasses.replace(
            row_loss,
            student_scalars=student_scalars,
            teacher_scalars=teacher_scalars,
            ends=[groups.student_base_ids, groups.teacher_base_ids],
        )
        return plan, own_loss

    loss, values = run_group_call(
        function,
        *(student_hidden, student_weight, teacher_hidden, teacher_weight),
        row_weights,
        alignment,
        chosen,
        row_loss,
        return_metrics,
        plan_of,
    )
    if not return_metrics:
        return loss
    return loss, LikelihoodMetrics(**values.by_name(LikelihoodMetrics._fields))
