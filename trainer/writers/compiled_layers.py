"""A model's layers compiled for a decoding step: one graph that all of them share.

What a layer does between its matrix products is dozens of small kernels, which cost more than the
products when each row has one token. Compiling the model as a whole takes half a minute and grows
with its layers; compiling one layer takes seconds. For that all layers have to look alike: within
the context each finds its own part of the cache in the place of the first one's. Layers of the
usual kind are not compiled at all, where a GPU has kernels for them (kernel_layers.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gold_kernels.triton.launch import default_backend
from gold_trainer.writers.fixed_cache import Batch
from gold_trainer.writers.kernel_layers import Step, compared, fit
from gold_trainer.writers.prefill import CannotDecode
from gold_trainer.writers.shared_inputs import MOST_ROWS, shares_inputs

# Arguments of attention with which it is more than softmax(scale q k^T + mask) v.
BESIDE = ("softcap", "s_aux", "position_bias")
MOST_WIDTH = 256  # of a head, in our kernel
# Graphs of a layer, at least: torch counts them by a function of nn.Module's, which the layers of
# all models of a process share.
LIMIT = 64

Within = Callable[[Batch], AbstractContextManager[Any]]  # in which steps of the batch may run


@torch.library.custom_op("gold_trainer::attend", mutates_args=())
def attend(
    query: Tensor,  # (B, heads, 1, D)
    key: Tensor,  # (B, heads of keys, L, D)
    value: Tensor,  # (B, heads of keys, L, D')
    mask: Tensor | None,  # (B, 1, 1, L)
    scale: float | None,
) -> Tensor:  # (B, 1, heads, D')
    """Attention of one token a row. Heads that share a key are queries beside each other, so that
    no key is copied; an operator, so that no compiler takes it apart.
    """
    num_rows, num_heads, _, width = query.shape
    if has_kernel(query, key, value, mask):
        from gold_trainer.writers.attention_kernel import attend_rows

        seen = None if mask is None else mask[:, 0, 0].contiguous()
        states = attend_rows(query[:, :, 0], key, value, seen, scale or width**-0.5)
        return states[:, None]
    packed = query.reshape(num_rows, key.shape[1], num_heads // key.shape[1], width)
    states = functional.scaled_dot_product_attention(packed, key, value, mask, scale=scale)
    return states.reshape(num_rows, 1, num_heads, value.shape[3])


def has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether kernels of ours can attend."""
    is_plain = key.shape[3] == value.shape[3] <= MOST_WIDTH
    is_plain &= query.stride(3) == key.stride(3) == value.stride(3) == 1
    is_mask = mask is None or (mask.dtype == torch.bool and mask.shape[0] == len(key))
    return default_backend(key) == "triton" and is_plain and is_mask


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])


def decoder_layers(base: nn.Module, num_layers: int) -> list[nn.Module] | None:
    """The layers that have a cache each, in order; None where it is not plain which they are."""
    lists = [
        list(module)
        for module in base.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(
            {getattr(part, "layer_idx", i) for part in layer.modules()} == {i}
            and any(hasattr(part, "layer_idx") for part in layer.modules())
            for i, layer in enumerate(module)
        )
    ]
    return lists[0] if len(lists) == 1 else None


class CompiledLayers:
    """Within its context the model's layers are compiled, or kernels of ours where they compute the
    same, and steps of the batch may run.
    """

    def __init__(self, layers: list[nn.Module], backend: str | Callable) -> None:
        self.layers, backend = layers, shares_inputs(backend)
        self.compiled: list[Callable] = [
            torch.compile(layer._call_impl, dynamic=True, backend=backend) for layer in layers
        ]
        # whether a step with them is the model's own; None: nobody has compared it yet
        self.has_kernels: bool | None = None
        self.has_compiled: bool | None = None

    def is_checked(self, num_rows: int) -> bool:
        has_kernels = self.has_kernels and num_rows <= MOST_ROWS
        return bool(has_kernels) or self.has_compiled is not None

    def check(self, step: Callable[[Within], None], num_rows: int) -> None:
        """Whatever so many rows, or fewer later, are written with takes a step before, which raises
        where it is not the model's own.
        """
        if self.has_kernels is None:
            self.has_kernels = self._agree(step)
        if not self.is_checked(num_rows):
            self.has_compiled = False
            step(partial(self._with, self._compiled))
            self.has_compiled = True

    def _agree(self, step: Callable[[Within], None]) -> bool:
        """Whether kernels compute what each layer does, and all of them together."""
        errors: list[bool] = []
        step(partial(self._with, partial(self._compared, errors)))
        if len(errors) < len(self.layers) or any(errors):
            return False
        try:
            step(partial(self._with, self._kernels))
        except CannotDecode:
            return False
        return True

    def _plain(self, batch: Batch) -> list[Callable]:
        return with_own([layer._call_impl for layer in self.layers], batch)

    def _compiled(self, batch: Batch) -> list[Callable]:
        return with_own(self.compiled, batch)

    def _kernels(self, batch: Batch) -> list[Callable] | None:
        parts = fit(self.layers, batch.layers[0], len(batch.token))
        return None if parts is None else Step(parts, batch).functions()

    def _compared(self, errors: list[bool], batch: Batch) -> list[Callable]:
        """The model's own, beside which kernels run."""
        own, ours = self._plain(batch), self._kernels(batch)
        if ours is None:
            return own
        return [compared(*pair, errors) for pair in zip(own, ours, strict=True)]

    def _fastest(self, batch: Batch) -> list[Callable]:
        kernels = self._kernels(batch) if self.has_kernels else None
        if kernels is not None:
            return kernels
        return self._compiled(batch) if self.has_compiled else self._plain(batch)

    def __call__(self, batch: Batch) -> AbstractContextManager[None]:
        return self._with(self._fastest, batch)

    @contextmanager
    def _with(self, functions_of: Callable[[Batch], Any], batch: Batch) -> Iterator[None]:
        """What functions_of gives stands in the place of each layer's forward."""
        before: list[tuple[nn.Module, str, Any]] = []

        def change(module: nn.Module, name: str, value: Any) -> None:
            before.append((module, name, getattr(module, name)))
            put(module, name, value)

        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention_of_one_token(attention)
        try:
            for layer, function in zip(self.layers, functions_of(batch), strict=True):
                change(layer, "_compiled_call_impl", function)
                for module in layer.modules():
                    if hasattr(module, "layer_idx"):
                        change(module, "layer_idx", 0)
            limit = max(LIMIT, torch._dynamo.config.recompile_limit)
            # hooks that parts of a layer get after it was compiled have to run too
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, recompile_limit=limit):
                yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
            for module, name, value in before:
                put(module, name, value)


def put(module: nn.Module, name: str, value: Any) -> None:
    """Neither a parameter nor a module, for which nn.Module would look first."""
    object.__setattr__(module, name, value)


def with_own(functions: Sequence[Callable], batch: Batch) -> list[Callable]:
    """Each with its own part of the cache."""

    def run(function: Callable, own: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs | own)

    own = [{batch.cache_name: Cache(layers=[states])} for states in batch.layers]
    return [partial(run, *pair) for pair in zip(functions, own, strict=True)]


@cache
def attention_of_one_token(attention: Callable) -> Callable:
    def run(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        is_shared = attention_mask is None or attention_mask.shape[1] == 1
        if query.shape[2] == 1 and is_shared and all(kwargs.get(name) is None for name in BESIDE):
            # under autocast keys are in 16 bits, and queries with norms of 32 are not
            return attend(query.to(key.dtype), key, value, attention_mask, scaling), None
        states: tuple[Tensor, None] = attention(
            *(module, query, key, value, attention_mask), dropout=dropout, scaling=scaling, **kwargs
        )
        return states

    return run
