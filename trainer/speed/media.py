"""Methods of Qwen-VL that ask the device about pictures: how many patches each has, and where its
placeholders are. Sizes and ids are known on the host, where they are answered.

Without it a forward pass waits for all that the device was given before, three times: the student's
for the teacher's whole pass.

B sequences, L positions.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from gold_trainer.speed.on_host import GOES_TO, host_of, sent
from gold_trainer.speed.replacing import Replacement

TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SIZES = {"get_image_features": "image_grid_thw", "get_video_features": "video_grid_thw"}
PLACES = "get_placeholder_mask"
PARAMETERS = ["self", "input_ids", "inputs_embeds", "image_features", "video_features"]


def methods_of(models: Iterable[nn.Module | None]) -> list[Replacement]:
    """Replacements of the methods that are as they are known here."""
    modules = (m for model in models if model is not None for m in model.modules())
    kinds = {kind for own in {type(m) for m in modules} for kind in own.__mro__}  # below FSDP's
    found = []
    for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
        if kind.__module__.rpartition(".modeling_")[2] not in TYPES:
            continue
        for name, sizes in SIZES.items():
            method = vars(kind).get(name)
            if method is not None and sizes in inspect.signature(method).parameters:
                found.append(Replacement(kind, name, with_sizes(method, sizes)))
        method = vars(kind).get(PLACES)
        if method is not None and list(inspect.signature(method).parameters) == PARAMETERS:
            found.append(Replacement(kind, PLACES, with_places(method)))
    return found


def with_sizes(method: Callable, name: str) -> Callable:
    """The method with sizes of pictures on the host; what it makes of them goes to the device."""
    signature = inspect.signature(method)

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        sizes: Tensor | None = given.arguments.get(name)
        host = None if sizes is None else host_of(sizes)
        if sizes is None or host is None or host is sizes:
            return method(*args, **kwargs)
        given.arguments[name] = host.view_as(host)
        setattr(given.arguments[name], GOES_TO, sizes.device)
        return method(*given.args, **given.kwargs)

    return run


def with_places(method: Callable) -> Callable:
    """The method with ids on the host, where it counts placeholders, and its masks (B, L, 1)."""

    @wraps(method)
    def run(
        self: Any, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        host = None if input_ids is None else host_of(input_ids)
        if host is None or host is input_ids:
            return method(self, input_ids, inputs_embeds, *args, **kwargs)
        embeds = torch.empty(1, dtype=inputs_embeds.dtype).expand(inputs_embeds.shape)
        masks = method(self, host, embeds, *args, **kwargs)
        return tuple(sent(mask, inputs_embeds.device) for mask in masks)

    return run
