"""The divergence of trl's stable DistillationTrainer.

B sequences, K completion tokens of the longest, N scored rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import float_dtype
from gold_kernels.engine.kinds import check_same_positions
from gold_kernels.integrations.trl.options import PatchOptions
from gold_kernels.integrations.trl.pending import gathered, whole
from gold_kernels.jsd.linear import fused_linear_jsd


def divergence_of(options: PatchOptions) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function in the place of trl.trainer.distillation_trainer._chunked_divergence_loss."""

    def _chunked_divergence_loss(
        student_hidden_states: Tensor,  # (B, K, D_s)
        teacher_hidden_states: Tensor,  # (B, K, D_t)
        student_lm_head_weight: Tensor,  # (V, D_s)
        teacher_lm_head_weight: Tensor,  # (V, D_t)
        completion_mask: Tensor,  # (B, K), 0 where not scored
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,  # (V,)
        teacher_lm_head_bias: Tensor | None = None,  # (V,)
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # loss, sum of the student's entropies, scored rows; ()
        student_head = student_lm_head_weight, student_lm_head_bias
        teacher_head = teacher_lm_head_weight, teacher_lm_head_bias
        check_same_positions(
            "patch_trl",
            completion_mask=completion_mask.shape,
            student_hidden_states=student_hidden_states.shape[:-1],
            teacher_hidden_states=teacher_hidden_states.shape[:-1],
        )
        rows = (completion_mask.flatten() != 0).nonzero().squeeze(1)
        student_hidden = student_hidden_states.flatten(0, -2)[rows]
        teacher_hidden = teacher_hidden_states.flatten(0, -2)[rows]
        with gathered(*student_head, *teacher_head):
            student_weight, student_bias = (_in_dtype(student_hidden, t) for t in student_head)
            teacher_weight, teacher_bias = (_in_dtype(teacher_hidden, t) for t in teacher_head)
            assert student_weight is not None and teacher_weight is not None, "heads have weights"
            loss, metrics = fused_linear_jsd(
                *(student_hidden, student_weight, teacher_hidden, teacher_weight),
                mean_weights(student_hidden, num_items_in_batch),
                beta=beta,
                temperature=temperature,
                student_bias=student_bias,
                teacher_bias=teacher_bias,
                logit_scale=(student_logit_scale, teacher_logit_scale),
                final_logit_softcapping=(
                    student_final_logit_softcapping,
                    teacher_final_logit_softcapping,
                ),
                return_metrics=True,
                **options,
            )
        return loss, metrics.student_entropy.sum(), (completion_mask != 0).sum()

    return lambda original: _chunked_divergence_loss


def mean_weights(
    hidden: Tensor,  # (N, D)
    num_items: Tensor | int | None,
) -> Tensor:  # (N,)
    """1 / num_items of the global batch, or a mean over the rows that are here."""
    ones = torch.ones(hidden.shape[0], dtype=float_dtype(hidden), device=hidden.device)
    if num_items is None:
        return ones / max(1, hidden.shape[0])
    return ones / (num_items.to(ones) if isinstance(num_items, Tensor) else num_items)


def _in_dtype(hidden: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A part of a head in the dtype of its hidden states, as trl computes it: under mixed precision
    a gathered weight is the float32 original.
    """
    return None if tensor is None else whole(tensor).to(hidden.dtype)
