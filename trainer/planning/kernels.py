"""What a GPU does and the meta device does not: fused attention, and autocast."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gold_trainer.planning.ledger import is_real

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# The operators of torch's lists for CUDA that models call; others compute in what they are given.
LOWER = {
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d),
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.einsum),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
    functional.scaled_dot_product_attention,
}
WIDER = {
    *(functional.layer_norm, functional.group_norm, functional.softmax, functional.log_softmax),
    *(torch.softmax, torch.rsqrt, torch.pow, torch.exp, torch.cumsum, torch.prod, torch.sum),
    *(Tensor.softmax, Tensor.rsqrt, Tensor.pow, Tensor.__pow__, Tensor.exp, Tensor.cumsum),
    Tensor.sum,
}


class _Attention(torch.autograd.Function):
    """Keeps what fused kernels keep: queries, keys, values, output, a float32 a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query[..., : value.shape[-1]])
        lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class Kernels(TorchFunctionMode):
    def __init__(self, autocast_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = autocast_dtype
        self.casts: dict[int, Tensor] = {}  # of weights, which autocast keeps while it is on

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # autocast leaves calls alone that say where the result goes
        if self.dtype is not None and "out" not in kwargs and (func in LOWER or func in WIDER):
            cast = self.lower if func in LOWER else _wider
            args = _mapped(cast, args)
            kwargs = {name: _mapped(cast, value) for name, value in kwargs.items()}
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return _Attention.apply(named["query"], named["key"], named["value"])
        return func(*args, **kwargs)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """A layer, in backward: what autocast keeps of weights goes with the end of it."""
        try:
            with self:
                yield
        finally:  # the end may come early
            self.casts.clear()

    def lower(self, tensor: Tensor) -> Tensor:
        if self.dtype is None or tensor.dtype != torch.float32:
            return tensor
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            return tensor.to(self.dtype)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(self.dtype)
        return self.casts[id(tensor)]


def _wider(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in SIXTEEN_BITS and not is_real(tensor) else tensor


def _mapped(cast: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return cast(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(cast, part) for part in value)
    return value
