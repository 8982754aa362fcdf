"""The loss in the place of a model's head: the head receives hidden states and returns a loss, or
the hidden states of the scored rows, and never logits.

B sequences, L positions, N scored rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gold_kernels.engine.logit_form import forward_is
from gold_trainer.logit_form import LogitForm, probe_of


def run_to_head(
    model: nn.Module,  # without its wrapper
    wrapper: nn.Module,  # that is called: DDP, or the model itself
    place: nn.Module,  # the head, where the model calls it
    form: LogitForm,
    inputs: dict[str, Any],
    function: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Any]:
    """function(hidden (B, L, D)) of the hidden states that the head receives, and the model's
    output.
    """
    if not form.is_measured:
        measure(model, wrapper, place, form, inputs)
    with head_replaced(place, function) as value_of:
        output = wrapper(**inputs)
        return value_of(output.logits), output


class Passage:
    """A value made at the head, and the way by which its gradient comes back to the head.

    Whatever a wrapper does to a model's output (FSDP casts it to bfloat16), the value does not pass
    through it: it leaves beside the output. The head returns a carrier in its place, small and
    without meaning. Backward starts at the value, and goes from the model's output over the
    carrier through all hooks of model and head, so that DDP, FSDP and ZeRO-3 have their weights
    in place when the gradient reaches the head; the gradient itself waits beside, exact.
    """

    def __init__(self) -> None:
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
        value: Tensor = _Arrive.apply(carrier, self)
        return value


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        return torch.zeros(1, 1, 1, device=value.device)  # what comes next expects (B, L, V)

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
    place: nn.Module,  # the head, where the model calls it
    function: Callable[[Tensor], Tensor],
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the context the head computes function(hidden (B, L, D)) and returns a carrier, which
    comes out as the model's `logits`. Gives the function that makes the value of them. The model
    applies its scale and softcap to the carrier: the function must contain them.

    The model runs through its wrapper as always and meets the head where it expects it: DDP sees
    the weight used, FSDP and ZeRO-3 have it gathered, hooks fire.
    """
    passage = Passage()
    with forward_is(place, lambda hidden: passage.depart(function(hidden))):
        yield passage.arrive


@torch.no_grad()
def measure(
    model: nn.Module, wrapper: nn.Module, place: nn.Module, form: LogitForm, inputs: dict[str, Any]
) -> None:
    """Find the form of a model's logits: one pass more before the first step, in which the head
    returns known numbers. ValueError for a model that does something else with its head.
    """
    seen: list[Tensor] = []
    made: list[Any] = []
    probe = None

    def at_head(hidden: Tensor) -> Tensor:
        nonlocal probe
        seen.append(hidden)
        form.check_hidden(model, hidden, inputs["input_ids"])
        probe = probe_of(model, hidden)
        return probe.clone()

    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no dropout, which would take random numbers; no gradient checkpointing
    # first, before FSDP's own, which casts what the model returns
    hook = model.register_forward_hook(lambda *call: made.append(call[-1]), prepend=True)
    try:
        # one pass: not worth compiling layers for
        with forward_is(place, at_head), torch.compiler.set_stance("force_eager"):
            wrapper(**inputs)
    except (IndexError, RuntimeError, TypeError) as error:
        if probe is None or isinstance(error, torch.OutOfMemoryError):
            raise  # the model's own
        raise form.refusal(model, f"a forward that cannot go on from it ({error})") from error
    finally:
        hook.remove()
        for module, was_training in modes:
            module.training = was_training
    if len(seen) != 1:
        raise form.refusal(model, f"a forward that calls it {len(seen)} times")
    assert probe is not None, "the head was called"
    form.solve(model, probe, getattr(made[-1], "logits", None))


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """(B, L, D) hidden states at flat positions (N,) -> (N, D), where the hidden states are."""
    return hidden.flatten(0, 1).index_select(0, rows.to(hidden.device))
