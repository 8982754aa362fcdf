"""Liger's JSD losses under their names and with their arguments, and in the place of them.

B sequences, L positions, N rows, D hidden size (D_s, D_t), V vocabulary.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gold_kernels.engine.kinds import check_tensors
from gold_kernels.integrations.patching import Patch, Target, prepare
from gold_kernels.jsd.liger import FusedLinearJSDLoss

FUNCTION = "patch_liger"


class LigerFusedLinearJSDLoss(FusedLinearJSDLoss):
    """liger_kernel.chunked_loss.LigerFusedLinearJSDLoss: half of it is cross-entropy by default."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__(
            weight_hard_loss,
            weight_soft_loss,
            beta,
            ignore_index,
            temperature,
            compiled,
            chunk_size,
            return_soft_hard_loss,
        )


def liger_fused_linear_jsd(
    student_input: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_input: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    shift_labels: Tensor | None = None,  # (N,), which rows are scored; None: all
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: Any = None,  # gradients of the weight are always summed in float32
) -> Tensor:  # ()
    """liger_kernel.transformers.functional.liger_fused_linear_jsd: no cross-entropy."""
    loss = _divergence(jsd_beta, ignore_index, temperature)
    labels = shift_labels
    if labels is None:  # any but the one that is not scored
        check_tensors(FusedLinearJSDLoss.__name__, student_input=student_input)
        scored = int(ignore_index == 0)
        labels = student_input.new_full(student_input.shape[:-1], scored, dtype=torch.int64)
    value: Tensor = loss(student_input, student_weight, teacher_input, teacher_weight, labels)
    return value


def _divergence(jsd_beta: float, ignore_index: int, temperature: float) -> FusedLinearJSDLoss:
    """Checked."""
    return FusedLinearJSDLoss(0.0, 1.0, jsd_beta, ignore_index, temperature, chunk_size=None)


class LigerFusedLinearJSD(nn.Module):
    """liger_kernel.transformers.LigerFusedLinearJSD: no cross-entropy."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: Any = None,
    ) -> None:
        super().__init__()
        _divergence(jsd_beta, ignore_index, temperature)
        self.numbers = jsd_beta, ignore_index, temperature, accum_dtype

    def forward(
        self,
        student_input: Tensor,  # (N, D_s)
        student_weight: Tensor,  # (V, D_s)
        teacher_input: Tensor,  # (N, D_t)
        teacher_weight: Tensor,  # (V, D_t)
        shift_labels: Tensor | None,  # (N,)
    ) -> Tensor:  # ()
        heads = student_input, student_weight, teacher_input, teacher_weight
        return liger_fused_linear_jsd(*heads, shift_labels, *self.numbers)


REPLACED: tuple[Any, ...] = (LigerFusedLinearJSDLoss, LigerFusedLinearJSD, liger_fused_linear_jsd)


def patch_liger(*modules: ModuleType) -> Patch:
    """Replace Liger's names in modules that have imported them, such as your trainer's.

    undo() of the Patch, or the end of `with patch_liger(module):`, puts them back. ValueError for a
    module that has none of the names, or one that takes other arguments.
    """
    if not modules or not all(isinstance(module, ModuleType) for module in modules):
        got = ", ".join(type(module).__name__ for module in modules) or "nothing"
        raise ValueError(
            f"{FUNCTION}: the modules that have imported Liger's names are expected, got {got}; "
            "pass the module in which your trainer makes its loss, imported."
        )
    targets = [
        Target(module, ours.__name__, partial(_ours, ours))
        for module in modules
        for ours in REPLACED
        if ours.__name__ in vars(module)
    ]
    for module in modules:
        if all(target.owner is not module for target in targets):
            names = ", ".join(ours.__name__ for ours in REPLACED)
            raise ValueError(
                f"{FUNCTION}: a module that has imported {names} is expected, got "
                f"{module.__name__}; pass the module in which your trainer makes its loss."
            )
    return Patch(prepare(FUNCTION, targets))


def _ours(ours: Any, _before: Any) -> Any:
    return ours
