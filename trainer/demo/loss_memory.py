"""Peak memory of the loss alone, eager and fused, on the shapes of one batch of the demo."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from gold_kernels import (
    fused_linear_jsd,
    fused_linear_uld,
    peak_extra_bytes,
    reference,
)
from gold_kernels.uld import reference as reference_uld


def loss_peak_bytes(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    num_rows: int,
    chunk_size: int,
    is_cross: bool,
) -> tuple[int, int]:
    """(eager, fused) peak bytes of forward and backward above inputs, random hidden states; of ULD
    where student and teacher have two vocabularies, else of JSD.
    """
    eager_loss = reference_uld.linear_uld if is_cross else reference.linear_jsd
    fused_loss = fused_linear_uld if is_cross else fused_linear_jsd
    device = student.device
    heads = [model.get_output_embeddings().weight.detach() for model in (student, teacher)]
    hidden = [torch.randn(num_rows, head.shape[1], device=device) for head in heads]
    leaves = (hidden[0].requires_grad_(), heads[0].clone().requires_grad_())

    def step(loss_function: Callable[..., Any], **options: int) -> None:
        loss = loss_function(*leaves, hidden[1], heads[1], **options)
        torch.autograd.grad(loss, leaves)

    step(fused_loss, chunk_size=chunk_size)  # workspaces and compiled kernels do not count
    eager = peak_extra_bytes(lambda: step(eager_loss), device)
    fused = peak_extra_bytes(lambda: step(fused_loss, chunk_size=chunk_size), device)
    return eager, fused
