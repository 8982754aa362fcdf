"""Fused linear JSD against eager torch: time, peak memory and error, forward and backward.

    python benchmarks/bench_jsd.py --rows 512 2048 --vocab 32000 --student-hidden 512
    --teacher-hidden 1024

N scored rows, V vocabulary, D_s and D_t hidden sizes; trainable head, beta 0.5. Before anything is
timed the case is checked against the float64 oracle on its first rows, and a failed check prints no
number. Bytes that eager keeps: both logits, log-probabilities, probabilities and the mixture,
(N, V) each; fused keeps one chunk of logits and gradients.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write_rows
from torch import Tensor

from gold_kernels import fused_linear_jsd, peak_extra_bytes, reference

ORACLE_ROWS = 64
MAX_GRAD_ERROR = {torch.float32: 1e-4, torch.bfloat16: 4e-3}
IMPLEMENTATIONS = {"eager": reference.linear_jsd, "fused": fused_linear_jsd}


def random_case(
    n: int, v: int, d_s: int, d_t: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, device=device) * scale).to(dtype)

    case = [
        normal(n, d_s, 1),
        normal(v, d_s, d_s**-0.5),
        normal(n, d_t, 1),
        normal(v, d_t, d_t**-0.5),
    ]
    case[0].requires_grad_()
    case[1].requires_grad_()
    return case


def grad_error(function: Any, case: list[Tensor]) -> float:
    """Relative error of grad_hidden against float64, on the first rows."""
    rows = [case[0][:ORACLE_ROWS], case[1], case[2][:ORACLE_ROWS], case[3]]

    def grad_hidden(loss_function: Any, tensors: list[Tensor]) -> Tensor:
        leaf = tensors[0].detach().requires_grad_()
        return torch.autograd.grad(loss_function(leaf, *tensors[1:]), leaf)[0].double()

    oracle = grad_hidden(reference.linear_jsd, [tensor.detach().double() for tensor in rows])
    return float((grad_hidden(function, rows) - oracle).norm() / oracle.norm())


def milliseconds(step: Any, device: str, repeats: int) -> list[float]:
    """Sorted times after two warm-up calls."""
    times = []
    for i in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1000 * (time.perf_counter() - start))
    return sorted(times)


def measure(name: str, case: list[Tensor], device: str, repeats: int) -> dict[str, Any]:
    function, dtype = IMPLEMENTATIONS[name], case[0].dtype
    error = grad_error(function, case)
    if name == "fused" and error > MAX_GRAD_ERROR[dtype]:
        sys.exit(f"fused: gradient error {error:.1e} exceeds {MAX_GRAD_ERROR[dtype]}; no numbers")

    def step() -> None:
        torch.autograd.grad(function(*case), case[:2])

    times = milliseconds(step, device, repeats)
    return {
        "implementation": name,
        "ms_median": round(statistics.median(times), 3),
        "ms_p20": round(times[int(0.2 * (len(times) - 1))], 3),
        "ms_p80": round(times[round(0.8 * (len(times) - 1))], 3),
        "peak_mib": round(peak_extra_bytes(step, device) / 2**20, 1),
        "grad_hidden_error": f"{error:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--student-hidden", type=int, default=2048)
    parser.add_argument("--teacher-hidden", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS / "jsd.csv")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    results = []
    for n in options.rows:
        shape = {
            "N": n,
            "V": options.vocab,
            "D_s": options.student_hidden,
            "D_t": options.teacher_hidden,
        }
        case = random_case(*shape.values(), dtype, device)
        for name in IMPLEMENTATIONS:
            row = measure(name, case, device, options.repeats)
            results.append({**row, **shape, "dtype": options.dtype, **environment()})
            sys.stdout.write(f"{results[-1]}\n")
    write_rows(options.output, results)


if __name__ == "__main__":
    main()
