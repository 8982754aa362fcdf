"""Validation of what callers pass; every message names the function, what was expected, what came
and the remedy.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine.agreement import check_group
from gold_kernels.engine.kinds import check_factor, check_number, check_tensors, is_number, is_whole
from gold_kernels.engine.options import LossOptions, Options, per_side, resolve_options
from gold_kernels.engine.row_loss import ROW_LOSSES, RowLoss
from gold_kernels.triton import launch

BACKENDS = ("triton", "torch")
MOST = 1 << 62  # rows or bytes: an operator takes numbers of 64 bits
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_matrix(function: str, name: str, tensor: Tensor, shape: str) -> None:
    check_tensors(function, **{name: tensor})
    if tensor.ndim != 2:
        raise ValueError(
            f"{function}: {name} must be {shape}, got shape {tuple(tensor.shape)}; "
            "gather the scored rows first (hidden.flatten(0, 1)[rows])."
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{function}: {name} must be a float tensor, got {tensor.dtype}; "
            "a quantised head has to be dequantised before the loss."
        )


def check_side(
    function: str,
    side: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_slice: bool = False,
) -> None:
    """One model's hidden states (N, D), head weight (V, D) and bias (V,). A slice may be empty."""
    check_matrix(function, f"{side}_hidden", hidden, "(N, D)")
    check_matrix(function, f"{side}_weight", weight, "(V, D)")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{function}: {side}_hidden and {side}_weight must share the hidden size, "
            f"got D={hidden.shape[1]} and D={weight.shape[1]}; pass lm_head.weight, (V, D)."
        )
    if weight.shape[0] == 0 and not is_slice:
        raise ValueError(
            f"{function}: {side}_weight must have at least one vocabulary row, got shape "
            f"{tuple(weight.shape)}; under ZeRO-3 gather the head before the loss."
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"{function}: {side}_bias must be (V,) = ({weight.shape[0]},), got "
            f"{tuple(bias.shape)}; pass lm_head.bias."
        )
    if bias is not None and bias.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{function}: {side}_bias must be a float tensor, got {bias.dtype}; pass lm_head.bias, "
            "or of a mask torch.zeros(V).masked_fill(mask, -torch.inf)."
        )
    for name, tensor in ((f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{function}: {name} must be on the device of {side}_hidden, got "
                f"{tensor.device} and {hidden.device}; move it with .to({side}_hidden.device)."
            )


def check_pair(function: str, student_hidden: Tensor, teacher_hidden: Tensor) -> None:
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"{function}: student_hidden and teacher_hidden must hold the same N rows, got "
            f"N={student_hidden.shape[0]} and N={teacher_hidden.shape[0]}; gather the same scored "
            "positions on both sides."
        )


def check_same_kind(function: str, student_hidden: Tensor, teacher_hidden: Tensor) -> None:
    """One device; float64 on both sides or on none."""
    if student_hidden.device != teacher_hidden.device:
        raise ValueError(
            f"{function}: student and teacher must be on one device, got {student_hidden.device} "
            f"and {teacher_hidden.device}; move the teacher's tensors to the student's device."
        )
    if (student_hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise ValueError(
            f"{function}: float64 needs both sides in float64, got {student_hidden.dtype} and "
            f"{teacher_hidden.dtype}; cast the teacher's tensors to float64."
        )


def check_vocabulary(
    function: str, v_student: int, v_teacher: int, vocab_size: int | tuple[int, int] | None
) -> int:
    """The number of vocabulary entries that take part."""
    if vocab_size is None:
        if v_student != v_teacher:
            raise ValueError(
                f"{function}: student and teacher heads must have one vocabulary, got "
                f"V={v_student} and V={v_teacher}; pass vocab_size=len(tokenizer) if they are "
                "padded heads of one tokenizer. Different tokenizers need fused_linear_uld."
            )
        if v_student == 0:
            raise ValueError(
                f"{function}: the vocabulary must have at least one entry, got V=0 on both sides; "
                "pass what the heads return, (N, V)."
            )
        return v_student
    most = min(v_student, v_teacher)
    if isinstance(vocab_size, tuple) or not (is_whole(vocab_size) and 1 <= vocab_size <= most):
        raise ValueError(
            f"{function}: vocab_size must be a whole number in [1, {most}], the smaller of both "
            f"heads, got {vocab_size!r}; pass len(tokenizer)."
        )
    return vocab_size


def check_logits(
    function: str, student: Tensor, teacher: Tensor, row_weights: Tensor | None
) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_matrix(function, name, logits, "(N, V)")
    check_pair(function, student, teacher)
    check_same_kind(function, student, teacher)
    check_row_weights(function, row_weights, student)


def check_row_weights(
    function: str, row_weights: Tensor | None, hidden: Tensor, name: str = "row_weights"
) -> None:
    if row_weights is None:
        return
    check_tensors(function, **{name: row_weights})
    num_rows = hidden.shape[0]
    if row_weights.shape != (num_rows,) or not row_weights.is_floating_point():
        raise ValueError(
            f"{function}: {name} must be a float tensor of shape (N,) = ({num_rows},), got "
            f"{tuple(row_weights.shape)} {row_weights.dtype}; pass one weight per scored row."
        )
    if row_weights.requires_grad:
        raise ValueError(
            f"{function}: {name} must not require a gradient, got requires_grad=True; "
            f"the loss computes none for them, pass {name}.detach()."
        )
    check_device(function, name, row_weights, hidden)


def check_device(function: str, name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(
            f"{function}: {name} must be on {hidden.device} like the hidden states, got "
            f"{tensor.device}; move them with .to(hidden.device)."
        )


def check_labels(function: str, labels: Tensor | None, hidden: Tensor) -> None:
    if labels is None:
        return
    check_tensors(function, labels=labels)
    num_rows = hidden.shape[0]
    if labels.shape != (num_rows,) or labels.dtype != torch.int64:
        remedy = "labels[:, 1:]" if labels.dtype == torch.int64 else "labels.long()"
        raise ValueError(
            f"{function}: labels must be an int64 tensor of shape (N,) = ({num_rows},), one per "
            f"row, already shifted, got {tuple(labels.shape)} {labels.dtype}; use {remedy}."
        )
    check_device(function, "labels", labels, hidden)


def check_beta(function: str, beta: float) -> None:
    check_number(function, "beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(
            f"{function}: beta must be in [0, 1] (0 forward KL, 1 reverse KL), got {beta}; "
            "0.5 is the symmetric Jensen-Shannon divergence."
        )


def check_temperature(function: str, temperature: float | tuple[float, float]) -> None:
    """One temperature, or a pair of student and teacher."""
    sides = per_side(temperature)
    if len(sides) != 2:
        raise ValueError(
            f"{function}: temperature must be one number or (student, teacher), got "
            f"{len(sides)} numbers; pass two."
        )
    for side in sides:
        check_one_temperature(function, side)


def check_one_temperature(function: str, temperature: float) -> None:
    check_factor(function, "temperature", temperature, "1.0 leaves the logits as they are.")


def check_label_weights(function: str, options: Options, hidden: Tensor) -> None:
    check_labels(function, options.labels, hidden)
    if options.label_weights is None:
        return
    if options.labels is None:
        raise ValueError(
            f"{function}: label_weights weigh a cross-entropy on labels, got label_weights and "
            "labels=None; pass the student's tokens as labels."
        )
    check_row_weights(function, options.label_weights, hidden, "label_weights")


def check_row_loss(function: str, row_loss: RowLoss, backend: str | None) -> None:
    """A loss over one vocabulary that the backend has, with its numbers in range."""
    if not isinstance(row_loss, RowLoss) or not row_loss.is_shared:
        raise ValueError(
            f"{function}: row_loss must be a loss over one vocabulary, got {row_loss!r}; pass an "
            "object of gold_kernels.losses, for instance JSD(beta=0.5) or make_loss('skew_kl')."
        )
    if ROW_LOSSES.get(row_loss.name) is not type(row_loss):
        raise ValueError(
            f"{function}: a row loss must have a name of its own, got {type(row_loss).__name__} "
            f"with the name {row_loss.name!r}; set `name: ClassVar[str]` in the class."
        )
    for name, values in row_loss.by_field().items():
        for value in values:
            check_number(function, name, value)
    row_loss.check(function)
    if backend in BACKENDS and backend not in row_loss.backends:
        raise ValueError(
            f"{function}: backend {backend!r} is not among those of {row_loss.name}, which has "
            f"{', '.join(row_loss.backends)}; pass backend=None."
        )


def check_module(function: str, options: Mapping[str, Any], **flags: bool) -> None:
    """Options at a module's construction."""
    chosen = resolve_options(function, options, LossOptions, **flags)
    check_chosen(function, chosen)
    for size in per_side(chosen.vocab_size):
        if size is not None and not (is_whole(size) and size >= 1):
            raise ValueError(
                f"{function}: vocab_size must be a whole number, 1 at least, got {size!r}; pass "
                "len(tokenizer)."
            )


def check_pairs(function: str, options: Options) -> None:
    """Options for one side or both."""
    for name in ("logit_scale", "final_logit_softcapping", "vocab_size"):
        value = getattr(options, name)
        if isinstance(value, tuple | list) and len(value) != 2:
            raise ValueError(
                f"{function}: {name} must be one number or a pair (student, teacher), got "
                f"{len(value)} values; pass two."
            )


def check_head_options(function: str, logit_scale: float, softcap: float | None) -> None:
    check_number(function, "logit_scale", logit_scale)
    remedy = "pass model.config.logit_scale, or 1.0 for models without it."
    if not (logit_scale != 0 and -math.inf < logit_scale < math.inf):
        raise ValueError(
            f"{function}: logit_scale must be finite and not 0, got {logit_scale}; {remedy}"
        )
    check_factor(function, "logit_scale without its sign", abs(logit_scale), remedy)
    if softcap is not None:
        remedy = "pass model.config.final_logit_softcapping, or None for models without it."
        expected = "None or positive and finite"
        check_factor(function, "final_logit_softcapping", softcap, remedy, expected)


def check_options(function: str, options: Options, hidden: Tensor) -> Options:
    """The options that need the student's tensor to be judged; returned with the backend named."""
    check_chosen(function, options)
    if options.logits_dtype == torch.bfloat16 and hidden.dtype == torch.float64:
        raise ValueError(
            f"{function}: logits_dtype must be None or torch.float32 for float64 inputs, got "
            f"{options.logits_dtype}; None keeps logits as precise as the loss."
        )
    backend = resolve_backend(function, options.backend, hidden)
    chunk_size = None if options.chunk_size is None else min(options.chunk_size, MOST)
    budget_bytes = int(min(options.budget_bytes, MOST))
    return options._replace(backend=backend, chunk_size=chunk_size, budget_bytes=budget_bytes)


def check_chosen(function: str, options: Options) -> None:
    """The options that can be judged by themselves, at a module's construction too."""
    chunk_size, budget_bytes = options.chunk_size, options.budget_bytes
    if chunk_size is not None and not (is_whole(chunk_size) and chunk_size >= 1):
        raise ValueError(
            f"{function}: chunk_size must be a whole number of rows, 1 at least, got "
            f"{chunk_size!r}; pass None to take it from the memory budget."
        )
    if not is_number(budget_bytes) or not 1 <= budget_bytes < math.inf:
        raise ValueError(
            f"{function}: budget_bytes must be at least 1, got {budget_bytes!r}; 1 << 30 is the "
            "default, a row of logits of both sides the least that is used."
        )
    if options.logits_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"{function}: logits_dtype must be None, torch.float32 or torch.bfloat16, got "
            f"{options.logits_dtype}; None keeps logits as precise as the loss."
        )
    if options.reduction not in ("sum", "none"):
        raise ValueError(
            f"{function}: reduction must be 'sum' (weighted by row_weights) or 'none', got "
            f"{options.reduction!r}; row_weights=None with 'sum' is the mean over rows."
        )
    if options.backend not in (None, *BACKENDS):
        raise ValueError(
            f"{function}: backend must be None, 'triton' or 'torch', got {options.backend!r}; "
            "None chooses by the device of the tensors."
        )
    check_pairs(function, options)
    if options.process_group is not None:
        check_group(function, options.process_group)
    for scale, cap in zip(
        per_side(options.logit_scale), per_side(options.final_logit_softcapping), strict=True
    ):
        check_head_options(function, scale, cap)


def resolve_backend(function: str, backend: str | None, hidden: Tensor) -> str:
    """The backend by name, checked, or the one that fits the tensor's device."""
    if backend is None:
        return "torch" if hidden.dtype == torch.float64 else launch.default_backend(hidden)
    if backend == "triton":
        if not launch.has_triton():
            raise ValueError(
                f"{function}: backend 'triton' needs the package triton, which is not installed; "
                "install it or pass backend='torch'."
            )
        if hidden.device.type not in launch.GPU_DEVICES and not launch.is_interpreted():
            raise ValueError(
                f"{function}: backend 'triton' needs tensors on a GPU, got {hidden.device}; pass "
                "backend='torch', or set TRITON_INTERPRET=1 before Python starts to debug kernels."
            )
        if hidden.dtype == torch.float64:
            raise ValueError(
                f"{function}: backend 'triton' computes in float32, got float64 tensors; "
                "pass backend='torch' for float64."
            )
    return backend
