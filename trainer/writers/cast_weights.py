"""Matrices in the dtype that autocast would cast them to, once instead of at every token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def cast_weights(model: nn.Module, device: torch.device) -> Iterator[int]:
    """Within autocast: linear layers have copies of their weights. Gives the bytes they take.

    The numbers are those of autocast, which casts the same weights to the same dtype. A layer's own
    parameter comes back at the end, the same object; embeddings tied to a head keep theirs.
    """
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        yield 0
        return
    dtype = torch.get_autocast_dtype(kind)
    copies: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.dtype != torch.float32 or parameter.is_meta:
                continue
            if id(parameter) not in copies:
                copy = parameter.detach().to(dtype)
                copies[id(parameter)] = nn.Parameter(copy, requires_grad=False)
            replaced.append((module, name, parameter))
    try:
        for module, name, parameter in replaced:
            module._parameters[name] = copies[id(parameter)]
        yield sum(copy.numel() * copy.element_size() for copy in copies.values())
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
