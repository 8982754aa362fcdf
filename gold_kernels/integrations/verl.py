"""A distillation loss of verl over the full vocabulary, from hidden states, per token.

    register_fused_jsd(student_head, teacher_head, beta=0.0)
    # and in the config: distillation.distillation_loss.loss_mode=fused_jsd

B responses, L tokens of the longest, D hidden size (D_s, D_t), V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gold_kernels.engine.checks import check_module
from gold_kernels.engine.kinds import check_same_positions, check_tensors
from gold_kernels.jsd.linear import fused_linear_jsd
from gold_kernels.jsd.row_loss import JSD

FUNCTION = "register_fused_jsd"
STUDENT, TEACHER = "student_hidden_states", "teacher_hidden_states"


def register_fused_jsd(
    student_head: nn.Linear,
    teacher_head: nn.Linear,
    *,
    name: str = "fused_jsd",
    beta: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int
    | None = None,  # shared entries, where heads of one tokenizer are padded differently
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Register the loss under a name, and return it.

    It reads model_output["student_hidden_states"] (B, L, D_s), data["teacher_hidden_states"]
    (B, L, D_t), the states that predict each response token, and data["response_mask"] (B, L), and
    gives (losses (B, L), 0 where the mask is, and metrics). verl clamps, weights and averages them.
    """
    JSD(beta, temperature).check(FUNCTION)
    check_module(FUNCTION, {"vocab_size": vocab_size})
    for side, head in (("student", student_head), ("teacher", teacher_head)):
        check_tensors(FUNCTION, **{f"the weight of {side}_head": getattr(head, "weight", None)})
    from verl.trainer.distillation.losses import (
        DistillationLossSettings,
        register_distillation_loss,
    )

    def fused_jsd(
        config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = data["response_mask"]
        check_same_positions(
            FUNCTION,
            response_mask=mask.shape,
            **{STUDENT: model_output[STUDENT].shape[:-1], TEACHER: data[TEACHER].shape[:-1]},
        )
        rows = mask.flatten().nonzero().squeeze(1)
        hidden = [states.flatten(0, 1)[rows] for states in (model_output[STUDENT], data[TEACHER])]
        losses = fused_linear_jsd(
            *(hidden[0], student_head.weight, hidden[1], teacher_head.weight),
            beta=beta,
            temperature=temperature,
            vocab_size=vocab_size,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            reduction="none",
        )
        padded = torch.zeros(mask.numel(), dtype=losses.dtype, device=losses.device)
        metrics = {f"distillation/{name}": losses.detach().sum().item() / max(1, len(rows))}
        return padded.index_put((rows,), losses).view(mask.shape), metrics

    settings = DistillationLossSettings(names=[name], use_estimator=True)
    register_distillation_loss(settings)(fused_jsd)
    return fused_jsd
