"""What callers gave -> heads, logits and weights as the engine takes them.

N rows, R projected rows, T terms of the loss, D hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import own_heads
from gold_kernels.engine.chunk_plan import float_dtype
from gold_kernels.engine.kinds import check_tensors
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.options import Options, per_side


def _autocast_like_linear(head: LinearHead) -> LinearHead:
    """The head in the dtype that torch.nn.Linear would compute it in under torch.autocast, which
    leaves float64 alone.
    """
    dtype = torch.get_autocast_dtype(head.hidden.device.type)
    return _map_tensors(head, lambda t: t if t.dtype == torch.float64 else t.to(dtype))


def _in_one_dtype(head: LinearHead) -> LinearHead:
    """Hidden states and weight in the wider of their dtypes: a float32 head over bfloat16 weights
    (peft keeps the copies of modules_to_save so) has float32 logits of exact hidden states. What is
    cast gets its gradient in its own dtype.
    """
    if head.hidden.dtype == head.weight.dtype:
        return head
    dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
    return head._replace(hidden=head.hidden.to(dtype), weight=head.weight.to(dtype))


def _map_tensors(head: LinearHead, change: Callable[[Tensor], Tensor]) -> LinearHead:
    bias = None if head.bias is None else change(head.bias)
    return head._replace(hidden=change(head.hidden), weight=change(head.weight), bias=bias)


def check_head(function: str, side: str, head: LinearHead, is_slice: bool = False) -> LinearHead:
    """The head in the dtype that it is computed in."""
    check_head_tensors(function, side, head)
    device_type = head.hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        head = _autocast_like_linear(head)
    checks.check_side(function, side, head.hidden, head.weight, head.bias, is_slice)
    checks.check_head_options(function, head.logit_scale, head.softcap)
    return _in_one_dtype(head)


def check_head_tensors(function: str, side: str, head: LinearHead) -> None:
    check_tensors(function, **{f"{side}_hidden": head.hidden, f"{side}_weight": head.weight})
    if head.bias is not None:
        check_tensors(function, **{f"{side}_bias": head.bias})


def only_head(
    side: str,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    options: Options,
) -> LinearHead:
    """The head of a call that has logits of one side alone, unchecked: check_head refuses pairs."""
    bias = options.student_bias if side == "student" else options.teacher_bias
    scale: float = options.logit_scale  # type: ignore[assignment]  # no pair here
    cap: float | None = options.final_logit_softcapping  # type: ignore[assignment]
    return LinearHead(hidden, weight, bias, scale, cap)


def check_heads(
    function: str,
    student_hidden: Tensor,  # (N_s, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N_t, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    options: Options,
) -> tuple[LinearHead, LinearHead, Options]:
    """Heads that fit their hidden states, and options with the backend named; raises ValueError
    with the remedy.
    """
    checks.check_pairs(function, options)
    scales = per_side(options.logit_scale)
    caps = per_side(options.final_logit_softcapping)
    student = LinearHead(student_hidden, student_weight, options.student_bias, scales[0], caps[0])
    teacher = LinearHead(teacher_hidden, teacher_weight, options.teacher_bias, scales[1], caps[1])
    for side, head in (("student", student), ("teacher", teacher)):
        check_head_tensors(function, side, head)
    (student, teacher), options = own_heads(function, (student, teacher), options)
    is_slice = options.process_group is not None
    student = check_head(function, "student", student, is_slice)
    with torch.no_grad():
        teacher = check_head(function, "teacher", teacher, is_slice)
    checks.check_same_kind(function, student.hidden, teacher.hidden)
    options = checks.check_options(function, options, student.hidden)
    return student, teacher, options


def row_weights_of(
    row_weights: Tensor | None,  # (N,); None: 1 / N each, or 1 each where rows are not summed
    num_rows: int,
    like: Tensor,
    options: Options,
) -> Tensor:  # (N,)
    dtype = float_dtype(like)
    if row_weights is not None:
        return row_weights.to(dtype)
    weight = 1.0 if options.reduction == "none" else 1 / max(1, num_rows)
    return like.new_full((num_rows,), weight, dtype=dtype)


def label_weights_of(
    vocab_size: int, like: Tensor, options: Options
) -> Tensor | None:  # (N,); 0 where a label is no entry
    labels, weights, dtype = options.labels, options.label_weights, float_dtype(like)
    if labels is None:
        return None
    is_label = (labels >= 0) & (labels < vocab_size)
    if weights is None:
        weights = is_label.to(dtype)
        if options.reduction == "sum":
            weights = weights / is_label.sum()
    return torch.where(is_label, weights.to(dtype), 0)  # the weight of no label may be anything


def term_weights(
    row_weights: Tensor,  # (R,)
    label_weights: Tensor | None,  # (R,)
) -> Tensor:  # (R, T), contiguous
    """A column a term: the loss and, where there are labels, the cross-entropy."""
    if label_weights is None:
        return row_weights.contiguous().unsqueeze(1)
    return torch.stack([row_weights, label_weights], dim=1)


def unit_stride(logits: Tensor) -> Tensor:  # (N, V)
    """Logits as row functions take them: neighbours in a row are neighbours in memory."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
