"""The five kernels of a layer, one after the other."""

import torch
from torch import Tensor

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers.fixed_cache import FixedLayer
from gold_trainer.writers.layer_attention import Rotary, attend_new
from gold_trainer.writers.layer_parts import Parts
from gold_trainer.writers.layer_products import (
    Blocks,
    Normed,
    added_product,
    normed_product,
    num_tiles,
    parts_size,
    scale_rows,
)

# Of those tried on an H200 the fastest, for up to 16 rows and for up to 64.
BLOCKS = {
    "heads": (Blocks(32, 128, 6, 4), Blocks(32, 128, 5, 4)),
    "out": (Blocks(64, 128, 4, 4, 4), Blocks(64, 128, 4, 4, 4)),
    "gate": (Blocks(64, 128, 4, 4), Blocks(64, 128, 4, 4)),
    "down": (Blocks(64, 128, 5, 4, 4), Blocks(64, 128, 5, 4, 4)),
}


def blocks_of(name: str, num_rows: int) -> Blocks:
    if is_interpreted():  # every operation costs Python time
        return Blocks(256, 256, 1, 4)
    return BLOCKS[name][num_rows > 16]


class Buffers:
    """What the kernels of a step leave for each other; all layers have the same ones."""

    def __init__(self, num_rows: int, num_heads: int, matrices: list[Tensor]) -> None:
        out, gate = matrices[3], matrices[4]
        hidden = len(out)
        named = {"heads": matrices[:3], "out": [out], "gate": matrices[4:6], "down": matrices[6:]}
        sizes = {name: [len(matrix) for matrix in own] for name, own in named.items()}
        self.blocks = {name: blocks_of(name, num_rows) for name in BLOCKS}
        tiles = {
            name: sum(num_tiles(size, self.blocks[name]) for size in own)
            for name, own in sizes.items()
        }

        def empty(*shape: int, dtype: torch.dtype = out.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=out.device)

        self.heads = empty(num_rows, sum(sizes["heads"]))
        self.gated = empty(num_rows, len(gate))
        self.scaled = empty(num_rows, hidden), empty(num_rows, hidden)
        # those of the first layer's input are written in as many parts as those of down
        self.squares = [
            empty(tiles[name], num_rows, dtype=torch.float32) for name in ("out", "down")
        ]
        most = max(parts_size(num_rows, sizes[name], self.blocks[name]) for name in BLOCKS)
        self.parts = empty(max(1, most), dtype=torch.float32)
        counts = [*tiles.values(), num_rows * num_heads]
        zeros = torch.zeros(sum(counts), dtype=torch.int32, device=out.device)
        self.counts = dict(zip([*tiles, "attention"], zeros.split(counts), strict=True))


def run_layer(
    buffers: Buffers,
    own: Parts,
    behind: Tensor,  # (K,) weight of the next layer's first norm
    states: FixedLayer,
    hidden: Tensor,  # (B, K)
    mask: Tensor | None,  # (B, L)
    first: Tensor | None,  # (B,) the first token that it shows
    cos: Tensor,  # (B, D)
    sin: Tensor,  # (B, D)
    *,
    is_scaled: bool,  # the layer before has left hidden in the buffers
) -> Tensor:  # (B, K)
    query, key, value, out, gate, up, down = own.matrices
    (between, scaled), blocks, counts = buffers.scaled, buffers.blocks, buffers.counts
    squares, first_squares = buffers.squares
    if not is_scaled:
        scale_rows(hidden, own.norms[0], scaled, first_squares)
    x = Normed(scaled, first_squares, own.eps[0])
    normed_product(
        *(x, [query, key, value], own.biases, buffers.heads),
        *(buffers.parts, counts["heads"], blocks["heads"]),
    )
    query_norm, key_norm = own.head_norms or (None, None)
    rotary = Rotary(query_norm, key_norm, *own.head_eps, cos, sin)
    attended = attend_new(
        *(buffers.heads, rotary, states.keys, states.values, states.position),
        *(mask, first, own.scaling, counts["attention"]),
    )
    middle = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    added_product(
        *(attended, out, hidden, own.norms[1], middle, between, squares, buffers.parts),
        *(counts["out"], blocks["out"]),
    )
    x = Normed(between, squares, own.eps[1])
    normed_product(
        *(x, [gate, up], None, buffers.gated, buffers.parts, counts["gate"], blocks["gate"]),
        is_gated=True,
    )
    result = torch.empty_like(middle)
    added_product(
        *(buffers.gated, down, middle, behind, result, scaled, first_squares, buffers.parts),
        *(counts["down"], blocks["down"]),
    )
    return result
