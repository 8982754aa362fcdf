"""What torch.compile is told of the gradients of an operator is what the operator returns."""

import pytest
import torch

from gold_kernels.engine.chunk_plan import Limits, Needs
from gold_kernels.engine.chunking import run_chunks
from gold_kernels.engine.gradients import empty_gradients
from gold_kernels.engine.linear_head import LinearHead


def laid_out(rows: int, columns: int, layout: str, dtype: torch.dtype) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).to(dtype).T
    step = 2 if layout == "wide" else 1
    return torch.randn(rows, step * columns).to(dtype)[:, ::step]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "transposed", "wide"])
@pytest.mark.parametrize("has_index", [False, True])
def test_fake_gradients_have_shape_strides_and_dtype_of_real_ones(has_index, layout, dtype):
    def row_function(student_logits, teacher_logits, grad_logits, rows, row_weights):
        grad_logits.zero_()

    leaves = laid_out(7, 8, layout, dtype), laid_out(10, 8, layout, dtype)
    bias = torch.zeros(20, dtype=dtype)[::2]
    index = torch.arange(7) if has_index else None
    head = LinearHead(*leaves, bias, row_index=index)
    needs = Needs(True, True, True)
    real = run_chunks(head, None, torch.ones(7).to(torch.float64), row_function, needs, Limits(3))
    for expected, fake in zip(real, empty_gradients(head[:3], needs), strict=True):
        assert (fake.shape, fake.stride()) == (expected.shape, expected.stride())
        assert fake.dtype == expected.dtype
