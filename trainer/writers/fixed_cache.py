"""A cache of fixed size, and the state of the rows that are written with it.

All tensors keep their places from step to step. P prompts of a part, B rows, L tokens that the
cache has room for, R most new tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from gold_trainer.speed.on_host import sent
from gold_trainer.writers.prefill import Prefilled

MULTIPLE = 64  # lengths of the cache are multiples of it: kernels of attention like them


class FixedLayer(StaticLayer):
    """Keys and values at a position that all layers of a cache share."""

    keys: Tensor  # (B, heads, L, D)
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.position = keys, values, position
        self.device, self.dtype = keys.device, keys.dtype
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.position, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> Tensor:  # type: ignore[override]
        return self.position[0]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


def cache_length(width: int, room: int) -> int:
    """L of prompts so wide and completions so long."""
    return -(-(width + room) // MULTIPLE) * MULTIPLE


@dataclass
class Batch:
    """State of B rows between two steps."""

    layers: list[FixedLayer]
    position: Tensor  # (1,) of the next token in the cache
    count: Tensor  # (1,) tokens that are written
    mask: Tensor  # (B, L): 0 is padding in front of a prompt; what is not yet there counts as 1
    positions: Tensor  # (..., B, 1) of the next token, as the model counts them
    token: Tensor  # (B, 1) the last one written
    ids: Tensor  # (B, R)
    logprobs: Tensor  # (B, R)
    is_done: Tensor  # (B,)
    rooms: Tensor  # (B,)
    type_ids: dict[str, Tensor]  # (B, 1)
    cache_name: str  # of the model's argument
    options: dict[str, Any]  # more arguments of every step
    width: int  # of the prompts, all of which end there

    @property
    def num_bytes(self) -> int:
        sizes = (layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
        return sum(sizes)

    def keep(self, rows: Tensor) -> "Batch":
        for layer in self.layers:
            layer.keep(rows)
        own = ("mask", "token", "ids", "logprobs", "is_done", "rooms")
        changes = {name: getattr(self, name)[rows] for name in own}
        type_ids = {name: value[rows] for name, value in self.type_ids.items()}
        positions = self.positions.index_select(-2, rows)
        return replace(self, **changes, positions=positions, type_ids=type_ids)

    @classmethod
    def empty(cls, part: Prefilled, rooms: list[int], width: int) -> "Batch":
        """As many rows as rooms, with places for prompts up to this width; layers as those of the
        part.
        """
        num_rows, device = len(rooms), part.logits.device
        length = cache_length(width, max(rooms))

        def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*sizes, dtype=dtype, device=device)

        position = torch.full((1,), width, device=device)
        shape = num_rows, max(rooms)
        return cls(
            [
                FixedLayer(
                    keys.new_zeros(num_rows, keys.shape[1], length, keys.shape[3]),
                    values.new_zeros(num_rows, values.shape[1], length, values.shape[3]),
                    position,
                )
                for keys, values in part.layers
            ],
            position,
            zeros(1),
            (torch.arange(length, device=device) >= width).long().repeat(num_rows, 1),
            zeros(*part.positions.shape[:-2], num_rows, 1),
            zeros(num_rows, 1),
            zeros(*shape),
            zeros(*shape, dtype=torch.float32),
            zeros(num_rows, dtype=torch.bool),
            sent(torch.tensor(rooms), device),
            {name: zeros(num_rows, 1) for name in part.type_ids},
            *(part.cache_name, part.options, width),
        )

    def fill(self, start: int, part: Prefilled, index: Tensor) -> None:
        """Rows from start on begin with the prompts of these indices. Every prompt ends at the same
        place of the cache, whatever its length.
        """
        rows, width = slice(start, start + len(index)), self.width

        def put(buffer: Tensor, states: Tensor) -> None:  # (B, heads, L, D), (P, heads, w, D)
            buffer[rows, :, width - states.shape[2] : width] = states[index]

        for layer, (keys, values) in zip(self.layers, part.layers, strict=True):
            put(layer.keys, keys)
            put(layer.values, values)
        self.mask[rows, width - part.mask.shape[1] : width] = part.mask[index].to(self.mask)
        self.positions[..., rows, :] = part.positions.index_select(-2, index)
        for name, value in part.type_ids.items():
            self.type_ids[name][rows] = value[index]
