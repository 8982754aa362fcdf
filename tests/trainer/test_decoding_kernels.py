"""Kernels of a decoding step beside torch, and which layers of a graph are joined for them."""

import operator

import pytest
import torch
from torch.nn import functional

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers import compiled_layers, local, shared_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not (is_interpreted() or torch.cuda.is_available()), reason="no Triton here"
)


@pytest.fixture
def kernels(monkeypatch):
    for module in (compiled_layers, shared_inputs):
        monkeypatch.setattr(module, "default_backend", lambda tensor: "triton")


@pytest.mark.parametrize(
    ("rows", "heads", "group", "tokens", "width"),
    [
        (2, 3, 2, 192, 128),
        (3, 2, 1, 70, 24),
        (1, 1, 4, 64, 80),
        (1, 1, 1, 1, 16),
        (1, 1, 2, 1300, 8),
    ],
)
def test_attention_is_torchs(rows, heads, group, tokens, width, kernels):
    """Rows that see different tokens of the cache, none of what is behind them."""
    query = torch.randn(rows, heads * group, 1, width, device=DEVICE)
    key, value = torch.randn(2, rows, heads, tokens, width, device=DEVICE).unbind()
    mask = torch.rand(rows, 1, 1, tokens, device=DEVICE) < 0.5
    for row in range(rows):
        mask[row, ..., : row * tokens // 4] = False
    mask[..., tokens * 3 // 4 :] = False
    mask[..., tokens // 2] = True
    packed = query.reshape(rows, heads, group, width)
    for seen in (mask, None):
        expected = functional.scaled_dot_product_attention(packed, key, value, seen, scale=0.3)
        actual = compiled_layers.attend(query, key, value, seen, 0.3)
        torch.testing.assert_close(actual, expected.reshape(actual.shape), atol=1e-5, rtol=1e-4)


def test_what_is_hidden_is_never_looked_at(kernels):
    """Behind the newest token the cache may hold anything."""
    query = torch.randn(1, 2, 1, 16, device=DEVICE)
    key, value = torch.randn(2, 1, 2, 200, 16, device=DEVICE).unbind()
    mask = (torch.arange(200, device=DEVICE) < 70)[None, None, None]
    expected = compiled_layers.attend(query, key, value, mask, 0.3)
    key[:, :, 70:], value[:, :, 70:] = torch.inf, torch.nan
    assert torch.equal(compiled_layers.attend(query, key, value, mask, 0.3), expected)


def test_attention_that_the_kernel_does_not_know_is_torchs(kernels):
    key = torch.randn(2, 1, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    for plain in (mask, None):
        assert compiled_layers.has_kernel(key, key, key, plain)
    turned = torch.randn(2, 1, 8, 5).transpose(2, 3)
    for other in (
        (key, key, key[..., :4], mask),  # values of another width
        (key, key, key, mask.float()),  # numbers to be added
        (key, key, key, mask[:1]),
        (torch.randn(2, 1, 5, 512),) * 3 + (mask,),
        (turned, key, key, mask),
        (key, turned, key, mask),
        (key, key, turned, mask),
    ):
        assert not compiled_layers.has_kernel(*other)


@pytest.mark.parametrize("rows", [1, 5, 64, 65])
@pytest.mark.parametrize("sizes", [(50,), (50, 16), (16, 70, 33), (33, 16, 50, 70, 8)])
def test_matrices_of_one_input_give_what_each_gives_alone(rows, sizes, kernels):
    x = torch.randn(rows, 1, 300, device=DEVICE)
    weights = [torch.randn(size, 300, device=DEVICE) for size in sizes]
    expected = torch.cat([functional.linear(x, weight) for weight in weights], -1)
    actual = shared_inputs.linears(x, weights)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    if rows == 5 and len(sizes) == 2:
        torch.library.opcheck(shared_inputs.linears, (x, weights))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(32, 48), torch.nn.Linear(32, 16, bias=False)
        self.out = torch.nn.Linear(48, 32)
        self.up, self.gate = torch.nn.Linear(32, 64), torch.nn.Linear(32, 64)

    def forward(self, x):
        hidden = self.out(self.q(x)) * self.k(x).sum(-1, keepdim=True)
        return self.up(hidden) * self.gate(hidden)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_layers_that_share_an_input_become_one_operator(is_autocast, graphs, kernels):
    layer = Layer().to(DEVICE, torch.float16).requires_grad_(False)
    x = torch.randn(3, 1, 32, device=DEVICE, dtype=None if is_autocast else torch.float16)
    compiled = torch.compile(layer, backend=shared_inputs.shares_inputs(local.COMPILER))
    with torch.autocast(DEVICE, torch.float16, enabled=is_autocast):
        expected, actual = layer(x), compiled(x)
    assert actual.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)
    targets = [node.target for node in graphs[0].graph.nodes]
    assert targets.count(torch.ops.gold_trainer.linears.default) == 2
    assert targets.count(functional.linear) == 1, "alone with its input"


@pytest.mark.parametrize(
    "change", [lambda x: x.mul_(2), lambda x: x.__setitem__(0, 1), lambda x: operator.iadd(x, 1)]
)
def test_layers_whose_input_changes_between_them_stay_as_they_are(change, graphs, kernels):
    layer = Layer().to(DEVICE, torch.float16).requires_grad_(False)

    def forward(x):
        x = x + 0
        first = layer.up(x)
        change(x)
        return first + layer.gate(x)

    x = torch.randn(3, 1, 32, device=DEVICE, dtype=torch.float16)
    compiled = torch.compile(forward, backend=shared_inputs.shares_inputs(local.COMPILER))
    torch.testing.assert_close(compiled(x), forward(x), atol=0.01, rtol=0.01)


def test_layers_of_32_bits_stay_as_they_are(graphs, kernels):
    layer = Layer().to(DEVICE).requires_grad_(False)
    torch.compile(layer, backend=shared_inputs.shares_inputs(local.COMPILER))(
        torch.randn(3, 1, 32, device=DEVICE)
    )
    targets = [node.target for node in graphs[0].graph.nodes]
    assert targets.count(functional.linear) == 5
