"""The passes of one micro-batch on the meta device: what they keep, and their peaks.

The models' own code runs, layer by layer, with its checkpointing; every tensor that it makes is
counted while it lives. So what is counted follows from the architecture: the saved tensors of each
layer (or, with gradient checkpointing, its input, and in backward what one layer computes again),
temporaries, the vision tower, the scores of eager attention, the loss at the head with the buffers
that its budget allows, and gradients as backward makes them.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gold_kernels.engine.chunk_plan import Limits, Needs, is_packed, plan_chunks
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.logit_form import forward_is
from gold_kernels.engine.row_loss import ROW_LOSSES, Rows
from gold_trainer import models
from gold_trainer.batches import MicroBatch, SideInputs
from gold_trainer.config import GOLDConfig
from gold_trainer.loss_at_head import gather_rows, head_replaced
from gold_trainer.objectives import Objective
from gold_trainer.planning.kernels import Kernels
from gold_trainer.planning.ledger import Ledger
from gold_trainer.sides import Side
from gold_trainer.teachers.layer_stream import outermost_lists

BACKEND = "triton" if find_spec("triton") else "torch"  # on a GPU


class Precision(NamedTuple):
    autocast: torch.dtype | None  # in which matrix products run
    params: torch.dtype | None  # what an engine makes of the student's weights; None: as they are


class Stored(NamedTuple):
    """What a cache has of a scored token."""

    width: int
    dtype: torch.dtype
    has_head: bool  # beside it, through which it goes

    @property
    def num_bytes(self) -> int:
        return self.width * self.dtype.itemsize


def kept_tokens(args: GOLDConfig) -> Stored:
    """What loss_top_k keeps of a token: ids and log-probabilities."""
    return Stored(2 * args.loss_top_k, torch.float32, has_head=False)


class Passes(NamedTuple):
    """Bytes above weights, of one micro-batch."""

    teacher: int  # the peak of its forward pass
    teacher_hidden: int  # what is kept of it
    forward: Counter[str]  # "activations" and "loss" at the peak of the student's forward pass
    backward: Counter[str]  # "activations" and "gradients"


@dataclass
class _Head:
    """A head in the dtype that autocast computes it in."""

    weight: Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


def run_passes(
    student: nn.Module,
    teacher: nn.Module | None,  # None: a cache, or elsewhere
    sides: tuple[Side, Side],
    objective: Objective,
    batch: MicroBatch,  # its tensors are real
    precision: Precision,
    stored: Stored | None = None,
    *,
    is_checkpointed: bool,
    kept_gradients: float,  # part of each gradient that stays on this device
) -> Passes:
    teacher_hidden, teacher_peak = _teacher_pass(
        teacher, sides[1], batch.teacher, precision, stored
    )
    peaks = _student_passes(
        student, sides, objective, batch, teacher_hidden, precision, is_checkpointed, kept_gradients
    )
    return Passes(teacher_peak, _bytes(teacher_hidden), *peaks)


@torch.no_grad()
def _teacher_pass(
    teacher: nn.Module | None,
    side: Side,
    inputs: SideInputs,
    precision: Precision,
    stored: Stored | None,
) -> tuple[Tensor, int]:  # (N_t, D_t)
    if teacher is None:
        weight = side.head.weight
        width, dtype = weight.shape[1], precision.autocast or weight.dtype
        if stored is not None:
            width, dtype = stored.width, stored.dtype
        return torch.empty(len(inputs.scored_rows), width, dtype=dtype, device="meta"), 0
    ledger, kernels = Ledger(lambda *_: 0), Kernels(precision.autocast)
    found: list[Tensor] = []

    def at_head(hidden: Tensor) -> Tensor:
        found.append(gather_rows(hidden, inputs.scored_rows))
        return hidden.new_zeros(())

    teacher.eval()
    with ledger, kernels, one_of_each(teacher), head_replaced(side.place, at_head):
        teacher(**models.forward_inputs(teacher, inputs.tensors))
    return found[0], ledger.peak.total()


def _student_passes(
    student: nn.Module,
    sides: tuple[Side, Side],
    objective: Objective,
    batch: MicroBatch,
    teacher_hidden: Tensor,
    precision: Precision,
    is_checkpointed: bool,
    kept_gradients: float,
) -> tuple[Counter[str], Counter[str]]:
    ledger, kernels = Ledger(loss_buffers), Kernels(precision.autocast)
    base = models.base_model(student)
    labels = torch.empty_like(batch.student.labels, device="meta")  # as hidden states are
    batch = replace(batch, student=replace(batch.student, labels=labels))
    with ExitStack() as stack:
        if is_checkpointed:
            _checkpoint(base, kernels)
            stack.callback(_quietly, base.gradient_checkpointing_disable)
        for parameter in student.parameters():
            if parameter.requires_grad:
                hook = _keep_gradient(ledger, kept_gradients)
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
                stack.callback(setattr, parameter, "grad", None)

        def at_head(hidden: Tensor) -> Tensor:
            with ledger.labelled("loss"):
                heads = [_cast(side.head, kernels) for side in sides]
                rows = kernels.lower(gather_rows(hidden, batch.student.scored_rows))
                loss, _ = objective.loss(rows, heads[0], teacher_hidden, heads[1], batch, None)
            return loss

        student.train()
        with ledger:
            with kernels, one_of_each(base), head_replaced(sides[0].place, at_head) as value_of:
                loss = value_of(
                    student(**models.forward_inputs(student, batch.student.tensors)).logits
                )
                kernels.casts.clear()
            forward, ledger.peak = ledger.peak, ledger.now.copy()
            torch.autograd.backward([loss])
    return forward, ledger.peak


@contextmanager
def one_of_each(model: nn.Module) -> Iterator[None]:
    """Within it the first alone runs of layers that are alike and keep nothing for a backward pass:
    the others have its peak, and an output like its own.
    """
    outputs: dict[Any, Any] = {}
    with ExitStack() as stack:
        for _, layers in outermost_lists(models.base_model(model)):
            for layer in layers:
                run = partial(_run_once, layer, layer.forward, outputs)
                stack.enter_context(forward_is(layer, run))
        yield


def _run_once(layer: nn.Module, forward: Any, outputs: dict, *args: Any, **kwargs: Any) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = list(layer.parameters())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *own)):
        return forward(*args, **kwargs)
    key = type(layer), *((tuple(tensor.shape), tensor.dtype) for tensor in (*own, *given))
    if key not in outputs:
        result = forward(*args, **kwargs)
        outputs[key] = tree_map(_like, result)
        return result
    return tree_map(lambda make: make(), outputs[key])


def _like(value: Any) -> Any:
    """How to make another one."""
    if not isinstance(value, Tensor):
        return lambda: value
    shape, dtype, device = value.shape, value.dtype, value.device
    return lambda: torch.empty(shape, dtype=dtype, device=device)


def _checkpoint(base: Any, kernels: Kernels) -> None:
    """Function modes are off while backward computes a layer again: there the layer's own context
    brings them.
    """
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), kernels.recomputing())}
    _quietly(base.gradient_checkpointing_enable, options)


def _quietly(call: Any, *args: Any) -> None:
    """transformers has another name for it from version 6 on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        call(*args)


def _keep_gradient(ledger: Ledger, share: float) -> Any:
    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None, "it has just been made"
        if share == 1:
            ledger.relabel(parameter.grad, "gradients")
        else:
            ledger.add("gradients", int(share * _bytes(parameter.grad)))
            parameter.grad = None

    return keep


def _cast(head: Any, kernels: Kernels) -> _Head:
    bias = None if head.bias is None else kernels.lower(head.bias)
    return _Head(kernels.lower(head.weight), bias)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def loss_buffers(func: Any, call: dict[str, Any]) -> int:
    """Bytes that gold_kernels::linear_loss takes inside, beside what it returns: logits of a chunk
    of rows, gradients of a panel, and the head's gradient in float32 (docs/memory.md).
    """
    if func._schema.name != "gold_kernels::linear_loss":
        return 0
    student = LinearHead(
        call["student_hidden"], call["student_weight"], row_index=call["student_index"]
    )
    teacher = None
    if call["teacher_hidden"] is not None:
        teacher = LinearHead(
            call["teacher_hidden"], call["teacher_weight"], row_index=call["teacher_index"]
        )
    needs = Needs(*call["needs"])
    limits = Limits(call.get("chunk_size"), call["budget_bytes"], call.get("logits_dtype"))
    row_loss = ROW_LOSSES[call["loss"]].from_flat(call["numbers"], call["tensors"])
    values = torch.empty(0, dtype=torch.float32)
    rows = Rows(values, call.get("labels"), limits, BACKEND, False, student, teacher)
    v_student = student.weight.shape[0]
    v_teacher = 0 if teacher is None else teacher.weight.shape[0]
    limits = row_loss.limits(limits, v_student, v_teacher, rows)
    projection = row_loss.projection()
    plan = plan_chunks(student, teacher, needs, limits, projection)
    size = student.hidden.element_size()
    logits = 4 if limits.logits_dtype is None else limits.logits_dtype.itemsize
    if projection is not None:  # logits become their gradient where they are
        row = 4 * v_student + projection.row_bytes(student.weight)
        return plan.panel * row + plan.chunk * limits.row_bytes
    own_rows = call["budget_bytes"] - limits.budget_bytes  # working memory of its rows
    # what is lent lies in what is returned
    sides = {"student": v_student, "teacher": v_teacher}
    total = plan.chunk * limits.row_bytes + own_rows
    total += plan.chunk * logits * sum(v for side, v in sides.items() if side not in plan.lent)
    if any(needs):
        has_room = "panel" in plan.lent or is_packed(student, needs, limits, projection)
        v_panel = 0 if has_room else v_student
        total += plan.panel * size * (v_panel + student.hidden.shape[1])
    if needs.weight and plan.panel < student.num_rows:
        total += 4 * student.weight.numel()
    return total
