"""Arguments of another kind than a function takes: a list for a tensor, text for a number.

Unchecked they end in an error of torch or Python that names neither function nor remedy.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# Of numbers that logits are multiplied with, divided by or cut at: beyond, float32 makes 0 or inf
# of them or of their product with logits, and NaN of the loss.
LARGEST_FACTOR = 1e20
LONGEST = 60  # characters of a value in a message


def check_tensors(function: str, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            remedy = "its weight" if isinstance(tensor, nn.Module) else "torch.as_tensor(...) of it"
            got = type(tensor).__name__
            raise ValueError(
                f"{function}: {name} must be a tensor, got {got}; pass "
                f"{'one' if tensor is None else remedy}."
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            got = "a nested one" if tensor.is_nested else str(tensor.layout)
            raise ValueError(
                f"{function}: {name} must be a dense tensor, got {got}; gather its rows, or pass "
                "its to_dense()."
            )
        if is_transformed(tensor):
            raise ValueError(
                f"{function}: {name} must be a tensor outside of torch.func, got one of grad, vmap "
                "or the like, or with a tangent, which this loss does not support; use backward() "
                "or torch.autograd.grad."
            )
        if type(tensor).dequantize is not Tensor.dequantize:  # torchao's say that they are floats
            raise ValueError(
                f"{function}: {name} must be a plain tensor, got {type(tensor).__name__}, which is "
                "quantised; pass its dequantize()."
            )


def is_transformed(tensor: Tensor) -> bool:
    """Whether it is a tensor of torch.func, one of a batch of gradients, or one with a tangent of
    forward-mode autograd. torch has no public way to ask.
    """
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    is_batch = functorch.is_legacy_batchedtensor(tensor)  # of is_grads_batched=True
    if is_batch or functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def has_numbers(tensor: Tensor) -> bool:
    """Tensors of the meta device and of a FakeTensorMode have shapes alone, and within such a mode
    nobody reads those of others.
    """
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    fake = torch._C._TorchDispatchModeKey.FAKE
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(fake) is None


def is_readable(tensor: Tensor) -> bool:
    """Whether a look at its numbers waits for nothing: but on a CPU it waits for the device."""
    is_there = not torch.compiler.is_compiling() and has_numbers(tensor)
    return is_there and tensor.device.type == "cpu"


def check_same_positions(function: str, **shapes: Sequence[int]) -> None:
    """Shapes without the last dimension, (B, L) or flat (N,): rows of tensors that are flattened
    belong together only if all that are not flat are of one shape.
    """
    layouts = {name: tuple(shape) for name, shape in shapes.items() if len(shape) > 1}
    if len(set(layouts.values())) > 1:
        got = ", ".join(f"{shape} of {name}" for name, shape in layouts.items())
        raise ValueError(
            f"{function}: positions must be the same (B, L) in all tensors, got {got}; pass the "
            "states and labels of one batch, or rows that you have gathered yourself."
        )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_flags(function: str, **flags: Any) -> None:
    """Any text is true in Python, "False" too."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(
                f"{function}: {name} must be True or False, got {repr(value)[:LONGEST]}; pass one "
                "of them."
            )


def check_number(function: str, name: str, value: Any) -> None:
    if not is_number(value):
        is_pair = isinstance(value, tuple | list)
        remedy = "one number, not a pair" if is_pair else "float(...) of what holds it"
        if value is None:  # a config has it for what a model does not do
            remedy = "one, or leave it out"
        raise ValueError(
            f"{function}: {name} must be a number of Python, got {repr(value)[:LONGEST]}; pass "
            f"{remedy}."
        )


def check_factor(
    function: str, name: str, value: Any, remedy: str, expected: str = "positive and finite"
) -> None:
    """A positive number that float32 can multiply logits with and divide them by."""
    check_number(function, name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{function}: {name} must be {expected}, got {value}; {remedy}")
    if not 1 / LARGEST_FACTOR <= value <= LARGEST_FACTOR:
        raise ValueError(
            f"{function}: {name} must be in [{1 / LARGEST_FACTOR:g}, {LARGEST_FACTOR:g}], got "
            f"{repr(value)[:LONGEST]}, which float32 cannot multiply logits with or divide them "
            f"by; {remedy}"
        )


def check_weight(function: str, name: str, value: Any) -> None:
    """The weight of a part of a loss."""
    check_number(function, name, value)
    if not 0 <= value <= LARGEST_FACTOR:
        raise ValueError(
            f"{function}: {name} must be in [0, {LARGEST_FACTOR:g}], got {value}; 0 leaves a part "
            "out."
        )
