"""The generalized JSD of trl's GKDTrainer and GOLDTrainer, from hidden states.

B sequences, L positions, N scored rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gold_kernels.engine.kinds import check_same_positions
from gold_kernels.integrations.trl.losses import takes_pending_logits
from gold_kernels.integrations.trl.options import PatchOptions
from gold_kernels.integrations.trl.pending import (
    PendingLogits,
    head_options,
    head_weight,
    heads_at_hand,
)
from gold_kernels.integrations.trl.stable import mean_weights
from gold_kernels.jsd.linear import fused_linear_jsd

IGNORED = -100


def gkd_jsd(options: PatchOptions) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def of(original: Callable[..., Any]) -> Callable[..., Any]:
        @takes_pending_logits
        def generalized_jsd_loss(
            student_logits: Any,  # PendingLogits, or a tensor, which trl's own function takes
            teacher_logits: Any,
            labels: Tensor | None = None,  # (B, L)
            beta: float = 0.5,
            temperature: float = 1.0,
            reduction: str = "batchmean",
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor:
            logits = student_logits, teacher_logits
            if is_taken(logits, labels, reduction, num_items_in_batch):
                return fused_jsd(*logits, labels, beta, temperature, num_items_in_batch, options)
            logits = made(student_logits), made(teacher_logits)
            return original(*logits, labels, beta, temperature, reduction, num_items_in_batch)

        return generalized_jsd_loss

    return of


def gold_jsd(options: PatchOptions) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def of(original: Callable[..., Any]) -> Callable[..., Any]:
        @takes_pending_logits
        def generalized_jsd_loss(
            student_logits: Any,  # PendingLogits, or a tensor, which trl's own function takes
            teacher_logits: Any,
            labels: Tensor | None = None,  # (B, L)
            beta: float = 0.5,
            temperature: float = 1.0,
            reduction: str = "batchmean",
            logits_are_probs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor:
            logits = student_logits, teacher_logits
            if not logits_are_probs and is_taken(logits, labels, reduction, num_items_in_batch):
                return fused_jsd(*logits, labels, beta, temperature, num_items_in_batch, options)
            logits = made(student_logits), made(teacher_logits)
            given = labels, beta, temperature, reduction, logits_are_probs, num_items_in_batch
            return original(*logits, *given)

        return generalized_jsd_loss

    return of


def is_taken(logits: Any, labels: Tensor | None, reduction: str, num_items: Any) -> bool:
    """Whether the loss is a mean over scored rows, or their sum divided by num_items."""
    is_mean = reduction == "batchmean" or num_items is not None
    return (
        all(isinstance(side, PendingLogits) for side in logits) and labels is not None and is_mean
    )


def made(logits: Any) -> Tensor:
    return logits.logits() if isinstance(logits, PendingLogits) else logits


def fused_jsd(
    student: PendingLogits,
    teacher: PendingLogits,
    labels: Tensor | None,  # (B, L)
    beta: float,
    temperature: float,
    num_items: Tensor | int | None,
    options: PatchOptions,
    *,
    vocab_size: int | None = None,
) -> Tensor:  # ()
    assert labels is not None, "is_taken() has seen them"
    sides = {"student_logits": student, "teacher_logits": teacher}
    positions = {name: side.hidden.shape[:-1] for name, side in sides.items()}
    check_same_positions("generalized_jsd_loss", labels=labels.shape, **positions)
    rows = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    student_rows, teacher_rows = student.rows(rows), teacher.rows(rows)
    with heads_at_hand(student, teacher):
        loss: Tensor = fused_linear_jsd(
            *(student_rows, head_weight(student), teacher_rows, head_weight(teacher)),
            mean_weights(student_rows, num_items),
            beta=beta,
            temperature=temperature,
            vocab_size=vocab_size,
            **head_options(student, teacher),
            **options,
        )
    return loss
