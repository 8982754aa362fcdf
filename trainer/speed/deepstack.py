"""Pictures' features added to the first layers of Qwen3-VL, without asking the device where.

B sequences, L positions, T tokens of pictures, D hidden size.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gold_trainer.speed.replacing import Replacement

METHOD = "_deepstack_process"
PARAMETERS = ["self", "hidden_states", "visual_pos_masks", "visual_embeds"]


def add_features(
    self: Any,
    hidden_states: Tensor,  # (B, L, D)
    visual_pos_masks: Tensor,  # (B, L) bool, T of them true
    visual_embeds: Tensor,  # (T, D)
) -> Tensor:  # (B, L, D)
    """What the model does by a boolean index, whose size only the device knows: it waits four times
    a layer, two of them when the layer's backward pass is nearly all that is left.
    """
    if visual_embeds.shape[0] == 0:
        return hidden_states
    features = visual_embeds.to(hidden_states.device, hidden_states.dtype)
    is_visual = visual_pos_masks.to(hidden_states.device).flatten()
    places = is_visual.to(torch.uint8).sort(descending=True, stable=True).indices
    places = places[: features.shape[0]]
    return hidden_states.flatten(0, 1).index_add(0, places, features).view_as(hidden_states)


def additions_of(models: Iterable[nn.Module | None]) -> list[Replacement]:
    """Replacements in classes of modules that have the method as it is known here."""
    kinds = {type(m) for model in models if model is not None for m in model.modules()}
    return [
        Replacement(kind, METHOD, add_features)
        for kind in kinds
        if METHOD in vars(kind)
        and list(inspect.signature(vars(kind)[METHOD]).parameters) == PARAMETERS
    ]
