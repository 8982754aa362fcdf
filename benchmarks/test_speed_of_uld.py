"""Cases of pytest-benchmark for any machine: ULD as test_speed_of_jsd.py has JSD.

    pytest benchmarks/test_speed_of_uld.py --benchmark-only --benchmark-group-by=param:sizes,param:n

Loss and gradients in float32. Before a case is timed it is checked against the float64 oracle.
"""

from functools import partial

import pytest
import torch
from bench_uld import eager
from jsd_pairs import Case
from uld_pairs import Shape, call_errors, random_case, with_logits

from gold_kernels import fused_linear_uld

eager_compiled = torch.compile(eager, dynamic=False)
LOSSES = {
    "gold_kernels": lambda case: fused_linear_uld(*case),
    "eager": partial(eager, dtype=torch.float32),
    "eager_compiled": partial(eager_compiled, dtype=torch.float32),
}
SIZES = {"two_vocabularies": (1500, 2048), "one_vocabulary": (2048, 2048)}
MAX_ERROR = 1e-4  # float32; loss and both gradients


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_uld_and_gradients(benchmark, name, sizes, n):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    inputs = random_case(Shape(n, *SIZES[sizes], 64, 128), generator)
    case = Case(*(side.detach().float().requires_grad_(side.requires_grad) for side in inputs))
    pair = with_logits(case)
    found = call_errors(pair, LOSSES[name](pair.case))
    assert all(error <= MAX_ERROR for error in found), found

    def step() -> None:
        torch.autograd.grad(LOSSES[name](case), case.leaves())
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
