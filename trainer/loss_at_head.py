"""The loss in the place of a model's head: the head receives hidden states and returns a loss, or
the hidden states of the scored rows, and never logits.

B sequences, L positions, N scored rows, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# Config field -> exponent of its value in the factor that logits are multiplied with.
SCALE_FIELDS = {
    "logit_scale": 1,  # Cohere
    "logits_scaling": -1,  # Granite divides
    "lm_head_multiplier": 1,  # Falcon H1
    "output_multiplier": 1,
}


@dataclass
class LogitForm:
    """What a model makes of its head's output x: softcap(scale x), softcap(x) = c tanh(x / c)."""

    side: str
    scale: float = 1.0
    softcap: float | None = None  # c
    is_checked: bool = False

    @classmethod
    def from_config(cls, config: PretrainedConfig, side: str) -> "LogitForm":
        config = config.get_text_config()
        scale = 1.0
        for name, exponent in SCALE_FIELDS.items():
            scale *= (getattr(config, name, None) or 1.0) ** exponent
        return cls(side, scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, x: Tensor) -> Tensor:
        x = self.scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def check(self, x: Tensor, actual: Tensor) -> None:
        """Once, on what the model made of x, so that no other form goes unnoticed."""
        if self.is_checked:
            return
        rtol = 8 * torch.finfo(x.dtype).eps
        expected, actual = self(x.detach().float()), actual.detach().float().to(x.device)
        if actual.shape != x.shape or not torch.allclose(
            actual, expected, rtol=rtol, atol=0.0, equal_nan=True
        ):
            raise ValueError(
                f"GOLDTrainer: the {self.side}'s logits must be softcap(scale * (hidden weight^T + "
                f"bias)) with scale={self.scale} and softcap={self.softcap} from its config, got "
                "something else from its forward; choose a model whose logits are."
            )
        self.is_checked = True


@contextmanager
def head_replaced(
    model: nn.Module, head: nn.Module, form: LogitForm, function: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within the context the head computes function(hidden (B, L, D)), and its result comes out as
    the model's `logits`.

    The model runs through its wrapper as always and meets the head where it expects it: DDP sees
    the weight used, FSDP and ZeRO-3 have it gathered, hooks fire. The model still applies its
    scale and softcap to what the head returns. They are undone here: the function must contain
    them.
    """
    results = []

    def at_head(hidden: Tensor) -> Tensor:
        results.append(function(hidden))
        return results[-1]

    def undo_form(_model: nn.Module, _args: Any, output: Any) -> None:
        result = results.pop()
        form.check(result, output.logits)
        output.logits = result.to(output.logits.device)  # where a dispatched model returns it

    before = vars(head).get("forward")  # that of a hook, where accelerate put one
    head.forward = at_head
    # first, so that FSDP's own hook meets the tensor that backward starts from
    hook = model.register_forward_hook(undo_form, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        del head.forward
        if before is not None:
            head.forward = before


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """(B, L, D) hidden states at flat positions (N,) -> (N, D)."""
    return hidden.flatten(0, 1).index_select(0, rows)
