"""What every loss of aligned groups asks of its heads, alignment, weights and labels.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, D hidden size (D_s, D_t), V
vocabulary (V_s, V_t).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import join_slices, own_rows, told
from gold_kernels.engine.heads import check_heads, label_weights_of, row_weights_of
from gold_kernels.engine.linear_head import LinearHead, first_entries
from gold_kernels.engine.options import Options
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.uld import checks as group_checks


class GroupCall(NamedTuple):
    """Arguments that fit each other."""

    student: LinearHead
    teacher: LinearHead  # its entries that take part
    options: Options
    sizes: tuple[int, int]  # entries that take part
    num_groups: int
    row_weights: Tensor  # (G,)
    label_weights: Tensor | None  # (N_s,)


def check_group_call(
    function: str,
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    row_weights: Tensor | None,  # (G,)
    alignment: TokenAlignment | None,
    options: Options,
    settings: object,  # of the loss, and whether there are metrics
    ids: Sequence[Tensor] = (),  # int64 that the loss has beside the alignment
) -> GroupCall:
    """Raises ValueError with the remedy for what does not fit."""
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
    heads = student, teacher
    student, teacher = join_slices(function, heads, options, (row_weights,), settings, ids)
    sizes = group_checks.check_vocab_sizes(
        function, student.vocab_size, teacher.vocab_size, options.vocab_size
    )
    teacher = first_entries(teacher, sizes[1])
    hidden = student.hidden
    group_checks.check_token_ids(function, alignment, *sizes)
    group_checks.check_reduction(function, options, alignment)
    weights = row_weights_of(row_weights, num_groups, hidden, options)
    label_weights = label_weights_of(sizes[0], hidden, options)
    return GroupCall(student, teacher, options, sizes, num_groups, weights, label_weights)
