"""Decoder layers of the usual kind, each as five kernels of a step of decoding.

Between the seven matrices of such a layer (layer_parts.py) torch launches a dozen small kernels,
each of which takes longer to begin than to run. Here whatever surrounds a product is part of it
(layer_products.py, layer_attention.py).

Which layers are of the kind says their structure; that they compute nothing else is found out by
numbers, before they are used (compared()).

B rows, K hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gold_kernels.triton.launch import default_backend
from gold_trainer.writers.fixed_cache import Batch, FixedLayer
from gold_trainer.writers.layer_parts import Parts, parts_of
from gold_trainer.writers.shared_inputs import MOST_ROWS

MOST_WIDTH = 256  # of a head
# What a layer adds, in parts of its size, and what comes out, in steps of bfloat16.
MAX_ERROR, MAX_STEPS = 0.03, 2.0


def takes(weight: Tensor) -> bool:
    """Products are summed as torch does in 16 bits alone; w * x may be beyond float16's range."""
    return default_backend(weight) == "triton" and weight.dtype == torch.bfloat16


def fit(layers: list[nn.Module], states: FixedLayer, num_rows: int) -> list[Parts] | None:
    """Their weights, where kernels can have them all."""
    if num_rows > MOST_ROWS:
        return None
    found = [parts_of(layer) for layer in layers]
    parts = [part for part in found if part is not None]
    if len(parts) < len(layers):
        return None
    keys, width = states.keys, states.keys.shape[3]
    sizes = [matrix.shape for matrix in parts[0].matrices]
    num_queries, num_keys, num_values = (size[0] for size in sizes[:3])
    is_grouped = num_keys == num_values == keys.shape[1] * width and num_queries % num_keys == 0
    # where queries have a gate among them, kernels would read beyond the matrix behind attention
    is_grouped &= sizes[3][1] == num_queries and sizes[4] == sizes[5] == sizes[6][::-1]
    is_even = width % 2 == 0 and width <= MOST_WIDTH and keys.shape == states.values.shape
    if not (is_grouped and is_even):
        return None
    for part in parts:
        if [matrix.shape for matrix in part.matrices] != sizes or not takes(part.matrices[0]):
            return None
        if not all(m.is_contiguous() and m.dtype == keys.dtype for m in part.matrices):
            return None
        if any(len(norm) != width for norm in part.head_norms or ()):
            return None
    return parts


class Step:
    """One step of all layers: each finds what the one before has made for it."""

    def __init__(self, parts: list[Parts], batch: Batch) -> None:
        from gold_trainer.writers.layer_steps import Buffers

        self.parts, self.batch = parts, batch
        states = batch.layers[0].keys
        self.buffers = Buffers(len(states), states.shape[1], parts[0].matrices)
        self.masks: list[tuple[Tensor, Tensor, Tensor]] = []  # layers with windows have another
        self.last: tuple[Tensor | None, int] = None, 0  # what the layer before gave, its version

    def functions(self) -> list[Callable]:
        return [self._function(number) for number in range(len(self.parts))]

    def _function(self, number: int) -> Callable:
        from gold_trainer.writers.layer_steps import run_layer

        own, states = self.parts[number], self.batch.layers[number]
        behind = self.parts[min(number + 1, len(self.parts) - 1)].norms[0]

        def run(
            hidden_states: Tensor,  # (B, 1, K)
            *,
            position_embeddings: tuple[Tensor, Tensor],  # (B, 1, D)
            attention_mask: Tensor | None = None,  # (B, 1, 1, L)
            **kwargs: Any,
        ) -> Tensor:
            last, version = self.last
            is_known = last is hidden_states and version == hidden_states._version
            mask, first = self._seen(attention_mask)
            cos, sin = position_embeddings
            assert cos.shape == (len(hidden_states), 1, states.keys.shape[3])
            out = run_layer(
                *(self.buffers, own, behind, states, hidden_states[:, 0]),
                *(mask, first, cos[:, 0], sin[:, 0]),
                is_scaled=is_known,
            )
            out = out[:, None]
            self.last = out, out._version
            return out

        return run

    def _seen(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:  # (B, 1, 1, L)
        """(B, L), and (B,) the first token that each row sees."""
        if mask is None:
            return None, None
        for known, seen, first in self.masks:
            if known is mask:
                return seen, first
        assert mask.dtype == torch.bool and mask.shape[:3] == (len(self.buffers.heads), 1, 1)
        seen = mask[:, 0, 0].contiguous()
        self.masks.append((mask, seen, seen.view(torch.uint8).argmax(-1)))
        return self.masks[-1][1:]


def compared(own: Callable, ours: Callable, errors: list[bool]) -> Callable:
    """A layer's own forward, beside which ours runs."""

    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        expected = own(hidden_states, *args, **kwargs)
        try:
            actual = ours(hidden_states, *args, **kwargs)
        except Exception:  # other arguments, or whatever a compiler may raise
            errors.append(True)
            return expected
        if not isinstance(expected, Tensor):  # a tuple, as layers of older code give
            errors.append(True)
            return expected
        error = (actual.float() - expected.float()).square().mean().sqrt()
        added = (expected.float() - hidden_states.float()).square().mean().sqrt()
        size = expected.float().square().mean().sqrt()
        limit = MAX_ERROR * added + MAX_STEPS * 2.0**-9 * size
        errors.append(actual.dtype != expected.dtype or not bool(error <= limit))
        return expected

    return run
