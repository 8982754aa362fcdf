"""Rows that are padded on the right need no mask: a token does not see those behind it, and of
padding nothing is scored.

A mask costs time. With one torch takes no flash attention: its next kernel computes pairs that the
mask hides, and wants a copy of keys and values for each head of queries. And transformers reads the
mask back, to leave it out where it hides nothing; the host then waits for all that the device was
given before, the student's pass for the teacher's.

B sequences, L positions.
"""

from typing import Any

from torch import Tensor, nn
from transformers import masking_utils

from gold_trainer import models
from gold_trainer.speed.kinds import KERNELS, reason_against_kind
from gold_trainer.speed.on_host import host_of
from gold_trainer.speed.replacing import Replacement

MASK = "attention_mask"
# Of transformers: looks for rows that share a sequence, where there is no mask, and waits for it.
SHARED = "find_packed_sequence_indices"


def without_mask(
    model: nn.Module,
    inputs: dict[str, Any],  # of its forward
    mask: Tensor,  # (B, L) of the text
) -> dict[str, Any]:
    """As they were where padding is elsewhere, or where the model needs to know of it."""
    if inputs.get(MASK) is not mask or not is_padded_behind(mask) or not _is_known(model):
        return inputs
    return {name: value for name, value in inputs.items() if name != MASK}


def is_padded_behind(mask: Tensor) -> bool:
    """False too where nobody on the host knows."""
    known = host_of(mask)
    return known is not None and bool((known[:, 1:] <= known[:, :-1]).all())


def rows_are_whole() -> list[Replacement]:
    """No two rows share a sequence: packed ones have an attention that asks for no mask."""
    has_it = hasattr(masking_utils, SHARED)
    return [Replacement(masking_utils, SHARED, lambda position_ids: None)] if has_it else []


def _is_known(model: nn.Module) -> bool:
    base = models.base_model(model)
    return (
        reason_against_kind(base) is None
        and base.config.get_text_config()._attn_implementation in KERNELS
        and not models.has_router_loss(base)  # which counts no padding
    )
