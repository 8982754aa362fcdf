"""What every loss of aligned groups asks of its heads, alignment, weights and labels.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, D hidden size (D_s, D_t), V
vocabulary (V_s, V_t).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import own_rows, told, with_slices
from gold_kernels.engine.heads import check_heads, label_weights_of, row_weights_of
from gold_kernels.engine.linear import RowPlan, run_linear_loss
from gold_kernels.engine.linear_head import LinearHead, first_entries
from gold_kernels.engine.options import Options
from gold_kernels.engine.row_loss import CROSS_ENTROPY, RowLoss
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.uld import checks as group_checks


class GroupCall(NamedTuple):
    """Arguments that fit each other."""

    student: LinearHead
    options: Options
    sizes: tuple[int, int]  # entries that take part
    row_weights: Tensor  # (G,)
    label_weights: Tensor | None  # (N_s,)


class GroupValues(NamedTuple):
    """Values of the R rows that were projected, the first of which are those of the groups."""

    names: Sequence[str]
    values: Tensor  # (number of names, R)
    num_groups: int
    labels: Tensor | None  # (N_s,)
    student_index: Tensor | None  # (R,) the row of student_hidden of each projected row

    def by_name(self, fields: Sequence[str]) -> dict[str, Any]:
        """Values of every group, (G,) each; the cross-entropy of every label, (N_s,), in the order
        of the labels, and None without labels.
        """
        rows = dict(zip(self.names, self.values, strict=True))
        groups = {name: rows[name][: self.num_groups] for name in fields if name != CROSS_ENTROPY}
        return groups | {CROSS_ENTROPY: self._of_labels(rows[CROSS_ENTROPY])}

    def _of_labels(self, cross_entropy: Tensor) -> Tensor | None:  # (R,) -> (N_s,)
        if self.labels is None or self.student_index is None:
            return None if self.labels is None else cross_entropy
        every = cross_entropy.new_zeros(self.labels.shape[0])
        return every.index_copy(0, self.student_index, cross_entropy)


def run_group_call(
    function: str,
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    row_weights: Tensor | None,  # (G,)
    alignment: TokenAlignment | None,
    options: Options,
    row_loss: RowLoss,  # without the tensors of the call
    has_metrics: bool,
    plan_of: Callable[[GroupCall], tuple[RowPlan, RowLoss]],  # and the loss with its tensors
    ids: Sequence[Tensor] = (),  # int64 that the loss has beside the alignment
) -> tuple[Tensor, GroupValues]:
    """Validate, plan, run; behind every public function of aligned groups. Raises ValueError with
    the remedy for arguments that do not fit.
    """
    with told(options.process_group, student_hidden, student_weight):
        student, teacher, options = check_heads(
            function, student_hidden, student_weight, teacher_hidden, teacher_weight, options
        )
        row_weights = own_rows(function, "row_weights", row_weights)
        num_groups = group_checks.check_alignment(
            function, student.hidden, teacher.hidden, alignment
        )
        group_checks.check_group_weights(function, row_weights, num_groups, student.hidden)
        checks.check_label_weights(function, options, student.hidden)
    if alignment is not None:
        ids = [*ids, *alignment.sides[0], *alignment.sides[1]]

    def run(student: LinearHead, teacher: LinearHead) -> tuple[Tensor, GroupValues]:
        sizes = group_checks.check_vocab_sizes(
            function, student.vocab_size, teacher.vocab_size, options.vocab_size
        )
        hidden = student.hidden
        group_checks.check_token_ids(function, alignment, *sizes)
        group_checks.check_reduction(function, options, alignment)
        weights = row_weights_of(row_weights, num_groups, hidden, options)
        label_weights = label_weights_of(sizes[0], hidden, options)
        plan, own_loss = plan_of(GroupCall(student, options, sizes, weights, label_weights))
        live = first_entries(teacher, sizes[1])
        loss, values = run_linear_loss(
            own_loss, student, live, plan, options, has_metrics, sizes[0]
        )
        return loss, GroupValues(
            row_loss.value_names, values, num_groups, options.labels, plan.student_index
        )

    heads, settings = (student, teacher), (row_loss, has_metrics)
    return with_slices(function, heads, options, (row_weights,), settings, run, ids)
