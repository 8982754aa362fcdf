"""Fused linear ULD beside eager torch and the GEMM floor: time, peak memory and error.

    python benchmarks/bench_uld.py           # on a GPU; a row of CSV per case
    python benchmarks/bench_uld.py --tiny    # the same code on small shapes anywhere, no record

Loss and gradients of student_hidden and student_weight, bfloat16. N pairs of rows, vocabularies V_s
and V_t, hidden sizes D_s and D_t. eager_bf16 is softmax, sort and L1 in bfloat16, as TRL computes
it; hybrid is ours with 60 % of the smaller vocabulary matched.

Before a shape is timed, the row kernel is checked on ERROR_ROWS rows of its logits against the
float64 oracle, whose subgradient is averaged over ties: random logits and, where V_s = V_t, a
teacher that is the student with 1 % noise. top64 is the share of rows whose 64 largest student
entries all have the right sign of the gradient. Where V_s differs from V_t the default refuses to
be timed beyond MAX_LOSS_ERROR and MAX_GRAD_ERROR.

Bytes of the row kernel with float32 logits: 4 (V_s + V_t) a pass, four passes, and 2 V_s written.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import RESULTS, RowLog, environment
from timing import MIB, milliseconds, release
from torch import Tensor

from gold_kernels import (
    VocabOverlap,
    fused_linear_uld,
    peak_extra_bytes,
    reference_uld,
    uld_loss,
)

SHAPES = (
    "4096x65536x151936x2048x4096",
    "512x65536x151936x2048x4096",
    "1024x65536x151936x2048x4096",
    "2048x65536x151936x2048x4096",
    "8192x65536x151936x2048x4096",
    "512x151936x151936x2048x4096",
    "512x151936x262144x2048x2560",
)
TINY_SHAPES = ("24x300x500x16x24", "24x400x400x16x24")
IMPLEMENTATIONS = (
    *("floor", "gold_kernels", "gold_kernels_fast", "gold_kernels_hybrid"),
    *("eager_bf16", "eager_float32"),
)
ERROR_ROWS = 16
MAX_LOSS_ERROR, MAX_GRAD_ERROR = 1e-4, 2e-2
MATCHED_SHARE = 0.6
FLOOR_CHUNK = 2048
ERROR_FIELDS = ("loss_error", "grad_error", "top64", "near_loss_error", "near_grad_error")
FIELDS = [
    *("implementation", "N", "V_s", "V_t", "D_s", "D_t", "dtype", "status"),
    *("median_ms", "p20_ms", "p80_ms", "times_floor", "peak_mib", "peak_extra_mib"),
    *ERROR_FIELDS,
    *("device", "torch", "triton", "transformers", "git_sha"),
]


class Shape(NamedTuple):
    n: int
    v_student: int
    v_teacher: int
    d_student: int
    d_teacher: int


class Heads(NamedTuple):
    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V_s, D_s)
    teacher_hidden: Tensor  # (N, D_t)
    teacher_weight: Tensor  # (V_t, D_t)


def make_heads(shape: Shape, device: str) -> Heads:
    """Logits of standard deviation 1."""

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, device=device) * scale).bfloat16()

    return Heads(
        normal(shape.n, shape.d_student).requires_grad_(),
        normal(shape.v_student, shape.d_student, shape.d_student**-0.5).requires_grad_(),
        normal(shape.n, shape.d_teacher),
        normal(shape.v_teacher, shape.d_teacher, shape.d_teacher**-0.5),
    )


def random_overlap(shape: Shape, device: str) -> VocabOverlap:
    num_matched = int(MATCHED_SHARE * min(shape.v_student, shape.v_teacher))
    sides = (torch.randperm(size, device=device)[:num_matched] for size in shape[1:3])
    student_ids, order = next(sides).sort()
    return VocabOverlap(student_ids, next(sides)[order], *shape[1:3])


def eager(heads: Heads, dtype: torch.dtype) -> Tensor:
    probs = [
        (hidden @ weight.T).to(dtype).softmax(-1).sort(-1, descending=True).values
        for hidden, weight in (heads[:2], heads[2:])
    ]
    size = max(side.shape[1] for side in probs)
    student, teacher = (torch.nn.functional.pad(side, (0, size - side.shape[1])) for side in probs)
    return (student - teacher).abs().sum(-1).mean()


def floor_step(heads: Heads) -> Callable[[], None]:
    """The four GEMMs alone, bf16 logits, float32 grad_weight."""
    hidden, weight, teacher, teacher_weight = (tensor.detach() for tensor in heads)
    chunk = min(FLOOR_CHUNK, hidden.shape[0])
    student_logits = hidden.new_empty(chunk, weight.shape[0])
    teacher_logits = hidden.new_empty(chunk, teacher_weight.shape[0])
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)

    def step() -> None:
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk]
            logits, others = student_logits[: rows.shape[0]], teacher_logits[: rows.shape[0]]
            torch.mm(rows, weight.T, out=logits)
            torch.mm(teacher[start : start + chunk], teacher_weight.T, out=others)
            torch.mm(logits, weight, out=grad_hidden[start : start + chunk])
            if hidden.device.type == "cuda":
                torch.addmm(grad_weight, logits.T, rows, out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight.addmm_(logits.T.float(), rows.float())

    return step


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    return float((actual.detach().double() - oracle).norm() / oracle.norm())


def kernel_errors(
    shape: Shape, device: str, dtype: torch.dtype, noise: float | None
) -> list[float]:
    """Errors of loss rows and logits gradient, and the share of rows with 64 right signs."""
    rows = min(ERROR_ROWS, shape.n)
    student = torch.randn(rows, shape.v_student, device=device)
    teacher = torch.randn(rows, shape.v_teacher, device=device)
    if noise is not None:
        teacher = student + noise * teacher
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    loss, metrics = uld_loss(student, teacher, return_metrics=True)
    (grad,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    oracle = reference_uld.uld_rows(exact, teacher.double())
    (oracle_grad,) = torch.autograd.grad(oracle.mean(), exact)
    top = student.detach().float().topk(min(64, shape.v_student)).indices
    signs = [side.gather(1, top).sign().double() for side in (grad, oracle_grad)]
    return [
        relative_error(metrics.loss, oracle.detach()),
        relative_error(grad, oracle_grad),
        float((signs[0] == signs[1]).all(-1).double().mean()),
    ]


def error_columns(name: str, shape: Shape, device: str) -> dict[str, Any]:
    """Columns, with a status if ours may not be timed."""
    dtype = torch.bfloat16 if name == "gold_kernels_fast" else torch.float32
    found = kernel_errors(shape, device, dtype, None)
    is_equal = shape.v_student == shape.v_teacher
    near = kernel_errors(shape, device, dtype, 0.01)[:2] if is_equal else []
    columns = {
        field: f"{value:.2e}" for field, value in zip(ERROR_FIELDS, [*found, *near], strict=False)
    }
    is_wrong = not (found[0] <= MAX_LOSS_ERROR and found[1] <= MAX_GRAD_ERROR)
    if name == "gold_kernels" and not is_equal and is_wrong:
        columns["status"] = f"refused: errors {found[0]:.1e} and {found[1]:.1e}"
    return columns


def loss_of(name: str, heads: Heads, shape: Shape) -> Callable[[], Tensor]:
    if name.startswith("eager"):
        dtype = torch.bfloat16 if name == "eager_bf16" else torch.float32
        return partial(eager, heads, dtype)
    options: dict[str, Any] = {}
    if name == "gold_kernels_fast":
        options["logits_dtype"] = torch.bfloat16
    if name == "gold_kernels_hybrid":
        overlap = random_overlap(shape, heads[0].device.type)
        options |= {"overlap": overlap, "matched_weight": 0.5, "unmatched_weight": 0.5}
    return partial(fused_linear_uld, *heads, **options)


def measure(
    name: str, heads: Heads, shape: Shape, errors: dict[str, Any], rep_ms: float
) -> dict[str, Any]:
    device = heads[0].device.type
    if name == "floor":
        step = floor_step(heads)
    else:
        loss = loss_of(name, heads, shape)

        def step() -> None:
            torch.autograd.grad(loss(), heads[:2])

    if "status" in errors:
        return errors
    step()
    times = milliseconds(step, device, rep_ms)
    columns = {"status": "ok", **errors}
    keys = ("median_ms", "p20_ms", "p80_ms")
    columns |= {key: f"{ms:.4g}" for key, ms in zip(keys, times, strict=True)}
    if name != "floor":
        peak = peak_extra_bytes(step, device)
        returned = sum(leaf.nbytes for leaf in heads[:2])
        columns["peak_mib"] = f"{peak / MIB:.1f}"
        columns["peak_extra_mib"] = f"{(peak - returned) / MIB:.1f}"
    return columns


def run_shape(shape: Shape, options: argparse.Namespace, device: str, log: RowLog) -> None:
    heads = make_heads(shape, device)
    error_rows = {
        name: error_columns(name, shape, device)
        for name in ("gold_kernels", "gold_kernels_fast")
        if name in options.only
    }
    floor = None
    for name in options.only:
        try:
            result = measure(name, heads, shape, error_rows.get(name, {}), options.rep_ms)
        except torch.cuda.OutOfMemoryError:
            result = {"status": "out of memory"}
        row = dict.fromkeys(FIELDS, "") | {"implementation": name, "dtype": "bfloat16"}
        row |= dict(zip(("N", "V_s", "V_t", "D_s", "D_t"), shape, strict=True))
        row |= result | options.environment
        if row["median_ms"]:
            milli = float(row["median_ms"])
            floor = milli if name == "floor" else floor
            row["times_floor"] = f"{milli / floor:.3f}" if floor else ""
        log.add(row)
        keys = ("median_ms", "times_floor", "peak_extra_mib", *ERROR_FIELDS)
        line = f"{name:20}{'x'.join(map(str, shape)):30}{row['status']:4}"
        sys.stdout.write(f"{line} {'  '.join(str(row[key]) or '-' for key in keys)}\n")
        sys.stdout.flush()
        release(device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, anywhere; no record")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--shapes", nargs="+", help="NxV_sxV_txD_sxD_t")
    parser.add_argument("--rep-ms", type=float, default=100, help="of timed calls, about")
    parser.add_argument("--out", type=Path, help="CSV file; default results/uld.csv")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no CUDA device: pass --tiny to run the same code on small shapes")
    texts = options.shapes or (TINY_SHAPES if options.tiny else SHAPES)
    path = options.out if options.tiny else options.out or RESULTS / "uld.csv"
    options.environment = environment()
    log = RowLog(path, FIELDS)
    torch.manual_seed(0)
    for text in texts:
        run_shape(Shape(*map(int, text.split("x"))), options, device, log)
    return int(any(row["status"].startswith("refused") for row in log.rows))


if __name__ == "__main__":
    sys.exit(main())
