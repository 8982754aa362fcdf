"""Kernels of a decoder layer beside torch: products and norms, attention of a new token."""

import pytest
import torch
from torch.nn import functional

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers import layer_attention, layer_products
from gold_trainer.writers.layer_products import Blocks, Normed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not (is_interpreted() or torch.cuda.is_available()), reason="no Triton here"
)
EPS = 1e-3
# rows, inputs, outputs: whole blocks, and parts of them
CASES = [
    (3, 96, 50, Blocks(16, 32, 2, 4)),
    (5, 128, 96, Blocks(32, 64, 2, 4, parts=2)),
    (20, 100, 64, Blocks(16, 32, 2, 4, parts=3)),
]


def normed(hidden, weight, eps=EPS):
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight


def scaled(hidden, weight, num_parts):
    made = torch.empty_like(hidden), torch.full((num_parts, len(hidden)), torch.nan, device=DEVICE)
    layer_products.scale_rows(hidden, weight, *made)
    return Normed(*made, EPS)


def shared(rows, sizes, blocks):
    """Sums of parts, and how many there are of each tile."""
    size = layer_products.parts_size(rows, sizes, blocks)
    assert (size > 0) is (blocks.parts > 1)
    tiles = sum(layer_products.num_tiles(n, blocks) for n in sizes)
    counts = torch.zeros(tiles, dtype=torch.int32, device=DEVICE)
    return torch.full((max(1, size),), torch.nan, device=DEVICE), counts


@pytest.mark.parametrize(("rows", "inputs", "outputs", "blocks"), CASES)
@pytest.mark.parametrize("sizes", [(), (16, 33)])
def test_a_norm_in_front_of_matrices_is_divided_by_behind_them(
    rows, inputs, outputs, blocks, sizes
):
    hidden = 3 * torch.randn(rows, inputs, device=DEVICE)
    weight = torch.rand(inputs, device=DEVICE)
    sizes = (outputs, *sizes)
    matrices = [torch.randn(size, inputs, device=DEVICE) for size in sizes]
    biases = [torch.randn(size, device=DEVICE) for size in sizes]
    for given in (None, biases):
        pairs = zip(matrices, given or [None] * len(sizes), strict=True)
        expected = torch.cat([functional.linear(normed(hidden, weight), *p) for p in pairs], -1)
        out = torch.full_like(expected, torch.nan)
        parts, counts = shared(rows, sizes, blocks)
        for _ in range(2):  # the counts are those of the beginning again
            layer_products.normed_product(
                *(scaled(hidden, weight, 5), matrices, given, out, parts, counts, blocks)
            )
        assert not counts.any()
        torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "inputs", "outputs", "blocks"), CASES)
def test_a_gate_is_part_of_its_product(rows, inputs, outputs, blocks):
    hidden, weight = torch.randn(rows, inputs, device=DEVICE), torch.rand(inputs, device=DEVICE)
    gate, up = torch.randn(2, outputs, inputs, device=DEVICE).unbind()
    x = normed(hidden, weight)
    expected = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
    out = torch.full_like(expected, torch.nan)
    matrices = [gate, up.contiguous()]
    x = scaled(hidden, weight, 1)
    made = shared(rows, [outputs, outputs], blocks)
    layer_products.normed_product(x, matrices, None, out, *made, blocks, is_gated=True)
    torch.testing.assert_close(out, expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "inputs", "outputs", "blocks"), CASES)
def test_a_sum_leaves_what_the_next_norm_needs(rows, inputs, outputs, blocks):
    x, matrix = (
        torch.randn(rows, inputs, device=DEVICE),
        torch.randn(outputs, inputs, device=DEVICE),
    )
    residual, weight = torch.randn(rows, outputs, device=DEVICE), torch.rand(outputs, device=DEVICE)
    expected = residual + functional.linear(x, matrix)
    tiles = layer_products.num_tiles(outputs, blocks)
    parts, counts = shared(rows, [outputs], blocks)
    for _ in range(2):  # the counts are those of the beginning again
        out, by_weight = torch.full((2, rows, outputs), torch.nan, device=DEVICE).unbind()
        squares = torch.full((tiles, rows), torch.nan, device=DEVICE)
        layer_products.added_product(
            *(x, matrix, residual, weight, out, by_weight, squares, parts, counts, blocks)
        )
        torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(by_weight, expected * weight, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(squares.sum(0), expected.square().sum(1))
        assert not counts.any()


def turned(x, weight, cos, sin):  # (B, heads, D)
    x = x if weight is None else normed(x, weight)
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@pytest.mark.parametrize(
    ("rows", "heads", "group", "width", "tokens", "position", "has_mask"),
    [
        (2, 2, 2, 16, 150, 100, True),
        (3, 1, 4, 24, 70, 69, True),
        (1, 2, 1, 32, 64, 63, False),
        (2, 1, 1, 16, 64, 0, True),
        (1, 1, 2, 16, 1100, 1064, True),
    ],
)
@pytest.mark.parametrize("has_norm", [True, False])
def test_a_new_token_is_attended_to_and_kept(
    rows, heads, group, width, tokens, position, has_mask, has_norm
):
    """Whatever was in its place before."""
    states = torch.randn(rows, (heads * group + 2 * heads) * width, device=DEVICE)
    weights = torch.rand(2, width, device=DEVICE).unbind() if has_norm else (None, None)
    cos, sin = torch.randn(2, rows, width, device=DEVICE).unbind()
    key, value = torch.randn(2, rows, heads, tokens, width, device=DEVICE).unbind()
    mask = torch.rand(rows, tokens, device=DEVICE) < 0.5
    for row in range(rows):
        mask[row, : 20 * row] = False
    mask[:, position], mask[:, position + 1 :] = True, False
    mask, first = (mask, mask.byte().argmax(-1)) if has_mask else (None, None)
    sizes = [heads * group * width, heads * width, heads * width]
    query, new_key, new_value = states.split(sizes, -1)
    query = turned(query.view(rows, -1, width), weights[0], cos, sin)
    keys, values = key.clone(), value.clone()
    keys[:, :, position] = turned(new_key.view(rows, heads, width), weights[1], cos, sin)
    values[:, :, position] = new_value.view(rows, heads, width)
    expected = functional.scaled_dot_product_attention(
        query.view(rows, heads, group, width),
        *(keys, values, None if mask is None else mask[:, None, None]),
        scale=0.3,
    )
    key[:, :, position] = value[:, :, position] = torch.nan
    counts = torch.zeros(rows * heads, dtype=torch.int32, device=DEVICE)
    actual = layer_attention.attend_new(
        *(states, layer_attention.Rotary(*weights, EPS, EPS, cos, sin), key, value),
        *(torch.tensor([position], device=DEVICE), mask, first, 0.3, counts),
    )
    torch.testing.assert_close(actual, expected.reshape(rows, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(key, keys)
    torch.testing.assert_close(value, values)
    assert not counts.any()
