"""Linear layers of a compiled graph that take the same input become one operator.

Where a row has one token, a linear layer costs what its matrix costs to read. Small matrices cannot
be read as fast as memory can: those of queries, keys and values take 3 times as long one by one as
in one launch, gate and up projections a quarter more. Weights of 32 bits stay with torch, which
sums as generate() does.
"""

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional

from gold_kernels.triton.launch import default_backend

MOST_ROWS = 64  # of the kernel
ARITHMETIC = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"
IN_PLACE = (operator.setitem, *(getattr(operator, f"i{name}") for name in ARITHMETIC))


@torch.library.custom_op("gold_trainer::linears", mutates_args=())
def linears(x: Tensor, weights: Sequence[Tensor]) -> Tensor:  # (..., K), (N, K) -> (..., sum of N)
    rows = x.reshape(-1, x.shape[-1]).to(weights[0].dtype)
    if default_backend(rows) == "triton" and len(rows) <= MOST_ROWS:
        from gold_trainer.writers.linear_kernel import SLOTS, linear_rows

        sizes = [len(weight) for weight in weights]
        out = rows.new_empty(len(rows), sum(sizes))
        for i in range(0, len(weights), SLOTS):
            columns = slice(sum(sizes[:i]), sum(sizes[: i + SLOTS]))
            linear_rows(rows, weights[i : i + SLOTS], out[:, columns])
    else:
        out = torch.cat([functional.linear(rows, weight) for weight in weights], -1)
    return out.view(*x.shape[:-1], -1)


@linears.register_fake
def _(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(len(w) for w in weights), dtype=weights[0].dtype)


def shares_inputs(backend: str | Callable) -> Callable:
    """The backend, behind a change of the graph."""
    compile_graph: Any = lookup_backend(backend) if isinstance(backend, str) else backend

    def run(graph: fx.GraphModule, examples: list[Any]) -> Callable:
        share_inputs(graph)
        compiled: Callable = compile_graph(graph, examples)
        return compiled

    return run


def share_inputs(module: fx.GraphModule) -> None:
    """linear(x, w), linear(x, v) -> slices of linears(x, [w, v]), their biases added behind."""
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.target is functional.linear and _is_taken(node):
            by_input.setdefault(node.args[0], []).append(node)
    for nodes in by_input.values():
        if len(nodes) == 1 or _is_changed(nodes):
            continue
        sizes = [_example(node.args[1]).shape[0] for node in nodes]
        with module.graph.inserting_before(nodes[0]):
            weights = [node.args[1] for node in nodes]
            together = module.graph.call_function(
                torch.ops.gold_trainer.linears.default, (nodes[0].args[0], weights)
            )
        for node, end, size in zip(nodes, accumulate(sizes), sizes, strict=True):
            with module.graph.inserting_before(node):
                own = module.graph.call_function(torch.narrow, (together, -1, end - size, size))
                if len(node.args) > 2 and node.args[2] is not None:
                    own = module.graph.call_function(torch.add, (own, node.args[2]))
            node.replace_all_uses_with(own)
            module.graph.erase_node(node)
    module.recompile()


def _is_taken(node: fx.Node) -> bool:
    """Whether its weight is there before the graph begins, and of 16 bits as what comes out."""
    if node.kwargs or not isinstance(node.args[1], fx.Node) or node.args[1].op != "placeholder":
        return False
    weight, out = _example(node.args[1]), _example(node)
    is_fast = default_backend(weight) == "triton" and weight.is_contiguous()
    return is_fast and weight.element_size() == 2 and weight.dtype == out.dtype


def _is_changed(nodes: Sequence[fx.Node]) -> bool:
    """Whether anything is changed in place between the first and the last: perhaps their input."""
    node = nodes[0]
    while node is not nodes[-1]:
        node = node.next
        name = node.target if isinstance(node.target, str) else node.target.__name__
        is_in_place = name.endswith("_") and not name.endswith("__")
        if is_in_place or "out" in node.kwargs or node.target in IN_PLACE:
            return True
    return False


def _example(node: Any) -> Any:
    return node.meta["example_value"]
