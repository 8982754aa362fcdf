"""Both heads as the caller gave them -> validated, in the dtype they are computed in."""

from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine import checks
from gold_kernels.engine.chunking import LinearHead, float_dtype


def per_side(value: Any) -> tuple[Any, Any]:
    """(student, teacher) of an option given for both at once or as a pair."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def _autocast_like_linear(head: LinearHead, device_type: str) -> LinearHead:
    """The head in the dtype that torch.nn.Linear would compute it in under torch.autocast, which
    leaves float64 alone.
    """
    if not torch.is_autocast_enabled(device_type):
        return head
    dtype = torch.get_autocast_dtype(device_type)
    hidden, weight, bias = (
        tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)
        for tensor in head[:3]
    )
    return head._replace(hidden=hidden, weight=weight, bias=bias)


def check_heads(
    function: str, student: LinearHead, teacher: LinearHead
) -> tuple[LinearHead, LinearHead]:
    """Heads that fit their hidden states; raises ValueError with the remedy."""
    device_type = student.hidden.device.type
    student = _autocast_like_linear(student, device_type)
    with torch.no_grad():
        teacher = _autocast_like_linear(teacher, device_type)
    for side, head in (("student", student), ("teacher", teacher)):
        checks.check_side(function, side, head.hidden, head.weight, head.bias)
        checks.check_head_options(function, head.bias, head.logit_scale, head.softcap)
    checks.check_same_kind(function, student.hidden, teacher.hidden)
    if not torch.is_grad_enabled():  # an autograd Function is told of requires_grad, not of no_grad
        student = LinearHead(
            *(None if t is None else t.detach() for t in student[:3]), *student[3:]
        )
    return student, teacher


def mean_weights(hidden: Tensor, num_rows: int) -> Tensor:  # (N,)
    """1 / N each."""
    return hidden.new_full((num_rows,), 1 / max(1, num_rows), dtype=float_dtype(hidden))


def logit_rows(
    student_logits: Tensor,  # (N, V_s)
    teacher_logits: Tensor,  # (N, V_t)
    row_weights: Tensor | None,  # (N,); None: 1 / N each
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that the caller holds, as row functions take them."""
    if row_weights is None:
        row_weights = mean_weights(student_logits, student_logits.shape[0])
    row_weights = row_weights.to(float_dtype(student_logits)).contiguous()
    if not torch.is_grad_enabled():  # see check_heads
        student_logits = student_logits.detach()
    student_logits, teacher_logits = (
        logits if logits.stride(1) == 1 else logits.contiguous()
        for logits in (student_logits, teacher_logits.detach())
    )
    return student_logits, teacher_logits, row_weights
