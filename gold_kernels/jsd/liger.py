"""The module that Liger's users know, as an adapter of fused_linear_jsd.

N rows, B sequences, L positions, D hidden size (D_s, D_t), V vocabulary.
"""

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from gold_kernels.engine import checks
from gold_kernels.engine.agreement import own_rows, told
from gold_kernels.engine.chunk_plan import float_dtype
from gold_kernels.engine.kinds import (
    check_same_positions,
    check_tensors,
    check_weight,
    has_numbers,
    is_whole,
)
from gold_kernels.engine.options import LossOptions, Options, UnchunkedOptions
from gold_kernels.engine.row_loss import CROSS_ENTROPY, LOSS
from gold_kernels.engine.shared import RowValues, shared_linear_loss
from gold_kernels.jsd.row_loss import JSD

FUNCTION = "FusedLinearJSDLoss"


class FusedLinearJSDLoss(nn.Module):
    """Generalized JSD plus cross-entropy, a drop-in for LigerFusedLinearJSDLoss.

        loss = weight_soft_loss * mean_i JSD_i + weight_hard_loss * mean_i CE_i

    The mean is over the rows whose label is not ignore_index; only they are projected, which costs
    one host sync to count them (gather rows yourself and call fused_linear_jsd to avoid it). Labels
    are already shifted. The cross-entropy is taken at temperature 1 from the same logits. A label
    outside the vocabulary has cross-entropy 0, and its row still counts.

    return_soft_hard_loss returns (loss, soft loss, hard loss): a part of weight 0 is computed too,
    which projects the rows once more. `compiled` keeps the position it has in Liger; the loss never
    calls torch.compile, so it changes nothing. Further options are those of LossOptions in
    gold_kernels.engine.options.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = 1024,
        return_soft_hard_loss: bool = False,
        **options: Unpack[UnchunkedOptions],
    ) -> None:
        super().__init__()
        self.options: LossOptions = {"chunk_size": chunk_size, **options}
        checks.check_module(FUNCTION, self.options, return_soft_hard_loss=return_soft_hard_loss)
        if self.options.get("reduction", "sum") != "sum":
            raise ValueError(
                f"{FUNCTION}: reduction must be 'sum', got {self.options['reduction']!r}; this "
                "module is a mean over labels: call fused_linear_jsd for losses of rows."
            )
        self.row_loss = JSD(beta, temperature)
        self.row_loss.check(FUNCTION)
        check_weight(FUNCTION, "weight_hard_loss", weight_hard_loss)
        check_weight(FUNCTION, "weight_soft_loss", weight_soft_loss)
        if not is_whole(ignore_index) or not -(1 << 63) <= ignore_index < 1 << 63:
            raise ValueError(
                f"{FUNCTION}: ignore_index must be a whole number of 64 bits, got "
                f"{ignore_index!r}; -100 is the one of transformers' collators."
            )
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # (N, D_s) or (B, L, D_s)
        student_weight: Tensor,  # (V, D_s)
        teacher_input: Tensor,  # (N, D_t) or (B, L, D_t)
        teacher_weight: Tensor,  # (V, D_t)
        true_labels: Tensor,  # (N,) or (B, L), int64
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # (), or loss, soft loss and hard loss, each ()
        """Shapes: student_input (N, D_s) or (B, L, D_s), student_weight (V, D_s), teacher_input
        (N, D_t) or (B, L, D_t), teacher_weight (V, D_t), true_labels (N,) or (B, L) int64, already
        shifted, student_bias (V,), teacher_bias (V,). Returns () float32, in nats.
        """
        given = student_input, student_weight, teacher_input, teacher_weight, true_labels
        with told(self.options.get("process_group"), student_input, student_weight):
            student_hidden, teacher_hidden, labels = _checked_rows(*given)
        scored: Tensor | slice = slice(None)
        if has_numbers(labels):  # else nobody can count rows
            scored = (labels != self.ignore_index).nonzero().squeeze(-1)
        heads = (student_hidden[scored], student_weight, teacher_hidden[scored], teacher_weight)
        labels, biases = labels[scored], (student_bias, teacher_bias)
        soft, hard = self.weight_soft_loss, self.weight_hard_loss
        loss, rows = self._weighted(heads, biases, labels if hard else None, soft, hard)
        if not self.return_soft_hard_loss:
            return loss
        if not (soft and hard):  # rows of weight 0 are not computed
            with torch.no_grad():
                rows = self._weighted(heads, biases, labels, 1.0, 1.0)[1]
        num_scored, parts = max(1, labels.shape[0]), rows.by_name()
        return loss, parts[LOSS].sum() / num_scored, parts[CROSS_ENTROPY].sum() / num_scored

    def _weighted(
        self,
        heads: tuple[Tensor, Tensor, Tensor, Tensor],
        biases: tuple[Tensor | None, Tensor | None],
        labels: Tensor | None,
        soft: float,
        hard: float,
    ) -> tuple[Tensor, RowValues]:
        """Means over rows, weighted."""
        num_rows = heads[0].shape[0]
        like = heads[0].new_full((num_rows,), 1 / max(1, num_rows), dtype=float_dtype(heads[0]))
        options = Options(
            *biases,
            labels,
            None if labels is None else like * hard,
            **self.options,
        )
        return shared_linear_loss(FUNCTION, self.row_loss, *heads, like * soft, options, False)


def _rows(name: str, states: Tensor) -> Tensor:  # (D,), (N, D) or (B, L, D) -> (N, D)
    if states.ndim == 0:
        raise ValueError(
            f"{FUNCTION}: {name} must be (N, D) or (B, L, D), got shape (); pass the last hidden "
            "states."
        )
    return states.unsqueeze(0) if states.ndim == 1 else states.flatten(0, -2)


def _checked_rows(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    true_labels: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, D_s), (N, D_t), (N,)
    check_tensors(
        FUNCTION,
        student_input=student_input,
        student_weight=student_weight,
        teacher_input=teacher_input,
        teacher_weight=teacher_weight,
        true_labels=true_labels,
    )
    student_input = own_rows(FUNCTION, "student_input", student_input)
    teacher_input = own_rows(FUNCTION, "teacher_input", teacher_input)
    true_labels = own_rows(FUNCTION, "true_labels", true_labels)
    check_same_positions(
        FUNCTION,
        student_input=student_input.shape[:-1],
        teacher_input=teacher_input.shape[:-1],
        true_labels=true_labels.shape,
    )
    labels = true_labels.flatten()
    student_hidden = _rows("student_input", student_input)
    teacher_hidden = _rows("teacher_input", teacher_input)
    checks.check_pair(FUNCTION, student_hidden, teacher_hidden)
    checks.check_labels(FUNCTION, labels, student_hidden)
    return student_hidden, teacher_hidden, labels
