"""Options that every fused loss takes, named once.

N scored rows, V vocabulary (V_s, V_t). Functions take `**options: Unpack[LinearOptions]`, modules
those of LossOptions at construction and the tensors at every call.
"""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import DEFAULT_BUDGET_BYTES
from gold_kernels.engine.kinds import check_flags

if TYPE_CHECKING:  # a build without distributed has no such class
    from torch.distributed import ProcessGroup

Reduction = Literal["sum", "none"]
PerSide = float | tuple[float, float]  # for both sides, or (student, teacher)


class UnchunkedOptions(TypedDict, total=False):
    """LossOptions without chunk_size, for a module that has it among its own arguments."""

    vocab_size: int | tuple[int, int] | None
    budget_bytes: int
    logits_dtype: torch.dtype | None
    final_logit_softcapping: float | tuple[float | None, float | None] | None
    logit_scale: PerSide
    backend: str | None
    reduction: Reduction
    process_group: "ProcessGroup | None"


class LossOptions(UnchunkedOptions, total=False):
    """How a loss is computed.

    - vocab_size: entries that take part, where heads are padded; columns from there on have
      probability 0. Across tokenizers one number for each side, (student, teacher).
    - chunk_size: most rows of logits at a time; None takes them from the budget.
    - budget_bytes: extra memory of the loss; 1 GiB unless given.
    - logits_dtype: None keeps logits in float32 (float64 for float64 inputs); torch.bfloat16 is
      the fast mode, wrong near convergence.
    - final_logit_softcapping: c in c tanh(logits / c), None for none; one for both sides or a pair.
    - logit_scale: factor of hidden W^T + bias; one for both sides or a pair.
    - backend: "triton", "torch", or None for the one that fits the device.
    - reduction: "sum" adds row_weights[i] * loss_i up to a scalar; "none" returns the rows' losses,
      which take any upstream gradient.
    - process_group: heads and biases are this process' slices of the vocabulary, in the order of
      the group's ranks; everything else is the same on all. A DTensor has its own.
    """

    chunk_size: int | None


class CallTensors(TypedDict, total=False):
    """Tensors of a call beside hidden states, heads and row weights.

    - student_bias (V_s,), teacher_bias (V_t,): of the heads.
    - labels (N,) int64: the student's next tokens, for a cross-entropy at temperature 1; a
      negative one is not scored.
    - label_weights (N,) float: weight of each label's cross-entropy; None means 1 / number of
      labels each (with reduction "none", 1 each).
    """

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    label_weights: Tensor | None


class LinearOptions(LossOptions, CallTensors, total=False):
    """All options of a loss from hidden states and heads: see LossOptions and CallTensors."""


class LogitsOptions(TypedDict, total=False):
    """Options of a loss from logits that the caller holds; see LossOptions and CallTensors."""

    vocab_size: int | tuple[int, int] | None
    labels: Tensor | None
    label_weights: Tensor | None
    backend: str | None
    reduction: Reduction


class Options(NamedTuple):
    """LinearOptions with their defaults."""

    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    labels: Tensor | None = None
    label_weights: Tensor | None = None
    vocab_size: int | tuple[int, int] | None = None
    chunk_size: int | None = None
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    logits_dtype: torch.dtype | None = None
    final_logit_softcapping: float | tuple[float | None, float | None] | None = None
    logit_scale: PerSide = 1.0
    backend: str | None = None
    reduction: Reduction = "sum"
    process_group: "ProcessGroup | None" = None


def per_side(value: Any) -> tuple[Any, Any]:
    """(student, teacher) of an option given for both at once or as a pair."""
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def resolve_options(
    function: str,
    given: Mapping[str, Any],
    known: type = LinearOptions,
    **flags: bool,  # of the call beside its options
) -> Options:
    """The options with defaults; ValueError for a name that is none of them."""
    check_flags(function, **flags)
    names = known.__annotations__
    for name in given:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            listed = f"beside its own arguments it takes {', '.join(names)}."
            remedy = f"did you mean {nearest[0]}?" if nearest else listed
            raise ValueError(f"{function}: an option is expected, got {name}=; {remedy}")
    return Options(**given)
