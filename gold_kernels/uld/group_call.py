"""What every loss of aligned groups asks of its heads, alignment, weights and labels.

N scored rows of a side (N_s, N_t), G aligned groups or pairs of rows, D hidden size (D_s, D_t), V
vocabulary (V_s, V_t).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import own_rows, told, with_slices
from gold_kernels.engine.heads import check_heads, label_weights_of, row_weights_of
from gold_kernels.engine.linear_head import LinearHead, first_entries
from gold_kernels.engine.options import Options
from gold_kernels.tokens.alignment import TokenAlignment
from gold_kernels.uld import checks as group_checks

Result = TypeVar("Result")


class GroupCall(NamedTuple):
    """Arguments that fit each other."""

    student: LinearHead
    teacher: LinearHead  # its entries that take part
    options: Options
    sizes: tuple[int, int]  # entries that take part
    num_groups: int
    row_weights: Tensor  # (G,)
    label_weights: Tensor | None  # (N_s,)


def run_group_call(
    function: str,
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    row_weights: Tensor | None,  # (G,)
    alignment: TokenAlignment | None,
    options: Options,
    settings: object,  # of the loss, and whether there are metrics
    run: Callable[[GroupCall], Result],
    ids: Sequence[Tensor] = (),  # int64 that the loss has beside the alignment
) -> Result:
    """What run returns of arguments that fit. Raises ValueError with the remedy for others."""
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

    def run_with(student: LinearHead, teacher: LinearHead) -> Result:
        sizes = group_checks.check_vocab_sizes(
            function, student.vocab_size, teacher.vocab_size, options.vocab_size
        )
        hidden = student.hidden
        group_checks.check_token_ids(function, alignment, *sizes)
        group_checks.check_reduction(function, options, alignment)
        weights = row_weights_of(row_weights, num_groups, hidden, options)
        label_weights = label_weights_of(sizes[0], hidden, options)
        live = first_entries(teacher, sizes[1])
        given = GroupCall(student, live, options, sizes, num_groups, weights, label_weights)
        return run(given)

    heads = student, teacher
    return with_slices(function, heads, options, (row_weights,), settings, run_with, ids)
