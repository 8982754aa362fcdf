"""Validation of what callers of the ULD losses pass beyond heads; messages as in checks.

N scored rows of a side (N_s, N_t), G groups, V vocabulary (V_s, V_t).
"""

import torch
from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.kinds import check_tensors, check_weight, is_readable, is_whole
from gold_kernels.engine.options import Options
from gold_kernels.tokens.alignment import MERGES, TokenAlignment
from gold_kernels.tokens.ranges import SIDES
from gold_kernels.tokens.vocabulary import VocabOverlap


def check_alignment(
    function: str, student_hidden: Tensor, teacher_hidden: Tensor, alignment: TokenAlignment | None
) -> int:
    """The number of groups. Indices are looked at on the CPU alone: elsewhere a look would wait for
    the device.
    """
    num_student, num_teacher = student_hidden.shape[0], teacher_hidden.shape[0]
    if alignment is None:
        if num_student != num_teacher:
            raise ValueError(
                f"{function}: without an alignment row i of the student meets row i of the "
                f"teacher, got N_s={num_student} and N_t={num_teacher}; pass alignment="
                "CompletionAligner.align(...) for completions of two tokenizers."
            )
        return num_student
    if not isinstance(alignment, TokenAlignment):
        raise ValueError(
            f"{function}: alignment must be a TokenAlignment, got {type(alignment).__name__}; "
            "build it with CompletionAligner.align."
        )
    expected = alignment.num_student_rows, alignment.num_teacher_rows
    if expected != (num_student, num_teacher):
        raise ValueError(
            f"{function}: the alignment is of {expected[0]} student and {expected[1]} teacher "
            f"rows, got hidden states of {num_student} and {num_teacher}; gather the same "
            "completion tokens, or join alignments with TokenAlignment.concatenate."
        )
    check_groups(function, alignment)
    for side, fields, num_rows in zip(SIDES, alignment.sides, expected, strict=True):
        _check_rows(function, side, fields, num_rows)
    return alignment.num_groups


def check_groups(function: str, alignment: TokenAlignment) -> None:
    """Both sides have the same groups, and a scalar row its token and group."""
    for name, field in zip(alignment._fields, alignment[:10], strict=False):
        is_index = isinstance(field, Tensor) and field.dtype == torch.int64 and field.ndim == 1
        if not is_index:
            is_tensor = isinstance(field, Tensor)
            got = f"{tuple(field.shape)} {field.dtype}" if is_tensor else type(field).__name__
            raise ValueError(
                f"{function}: {name} of the alignment must be a tensor of one dimension and "
                f"int64, got {got}; build it with CompletionAligner.align."
            )
    if alignment.merge not in MERGES:
        raise ValueError(
            f"{function}: merge of the alignment must be 'bayesian' or 'observed', got "
            f"{alignment.merge!r}; build it with CompletionAligner.align."
        )
    student, teacher = alignment.sides
    sizes = [tuple(tensor.shape[0] for tensor in side) for side in (student, teacher)]
    has_parts = all(side[0] == side[1] and side[2] == side[3] == side[4] for side in sizes)
    if sizes[0][0] != sizes[1][0] or not has_parts:
        raise ValueError(
            f"{function}: an alignment must have the same groups on both sides, and one row, id "
            f"and group for each token, got {sizes[0]} tensors' rows for the student and "
            f"{sizes[1]} for the teacher; build it with CompletionAligner.align."
        )


def _check_rows(function: str, side: str, fields: tuple[Tensor, ...], num_rows: int) -> None:
    """Rows are those of the hidden states, each in one group: the gradient of a row is that of one
    group. Looked at on the CPU alone, as ids are.
    """
    base_rows, _, scalar_rows, _, groups = fields
    if not all(map(is_readable, fields)):
        return
    rows, num_groups = torch.cat([base_rows, scalar_rows]), base_rows.shape[0]
    for name, index, size in (("rows", rows, num_rows), ("groups", groups, num_groups)):
        if index.shape[0] and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(
                f"{function}: the {side}'s {name} in the alignment must be in [0, {size}), got "
                f"{int(index.min())} to {int(index.max())}; build it with CompletionAligner.align."
            )
    if rows.shape[0] and int(rows.bincount().max()) > 1:
        raise ValueError(
            f"{function}: a row of the {side} must be in one group of the alignment, got row "
            f"{int(rows.bincount().argmax())} in several; gather its hidden states once for each."
        )
    if bool((groups[1:] < groups[:-1]).any()):
        raise ValueError(
            f"{function}: the {side}'s scalar groups in the alignment must ascend, got "
            f"{groups.tolist()[:8]}; sort its scalar rows, ids and groups by group."
        )


def check_chain_rule(function: str, alignment: TokenAlignment) -> None:
    """A loss of likelihoods needs the probability of every token of a group."""
    if not isinstance(alignment, TokenAlignment) or alignment.merge != "bayesian":
        got = getattr(alignment, "merge", type(alignment).__name__)
        raise ValueError(
            f"{function}: alignment must be a TokenAlignment of merge='bayesian', got {got!r}; "
            "align with CompletionAligner(..., merge='bayesian')."
        )


def check_token_ids(
    function: str, alignment: TokenAlignment | None, v_student: int, v_teacher: int
) -> None:
    """Tokens are entries of the heads. Looked at on the CPU alone: elsewhere a look would wait for
    the device.
    """
    if alignment is None:
        return
    for side, tensors, size in zip(SIDES, alignment.sides, (v_student, v_teacher), strict=True):
        for ids in (tensors[1], tensors[3]):
            if not is_readable(ids) or not ids.shape[0]:
                continue
            if int(ids.min()) < 0 or int(ids.max()) >= size:
                raise ValueError(
                    f"{function}: the {side}'s tokens in the alignment must be in [0, {size}), the "
                    f"rows of its head, got {int(ids.min())} to {int(ids.max())}; align with the "
                    "tokenizer of this model."
                )


def check_columns(function: str, v_student: int, v_teacher: int) -> None:
    if v_student == 0 or v_teacher == 0:
        raise ValueError(
            f"{function}: logits must have at least one column, got V_s={v_student} and "
            f"V_t={v_teacher}; pass what lm_head returns for the scored rows."
        )


def check_overlap(
    function: str, overlap: VocabOverlap | None, v_student: int, v_teacher: int
) -> None:
    if overlap is not None:
        sizes = overlap.student_vocab_size, overlap.teacher_vocab_size
        check_entries(function, "overlap", sizes, v_student, v_teacher)


def check_entries(
    function: str, name: str, sizes: tuple[int, int], v_student: int, v_teacher: int
) -> None:
    """What two tokenizers were compared for has no more entries than their models."""
    if sizes[0] > v_student or sizes[1] > v_teacher:
        raise ValueError(
            f"{function}: the {name} is of tokenizers with {sizes[0]} and {sizes[1]} entries, "
            f"got heads of V_s={v_student} and V_t={v_teacher} rows; build it from the tokenizers "
            "of these models."
        )


def check_weights(
    function: str,
    overlap: VocabOverlap | None,
    matched_weight: float | None,
    unmatched_weight: float | None,
) -> None:
    if overlap is not None and not isinstance(overlap, VocabOverlap):
        raise ValueError(
            f"{function}: overlap must be a VocabOverlap, got {type(overlap).__name__}; build it "
            "with VocabOverlap.from_tokenizers(student, teacher)."
        )
    if (matched_weight is None) != (unmatched_weight is None):
        raise ValueError(
            f"{function}: matched_weight and unmatched_weight must be given both or not at all, "
            f"got {matched_weight} and {unmatched_weight}; None takes the share of the vocabulary."
        )
    if matched_weight is not None and overlap is None:
        raise ValueError(
            f"{function}: matched_weight and unmatched_weight weigh the parts of the hybrid loss, "
            f"got {matched_weight} and {unmatched_weight} without an overlap; pass overlap="
            "VocabOverlap.from_tokenizers(student, teacher), or row_weights to scale plain ULD."
        )
    for name, weight in (
        ("matched_weight", matched_weight),
        ("unmatched_weight", unmatched_weight),
    ):
        if weight is not None:
            check_weight(function, name, weight)


def check_group_weights(
    function: str, row_weights: Tensor | None, num_groups: int, hidden: Tensor
) -> None:
    if row_weights is None:
        return
    check_tensors(function, row_weights=row_weights)
    if row_weights.shape != (num_groups,):
        raise ValueError(
            f"{function}: row_weights must be (G,) = ({num_groups},), one per group or pair of "
            f"rows, got {tuple(row_weights.shape)}; index the weights of your rows with "
            "alignment.student_base_rows."
        )
    checks.check_row_weights(function, row_weights, hidden.new_empty(num_groups, 0))


def check_vocab_sizes(
    function: str, v_student: int, v_teacher: int, vocab_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Entries of each side that take part."""
    if vocab_size is None:
        return v_student, v_teacher
    sizes = vocab_size if isinstance(vocab_size, tuple | list) else (vocab_size, vocab_size)
    heads = (v_student, v_teacher)
    are_sizes = len(sizes) == 2 and all(map(is_whole, sizes))
    if not are_sizes or not all(map(lambda s, v: 1 <= s <= v, sizes, heads)):
        raise ValueError(
            f"{function}: vocab_size must be a whole number of entries of each side, (student, "
            f"teacher), at most {heads}, got {vocab_size!r}; pass (len(student_tokenizer), "
            "len(teacher_tokenizer)) for padded heads."
        )
    return sizes[0], sizes[1]


def check_reduction(function: str, options: Options, alignment: TokenAlignment | None) -> None:
    if options.reduction == "none" and options.labels is not None and alignment is not None:
        raise ValueError(
            f"{function}: reduction='none' gives a loss for each group, got labels too, one for "
            "each token; take the cross-entropy in a call of its own with reduction='sum' and "
            "row_weights of 0."
        )
