"""Cases of pytest-benchmark for any machine: ours, with the torch backend on a CPU, and eager
PyTorch, compiled and not.

    pytest benchmarks/test_speed_of_jsd.py --benchmark-only --benchmark-group-by=param:head,param:n

Loss and gradients in float32, so that a CPU times the loss and not its emulation of bfloat16.
Before a case is timed it is checked against the float64 oracle.
"""

import pytest
import torch
from bench_jsd import preparation
from jsd_pairs import Shape, errors, random_and_near_converged, random_case
from peers import eager, eager_compiled

from gold_kernels.engine.chunk_plan import DEFAULT_BUDGET_BYTES

IMPLEMENTATIONS = {
    "gold_kernels": preparation("gold_kernels", DEFAULT_BUDGET_BYTES),
    "gold_kernels_1_mib": preparation("gold_kernels", 1 << 20),
    "eager": eager,
    "eager_compiled": eager_compiled,
}
MAX_ERROR = 1e-4  # float32; the loss of a random pair and both gradients


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("head", ["trainable", "frozen"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_jsd_and_gradients(benchmark, name, head, n):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shape = Shape(n, 2048, 64, 128)
    case = random_case(shape, generator, torch.float32, is_frozen=head == "frozen")
    pair, _ = random_and_near_converged(case, 0.5, generator)
    found = errors(pair, IMPLEMENTATIONS[name](pair.case, 0.5))
    assert all(error is None or error <= MAX_ERROR for error in found), found
    loss_function, leaves = IMPLEMENTATIONS[name](case, 0.5), case.leaves()

    def step() -> None:
        torch.autograd.grad(loss_function(), leaves)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
