"""The form of a model's logits, measured on the model itself.

A config may have a field for it that the model does not use: LLaVA-NeXT with Granite as its
language model applies no scale, Granite alone does.

B sequences, L positions, D hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gold_trainer.models import base_model

SMALL = 1e-6  # tanh(x) is x for these and any scale up to 1e3
LOG_RANGE = (-8, 8)  # magnitudes of the probe; softcaps are reached below


def probe_of(model: nn.Module, hidden: Tensor) -> Tensor:  # (1, 2, V)
    """Numbers of all magnitudes and both signs, in every column a small and a large one; float64,
    as a model multiplies by numbers of Python.
    """
    num_entries = base_model(model).get_output_embeddings().weight.shape[0]
    dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
    sizes = torch.logspace(*LOG_RANGE, max(num_entries, 2), dtype=dtype, device=hidden.device)
    signs = 1 - 2 * (torch.arange(len(sizes), device=hidden.device) % 2)
    row = (sizes * signs)[:num_entries]
    return torch.stack([row, row.flip(0)]).unsqueeze(0)


@dataclass
class LogitForm:
    """What a model makes of its head's output x: softcap(scale x), softcap(x) = c tanh(x / c), of
    the first entries where its head has more (Inkling's is padded).
    """

    side: str  # "student" or "teacher", for messages
    scale: float = 1.0
    softcap: float | None = None  # c
    num_entries: int | None = None  # None: all of the head
    is_measured: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        x = self.scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def check_hidden(self, model: nn.Module, hidden: Tensor, input_ids: Tensor) -> None:
        if hidden.ndim != 3 or hidden.shape[:2] != input_ids.shape:
            raise self.refusal(
                model,
                f"hidden states of shape {tuple(hidden.shape)} at its head for input_ids of shape "
                f"{tuple(input_ids.shape)}",
            )

    def solve(self, model: nn.Module, probe: Tensor, logits: Tensor | None) -> None:
        """Scale and softcap from logits, which the model made of the probe (1, 2, V)."""
        if logits is None or logits.shape[:2] != probe.shape[:2] or logits.ndim != 3:
            shape = None if logits is None else tuple(logits.shape)
            raise self.refusal(model, f"logits of shape {shape} for {tuple(probe.shape)} of a head")
        if logits.shape[2] < probe.shape[2]:
            self.num_entries = logits.shape[2]
            probe = probe[:, :, : self.num_entries]
        if logits.shape != probe.shape or logits.shape[2] == 0:
            raise self.refusal(model, f"{logits.shape[2]} logits for {probe.shape[2]} of a head")
        rtol = max(8 * torch.finfo(logits.dtype).eps, 1e-6)
        x, actual = probe.cpu().double(), logits.detach().cpu().double()
        is_small = x.abs() <= SMALL
        scale = (actual[is_small] / x[is_small]).mean().item()
        self.scale = 1.0 if abs(scale - 1) < rtol else scale
        largest = x.abs().argmax()
        end = actual.flatten()[largest].abs().item()
        linear_end = abs(self.scale) * x.flatten()[largest].abs().item()
        is_linear = math.isclose(end, linear_end, rel_tol=rtol)
        self.softcap = None if is_linear else end
        is_form = math.isfinite(self.scale) and self.scale != 0 and end > 0
        if not is_form or not torch.allclose(actual, self(x), rtol=rtol, atol=0.0):
            raise self.refusal(model, "logits that are something else")
        self.is_measured = True

    def refusal(self, model: nn.Module, what: str) -> ValueError:
        return ValueError(
            f"GOLDTrainer: the {self.side}'s logits must be softcap(scale * (hidden weight^T + "
            f"bias)) of its lm_head at all positions, got {what} from "
            f"{type(base_model(model)).__name__}; choose a model whose logits are, docs/models.md "
            "lists them."
        )
