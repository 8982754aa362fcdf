"""Row kernels are compiled once, however many rows a call has and wherever its chunks begin.

N scored rows.
"""

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gold_kernels import fused_linear_jsd, fused_linear_loss, fused_linear_top_k, fused_linear_uld
from gold_kernels.jsd import triton_rows as jsd_rows
from gold_kernels.losses import make_loss
from gold_kernels.triton import formula_rows
from gold_kernels.triton.launch import is_interpreted
from gold_kernels.uld import triton_rows as uld_rows
from gold_kernels.uld import triton_token_rows as token_rows
from support.jsd_cases import random_case

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="looks at launches on a CPU")


class Launches:
    """In a kernel's place: runs it, and keeps for what Triton would have compiled it."""

    def __init__(self, kernel) -> None:
        self._kernel = kernel
        compiled = JITFunction(kernel.fn, **kernel.kwargs)
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(compiled.signature, compiled.params, backend)
        self.kinds: set[str] = set()

    def __getitem__(self, grid):
        def launch(*args, **named):
            _, kind, options = self._bind(*args, **named)
            self.kinds.add(f"{kind} {options}")
            self._kernel[grid](*args, **named)

        return launch


def top_k(student_hidden, student_weight, teacher_hidden, teacher_weight, **options):
    log_probs = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    values, ids = log_probs.topk(3)
    return fused_linear_top_k(student_hidden, student_weight, ids, values, **options)


def skew(*case, **options):
    return fused_linear_loss(make_loss("skew_kl"), *case, **options)


LOSSES = {
    "jsd": (fused_linear_jsd, jsd_rows, "jsd_rows_kernel"),
    "skew_kl": (skew, formula_rows, "formula_rows_kernel"),
    "uld": (fused_linear_uld, uld_rows, "uld_rows_kernel"),
    "top_k": (top_k, token_rows, "token_rows_kernel"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_kernel_is_compiled_once_for_any_number_of_rows(name, monkeypatch):
    loss_of, module, kernel = LOSSES[name]
    launches = Launches(getattr(module, kernel))
    monkeypatch.setattr(module, kernel, launches)
    for num_rows, chunk_size in ((1, 1), (7, 3), (16, 16)):
        case = random_case(num_rows, 37, 8, 8)
        loss_of(*case, chunk_size=chunk_size, labels=torch.arange(num_rows), backend="triton")
    assert len(launches.kinds) == 1
