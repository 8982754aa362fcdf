"""What a model makes of its head's output, measured with known numbers in the head's place.

A config may have a field for it that the model does not use: LLaVA-NeXT with Granite as its
language model applies no scale, Granite alone does.

V rows of the head.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

SMALL = 1e-6  # tanh(x) is x for these and any scale up to 1e3
LOG_RANGE = (-8, 8)  # magnitudes of the probe; softcaps are reached below


class LogitForm(NamedTuple):
    """logits = softcap(scale x), softcap(x) = c tanh(x / c), of the first entries where the head
    has more (Inkling's is padded).
    """

    scale: float = 1.0
    softcap: float | None = None  # c
    num_entries: int | None = None  # None: all of the head

    def __call__(self, x: Tensor) -> Tensor:
        x = self.scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


@contextmanager
def forward_is(module: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Within the context the module computes function; its hooks fire as always."""
    before = vars(module).get("forward")  # that of a hook, where accelerate put one
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def probe_rows(num_entries: int, device: torch.device) -> Tensor:  # (1, 2, V)
    """Numbers of all magnitudes and both signs, in every column a small and a large one; float64,
    as a model multiplies by numbers of Python.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sizes = torch.logspace(*LOG_RANGE, max(num_entries, 2), dtype=dtype, device=device)
    signs = 1 - 2 * (torch.arange(len(sizes), device=device) % 2)
    row = (sizes * signs)[:num_entries]
    return torch.stack([row, row.flip(0)]).unsqueeze(0)


@torch.no_grad()
def solve_form(
    probe: Tensor,  # (1, 2, V), that the head returned
    logits: Tensor | None,  # what the model made of it
) -> LogitForm | str:  # why there is none, as an object of "got"
    if logits is None or logits.shape[:2] != probe.shape[:2] or logits.ndim != 3:
        shape = None if logits is None else tuple(logits.shape)
        return f"logits of shape {shape} for {tuple(probe.shape)} of a head"
    num_entries = None
    if logits.shape[2] < probe.shape[2]:
        num_entries = logits.shape[2]
        probe = probe[:, :, :num_entries]
    if logits.shape != probe.shape or logits.shape[2] == 0:
        return f"{logits.shape[2]} logits for {probe.shape[2]} of a head"
    rtol = max(8 * torch.finfo(logits.dtype).eps, 1e-6)
    x, actual = probe.cpu().double(), logits.detach().cpu().double()
    is_small = x.abs() <= SMALL
    scale = (actual[is_small] / x[is_small]).mean().item()
    scale = 1.0 if abs(scale - 1) < rtol else scale
    largest = x.abs().argmax()
    end = actual.flatten()[largest].abs().item()
    linear_end = abs(scale) * x.flatten()[largest].abs().item()
    is_linear = math.isclose(end, linear_end, rel_tol=rtol)
    form = LogitForm(scale, None if is_linear else end, num_entries)
    is_form = math.isfinite(scale) and scale != 0 and end > 0
    if not is_form or not torch.allclose(actual, form(x), rtol=rtol, atol=0.0):
        return "logits that are something else"
    return form
