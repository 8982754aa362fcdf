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
# What a head returns once, to see what its model makes of it.
PROBE = (-64.0, -8.0, -1.0, 0.0, 0.5, 2.0, 16.0, 128.0)


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

    def check(self, actual: Tensor) -> None:
        """Once, on what the model made of PROBE, so that no other form goes unnoticed."""
        if self.is_checked:
            return
        rtol = 8 * torch.finfo(actual.dtype).eps
        expected, actual = self(torch.tensor(PROBE)), actual.detach().float().cpu()
        if actual.shape != expected.shape or not torch.allclose(
            actual, expected, rtol=rtol, atol=0.0
        ):
            raise ValueError(
                f"GOLDTrainer: the {self.side}'s logits must be softcap(scale * (hidden weight^T + "
                f"bias)) with scale={self.scale} and softcap={self.softcap} from its config, got "
                "something else from its forward; choose a model whose logits are."
            )
        self.is_checked = True


class Passage:
    """A value made at the head, and the way by which its gradient comes back to the head.

    Whatever a wrapper does to a model's output (FSDP casts it to bfloat16), the value does not pass
    through it: it leaves beside the output. The head returns a carrier in its place, small and
    without meaning. Backward starts at the value, and goes from the model's output over the
    carrier through all hooks of model and head, so that DDP, FSDP and ZeRO-3 have their weights
    in place when the gradient reaches the head; the gradient itself waits beside, exact.
    """

    def __init__(self, form: LogitForm) -> None:
        self.form = form
        self.value: Tensor | None = None
        self.grad: Tensor | None = None

    def depart(self, value: Tensor) -> Tensor:
        """What the head returns instead of the value."""
        assert self.value is None, "a model calls its head once"
        self.value = value.detach()
        carrier: Tensor = _Depart.apply(value, self)
        return carrier

    def arrive(self, carrier: Tensor) -> Tensor:
        """The value, with the carrier's graph, for what came out of the model."""
        self.form.check(carrier)
        value: Tensor = _Arrive.apply(carrier, self)
        return value


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        if passage.form.is_checked:
            return torch.zeros((), device=value.device)
        return torch.tensor(PROBE, device=value.device)

    @staticmethod
    def backward(ctx: Any, _grad_carrier: Tensor) -> tuple[Tensor | None, None]:
        return ctx.passage.grad, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, passage: Passage) -> Tensor:
        assert passage.value is not None, "the model has called its head"
        ctx.passage, ctx.carrier = passage, (carrier.shape, carrier.dtype, carrier.device)
        return passage.value.to(carrier.device).detach()  # a dispatched model returns it elsewhere

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None]:
        ctx.passage.grad = grad_value.to(ctx.passage.value.device)
        shape, dtype, device = ctx.carrier
        return torch.zeros(shape, dtype=dtype, device=device), None


@contextmanager
def head_replaced(
    head: nn.Module, form: LogitForm, function: Callable[[Tensor], Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the context the head computes function(hidden (B, L, D)) and returns a carrier, which
    comes out as the model's `logits`. Gives the function that makes the value of them. The model
    applies its scale and softcap to the carrier: the function must contain them.

    The model runs through its wrapper as always and meets the head where it expects it: DDP sees
    the weight used, FSDP and ZeRO-3 have it gathered, hooks fire.
    """
    passage = Passage(form)
    before = vars(head).get("forward")  # that of a hook, where accelerate put one
    head.forward = lambda hidden: passage.depart(function(hidden))
    try:
        yield passage.arrive
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """(B, L, D) hidden states at flat positions (N,) -> (N, D)."""
    return hidden.flatten(0, 1).index_select(0, rows)
