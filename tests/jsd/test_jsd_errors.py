"""Every ValueError of the losses names the function, what was expected, what came and the
remedy.
"""

import subprocess
import sys

import pytest
import torch

from gold_kernels import FusedLinearJSDLoss, fused_linear_jsd
from support.jsd_cases import random_case

N, V, D_S, D_T = 6, 20, 8, 12


def call(**changes):
    case = random_case(N, V, D_S, D_T)
    options = case._asdict() | changes
    return fused_linear_jsd(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_weight": torch.randn(V + 4, D_T)}, r"V=20 and V=24; pass vocab_size="),
        (
            {"vocab_size": V + 1},
            r"vocab_size must be .* in \[1, 20\].*got 21; pass len\(tokenizer\)",
        ),
        ({"vocab_size": 0}, r"vocab_size must be a whole number in \[1, 20\]"),
        ({"student_hidden": torch.randn(2, 3, D_S)}, r"student_hidden must be \(N, D\).*gather"),
        ({"teacher_hidden": torch.randn(D_T)}, r"teacher_hidden must be \(N, D\)"),
        ({"student_weight": torch.randn(V)}, r"student_weight must be \(V, D\)"),
        ({"student_weight": torch.randn(V, D_S + 1)}, r"share the hidden size, got D=8 and D=9"),
        ({"student_weight": torch.randn(0, D_S)}, r"at least one vocabulary row.*ZeRO-3"),
        ({"student_weight": torch.ones(V, D_S, dtype=torch.int8)}, r"float tensor, got torch.int8"),
        ({"student_weight": torch.randn(V, D_S).double()}, r"float64 needs both sides"),
        ({"teacher_hidden": torch.randn(N + 1, D_T)}, r"same N rows, got N=6 and N=7"),
        ({"student_weight": torch.empty(V, D_S, device="meta")}, r"on the device of.*move it with"),
        (
            {
                "teacher_hidden": torch.empty(N, D_T, device="meta"),
                "teacher_weight": torch.empty(V, D_T, device="meta"),
            },
            r"must be on one device, got cpu and meta",
        ),
        (
            {
                "teacher_hidden": torch.randn(N, D_T).double(),
                "teacher_weight": torch.randn(V, D_T).double(),
            },
            r"float64 needs both sides",
        ),
        (
            {"student_bias": torch.randn(V + 1)},
            r"student_bias must be \(V,\) = \(20,\), got \(21,\)",
        ),
        ({"teacher_bias": torch.randn(V, 1)}, r"teacher_bias must be \(V,\)"),
        ({"row_weights": torch.ones(N - 1)}, r"row_weights must be .* \(6,\), got \(5,\)"),
        ({"row_weights": torch.ones(N, dtype=torch.int64)}, r"row_weights must be a float tensor"),
        ({"row_weights": torch.ones(N, requires_grad=True)}, r"row_weights must not require"),
        ({"row_weights": torch.ones(N, device="meta")}, r"row_weights must be on cpu.*move them"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\].*got -0.1"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\].*got 1.5"),
        ({"beta": float("nan")}, r"beta must be in \[0, 1\]"),
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0.0"),
        ({"temperature": -1.0}, r"temperature must be positive"),
        ({"chunk_size": 0}, r"chunk_size must be a whole number .* at least, got 0; pass None"),
        ({"chunk_size": 8.0}, r"chunk_size must be a whole number of rows, .* got 8.0; pass None"),
        (
            {"vocab_size": 8.0},
            r"vocab_size must be a whole number in \[1, 20\].* got 8.0; pass len",
        ),
        ({"backend": "cuda"}, r"backend must be None, 'triton' or 'torch', got 'cuda'"),
    ],
)
def test_wrong_arguments_say_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        call(**changes)
    assert str(error.value).startswith("fused_linear_jsd: ")


def test_triton_refuses_float64():
    case = random_case(N, V, D_S, D_T)
    with pytest.raises(
        ValueError, match=r"computes in float32, got float64|needs tensors on a GPU"
    ):
        fused_linear_jsd(*(tensor.double() for tensor in case), backend="triton")


def _run_python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter without TRITON_INTERPRET."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_triton_on_cpu_tensors_without_the_interpreter_is_refused():
    code = """
import torch
from gold_kernels import fused_linear_jsd
tensors = [torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 4)]
try:
    fused_linear_jsd(*tensors, backend="triton")
except ValueError as error:
    print(error)
"""
    message = _run_python(code)
    assert "needs tensors on a GPU, got cpu" in message and "TRITON_INTERPRET=1" in message


def test_the_losses_import_neither_transformers_nor_the_trainer_and_run_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # import triton now fails
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from gold_kernels import fused_linear_jsd
loss = fused_linear_jsd(torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 4))
assert loss.isfinite()
try:
    fused_linear_jsd(torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 4),
                     backend="triton")
except ValueError as error:
    print(error)
assert "transformers" not in sys.modules and "trainer" not in sys.modules
"""
    assert "needs the package triton, which is not installed" in _run_python(code)


def test_the_module_checks_its_labels_and_scalars():
    with pytest.raises(ValueError, match=r"FusedLinearJSDLoss: beta must be in \[0, 1\]"):
        FusedLinearJSDLoss(beta=2.0)
    loss = FusedLinearJSDLoss()
    case = random_case(N, V, D_S, D_T)
    with pytest.raises(ValueError, match=r"FusedLinearJSDLoss: labels must be an int64 .* \(6,\)"):
        loss(*case, torch.zeros(N + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels must be an int64 tensor"):
        loss(*case, torch.zeros(N))
    heads = case._replace(teacher_weight=torch.randn(V + 4, D_T))
    with pytest.raises(ValueError, match=r"V=20 and V=24; pass vocab_size=len\(tokenizer\)"):
        loss(*heads, torch.zeros(N, dtype=torch.int64))
    heads = heads._replace(teacher_weight=heads.teacher_weight[:V])
    assert loss(*heads, torch.zeros(N, dtype=torch.int64)).isfinite(), "the remedy works"
